"""The doctor command: what this machine is, has and lacks, and the command that cures each lack."""

import os
import shutil
from pathlib import Path
from typing import Any

import click

from cli.environment import Command
from cli.options import IMAGE_OPTIONS, JSON, MODELS, QUANTIZATION, RUNS, combine_decorators
from cli.settings import operand, setting


def find_side(side: str | None, repo: str | None) -> str:
    """Return the side to examine: the one that was typed, else `cloud` in the image or with an NVIDIA driver."""
    if side or repo:
        return side or "mac"
    return "cloud" if os.environ.get("FERRY_IMAGE") or shutil.which("nvidia-smi") else "mac"


def choose_environment(params: dict[str, Any]) -> str | None:
    """Return the environment that the doctor needs, or None for the table's."""
    if find_side(params["side"], params["repo"]) == "mac" and params["repo"]:
        return "deploy"  # a repo's manifest is read, perhaps from the Hub
    return "image" if params.get("docker") == "1" or params.get("image") else None


@click.command(cls=Command, choose_environment=choose_environment)
@combine_decorators(
    operand("repo", make="REPO", required=False, metavar="[REPO]"),
    setting(
        "--side", make="SIDE", type=click.Choice(["cloud", "mac"]), help="The machine that trains, or that runs models."
    ),
    RUNS,
    MODELS,
    QUANTIZATION,
    JSON,
    IMAGE_OPTIONS,
)
def doctor(repo, side, runs: Path, models: Path, quantization, as_json, **image) -> None:
    """Say what this machine is, has and lacks.

    Each lack comes with the command that cures it. With REPO it also says
    whether that model fits here. Changes nothing.

    \b
    Examples:
      ferry doctor
      ferry doctor you/tickets-GGUF
    """
    from common import checks, console

    if find_side(side, repo) == "cloud":
        from pipeline.preflight.doctor import run_doctor as run_training_doctor

        results = run_training_doctor(runs)
    else:
        from deploy.doctor import run_doctor as run_deploy_doctor

        results = run_deploy_doctor(repo, models, quantization)
    console.print_result(checks.to_json(results) if as_json else checks.format_checks(results))
    checks.refuse_faults(results)
