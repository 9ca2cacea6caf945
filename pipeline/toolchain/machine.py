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
from common.errors import shown

# Seconds. Without persistence mode each nvidia-smi first wakes all GPUs: 10 s and more with eight of them.
PATIENCE = 30
CONTAINER = Path(__file__).parents[2] / "setup" / "container.py"
CSV = "--format=csv,noheader,nounits"
# The name of a GPU may contain anything, but it is between fields that do not; the name of a process is the last field.
CARDS = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,compute_cap,memory.total,memory.used,memory.free,driver_version",
    CSV,
)
USERS = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory,process_name", CSV)


@dataclass(frozen=True)
class Said:
    """The output of a command, and how it ended."""

    state: str
    """'ok', 'absent', 'failed' or 'hangs'."""
    out: str = ""
    err: str = ""


@dataclass(frozen=True)
class User:
    """A process on a GPU."""

    pid: str
    name: str
    memory: int | None
    """None where the driver does not report it (in a container)."""


@dataclass(frozen=True)
class Card:
    """A GPU. Its memory is None where the driver does not report it."""

    index: str
    uuid: str
    name: str
    capability: float
    total: int | None
    used: int | None
    free: int | None
    users: tuple[User, ...] = ()


@dataclass(frozen=True)
class Nvidia:
    """What nvidia-smi reports."""

    state: str
    """The state of the CommandResult: 'ok', 'absent', 'failed' or 'hangs'."""
    words: str = ""
    """Its last line, where it failed."""
    driver: str = ""
    cuda: tuple[int, int] | None = None
    """The newest CUDA version that the driver runs; None where it does not report one."""
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True)
class Where:
    """Where `make train` would run, as setup/container.py decides: 'image', 'native' or '' (no answer), and why."""

    word: str
    why: str

    @property
    def container(self) -> bool:
        """Whether this machine is itself a container."""
        return "itself a container" in self.why


Ask = Callable[..., Said]
"""A function such as `run_command`: (command, timeout=COMMAND_TIMEOUT) -> CommandResult."""


def ask(command: Sequence[str], patience: float = PATIENCE) -> Said:
    """Run a command and return its output.

    A command that hangs is killed with all processes that it started, and is not waited for: a process that waits for a
    driver does not die, and subprocess.run would wait for it.

    Args:
        command: The program and its arguments.
        timeout: Seconds.
    """
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
        return Said("absent")
    try:
        out, err = process.communicate(timeout=patience)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        if isinstance(error, subprocess.TimeoutExpired):
            return Said(
                "hangs", *(part.decode(errors="replace") if part else "" for part in (error.stdout, error.stderr))
            )
        raise  # Ctrl-C, above all
    return Said("ok" if process.returncode == 0 else "failed", out, err)


def nvidia(ask: Ask = ask) -> Nvidia:
    """Return the driver and the GPUs as nvidia-smi reports them.

    Old drivers do not support every field of the query, so the banner is read first: it has their version.
    """
    banner = ask(["nvidia-smi"])
    if banner.state != "ok":
        return Nvidia(banner.state, last(banner))
    # `Driver Version: 580.95.05  CUDA Version: 13.0`; from driver 610 on `KMD Version: ...  CUDA UMD Version: ...`.
    driver = re.search(r"(?:Driver|KMD) Version: *([\d.]+)", banner.out)
    cuda = re.search(r"CUDA.*Version: *(\d+)\.(\d+)", banner.out)
    listed = ask(CARDS)
    lines = listed.out.splitlines() if listed.state == "ok" else []
    return Nvidia(
        listed.state,
        last(listed) if listed.state != "ok" else "",
        driver[1] if driver else "",
        (int(cuda[1]), int(cuda[2])) if cuda else None,
        tuple(cards(lines, users(ask(USERS).out) if lines else {})),
    )


def cards(lines: list[str], users: dict[str, list[User]]) -> list[Card]:
    """Return the GPUs from the lines of nvidia-smi; `processes` has the processes of each GPU's uuid."""
    found = []
    for fields in (re.split(r", *", line.strip()) for line in lines):
        if len(fields) < 8:
            continue
        index, uuid, *name, capability, total, used, free, _ = fields
        known = float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0
        memory = [mebibytes(value) for value in (total, used, free)]
        found.append(Card(index, uuid, ", ".join(name), known, *memory, tuple(users.get(uuid, ()))))
    return found


def users(said: str) -> dict[str, list[User]]:
    """Return the processes of each GPU's uuid from the output of nvidia-smi."""
    found: dict[str, list[User]] = {}
    for fields in (re.split(r", *", line.strip(), maxsplit=3) for line in said.splitlines()):
        if len(fields) == 4:
            uuid, pid, memory, name = fields
            found.setdefault(uuid, []).append(User(pid, name, mebibytes(memory)))
    return found


def mebibytes(value: str) -> int | None:
    """Return the bytes of a number of mebibytes; None for [N/A] and the like."""
    return int(value) << 20 if value.isdecimal() else None


def last(said: Said) -> str:
    """Return the last line of output that is not empty: it usually says why a program failed."""
    lines = [line.strip() for line in (said.out + "\n" + said.err).splitlines() if line.strip()]
    return shown(lines[-1]) if lines else "it says nothing"


def where(ask: Ask = ask, engine: str = "docker") -> Where:
    """Ask setup/container.py where `make train` would run.

    It prints one word on stdout and `train: natively (why)` on stderr.

    Args:
        runner: What runs the command.
        engine: docker or podman.
    """
    said = ask([sys.executable, str(CONTAINER), "where", f"ENGINE={engine}", "--", "train"])
    word, why = said.out.strip(), re.search(r"\((.*)\)$", said.err.strip())
    if said.state == "ok" and word in ("image", "native") and why:
        return Where(word, why[1])
    return Where("", "it hangs" if said.state == "hangs" else last(Said(said.state, "", said.err)))


def is_set_up() -> bool:
    """Return whether this Python has the libraries that train; the doctor also runs before they are installed."""
    return importlib.util.find_spec("torch") is not None


def memory() -> int:
    """Return the bytes of main memory; in a container those that it may use."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *linux.limits()])


def gb(bytes: float | None) -> str:
    """Return a number of bytes as text in GB (1e9 bytes)."""
    if bytes is None:
        return "an unknown amount"
    return f"{bytes / 1e9:.0f} GB" if bytes >= 10e9 else f"{bytes / 1e9:.1f} GB"
