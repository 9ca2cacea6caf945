"""Options that several commands share."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.settings import Decorator, missing_setting_error, operand, setting
from common.errors import UserError, printable_line

if TYPE_CHECKING:
    from pipeline.config.schema import Config

PATH = click.Path(path_type=Path)
MAX_RUN_NAME = 96  # characters: file names are the model's name and a suffix, and a manifest allows 128


def combine_decorators(*decorators: Decorator) -> Decorator:
    """Return one decorator that applies several, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


RUNS = setting("--runs", make="RUNS", type=PATH, default=Path("runs"), show_default=True, help="Where runs go.")
SET = setting(
    "--set",
    "overrides",
    make="SET",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one value of the config; repeatable.",
)
RUN_CHOICE = combine_decorators(
    operand("config_file", make="CONFIG", metavar="[CONFIG]", required=False, type=PATH),
    setting("--run", "run_name", make="RUN", metavar="NAME", help="Name of the run; default: the config's."),
    RUNS,
)
RUN_OPTIONS = combine_decorators(RUN_CHOICE, SET)
CHECKPOINTS = setting(
    "--checkpoints",
    make="CHECKPOINTS",
    metavar="OWNER/NAME",
    envvar="FERRY_CHECKPOINTS",
    help="A private repo on the Hub that gets the newest checkpoint, so that another machine can resume.",
)
IMAGE_OPTIONS = combine_decorators(
    setting("--docker", make="DOCKER", type=click.Choice(["0", "1"]), help="1: in Ferry's image; 0: natively."),
    setting("--image", make="IMAGE", metavar="NAME:TAG", help="A ready image to run in."),
    setting("--device", make="DEVICE", type=click.Choice(["cpu", "cuda"]), help="Which image."),
    setting("--engine", make="ENGINE", metavar="NAME", help="docker or podman."),
    setting("--mount", make="MOUNT", metavar="FOLDERS", help="More folders of this machine for the image."),
    setting("--docker-build-flags", make="DOCKER_BUILD_FLAGS", hidden=True),
    setting("--docker-run-flags", make="DOCKER_RUN_FLAGS", hidden=True),
)
MODELS = setting(
    "--models", make="MODELS", type=PATH, default=Path("models"), show_default=True, help="Where models are kept."
)
QUANTIZATION = setting(
    "--quantization", make="QUANT", metavar="NAME", help="Which GGUF of the repo; default: the manifest's."
)
START = setting("--start", make="START", is_flag=True, help="Start Ollama's server when none answers.")
YES = setting("--yes", make="YES", is_flag=True, help="Do not ask.")
JSON = setting("--json", "as_json", make="JSON", is_flag=True, help="Print JSON.")


def typed_command(name: str) -> str:
    """Return the command as the user typed it, with make or not, without its settings."""
    return os.environ.get("FERRY_TYPED") or f"ferry {name}"


@dataclass(frozen=True)
class RunRequest:
    """The run that a command is about, and the config for it."""

    config_file: Path
    folder: Path
    overrides: tuple[str, ...]
    is_own_config: bool
    """Whether config_file is the config.yaml in the run's folder."""

    def load_config(self) -> "Config":
        """Return the config with its overrides. Raise UserError when it is bad or its base model is not supported."""
        from pipeline.base_model.model_config import refuse_unsupported_base
        from pipeline.config import load

        config = load.load_config(self.config_file, self.overrides)
        refuse_unsupported_base(config.base)
        return config


def choose_run_folder(config_file: Path | None, run_name: str | None, runs: Path) -> Path:
    """Return the folder that the run has or will have. Raise UserError for a bad name, or without config and name."""
    if run_name is None:
        if config_file is None:
            raise missing_setting_error("CONFIG", f"name one: {', '.join(list_configs()) or 'ferry init writes one'}")
        run_name = config_file.stem
    refuse_bad_run_name(run_name)
    return runs / run_name


def find_run(config_file: Path | None, run_name: str | None, runs: Path, overrides: tuple[str, ...] = ()) -> RunRequest:
    """Return the run of a config, or the run of a name with its own config. Raise UserError when there is neither."""
    folder = choose_run_folder(config_file, run_name, runs)
    if config_file is not None:
        return RunRequest(config_file, folder, overrides, False)
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"there is no run {folder}; a new run needs CONFIG",
            f"CONFIG=one of: {', '.join(list_configs()) or 'ferry init writes one'}",
            code="run.not_found",
        )
    return RunRequest(folder / "config.yaml", folder, overrides, True)


def refuse_bad_run_name(name: str) -> None:
    """Raise UserError for a name that cannot be that of a folder and of a model."""
    from contract.manifest import NAME_PATTERN

    if (
        not re.fullmatch(NAME_PATTERN, Path(name).name)
        or len(Path(name).name) > MAX_RUN_NAME
        or (not Path(name).is_absolute() and "/" in name)
    ):
        raise UserError(
            f"RUN={printable_line(name)!r} is not a valid name for a run",
            f"use up to {MAX_RUN_NAME} letters, digits, dots, dashes and underscores, a letter or digit first",
            code="run.bad_name",
        )


def list_configs() -> list[str]:
    """Return the paths of the configs in configs/."""
    return sorted(str(path) for path in Path("configs").glob("*.yaml"))
