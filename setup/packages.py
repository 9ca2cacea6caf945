"""An environment and what pip puts into it. Old syntax, like env.py, which imports it."""

import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

from interpreter import fits, said
from shared import AGAIN, NETWORK, attempt, fail, give_up, run

HERE = os.path.dirname(os.path.abspath(__file__))
BUILT = ("llama_cpp_python", "gguf")  # from setup/llamacpp.py, not from a lock
CUDA = (13, 0)  # of the torch in cuda.txt
OLDEST_CARD = 75  # for which CUDA 13 compiles
MARK = "ferry-environment"  # in each environment that Ferry made or took over; it stays when the rest is removed
# What a new environment of venv, virtualenv or uv holds: nobody's work.
NEW = re.compile(
    r"pyvenv\.cfg|\.gitignore|\.lock|\.DS_Store|CACHEDIR\.TAG|lib64"
    r"|bin/(python[\d.]*t?|\U0001D70Bthon|pip[\d.]*|wheel[\d.]*|[Aa]ctivate[\w.]*|deactivate[\w.]*|pydoc\.bat)"
    r"|lib/(python|pypy)[\d.]+t?/site-packages/"
    r"((pip|setuptools|wheel|pkg_resources|_distutils_hack)(-[\w.]+\.dist-info)?/.*"
    r"|distutils-precedence\.pth|_virtualenv\.(py|pth)|__pycache__/_virtualenv\.[\w.-]+)"
)
# What of CUDA a llama.cpp for a GPU loads. torch brings it where there is a torch.
CUDA_RUNTIME = ("nvidia-cublas==", "nvidia-cuda-nvrtc==", "nvidia-cuda-runtime==")
# pip asks an extra index for every package, five times each if it is not reachable: this one is for torch alone.
TORCH_INDEX = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1"]


def device():
    """cuda where there is an NVIDIA card that torch can use, else cpu: which of the two locks. FERRY_DEVICE decides otherwise."""
    given = os.environ.get("FERRY_DEVICE")
    if given not in (None, "", "cpu", "cuda"):
        fail(f"FERRY_DEVICE={given}: neither cpu nor cuda", "unset FERRY_DEVICE, then " + AGAIN)
    suits = sys.platform == "linux" and platform.machine() == "x86_64"
    return given or ("cuda" if suits and shutil.which("nvidia-smi") and not unfit() else "cpu")


@functools.lru_cache(maxsize=None)  # noqa: UP033 - functools.cache is of Python 3.9
def nvidia_smi(*words):
    """What it says; asked once, for it may take a second."""
    return said(("nvidia-smi",) + words)


def capability():
    """The compute capabilities of this machine's NVIDIA cards as CMake wants them, such as 90 or 80;90."""
    lines = nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader").splitlines()
    found = {line.strip() for line in lines if re.match(r" *\d+\.\d+ *$", line)}
    return ";".join(sorted((each.replace(".", "") for each in found), key=int))


def unfit():
    """Why the NVIDIA card of this machine cannot be used; empty if it can."""
    found = re.search(r"CUDA.*Version: *(\d+)\.(\d+)", nvidia_smi())
    if not capability():
        return "nvidia-smi is here, and names no card"
    if int(capability().split(";")[0]) < OLDEST_CARD:
        return "a card of compute capability {}: CUDA {}.{} begins with 7.5 (T4)".format(capability(), *CUDA)
    if found and (int(found.group(1)), int(found.group(2))) < CUDA:
        told = "the NVIDIA driver here runs CUDA {}.{} at most; Ferry's torch needs {}.{} (driver 580)"
        return told.format(*found.groups() + CUDA)
    return ""


def check_card():
    """A card that cannot be used is no reason to train on the CPU without a word: torch would find it after the download."""
    if not os.environ.get("FERRY_DEVICE") and shutil.which("nvidia-smi") and unfit():
        fail(unfit(), "take another machine, or FERRY_DEVICE=cpu for the CPU")


def check_headers():
    """Triton compiles against them in the first training step, and fails in words of its own."""
    if device() == "cuda" and not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        told = "Python.h is missing: on a GPU, Triton compiles against it when the training starts"
        fail(told, "sudo apt-get install python{}.{}-dev, then {}".format(*sys.version_info[:2] + (AGAIN,)))


def read_lock(name):
    """The text of one lock."""
    with open(os.path.join(HERE, "locks", name + ".txt"), encoding="utf-8") as file:
        return file.read()


def split_locks(names):
    """(the lines of torch, all other pinned lines)"""
    lines = [line for name in names for line in read_lock(name).splitlines() if line and not line.startswith("#")]
    torch = [line for line in lines if line.startswith("torch==")]
    return torch, [line for line in lines if line not in torch]


def python_of(venv):
    """The environment's own Python."""
    return os.path.join(venv, "bin", "python")


def make_venv(venv, oldest, log):
    """The environment that is there if it can be built upon, else an empty one."""
    check_owner(venv)
    if not can_build_upon(venv, oldest):
        empty_venv(venv)
        create_venv(venv, log)
    write_mark(venv)


def check_owner(venv):
    """Return where Ferry may change what is in the folder; end with an error where it is the user's.

    One that an older Ferry made gets the mark now: its record is about to be removed.
    """
    if is_ours(venv):
        write_mark(venv)
    elif not is_new(venv):
        what = "an environment of yours, not made by Ferry" if is_venv(venv) else "there and is no virtual environment"
        fail(f"{venv} is {what}", f"move it away, or {elsewhere()}")


def is_ours(venv):
    """Did Ferry make it? The mark says so, or what a Ferry without marks left: record, pip's marker, its own link."""
    left = [os.path.join(venv, name) for name in (MARK, "ferry.json")] + [marker(venv)]
    link = os.path.join(venv, "bin", "ferry")
    return any(map(os.path.isfile, left)) or (os.path.islink(link) and os.readlink(link).endswith("/ferry"))


def is_new(venv):
    """Is nothing in it but what a new environment holds? A folder that is empty or not there is new too."""
    walked = ((folder, name) for folder, folders, files in os.walk(venv) for name in files + links(folder, folders))
    return all(NEW.fullmatch(os.path.relpath(os.path.join(*found), venv)) for found in walked)


def links(folder, names):
    """Those of the names that are symbolic links: os.walk takes one to a folder for a folder."""
    return [name for name in names if os.path.islink(os.path.join(folder, name))]


def is_venv(venv):
    """Is it a virtual environment, whoever made it?"""
    return os.path.exists(os.path.join(venv, "pyvenv.cfg"))


def write_mark(venv):
    """Say in the environment whose it is."""
    with open(os.path.join(venv, MARK), "w", encoding="utf-8") as file:
        file.write("Ferry made this environment: `make env` changes and removes what is in it.\n")


def can_build_upon(venv, oldest):
    """Is there a whole environment with a fitting Python that has pip?"""
    python = python_of(venv)
    whole = is_venv(venv) and not os.path.exists(marker(venv)) and os.path.exists(python)
    return whole and fits(python, oldest, "pip")


def empty_venv(venv):
    """Remove all but the mark: killed half way, the rest is still known as Ferry's. (`venv --clear` removes it too.)"""
    for name in os.listdir(venv):
        path = os.path.join(venv, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif name != MARK:
            os.remove(path)


def create_venv(venv, log):
    """A new environment in an empty folder."""
    hint = "sudo apt-get install python{}.{}-venv   (Debian, Ubuntu), then {}".format(*sys.version_info[:2], AGAIN)
    if not importlib.util.find_spec("venv") or not importlib.util.find_spec("ensurepip"):
        fail(f"this Python ({sys.executable}) has no venv module", hint)
    run([sys.executable, "-m", "venv", venv], log, f"no virtual environment could be made in {venv}", hint)


def elsewhere():
    """The same command with another folder for the environment."""
    return AGAIN + (" DEPLOY_VENV=" if "deploy" in AGAIN else " VENV=") + "/some/other/folder"


def marker(venv):
    """There while pip changes the environment. Found at the start, pip was killed half way: nothing in it can be trusted."""
    return os.path.join(venv, "pip-is-running")


def pip(venv, log, arguments):
    """Run the environment's pip: its exit code and last lines. Only a pip that was killed leaves the marker."""
    open(marker(venv), "w").close()
    command = [python_of(venv), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    done = attempt(command + arguments, log)
    os.remove(marker(venv))
    return done


def install(venv, log, name, arguments):
    """Without a look at dependencies: the locks are complete, and unsloth's own wishes cannot be met."""
    code, tail = pip(venv, log, ["install", "--no-deps"] + arguments)
    if code:
        give_up(f"{name} could not be installed (exit {code})", tail, log, NETWORK)


def install_lines(venv, log, lines):
    """Everything a lock names."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        install(venv, log, "the python packages", ["-r", file.name])
    remove_others(venv, log, lines)


def remove_others(venv, log, others):
    """What no lock names any more: some packages do harm by being there (torchvision, xformers)."""
    keep = {line.split("==")[0].replace("_", "-").lower() for line in others}
    keep |= {"torch", "pip", "setuptools", "wheel"} | {name.replace("_", "-") for name in BUILT}
    ask = [python_of(venv), "-m", "pip", "list", "--format=json"]
    listed = json.loads(subprocess.run(ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode())
    extra = sorted({package["name"].replace("_", "-").lower() for package in listed} - keep)
    if extra:
        print(f" not in the locks, removed: {', '.join(extra)} ...", end="", flush=True)
        code, tail = pip(venv, log, ["uninstall", "--yes"] + extra)
        if code:
            give_up(f"pip cannot uninstall {', '.join(extra)} (exit {code})", tail, log, elsewhere())
