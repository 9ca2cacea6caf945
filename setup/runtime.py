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
from interpreter import read_output
from packages import install_packages, run_pip, venv_python
from shared import SETUP_COMMAND, fail, select_failure_lines

WHEEL_INDEX_URL = "https://abetlen.github.io/llama-cpp-python/whl/"
# The CUDA versions that the project's README lists. Its wheels are py3-none and fit every Python.
WHEEL_CUDA_VERSIONS = (118, 121, 122, 123, 124, 125, 130, 132)
X86_FEATURES = {"avx2", "bmi2", "f16c", "fma"}  # its wheels for x86_64 use these instructions without a test
PROBE_CODE = "import llama_cpp; print(llama_cpp.__version__, llama_cpp.llama_supports_gpu_offload())"


def install_runtime(venv: str, log: str, say=print) -> str:
    """Install llama-cpp-python; return a description of where it came from."""
    if built := llamacpp.find_build():
        if not (reason := install_built_wheel(venv, log, built)):
            return "compiled on this machine before"
        say(f"      not the one compiled before: {reason}")
    index_url = wheel_index()
    reason = install_ready_wheel(venv, log, index_url) if index_url else explain_no_index()
    if not reason:
        return f"a ready wheel from {index_url}"
    say(f"      no ready wheel: {reason}; compiled instead, once for this machine")
    started = time.monotonic()
    if reason := install_built_wheel(venv, log, llamacpp.ensure_build(say, only_wheel=True)):
        fail(f"llama-cpp-python was compiled and does not work: {reason}", f"read {log}; then {SETUP_COMMAND}")
    return f"compiled here in {time.monotonic() - started:.0f} s"


def install_built_wheel(venv: str, log: str, build_folder: Path) -> str | None:
    """Install a wheel that was built on this machine; return what is wrong with it, or None."""
    (wheel,) = (build_folder / "wheels").glob("llama_cpp_python-*.whl")
    install_packages(venv, log, "llama-cpp-python", ["--force-reinstall", str(wheel)])
    return find_runtime_fault(venv, gpu=False)


def install_ready_wheel(venv: str, log: str, index_url: str) -> str | None:
    """Install the project's wheel, with short timeouts (20 s at most); return why that failed, or None."""
    requirement = [f"llama-cpp-python=={llamacpp.version()}", "--only-binary", ":all:", "--index-url", index_url]
    code, tail = run_pip(
        venv, log, ["install", "--no-deps", "--force-reinstall", "--timeout", "10", "--retries", "1", *requirement]
    )
    if code:
        return f"{index_url} {explain_pip_failure(tail)}"
    fault = find_runtime_fault(venv, gpu=llamacpp.IS_MAC or "/whl/cu" in index_url)
    return f"the one from {index_url} {fault}" if fault else None


def explain_pip_failure(tail: list[str]) -> str:
    """Return what pip's last lines mean, for messages."""
    if any("connection broken" in line for line in tail):
        return "does not answer"
    if any("No matching distribution" in line for line in tail):
        return f"has no llama-cpp-python {llamacpp.version()} for this machine"
    return "failed: " + select_failure_lines(tail)[-1]


def find_runtime_fault(venv: str, gpu: bool) -> str | None:
    """Return what is wrong with the llama-cpp-python in this environment, or None.

    It is tested in a process of its own, because a library may end it.
    """
    try:
        command = [venv_python(venv), "-I", "-c", PROBE_CODE]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    except subprocess.TimeoutExpired:
        return "does not finish loading"
    if result.returncode:
        return f"cannot be loaded ({(result.stderr.splitlines() or [f'exit {result.returncode}'])[-1]})"
    version, offload = result.stdout.split()[-2:]
    if version != llamacpp.version():
        return f"says that it is version {version}"
    return "computes on the CPU only" if gpu and offload != "True" else None


def wheel_index() -> str | None:
    """Return the URL of the index to ask, or None."""
    requested_url = os.environ.get("FERRY_LLAMA_INDEX")
    if requested_url is not None or os.environ.get("FERRY_LLAMA_FLAGS"):
        return requested_url or None
    flavour = wheel_flavour()
    return WHEEL_INDEX_URL + flavour if flavour else None


def explain_no_index() -> str:
    """Return why no index is asked."""
    for name in ("FERRY_LLAMA_INDEX", "FERRY_LLAMA_FLAGS"):
        if name in os.environ:
            return f"{name} is set to '{os.environ[name]}'"
    return f"its project makes none for {platform.system()} on this processor ({platform.machine()})"


def wheel_flavour() -> str | None:
    """Return which of the project's wheels runs well on this machine, or None.

    Its wheel for Linux on ARM is a slow, generic build.
    """
    if llamacpp.IS_MAC:
        return "metal" if platform.machine() == "arm64" else None
    if platform.machine() == "x86_64" and set(llamacpp.cpu_features().split()) >= X86_FEATURES:
        return newest_cuda_wheel() or "cpu"
    return None


def newest_cuda_wheel() -> str | None:
    """Return the newest CUDA of the project's wheels that the NVIDIA driver here can run, such as cu124, or None."""
    match = re.search(r"CUDA.*Version: *(\d+)\.(\d+)", read_output(["nvidia-smi"]))
    versions = [version for version in WHEEL_CUDA_VERSIONS if match and version <= int(match[1] + match[2])]
    return f"cu{versions[-1]}" if versions else None
