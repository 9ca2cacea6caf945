"""`ollama`: the command line (cmd/cmd.go), which does everything through the server."""

import argparse
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.helpers.standins import library, server
from tests.helpers.standins.go import Go
from tests.helpers.standins.library import PARAMETERS, Name

OLD = [
    "penalize_newline",
    "low_vram",
    "f16_kv",
    "logits_all",
    "vocab_only",
    "use_mlock",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
]
NO_SERVER = "could not connect to ollama server, run 'ollama serve' to start it"
NO_REGISTRY = (
    'pull model manifest: Get "https://registry.ollama.ai/": dial tcp: lookup registry.ollama.ai: no such host'
)
WRONG = "something went wrong, please see the ollama server logs for details"


class Failed(Exception):
    """`Error: ...`, exit code 1."""


def host() -> tuple[str, int]:
    """OLLAMA_HOST (envconfig/config.go)"""
    scheme, cut, rest = os.environ.get("OLLAMA_HOST", "").strip().strip("\"'").partition("://")
    usual = {"http": 80, "https": 443}.get(scheme, 11434) if cut else 11434
    place = (rest if cut else scheme).partition("/")[0]
    name, colon, port = place.rpartition(":")
    if not colon or (place.count(":") > 1 and not place.startswith("[")):
        name, port = place, ""
    good = port.isdecimal() and int(port) <= 65535
    return name.strip("[]") or "127.0.0.1", int(port) if good else usual


def request(method: str, path: str, body: object = None, data=None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*host())
    sent = data if data is not None else body and json.dumps(body)
    connection.request(method, quote(path, safe="/:"), sent, {"Content-Type": "application/json"})
    return connection.getresponse()


def ask(method: str, path: str, body: object = None, data=None) -> dict:
    """api/client.go, do: an error is what the JSON says, without the status."""
    try:
        answer = request(method, path, body, data)
        said = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f'{method.title()} "http://{":".join(map(str, host()))}{path}": {trouble(error)}') from error
    if answer.status >= 400:
        with contextlib.suppress(ValueError):
            raise Failed(json.loads(said)["error"])
        raise Failed(said.decode() or WRONG)
    return json.loads(said) if said and said[:1] == b"{" else {}


def trouble(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return f"dial tcp {':'.join(map(str, host()))}: connect: connection refused"
    return "EOF" if isinstance(error, http.client.HTTPException | ConnectionError) else str(error)


def stream(path: str, body: dict) -> Iterator[dict]:
    """api/client.go, stream: an error before the stream has its status in front."""
    try:
        answer = request("POST", path, body)
        for line in lines(answer):
            said = json.loads(line)
            if answer.status >= 400:
                raise Failed(f"{answer.status} {http.client.responses[answer.status]}: {said['error']}")
            if said.get("error"):
                raise Failed(said["error"])
            yield said
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"unexpected {trouble(error)}") from error


def lines(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """readline() would take a connection that breaks for the end; read1() does not."""
    text = b""
    while piece := answer.read1(1 << 16):
        *whole, text = (text + piece).split(b"\n")
        yield from whole
    if text:
        yield text


# What a spinner that was never seen leaves on stderr.
CLEARED = "\033[?25l\033[?2026h\033[?25l\033[1G\033[K\033[?25h\033[?2026l\033[2K\033[1G\033[?25h"


class Progress:
    """progress/progress.go: on stderr, in its escape sequences, whether a terminal reads it or not."""

    def __init__(self):
        self.lines: dict[str, str] = {}

    def add(self, key: str, line: str) -> None:
        self.lines[key] = line

    def stop(self) -> None:
        text = "\n".join(f"{line} \033[K" for line in self.lines.values())
        sys.stderr.write(f"\033[?2026h\033[?25l\033[1G{text}\033[?25h\033[?2026l\n")


def heartbeat() -> None:
    """Before every command but `serve` and --version. On a Mac the app is started by itself (cmd/start_darwin.go)."""
    try:
        ask("HEAD", "/")
    except Failed as error:
        if " refused" not in str(error):
            raise
        if not os.environ.get("OLLAMA_STANDIN_MAC"):
            raise Failed(NO_SERVER) from error
        wake()


def wake() -> None:
    server.control("woken").touch()
    with server.control("server.log").open("ab") as log:
        command = [sys.executable, __file__, "serve"]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    for _ in range(100):
        time.sleep(0.1)
        with contextlib.suppress(Failed):
            return ask("HEAD", "/") and None
    raise Failed("timed out waiting for server to start")


def version() -> None:
    try:
        theirs = ask("GET", "/api/version")["version"]
        print(f"ollama version is {theirs}")
    except Failed:
        theirs = ""
        print("Warning: could not connect to a running Ollama instance")
    if theirs != server.VERSION:
        print(f"Warning: client version is {server.VERSION}")


def serve(args: argparse.Namespace) -> None:
    name, port = host()
    models = os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models"
    try:
        server.serve(name, port, Path(models))
    except OSError as error:
        if error.errno == 98 or "in use" in str(error):
            raise Failed(f"listen tcp {name}:{port}: bind: address already in use") from error
        raise Failed(f"mkdir {error.filename}: {os.strerror(error.errno).lower()}") from error


def create(args: argparse.Namespace) -> None:
    progress = Progress()
    try:
        if not Name.parse(args.model).valid():
            raise Failed(f"invalid model name: {args.model}")
        file = Path(args.file or "Modelfile").absolute()
        if not file.exists():  # it goes on as with `FROM .`
            raise Failed("no Modelfile or safetensors files found")
        made = parsed(file)
        progress.add("gathering", "gathering model components")
        for path, digest in list(made.get("files", {}).items()):
            progress.add(digest, f"copying file {digest} 100%")
            with path.open("rb") as data:
                ask("POST", f"/api/blobs/{digest}", data=data)
            made["files"][path.name] = made["files"].pop(path)
        for said in stream("/api/create", {"model": args.model} | made):
            progress.add(said.get("digest") or said["status"], said["status"])
    finally:
        progress.stop()


def parsed(file: Path) -> dict:
    """What /api/create gets (parser/parser.go, ParseFile and CreateRequest)."""
    text, go = file.read_bytes().decode("utf-8-sig", "replace"), Go()
    commands = go.ask(Modelfile=text) if text else {"error": "no FROM line"}
    go.close()
    if isinstance(commands, dict):
        raise Failed(commands["error"])
    made: dict = {}
    for name, value in commands:
        if name.lower() == "from":
            made |= origin(value, file.parent)
        elif name.lower() in ("template", "system"):
            made[name.lower()] = value
        elif name.lower() in ("license", "adapter", "draft", "renderer", "parser", "message", "requires"):
            raise Failed(f"the stand-in has no {name}")
        elif name in OLD:
            print(f"warning: parameter {name} is deprecated")
        else:
            parameter(made.setdefault("parameters", {}), name, value)
    return made


def origin(value: str, folder: Path) -> dict:
    """A file, or a model that the server has."""
    path = Path(os.path.abspath(folder / Path(value).expanduser()))
    if not path.exists():
        return {"from": value}
    if path.is_dir():
        raise Failed("the stand-in takes a file")
    return {"files": {path: library.sha256(library.chunks(path))}}


def parameter(made: dict, name: str, value: str) -> None:
    """api/types.go, FormatParams"""
    if name not in PARAMETERS:
        raise Failed(f"unknown parameter '{name}'")
    kind = PARAMETERS[name]
    if kind is list:
        made.setdefault(name, []).append(value)
        return
    truth = {
        **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
        **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
    }
    try:
        made[name] = truth[value] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise Failed(f"invalid {kind.__name__} value [{value}]") from None


def run(args: argparse.Namespace) -> None:
    said = "" if sys.stdin.isatty() else sys.stdin.read()
    prompt = " ".join([said] * bool(said) + args.prompt)
    if not prompt and sys.stdin.isatty():
        raise Failed("the stand-in does not talk")
    try:
        ask("POST", "/api/show", {"model": args.model})
    except Failed as error:
        raise Failed(NO_REGISTRY if "not found" in str(error) else str(error)) from error
    wrapped = Wrapped(sys.maxsize if args.nowordwrap else 75)
    for part in stream("/api/generate", {"model": args.model, "prompt": prompt, "keep_alive": args.keepalive}):
        sys.stderr.write(CLEARED)
        wrapped.say(part["response"])
    if prompt:
        print("\n")


class Wrapped:
    """cmd.go, displayResponse: words are taken back to the next line, also where no terminal reads."""

    def __init__(self, width: int):
        self.width, self.at, self.word = width, 0, ""

    def say(self, text: str) -> None:
        for letter in text:
            if self.at + 1 > self.width:
                back = f"\033[{len(self.word)}D" if self.word else ""
                print(f"{back}\033[K\n{self.word}{letter}", end="")
                self.at = len(self.word) + 1
                continue
            print(letter, end="", flush=True)
            self.at, self.word = self.at + 1, "" if letter in " \t" else self.word + letter
            if letter in "\n\r":
                self.at, self.word = 0, ""


def unload(model: str) -> None:
    sys.stderr.write(CLEARED)
    ask("POST", "/api/show", {"model": model})
    list(stream("/api/generate", {"model": model, "keep_alive": 0}))


def stop(args: argparse.Namespace) -> None:
    try:
        unload(args.model)
    except Failed as error:
        if "not found" in str(error):
            raise Failed(f'couldn\'t find model "{args.model}" to stop') from error
        raise


def remove(args: argparse.Namespace) -> None:
    for model in args.models:
        try:
            unload(model)
        except Failed as error:
            if "not found" not in str(error).lower():
                sys.stderr.write(f"Warning: unable to stop model '{model}'\n")
        ask("DELETE", "/api/delete", {"name": model})
        print(f"deleted '{model}'")


def copy(args: argparse.Namespace) -> None:
    ask("POST", "/api/copy", {"source": args.source, "destination": args.destination})
    print(f"copied '{args.source}' to '{args.destination}'")


def show(args: argparse.Namespace) -> None:
    said = ask("POST", "/api/show", {"name": args.model})
    wanted = [kind for kind in ("modelfile", "parameters", "template", "system") if getattr(args, kind)]
    if len(wanted) > 1:
        raise Failed(
            "only one of '--license', '--modelfile', '--parameters', '--system', or '--template' can be specified"
        )
    if wanted:
        print(said.get(wanted[0], ""), end="" if wanted[0] in ("template", "system") else "\n")
        return
    about, family = said["details"], said["details"]["family"]
    sizes = (
        (name, said["model_info"].get(f"{family}.{name.replace(' ', '_')}"))
        for name in ("context length", "embedding length")
    )
    facts = [
        ("architecture", family),
        ("parameters", about["parameter_size"]),
        *sizes,
        ("quantization", about["quantization_level"]),
    ]
    section("Model", [["", name, str(value)] for name, value in facts if value is not None])
    section("Capabilities", [["", name] for name in said["capabilities"]])
    section("Parameters", [["", *line.split()] for line in said.get("parameters", "").splitlines()])
    section("System", [["", line.strip()] for line in said.get("system", "").splitlines() if line.strip()][:2])


def section(title: str, rows: list[list[str]]) -> None:
    if rows:
        print(" ", title)
        table(rows)
        print()


def table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) if i < len(row) else 0 for row in rows) for i in range(max(map(len, rows)))]
    for row in rows:
        print("".join(cell.ljust(width) + "    " for cell, width in zip(row, widths, strict=False)))


def bytes_of(count: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= unit:
            value = count / unit
            return f"{int(value)} {name}" if value >= 10 or value == int(value) else f"{value:.1f} {name}"
    return f"{count} B"


def when(moment: str) -> str:
    """format/time.go"""
    past = time.time() - datetime.fromisoformat(moment).timestamp()
    if past < -20 * 365 * 86400:
        return "Forever"
    count = int(abs(past))
    if count < 60:
        said = "Less than a second" if count < 1 else f"{count} second{'s' * (count > 1)}"
    elif count < 3600:
        said = "About a minute" if count < 120 else f"{count // 60} minutes"
    else:
        hours = round(count / 3600)
        said = "About an hour" if hours == 1 else f"{hours} hours" if hours < 48 else f"{hours // 24} days"
    return said + (" ago" if past >= 0 else " from now")


def models(args: argparse.Namespace) -> None:
    found = [m for m in ask("GET", "/api/tags")["models"] if m["name"].lower().startswith(args.prefix.lower())]
    rows = [[m["name"], m["digest"][:12], bytes_of(m["size"]), when(m["modified_at"])] for m in found]
    table([["NAME", "ID", "SIZE", "MODIFIED"], *rows])


def running(args: argparse.Namespace) -> None:
    found = [m for m in ask("GET", "/api/ps")["models"] if m["name"].startswith(args.prefix)]
    rows = [
        [m["name"], m["digest"][:12], bytes_of(m["size"]), "100% CPU", str(m["context_length"]), when(m["expires_at"])]
        for m in found
    ]
    table([["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"], *rows])


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Failed(message)


def parser() -> Parser:
    top = Parser(prog="ollama")
    top.add_argument("-v", "--version", action="store_true")
    verbs = top.add_subparsers(dest="verb")

    def verb(name: str, does, *arguments: str, also: tuple[str, ...] = ()) -> Parser:
        made = verbs.add_parser(name, aliases=also)
        made.set_defaults(does=does)
        for argument in arguments:
            made.add_argument(argument)
        return made

    verb("serve", serve, also=("start",))
    verb("create", create, "model").add_argument("-f", "--file")
    made = verb("show", show, "model")
    for kind in ("modelfile", "parameters", "template", "system"):
        made.add_argument(f"--{kind}", action="store_true")
    made = verb("run", run, "model")
    made.add_argument("prompt", nargs="*")
    made.add_argument("--keepalive")
    made.add_argument("--nowordwrap", action="store_true")
    verb("stop", stop, "model")
    verb("cp", copy, "source", "destination")
    verb("rm", remove).add_argument("models", nargs="+")
    verb("list", models, also=("ls",)).add_argument("prefix", nargs="?", default="")
    verb("ps", running).add_argument("prefix", nargs="?", default="")
    return top


def main() -> int:
    try:
        args = parser().parse_args()
        if args.verb is None:
            if not args.version:
                raise Failed("the stand-in has no menu")
            version()
            return 0
        if args.does is not serve:
            heartbeat()
        args.does(args)
    except Failed as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    socket.setdefaulttimeout(900)
    sys.exit(main())
