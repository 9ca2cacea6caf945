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
FolderNeed = tuple[str, Path, float]  # (label, folder, needed bytes)
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
    parts = "torch, Unsloth and llama.cpp, about 2 GB (8 GB for a GPU)"
    text = f"the Python environment that trains is not set up yet: {parts}"
    cure = "make env (about 6 minutes on 2 cores), or any target that trains, which does it"
    return [Check("packages", "lack", text, cure)]


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
    cure = "sudo apt-get install python{}.{}-dev".format(*sys.version_info)
    return Check("Python.h", gpu_lack_state(nvidia), text, cure)


def gpu_lack_state(nvidia: NvidiaStatus) -> str:
    """Return the state of a check whose lack makes GPUs unusable: `fault` when there is a GPU, else `lack`."""
    return "fault" if nvidia.gpus else "lack"


def llama_cpp_checks(nvidia: NvidiaStatus) -> list[Check]:
    """Return the check of llama.cpp, or nothing before the environment is set up."""
    return [check_llama_cpp(nvidia)] if machine.has_torch() else []


def check_llama_cpp(nvidia: NvidiaStatus) -> Check:
    """Check that llama.cpp is built, and built for CUDA when there is a GPU."""
    folder = llama_tools.tools_folder()
    if not llama_tools.is_set_up():
        return Check("llama.cpp", "fault", f"not set up ({folder}); export and verify need it", "make env")
    version, flags = llama_tools.describe_version(), files.read_json(folder / "build.json").get("flags", [])
    if nvidia.gpus and "-DGGML_CUDA=ON" not in flags:
        return Check("llama.cpp", "lack", f"{version} runs on the CPU, the GPU is not used", "make env")
    return Check("llama.cpp", "ok", version)


# Disk, memory, container


def check_disks(runs: Path, nvidia: NvidiaStatus) -> list[Check]:
    """Check the free space of each disk: for an 8B model when there is a GPU, else for the demo."""
    folders_by_device: dict[int, list[FolderNeed]] = {}
    for name, folder, need in list_disk_needs(runs, nvidia):
        existing_folder = files.nearest_existing_path(folder)
        folders_by_device.setdefault(os.stat(existing_folder).st_dev, []).append((name, existing_folder, need))
    return [check_disk(folders, reference_model_text(nvidia)) for folders in folders_by_device.values()]


def list_disk_needs(runs: Path, nvidia: NvidiaStatus) -> list[FolderNeed]:
    """Return what each folder needs that a training fills."""
    run_bytes, cache_bytes = DEMO_BYTES, 0.0
    if nvidia.gpus:
        run_bytes, cache_bytes = 2 * WEIGHTS_8B_BYTES + 2 * Q4_8B_BYTES, WEIGHTS_8B_BYTES
    caches = [("the Hub's cache", hub_cache_dir(), cache_bytes), ("Ferry's cache", files.cache_dir(), 0.0)]
    return [("runs", runs, run_bytes), *caches]


def hub_cache_dir() -> Path:
    """Return the folder where huggingface_hub stores its downloads.

    It follows the library's constants.py, because the library may not be installed yet.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def check_disk(folders: list[FolderNeed], workload: str) -> Check:
    """Check one disk, which has these folders. The message names the workload that needs the space."""
    free, need = shutil.disk_usage(folders[0][1]).free, sum(need for _, _, need in folders)
    text = f"{format_gb(free)} free for {', '.join(name for name, _, _ in folders)}"
    text += f"; {workload} needs {format_gb(need)}" if need else ""
    if free >= need:
        return Check("disk", "ok", text)
    cure = f"free {format_gb(need - free)}, or use a different disk: RUNS=, HF_HOME= "
    return Check("disk", "lack", text, cure + "(`make preflight CONFIG=...` computes your model's need)")


def check_memory(nvidia: NvidiaStatus) -> Check:
    """Check the memory of the machine or its container."""
    available, need = machine.total_memory(), MEMORY_8B_BYTES if nvidia.gpus else DEMO_BYTES
    text = f'{format_gb(available)} in this machine, where "unsloth" checkpointing keeps activations; '
    text += f"{reference_model_text(nvidia)} needs {format_gb(need)}"
    if available >= need:
        return Check("memory", "ok", text)
    return Check("memory", "lack", text, "use a machine (or a container) with more memory, or a smaller base.model")


def reference_model_text(nvidia: NvidiaStatus) -> str:
    """Return what the machine is measured against, for messages."""
    return "an 8B model" if nvidia.gpus else "the demo"


def check_container(run_location: TrainLocation, ask: CommandRunner) -> Check:
    """Report whether `make train` runs in Ferry's image or natively. Both have the same locks and the same code."""
    if "FERRY_IMAGE" in os.environ:
        return Check("container", "ok", "this is Ferry's image")
    if not run_location.place:
        text = f"setup/container.py does not answer: {run_location.reason}"
        return Check("container", "lack", text, "set DOCKER=1 or DOCKER=0")
    text = f"`make train` runs {'in the image' if run_location.place == 'image' else 'natively'}: {run_location.reason}"
    # Without "docker" in the reason, no part of a container engine is missing.
    if run_location.place == "image" or "docker" not in run_location.reason:
        return Check("container", "ok", text)
    return Check("container", "lack", text, find_container_cure(ask))


def find_container_cure(ask: CommandRunner) -> str:
    """Return how `make train` can run in the image, where docker cannot run it."""
    if machine.find_train_location(ask, "podman").place == "image":
        return "ENGINE=podman"
    return "install docker.io and nvidia-container-toolkit; or do nothing: both ways give the same model"
