"""Commands of the machine that trains: the config, each stage, and all stages in order."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.environment import Command
from cli.options import (
    CHECKPOINTS,
    IMAGE_OPTIONS,
    JSON,
    MODELS,
    PATH,
    QUANTIZATION,
    RUN_OPTIONS,
    RUNS,
    SET,
    START,
    RunRequest,
    combine_decorators,
    find_run,
    typed_command,
)
from cli.settings import operand, setting

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.run.records import PublishRecord
    from pipeline.run.run_folder import Run

STAGE_OPTIONS = combine_decorators(RUN_OPTIONS, CHECKPOINTS, IMAGE_OPTIONS)
DEMO_CONFIG = Path("configs/demo.yaml")


def load_valid_config(params: dict[str, Any]) -> "Config":
    """Return the config, before any environment is set up. Raise UserError when it is missing or bad."""
    from pipeline.base_model import restore_gguf

    request = find_run(params["config_file"], params["run_name"], params["runs"], params["overrides"])
    config = request.load_config()
    restore_gguf.refuse_unusable_gguf(config.base.model)
    return config


def choose_environment_for_training(params: dict[str, Any]) -> None:
    """Return None, for the table's environment. Raise UserError when the config is missing or bad."""
    load_valid_config(params)


def choose_environment_for_rows(params: dict[str, Any]) -> str | None:
    """Return 'train' for a base model that is a GGUF, which llama.cpp must read; None for the table's environment."""
    model = load_valid_config(params).base.model
    return "train" if model.startswith("pypi:") or model.endswith(".gguf") else None


@click.command("config", cls=Command)
@operand("config_file", make="CONFIG", type=PATH)
@SET
def show_config(config_file: Path, overrides: tuple[str, ...]) -> None:
    """Check a config and print it with all defaults.

    \b
    Example:
      ferry config configs/demo.yaml --set finetune.max_steps=20
    """
    from common import console
    from pipeline.base_model import model_config, restore_gguf
    from pipeline.config import advice, load, user_files

    config = load.load_config(config_file, overrides)
    model_config.refuse_unsupported_base(config.base)
    user_files.refuse_missing_files(config)
    restore_gguf.refuse_unusable_gguf(config.base.model)
    console.print_result(load.dump_config(config).rstrip("\n"))
    for text in advice.list_warnings(config):
        console.print_note(text)


@contextlib.contextmanager
def open_run(
    request: RunRequest, name: str, checkpoints: str | None = None
) -> Iterator[tuple["Run", "Config", int | None]]:
    """Lock the run, let it accept the request's config, and yield (run, config, file descriptor of the lock).

    Raise UserError when another command works in the run, or when the config would change its rows or its training.
    """
    from common import console
    from pipeline.checkpoint_sync import restore
    from pipeline.config.user_files import refuse_files_inside
    from pipeline.preflight.user_inputs import refuse_unusable_inputs
    from pipeline.run.changes import apply_config, find_allowed_changes
    from pipeline.run.run_folder import Run, refuse_foreign_folder
    from pipeline.run.run_stages import lock_run

    config, run = request.load_config(), Run(request.folder)
    with lock_run(run, typed_command(name)) as lock:
        refuse_foreign_folder(run.folder)
        refuse_files_inside(config, run.folder)
        if checkpoints:
            os.environ["FERRY_CHECKPOINTS"] = checkpoints
            restore.restore_run(checkpoints, run, config)
        changes = find_allowed_changes(run, config, request.is_own_config)
        if not run.is_done("evaluate") or "evaluate" in changes.stale:
            refuse_unusable_inputs(config, run.is_done("data"))
        apply_config(run, config, changes)
        for text in changes.describe_reruns():
            console.print_note(text)
        yield run, config, lock


def run_stages_up_to(stage: str, request: RunRequest, checkpoints: str | None, **arguments: list[str]) -> None:
    """Run every stage up to this one. arguments: stage -> further arguments of its process."""
    from pipeline.run.run_stages import run_stages

    with open_run(request, stage, checkpoints) as (run, _, lock):
        run_stages(run, stage, lock, arguments)


@click.command(cls=Command, choose_environment=choose_environment_for_training)
@STAGE_OPTIONS
def train(config_file, run_name, runs, overrides, checkpoints, **image) -> None:
    """Run every stage, from where the run stands.

    The stages: data, finetune, evaluate, export, verify, publish.

    \b
    Examples:
      ferry train configs/demo.yaml
      ferry train configs/tickets.yaml --set finetune.seed=1 --run tickets.v2
    """
    train_and_summarize(find_run(config_file, run_name, runs, overrides), checkpoints)


def train_and_summarize(request: RunRequest, checkpoints: str | None) -> "PublishRecord":
    """Run every stage, show the summary, and return the record of `publish`."""
    from cli import train_summary
    from common import console
    from pipeline.preflight import check_run
    from pipeline.run.records import PublishRecord
    from pipeline.run.run_stages import run_stages

    with open_run(request, "train", checkpoints) as (run, config, lock):
        for text in check_run.run_preflight(config, run, checkpoints=checkpoints):
            console.print_message(console.wrap_text(f"preflight: {text}"))
        run_stages(run, "publish", lock)
        console.print_result(train_summary.summarize(run))
        return run.read_record(PublishRecord)


@click.command(cls=Command)
@combine_decorators(
    setting("--run", "run_name", make="RUN", metavar="NAME", help="Name of the run; default: demo."),
    RUNS,
    SET,
    MODELS,
    setting("--repo", make="REPO", metavar="FOLDER", help="Default: ./hub/demo, where the run publishes."),
    QUANTIZATION,
    START,
    IMAGE_OPTIONS,
)
def demo(run_name, runs, overrides, models, repo, quantization, start, **image) -> None:
    """Train and deploy a 135M model on this machine's CPU.

    With real weights, and without an account.

    \b
    Example:
      ferry demo
    """
    from cli.deploy import deploy_everywhere

    record = train_and_summarize(find_run(DEMO_CONFIG, run_name, runs, overrides), None)
    deploy_everywhere(repo or record.repo_with_tag, models, quantization, None, start)


@click.command(cls=Command, choose_environment=choose_environment_for_rows)
@STAGE_OPTIONS
@setting("--processes", type=click.IntRange(1), help="How many work on the rows; default: one a core.")
def data(config_file, run_name, runs, overrides, checkpoints, processes, **image) -> None:
    """Make rows: read, clean, split, render, mask, tokenize.

    \b
    Example:
      ferry data configs/tickets.yaml
    """
    request = find_run(config_file, run_name, runs, overrides)
    run_stages_up_to("data", request, checkpoints, data=[str(processes)] if processes else [])


@click.command(cls=Command, choose_environment=choose_environment_for_rows)
@combine_decorators(RUN_OPTIONS, IMAGE_OPTIONS)
@setting("--rows", "count", make="ROWS", type=click.IntRange(1, 1000), default=3, show_default=True, help="How many.")
def preview(config_file, run_name, runs, overrides, count, **image) -> None:
    """Show the first rows as they will be trained.

    The tokens that carry loss are in colour. Writes nothing.

    \b
    Example:
      ferry preview configs/tickets.yaml --rows 5
    """
    from common import console
    from pipeline.data.preview import preview_rows
    from pipeline.run.run_folder import Run

    request = find_run(config_file, run_name, runs, overrides)
    console.print_result(preview_rows(request.load_config(), Run(request.folder), count))


@click.command(cls=Command, choose_environment=choose_environment_for_rows)
@combine_decorators(RUN_OPTIONS, IMAGE_OPTIONS)
@setting(
    "--gpu", make="GPU", metavar="NAME", help="A GPU of configs/gpus.csv; default: the one here, else the cheapest."
)
@setting(
    "--probe", make="PROBE", is_flag=True, help="Measure a few steps on this GPU; finetune then takes the fastest."
)
@JSON
def plan(config_file, run_name, runs, overrides, gpu, probe, as_json, **image) -> None:
    """Say what the training needs on each GPU.

    Memory, disk, steps, hours and dollars. It needs no GPU itself.

    \b
    Examples:
      ferry plan configs/tickets.yaml
      ferry plan configs/tickets.yaml --gpu "RTX 4090" --json
    """
    from common import console
    from pipeline.plan import estimate
    from pipeline.run.run_folder import Run
    from pipeline.run.run_stages import run_stages
    from pipeline.toolchain import machine

    request = find_run(config_file, run_name, runs, overrides)
    run = Run(request.folder)
    if probe or not run.is_done("data"):
        with open_run(request, "plan") as (_, _, lock):
            run_stages(run, "data", lock)
    gpus = machine.query_nvidia().gpus
    format_plan = estimate.plan_to_json if as_json else estimate.run_plan
    console.print_result(format_plan(request.load_config(), run, gpu, gpus[0].name if gpus else None))
    if probe:
        from pipeline.finetune import probe as probing

        console.print_message("\nmeasured on this GPU, a few steps each, at the longest rows:")
        probe_table = probing.run_probe(run)
        console.print_result(probe_table)


@click.command(cls=Command, choose_environment=choose_environment_for_rows)
@combine_decorators(RUN_OPTIONS, CHECKPOINTS, IMAGE_OPTIONS)
def preflight(config_file, run_name, runs, overrides, checkpoints, **image) -> None:
    """Ask first what would fail at the end.

    Token, repo, base model, licence, data set and disk.

    \b
    Example:
      ferry preflight configs/tickets.yaml
    """
    from common import console
    from pipeline.preflight.check_run import run_preflight
    from pipeline.run.run_folder import Run

    request = find_run(config_file, run_name, runs, overrides)
    for text in run_preflight(request.load_config(), Run(request.folder), checkpoints=checkpoints):
        console.print_result(console.wrap_text(f"preflight: {text}"))


@click.command(cls=Command)
@combine_decorators(RUN_OPTIONS)
def check(config_file, run_name, runs, overrides) -> None:
    """Say which stages would run again with this config.

    Changed rows are noticed too.

    \b
    Example:
      ferry check configs/tickets.yaml --set export.quantizations=[q5_k_m]
    """
    from common import console
    from pipeline.run.changes import find_allowed_changes
    from pipeline.run.run_folder import Run

    request = find_run(config_file, run_name, runs, overrides)
    changes = find_allowed_changes(Run(request.folder), request.load_config(), request.is_own_config)
    for text in changes.describe_reruns() or [f"{request.folder} fits this config: no finished stage runs again"]:
        console.print_result(console.wrap_text(text))


def create_stage_command(stage: str, summary: str) -> Command:
    """Return the command that runs every stage up to this one."""

    @click.command(
        stage,
        cls=Command,
        choose_environment=choose_environment_for_training,
        help=f"{summary}\n\n\b\nExample:\n  ferry {stage} configs/tickets.yaml",
    )
    @STAGE_OPTIONS
    def command(config_file, run_name, runs, overrides, checkpoints, **image) -> None:
        run_stages_up_to(stage, find_run(config_file, run_name, runs, overrides), checkpoints)

    return command


finetune = create_stage_command("finetune", "Train the LoRA adapter; resume from the last checkpoint.")
evaluate = create_stage_command("evaluate", "Score base model and adapter on held-out rows, in torch.")
export = create_stage_command("export", "Merge to 16 bit, convert to GGUF, quantize.")
verify = create_stage_command(
    "verify",
    "Check and score the GGUF files in llama.cpp.\n\nA file that does not answer as the trained model is refused.",
)
publish = create_stage_command("publish", "Put GGUF, adapter and model card into the hub.")


@click.command(cls=Command)
@combine_decorators(
    setting(
        "--checkpoints",
        make="CHECKPOINTS",
        metavar="OWNER/NAME",
        required=True,
        help="The private repo that has its state.",
    ),
    RUNS,
    IMAGE_OPTIONS,
)
def resume(checkpoints, runs, **image) -> None:
    """Resume a run that another machine began.

    From its checkpoints on the Hub alone.

    \b
    Example:
      ferry resume --checkpoints you/tickets-checkpoints
    """
    from pipeline.checkpoint_sync import restore

    snapshot = restore.resume_run(checkpoints, runs)
    train_and_summarize(find_run(None, snapshot.run, runs), checkpoints)
