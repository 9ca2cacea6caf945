"""What the machine that trains is: its driver, its cards and who uses them, its memory, where `make train` would run.

Facts only; pipeline/preflight judges them.
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

PATIENCE = (
    30  # seconds; without persistence mode each nvidia-smi wakes all cards first, with eight of them 10 s and more
)
CONTAINER = Path(__file__).parents[2] / "setup" / "container.py"
CSV = "--format=csv,noheader,nounits"
# The name may hold anything but stands between fields that do not; a process's stands last.
CARDS = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,compute_cap,memory.total,memory.used,memory.free,driver_version",
    CSV,
)
USERS = ("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory,process_name", CSV)


@dataclass(frozen=True)
class Said:
    """What a command said."""

    state: str
    """'ok', 'absent', 'failed' or 'hangs'."""
    out: str = ""
    err: str = ""


@dataclass(frozen=True)
class User:
    """A process on a card. memory: bytes; None where it is not told (in a container)."""

    pid: str
    name: str
    memory: int | None


@dataclass(frozen=True)
class Card:
    """Memory in bytes; None where the driver does not tell it."""

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
    """What nvidia-smi tells."""

    state: str
    """Of Said: 'ok', 'absent', 'failed' or 'hangs'."""
    words: str = ""
    """Its own, where it failed."""
    driver: str = ""
    cuda: tuple[int, int] | None = None
    """The newest that the driver runs; None: it does not say."""
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True)
class Where:
    """Where `make train` would run, as setup/container.py says: 'image', 'native' or '' (no answer), and why."""

    word: str
    why: str

    @property
    def container(self) -> bool:
        """Is this machine one itself?"""
        return "itself a container" in self.why


Ask = Callable[..., Said]
"""ask(command, patience=PATIENCE)"""


def ask(command: Sequence[str], patience: float = PATIENCE) -> Said:
    """Run a command. One that hangs is killed with all that it started, and not waited for.

    (A process that waits for a driver does not die, and subprocess.run would wait with it.)
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
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
    """Driver and cards. Old drivers do not know every field, so the banner is asked first: it says how old they are."""
    banner = ask(["nvidia-smi"])
    if banner.state != "ok":
        return Nvidia(banner.state, last(banner))
    # `Driver Version: 580.95.05  CUDA Version: 13.0`; from 610 on `KMD Version: ...  CUDA UMD Version: ...`.
    driver = re.search(r"(?:Driver|KMD) Version: *([\d.]+)", banner.out)
    cuda = re.search(r"CUDA.*Version: *(\d+)\.(\d+)", banner.out)
    listed = ask(CARDS)
    lines = listed.out.splitlines() if listed.state == "ok" else []
    return Nvidia(
        listed.state, last(listed) if listed.state != "ok" else "", driver[1] if driver else "",
        (int(cuda[1]), int(cuda[2])) if cuda else None, tuple(cards(lines, users(ask(USERS).out) if lines else {})),
    )  # fmt: skip


def cards(lines: list[str], users: dict[str, list[User]]) -> list[Card]:
    """From nvidia-smi's lines."""
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
    """The processes of each card's uuid."""
    found: dict[str, list[User]] = {}
    for fields in (re.split(r", *", line.strip(), maxsplit=3) for line in said.splitlines()):
        if len(fields) == 4:
            uuid, pid, memory, name = fields
            found.setdefault(uuid, []).append(User(pid, name, mebibytes(memory)))
    return found


def mebibytes(value: str) -> int | None:
    """Bytes; None for [N/A] and the like."""
    return int(value) << 20 if value.isdecimal() else None


def last(said: Said) -> str:
    """The last line that is not empty: where a program says why it failed."""
    lines = [line.strip() for line in (said.out + "\n" + said.err).splitlines() if line.strip()]
    return shown(lines[-1]) if lines else "it says nothing"


def where(ask: Ask = ask, engine: str = "docker") -> Where:
    """setup/container.py's decision: its word on stdout, `train: natively (why)` on stderr."""
    said = ask([sys.executable, str(CONTAINER), "where", f"ENGINE={engine}", "--", "train"])
    word, why = said.out.strip(), re.search(r"\((.*)\)$", said.err.strip())
    if said.state == "ok" and word in ("image", "native") and why:
        return Where(word, why[1])
    return Where("", "it hangs" if said.state == "hangs" else last(Said(said.state, "", said.err)))


def is_set_up() -> bool:
    """Whether this Python has the libraries that train; the doctor also runs before they are there."""
    return importlib.util.find_spec("torch") is not None


def memory() -> int:
    """Bytes of this machine; in a container what it may have."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *linux.limits()])


def gb(bytes: float | None) -> str:
    """1 GB = 1e9 bytes."""
    if bytes is None:
        return "an unknown amount"
    return f"{bytes / 1e9:.0f} GB" if bytes >= 10e9 else f"{bytes / 1e9:.1f} GB"
