"""Install llama-cpp-python for the side that runs models, from the first of three sources that works.

1. a wheel that setup/llamacpp.py compiled on this machine before (`make env` leaves one too)
2. a ready wheel of exactly the pinned version, from the project's own index, because PyPI has none
3. a wheel that is compiled now, once

The index is on GitHub, gives no hashes and may lack a version, so nothing depends on it. Its wheel is installed and
then tested in a process of its own: whether it is the right version and, on a Mac, whether it computes on Metal.
FERRY_LLAMA_INDEX names another index, or none when it is empty. FERRY_LLAMA_FLAGS asks for a build with those flags;
then no index is asked, unless FERRY_LLAMA_INDEX names one.
"""

import os
import platform
import re
import subprocess
import time
from pathlib import Path

import llamacpp
from interpreter import said
from packages import install, pip, python_of
from shared import AGAIN, fail, telling

PROJECT = "https://abetlen.github.io/llama-cpp-python/whl/"
# The CUDA versions that the project's README lists. Its wheels are py3-none and fit every Python.
CUDA = (118, 121, 122, 123, 124, 125, 130, 132)
X86 = {"avx2", "bmi2", "f16c", "fma"}  # its wheels for x86_64 use these instructions without a test
PROOF = "import llama_cpp; print(llama_cpp.__version__, llama_cpp.llama_supports_gpu_offload())"


def set_up(venv: str, log: str, say=print) -> str:
    """Install llama-cpp-python; return a description of where it came from."""
    if built := llamacpp.cached():
        if not (why := put(venv, log, built)):
            return "compiled on this machine before"
        say(f"      not the one compiled before: {why}")
    address = index()
    why = ready_wheel(venv, log, address) if address else no_index()
    if not why:
        return f"a ready wheel from {address}"
    say(f"      no ready wheel: {why}; compiled instead, once for this machine")
    started = time.monotonic()
    if why := put(venv, log, llamacpp.ensure(say, only_wheel=True)):
        fail(f"llama-cpp-python was compiled and does not work: {why}", f"read {log}; then {AGAIN}")
    return f"compiled here in {time.monotonic() - started:.0f} s"


def put(venv: str, log: str, built: Path) -> str | None:
    """Install a wheel that was built on this machine; return what is wrong with it, or None."""
    (wheel,) = (built / "wheels").glob("llama_cpp_python-*.whl")
    install(venv, log, "llama-cpp-python", ["--force-reinstall", str(wheel)])
    return fault(venv, gpu=False)


def ready_wheel(venv: str, log: str, address: str) -> str | None:
    """Install the project's wheel, with short timeouts (20 s at most); return why that failed, or None."""
    wish = [f"llama-cpp-python=={llamacpp.version()}", "--only-binary", ":all:", "--index-url", address]
    code, tail = pip(
        venv, log, ["install", "--no-deps", "--force-reinstall", "--timeout", "10", "--retries", "1", *wish]
    )
    if code:
        return f"{address} {reason(tail)}"
    wrong = fault(venv, gpu=llamacpp.MAC or "/whl/cu" in address)
    return f"the one from {address} {wrong}" if wrong else None


def reason(tail: list[str]) -> str:
    """Return what pip's last lines mean, for messages."""
    if any("connection broken" in line for line in tail):
        return "does not answer"
    if any("No matching distribution" in line for line in tail):
        return f"has no llama-cpp-python {llamacpp.version()} for this machine"
    return "failed: " + telling(tail)[-1]


def fault(venv: str, gpu: bool) -> str | None:
    """Return what is wrong with the llama-cpp-python in this environment, or None.

    It is tested in a process of its own, because a library may end it.
    """
    try:
        ask = [python_of(venv), "-I", "-c", PROOF]
        done = subprocess.run(ask, capture_output=True, text=True, errors="replace", timeout=120)
    except subprocess.TimeoutExpired:
        return "does not finish loading"
    if done.returncode:
        return f"cannot be loaded ({(done.stderr.splitlines() or [f'exit {done.returncode}'])[-1]})"
    version, offload = done.stdout.split()[-2:]
    if version != llamacpp.version():
        return f"says that it is version {version}"
    return "computes on the CPU only" if gpu and offload != "True" else None


def index() -> str | None:
    """Return the URL of the index to ask, or None."""
    given = os.environ.get("FERRY_LLAMA_INDEX")
    if given is not None or os.environ.get("FERRY_LLAMA_FLAGS"):
        return given or None
    kind = flavour()
    return PROJECT + kind if kind else None


def no_index() -> str:
    """Return why no index is asked."""
    for name in ("FERRY_LLAMA_INDEX", "FERRY_LLAMA_FLAGS"):
        if name in os.environ:
            return f"{name} is set to '{os.environ[name]}'"
    return f"its project makes none for {platform.system()} on this processor ({platform.machine()})"


def flavour() -> str | None:
    """Return which of the project's wheels runs well on this machine, or None.

    Its wheel for Linux on ARM is a slow, generic build.
    """
    if llamacpp.MAC:
        return "metal" if platform.machine() == "arm64" else None
    if platform.machine() == "x86_64" and set(llamacpp.cpu().split()) >= X86:
        return cuda() or "cpu"
    return None


def cuda() -> str | None:
    """Return the newest CUDA of the project's wheels that the NVIDIA driver here can run, such as cu124, or None."""
    found = re.search(r"CUDA.*Version: *(\d+)\.(\d+)", said(["nvidia-smi"]))
    fitting = [version for version in CUDA if found and version <= int(found[1] + found[2])]
    return f"cu{fitting[-1]}" if fitting else None
