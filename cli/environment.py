"""Run a command where it can run: in Ferry's image, in the Python environment that has its libraries, or here."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cli.settings import list_make_settings
from cli.table import IMAGE_COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / "setup"
# The `ferry` script sets it: this process may switch to another environment. `python -m cli` runs as it is.
MAY_SWITCH = "FERRY_MAY_SWITCH"
IMAGE_SETTINGS = ("DOCKER", "IMAGE", "DEVICE", "ENGINE", "MOUNT", "DOCKER_BUILD_FLAGS", "DOCKER_RUN_FLAGS")
FOLDER_SETTINGS = ("CONFIG", "RUNS", "MODELS", "REPO")  # paths on this machine that the image needs
# Environment -> options of setup/env.py.
ENV_SCRIPT_OPTIONS: dict[str, list[str]] = {"train": [], "deploy": ["--deploy"], "data": ["--light"]}


class Command(click.Command):
    """A command that knows which environment it needs (cli/table.py)."""

    name: str
    """Never None: `load_command` sets it."""
    environment = "core"

    def __init__(self, *, choose_environment: Callable[[dict[str, Any]], str | None] | None = None, **attributes: Any):
        """Create the command.

        choose_environment: returns, for the command's parameters, another environment than the table's, or None. It
        runs before anything else, so it raises UserError for what is known without an environment, as for a bad config.
        """
        super().__init__(context_settings={"help_option_names": ["-h", "--help"]}, **attributes)
        self.choose_environment = choose_environment

    def invoke(self, ctx: click.Context) -> Any:
        if os.environ.pop(MAY_SWITCH, None) and not os.environ.get("FERRY_IMAGE"):
            kind = self.choose_environment(ctx.params) if self.choose_environment else None
            enter_environment(self, ctx, kind or self.environment)
        return super().invoke(ctx)


def enter_environment(command: Command, ctx: click.Context, kind: str) -> None:
    """Return if this process can run the command; else replace it by one that can, in the image or an environment."""
    if command.name in IMAGE_COMMANDS or kind == "image":
        run_in_image_if_chosen(command, ctx)
    if kind == "core":
        return
    if kind == "present":
        python = find_environment(("train", "deploy", "data"))
    else:
        python = prepare_environment("data" if kind == "rows" else kind)
    if python and not is_this_python(python):
        os.execv(python, [str(python), "-m", "cli", *sys.argv[1:]])


@dataclass(frozen=True)
class EnvironmentFolder:
    """An environment of a kind, in a folder where it is or will be."""

    kind: str
    folder: Path

    @property
    def python(self) -> Path:
        """Return the path of its Python."""
        return self.folder / "bin" / "python"

    def is_finished(self) -> bool:
        """Return whether its set-up was completed: ferry.json is written last."""
        return (self.folder / "ferry.json").is_file() and self.python.exists()


def environment_folders() -> dict[str, EnvironmentFolder]:
    """Return each kind of environment with its folder."""
    venv = os.environ.get("FERRY_VENV")
    deploy_venv = os.environ.get("FERRY_DEPLOY_VENV") or venv
    folders = {"train": venv or ".venv", "deploy": deploy_venv or ".venv-deploy", "data": venv or ".venv-light"}
    return {kind: EnvironmentFolder(kind, ROOT / folder) for kind, folder in folders.items()}


def find_environment(kinds: tuple[str, ...]) -> Path | None:
    """Return the Python of the first of these environments that is set up, or None."""
    environments = (environment_folders()[kind] for kind in kinds)
    return next((environment.python for environment in environments if environment.is_finished()), None)


def prepare_environment(kind: str) -> Path:
    """Return the Python of an environment that can do what `kind` can, and set it up now if needed.

    A finished environment for training serves all kinds. Raise SystemExit when the set-up fails.
    """
    environment = environment_folders()[kind]
    if environment_folders()["train"].is_finished() and not (kind == "deploy" and os.environ.get("FERRY_DEPLOY_VENV")):
        environment = environment_folders()["train"]
    options = ENV_SCRIPT_OPTIONS[environment.kind]
    code = subprocess.call(
        [sys.executable, str(SETUP / "env.py"), "--quiet", "--venv", str(environment.folder), *options]
    )
    if code:
        raise SystemExit(code)
    return environment.python


def is_this_python(python: Path) -> bool:
    """Return whether this process runs in the environment of that Python."""
    return Path(sys.prefix).resolve() == python.parent.parent.resolve()


def run_in_image_if_chosen(command: Command, ctx: click.Context) -> None:
    """Replace this process by one in the image, if the command is to run there. Raise SystemExit on bad settings."""
    script = [sys.executable, str(SETUP / "container.py")]
    settings = list_typed_settings(command, ctx, IMAGE_SETTINGS)
    if is_image_chosen([*script, "where", *settings, "--", command.name]):
        settings += list_typed_settings(command, ctx, FOLDER_SETTINGS)
        os.execv(sys.executable, [*script, "run", *settings, "--", *sys.argv[1:]])


def is_image_chosen(where_command: list[str]) -> bool:
    """Return whether setup/container.py chooses the image. Raise SystemExit when it has refused the settings."""
    place = subprocess.run(where_command, stdout=subprocess.PIPE, text=True).stdout.strip()
    if place not in ("native", "image"):
        raise SystemExit(2)
    return place == "image"


def list_typed_settings(command: click.Command, ctx: click.Context, names: tuple[str, ...]) -> list[str]:
    """Return NAME=VALUE of those of these make settings that were typed, as setup/container.py takes them."""
    own_settings, typed = list_make_settings(command), click.core.ParameterSource.COMMANDLINE
    parameter_names = {name: own_settings[name].name for name in names if name in own_settings}
    return [
        f"{name}={ctx.params[key]}" for name, key in parameter_names.items() if ctx.get_parameter_source(key) == typed
    ]
