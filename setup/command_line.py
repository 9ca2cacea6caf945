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
from interpreter import OLDEST_PYTHON, switch_to_usable_python
from shared import cache_folder, ensure_writable_folder, fail

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEEDED_PACKAGES = (
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
    python = ensure_python()
    path = [ROOT, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ["FERRY_MAY_SWITCH"] = "1"
    os.execv(python, [python, "-m", "cli"] + sys.argv[1:])


def ensure_python():
    """Return the Python of an environment that is set up; else install one for the command line alone."""
    folders = [os.environ.get("FERRY_VENV"), os.environ.get("FERRY_DEPLOY_VENV")]
    for folder in folders + [".venv", ".venv-deploy", ".venv-light"]:
        if folder and os.path.isfile(os.path.join(ROOT, folder, "ferry.json")):
            return packages.venv_python(os.path.join(ROOT, folder))
    if os.environ.get("FERRY_IMAGE"):
        return sys.executable
    switch_to_usable_python(OLDEST_PYTHON["command line"])
    return ensure_command_line_python()


def ensure_command_line_python():
    """Return the Python of the cached environment for the command line; install it when it is missing."""
    lock_lines = [
        line
        for line in packages.read_lock("deploy").splitlines()
        if re.split("[=;]", line)[0].strip() in NEEDED_PACKAGES
    ]
    version = "{}.{}".format(*sys.version_info)
    key = hashlib.sha256(json.dumps([lock_lines, sys.executable]).encode()).hexdigest()[:12]
    venv = os.path.join(cache_folder(), "command-line", version + "-" + key)
    if not os.path.isfile(os.path.join(venv, "complete")):
        ensure_writable_folder(os.path.dirname(venv), "FERRY_CACHE=/some/other/folder, then the same command again")
        install_packages(venv, lock_lines)
    return packages.venv_python(venv)


def install_packages(venv, lines):
    """Create the environment and install the packages. The file `complete` is written last. Exit when it fails."""
    started = time.time()
    sys.stderr.write("ferry: setting up the command line, once for this machine (8 packages, 4 MB) ...")
    sys.stderr.flush()
    has_pip = (
        subprocess.call(
            [sys.executable, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        == 0
    )
    venv_result = run_command([sys.executable, "-m", "venv", "--clear", venv] + (["--without-pip"] if has_pip else []))
    site_packages = os.path.join(venv, "lib", "python{}.{}".format(*sys.version_info), "site-packages")
    pip = [
        sys.executable if has_pip else packages.venv_python(venv),
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-compile",
    ]
    pip += ["--quiet", "--disable-pip-version-check", "--no-input", "--target", site_packages] + [
        line.split(" ;")[0] for line in select_lock_lines(lines)
    ]
    pip_result = venv_result if venv_result.returncode else run_command(pip)
    if pip_result.returncode:
        sys.stderr.write("\n")
        last_line = pip_result.stdout.decode(errors="replace").strip().splitlines()[-1:]
        venv_hint = "sudo apt-get install python3-venv   (Debian, Ubuntu); "
        fail(
            "the command line could not be set up: {}".format("".join(last_line)),
            venv_hint + "check the network, then the same command again",
        )
    open(os.path.join(venv, "complete"), "w").close()
    sys.stderr.write(f" {time.time() - started:.0f} s\n")


def select_lock_lines(lines):
    """Return the lock lines whose marker fits this machine. Only colorama's, which is for Windows, does not."""
    return [line for line in lines if "win32" not in line]


def run_command(command):
    """Run a command and capture what it prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
