"""What a launcher is: a place where `make` runs for us, and goes on running when nobody looks.

The job there is always the same `make train`, which goes on from its records; so a launcher needs no word of its own for
"resume", and one that loses its machine can start the same job on another.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from common.errors import UserError


class Lost(UserError):
    """The connection ended or did not come about; what runs there goes on, and another try may find it."""


class Missing(UserError):
    """There is no such file or folder there."""


@dataclass(frozen=True)
class Offer:
    """A kind of machine that can be had."""

    name: str
    """As who offers it calls it."""
    card: str
    """As configs/gpus.csv may know it; empty: it has none."""
    dollars: float | None
    """An hour; None: not known."""
    disk: int | None = None
    """Bytes; None: as much as is asked for."""


@dataclass(frozen=True)
class Machine:
    """What is there."""

    system: str
    """Such as 'Linux x86_64'."""
    free: int
    """Bytes of disk, where the job's folder is or will be."""
    cards: tuple[str, ...] = ()
    """Names of its NVIDIA cards."""
    lacks: tuple[str, ...] = ()
    """Programs that a job needs and that are not there."""
    offers: tuple[Offer, ...] = ()
    """Instead of one that is there: those that can be had."""
    unwritable: str = ""
    """The folder where the job's would be made, when nothing can be written there."""


@dataclass(frozen=True)
class Order:
    """The machine that a job asks for."""

    offer: Offer
    hours: float
    """The job's time limit."""
    disk: int
    """Bytes that it needs."""
    image: str
    """Of a container registry."""
    spot: bool = False
    """May be taken away at any time."""

    @property
    def seconds(self) -> int:
        """The time limit."""
        return round(3600 * self.hours)

    @property
    def most(self) -> float | None:
        """Dollars at the time limit."""
        return None if self.offer.dollars is None else self.hours * self.offer.dollars


@dataclass(frozen=True)
class State:
    """Of a job."""

    word: str = "absent"
    """'absent', 'running', 'ended', or 'died': ended without a word, as when the machine was switched off."""
    code: int | None = None
    """Exit code of its make, when it ended."""
    goal: str = ""
    config: str = ""
    """sha256 of the config that was sent."""
    commit: str = ""
    log: int | None = 0
    """Bytes, where they are known."""
    why: str = ""
    """How it ended, in the words of who runs it."""


@dataclass(frozen=True)
class Job:
    """One run, all that it needs."""

    name: str
    """Of its folder there."""
    run: str
    """RUN= of its make."""
    repository: Path
    """Of git, which has the commit."""
    commit: str
    url: str | None
    """Where that repository came from."""
    config: str
    """YAML, resolved."""
    files: dict[str, Path] = field(default_factory=dict)
    """Where it is to lie in the tree -> the local file: what the config names and the commit does not hold."""
    settings: tuple[str, ...] = ()
    """More settings of its make."""
    order: Order | None = None
    """The machine, where one is rented for it."""


def program(variable: str, otherwise: str) -> list[str]:
    """The words of a command that the user may name by an environment variable. Raises UserError for what no shell reads."""
    try:
        return shlex.split(os.environ.get(variable) or otherwise) or [otherwise]
    except ValueError as error:
        raise UserError(f"{variable} cannot be read: {error}", f"correct {variable}, or unset it") from None


class Launcher(Protocol):
    """Every method raises Lost when the place cannot be reached now, UserError for what another try does not mend."""

    where: str
    """For messages."""
    ours: bool
    """Is it this machine? Then Ctrl-C means the job, too."""
    rented: bool
    """Is a machine rented for each job, and given back after it? Then what stays is on the Hub."""

    def look(self) -> Machine: ...

    def state(self, name: str) -> State: ...

    def send(self, job: Job) -> None:
        """Tree, config and files into the job's folder, whole; what is there already is not sent again."""

    def start(self, job: Job, goal: str, secrets: dict[str, str]) -> None:
        """Start `make <goal>`, detached; nothing happens when the job runs already. secrets: of its environment."""

    def follow(self, name: str, seen: int, out: Callable[[bytes], object]) -> None:
        """Its log from byte `seen` on, until its make ends."""

    def rest(self, name: str, path: str, start: int = 0) -> Iterator[bytes]:
        """A file of the job's folder, from byte `start` on. Raises Missing."""

    def pack(self, name: str, run: str) -> Iterator[bytes]:
        """A tar of what the run made, without the 16-bit weights. Raises Missing."""

    def stop(self, name: str) -> None:
        """Tell the job to write its state and end."""

    def teardown(self, name: str) -> str | None:
        """The command that gives back what was rented for it; None: nothing was, or it goes by itself."""

    def bill(self, name: str, running: bool) -> str:
        """What costs money as long as it is there, and what holds what."""
