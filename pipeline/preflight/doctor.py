"""doctor: report what the training machine has and lacks, with the command that cures each lack."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from common import files
from common.checks import Check
from common.errors import printable_line
from pipeline.preflight import gpu_checks, library_checks
from pipeline.toolchain import llama_tools, machine
from pipeline.toolchain.machine import CommandRunner, NvidiaStatus, TrainLocation, format_gb

# Bytes of Llama 3.1 8B, the largest base model in configs/: in 16 bit, and as q4_k_m. The base model lies in the Hub's
# cache. The merged model, the 16-bit GGUF, and q4_k_m with and without an importance matrix lie in the run's folder.
# `make preflight` computes the need of each config.
WEIGHTS_8B_BYTES, Q4_8B_BYTES = 16.1e9, 4.9e9
# Bytes of memory for an 8B model. The inputs of all layers take 2 bytes * 4096 * 32 a token of a micro-batch, which is
# 4.3 GB at 16,384 tokens. The rest is for reading the 16-bit weights while they are merged and converted.
MEMORY_8B_BYTES = 16e9
DEMO_BYTES = 3e9  # bytes of disk (without the environment) and of memory that the demo needs


def run_doctor(runs: Path, ask: CommandRunner = machine.run_command) -> list[Check]:
    """Return all checks of this machine. Nothing is changed.

    Args:
        runs: The folder that holds the runs.
        ask: Runs a command and returns its output; tests replace it.
    """
    nvidia, run_location = machine.query_nvidia(ask), machine.find_train_location(ask)
    tools = [check_compiler(nvidia, ask), check_python_headers(nvidia)]
    return [
        *gpu_checks.check_gpus(nvidia, run_location),
        *check_environment(),
        *library_checks.check_libraries(nvidia, tools, ask),
        *tools,
        *llama_cpp_checks(nvidia),
        *check_disks(runs, nvidia),
        check_memory(nvidia),
        check_container(run_location, ask),
    ]


def check_environment() -> list[Check]:
    """Return a lack when the training environment is not set up yet, with what the set-up takes."""
    if machine.has_torch():
        return []
    text = (
        "the Python environment that trains is not set up yet: torch, Unsloth and llama.cpp, about 2 GB "
        "(8 GB for a GPU)"
    )
    return [
        Check(
            "packages", "lack", text, "make env (about 6 minutes on 2 cores), or any target that trains, which does it"
        )
    ]


# What Triton compiles with during the training, and llama.cpp


def check_compiler(nvidia: NvidiaStatus, ask: CommandRunner) -> Check:
    """Check for a C compiler, in the order in which Triton looks for one: CC, gcc, clang."""
    for name in filter(None, (os.environ.get("CC"), "gcc", "clang")):
        answer = ask([name, "--version"])
        if answer.state == "ok" and answer.stdout.strip():
            return Check("compiler", "ok", printable_line(answer.stdout.splitlines()[0], 80))
    text = "no C compiler: Triton compiles with one during training"
    return Check("compiler", gpu_lack_state(nvidia), text, "sudo apt-get install gcc")


def check_python_headers(nvidia: NvidiaStatus) -> Check:
    """Check for Python.h, which Triton compiles against."""
    header_path = Path(sysconfig.get_path("include")) / "Python.h"
    if header_path.is_file():
        return Check("Python.h", "ok", str(header_path))
    text = f"{header_path} is missing: Triton compiles against it during training"
    return Check(
        "Python.h", gpu_lack_state(nvidia), text, "sudo apt-get install python{}.{}-dev".format(*sys.version_info)
    )


def gpu_lack_state(nvidia: NvidiaStatus) -> str:
    """Return the state of a check whose lack makes GPUs unusable: `fault` when there is a GPU, else `lack`."""
    return "fault" if nvidia.gpus else "lack"


def llama_cpp_checks(nvidia: NvidiaStatus) -> list[Check]:
    """Return the check of llama.cpp, or nothing before the environment is set up."""
    return [check_llama_cpp(nvidia)] if machine.has_torch() else []


def check_llama_cpp(nvidia: NvidiaStatus) -> Check:
    """Check that llama.cpp is built, and built for CUDA when there is a GPU."""
    if not llama_tools.is_set_up():
        return Check(
            "llama.cpp", "fault", f"not set up ({llama_tools.tools_folder()}); export and verify need it", "make env"
        )
    flags = files.read_json(llama_tools.tools_folder() / "build.json").get("flags", [])
    if nvidia.gpus and "-DGGML_CUDA=ON" not in flags:
        return Check(
            "llama.cpp",
            "lack",
            f"{llama_tools.describe_version()} runs on the CPU, the GPU is not used",
            "make env",
        )
    return Check("llama.cpp", "ok", llama_tools.describe_version())


# Disk, memory, container


def check_disks(runs: Path, nvidia: NvidiaStatus) -> list[Check]:
    """Check the free space of each disk: for an 8B model when there is a GPU, else for the demo."""
    run_bytes, cache_bytes = (
        (2 * WEIGHTS_8B_BYTES + 2 * Q4_8B_BYTES, WEIGHTS_8B_BYTES) if nvidia.gpus else (DEMO_BYTES, 0)
    )
    needs = (
        ("runs", runs, run_bytes),
        ("the Hub's cache", hub_cache_dir(), cache_bytes),
        ("Ferry's cache", files.cache_dir(), 0),
    )
    folders_by_device: dict[int, list[tuple[str, Path, float]]] = {}
    for name, folder, need in needs:
        existing_folder = files.nearest_existing_path(folder)
        folders_by_device.setdefault(os.stat(existing_folder).st_dev, []).append((name, existing_folder, need))
    return [check_disk(folders, describe_workload(nvidia)) for folders in folders_by_device.values()]


def hub_cache_dir() -> Path:
    """Return the folder where huggingface_hub stores its downloads.

    It follows the library's constants.py, because the library may not be installed yet.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def check_disk(folders: list[tuple[str, Path, float]], workload: str) -> Check:
    """Check one disk.

    Args:
        folders: (label, folder, needed bytes) of each folder on this disk.
        workload: What needs the space, for the message.
    """
    free, need = shutil.disk_usage(folders[0][1]).free, sum(need for _, _, need in folders)
    text = f"{format_gb(free)} free for {', '.join(name for name, _, _ in folders)}"
    text += f"; {workload} needs {format_gb(need)}" if need else ""
    if free >= need:
        return Check("disk", "ok", text)
    cure = (
        f"free {format_gb(need - free)}, or use a different disk: RUNS=, HF_HOME= "
        "(`make preflight CONFIG=...` computes your model's need)"
    )
    return Check("disk", "lack", text, cure)


def check_memory(nvidia: NvidiaStatus) -> Check:
    """Check the memory of the machine or its container."""
    available, need = machine.total_memory(), MEMORY_8B_BYTES if nvidia.gpus else DEMO_BYTES
    text = f'{format_gb(available)} in this machine, where "unsloth" checkpointing keeps activations; '
    text += f"{describe_workload(nvidia)} needs {format_gb(need)}"
    if available >= need:
        return Check("memory", "ok", text)
    return Check("memory", "lack", text, "use a machine (or a container) with more memory, or a smaller base.model")


def describe_workload(nvidia: NvidiaStatus) -> str:
    """Return what the machine is measured against, for messages."""
    return "an 8B model" if nvidia.gpus else "the demo"


def check_container(run_location: TrainLocation, ask: CommandRunner) -> Check:
    """Report whether `make train` runs in Ferry's image or natively. Both have the same locks and the same code."""
    if "FERRY_IMAGE" in os.environ:
        return Check("container", "ok", "this is Ferry's image")
    if not run_location.place:
        return Check(
            "container",
            "lack",
            f"setup/container.py does not answer: {run_location.reason}",
            "set DOCKER=1 or DOCKER=0",
        )
    text = f"`make train` runs {'in the image' if run_location.place == 'image' else 'natively'}: {run_location.reason}"
    # Without "docker" in the reason, no part of a container engine is missing.
    if run_location.place == "image" or "docker" not in run_location.reason:
        return Check("container", "ok", text)
    has_podman = machine.find_train_location(ask, "podman").place == "image"
    cure = (
        "ENGINE=podman"
        if has_podman
        else "install docker.io and nvidia-container-toolkit; or do nothing: both ways give the same model"
    )
    return Check("container", "lack", text, cure)
