"""Start the `ferry` command with a Python that has click, pydantic and PyYAML.

An environment of the checkout is used when there is one. Otherwise these few packages, 4 MB, are installed once into a
folder of the cache, so that config, doctor and help answer in seconds on a bare checkout.

This file keeps to the syntax of Python 3.6, so that any Python starts it.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time

import packages
from interpreter import hand_over
from shared import cache_folder, fail, writable_folder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 10)
NEEDED = (
    "annotated-types",
    "click",
    "colorama",
    "pydantic",
    "pydantic-core",
    "pyyaml",
    "typing-extensions",
    "typing-inspection",
)


def main():
    """Replace this process by `python -m cli` with the same arguments."""
    python = find_python()
    path = [ROOT, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ["FERRY_MAY_SWITCH"] = "1"
    os.execv(python, [python, "-m", "cli"] + sys.argv[1:])


def find_python():
    """Return the Python of an environment that is set up; else install one for the command line alone."""
    given = [os.environ.get("FERRY_VENV"), os.environ.get("FERRY_DEPLOY_VENV")]
    for folder in given + [".venv", ".venv-deploy", ".venv-light"]:
        if folder and os.path.isfile(os.path.join(ROOT, folder, "ferry.json")):
            return packages.python_of(os.path.join(ROOT, folder))
    if os.environ.get("FERRY_IMAGE"):
        return sys.executable
    hand_over(OLDEST)
    return make_python()


def make_python():
    """Return the Python of the cached environment for the command line; install it when it is missing."""
    lines = [line for line in packages.read_lock("deploy").splitlines() if re.split("[=;]", line)[0].strip() in NEEDED]
    version = "{}.{}".format(*sys.version_info)
    key = hashlib.sha256(json.dumps([lines, sys.executable]).encode()).hexdigest()[:12]
    venv = os.path.join(cache_folder(), "command-line", version + "-" + key)
    if not os.path.isfile(os.path.join(venv, "complete")):
        writable_folder(os.path.dirname(venv), "FERRY_CACHE=/some/other/folder, then the same command again")
        install(venv, lines)
    return packages.python_of(venv)


def install(venv, lines):
    """Create the environment and install the packages. The file `complete` is written last. Exit when it fails."""
    started = time.time()
    sys.stderr.write("ferry: setting up the command line, once for this machine (8 packages, 4 MB) ...")
    sys.stderr.flush()
    can_pip = (
        subprocess.call(
            [sys.executable, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        == 0
    )
    made = run([sys.executable, "-m", "venv", "--clear", venv] + (["--without-pip"] if can_pip else []))
    target = os.path.join(venv, "lib", "python{}.{}".format(*sys.version_info), "site-packages")
    pip = [sys.executable if can_pip else packages.python_of(venv), "-m", "pip", "install", "--no-deps", "--no-compile"]
    pip += ["--quiet", "--disable-pip-version-check", "--no-input", "--target", target] + [
        line.split(" ;")[0] for line in fitting(lines)
    ]
    done = made if made.returncode else run(pip)
    if done.returncode:
        sys.stderr.write("\n")
        last = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
        venv_hint = "sudo apt-get install python3-venv   (Debian, Ubuntu); "
        fail(
            "the command line could not be set up: {}".format("".join(last)),
            venv_hint + "check the network, then the same command again",
        )
    open(os.path.join(venv, "complete"), "w").close()
    sys.stderr.write(f" {time.time() - started:.0f} s\n")


def fitting(lines):
    """Return the lock lines whose marker fits this machine. Only colorama's, which is for Windows, does not."""
    return [line for line in lines if "win32" not in line]


def run(command):
    """Run a command and capture what it prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
