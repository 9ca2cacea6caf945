"""ollama: create the model in Ollama under a name of its own, test it there, and only then copy it to NAME:latest.

ollama.json says which models on the server are Ferry's, by name, digest and address of the server. NAME:latest is
Ferry's when its digest is in a record. No other model on the server is ever overwritten or deleted.
"""

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from common import files, gguf_reader, hub
from common.errors import UserError, printable_line
from contract import answer_rules, template_sandbox
from contract.manifest import GoldenPrompt, Manifest, SmokePrompt
from deploy import store
from deploy.apps.ollama_server import (
    INSTALL_HINT,
    OllamaUnavailable,
    Server,
    ensure_server,
    find_command,
    is_local,
    measure_storage,
    server_error,
    server_port,
    server_url,
)
from deploy.stages import pull

RECORD = "ollama.json"
# One part of a model's name in Ollama (types/model/name.go): letters, digits, _ - and . only, at most 80 characters.
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
# The least mean similarity of the answers. Another build of llama.cpp rounds differently, and where two tokens are
# almost equally likely the answer continues differently. A model that computes wrongly shares no words with the
# recorded answers.
MIN_SIMILARITY = 0.2
TEMPLATE_HINT = "fix Modelfile.template (`git diff Modelfile.template`)"
# What Ollama says about a bad Modelfile.
MODELFILE_ERRORS = "parameter|command must be|invalid (int|float|bool) value|template error"


def run_ollama(version: Path, name: str | None = None, start: bool = False) -> dict[str, Any]:
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
    manifest, path = store.load_tested(version)
    if not (version / "Modelfile").is_file():  # `ollama create` would take whatever lies in the current folder
        raise UserError(
            f"there is no Modelfile in {version}",
            "run `make modelfile` (part of `make deploy-mac`)",
            code="ollama.no_modelfile",
        )
    server, previous_record = ensure_server(start), store.read_record(version / RECORD)
    model = f"{normalize_name(name or find_previous_name(version) or manifest.name)}:{version.name}"
    server_models = server.list_models()
    known_record = previous_record if is_on_server(previous_record, server.url) else {}
    orphan_digests = list_orphan_digests(server, server_models, strip_tag(model), version.parent)
    refuse_name_conflict(server_models, model, version.parent, server.url, orphan_digests)
    refuse_unknown_model(server_models, model, known_record, orphan_digests)
    modelfile_hash = files.sha256(version / "Modelfile")
    is_new = not is_created(server_models, model, known_record, modelfile_hash)
    if is_new:
        create_model(server, model, version)
    with withdraw_on_error(server, model, version, previous_record, is_new):
        template = compare_prompts(server, model, manifest, path)
        answers = compare_answers(server, model, manifest)
    latest = latest_name(model)
    server.copy_model(model, latest)
    if previous_record:
        delete_renamed_model(server, previous_record, model, version)
    record = {
        "stage": "ollama",
        "host": server.url,
        "model": model,
        "latest": latest,
        "digest": server.list_models()[model]["digest"],
        "created": is_new,
        "modelfile": modelfile_hash,
        "server": server_version(server),
        "template": template,
        **answers,
    }
    files.write_json(version / RECORD, record)
    return record


def is_created(
    server_models: dict[str, dict[str, Any]], model: str, known_record: dict[str, Any], modelfile_hash: str
) -> bool:
    """Return whether the server has the model that its record describes, made from the same Modelfile."""
    if model not in server_models or known_record.get("modelfile") != modelfile_hash:
        return False
    return known_record.get("digest") == server_models[model]["digest"]


def delete_renamed_model(server: Server, previous_record: dict[str, Any], model: str, version: Path) -> None:
    """Delete the model under its old name, or report that it stays on another server."""
    if not is_on_server(previous_record, server.url):
        report_other_server(previous_record, server.url)
    elif previous_record["model"] != model:
        delete_own_models(server, previous_record, version)


def find_previous_name(version: Path) -> str | None:
    """Return the name that the model has in Ollama, from the newest record of any of its versions; None without one."""
    records = store.read_records(version.parent, RECORD)
    newest_version = max(records, key=lambda version: (version / RECORD).stat().st_mtime, default=None)
    return strip_tag(records[newest_version]["model"]) if newest_version else None


def strip_tag(model: str) -> str:
    """Return NAME of NAME:<version>."""
    return model.partition(":")[0]


def latest_name(model: str) -> str:
    """Return NAME:latest for NAME:<version>."""
    return f"{strip_tag(model)}:latest"


def server_version(server: Server) -> str:
    """Return the version of Ollama that a server runs."""
    return str(server.request("GET", "/api/version").get("version"))


def normalize_name(name: str) -> str:
    """Return the name in lower case, since Ollama ignores case. Raise UserError for a name that it does not allow."""
    if not NAME_PATTERN.fullmatch(name):
        rule = "at most 80 letters, digits, '_', '-' and '.'"
        raise UserError(
            f"{printable_line(name)!r} is not a valid model name for Ollama: {rule}",
            "choose a different name: the same command with NAME=...",
            code="ollama.invalid_name",
        )
    return name.lower()


def list_records(folder: Path, url: str) -> dict[Path, dict[str, Any]]:
    """Return {version: its ollama.json} for the versions of a model that are on the server at `url`."""
    return {v: record for v, record in store.read_records(folder, RECORD).items() if is_on_server(record, url)}


def is_on_server(record: dict[str, Any], url: str) -> bool:
    """Return whether a record is about the server at `url`. A record of an older Ferry names no server and counts."""
    recorded_url = record.get("host")
    if recorded_url is None or recorded_url == url:
        return True
    if not isinstance(recorded_url, str) or not is_local(recorded_url) or not is_local(url):
        return False
    return server_port(recorded_url) == server_port(url)


def list_digests(records: dict[Path, dict[str, Any]], server_models: dict[str, dict[str, Any]]) -> set[str]:
    """Return the digests of the models that the records describe.

    A record of an interrupted `create` has no digest of its own: what has that name on the server now counts, and what
    had it before.
    """
    digests = [record.get(key) for record in records.values() for key in ("digest", "replaces")]
    interrupted = [record["model"] for version, record in records.items() if is_interrupted(version, record)]
    digests += [server_models[model]["digest"] for model in interrupted if model in server_models]
    return {digest for digest in digests if isinstance(digest, str)}


def is_interrupted(version: Path, record: dict[str, Any]) -> bool:
    """Return whether a `create` of this version began and was not tested: then the model of that name is Ferry's."""
    return record.get("digest") is None and record["model"].partition(":")[2] == version.name


def list_orphan_digests(server: Server, server_models: dict[str, dict[str, Any]], name: str, folder: Path) -> set[str]:
    """Return the digests of models NAME:<version> that are in no record but that Ferry made, as their own header says.

    With them Ferry recognizes its versions after the store was deleted, or from another checkout.
    """
    recorded_digests = list_digests(list_records(folder, server.url), server_models)
    unknown_digests = {
        full_name: facts["digest"]
        for full_name, facts in server_models.items()
        if strip_tag(full_name) == name
        and store.VERSION_PATTERN.fullmatch(full_name.partition(":")[2])
        and facts["digest"] not in recorded_digests
    }
    own_names = [name for name in unknown_digests if server.read_header(name).get("ferry.manifest_id")]
    return {unknown_digests[full_name] for full_name in own_names}


def refuse_unknown_model(
    server_models: dict[str, dict[str, Any]], model: str, known_record: dict[str, Any], orphan_digests: set[str]
) -> None:
    """Raise UserError when the server has a model NAME:<version> that Ferry did not make.

    It is Ferry's when the version's record has its digest, when that record says that its creation began, or when its
    digest is one of `orphan_digests`.

    Args:
        server_models: What the server holds, as `Server.list_models` returns it.
        model: NAME:<version>.
        known_record: The version's record of this server, or {}.
        orphan_digests: Those of `list_orphan_digests`.
    """
    if model not in server_models:
        return
    digest = server_models[model]["digest"]
    is_recorded = known_record.get("model") == model and known_record.get("digest") in (None, digest)
    if is_recorded or digest in orphan_digests:
        return
    raise UserError(
        f"Ollama already has a model {model}, and there is no record that Ferry created it",
        f"the same command with NAME=another-name; or, if nobody needs it, `ollama rm {model}`",
        code="ollama.foreign_model",
    )


def refuse_name_conflict(
    server_models: dict[str, dict[str, Any]], model: str, folder: Path, url: str, orphan_digests: set[str]
) -> None:
    """Raise UserError when the name belongs to another model of the store, or NAME:latest is not Ferry's.

    folder: that of this model in the store. url: the address of the server.
    """
    name = strip_tag(model)
    for other_version, record in store.list_other_models(folder, RECORD).items():
        if strip_tag(record["model"]) == name and record["model"] in server_models:
            raise name_error(name, other_version)
    latest = server_models.get(latest_name(model))
    if latest and latest["digest"] not in orphan_digests | list_digests(list_records(folder, url), server_models):
        raise UserError(
            f"Ollama already has a model {name}:latest, which was not created by Ferry",
            f"the same command with NAME=another-name; or, if you do not need it, `ollama rm {name}`",
            code="ollama.foreign_model",
        )


def name_error(name: str, other_version: Path) -> UserError:
    """Return the error for a name that another model of the store has in Ollama."""
    other_repo = str(store.read_record(other_version / store.PULL_RECORD).get("repo"))
    arguments = store.format_make_arguments(other_repo, other_version.parent.parent)
    return UserError(
        f"the name {name} in Ollama belongs to a different model, {other_version.parent}",
        f"the same command with NAME=another-name; or `make undeploy {arguments}` first",
        code="ollama.name_taken",
    )


def create_model(server: Server, model: str, version: Path) -> None:
    """Run `ollama create`, which copies the file into Ollama's own store. Raise UserError with what it prints."""
    command = find_command()
    if command is None:
        raise OllamaUnavailable(
            f"a server answers at {server.url}, but there is no `ollama` command here to create a model with",
            INSTALL_HINT,
            code="ollama.no_command",
        )
    hub.print_message(f"ollama: creating {model} (Ollama makes its own copy)")
    with record_creation(version, model, server.url):
        result = run_create(command, model, version / "Modelfile")
        if result.returncode or model not in server.list_models():
            raise create_error(model, result)


def run_create(command: str, model: str, modelfile: Path) -> subprocess.CompletedProcess[str]:
    """Run `ollama create` and return its exit code and output. Raise UserError when it cannot be run."""
    words = [command, "create", model, "-f", str(modelfile.absolute())]
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UserError(
            f"{command} cannot be run: {error.strerror}",
            f"install Ollama again: {INSTALL_HINT}",
            code="ollama.command_broken",
        ) from error


def create_error(model: str, result: subprocess.CompletedProcess[str]) -> UserError:
    """Return the error for a failed `ollama create`, with what it printed and what to do about it."""
    lines = [line for line in re.split(r"[\r\n]+", result.stdout + result.stderr) if line.strip()]
    error_lines = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {result.returncode}"]
    message = f"`ollama create {model}` failed: {printable_line(error_lines[-1])}"
    if re.search(MODELFILE_ERRORS, error_lines[-1], re.IGNORECASE):
        hint = f"{TEMPLATE_HINT}, then run the same command again"
        return UserError(message, hint, code="ollama.invalid_modelfile")
    return server_error(message, error_lines[-1], code="ollama.create_failed")


@contextlib.contextmanager
def record_creation(version: Path, model: str, url: str) -> Iterator[None]:
    """Write the record before a `create`, without a digest, and restore the earlier one when the `create` fails.

    So after a kill Ferry knows that the model is its own to remove, and that it is not tested. `replaces` in the record
    is the digest of the model that was there before: NAME:latest may still be a copy of that.
    """
    previous_record = store.read_record(version / RECORD)
    record = {"stage": "ollama", "host": url, "model": model, "latest": latest_name(model)}
    replaced_digest = previous_record.get("digest") or previous_record.get("replaces")
    if replaced_digest and is_on_server(previous_record, url):
        record["replaces"] = replaced_digest
    files.write_json(version / RECORD, record)
    try:
        yield
    except UserError:
        restore_record(version, previous_record)
        raise


@contextlib.contextmanager
def withdraw_on_error(
    server: Server, model: str, version: Path, previous_record: dict[str, Any], is_new: bool
) -> Iterator[None]:
    """Withdraw a new model when its test raises UserError or is interrupted. A model that passed before stays.

    previous_record: the version's record from before. is_new: whether the model has just been created.
    """
    try:
        yield
    except UserError as error:
        outcome = f"{model} is kept, it passed before"
        if is_new:
            outcome = withdraw_model(server, model, version, previous_record)
        raise UserError(f"{error.message}; {outcome}", error.hint, code=error.code) from error
    except KeyboardInterrupt:
        if is_new:
            withdraw_model(server, model, version, previous_record)
        raise


def withdraw_model(server: Server, model: str, version: Path, previous_record: dict[str, Any]) -> str:
    """Delete an untested model from the server, restore its record, and return a phrase that says what was done."""
    try:
        server.delete_model(model)
    except UserError:  # the record stays, so that `undeploy` can remove the model
        return f"{model} could not be removed, run `ollama rm {model}`"
    restore_record(version, previous_record)
    return f"{model} was removed"


def restore_record(version: Path, previous_record: dict[str, Any]) -> None:
    """Write the earlier record again, since a model under another name or NAME:latest may still be there."""
    if previous_record:
        files.write_json(version / RECORD, previous_record)
    else:
        files.remove(version / RECORD)


def compare_prompts(server: Server, model: str, manifest: Manifest, path: Path) -> str:
    """Compare the prompts that the server renders with the trained ones; return their source: 'TEMPLATE' or 'embedded'.

    Raise UserError when a prompt differs.
    """
    openings = [golden for golden in manifest.golden if golden.add_generation_prompt]
    golden_prompts = [golden for golden in openings if golden.messages[-1]["role"] == "user"]
    for golden, expected_prompt in zip(golden_prompts, expected_prompts(manifest, path, golden_prompts), strict=True):
        server_prompt = server.render_prompt(model, list(golden.messages))
        if _strip_bos(server_prompt, manifest) != _strip_bos(expected_prompt, manifest):
            raise UserError(
                f"Ollama {server_version(server)} renders a different prompt than the trained one: "
                f"{printable_line(repr(server_prompt), 300)} instead of {printable_line(repr(expected_prompt), 300)}; "
                f"it used {describe_template(server, model, manifest)}",
                f"{TEMPLATE_HINT} if you changed it, else report this message; "
                "`make chat` and LM Studio do not use Ollama",
                code="ollama.wrong_prompt",
            )
    return "embedded" if manifest.chat.embedded or not manifest.chat.turns else "TEMPLATE"


def expected_prompts(manifest: Manifest, path: Path, golden_prompts: list[GoldenPrompt]) -> list[str]:
    """Return the trained prompts, with the Modelfile's SYSTEM where a conversation has no system prompt of its own."""
    system = manifest.chat.system
    without_system = [g for g in golden_prompts if system and g.messages[0]["role"] != "system"]
    if not system or not without_system:
        return [golden.prompt for golden in golden_prompts]
    header = gguf_reader.read_header(path, path.name)
    bos, eos = pull.special_token(header, "bos"), pull.special_token(header, "eos")
    conversations = [([{"role": "system", "content": system}, *g.messages], True) for g in without_system]
    texts = iter(template_sandbox.render_prompts(manifest.chat.template, conversations, bos, eos))
    return [next(texts) if golden in without_system else golden.prompt for golden in golden_prompts]


def _strip_bos(prompt: str, manifest: Manifest) -> str:
    """Return the prompt without the BOS that the tokenizer adds by itself: Ollama may show it or not."""
    return prompt.removeprefix(manifest.chat.bos) if manifest.chat.bos and manifest.chat.adds_bos else prompt


def describe_template(server: Server, model: str, manifest: Manifest) -> str:
    """Return which template the server renders with, as far as it tells."""
    template = str(server.request("POST", "/api/show", {"model": model}).get("template"))
    if template == manifest.chat.template:
        return "the template embedded in the GGUF"
    if manifest.chat.turns and template.strip() == manifest.chat.turns.to_go_template().strip():
        return "the Modelfile's TEMPLATE, or silently the one embedded in the GGUF (its log says: template selection)"
    return f"one that it chose itself, {printable_line(repr(template), 200)}"


def compare_answers(server: Server, model: str, manifest: Manifest) -> dict[str, Any]:
    """Let the server answer the smoke prompts greedily and compare that with the recorded answers of the same file.

    Returns:
        {answers, rule, score}. score: by the task's own rule, 0 to 1; None when the rule needs more than two texts.

    Raises:
        UserError: The answers share too few words with the recorded ones.
    """
    rule = str(manifest.scores.get("rule"))
    judge = answer_rules.RULES_BY_NAME.get(rule)
    answers = [compare_answer(server, model, smoke, judge) for smoke in manifest.smoke]
    if sum(a["alike"] for a in answers) < MIN_SIMILARITY * len(answers):
        raise UserError(
            f"{model} answers differently in Ollama than on the training machine: "
            f"{printable_line(repr(answers[0]['answer']), 200)} instead of "
            f"{printable_line(repr(manifest.smoke[0].answer), 200)}",
            "update Ollama and run the same command again; `make chat` does not use Ollama",
            code="ollama.wrong_answers",
        )
    score = sum(a["right"] or 0 for a in answers) / len(answers) if judge else None
    return {"answers": answers, "rule": rule, "score": score}


class ComparedAnswer(TypedDict):
    """An answer of Ollama next to the recorded one, as ollama.json has it."""

    message: str
    answer: str
    done: str | None
    """Why Ollama stopped, in its words."""
    right: float | None
    """Score by the task's own rule, 0 to 1; None when the rule needs more than two texts."""
    alike: float
    """Similarity to the recorded answer, 0 to 1."""


def compare_answer(server: Server, model: str, smoke: SmokePrompt, judge: answer_rules.Judge | None) -> ComparedAnswer:
    """Let the server answer one smoke prompt greedily and compare that with the recorded answer."""
    # The recorded number of tokens, the end token included.
    response = server.generate_answer(model, smoke.message, len(smoke.answer_ids))
    text = str(response.get("message", {}).get("content", ""))
    score = judge(text, smoke.answer) if judge else None
    similarity = max(score or 0, answer_rules.word_f1(text, smoke.answer))
    reason = response.get("done_reason")
    return {"message": smoke.message, "answer": text, "done": reason, "right": score, "alike": similarity}


def remove_version(version: Path, start: bool = False) -> int:
    """Remove a version from Ollama, and NAME:latest when it is a copy of it; return the bytes that became free.

    start: whether a server may be started. Raise OllamaUnavailable when Ollama is installed but cannot be asked.
    """
    record = store.read_record(version / RECORD)
    if not record:
        return 0
    if not is_on_server(record, server_url()):
        report_other_server(record, server_url())
        files.remove(version / RECORD)
        return 0
    try:
        server = ensure_server(start)
    except OllamaUnavailable as error:
        if find_command() or not is_local(server_url()):
            raise
        hub.print_message(f"ollama: {error.message}: {record['model']} is not removed there")
        files.remove(version / RECORD)
        return 0
    size_before = measure_storage(server)
    delete_own_models(server, record, version)
    files.remove(version / RECORD)
    return size_before - measure_storage(server)


def report_other_server(record: dict[str, Any], url: str) -> None:
    """Print that the model is on another server and stays there."""
    hub.print_message(f"ollama: {record['model']} is on the server at {record['host']}, not on {url}: it is kept there")


def delete_own_models(server: Server, record: dict[str, Any], version: Path) -> None:
    """Delete the models of a version's record from the server, as far as they are still the ones that Ferry made."""
    server_models, records = server.list_models(), list_records(version.parent, server.url)
    records.pop(version, None)
    kept_digests = list_digests(records, server_models)
    own_models = list_own_models(server_models, record, version, kept_digests)
    for name in own_models:
        server.delete_model(name)
    if record["model"] in server_models and record["model"] not in own_models:
        hub.print_message(f"ollama: {record['model']} is no longer the model that Ferry created: it is kept")


def list_own_models(
    server_models: dict[str, dict[str, Any]], record: dict[str, Any], version: Path, kept_digests: set[str]
) -> list[str]:
    """Return the names to delete for a record: NAME:<version>, and NAME:latest when it was copied from that.

    kept_digests: those of the other versions; NAME:latest stays when it is one of them.
    """
    names, model, latest = [], record["model"], record["latest"]
    if model in server_models and (
        is_interrupted(version, record) or server_models[model]["digest"] == record.get("digest")
    ):
        names.append(model)
    own_digests = list_digests({version: record}, server_models) - kept_digests
    if latest in server_models and server_models[latest]["digest"] in own_digests:
        names.append(latest)
    return names
