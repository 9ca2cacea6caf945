"""ollama: create the model in Ollama under a name of its own, test it there, and only then copy it to NAME:latest.

ollama.json says which models on the server are Ferry's, by name, digest and address of the server. NAME:latest is
Ferry's when its digest is in a record. No other model on the server is ever overwritten or deleted.
"""

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from common import files, gguf_reader, hub
from common.errors import UserError, shown
from contract import answer_rules, template_sandbox
from contract.manifest import Golden, Manifest
from deploy import store
from deploy.apps.ollama_server import INSTALL, Absent, Server, cure, held, host, local, port_of, program, serving
from deploy.stages import pull

RECORD = "ollama.json"
# One part of a model's name in Ollama (types/model/name.go): letters, digits, _ - and . only, at most 80 characters.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
# The least mean similarity of the answers. Another build of llama.cpp rounds differently, and where two tokens are
# almost equally likely the answer continues differently. A model that computes wrongly shares no words with the
# recorded answers.
MIN_ALIKE = 0.2
MEND = "mend Modelfile.template (`git diff Modelfile.template`)"
# What Ollama says about a bad Modelfile.
RECIPE = "parameter|command must be|invalid (int|float|bool) value|template error"


def stage(version: Path, name: str | None = None, start: bool = False) -> dict:
    """Create NAME:<version> from the Modelfile, test it, copy it to NAME:latest, write ollama.json and return it.

    A model that is there already and is the same is tested again but not created again. A new model that fails is
    withdrawn, and NAME:latest stays as it was.

    Args:
        version: A version that passed its smoke test and has a Modelfile.
        name: What Ollama shall call the model; None takes the name that it has there already, else the manifest's.
        start: Whether a server may be started.

    Raises:
        OllamaUnavailable: Ollama is not installed, or no server answers.
        UserError: The model in Ollama is not the trained one, or the name belongs to another model.
    """
    made, path = store.passed(version)
    if not (version / "Modelfile").is_file():  # `ollama create` would take whatever lies in the current folder
        raise UserError(f"{version} holds no Modelfile", "run `make modelfile` (part of `make deploy-mac`)")
    server, before = serving(start), store.read(version / RECORD)
    model = f"{named(name or remembered(version) or made.name)}:{version.name}"
    there, known = server.models(), before if is_on_server(before, server.url) else {}
    proven = list_proven(server, there, bare(model), version.parent)
    refuse_anothers(there, model, version.parent, server.url, proven)
    refuse_unknown(there, model, known, proven)
    recipe = files.sha256(version / "Modelfile")
    new = not (model in there and known.get("modelfile") == recipe and known.get("digest") == there[model]["digest"])
    if new:
        create(server, model, version)
    with withdrawn(server, model, version, before, new):
        template = compared(server, model, made, path)
        answers = asked(server, model, made)
    latest = latest_of(model)
    server.copy(model, latest)
    if before and not is_on_server(before, server.url):
        say_elsewhere(before, server.url)
    elif before and before["model"] != model:  # the model was renamed: delete it under its old name
        leave(server, before, version)
    record = {
        "stage": "ollama",
        "host": server.url,
        "model": model,
        "latest": latest,
        "digest": server.models()[model]["digest"],
        "created": new,
        "modelfile": recipe,
        "server": version_of(server),
        "template": template,
        **answers,
    }
    files.write_json(version / RECORD, record)
    return record


def remembered(version: Path) -> str | None:
    """Return the name that the model has in Ollama, from the newest record of any of its versions; None without one."""
    records = store.records(version.parent, RECORD)
    newest = max(records, key=lambda version: (version / RECORD).stat().st_mtime, default=None)
    return bare(records[newest]["model"]) if newest else None


def bare(model: str) -> str:
    """Return NAME of NAME:<version>."""
    return model.partition(":")[0]


def latest_of(model: str) -> str:
    """Return NAME:latest for NAME:<version>."""
    return f"{bare(model)}:latest"


def version_of(server: Server) -> str:
    """Return the version of Ollama that a server runs."""
    return str(server.ask("GET", "/api/version").get("version"))


def named(name: str) -> str:
    """Return the name in lower case, since Ollama ignores case. Raises UserError for a name that it does not allow."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"Ollama cannot have a model called {shown(name)!r}: letters, digits, '_', '-' and '.', at most 80",
            "choose another: the same command with NAME=...",
        )
    return name.lower()


def list_records(folder: Path, url: str) -> dict[Path, dict]:
    """Return {version: its ollama.json} for the versions of a model that are on the server at `url`."""
    return {v: record for v, record in store.records(folder, RECORD).items() if is_on_server(record, url)}


def is_on_server(record: dict, url: str) -> bool:
    """Return whether a record is about the server at `url`. A record of an older Ferry names no server and counts."""
    known = record.get("host")
    if known is None or known == url:
        return True
    return isinstance(known, str) and local(known) and local(url) and port_of(known) == port_of(url)


def list_digests(records: dict[Path, dict], there: dict[str, dict]) -> set[str]:
    """Return the digests of the models that the records describe.

    A record of an interrupted `create` has no digest of its own: what has that name on the server now counts, and what
    had it before.
    """
    found = [record.get(key) for record in records.values() for key in ("digest", "replaces")]
    begun = [record["model"] for version, record in records.items() if is_interrupted(version, record)]
    found += [there[model]["digest"] for model in begun if model in there]
    return {digest for digest in found if isinstance(digest, str)}


def is_interrupted(version: Path, record: dict) -> bool:
    """Return whether a `create` of this version began and was not tested: then the model of that name is Ferry's."""
    return record.get("digest") is None and record["model"].partition(":")[2] == version.name


def list_proven(server: Server, there: dict[str, dict], name: str, folder: Path) -> set[str]:
    """Return the digests of models NAME:<version> that are in no record but that Ferry made, as their own header says.

    With them Ferry recognizes its versions after the store was deleted, or from another checkout.
    """
    recorded = list_digests(list_records(folder, server.url), there)
    unknown = {
        full: facts["digest"]
        for full, facts in there.items()
        if bare(full) == name and store.VERSION.fullmatch(full.partition(":")[2]) and facts["digest"] not in recorded
    }
    return {digest for full, digest in unknown.items() if server.header_of(full).get("ferry.manifest_id")}


def refuse_unknown(there: dict[str, dict], model: str, known: dict, proven: set[str]) -> None:
    """Raise UserError when the server has a model NAME:<version> that Ferry did not make.

    It is Ferry's when the version's record has its digest, when that record says that its creation began, or when its
    digest is one of `orphan_digests`.

    Args:
        server_models: What the server holds, as `Server.list_models` returns it.
        model: NAME:<version>.
        known_record: The version's record of this server, or {}.
        orphan_digests: Those of `list_orphan_digests`.
    """
    if model not in there or (known.get("model") == model and known.get("digest") in (None, there[model]["digest"])):
        return
    if there[model]["digest"] in proven:
        return
    raise UserError(
        f"Ollama holds a model {model} already, and this machine has no record of making it",
        f"the same command with NAME=another-name; or, if nobody needs it, `ollama rm {model}`",
    )


def refuse_anothers(there: dict[str, dict], model: str, folder: Path, url: str, proven: set[str]) -> None:
    """Raise UserError when the name belongs to another model of the store, or NAME:latest is not Ferry's.

    folder: that of this model in the store. url: the address of the server.
    """
    name = bare(model)
    for other, record in store.beside(folder, RECORD).items():
        if bare(record["model"]) == name and record["model"] in there:
            again = store.which(str(store.read(other / store.RECORD).get("repo")), folder.parent)
            raise UserError(
                f"Ollama's {name} is another model of yours, {other.parent}",
                f"the same command with NAME=another-name; or `make undeploy {again}` first",
            )
    latest = there.get(latest_of(model))
    if latest and latest["digest"] not in proven | list_digests(list_records(folder, url), there):
        raise UserError(
            f"Ollama holds a model {name}:latest already that Ferry did not make",
            f"the same command with NAME=another-name; or, if you do not need it, `ollama rm {name}`",
        )


def create(server: Server, model: str, version: Path) -> None:
    """Run `ollama create`, which copies the file into Ollama's own store. Raises UserError with what it prints."""
    command = program()
    if command is None:
        raise Absent(f"a server answers at {server.url}, but there is no `ollama` command here to create with", INSTALL)
    hub.say(f"ollama: creating {model} (Ollama makes a copy of its own)")
    with begun(version, model, server.url):
        try:
            done = subprocess.run(
                [command, "create", model, "-f", str((version / "Modelfile").absolute())],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise UserError(f"{command} cannot be run: {error.strerror}", f"install Ollama again: {INSTALL}") from error
        if done.returncode or model not in server.models():
            raise refusal(model, done)


def refusal(model: str, done: subprocess.CompletedProcess) -> UserError:
    """Return the error for a failed `ollama create`, with what it printed and what to do about it."""
    lines = [line for line in re.split(r"[\r\n]+", done.stdout + done.stderr) if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {done.returncode}"]
    recipe = re.search(RECIPE, told[-1], re.IGNORECASE)
    return UserError(
        f"`ollama create {model}` failed: {shown(told[-1])}",
        f"{MEND}, then run the same command again" if recipe else cure(told[-1]),
    )


@contextlib.contextmanager
def begun(version: Path, model: str, url: str) -> Iterator[None]:
    """Write the record before a `create`, without a digest, and restore the earlier one when the `create` fails.

    So after a kill Ferry knows that the model is its own to remove, and that it is not tested. `replaces` in the record
    is the digest of the model that was there before: NAME:latest may still be a copy of that.
    """
    before = store.read(version / RECORD)
    record = {"stage": "ollama", "host": url, "model": model, "latest": latest_of(model)}
    replaced = before.get("digest") or before.get("replaces") if is_on_server(before, url) else None
    files.write_json(version / RECORD, record | ({"replaces": replaced} if replaced else {}))
    try:
        yield
    except UserError:
        put_back(version, before)
        raise


@contextlib.contextmanager
def withdrawn(server: Server, model: str, version: Path, before: dict, new: bool) -> Iterator[None]:
    """Withdraw a new model when its test raises UserError or is interrupted. A model that passed before stays.

    previous_record: the version's record from before. is_new: whether the model has just been created.
    """
    try:
        yield
    except UserError as error:
        became = taken_back(server, model, version, before) if new else f"{model} stays, it had passed before"
        raise UserError(f"{error.message}; {became}", error.hint) from error
    except KeyboardInterrupt:
        if new:
            taken_back(server, model, version, before)
        raise


def taken_back(server: Server, model: str, version: Path, before: dict) -> str:
    """Delete an untested model from the server, restore its record, and return a phrase that says what was done."""
    try:
        server.delete(model)
    except UserError:  # the record stays, so that `undeploy` can remove the model
        return f"{model} could not be withdrawn, do it with `ollama rm {model}`"
    put_back(version, before)
    return f"{model} was withdrawn"


def put_back(version: Path, before: dict) -> None:
    """Write the earlier record again, since a model under another name or NAME:latest may still be there."""
    files.write_json(version / RECORD, before) if before else files.remove(version / RECORD)


def compared(server: Server, model: str, made: Manifest, path: Path) -> str:
    """Compare the prompts that the server renders with the trained ones; return their source: 'TEMPLATE' or 'embedded'.

    Raises UserError when a prompt differs.
    """
    asks = [golden for golden in made.golden if golden.add_generation_prompt and golden.messages[-1]["role"] == "user"]
    for golden, wanted in zip(asks, expected(made, path, asks), strict=True):
        said = server.prompt(model, list(golden.messages))
        if _bare(said, made) != _bare(wanted, made):
            raise UserError(
                f"Ollama {version_of(server)} gives another prompt than the trained one: "
                f"{shown(repr(said), 300)} instead of {shown(repr(wanted), 300)}; "
                f"it took {chosen(server, model, made)}",
                f"{MEND} if you changed it, else report it with this line; "
                "`make chat` and LM Studio do not go through Ollama",
            )
    return "embedded" if made.chat.embedded or not made.chat.turns else "TEMPLATE"


def expected(made: Manifest, path: Path, asks: list[Golden]) -> list[str]:
    """Return the trained prompts, with the Modelfile's SYSTEM where a conversation has no system prompt of its own."""
    system = made.chat.system
    lacking = [g for g in asks if system and g.messages[0]["role"] != "system"]
    header = gguf_reader.read(path, path.name)
    told = [([{"role": "system", "content": system}, *g.messages], True) for g in lacking]
    bos, eos = pull.special(header, "bos"), pull.special(header, "eos")
    texts = iter(template_sandbox.prompts(made.chat.template, told, bos, eos) if told else [])
    return [next(texts) if golden in lacking else golden.prompt for golden in asks]


def _bare(prompt: str, made: Manifest) -> str:
    """Return the prompt without the BOS that the tokenizer adds by itself: Ollama may show it or not."""
    return prompt.removeprefix(made.chat.bos) if made.chat.bos and made.chat.adds_bos else prompt


def chosen(server: Server, model: str, made: Manifest) -> str:
    """Return which template the server renders with, as far as it tells."""
    template = str(server.ask("POST", "/api/show", {"model": model}).get("template"))
    if template == made.chat.template:
        return "the template embedded in the GGUF"
    if made.chat.turns and template.strip() == made.chat.turns.go().strip():
        return "the Modelfile's TEMPLATE, or silently the one embedded in the GGUF (its log says: template selection)"
    return f"one that it attached itself, {shown(repr(template), 200)}"


def asked(server: Server, model: str, made: Manifest) -> dict:
    """Let the server answer the smoke prompts greedily and compare that with the recorded answers of the same file.

    Returns:
        {answers, rule, score}. score: by the task's own rule, 0 to 1; None when the rule needs more than two texts.

    Raises:
        UserError: The answers share too few words with the recorded ones.
    """
    rule = str(made.scores.get("rule"))
    judge, answers = answer_rules.BY_NAME.get(rule), []
    for smoke in made.smoke:
        # The recorded number of tokens, the end token included.
        said = server.answer(model, smoke.message, len(smoke.answer_ids))
        text = str(said.get("message", {}).get("content", ""))
        right = judge(text, smoke.answer) if judge else None
        alike = max(right or 0, answer_rules.f1(text, smoke.answer))
        answers.append(
            {"message": smoke.message, "answer": text, "done": said.get("done_reason"), "right": right, "alike": alike}
        )
    if sum(a["alike"] for a in answers) < MIN_ALIKE * len(answers):
        raise UserError(
            f"{model} answers otherwise in Ollama than where it was made: "
            f"{shown(repr(answers[0]['answer']), 200)} instead of {shown(repr(made.smoke[0].answer), 200)}",
            "update Ollama and run the same command again; `make chat` does not go through Ollama",
        )
    score = sum(a["right"] for a in answers) / len(answers) if judge else None
    return {"answers": answers, "rule": rule, "score": score}


def gone(version: Path, start: bool = False) -> int:
    """Remove a version from Ollama, and NAME:latest when it is a copy of it; return the bytes that became free.

    start: whether a server may be started. Raises OllamaUnavailable when Ollama is installed but cannot be asked.
    """
    record = store.read(version / RECORD)
    if not record:
        return 0
    if not is_on_server(record, host()):
        say_elsewhere(record, host())
        files.remove(version / RECORD)
        return 0
    try:
        server = serving(start)
    except Absent as error:
        if program() or not local(host()):
            raise
        hub.say(f"ollama: {error.message}: what it may have kept of {record['model']} is not removed")
        files.remove(version / RECORD)
        return 0
    before = held(server)
    leave(server, record, version)
    files.remove(version / RECORD)
    return before - held(server)


def say_elsewhere(record: dict, url: str) -> None:
    """Print that the model is on another server and stays there."""
    hub.say(f"ollama: {record['model']} was put on the server at {record['host']}; this is {url}: it stays there")


def leave(server: Server, record: dict, version: Path) -> None:
    """Delete the models of a version's record from the server, as far as they are still the ones that Ferry made."""
    there, records = server.models(), list_records(version.parent, server.url)
    kept = list_digests({other: r for other, r in records.items() if other != version}, there)
    own = list_own(there, record, version, kept)
    for name in own:
        server.delete(name)
    if record["model"] in there and record["model"] not in own:
        hub.say(f"ollama: {record['model']} is no longer what Ferry put there: it stays")


def list_own(there: dict[str, dict], record: dict, version: Path, kept: set[str]) -> list[str]:
    """Return the names to delete for a record: NAME:<version>, and NAME:latest when it was copied from that.

    kept_digests: those of the other versions; NAME:latest stays when it is one of them.
    """
    model, latest = record["model"], record["latest"]
    own = model in there and (is_interrupted(version, record) or there[model]["digest"] == record.get("digest"))
    copied = latest in there and there[latest]["digest"] in list_digests({version: record}, there) - kept
    return [model] * own + [latest] * copied
