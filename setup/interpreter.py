"""Which Python the set-up goes on with. Python 3.6's syntax: a Mac's own is 3.9, and this must be able to say so."""

import os
import platform
import subprocess
import sys

from shared import AGAIN, fail

NEWEST = (3, 14)
NAMES = ("python3.13", "python3.12", "python3.11", "python3.14", "python3.10")  # the best tried ones first
PLACES = ("/opt/homebrew/bin", "/usr/local/bin", "~/.local/bin")  # Homebrew, python.org and uv; not always on PATH


def hand_over(oldest):
    """Return if this Python fits, else start again with one that does, else say how to get one."""
    disguised = intel_on_apple_silicon()
    if oldest <= sys.version_info[:2] <= NEWEST and not disguised:
        return
    for path in candidates(oldest):
        if fits(path, oldest, apple_silicon=disguised):
            os.execv(path, [path] + sys.argv)
    refuse(oldest, disguised)


def intel_on_apple_silicon():
    """Is this an x86_64 Python under Rosetta? llama.cpp would be built for Intel: no Metal, a tenth of the speed."""
    if sys.platform != "darwin" or platform.machine() != "x86_64":
        return False
    return "1" in (sysctl("sysctl.proc_translated"), sysctl("hw.optional.arm64"))


def sysctl(name):
    """One fact of macOS; empty where it does not know the name."""
    return said(["sysctl", "-n", name])


def said(command):
    """What a command prints; nothing if it fails."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL).decode(errors="replace").strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def candidates(oldest):
    """Pythons of this machine: by name on PATH and where they usually are, then the one uv knows of."""
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
    """Is this a Python that can be used, and has it this module? (Run it: pyenv's names on PATH may only print an error.)"""
    ask = f"import platform, sys, {module}; sys.exit(not {oldest} <= sys.version_info[:2] <= {NEWEST}"
    ask += " or platform.machine() != 'arm64')" if apple_silicon else ")"
    try:
        return subprocess.call([python, "-c", ask], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:  # made for another kind of processor
        return False


def refuse(oldest, disguised):
    """No Python of this machine will do."""
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
