"""Commands about the runs on this machine, and `init`, which writes a config for your own rows."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.environment import Command
from cli.options import JSON, PATH, RUN_CHOICE, RUNS, YES, choose_run_folder, combine_decorators, typed_command
from cli.settings import setting
from common.errors import UserError

if TYPE_CHECKING:
    from pipeline.run.run_folder import Run


def find_existing_run(config_file: Path | None, run_name: str | None, runs: Path) -> "Run":
    """Return the run that was typed, else the only one. Raise UserError when there is no such run, or several."""
    from pipeline.run import status

    if config_file is None and run_name is None:
        return find_only_run(runs)
    return status.load_run(choose_run_folder(config_file, run_name, runs))


def find_only_run(runs: Path) -> "Run":
    """Return the only run in a folder. Raise UserError when there is none, or several."""
    from pipeline.run import status

    existing_runs = status.list_runs(runs)
    if len(existing_runs) == 1:
        return existing_runs[0]
    if not existing_runs:
        raise UserError(f"there is no run in {runs}", "make train CONFIG=configs/yours.yaml", code="run.none")
    names = ", ".join(run.name for run in existing_runs)
    raise UserError(f"{runs} has several runs: {names}", "RUN=name, or CONFIG=configs/yours.yaml", code="run.ambiguous")


@click.command(cls=Command)
@setting(
    "--data", "source", make="DATA", required=True, metavar="FILE", help="Your rows: .jsonl, .json, .csv or .parquet."
)
@setting(
    "--model", make="MODEL", metavar="ID", help="The base model; default: the demo's, which any machine can train."
)
@setting(
    "--goal",
    make="GOAL",
    type=click.Choice(["label", "exact", "json", "text"]),
    help="What an answer is; default: read off the rows.",
)
@setting(
    "--config", "target", make="CONFIG", type=PATH, help="The file to write; default: configs/<name of the data>.yaml."
)
def init(source: str, model: str | None, goal: str | None, target: Path | None) -> None:
    """Write a commented config for your model, rows and goal.

    \b
    Examples:
      ferry init --data tickets.jsonl
      ferry init --data tickets.jsonl --model Qwen/Qwen3-1.7B --goal json
    """
    from common import console
    from pipeline.preflight import new_config

    path, facts = new_config.write_config(source, model, goal, target)
    console.print_result(
        "\n".join(
            [f"{path}", *(console.wrap_text(f"  {fact}", 4) for fact in facts), f" next: make preview CONFIG={path}"]
        )
    )


@click.command(cls=Command)
@combine_decorators(RUNS, JSON)
def list_runs(runs, as_json) -> None:
    """List the runs on this machine and how far they are.

    \b
    Example:
      ferry runs
    """
    from common import console
    from pipeline.run import status

    statuses = [status.read_status(run) for run in status.list_runs(runs)]
    if as_json:
        console.print_result(status.status_to_json(statuses))
    elif statuses:
        console.print_result(status.format_runs(statuses))
    else:
        console.print_result(f"there is no run in {runs} yet: make demo, or make init DATA=rows.jsonl")


@click.command(cls=Command)
@combine_decorators(RUN_CHOICE, JSON)
def status(config_file, run_name, runs, as_json) -> None:
    """Show how far a run has got, and which command is working in it.

    \b
    Example:
      ferry status --run tickets --json
    """
    from common import console
    from pipeline.run import status

    run = find_existing_run(config_file, run_name, runs)
    run_status = status.read_status(run)
    console.print_result(status.status_to_json(run_status) if as_json else status.format_status(run_status, run))


@click.command(cls=Command)
@combine_decorators(RUN_CHOICE, YES)
@setting("--all", "everything", make="ALL", is_flag=True, help="The whole run, its adapter and records too.")
def clean(config_file, run_name, runs, yes, everything) -> None:
    """Remove what a run can make again.

    16-bit weights, GGUFs without importance matrix, old checkpoints.

    \b
    Examples:
      ferry clean --run tickets
      ferry clean --run tickets --all --yes
    """
    from common import console
    from pipeline.run.run_stages import lock_run

    run = find_existing_run(config_file, run_name, runs)
    if everything and config_file is None and run_name is None:
        raise UserError(
            f"ALL=1 removes a complete run and needs its name; {runs} has {run.name}",
            f"RUN={run.name}",
            code="run.not_named",
        )
    with lock_run(run, typed_command("clean")):
        size = remove_run(run, yes) if everything else remove_unneeded_files(run)
        console.print_result(f"clean: freed {size / 1e9:.2f} GB")


def remove_run(run: "Run", is_confirmed: bool) -> int:
    """Remove a run and return the bytes that this freed. Raise UserError when it is not confirmed."""
    from common import files
    from pipeline.run import status
    from pipeline.run.run_stages import lock_path

    size = status.read_status(run).bytes
    if not is_confirmed:
        raise UserError(
            f"ALL=1 also removes the adapter and all records in {run.folder}, {size / 1e9:.2f} GB",
            "the same command with YES=1",
            code="run.removal_not_confirmed",
        )
    files.remove(run.folder)
    files.remove(lock_path(run))
    return size


def remove_unneeded_files(run: "Run") -> int:
    """Remove and show what a run can make again, and return the bytes that this freed."""
    from common import console
    from pipeline.run import status

    paths = status.find_removable_paths(run)
    for path in paths:
        console.print_result(f"clean: {path}")
    return status.remove_paths(run, paths) if paths else 0
