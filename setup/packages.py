"""Create a virtual environment and install packages into it.

This file keeps to the syntax of Python 3.6, like env.py, which imports it.
"""

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

from interpreter import is_usable_python, read_output
from shared import NETWORK_HINT, SETUP_COMMAND, fail, fail_with_log, run_logged, run_or_fail

HERE = os.path.dirname(os.path.abspath(__file__))
BUILT_PACKAGES = ("llama_cpp_python", "gguf")  # built by setup/llamacpp.py, not named in a lock
REQUIRED_CUDA = (13, 0)  # the version of the torch in cuda.txt
OLDEST_CAPABILITY = 75  # the lowest compute capability (7.5) that CUDA 13 compiles for
# A file in each environment that Ferry made or took over. It stays when the rest is removed.
OWNER_MARK = "ferry-environment"
# The files in a new environment of venv, virtualenv or uv, which are nobody's work.
NEW_VENV_FILES = re.compile(
    r"pyvenv\.cfg|\.gitignore|\.lock|\.DS_Store|CACHEDIR\.TAG|lib64"
    r"|bin/(python[\d.]*t?|\U0001D70Bthon|pip[\d.]*|wheel[\d.]*|[Aa]ctivate[\w.]*|deactivate[\w.]*|pydoc\.bat)"
    r"|lib/(python|pypy)[\d.]+t?/site-packages/"
    r"((pip|setuptools|wheel|pkg_resources|_distutils_hack)(-[\w.]+\.dist-info)?/.*"
    r"|distutils-precedence\.pth|_virtualenv\.(py|pth)|__pycache__/_virtualenv\.[\w.-]+)"
)
# The CUDA libraries that llama.cpp loads on a GPU. An environment with torch has them already.
CUDA_RUNTIME_PINS = ("nvidia-cublas==", "nvidia-cuda-nvrtc==", "nvidia-cuda-runtime==")
# Only for torch, because pip asks an extra index for every package, and five times each when it is not reachable.
TORCH_INDEX_ARGUMENTS = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1"]


def detect_device():
    """Return `cuda` when this machine has an NVIDIA GPU that torch can use, else `cpu`.

    FERRY_DEVICE overrides it. The result chooses the lock: cuda.txt or cpu.txt.
    """
    requested = os.environ.get("FERRY_DEVICE")
    if requested not in (None, "", "cpu", "cuda"):
        fail(f"FERRY_DEVICE={requested}: neither cpu nor cuda", "unset FERRY_DEVICE, then " + SETUP_COMMAND)
    is_supported = sys.platform == "linux" and platform.machine() == "x86_64"
    return requested or ("cuda" if is_supported and shutil.which("nvidia-smi") and not find_gpu_fault() else "cpu")


@functools.lru_cache(maxsize=None)  # noqa: UP033 - functools.cache is of Python 3.9
def run_nvidia_smi(*words):
    """Return what nvidia-smi prints. The result is cached, because a call may take a second."""
    return read_output(("nvidia-smi",) + words)


def gpu_capabilities():
    """Return the compute capabilities of this machine's NVIDIA GPUs in the form of CMake, such as 90 or 80;90."""
    lines = run_nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader").splitlines()
    capabilities = {line.strip() for line in lines if re.match(r" *\d+\.\d+ *$", line)}
    return ";".join(sorted((capability.replace(".", "") for capability in capabilities), key=int))


def find_gpu_fault():
    """Return why torch cannot use the NVIDIA GPU of this machine; empty when it can."""
    cuda_match = re.search(r"CUDA.*Version: *(\d+)\.(\d+)", run_nvidia_smi())
    if not gpu_capabilities():
        return "nvidia-smi is here, and names no card"
    if int(gpu_capabilities().split(";")[0]) < OLDEST_CAPABILITY:
        return "a card of compute capability {}: CUDA {}.{} begins with 7.5 (T4)".format(
            gpu_capabilities(), *REQUIRED_CUDA
        )
    if cuda_match and (int(cuda_match.group(1)), int(cuda_match.group(2))) < REQUIRED_CUDA:
        message = "the NVIDIA driver here runs CUDA {}.{} at most; Ferry's torch needs {}.{} (driver 580)"
        return message.format(*cuda_match.groups() + REQUIRED_CUDA)
    return ""


def refuse_unusable_gpu():
    """Exit when this machine has an NVIDIA GPU that torch cannot use, unless FERRY_DEVICE is set.

    Otherwise the training would silently run on the CPU.
    """
    if not os.environ.get("FERRY_DEVICE") and shutil.which("nvidia-smi") and find_gpu_fault():
        fail(find_gpu_fault(), "take another machine, or FERRY_DEVICE=cpu for the CPU")


def refuse_missing_headers():
    """Exit when Python.h is missing on a GPU machine.

    Triton needs it in the first training step, and its own error is unclear.
    """
    if detect_device() == "cuda" and not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        message = "Python.h is missing: on a GPU, Triton compiles against it when the training starts"
        fail(message, "sudo apt-get install python{}.{}-dev, then {}".format(*sys.version_info[:2] + (SETUP_COMMAND,)))


def read_lock(name):
    """Return the text of one lock."""
    with open(os.path.join(HERE, "locks", name + ".txt"), encoding="utf-8") as file:
        return file.read()


def split_locks(names):
    """Return (the lines of torch, all other pinned lines)."""
    lines = [line for name in names for line in read_lock(name).splitlines() if line and not line.startswith("#")]
    torch = [line for line in lines if line.startswith("torch==")]
    return torch, [line for line in lines if line not in torch]


def venv_python(venv):
    """Return the path of an environment's Python."""
    return os.path.join(venv, "bin", "python")


def make_venv(venv, oldest, log):
    """Keep an environment that can be reused, else empty the folder and create a new one. Write the mark of Ferry."""
    claim_venv(venv)
    if not can_reuse_venv(venv, oldest):
        empty_venv(venv)
        create_venv(venv, log)
    write_owner_mark(venv)


def claim_venv(venv):
    """Exit when the folder is the user's. Mark one that Ferry made.

    An environment of an older Ferry has no mark yet. It gets one now, because its record is about to be removed.
    """
    if is_ferry_venv(venv):
        write_owner_mark(venv)
    elif not is_new_venv(venv):
        description = (
            "an environment of yours, not made by Ferry" if is_venv(venv) else "there and is no virtual environment"
        )
        fail(f"{venv} is {description}", f"move it away, or {other_folder_hint()}")


def is_ferry_venv(venv):
    """Return whether Ferry made the environment: it has a mark, or an older Ferry's record, marker of pip or link."""
    proofs = [os.path.join(venv, name) for name in (OWNER_MARK, "ferry.json")] + [pip_marker_path(venv)]
    ferry_link = os.path.join(venv, "bin", "ferry")
    is_own_link = os.path.islink(ferry_link) and os.readlink(ferry_link).endswith("/ferry")
    return is_own_link or any(map(os.path.isfile, proofs))


def is_new_venv(venv):
    """Return whether the folder is missing, empty or a new environment, so that it holds nothing of the user."""
    entries = (
        (folder, name) for folder, folders, files in os.walk(venv) for name in files + list_links(folder, folders)
    )
    return all(NEW_VENV_FILES.fullmatch(os.path.relpath(os.path.join(*entry), venv)) for entry in entries)


def list_links(folder, names):
    """Return the names that are symbolic links. os.walk lists a link to a folder as a folder."""
    return [name for name in names if os.path.islink(os.path.join(folder, name))]


def is_venv(venv):
    """Return whether the folder is a virtual environment, whoever made it."""
    return os.path.exists(os.path.join(venv, "pyvenv.cfg"))


def write_owner_mark(venv):
    """Write the file that marks an environment as Ferry's."""
    with open(os.path.join(venv, OWNER_MARK), "w", encoding="utf-8") as file:
        file.write("Ferry made this environment: `make env` changes and removes what is in it.\n")


def can_reuse_venv(venv, oldest):
    """Return whether the environment is complete and its Python fits and has pip."""
    python = venv_python(venv)
    is_complete = is_venv(venv) and not os.path.exists(pip_marker_path(venv)) and os.path.exists(python)
    return is_complete and is_usable_python(python, oldest, "pip")


def empty_venv(venv):
    """Remove all but the mark, so that the rest is still known as Ferry's when this is killed half-way.

    `venv --clear` would remove the mark too.
    """
    for name in os.listdir(venv):
        path = os.path.join(venv, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif name != OWNER_MARK:
            os.remove(path)


def create_venv(venv, log):
    """Create a new environment in an empty folder. Exit when that fails."""
    hint = "sudo apt-get install python{}.{}-venv   (Debian, Ubuntu), then {}".format(
        *sys.version_info[:2], SETUP_COMMAND
    )
    if not importlib.util.find_spec("venv") or not importlib.util.find_spec("ensurepip"):
        fail(f"this Python ({sys.executable}) has no venv module", hint)
    run_or_fail([sys.executable, "-m", "venv", venv], log, f"no virtual environment could be made in {venv}", hint)


def other_folder_hint():
    """Return the same command with another folder for the environment, for error messages."""
    return SETUP_COMMAND + (" DEPLOY_VENV=" if "deploy" in SETUP_COMMAND else " VENV=") + "/some/other/folder"


def pip_marker_path(venv):
    """Return the path of a file that exists while pip changes the environment.

    When it exists at the start, pip was killed half-way, and the environment cannot be trusted.
    """
    return os.path.join(venv, "pip-is-running")


def run_pip(venv, log, arguments):
    """Run the environment's pip; return its exit code and last lines. Only a pip that was killed leaves the marker."""
    open(pip_marker_path(venv), "w").close()
    command = [venv_python(venv), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    result = run_logged(command + arguments, log)
    os.remove(pip_marker_path(venv))
    return result


def install_packages(venv, log, name, arguments):
    """Install packages without their dependencies. Exit when pip fails.

    The locks are complete, and unsloth's own requirements cannot be met.
    """
    code, tail = run_pip(venv, log, ["install", "--no-deps"] + arguments)
    if code:
        fail_with_log(f"{name} could not be installed (exit {code})", tail, log, NETWORK_HINT)


def install_lock_lines(venv, log, lines):
    """Install the pinned lines of a lock, and remove the packages that it does not name."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        install_packages(venv, log, "the python packages", ["-r", file.name])
    remove_unlisted_packages(venv, log, lines)


def remove_unlisted_packages(venv, log, lock_lines):
    """Remove the packages that no lock names: some of them (torchvision, xformers) break other packages."""
    keep = {line.split("==")[0].replace("_", "-").lower() for line in lock_lines}
    keep |= {"torch", "pip", "setuptools", "wheel"} | {name.replace("_", "-") for name in BUILT_PACKAGES}
    list_command = [venv_python(venv), "-m", "pip", "list", "--format=json"]
    installed = json.loads(
        subprocess.run(list_command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()
    )
    unlisted_names = sorted({package["name"].replace("_", "-").lower() for package in installed} - keep)
    if unlisted_names:
        print(f" not in the locks, removed: {', '.join(unlisted_names)} ...", end="", flush=True)
        code, tail = run_pip(venv, log, ["uninstall", "--yes"] + unlisted_names)
        if code:
            fail_with_log(
                f"pip cannot uninstall {', '.join(unlisted_names)} (exit {code})", tail, log, other_folder_hint()
            )
