"""doctor: report what this machine has and lacks, for one repo or in general, with the command that cures each lack."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import files, gguf_reader, hub, llama_runtime
from common.checks import Check
from common.errors import UserError, shown
from contract import manifest, published_model
from contract.manifest import Artifact, Manifest
from deploy import machine, store
from deploy.apps import lmstudio
from deploy.apps import ollama_server as ollama
from deploy.machine import Machine
from deploy.stages import header_check, memory_need, pull

ENVIRONMENT = "make deploy-env"
ARM = (
    "/opt/homebrew/bin/brew install python@3.13   or: uv python install cpython-3.13-macos-aarch64   "
    f"(is this terminal under Rosetta? first: arch -arm64 zsh), then {ENVIRONMENT}"
)
# Llama 3.2 1B, Llama 3.2 3B and Llama 3.1 8B as q4_k_m: bytes, layers, embedding width, feed-forward width, attention
# heads, key and value heads.
TYPICAL = {
    "1B": (0.81e9, 16, 2048, 8192, 32, 8),
    "3B": (2.02e9, 28, 3072, 8192, 24, 8),
    "8B": (4.92e9, 32, 4096, 14336, 32, 8),
}
LONGEST, WORDS = 131_072, 128_256  # their context length in tokens, their vocabulary size


@dataclass(frozen=True)
class File:
    """The file that `pull` would fetch."""

    made: Manifest
    artifact: Artifact
    header: gguf_reader.Header
    path: Path
    """Where the file is, or will be, in the store."""


def checks(
    repo: str | None, models: Path, quantization: str | None = None, here: Callable[[], Machine] = machine.here
) -> list[Check]:
    """Run all checks and return their results. Nothing is changed, and without a repo no network is needed.

    Args:
        repo: The repo whose file is checked; None checks this machine only.
        models: The store.
        quantization: The GGUF of the repo; None takes the manifest's default.
        detect_machine: Returns the facts of this machine.
    """
    this, computes, served = here(), llama(), ollama.version()
    room = machine.budget(this, computes.backend not in (None, "CPU"))
    asked, file = wanted(repo, models, quantization) if repo else ([], None)
    return [
        system(this),
        computes.check(this),
        *tools(this, computes),
        *asked,
        *disks(models, file, served),
        memory_of(this, room),
        context(room, file) if file else typical(room),
        in_ollama(served),
        in_lmstudio(),
    ]


# The machine and its llama.cpp


def system(this: Machine) -> Check:
    """Check that this Python runs natively: under Rosetta there is no Metal."""
    text = f"{this.release}, {this.chip}, {this.arch} Python"
    if this.rosetta:
        return Check("system", "fault", f"{text}: made for Intel, translated by Rosetta, without Metal", ARM)
    return Check("system", "ok", text)


@dataclass(frozen=True)
class Llama:
    """The llama.cpp of this environment. When it cannot be used, `backend` is None and `error` says why."""

    version: str | None
    backend: str | None
    why: str = ""

    def check(self, this: Machine) -> Check:
        """Return the doctor's line about llama.cpp."""
        if self.version is None and not (Path(sys.prefix) / "ferry.json").is_file():
            text = "the Python environment that runs models is not set up yet: llama.cpp and 0.2 GB of packages"
            return Check("llama.cpp", "lack", text, f"{ENVIRONMENT}, or make deploy-mac, which does it")
        if self.version is None:
            return Check("llama.cpp", "fault", "llama-cpp-python is not in this environment", ENVIRONMENT)
        text = f"llama-cpp-python {self.version}"
        if self.backend is None:
            return Check("llama.cpp", "fault", f"{text} does not load: {shown(self.why)}", ENVIRONMENT)
        if self.backend == "CPU" and this.gpu:
            flag = "METAL" if this.system == "Darwin" else "CUDA"
            cure = f"FERRY_LLAMA_FLAGS=-DGGML_{flag}=ON {ENVIRONMENT}   (compiles it for this GPU)"
            return Check("llama.cpp", "lack", f"{text} computes on the CPU, {this.gpu} is not used", cure)
        return Check("llama.cpp", "ok", f"{text}, computes on {self.backend}")


def llama() -> Llama:
    """Load the llama.cpp of this environment and return its version and backend."""
    if not importlib.util.find_spec("llama_cpp"):
        return Llama(None, None)
    version = importlib.metadata.version("llama_cpp_python")
    try:
        return Llama(version, llama_runtime.backend())
    except (ImportError, OSError, RuntimeError) as error:
        return Llama(version, None, str(error))


def tools(this: Machine, computes: Llama) -> list[Check]:
    """Check on a Mac that Apple's compiler is there, only where llama.cpp still has to be built."""
    if this.system != "Darwin" or computes.version or machine.ask(["xcode-select", "-p"]):
        return []
    text = "no command line tools of Xcode; llama.cpp is compiled with them where no ready one fits"
    return [Check("compiler", "lack", text, "xcode-select --install")]


# The file of a repo


def wanted(repo: str, models: Path, quantization: str | None) -> tuple[list[Check], File | None]:
    """Check the repo's file by its manifest and its header.

    Returns:
        The checks, and the file; None instead of the file when it cannot be used.
    """
    try:
        found = published_model.find(repo)
        content = found.manifest()
        made = manifest.parse(content, f"{shown(repo)}/{manifest.NAME}")
        artifact = pull.chosen(made, quantization)
        found.refuse(artifact)
        head, header = header_check.header(found, artifact)
        header_check.check(head, artifact.bytes, artifact.file)
    except hub.Unreachable as error:
        return [Check("file", "lack", f"{error.message}; what was pulled before can be used", error.hint)], None
    except UserError as error:
        return [Check("file", "fault", error.message, error.hint)], None
    except OSError as error:
        return [Check("file", "fault", f"{shown(repo)} cannot be read: {error.strerror}", "make it readable")], None
    path = models / found.name / files.sha256_bytes(content)[:12] / artifact.file
    kinds = [str(header.metadata.get(key, "none")) for key in (gguf_reader.ARCHITECTURE, "tokenizer.ggml.pre")]
    text = (
        f"{artifact.file}, {disk(artifact.bytes)}; "
        f"llama.cpp knows it (architecture {kinds[0]}, pre-tokenizer {kinds[1]})"
    )
    return [Check("file", "ok", shown(text))], File(made, artifact, header, path)


def disks(models: Path, file: File | None, served: str | None) -> list[Check]:
    """Check the free space of each disk that will hold a copy of the file."""
    places: dict[int, list[tuple[str, Path, int]]] = {}
    for name, folder, size in copies(models, file, served):
        places.setdefault(device(folder), []).append((name, files.nearest(folder), size))
    return [free(place, file) for place in places.values()]


def copies(models: Path, file: File | None, served: str | None) -> list[tuple[str, Path, int]]:
    """Return (app, folder, bytes still to be written) for each copy of the file.

    The store holds the file itself, Ollama writes a copy of its own, and LM Studio gets a hard link where its folder is
    on the same disk.
    """
    size, here = (file.artifact.bytes, file.path.is_file()) if file else (0, False)
    found = [("store", models, 0 if here else size)]
    if (ollama.program() or served) and ollama.local(ollama.host()):
        made = here and store.read(file.path.with_name("ollama.json")).get("digest")
        found.append(("Ollama", ollama.models_folder(), 0 if made else size))
    if lmstudio.home().is_dir():
        found.append(("LM Studio", lmstudio.models(), 0 if device(lmstudio.models()) == device(models) else size))
    return found


def device(folder: Path) -> int:
    """Return the device number of the disk that a folder is on, or will be on."""
    return os.stat(files.nearest(folder)).st_dev


def free(place: list[tuple[str, Path, int]], file: File | None) -> Check:
    """Check the free space of one disk. The copies are those of `list_copies` that this disk will hold."""
    there, need = shutil.disk_usage(place[0][1]).free, sum(size for _, _, size in place)
    text = f"{disk(there)} free for {', '.join(name for name, _, _ in place)}"
    if file:
        each = ", ".join(f"{name} {disk(size)}" if size else f"{name} nothing" for name, _, size in place)
        text = f"{disk(there)} free, {disk(need)} needed: {each}"
    if there >= need:
        return Check("disk", "ok", text)
    return Check("disk", "lack", text, f"free {disk(need - there)} (`make models` lists what Ferry keeps)")


# Memory


def memory_of(this: Machine, room: int) -> Check:
    """Report the memory of this machine and how much of it a model may take, in bytes."""
    kind = " unified" if this.unified else ""
    other = f", {this.gpu} with {size(this.gpu_memory)}" if this.gpu and not this.unified else ""
    return Check("memory", "ok", f"{size(this.memory)}{kind}{other}; a model may take {size(room)}")


def context(room: int, file: File) -> Check:
    """Check how much of the trained context length fits into memory."""
    trained, weights = file.made.generation.num_ctx, file.artifact.bytes
    fits = memory_need.context(file.header, weights, room, trained)
    need = memory_need.need(file.header, weights, fits or memory_need.STEP)
    if fits == trained:
        return Check("context", "ok", f"{fits} tokens, as trained, need {size(need)}")
    smaller = sorted(
        a.quantization for a in file.made.artifacts if a.kind == "gguf" and a.quantization and a.bytes < weights
    )
    cure = f"QUANT=one of: {', '.join(smaller)}" if smaller else "close other programs, or take a smaller model"
    if fits:
        return Check("context", "lack", f"{fits} of the trained {trained} tokens fit into {size(room)}", cure)
    return Check("context", "lack", f"it needs {size(need)}, and {size(room)} are there for a model", cure)


def typical(room: int) -> Check:
    """Report how long the context of typical models may be. It stands in for `check_context` without a file."""
    told = []
    for name, (weights, *shape) in TYPICAL.items():
        fits = memory_need.context(usual(*shape), int(weights), room, LONGEST)
        told.append(f"{name} {f'{fits} tokens' if fits else 'does not fit'}")
    return Check("context", "ok", f"{', '.join(told)}, as q4_k_m")


def usual(layers: int, width: int, wide: int, heads: int, kept: int) -> gguf_reader.Header:
    """Build the header of a Llama model with these sizes, enough to estimate its memory need."""
    facts = {
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": wide,
        "vocab_size": WORDS,
        "attention.head_count": heads,
        "attention.head_count_kv": kept,
    }
    return gguf_reader.Header(
        3, {gguf_reader.ARCHITECTURE: "llama"} | {f"llama.{key}": value for key, value in facts.items()}, ()
    )


# The apps


def in_ollama(version: str | None) -> Check:
    """Check that Ollama answers. version: that of the server that answers; None when none does."""
    address = ollama.host()
    if version:
        where = "" if ollama.local(address) else ", which is another machine"
        return Check("Ollama", "ok", f"{shown(version, 40)} answers at {address}{where}")
    if ollama.program():
        return Check(
            "Ollama",
            "lack",
            f"installed, but nothing answers at {address}",
            "`ollama serve`, or open the app (START=1 does it)",
        )
    return Check("Ollama", "lack", "not installed", ollama.INSTALL)


def in_lmstudio() -> Check:
    """Check that LM Studio is installed and has a runtime for GGUF files."""
    home, command = lmstudio.home(), lmstudio.program()
    if not home.is_dir() and not command:
        return Check("LM Studio", "lack", "not installed", lmstudio.INSTALL)
    text = f"models in {lmstudio.models()}, {'with' if command else 'without'} lms"
    # The folders are called <home>/extensions/backends/llama.cpp-mac-arm64-apple-metal-advsimd-2.50.0. `lms runtime ls`
    # lists them too, but it needs the app.
    engines = [path.name for path in home.glob("extensions/backends/llama.cpp-*") if path.is_dir()]
    if not engines:
        cure = "start LM Studio once, or `lms runtime get llama.cpp`"
        return Check("LM Studio", "lack", f"{text}, no runtime for GGUF files", cure)
    return Check("LM Studio", "ok", f"{text}, {shown(max(engines, key=numbers))}")


def numbers(name: str) -> list[int]:
    """Return the numbers of the version at the end of a name, in their order."""
    return [int(number) for number in re.findall(r"\d+", name.rpartition("-")[2])]


def size(bytes: int) -> str:
    """Format a memory size as memory is sold: 36 GB are 36 * 2^30 bytes."""
    return f"{bytes / 2**30:.1f} GB"


def disk(bytes: int) -> str:
    """Format a size on disk as macOS counts it: 1 GB is 10^9 bytes."""
    return f"{bytes / 1e9:.2f} GB" if bytes < 10e9 else f"{bytes / 1e9:.0f} GB"
