"""Commands for Ferry itself: environments, images, locks, linters, tests."""

import os
import subprocess
import sys

import click

from cli.environment import IMAGE_SETTINGS, ROOT, SETUP, Command, environment_folders, list_typed_settings
from cli.options import IMAGE_OPTIONS


def replace_process(*command: object) -> None:
    """Replace this process by another program, in the checkout's folder."""
    os.chdir(ROOT)
    os.execv(str(command[0]), [str(word) for word in command])


@click.command(cls=Command)
def env() -> None:
    """Set up the environment that trains.

    Locked Python packages, and llama.cpp compiled once for this machine.

    \b
    Example:
      ferry env
    """
    replace_process(sys.executable, SETUP / "env.py", "--venv", environment_folders()["train"].folder)


@click.command(cls=Command)
def deploy_env() -> None:
    """Set up the environment that runs models.

    No torch; llama.cpp ready-made where there is a wheel.

    \b
    Example:
      ferry deploy-env
    """
    replace_process(sys.executable, SETUP / "env.py", "--deploy", "--venv", environment_folders()["deploy"].folder)


def run_container_script(verb: str) -> None:
    """Replace this process by setup/container.py, with the typed settings of the current command."""
    context = click.get_current_context()
    replace_process(
        sys.executable, SETUP / "container.py", verb, *list_typed_settings(context.command, context, IMAGE_SETTINGS)
    )


@click.command(cls=Command)
@IMAGE_OPTIONS
def image(**settings) -> None:
    """Build Ferry's image with Docker.

    \b
    Example:
      ferry image --device cuda
    """
    run_container_script("build")


@click.command(cls=Command)
@IMAGE_OPTIONS
def shell(**settings) -> None:
    """Open a shell in Ferry's image.

    With the folders that `ferry train` would see.

    \b
    Example:
      ferry shell
    """
    run_container_script("shell")


@click.command(cls=Command)
def lock() -> None:
    """Refresh the pins of all packages and show what changed.

    \b
    Example:
      ferry lock
    """
    replace_process(sys.executable, SETUP / "lock.py")


@click.command(cls=Command)
def lock_images() -> None:
    """Freeze the digest of each base image.

    Asks a registry, by skopeo or docker.

    \b
    Example:
      ferry lock-images
    """
    replace_process(sys.executable, SETUP / "pin.py")


@click.command(cls=Command)
def lint() -> None:
    """Run ruff, mypy, hadolint, shellcheck and actionlint.

    \b
    Example:
      ferry lint
    """
    os.environ["PATH"] = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
    replace_process("/bin/bash", SETUP / "lint.sh")


@click.command(cls=Command)
def test_fast() -> None:
    """Run the tests that train nothing, two at a time.

    \b
    Example:
      make test-fast
    """
    run_tests("not chain and not slow and not image and not release", "-n", "2")


@click.command(cls=Command)
def test() -> None:
    """Run every test, the chain on real weights included.

    `make test test-image` runs those of the image in the same session.

    \b
    Example:
      make test
    """
    run_tests("not release" if "test-image" in list_make_goals() else "not image and not release")


@click.command(cls=Command)
def test_image() -> None:
    """Build the CPU image and run the chain in it.

    Needs root and podman.

    \b
    Example:
      make test-image
    """
    if "test" not in list_make_goals():  # else `test` runs them too, in one session
        run_tests("image")


def list_make_goals() -> list[str]:
    """Return all targets of this call of make; empty without make."""
    return os.environ.get("FERRY_GOALS", "").split()


def run_tests(marker: str, *options: str) -> None:
    """Run the tests that match a marker expression, and exit with pytest's code."""
    os.chdir(ROOT)
    code = subprocess.call([sys.executable, "-m", "pytest", "-m", marker, *options])
    raise SystemExit(code)


@click.command(cls=Command)
def bench() -> None:
    """Measure time and memory of the demo, stage by stage.

    Writes benchmarks/results/demo.md.

    \b
    Example:
      ferry bench
    """
    replace_process("/bin/bash", ROOT / "benchmarks" / "demo.sh")
