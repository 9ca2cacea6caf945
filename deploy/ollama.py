"""ollama: the model goes into Ollama under a name of its own, is asked there, and only then becomes NAME:latest.

The server is the one record of what it holds: the versions of a model are its tags of twelve hex digits (the store's own
names), and NAME:latest is ours when its digest is that of one of them. What another one made is never overwritten.
"""

import contextlib
import ipaddress
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from contract import files, gguf, rules
from contract.errors import UserError, shown
from contract.manifest import Golden, Manifest
from deploy import pull, sandbox, store

APP = Path("/Applications/Ollama.app")
INSTALL = "brew install ollama   (or https://ollama.com/download)"
# A name's part in Ollama (types/model/name.go): letters, digits, _ - . and no other, 80 of them at most.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
VERSION = re.compile(r"[0-9a-f]{12}")
LOADING = 600  # seconds: the first question loads the model, on a cold disk too
# Another build of llama.cpp rounds otherwise, and where two words are nearly as likely the answer takes another turn. A
# model that computes wrongly shares no words with what it said where it was made.
MIN_ALIKE = 0.2


class Absent(UserError):
    """Ollama is not there, or does not run: the other parts can go on without it."""


def program() -> str | None:
    """The command, also where the app has it."""
    inside = APP / "Contents" / "Resources" / "ollama"
    return shutil.which("ollama") or (str(inside) if os.access(inside, os.X_OK) else None)


def host() -> str:
    """The server's address, read from OLLAMA_HOST as Ollama reads it (envconfig/config.go)."""
    said = os.environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    scheme, there, rest = said.partition("://")
    scheme, rest = (scheme, rest) if there else ("http", said)
    usual = {"http": 80, "https": 443}.get(scheme, 11434) if there else 11434
    place, _, path = rest.partition("/")
    name, port = _split(place)
    name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(
        name, name
    )  # where a server listens, not where it is
    number = int(port) if port.isdecimal() and int(port) <= 65535 else usual
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{number}{f'/{path}' if path else ''}".rstrip("/")


def _split(place: str) -> tuple[str, str]:
    """(host, port or ''); an IPv6 address may stand in brackets."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(place.strip("[]"))), ""
    name, _, port = place.rpartition(":")
    return (name.strip("[]"), port) if _ else (place, "")


def local(url: str) -> bool:
    """Is the server on this machine?"""
    with contextlib.suppress(ValueError):
        name = urlsplit(url).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    return False


def version() -> str | None:
    """Of the server that answers; None: none does."""
    try:
        return str(Server(host()).ask("GET", "/api/version", seconds=5)["version"])
    except (UserError, KeyError):
        return None


class Server:
    """Ollama's HTTP API (docs/api.md), as far as it is used here."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, method: str, path: str, body: dict | None = None, seconds: float = 60) -> dict:
        """The JSON answer. Raises UserError with the server's own words."""
        import httpx

        try:
            # A proxy of the environment is for other machines.
            with httpx.Client(timeout=httpx.Timeout(seconds, connect=5), trust_env=not local(self.url)) as client:
                answer = client.request(method, self.url + path, json=body)
                said = answer.json() if answer.content.strip() else {}
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise UserError(
                f"Ollama at {self.url} does not answer {path}: {shown(str(error)) or type(error).__name__}",
                "see that its server runs (`ollama serve`, or open the app), then run the same command again",
            ) from error
        if answer.is_error or not isinstance(said, dict):
            why = said.get("error") if isinstance(said, dict) else said
            raise UserError(f"Ollama at {self.url} answers {path} with {answer.status_code}: {shown(str(why))}", AGAIN)
        return said

    def models(self) -> dict[str, dict]:
        """{name:tag: its facts (digest, size, modified_at)}"""
        found = self.ask("GET", "/api/tags").get("models") or []
        return {model["name"]: model for model in found}

    def prompt(self, model: str, messages: list[dict]) -> str:
        """The text that the server makes of a conversation."""
        body = {"model": model, "messages": messages, "stream": False, "_debug_render_only": True}
        said = self.ask("POST", "/api/chat", body, LOADING)
        try:
            return said["_debug_info"]["rendered_template"]
        except KeyError:
            raise UserError(f"Ollama {version()} does not show its prompts", "update Ollama: 0.12 or newer") from None

    def answer(self, model: str, message: str, most: int) -> dict:
        """Greedy; the JSON of /api/chat."""
        options = {"temperature": 0, "num_predict": most, "seed": 0}
        body = {"model": model, "messages": [{"role": "user", "content": message}], "stream": False, "options": options}
        return self.ask("POST", "/api/chat", body, LOADING)

    def copy(self, source: str, target: str) -> None:
        self.ask("POST", "/api/copy", {"source": source, "destination": target})

    def delete(self, model: str) -> None:
        self.ask("DELETE", "/api/delete", {"model": model})


def stage(version: Path, name: str | None = None, start: bool = False) -> dict:
    """Create NAME:<version> from the Modelfile, ask it, make it NAME:latest, and write ollama.json.

    name: None: the manifest's. start: whether a server may be started. What is there already and is the same is asked again
    but not made again. Raises Absent when there is no Ollama, UserError when the model there is not what was trained: it is
    withdrawn then, and latest stays what it was.
    """
    made, path = store.passed(version)
    server, before = serving(start), _read(version)
    model = f"{named(name or remembered(version) or made.name)}:{version.name}"
    there = server.models()
    refuse_anothers(there, model, {_read(other.parent).get("digest") for other in version.parent.glob("*/ollama.json")})
    recipe = files.sha256(version / "Modelfile")
    new = not (model in there and before.get("modelfile") == recipe and before.get("digest") == there[model]["digest"])
    if new:
        create(server, model, version)
    with withdrawn(server, model, new):
        template = compared(server, model, made, path)
        answers = asked(server, model, made)
    latest = f"{model.partition(':')[0]}:latest"
    server.copy(model, latest)
    record = {
        "stage": "ollama", "model": model, "latest": latest, "digest": server.models()[model]["digest"], "created": new,
        "modelfile": recipe, "server": version_of(server), "template": template, **answers,
    }  # fmt: skip
    files.write_json(version / "ollama.json", record)
    return record


def _read(version: Path) -> dict:
    """Its ollama.json; {} when there is none."""
    try:
        return files.read_json(version / "ollama.json")
    except UserError:
        return {}


def remembered(version: Path) -> str | None:
    """The name that this model has in Ollama, of whatever version."""
    records = sorted(version.parent.glob("*/ollama.json"), key=lambda path: path.stat().st_mtime)
    return _read(records[-1].parent).get("model", "").partition(":")[0] if records else None


def version_of(server: Server) -> str:
    return str(server.ask("GET", "/api/version").get("version"))


def named(name: str) -> str:
    """A name that Ollama takes, in small letters: it knows no others apart. Raises UserError for another one."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"Ollama cannot have a model called {shown(name)!r}: letters, digits, '_', '-' and '.', at most 80",
            "choose another: the same command with NAME=...",
        )
    return name.lower()


def serving(start: bool) -> Server:
    """The server that answers, or one that may be started now. Raises Absent."""
    if version():
        return Server(host())
    command, url = program(), host()
    if command is None:
        raise Absent(f"Ollama is not installed, and no server answers at {url}", INSTALL)
    if not local(url):
        raise Absent(f"no Ollama answers at {url} (OLLAMA_HOST)", "see that it runs there, or unset OLLAMA_HOST")
    if not (start or agreed(url)):
        raise Absent(
            f"Ollama is installed, but no server answers at {url}",
            "open the app or run `ollama serve`; or the same command with START=1 starts it",
        )
    return started(command, url)


def agreed(url: str) -> bool:
    """Asked only where somebody can answer."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"No Ollama server answers at {url}. Start it now? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def started(command: str, url: str) -> Server:
    """A server that outlives this command: the app where there is one. Raises UserError when it does not come up."""
    log = files.cache_dir() / "ollama.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    launch = ["open", "-j", "-a", "Ollama"] if APP.is_dir() else [command, "serve"]
    with log.open("ab") as out:
        process = subprocess.Popen(launch, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (process.poll() or 0) > 0:
        if version():
            say(f"ollama: started {' '.join(launch)}, it goes on running (pid {process.pid}, log {log})")
            return Server(url)
        time.sleep(0.2)
    raise UserError(f"`{' '.join(launch)}` was started and does not answer at {url}", f"read {log}")


def say(text: str) -> None:
    """Progress goes to stderr: stdout is for the answer."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def ours(there: dict[str, dict], name: str) -> dict[str, str]:
    """{version: digest} of the models called `name` that were made by Ferry."""
    tags = {full.partition(":")[2]: facts["digest"] for full, facts in there.items() if full.partition(":")[0] == name}
    return {tag: digest for tag, digest in tags.items() if VERSION.fullmatch(tag)}


def refuse_anothers(there: dict[str, dict], model: str, made: set[str | None]) -> None:
    """A latest that Ferry did not make stays what it is. made: digests in the store's records."""
    name = model.partition(":")[0]
    latest = there.get(f"{name}:latest")
    if latest and latest["digest"] not in made.union(ours(there, name).values()):
        raise UserError(
            f"Ollama holds a model {name}:latest already that Ferry did not make",
            f"the same command with NAME=another-name; or, if you do not need it, `ollama rm {name}`",
        )


def create(server: Server, model: str, version: Path) -> None:
    """`ollama create`, which copies the file into Ollama's own store. Raises UserError with what it says."""
    command = program()
    if command is None:
        raise Absent(f"a server answers at {server.url}, but there is no `ollama` command here to create with", INSTALL)
    say(f"ollama: creating {model} (Ollama makes a copy of its own)")
    done = subprocess.run(
        [command, "create", model, "-f", str((version / "Modelfile").absolute())],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode or model not in server.models():
        lines = [line for line in re.split(r"[\r\n]+", done.stdout + done.stderr) if line.strip()]
        told = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {done.returncode}"]
        raise UserError(f"`ollama create {model}` failed: {shown(told[-1])}", cure(told[-1]))


def cure(said: str) -> str:
    """What to do about the last words of `ollama create`."""
    if "no space left" in said.lower() or "failed to validate gguf" in said.lower():
        # While it makes its copy Ollama needs 2.9 times the file's size (measured), and a full disk may end in either line.
        return "free some disk where Ollama keeps its models (OLLAMA_MODELS): three times the file's size, then run the same command again"
    if "parameter" in said.lower() or "command must be one of" in said.lower():
        return "mend Modelfile.template, then run the same command again"
    return AGAIN


@contextlib.contextmanager
def withdrawn(server: Server, model: str, new: bool) -> Iterator[None]:
    """A new version that is not what was trained is taken away again; one that stood its test before stays."""
    try:
        yield
    except UserError as error:
        if not new:
            raise UserError(f"{error.message}; {model} stays, it had passed before", error.hint) from error
        server.delete(model)
        raise UserError(f"{error.message}; {model} was withdrawn", error.hint) from error
    except KeyboardInterrupt:
        if new:
            server.delete(model)
        raise


def compared(server: Server, model: str, made: Manifest, path: Path) -> str:
    """'TEMPLATE' or 'embedded': what gives the prompts there. Raises UserError when one is not the trained one."""
    asks = [golden for golden in made.golden if golden.add_generation_prompt and golden.messages[-1]["role"] == "user"]
    for golden, wanted in zip(asks, expected(made, path, asks), strict=True):
        said = server.prompt(model, list(golden.messages))
        if _bare(said, made) != _bare(wanted, made):
            raise UserError(
                f"Ollama {version_of(server)} gives another prompt than the trained one: "
                f"{shown(repr(said), 300)} instead of {shown(repr(wanted), 300)}; it took {chosen(server, model, made)}",
                "report it with this line; `make chat` and LM Studio do not go through Ollama",
            )
    return "embedded" if made.chat.embedded or not made.chat.turns else "TEMPLATE"


def expected(made: Manifest, path: Path, asks: list[Golden]) -> list[str]:
    """The trained prompts, with the Modelfile's SYSTEM where a conversation has none of its own."""
    system = made.chat.system
    lacking = [g for g in asks if system and g.messages[0]["role"] != "system"]
    header = gguf.read(path, path.name)
    told = [([{"role": "system", "content": system}, *g.messages], True) for g in lacking]
    bos, eos = pull.special(header, "bos"), pull.special(header, "eos")
    texts = iter(sandbox.prompts(made.chat.template, told, bos, eos) if told else [])
    return [next(texts) if golden in lacking else golden.prompt for golden in asks]


def _bare(prompt: str, made: Manifest) -> str:
    """Without the BOS that the tokenizer puts there by itself: Ollama may show it or not."""
    return prompt.removeprefix(made.chat.bos) if made.chat.bos and made.chat.adds_bos else prompt


def chosen(server: Server, model: str, made: Manifest) -> str:
    """Which template the server renders with, as far as it says."""
    template = str(server.ask("POST", "/api/show", {"model": model}).get("template"))
    if template == made.chat.template:
        return "the template embedded in the GGUF"
    if made.chat.turns and template.strip() == made.chat.turns.go().strip():
        return "the Modelfile's TEMPLATE, or silently the one embedded in the GGUF (its log says: template selection)"
    return f"one that it attached itself, {shown(repr(template), 200)}"


def asked(server: Server, model: str, made: Manifest) -> dict:
    """{answers, rule, score}: the smoke prompts, greedy, beside what the same file answered where it was made.

    score: by the task's own rule, 0 to 1; None where the rule needs more than two texts. Raises UserError when the answers are
    not those of this model, by the words they share.
    """
    rule = str(made.scores.get("rule"))
    judge, answers = rules.BY_NAME.get(rule), []
    for smoke in made.smoke:
        said = server.answer(model, smoke.message, len(smoke.answer_ids))  # so many as there, the end token included
        text = str(said.get("message", {}).get("content", ""))
        right = judge(text, smoke.answer) if judge else None
        alike = max(right or 0, rules.f1(text, smoke.answer))
        answers.append(
            {"message": smoke.message, "answer": text, "done": said.get("done_reason"), "right": right, "alike": alike}
        )
    if sum(a["alike"] for a in answers) < MIN_ALIKE * len(answers):
        raise UserError(
            f"{model} answers otherwise in Ollama than where it was made: "
            f"{shown(repr(answers[0]['answer']), 200)} instead of {shown(repr(made.smoke[0].answer), 200)}",
            "update Ollama and run the same command again; `make chat` does not go through Ollama",
        )
    return {
        "answers": answers,
        "rule": rule,
        "score": sum(a["right"] for a in answers) / len(answers) if judge else None,
    }


def gone(version: Path) -> int:
    """Take a version out of Ollama, its latest too when that is the same; returns the bytes that came back.

    Raises Absent when it is there and cannot be asked.
    """
    record = _read(version)
    if not record:
        return 0
    server = serving(False)
    there, before = server.models(), held(server)
    for name in going(there, record):
        server.delete(name)
    files.remove(version / "ollama.json")
    return before - held(server)


def going(there: dict[str, dict], record: dict) -> list[str]:
    """The version of this record and the latest that was copied from it, unless that is another version's copy as well."""
    model, latest = record["model"], record["latest"]
    rest = ours({name: facts for name, facts in there.items() if name != model}, model.partition(":")[0])
    alone = model in there and there[model]["digest"] not in rest.values()
    same = alone and latest in there and there[latest]["digest"] == there[model]["digest"]
    return [model] * (model in there) + [latest] * same


def held(server: Server) -> int:
    """Bytes of what the server holds: its blobs, where they can be seen (versions share them), else what it says itself."""
    blobs = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models") / "blobs"
    if local(server.url) and blobs.is_dir():
        return sum(path.stat().st_size for path in blobs.iterdir())
    return sum({facts["digest"]: int(facts.get("size", 0)) for facts in server.models().values()}.values())


AGAIN = "run the same command again; `ollama list` and Ollama's log say more"
