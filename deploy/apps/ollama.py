"""ollama: the model goes into Ollama under a name of its own, is asked there, and only then becomes NAME:latest.

What is Ferry's there is what ollama.json says: a model by its name, its digest and the server's address. NAME:latest is
ours when its digest is that of a record. Whatever else the server holds is never overwritten and never deleted.
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
# A name's part in Ollama (types/model/name.go): letters, digits, _ - . and no other, 80 of them at most.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
# Another build of llama.cpp rounds otherwise, and where two words are nearly as likely the answer takes another turn. A
# model that computes wrongly shares no words with what it said where it was made.
MIN_ALIKE = 0.2
MEND = "mend Modelfile.template (`git diff Modelfile.template`)"
RECIPE = "parameter|command must be|invalid (int|float|bool) value|template error"  # Ollama's words for a bad Modelfile


def stage(version: Path, name: str | None = None, start: bool = False) -> dict:
    """Create NAME:<version> from the Modelfile, ask it, make it NAME:latest, and write ollama.json.

    name: None: the manifest's. start: whether a server may be started. What is there already and is the same is asked again
    but not made again. Raises Absent when there is no Ollama, UserError when the model there is not what was trained: it is
    withdrawn then, and latest stays what it was.
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
    elif before and before["model"] != model:  # the name that it had before
        leave(server, before, version)
    record = {
        "stage": "ollama", "host": server.url, "model": model, "latest": latest,
        "digest": server.models()[model]["digest"], "created": new,
        "modelfile": recipe, "server": version_of(server), "template": template, **answers,
    }  # fmt: skip
    files.write_json(version / RECORD, record)
    return record


def remembered(version: Path) -> str | None:
    """The name that this model has in Ollama, of whatever version."""
    records = store.records(version.parent, RECORD)
    newest = max(records, key=lambda version: (version / RECORD).stat().st_mtime, default=None)
    return bare(records[newest]["model"]) if newest else None


def bare(model: str) -> str:
    """NAME of NAME:<version>."""
    return model.partition(":")[0]


def latest_of(model: str) -> str:
    return f"{bare(model)}:latest"


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


def list_records(folder: Path, url: str) -> dict[Path, dict]:
    """Return {version: its ollama.json} of a model's versions that are on the server at `url`."""
    return {v: record for v, record in store.records(folder, RECORD).items() if is_on_server(record, url)}


def is_on_server(record: dict, url: str) -> bool:
    """Whether a record is about the server at `url`. One of an older Ferry names none and counts."""
    known = record.get("host")
    if known is None or known == url:
        return True
    return isinstance(known, str) and local(known) and local(url) and port_of(known) == port_of(url)


def list_digests(records: dict[Path, dict], there: dict[str, dict]) -> set[str]:
    """Return the digests of what records say was made; of one that was interrupted, of what has and had its name."""
    found = [record.get(key) for record in records.values() for key in ("digest", "replaces")]
    begun = [record["model"] for version, record in records.items() if is_interrupted(version, record)]
    found += [there[model]["digest"] for model in begun if model in there]
    return {digest for digest in found if isinstance(digest, str)}


def is_interrupted(version: Path, record: dict) -> bool:
    """Whether a `create` of this version began and was not proven: what has its name on the server is Ferry's."""
    return record.get("digest") is None and record["model"].partition(":")[2] == version.name


def list_proven(server: Server, there: dict[str, dict], name: str, folder: Path) -> set[str]:
    """Return the digests of models NAME:<version> that no record here knows and whose own header says that Ferry made them.

    So a store that was deleted, or another checkout, finds its versions again.
    """
    recorded = list_digests(list_records(folder, server.url), there)
    unknown = {
        full: facts["digest"]
        for full, facts in there.items()
        if bare(full) == name and store.VERSION.fullmatch(full.partition(":")[2]) and facts["digest"] not in recorded
    }
    return {digest for full, digest in unknown.items() if server.header_of(full).get("ferry.manifest_id")}


def refuse_unknown(there: dict[str, dict], model: str, known: dict, proven: set[str]) -> None:
    """A version's own name is overwritten where its record knows what is there, or began to make it, or it proves itself.

    known: the version's record of this server, or {}. Raises UserError where another one made what is there.
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
    """A name that another model has stays what it is. folder: of this one in the store. url: the server's."""
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
    """`ollama create`, which copies the file into Ollama's own store. Raises UserError with what it says."""
    command = program()
    if command is None:
        raise Absent(f"a server answers at {server.url}, but there is no `ollama` command here to create with", INSTALL)
    hub.say(f"ollama: creating {model} (Ollama makes a copy of its own)")
    with begun(version, model, server.url):
        try:
            done = subprocess.run(
                [command, "create", model, "-f", str((version / "Modelfile").absolute())],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{command} cannot be run: {error.strerror}", f"install Ollama again: {INSTALL}") from error
        if done.returncode or model not in server.models():
            raise refusal(model, done)


def refusal(model: str, done: subprocess.CompletedProcess) -> UserError:
    """What `ollama create` says when it fails, and what to do about it."""
    lines = [line for line in re.split(r"[\r\n]+", done.stdout + done.stderr) if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {done.returncode}"]
    recipe = re.search(RECIPE, told[-1], re.IGNORECASE)
    return UserError(
        f"`ollama create {model}` failed: {shown(told[-1])}",
        f"{MEND}, then run the same command again" if recipe else cure(told[-1]),
    )


@contextlib.contextmanager
def begun(version: Path, model: str, url: str) -> Iterator[None]:
    """Said before it begins, without a digest: what is there after a kill is ours to remove, and not proven.

    `replaces` is the digest of what was there before: latest may still be a copy of that.
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
    """A new version that is not what was trained is taken away again; one that stood its test before stays.

    before: the record of what was there.
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
    """What became of a model that is not proven."""
    try:
        server.delete(model)
    except UserError:  # its record stays for `undeploy`
        return f"{model} could not be withdrawn, do it with `ollama rm {model}`"
    put_back(version, before)
    return f"{model} was withdrawn"


def put_back(version: Path, before: dict) -> None:
    """The record as it was: another name, or a latest that was made of it, may still be there."""
    files.write_json(version / RECORD, before) if before else files.remove(version / RECORD)


def compared(server: Server, model: str, made: Manifest, path: Path) -> str:
    """'TEMPLATE' or 'embedded': what gives the prompts there. Raises UserError when one is not the trained one."""
    asks = [golden for golden in made.golden if golden.add_generation_prompt and golden.messages[-1]["role"] == "user"]
    for golden, wanted in zip(asks, expected(made, path, asks), strict=True):
        said = server.prompt(model, list(golden.messages))
        if _bare(said, made) != _bare(wanted, made):
            raise UserError(
                f"Ollama {version_of(server)} gives another prompt than the trained one: "
                f"{shown(repr(said), 300)} instead of {shown(repr(wanted), 300)}; it took {chosen(server, model, made)}",
                f"{MEND} if you changed it, else report it with this line; `make chat` and LM Studio do not go through Ollama",
            )
    return "embedded" if made.chat.embedded or not made.chat.turns else "TEMPLATE"


def expected(made: Manifest, path: Path, asks: list[Golden]) -> list[str]:
    """The trained prompts, with the Modelfile's SYSTEM where a conversation has none of its own."""
    system = made.chat.system
    lacking = [g for g in asks if system and g.messages[0]["role"] != "system"]
    header = gguf_reader.read(path, path.name)
    told = [([{"role": "system", "content": system}, *g.messages], True) for g in lacking]
    bos, eos = pull.special(header, "bos"), pull.special(header, "eos")
    texts = iter(template_sandbox.prompts(made.chat.template, told, bos, eos) if told else [])
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
    judge, answers = answer_rules.BY_NAME.get(rule), []
    for smoke in made.smoke:
        said = server.answer(model, smoke.message, len(smoke.answer_ids))  # so many as there, the end token included
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
    """Take a version out of Ollama, its latest too when that is the same; returns the bytes that came back.

    start: whether a server may be started. Raises Absent when there is one that cannot be asked.
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
    hub.say(f"ollama: {record['model']} was put on the server at {record['host']}; this is {url}: it stays there")


def leave(server: Server, record: dict, version: Path) -> None:
    """Delete what a version's record says was made, where the server still holds that very thing."""
    there, records = server.models(), list_records(version.parent, server.url)
    kept = list_digests({other: r for other, r in records.items() if other != version}, there)
    own = list_own(there, record, version, kept)
    for name in own:
        server.delete(name)
    if record["model"] in there and record["model"] not in own:
        hub.say(f"ollama: {record['model']} is no longer what Ferry put there: it stays")


def list_own(there: dict[str, dict], record: dict, version: Path, kept: set[str]) -> list[str]:
    """Return the version of this record and the latest that was copied from it.

    kept: digests of the other versions: a latest that is one of those stays.
    """
    model, latest = record["model"], record["latest"]
    own = model in there and (is_interrupted(version, record) or there[model]["digest"] == record.get("digest"))
    copied = latest in there and there[latest]["digest"] in list_digests({version: record}, there) - kept
    return [model] * own + [latest] * copied
