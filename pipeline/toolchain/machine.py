"""Facts about the machine that trains: its driver, its GPUs and their processes, its memory, where `make train` runs.

pipeline/preflight judges these facts.
"""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import linux
from common.errors import printable_line

# Seconds. Without persistence mode each nvidia-smi first wakes all GPUs: 10 s and more with eight of them.
COMMAND_TIMEOUT = 30
CONTAINER_SCRIPT = Path(__file__).parents[2] / "setup" / "container.py"
CSV_FORMAT = "--format=csv,noheader,nounits"
# The name of a GPU may contain anything, but it is between fields that do not; the name of a process is the last field.
GPU_QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,compute_cap,memory.total,memory.used,memory.free,driver_version",
    CSV_FORMAT,
)
PROCESS_QUERY = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory,process_name", CSV_FORMAT)


@dataclass(frozen=True)
class CommandResult:
    """The output of a command, and how it ended."""

    state: str
    """'ok', 'absent', 'failed' or 'hangs'."""
    stdout: str = ""
    stderr: str = ""


@dataclass(frozen=True)
class GpuProcess:
    """A process on a GPU."""

    pid: str
    name: str
    memory_bytes: int | None
    """None where the driver does not report it (in a container)."""


@dataclass(frozen=True)
class Gpu:
    """A GPU. Its memory is None where the driver does not report it."""

    index: str
    uuid: str
    name: str
    capability: float
    total_bytes: int | None
    used_bytes: int | None
    free_bytes: int | None
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True)
class NvidiaStatus:
    """What nvidia-smi reports."""

    state: str
    """The state of the CommandResult: 'ok', 'absent', 'failed' or 'hangs'."""
    error_line: str = ""
    """Its last line, where it failed."""
    driver: str = ""
    cuda: tuple[int, int] | None = None
    """The newest CUDA version that the driver runs; None where it does not report one."""
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class TrainLocation:
    """Where `make train` would run, as setup/container.py decides: 'image', 'native' or '' (no answer), and why."""

    place: str
    reason: str

    @property
    def is_container(self) -> bool:
        """Whether this machine is itself a container."""
        return "itself a container" in self.reason


CommandRunner = Callable[..., CommandResult]
"""A function such as `run_command`: (command, timeout=COMMAND_TIMEOUT) -> CommandResult."""


def run_command(command: Sequence[str], timeout: float = COMMAND_TIMEOUT) -> CommandResult:
    """Run a command and return its output. One that takes more than `timeout` seconds is killed."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError:
        return CommandResult("absent")
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException as error:
        _kill_process_group(process)
        if isinstance(error, subprocess.TimeoutExpired):
            return CommandResult(
                "hangs", *(stream.decode(errors="replace") if stream else "" for stream in (error.stdout, error.stderr))
            )
        raise  # Ctrl-C, above all
    return CommandResult("ok" if process.returncode == 0 else "failed", stdout, stderr)


def _kill_process_group(process: subprocess.Popen[str]) -> None:
    """Kill a process with all that it started, and wait for it at most a second.

    A process that waits for a driver does not die, and subprocess.run would wait for it.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)


def query_nvidia(runner: CommandRunner = run_command) -> NvidiaStatus:
    """Return the driver and the GPUs as nvidia-smi reports them.

    Old drivers do not support every field of the query, so the banner is read first: it has their version.
    """
    banner = runner(["nvidia-smi"])
    if banner.state != "ok":
        return NvidiaStatus(banner.state, last_output_line(banner))
    # `Driver Version: 580.95.05  CUDA Version: 13.0`; from driver 610 on `KMD Version: ...  CUDA UMD Version: ...`.
    driver = re.search(r"(?:Driver|KMD) Version: *([\d.]+)", banner.stdout)
    cuda = re.search(r"CUDA.*Version: *(\d+)\.(\d+)", banner.stdout)
    gpu_list = runner(GPU_QUERY)
    lines = gpu_list.stdout.splitlines() if gpu_list.state == "ok" else []
    return NvidiaStatus(
        gpu_list.state,
        last_output_line(gpu_list) if gpu_list.state != "ok" else "",
        driver[1] if driver else "",
        (int(cuda[1]), int(cuda[2])) if cuda else None,
        tuple(parse_gpus(lines, parse_processes(runner(PROCESS_QUERY).stdout) if lines else {})),
    )


def parse_gpus(lines: list[str], processes: dict[str, list[GpuProcess]]) -> list[Gpu]:
    """Return the GPUs from the lines of nvidia-smi; `processes` has the processes of each GPU's uuid."""
    rows = (re.split(r", *", line.strip()) for line in lines)
    return [_build_gpu(fields, processes) for fields in rows if len(fields) >= 8]


def _build_gpu(fields: list[str], processes: dict[str, list[GpuProcess]]) -> Gpu:
    """Return a GPU from the fields of GPU_QUERY; its name may have been split at commas."""
    index, uuid, *name, capability, total, used, free, _ = fields
    capability_number = float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0
    total_bytes, used_bytes, free_bytes = map(parse_mebibytes, (total, used, free))
    gpu_processes = tuple(processes.get(uuid, ()))
    return Gpu(index, uuid, ", ".join(name), capability_number, total_bytes, used_bytes, free_bytes, gpu_processes)


def parse_processes(stdout: str) -> dict[str, list[GpuProcess]]:
    """Return the processes of each GPU's uuid from the output of nvidia-smi."""
    processes: dict[str, list[GpuProcess]] = {}
    for fields in (re.split(r", *", line.strip(), maxsplit=3) for line in stdout.splitlines()):
        if len(fields) == 4:
            uuid, pid, memory, name = fields
            processes.setdefault(uuid, []).append(GpuProcess(pid, name, parse_mebibytes(memory)))
    return processes


def parse_mebibytes(value: str) -> int | None:
    """Return the bytes of a number of mebibytes; None for [N/A] and the like."""
    return int(value) << 20 if value.isdecimal() else None


def last_output_line(result: CommandResult) -> str:
    """Return the last line of output that is not empty: it usually says why a program failed."""
    lines = [line.strip() for line in (result.stdout + "\n" + result.stderr).splitlines() if line.strip()]
    return printable_line(lines[-1]) if lines else "no output"


def find_train_location(runner: CommandRunner = run_command, engine: str = "docker") -> TrainLocation:
    """Ask setup/container.py where `make train` would run with `engine`: docker or podman.

    It prints one word on stdout and `train: natively (why)` on stderr.
    """
    result = runner([sys.executable, str(CONTAINER_SCRIPT), "where", f"ENGINE={engine}", "--", "train"])
    place, reason = result.stdout.strip(), re.search(r"\((.*)\)$", result.stderr.strip())
    if result.state == "ok" and place in ("image", "native") and reason:
        return TrainLocation(place, reason[1])
    return TrainLocation(
        "", "timeout" if result.state == "hangs" else last_output_line(CommandResult(result.state, "", result.stderr))
    )


def has_torch() -> bool:
    """Return whether this Python has the libraries that train; the doctor also runs before they are installed."""
    return importlib.util.find_spec("torch") is not None


def total_memory() -> int:
    """Return the bytes of main memory; in a container those that it may use."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *linux.memory_limits()])


def format_gb(size: float | None) -> str:
    """Return a number of bytes as text in GB (1e9 bytes)."""
    if size is None:
        return "an unknown amount"
    return f"{size / 1e9:.0f} GB" if size >= 10e9 else f"{size / 1e9:.1f} GB"
