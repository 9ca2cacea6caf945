"""Find a Python that the set-up can use.

This file keeps to the syntax of Python 3.6, so that an old Python (macOS has 3.9) can say that it is too old.
"""

import os
import platform
import subprocess
import sys

from shared import SETUP_COMMAND, fail

OLDEST_PYTHON = {"command line": (3, 10), "train": (3, 11), "image": (3, 11), "deploy": (3, 10), "data": (3, 11)}
NEWEST_PYTHON = (3, 14)
PYTHON_NAMES = ("python3.13", "python3.12", "python3.11", "python3.14", "python3.10")  # the best tested ones first
# Of Homebrew, python.org and uv; they are not always on PATH.
PYTHON_FOLDERS = ("/opt/homebrew/bin", "/usr/local/bin", "~/.local/bin")


def switch_to_usable_python(oldest):
    """Return when this Python fits. Else restart this program with one that does, or exit and say how to get one."""
    is_intel = is_intel_on_apple_silicon()
    if oldest <= sys.version_info[:2] <= NEWEST_PYTHON and not is_intel:
        return
    for path in find_pythons(oldest):
        if is_usable_python(path, oldest, apple_silicon=is_intel):
            os.execv(path, [path] + sys.argv)
    fail_without_python(oldest, is_intel)


def is_intel_on_apple_silicon():
    """Return whether this is an x86_64 Python on Apple silicon, under Rosetta.

    It would build llama.cpp for Intel: without Metal, and at a tenth of the speed.
    """
    if sys.platform != "darwin" or platform.machine() != "x86_64":
        return False
    return "1" in (read_sysctl("sysctl.proc_translated"), read_sysctl("hw.optional.arm64"))


def read_sysctl(name):
    """Return a value of macOS's sysctl; empty for an unknown name."""
    return read_output(["sysctl", "-n", name])


def read_output(command):
    """Return what a command prints on stdout; empty when it fails."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL).decode(errors="replace").strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def find_pythons(oldest):
    """Yield the Pythons of this machine: by name on PATH and in the usual folders, then the one that uv finds."""
    folders = os.environ.get("PATH", "").split(os.pathsep) + [os.path.expanduser(folder) for folder in PYTHON_FOLDERS]
    for name in PYTHON_NAMES:
        for folder in folders:
            if os.access(os.path.join(folder, name), os.X_OK):
                yield os.path.join(folder, name)
    version_range = ">={}.{},<={}.{}.999".format(*(oldest + NEWEST_PYTHON))
    for folder in folders:
        if os.access(os.path.join(folder, "uv"), os.X_OK):
            uv_python = read_output(
                [os.path.join(folder, "uv"), "python", "find", "--system", "--no-python-downloads", version_range]
            )
            if uv_python:
                yield uv_python


def is_usable_python(python, oldest, module="sys", apple_silicon=False):
    """Return whether this Python runs, is neither too old nor too new, and has the module.

    It is run to find out, because pyenv's names on PATH may only print an error.
    """
    code = f"import platform, sys, {module}; sys.exit(not {oldest} <= sys.version_info[:2] <= {NEWEST_PYTHON}"
    code += " or platform.machine() != 'arm64')" if apple_silicon else ")"
    try:
        return subprocess.call([python, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:  # built for another processor
        return False


def fail_without_python(oldest, is_intel):
    """Exit with the error that this machine has no Python that fits, and how to get one."""
    version = ".".join(map(str, sys.version_info[:3]))
    need = "Python {}.{} to {}.{}".format(*(oldest + NEWEST_PYTHON))
    cure = "brew install python@3.13   or: uv python install 3.13"
    if is_intel:
        message = (
            f"this Python ({sys.executable}) is an Intel one under Rosetta, and no {need} for Apple Silicon was found"
        )
        cure = "/opt/homebrew/bin/brew install python@3.13   or: uv python install cpython-3.13-macos-aarch64"
        fail(message, f"{cure}   (is this terminal under Rosetta? first: arch -arm64 zsh), then {SETUP_COMMAND}")
    if sys.platform != "darwin":
        cure = "install python3.12 with its venv module   or: uv python install 3.13"
    fail(
        f"{need} is needed; this is {version} ({sys.executable}), and no other was found",
        f"{cure}, then {SETUP_COMMAND}",
    )
