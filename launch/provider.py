"""What a provider is: a place where `make` runs a job for us, and goes on running when nobody watches.

The job is always the same `make train`, which resumes from its records. So a provider needs no command of its own for
resuming, and one that loses its instance can start the same job on another.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from common.errors import UserError


class Lost(UserError):
    """The connection was lost or could not be made. The job there goes on, and a retry may succeed."""


class Missing(UserError):
    """A file or folder does not exist at the provider."""


@dataclass(frozen=True)
class Offer:
    """A type of instance that a provider rents."""

    name: str
    """The provider's name for it."""
    card: str
    """Name of its GPU, which configs/gpus.csv may know; empty for an instance without a GPU."""
    dollars: float | None
    """Price of an hour; None when it is not known."""
    disk: int | None = None
    """Bytes; None when the disk is made as large as the job requests."""


@dataclass(frozen=True)
class Machine:
    """What a provider has: one machine of yours, or the types of instances that it rents."""

    system: str
    """Such as 'Linux x86_64'."""
    free: int
    """Free bytes on the disk where the job's folder is or will be."""
    cards: tuple[str, ...] = ()
    """Names of its NVIDIA GPUs."""
    lacks: tuple[str, ...] = ()
    """Programs that a job needs and that are not installed."""
    offers: tuple[Offer, ...] = ()
    """The types of instances that can be rented; empty for a machine of yours."""
    unwritable: str = ""
    """The folder in which the job's folder would be made, when nothing can be written there."""


@dataclass(frozen=True)
class Order:
    """The instance that a job asks for."""

    offer: Offer
    hours: float
    """The job's time limit."""
    disk: int
    """Bytes that the job needs."""
    image: str
    """An image in a container registry."""
    spot: bool = False
    """Whether the provider may take the instance away at any time."""

    @property
    def seconds(self) -> int:
        """Return the time limit in seconds."""
        return round(3600 * self.hours)

    @property
    def most(self) -> float | None:
        """Return the cost of a job that runs until its time limit; None when the price is not known."""
        return None if self.offer.dollars is None else self.hours * self.offer.dollars


@dataclass(frozen=True)
class State:
    """The state of a job."""

    word: str = "absent"
    """'absent', 'running', 'ended', or 'died': ended without an exit code, as when the machine was switched off."""
    code: int | None = None
    """Exit code of the job's make, once it has ended."""
    goal: str = ""
    """The make target that the job runs."""
    config: str = ""
    """sha256 of the config that was sent."""
    commit: str = ""
    log: int | None = 0
    """Size of the job's log in bytes; None when it is not known."""
    why: str = ""
    """How the job ended, in the provider's words."""


@dataclass(frozen=True)
class Job:
    """One run and all that it needs."""

    name: str
    """Name of the job's folder at the provider."""
    run: str
    """RUN= of the job's make."""
    repository: Path
    """The git repository that has the commit."""
    commit: str
    url: str | None
    """The address that the repository was cloned from."""
    config: str
    """The resolved config as YAML."""
    files: dict[str, Path] = field(default_factory=dict)
    """Path in the sent tree -> local file, for the files that the config names and the commit does not contain."""
    settings: tuple[str, ...] = ()
    """Further settings of the job's make."""
    order: Order | None = None
    """The instance to rent; None where the job runs on a machine of yours."""


def program(variable: str, otherwise: str) -> list[str]:
    """Return the words of a command that an environment variable may replace.

    Raises UserError when no shell could read the variable, such as for a quotation that is not closed.
    """
    try:
        return shlex.split(os.environ.get(variable) or otherwise) or [otherwise]
    except ValueError as error:
        raise UserError(f"{variable} cannot be read: {error}", f"correct {variable}, or unset it") from None


class Launcher(Protocol):
    """A place where jobs run.

    Every method raises ConnectionLost when the provider cannot be reached now, and UserError for what a retry does not
    cure.
    """

    where: str
    """Name for messages, such as 'you@host' or 'SkyPilot on aws'."""
    ours: bool
    """Whether it is this machine. Then Ctrl-C ends the job too."""
    rented: bool
    """Whether an instance is rented for each job and given back after it. Then only what is on the Hub stays."""

    def look(self) -> Machine:
        """Return the machine, or the types of instances that can be rented."""

    def state(self, name: str) -> State:
        """Return the state of the job."""

    def send(self, job: Job) -> None:
        """Send the tree, the config and all files into the job's folder; what is there already is not sent again."""

    def start(self, job: Job, goal: str, secrets: dict[str, str]) -> None:
        """Start `make <goal>`, detached, with these environment variables; do nothing when the job runs already."""

    def follow(self, name: str, seen: int, out: Callable[[bytes], object]) -> None:
        """Pass the job's log from this offset on to `write`, until the job's make ends."""

    def rest(self, name: str, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield a file of the job's folder from this offset on. Raises RemoteFileMissing."""

    def pack(self, name: str, run: str) -> Iterator[bytes]:
        """Yield a tar of what the run made, without the 16-bit weights. Raises RemoteFileMissing."""

    def stop(self, name: str) -> None:
        """Tell the job to write its state and end."""

    def teardown(self, name: str) -> str | None:
        """Return the command that gives back what was rented for the job.

        None when nothing was rented, or when the provider takes it back by itself.
        """

    def bill(self, name: str, running: bool) -> str:
        """Return a sentence on what still costs money, and on where the job's files are."""
