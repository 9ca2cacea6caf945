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
from common.errors import UserError, printable_line
from contract import manifest, published_model
from contract.manifest import Artifact, Manifest
from deploy import machine, store
from deploy.apps import lmstudio, ollama_server
from deploy.machine import Machine
from deploy.stages import header_check, memory_need, pull

SETUP_COMMAND = "make deploy-env"
ARM_PYTHON_HINT = (
    "/opt/homebrew/bin/brew install python@3.13   or: uv python install cpython-3.13-macos-aarch64   "
    f"(is this terminal under Rosetta? first: arch -arm64 zsh), then {SETUP_COMMAND}"
)
# Llama 3.2 1B, Llama 3.2 3B and Llama 3.1 8B as q4_k_m: bytes, layers, embedding width, feed-forward width, attention
# heads, key and value heads.
TYPICAL_MODELS = {
    "1B": (0.81e9, 16, 2048, 8192, 32, 8),
    "3B": (2.02e9, 28, 3072, 8192, 24, 8),
    "8B": (4.92e9, 32, 4096, 14336, 32, 8),
}
TYPICAL_CONTEXT, TYPICAL_VOCABULARY = 131_072, 128_256  # their context length in tokens, their vocabulary size


@dataclass(frozen=True)
class RepoFile:
    """The file that `pull` would fetch."""

    manifest: Manifest
    artifact: Artifact
    header: gguf_reader.Header
    path: Path
    """Where the file is, or will be, in the store."""


def run_doctor(
    repo: str | None,
    models: Path,
    quantization: str | None = None,
    detect_machine: Callable[[], Machine] = machine.detect_machine,
) -> list[Check]:
    """Run all checks and return their results. Nothing is changed, and without a repo no network is needed.

    Args:
        repo: The repo whose file is checked; None checks this machine only.
        models: The store.
        quantization: The GGUF of the repo; None takes the manifest's default.
        detect_machine: Returns the facts of this machine.
    """
    this_machine, llama_cpp, ollama_version = detect_machine(), probe_llama_cpp(), ollama_server.find_server_version()
    memory_budget = machine.memory_budget(this_machine, llama_cpp.backend not in (None, "CPU"))
    file_checks, file = check_repo_file(repo, models, quantization) if repo else ([], None)
    return [
        check_system(this_machine),
        llama_cpp.to_check(this_machine),
        *check_compiler(this_machine, llama_cpp),
        *file_checks,
        *check_disks(models, file, ollama_version),
        check_memory(this_machine, memory_budget),
        check_context(memory_budget, file) if file else check_typical_models(memory_budget),
        check_ollama(ollama_version),
        check_lmstudio(),
    ]


# The machine and its llama.cpp


def check_system(this_machine: Machine) -> Check:
    """Check that this Python runs natively: under Rosetta there is no Metal."""
    text = f"{this_machine.release}, {this_machine.chip}, {this_machine.arch} Python"
    if this_machine.rosetta:
        return Check(
            "system", "fault", f"{text}: made for Intel, translated by Rosetta, without Metal", ARM_PYTHON_HINT
        )
    return Check("system", "ok", text)


@dataclass(frozen=True)
class LlamaCpp:
    """The llama.cpp of this environment. When it cannot be used, `backend` is None and `error` says why."""

    version: str | None
    backend: str | None
    error: str = ""

    def to_check(self, this_machine: Machine) -> Check:
        """Return the doctor's line about llama.cpp."""
        if self.version is None and not (Path(sys.prefix) / "ferry.json").is_file():
            text = "the Python environment that runs models is not set up yet: llama.cpp and 0.2 GB of packages"
            return Check("llama.cpp", "lack", text, f"{SETUP_COMMAND}; make deploy-mac does it too")
        if self.version is None:
            return Check("llama.cpp", "fault", "llama-cpp-python is not in this environment", SETUP_COMMAND)
        text = f"llama-cpp-python {self.version}"
        if self.backend is None:
            return Check("llama.cpp", "fault", f"{text} does not load: {printable_line(self.error)}", SETUP_COMMAND)
        if self.backend == "CPU" and this_machine.gpu:
            flag = "METAL" if this_machine.system == "Darwin" else "CUDA"
            cure = f"FERRY_LLAMA_FLAGS=-DGGML_{flag}=ON {SETUP_COMMAND}   (compiles it for this GPU)"
            return Check("llama.cpp", "lack", f"{text} computes on the CPU, {this_machine.gpu} is not used", cure)
        return Check("llama.cpp", "ok", f"{text}, computes on {self.backend}")


def probe_llama_cpp() -> LlamaCpp:
    """Load the llama.cpp of this environment and return its version and backend."""
    if not importlib.util.find_spec("llama_cpp"):
        return LlamaCpp(None, None)
    version = importlib.metadata.version("llama_cpp_python")
    try:
        return LlamaCpp(version, llama_runtime.compute_device())
    except (ImportError, OSError, RuntimeError) as error:
        return LlamaCpp(version, None, str(error))


def check_compiler(this_machine: Machine, llama_cpp: LlamaCpp) -> list[Check]:
    """Check on a Mac that Apple's compiler is there, only where llama.cpp still has to be built."""
    if this_machine.system != "Darwin" or llama_cpp.version or machine.run_command(["xcode-select", "-p"]):
        return []
    text = "Xcode's command line tools are missing; they compile llama.cpp where no prebuilt one fits"
    return [Check("compiler", "lack", text, "xcode-select --install")]


# The file of a repo


def check_repo_file(repo: str, models: Path, quantization: str | None) -> tuple[list[Check], RepoFile | None]:
    """Check the repo's file by its manifest and its header.

    Returns:
        The checks, and the file; None instead of the file when it cannot be used.
    """
    try:
        source = published_model.find_source(repo)
        content = source.read_manifest()
        model_manifest = manifest.parse_manifest(content, f"{printable_line(repo)}/{manifest.FILE_NAME}")
        artifact = pull.choose_artifact(model_manifest, quantization)
        source.refuse_changed(artifact)
        header_bytes, header = header_check.read_header(source, artifact)
        header_check.refuse_unloadable_header(header_bytes, artifact.bytes, artifact.file)
    except hub.Unreachable as error:
        text = f"{error.message}; an earlier pull can still be used"
        return [Check("file", "lack", text, error.hint, code=error.code)], None
    except UserError as error:
        return [Check("file", "fault", error.message, error.hint, code=error.code)], None
    except OSError as error:
        text = f"{printable_line(repo)} cannot be read: {error.strerror}"
        return [Check("file", "fault", text, "make it readable", code="file.unreadable")], None
    path = models / source.name / files.sha256_bytes(content)[:12] / artifact.file
    file = RepoFile(model_manifest, artifact, header, path)
    return [Check("file", "ok", describe_file(file))], file


def describe_file(file: RepoFile) -> str:
    """Return name, size and kind of a file that llama.cpp can load."""
    keys = (gguf_reader.ARCHITECTURE_KEY, "tokenizer.ggml.pre")
    architecture, pre_tokenizer = (file.header.metadata.get(key, "none") for key in keys)
    kind = f"architecture {architecture}, pre-tokenizer {pre_tokenizer}"
    size = format_disk(file.artifact.bytes)
    return printable_line(f"{file.artifact.file}, {size}; llama.cpp supports it ({kind})")


def check_disks(models: Path, file: RepoFile | None, ollama_version: str | None) -> list[Check]:
    """Check the free space of each disk that will hold a copy of the file."""
    copies_by_disk: dict[int, list[tuple[str, Path, int]]] = {}
    for app, folder, size in list_copies(models, file, ollama_version):
        copies_by_disk.setdefault(device_id(folder), []).append((app, files.nearest_existing_path(folder), size))
    return [check_free_space(copies, file) for copies in copies_by_disk.values()]


def list_copies(models: Path, file: RepoFile | None, ollama_version: str | None) -> list[tuple[str, Path, int]]:
    """Return (app, folder, bytes still to be written) for each copy of the file.

    The store holds the file itself, Ollama writes a copy of its own, and LM Studio gets a hard link where its folder is
    on the same disk.
    """
    size = file.artifact.bytes if file else 0
    copies = [("store", models, 0 if file and file.path.is_file() else size)]
    if (ollama_server.find_command() or ollama_version) and ollama_server.is_local(ollama_server.server_url()):
        copies.append(("Ollama", ollama_server.models_folder(), 0 if file and is_in_ollama(file.path) else size))
    if lmstudio.home_folder().is_dir():
        is_same_disk = device_id(lmstudio.models_folder()) == device_id(models)
        copies.append(("LM Studio", lmstudio.models_folder(), 0 if is_same_disk else size))
    return copies


def is_in_ollama(path: Path) -> bool:
    """Return whether a file is in the store, and Ollama has its copy."""
    return path.is_file() and bool(store.read_record(path.with_name("ollama.json")).get("digest"))


def device_id(folder: Path) -> int:
    """Return the device number of the disk that a folder is on, or will be on."""
    return os.stat(files.nearest_existing_path(folder)).st_dev


def check_free_space(copies: list[tuple[str, Path, int]], file: RepoFile | None) -> Check:
    """Check the free space of one disk. The copies are those of `list_copies` that this disk will hold."""
    free_bytes = shutil.disk_usage(copies[0][1]).free
    needed_bytes = sum(size for _, _, size in copies)
    text = f"{format_disk(free_bytes)} free for {', '.join(app for app, _, _ in copies)}"
    if file:
        sizes = ", ".join(f"{app} {format_disk(size)}" if size else f"{app} nothing" for app, _, size in copies)
        text = f"{format_disk(free_bytes)} free, {format_disk(needed_bytes)} needed: {sizes}"
    if free_bytes >= needed_bytes:
        return Check("disk", "ok", text)
    cure = f"free {format_disk(needed_bytes - free_bytes)} (`make models` lists the models in the store)"
    return Check("disk", "lack", text, cure)


# Memory


def check_memory(this_machine: Machine, memory_budget: int) -> Check:
    """Report the memory of this machine and how much of it a model may take, in bytes."""
    text = format_memory(this_machine.memory)
    if this_machine.has_unified_memory:
        text += " unified"
    elif this_machine.gpu:
        text += f", {this_machine.gpu} with {format_memory(this_machine.gpu_memory)}"
    return Check("memory", "ok", f"{text}; a model may take {format_memory(memory_budget)}")


def check_context(memory_budget: int, file: RepoFile) -> Check:
    """Check how much of the trained context length fits into memory."""
    trained_tokens, weights = file.manifest.generation.num_ctx, file.artifact.bytes
    fitting_tokens = memory_need.largest_context(file.header, weights, memory_budget, trained_tokens)
    needed_bytes = memory_need.total_bytes(file.header, weights, fitting_tokens or memory_need.CONTEXT_STEP)
    if fitting_tokens == trained_tokens:
        return Check("context", "ok", f"{fitting_tokens} tokens, as trained, need {format_memory(needed_bytes)}")
    text = f"it needs {format_memory(needed_bytes)}, {format_memory(memory_budget)} are available for a model"
    if fitting_tokens:
        text = f"{fitting_tokens} of the trained {trained_tokens} tokens fit into {format_memory(memory_budget)}"
    return Check("context", "lack", text, suggest_smaller_file(file))


def suggest_smaller_file(file: RepoFile) -> str:
    """Return the cure for a file that is too large for the memory: the smaller quantizations, if there are any."""
    ggufs = [artifact for artifact in file.manifest.artifacts if artifact.kind == "gguf"]
    names = sorted(gguf.quantization for gguf in ggufs if gguf.quantization and gguf.bytes < file.artifact.bytes)
    return f"QUANT=one of: {', '.join(names)}" if names else "close other programs, or use a smaller model"


def check_typical_models(memory_budget: int) -> Check:
    """Report how long the context of typical models may be. It stands in for `check_context` without a file."""
    descriptions = []
    for name, (weights, *shape) in TYPICAL_MODELS.items():
        header = build_typical_header(*shape)
        fitting_tokens = memory_need.largest_context(header, int(weights), memory_budget, TYPICAL_CONTEXT)
        descriptions.append(f"{name} {f'{fitting_tokens} tokens' if fitting_tokens else 'does not fit'}")
    return Check("context", "ok", f"{', '.join(descriptions)}, as q4_k_m")


def build_typical_header(
    layers: int, width: int, feed_forward_width: int, heads: int, kv_heads: int
) -> gguf_reader.Header:
    """Build the header of a Llama model with these sizes, enough to estimate its memory need."""
    facts = {
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": feed_forward_width,
        "vocab_size": TYPICAL_VOCABULARY,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }
    return gguf_reader.Header(
        3, {gguf_reader.ARCHITECTURE_KEY: "llama"} | {f"llama.{key}": value for key, value in facts.items()}, ()
    )


# The apps


def check_ollama(version: str | None) -> Check:
    """Check that Ollama answers. version: that of the server that answers; None when none does."""
    address = ollama_server.server_url()
    if version:
        location = "" if ollama_server.is_local(address) else ", which is another machine"
        return Check("Ollama", "ok", f"{printable_line(version, 40)} answers at {address}{location}")
    if ollama_server.find_command():
        return Check(
            "Ollama",
            "lack",
            f"installed, but nothing answers at {address}",
            "`ollama serve`, or open the app (START=1 starts it)",
        )
    return Check("Ollama", "lack", "not installed", ollama_server.INSTALL_HINT)


def check_lmstudio() -> Check:
    """Check that LM Studio is installed and has a runtime for GGUF files."""
    home, command = lmstudio.home_folder(), lmstudio.find_command()
    if not home.is_dir() and not command:
        return Check("LM Studio", "lack", "not installed", lmstudio.INSTALL_HINT)
    text = f"models in {lmstudio.models_folder()}, {'with' if command else 'without'} lms"
    # The folders are called <home>/extensions/backends/llama.cpp-mac-arm64-apple-metal-advsimd-2.50.0. `lms runtime ls`
    # lists them too, but it needs the app.
    engines = [path.name for path in home.glob("extensions/backends/llama.cpp-*") if path.is_dir()]
    if not engines:
        cure = "start LM Studio once, or `lms runtime get llama.cpp`"
        return Check("LM Studio", "lack", f"{text}, no runtime for GGUF files", cure)
    return Check("LM Studio", "ok", f"{text}, {printable_line(max(engines, key=version_numbers))}")


def version_numbers(name: str) -> list[int]:
    """Return the numbers of the version at the end of a name, in their order."""
    return [int(number) for number in re.findall(r"\d+", name.rpartition("-")[2])]


def format_memory(byte_count: int) -> str:
    """Format a memory size as memory is sold: 36 GB are 36 * 2^30 bytes."""
    return f"{byte_count / 2**30:.1f} GB"


def format_disk(byte_count: int) -> str:
    """Format a size on disk as macOS counts it: 1 GB is 10^9 bytes."""
    return f"{byte_count / 1e9:.2f} GB" if byte_count < 10e9 else f"{byte_count / 1e9:.0f} GB"
