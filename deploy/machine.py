"""Detect this machine's system, chip and memory, and how much of the memory a model may take."""

import importlib.util
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import linux

COMMAND_TIMEOUT = 10  # seconds for one command
GPU_MARGIN = 1 << 30  # bytes of GPU memory that llama.cpp leaves free when it fits a model by itself (common.h, --fit)
# The share of all memory that a model may take where the CPU computes: the system and other programs need the rest.
MEMORY_SHARE = 3 / 4
# Unless a limit is set by hand, Metal gives one process 2/3 of the memory of a small Mac and 3/4 of a large one. What
# llama.cpp logs as recommendedMaxWorkingSetSize, in MB: 10,922 of 16 GB, 21,845 of 32 GB (ollama#434), 27,648 of 36 GB,
# 49,152 of 64 GB (llama.cpp#1870), 73,728 of 96 GB (llama.cpp#3213). Newer systems give more: 11.8 GB of 16 GB
# (llmfit#754).
LARGE_MAC = 36 << 30
SYSCTL = ("/usr/sbin/sysctl", "-n")  # not on every PATH
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
GPU_DEVICE, INTEGRATED_GPU_DEVICE = 1, 2  # enum ggml_backend_dev_type

CommandRunner = Callable[[Sequence[str]], "str | None"]


@dataclass(frozen=True)
class Machine:
    """What `detect_machine` finds out about this machine."""

    system: str
    """'Darwin' or 'Linux'."""
    release: str
    arch: str
    """The architecture that this Python is built for: 'arm64', 'x86_64', ..."""
    chip: str
    memory: int
    """Bytes; in a container its limit."""
    gpu: str
    """The name of the GPU, or the names of all; '' when there is none."""
    gpu_memory: int
    """Bytes of GPU memory, of all GPUs together; on a Mac this is a part of `memory`. 0 when there is no GPU, or when
    its memory is not reported."""
    rosetta: bool
    """Whether this Python is built for Intel on a chip of Apple's: everything is translated, and there is no Metal."""

    @property
    def has_unified_memory(self) -> bool:
        """Whether the GPU and the CPU share their memory."""
        return self.system == "Darwin" and bool(self.gpu)


def run_command(command: Sequence[str]) -> str | None:
    """Run a command and return what it prints; None when it is missing, fails, prints nothing or takes too long."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=COMMAND_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def query_gpu_memory() -> int:
    """Return the bytes of memory that llama.cpp's GPUs report; 0 when it computes on the CPU or is not installed.

    On a Mac this is Metal's own recommendedMaxWorkingSetSize, which takes the version of the system and a limit set by
    hand into account.
    """
    if not importlib.util.find_spec("llama_cpp"):
        return 0
    import ctypes

    try:
        from llama_cpp._ggml import libggml
    except (ImportError, OSError, RuntimeError):  # the library cannot be loaded: `doctor` reports it
        return 0
    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    libggml.ggml_backend_dev_get.argtypes, libggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
    libggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    libggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p] + 2 * [ctypes.POINTER(ctypes.c_size_t)]
    memory_by_kind = {GPU_DEVICE: 0, INTEGRATED_GPU_DEVICE: 0}
    for device in map(libggml.ggml_backend_dev_get, range(libggml.ggml_backend_dev_count())):
        free, total, kind = ctypes.c_size_t(), ctypes.c_size_t(), libggml.ggml_backend_dev_type(device)
        libggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        memory_by_kind[kind] = memory_by_kind.get(kind, 0) + total.value
    # llama.cpp uses an integrated GPU only where there is no other.
    return memory_by_kind[GPU_DEVICE] or memory_by_kind[INTEGRATED_GPU_DEVICE]


def detect_machine(
    run_command: CommandRunner = run_command,
    root: Path = Path("/"),
    system: str = platform.system(),
    arch: str = platform.machine(),
    query_gpu_memory: Callable[[], int] = query_gpu_memory,
) -> Machine:
    """Return the facts of this machine. The arguments are the sources: commands, files, this Python, llama.cpp."""
    return (
        _detect_mac(run_command, arch, query_gpu_memory)
        if system == "Darwin"
        else _detect_linux(run_command, root, arch, query_gpu_memory)
    )


def memory_budget(machine: Machine, uses_gpu: bool) -> int:
    """Return the bytes that a model may take with all that it needs to run.

    Args:
        machine: What `detect_machine` found.
        uses_gpu: Whether llama.cpp computes on a GPU.
    """
    if uses_gpu and machine.gpu_memory:
        return max(0, machine.gpu_memory - GPU_MARGIN)
    return int(machine.memory * MEMORY_SHARE)


def _detect_mac(run_command: CommandRunner, arch: str, query_gpu_memory: Callable[[], int]) -> Machine:
    def read_number(name: str) -> int:
        output = run_command((*SYSCTL, name)) or ""
        return int(output) if output.isdecimal() else 0

    has_apple_chip = (
        arch == "arm64" or read_number("hw.optional.arm64") == 1 or read_number("sysctl.proc_translated") == 1
    )
    memory, chip = read_number("hw.memsize"), run_command((*SYSCTL, "machdep.cpu.brand_string")) or arch
    limit = read_number("iogpu.wired_limit_mb") << 20 or (memory * 3 // 4 if memory >= LARGE_MAC else memory * 2 // 3)
    gpu_memory = query_gpu_memory() or (limit if has_apple_chip else 0)
    release = f"macOS {run_command(('/usr/bin/sw_vers', '-productVersion')) or platform.mac_ver()[0]}"
    return Machine(
        "Darwin",
        release,
        arch,
        chip,
        memory,
        chip if has_apple_chip else "",
        gpu_memory,
        has_apple_chip and arch == "x86_64",
    )


def _detect_linux(run_command: CommandRunner, root: Path, arch: str, query_gpu_memory: Callable[[], int]) -> Machine:
    release = _read_field(root / "etc/os-release", "PRETTY_NAME", "=").strip('"') or f"Linux {platform.release()}"
    chip = _read_field(root / "proc/cpuinfo", "model name", ":") or arch
    memory = int(_read_field(root / "proc/meminfo", "MemTotal", ":").removesuffix("kB") or 0) << 10
    gpus = [line.rpartition(",") for line in (run_command(NVIDIA_SMI) or "").splitlines()]
    reported_memory = sum(int(size) << 20 for _, _, size in gpus if size.strip().isdecimal())
    names = ", ".join(name.strip() for name, _, _ in gpus)
    return Machine(
        "Linux",
        release,
        arch,
        chip,
        min([memory, *linux.memory_limits(root)]),
        names,
        query_gpu_memory() or reported_memory,
        False,
    )


def _read_field(path: Path, name: str, separator: str) -> str:
    """Return the value of `name` in a file of lines such as `name : value`; '' when it is not there."""
    for line in linux.read_text(path).splitlines():
        key, _, value = line.partition(separator)
        if key.strip() == name:
            return value.strip()
    return ""
