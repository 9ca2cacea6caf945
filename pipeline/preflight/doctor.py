"""doctor: report what the training machine is, has and lacks, with the command that cures each lack."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from common import files
from common.checks import Check
from common.errors import shown
from pipeline.preflight import gpu_checks, library_checks
from pipeline.toolchain import llama_tools, machine
from pipeline.toolchain.machine import Ask, Nvidia, Where, gb

# Bytes of Llama 3.1 8B, the largest base model in configs/: in 16 bit, and as q4_k_m. The base model lies in the Hub's
# cache. The merged model, the 16-bit GGUF, and q4_k_m with and without an importance matrix lie in the run's folder.
# `make preflight` computes the need of each config.
SIXTEEN, QUANTIZED = 16.1e9, 4.9e9
# Bytes of memory for an 8B model. The inputs of all layers take 2 bytes * 4096 * 32 a token of a micro-batch, which is
# 4.3 GB at 16,384 tokens. The rest is for reading the 16-bit weights while they are merged and converted.
MEMORY = 16e9
DEMO = 3e9  # bytes of disk (without the environment) and of memory that the demo needs


def checks(runs: Path, ask: Ask = machine.ask) -> list[Check]:
    """Return all checks of this machine. Nothing is changed.

    Args:
        runs: The folder that holds the runs.
        ask: Runs a command and returns its output; tests replace it.
    """
    found, where = machine.nvidia(ask), machine.where(ask)
    tools = [compiler(found, ask), headers(found)]
    return [
        *gpu_checks.checks(found, where),
        *environment(),
        *library_checks.checks(found, tools, ask),
        *tools,
        *llama(found),
        *disks(runs, found),
        memory(found),
        container(where, ask),
    ]


def environment() -> list[Check]:
    """Return a lack when the training environment is not set up yet, with what the set-up takes."""
    if machine.is_set_up():
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


def compiler(found: Nvidia, ask: Ask) -> Check:
    """Check for a C compiler, in the order in which Triton looks for one: CC, gcc, clang."""
    for name in filter(None, (os.environ.get("CC"), "gcc", "clang")):
        said = ask([name, "--version"])
        if said.state == "ok" and said.out.strip():
            return Check("compiler", "ok", shown(said.out.splitlines()[0], 80))
    text = "no C compiler: Triton compiles with one when the training runs"
    return Check("compiler", needed(found), text, "sudo apt-get install gcc")


def headers(found: Nvidia) -> Check:
    """Check for Python.h, which Triton compiles against."""
    place = Path(sysconfig.get_path("include")) / "Python.h"
    if place.is_file():
        return Check("Python.h", "ok", str(place))
    text = f"{place} is not there: Triton compiles against it when the training runs"
    return Check("Python.h", needed(found), text, "sudo apt-get install python{}.{}-dev".format(*sys.version_info))


def needed(found: Nvidia) -> str:
    """Return the state of a check whose lack makes GPUs unusable: `fault` when there is a GPU, else `lack`."""
    return "fault" if found.cards else "lack"


def llama(found: Nvidia) -> list[Check]:
    """Return the check of llama.cpp, or nothing before the environment is set up."""
    return [llama_cpp(found)] if machine.is_set_up() else []


def llama_cpp(found: Nvidia) -> Check:
    """Check that llama.cpp is built, and built for CUDA when there is a GPU."""
    if not llama_tools.there():
        return Check(
            "llama.cpp", "fault", f"not set up ({llama_tools.folder()}); export and verify need it", "make env"
        )
    flags = files.read_json(llama_tools.folder() / "build.json").get("flags", [])
    if found.cards and "-DGGML_CUDA=ON" not in flags:
        return Check(
            "llama.cpp", "lack", f"{llama_tools.version()} computes on the CPU, the card is not used", "make env"
        )
    return Check("llama.cpp", "ok", llama_tools.version())


# Disk, memory, container


def disks(runs: Path, found: Nvidia) -> list[Check]:
    """Check the free space of each disk: for an 8B model when there is a GPU, else for the demo."""
    ours, cached = (2 * SIXTEEN + 2 * QUANTIZED, SIXTEEN) if found.cards else (DEMO, 0)
    wanted = (
        ("runs", runs, ours),
        ("the Hub's cache", hub_cache(), cached),
        ("Ferry's cache", files.cache_dir(), 0),
    )
    places: dict[int, list[tuple[str, Path, float]]] = {}
    for name, folder, need in wanted:
        there = files.nearest(folder)
        places.setdefault(os.stat(there).st_dev, []).append((name, there, need))
    return [disk(place, what(found)) for place in places.values()]


def hub_cache() -> Path:
    """Return the folder where huggingface_hub stores its downloads.

    It follows the library's constants.py, because the library may not be installed yet.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def disk(place: list[tuple[str, Path, float]], model: str) -> Check:
    """Check one disk.

    Args:
        folders: (label, folder, needed bytes) of each folder on this disk.
        workload: What needs the space, for the message.
    """
    free, need = shutil.disk_usage(place[0][1]).free, sum(need for _, _, need in place)
    text = f"{gb(free)} free for {', '.join(name for name, _, _ in place)}"
    text += f"; {model} takes {gb(need)}" if need else ""
    if free >= need:
        return Check("disk", "ok", text)
    cure = (
        f"free {gb(need - free)}, or take another disk: RUNS=, HF_HOME= "
        "(`make preflight CONFIG=...` knows your model's need)"
    )
    return Check("disk", "lack", text, cure)


def memory(found: Nvidia) -> Check:
    """Check the memory of the machine or its container."""
    there, need = machine.memory(), MEMORY if found.cards else DEMO
    text = f'{gb(there)} of this machine, where "unsloth" checkpointing keeps activations; '
    text += f"{what(found)} wants {gb(need)}"
    if there >= need:
        return Check("memory", "ok", text)
    return Check("memory", "lack", text, "take a machine (or give its container) more, or a smaller base.model")


def what(found: Nvidia) -> str:
    """Return what the machine is measured against, for messages."""
    return "a model of 8B" if found.cards else "the demo"


def container(where: Where, ask: Ask) -> Check:
    """Report whether `make train` runs in Ferry's image or natively. Both have the same locks and the same code."""
    if "FERRY_IMAGE" in os.environ:
        return Check("container", "ok", "this is Ferry's image")
    if not where.word:
        return Check(
            "container", "lack", f"setup/container.py does not answer: {where.why}", "DOCKER=1 or DOCKER=0 decides"
        )
    told = f"`make train` runs {'in the image' if where.word == 'image' else 'natively'}: {where.why}"
    # Without "docker" in the reason, no part of a container engine is missing.
    if where.word == "image" or "docker" not in where.why:
        return Check("container", "ok", told)
    podman = machine.where(ask, "podman").word == "image"
    cure = (
        "ENGINE=podman" if podman else "install docker.io and nvidia-container-toolkit; or nothing: both are the same"
    )
    return Check("container", "lack", told, cure)
