"""Commands of the machine that runs the model. Nothing that they import needs torch."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cli.environment import Command
from cli.options import JSON, MODELS, PATH, QUANTIZATION, START, combine_decorators
from cli.settings import missing_setting_error, operand, setting
from common.errors import UserError

REPO = operand("repo", make="REPO", required=False, metavar="[REPO]")
NAME = setting("--name", make="NAME", help="What Ollama calls it; default: as before, else the model's name.")
REPO_OPTIONS = combine_decorators(REPO, MODELS)


def require_model_choice(params: dict[str, Any]) -> None:
    """Raise UserError when it is not clear which model is meant, before any environment is set up."""
    resolve_repo(params["repo"], params["models"])


def resolve_repo(repo: str | None, models: Path) -> str:
    """Return the repo that a command is about: the one that was typed, else the only model on this machine."""
    from deploy import store

    return store.resolve_model(repo, models)


def require_requested_version(repo: str | None, models: Path) -> Path:
    """Return the folder of the version that REPO names, or of the one in use.

    Raises:
        UserError: It was not pulled, or no model is named and there are several.
    """
    from deploy import store

    return store.require_version(models, resolve_repo(repo, models))


@click.command("deploy-mac", cls=Command)
@combine_decorators(REPO, MODELS, QUANTIZATION, NAME, START)
def deploy_mac(repo, models, quantization, name, start) -> None:
    """Pull REPO, test it, put it into Ollama and LM Studio.

    REPO is owner/name or owner/name@tag on the Hugging Face Hub, or a folder hub.

    \b
    Examples:
      ferry deploy-mac you/tickets-GGUF
      ferry deploy-mac ./hub/demo --quantization q8_0
    """
    if repo is None:
        raise missing_setting_error(
            "REPO", "name what to deploy: owner/name on the Hub, or a folder such as ./hub/demo"
        )
    deploy_everywhere(repo, models, quantization, name, start)


def deploy_everywhere(repo: str, models: Path, quantization: str | None, name: str | None, start: bool) -> None:
    """Check the machine, pull and test the model, put it into Ollama and LM Studio where they exist, show a summary."""
    from common import checks, console
    from deploy import doctor, store

    results = doctor.run_doctor(repo, models, quantization)
    console.print_result(checks.format_checks(results))
    checks.refuse_faults(results)
    pull_model(repo, models, quantization)
    version = store.require_version(models, repo)
    smoke_test(version)
    write_modelfile(version)
    install_in_ollama(version, name, start, optional=True)
    install_in_lmstudio(version, optional=True)
    show_summary(version, repo)


@click.command(cls=Command)
@combine_decorators(REPO, MODELS, QUANTIZATION)
def pull(repo, models, quantization) -> None:
    """Fetch one GGUF of REPO, check it against the manifest.

    An interrupted download is resumed.

    \b
    Example:
      ferry pull you/tickets-GGUF@v1
    """
    if repo is None:
        raise missing_setting_error("REPO", "name what to pull: owner/name on the Hub, or a folder such as ./hub/demo")
    pull_model(repo, models, quantization)


def pull_model(repo: str, models: Path, quantization: str | None) -> None:
    """Download one GGUF and show what came."""
    from common import console
    from deploy.stages.pull import run_pull

    record = run_pull(repo, models, quantization)
    console.print_result(
        f"pull: {record['folder']}/{record['file']}\n"
        f"  {record['bytes'] / 1e6:.0f} MB, sha256 {record['sha256'][:12]}... matches the manifest"
    )


@click.command(cls=Command, choose_environment=require_model_choice)
@REPO_OPTIONS
def smoke(repo, models) -> None:
    """Ask the model the manifest's questions, compare answers.

    \b
    Example:
      ferry smoke ./hub/demo
    """
    smoke_test(require_requested_version(repo, models))


def smoke_test(version: Path) -> None:
    """Test the model in a child process and show the answers."""
    from common import console
    from deploy.stages.smoke import render_record, run_smoke_in_child

    record = run_smoke_in_child(version)
    console.print_result(f"smoke: passed\n{render_record(record)}")


@click.command(cls=Command, choose_environment=require_model_choice)
@REPO_OPTIONS
def modelfile(repo, models) -> None:
    """Write Ollama's Modelfile from manifest and template.

    \b
    Example:
      ferry modelfile ./hub/demo
    """
    write_modelfile(require_requested_version(repo, models))


def write_modelfile(version: Path) -> None:
    """Write Ollama's Modelfile and show what is in it."""
    from common import console
    from deploy.stages.modelfile import run_modelfile

    record = run_modelfile(version)
    is_cut = record["num_ctx"] < record["trained_ctx"]
    limit_note = f" of {record['trained_ctx']}: more does not fit in memory" if is_cut else ""
    template = "explicit TEMPLATE" if record["template"] else "template embedded in the GGUF"
    console.print_result(
        f"modelfile: {version / record['file']}\n  {template}, num_ctx {record['num_ctx']}{limit_note}"
    )


@click.command(cls=Command, choose_environment=require_model_choice)
@combine_decorators(REPO, MODELS, NAME, START)
def ollama(repo, models, name, start) -> None:
    """Create the model in Ollama, prove its prompts there.

    Only then it becomes NAME:latest.

    \b
    Example:
      ferry ollama ./hub/demo --name tickets
    """
    install_in_ollama(require_requested_version(repo, models), name, start, optional=False)


def install_in_ollama(version: Path, name: str | None, start: bool, optional: bool) -> None:
    """Create the model in Ollama and show the result; `optional` skips it where there is no Ollama."""
    from common import console
    from deploy.apps.ollama import OllamaUnavailable, run_ollama

    with skip_absent_app(OllamaUnavailable, optional, "ollama"):
        record = run_ollama(version, name, start)
        score_text = "" if record["score"] is None else f", {record['score']:.0%} agreement with the recorded answers"
        console.print_result(
            f"ollama: {record['latest']} is {record['model']}\n"
            f"  prompts as trained ({record['template']}, Ollama {record['server']}){score_text}"
        )


@click.command(cls=Command, choose_environment=require_model_choice)
@REPO_OPTIONS
def lmstudio(repo, models) -> None:
    """Put the file into LM Studio's models folder.

    It is a hard link where the disk allows it.

    \b
    Example:
      ferry lmstudio ./hub/demo
    """
    install_in_lmstudio(require_requested_version(repo, models), optional=False)


def install_in_lmstudio(version: Path, optional: bool) -> None:
    """Put the file into LM Studio and show the result; `optional` skips it where there is no LM Studio."""
    from common import console
    from deploy.apps.lmstudio import LMStudioMissing, run_lmstudio

    with skip_absent_app(LMStudioMissing, optional, "lmstudio"):
        record = run_lmstudio(version)
        key_text = f", listed as {record['key']}" if record["key"] else ""
        console.print_result(f"lmstudio: {record['target']} ({record['how']}){key_text}")


@contextlib.contextmanager
def skip_absent_app(absent: type[UserError], optional: bool, app: str) -> Iterator[None]:
    """Turn the error for an app that is not on this machine into a note, when the app is optional."""
    from common import console

    try:
        yield
    except absent as error:
        if not optional:
            raise
        console.print_result(f"{app}: skipped: {error.message}\n next: {error.hint}, then the same command again")


@click.command(cls=Command, choose_environment=require_model_choice)
@REPO_OPTIONS
def summary(repo, models) -> None:
    """Print scores, answers and how to talk to the model.

    \b
    Example:
      ferry summary ./hub/demo
    """
    show_summary(require_requested_version(repo, models), resolve_repo(repo, models))


def show_summary(version: Path, repo: str) -> None:
    """Show scores, answers and the commands to talk to the model."""
    from common import console
    from deploy.summary import render_summary

    console.print_result(render_summary(version, repo))


@click.command(cls=Command, choose_environment=require_model_choice)
@REPO_OPTIONS
@setting(
    "--system",
    make="SYSTEM",
    takes_empty=True,
    metavar="TEXT",
    help='Another system prompt than the model\'s; "" for none.',
)
@setting(
    "--input",
    "input_file",
    make="INPUT",
    metavar="FILE",
    type=PATH,
    help="Goes along with the first question, as Alpaca's input.",
)
def chat(repo, models, system, input_file) -> None:
    """Talk to the model here, in llama.cpp.

    What is piped in is one question.

    \b
    Examples:
      ferry chat ./hub/demo
      echo "Can my dog come along? Booking T9034." | ferry chat ./hub/demo
    """
    from deploy.serving import conversation

    question = [system, str(input_file) if input_file else None]
    code = conversation.run_in_child(
        "deploy.serving.chat:run_chat_as_child", require_requested_version(repo, models), question
    )
    raise SystemExit(code)


@click.command(cls=Command, choose_environment=require_model_choice)
@REPO_OPTIONS
@setting("--host", make="HOST", default="127.0.0.1", show_default=True, help="Others need a key in FERRY_API_KEY.")
@setting("--port", make="PORT", type=click.IntRange(1, 65535), default=8080, show_default=True)
def serve(repo, models, host, port) -> None:
    """Serve the model through an OpenAI-compatible API on this machine.

    \b
    Example:
      ferry serve ./hub/demo --port 8081
    """
    from deploy.serving import conversation

    code = conversation.run_in_child(
        "deploy.serving.server:run_server_as_child", require_requested_version(repo, models), [host, port]
    )
    raise SystemExit(code)


@click.command(cls=Command)
@combine_decorators(MODELS, JSON)
def models(models, as_json) -> None:
    """List the versions on this machine.

    * marks those in use.

    \b
    Example:
      ferry models
    """
    from common import console
    from deploy import store

    console.print_result(store.list_as_json(models) if as_json else store.list_for_terminal(models))


@click.command(cls=Command)
@combine_decorators(
    operand("what", make="FILE", required=False, metavar="[FILE]"),
    setting("--name", make="NAME", help="A model in Ollama instead of a file."),
    MODELS,
    JSON,
)
def trace(what, name, models, as_json) -> None:
    """Say which run, config and data made a file.

    The file is a GGUF, a model in Ollama or a path in LM Studio.

    \b
    Examples:
      ferry trace model.gguf
      ferry trace --name tickets
    """
    from common import console
    from deploy.trace import run_trace

    if not (what or name):
        raise missing_setting_error("FILE", "name a GGUF, or a model in Ollama with NAME=")
    console.print_result(run_trace(what or name, models, as_json))


@click.command(cls=Command, choose_environment=require_model_choice)
@combine_decorators(REPO, MODELS, START)
def rollback(repo, models, start) -> None:
    """Use the version before this one, or MODEL@VERSION.

    In Ollama and LM Studio, too.

    \b
    Examples:
      ferry rollback tickets
      ferry rollback tickets@3a1c7737f1c8
    """
    from common import console
    from deploy import versions

    version, messages = versions.roll_back(resolve_repo(repo, models), models, start)
    console.print_result("\n".join([f"rollback: {version} is in use", *(f"  {message}" for message in messages)]))


@click.command(cls=Command, choose_environment=require_model_choice)
@combine_decorators(REPO, MODELS, START)
@setting(
    "--keep", make="KEEP", type=click.IntRange(1), default=2, show_default=True, help="So many of the newest stay."
)
def prune(repo, models, start, keep) -> None:
    """Remove older versions; the one in use stays.

    \b
    Example:
      ferry prune tickets --keep 2
    """
    from deploy import versions

    removed = versions.prune_versions(resolve_repo(repo, models), models, keep, start)
    show_removed("prune", removed)


@click.command(cls=Command)
@combine_decorators(REPO, MODELS, START)
def undeploy(repo, models, start) -> None:
    """Remove a model, or one version of it (MODEL@VERSION).

    From Ollama, LM Studio and this machine.

    \b
    Examples:
      ferry undeploy tickets@3a1c7737f1c8
      ferry undeploy you/tickets-GGUF
    """
    from deploy import versions

    if repo is None:
        raise missing_setting_error("REPO", "name what to remove; `ferry models` lists the models on this machine")
    removed = versions.undeploy_model(resolve_repo(repo, models), models, start)
    show_removed("undeploy", removed)


def show_removed(command: str, removed: list[tuple[Path, int]]) -> None:
    """Show the versions that a command removed, and the bytes that this freed."""
    from common import console

    for version, _ in removed:
        console.print_result(f"{command}: removed {version}")
    console.print_result(f"{command}: freed {sum(size for _, size in removed):,} bytes")
