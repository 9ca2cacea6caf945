"""Find a Python that the set-up can use.

This file keeps to the syntax of Python 3.6, so that an old Python (macOS has 3.9) can say that it is too old.
"""

import os
import platform
import subprocess
import sys

from shared import AGAIN, fail

NEWEST = (3, 14)
NAMES = ("python3.13", "python3.12", "python3.11", "python3.14", "python3.10")  # the best tested ones first
# Of Homebrew, python.org and uv; they are not always on PATH.
PLACES = ("/opt/homebrew/bin", "/usr/local/bin", "~/.local/bin")


def hand_over(oldest):
    """Return when this Python fits. Else restart this program with one that does, or exit and say how to get one."""
    disguised = intel_on_apple_silicon()
    if oldest <= sys.version_info[:2] <= NEWEST and not disguised:
        return
    for path in candidates(oldest):
        if fits(path, oldest, apple_silicon=disguised):
            os.execv(path, [path] + sys.argv)
    refuse(oldest, disguised)


def intel_on_apple_silicon():
    """Return whether this is an x86_64 Python on Apple silicon, under Rosetta.

    It would build llama.cpp for Intel: without Metal, and at a tenth of the speed.
    """
    if sys.platform != "darwin" or platform.machine() != "x86_64":
        return False
    return "1" in (sysctl("sysctl.proc_translated"), sysctl("hw.optional.arm64"))


def sysctl(name):
    """Return a value of macOS's sysctl; empty for an unknown name."""
    return said(["sysctl", "-n", name])


def said(command):
    """Return what a command prints on stdout; empty when it fails."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL).decode(errors="replace").strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def candidates(oldest):
    """Yield the Pythons of this machine: by name on PATH and in the usual folders, then the one that uv finds."""
    folders = os.environ.get("PATH", "").split(os.pathsep) + [os.path.expanduser(place) for place in PLACES]
    for name in NAMES:
        for folder in folders:
            if os.access(os.path.join(folder, name), os.X_OK):
                yield os.path.join(folder, name)
    asked = ">={}.{},<={}.{}.999".format(*(oldest + NEWEST))
    for folder in folders:
        if os.access(os.path.join(folder, "uv"), os.X_OK):
            found = said([os.path.join(folder, "uv"), "python", "find", "--system", "--no-python-downloads", asked])
            if found:
                yield found


def fits(python, oldest, module="sys", apple_silicon=False):
    """Return whether this Python runs, is neither too old nor too new, and has the module.

    It is run to find out, because pyenv's names on PATH may only print an error.
    """
    ask = f"import platform, sys, {module}; sys.exit(not {oldest} <= sys.version_info[:2] <= {NEWEST}"
    ask += " or platform.machine() != 'arm64')" if apple_silicon else ")"
    try:
        return subprocess.call([python, "-c", ask], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:  # built for another processor
        return False


def refuse(oldest, disguised):
    """Exit with the error that this machine has no Python that fits, and how to get one."""
    have = ".".join(map(str, sys.version_info[:3]))
    need = "Python {}.{} to {}.{}".format(*(oldest + NEWEST))
    cure = "brew install python@3.13   or: uv python install 3.13"
    if disguised:
        told = (
            f"this Python ({sys.executable}) is an Intel one under Rosetta, and no {need} for Apple Silicon was found"
        )
        cure = "/opt/homebrew/bin/brew install python@3.13   or: uv python install cpython-3.13-macos-aarch64"
        fail(told, f"{cure}   (is this terminal under Rosetta? first: arch -arm64 zsh), then {AGAIN}")
    if sys.platform != "darwin":
        cure = "install python3.12 with its venv module   or: uv python install 3.13"
    fail(f"{need} is needed; this is {have} ({sys.executable}), and no other was found", f"{cure}, then {AGAIN}")
