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


class ConnectionLost(UserError):
    """The connection was lost or could not be made. The job there goes on, and a retry may succeed."""


class RemoteFileMissing(UserError):
    """A file or folder does not exist at the provider."""


@dataclass(frozen=True)
class InstanceType:
    """A type of instance that a provider rents."""

    name: str
    """The provider's name for it."""
    gpu_name: str
    """Name of its GPU, which configs/gpus.csv may know; empty for an instance without a GPU."""
    dollars_per_hour: float | None
    """Price of an hour; None when it is not known."""
    disk_bytes: int | None = None
    """Bytes; None when the disk is made as large as the job requests."""


@dataclass(frozen=True)
class Machine:
    """What a provider has: one machine of yours, or the types of instances that it rents."""

    system: str
    """Such as 'Linux x86_64'."""
    free_bytes: int
    """Free bytes on the disk where the job's folder is or will be."""
    gpu_names: tuple[str, ...] = ()
    """Names of its NVIDIA GPUs."""
    missing_programs: tuple[str, ...] = ()
    """Programs that a job needs and that are not installed."""
    instance_types: tuple[InstanceType, ...] = ()
    """The types of instances that can be rented; empty for a machine of yours."""
    unwritable_folder: str = ""
    """The folder in which the job's folder would be made, when nothing can be written there."""


@dataclass(frozen=True)
class InstanceRequest:
    """The instance that a job asks for."""

    instance_type: InstanceType
    hours: float
    """The job's time limit."""
    disk_bytes: int
    """Bytes that the job needs."""
    image: str
    """An image in a container registry."""
    spot: bool = False
    """Whether the provider may take the instance away at any time."""

    @property
    def timeout_seconds(self) -> int:
        """Return the time limit in seconds."""
        return round(3600 * self.hours)

    @property
    def max_dollars(self) -> float | None:
        """Return the cost of a job that runs until its time limit; None when the price is not known."""
        return None if self.instance_type.dollars_per_hour is None else self.hours * self.instance_type.dollars_per_hour


@dataclass(frozen=True)
class JobState:
    """The state of a job."""

    status: str = "absent"
    """'absent', 'running', 'ended', or 'died': ended without an exit code, as when the machine was switched off."""
    exit_code: int | None = None
    """Exit code of the job's make, once it has ended."""
    goal: str = ""
    """The make target that the job runs."""
    config_sha256: str = ""
    """sha256 of the config that was sent."""
    commit: str = ""
    log_bytes: int | None = 0
    """Size of the job's log in bytes; None when it is not known."""
    reason: str = ""
    """How the job ended, in the provider's words."""


@dataclass(frozen=True)
class Job:
    """One run and all that it needs."""

    name: str
    """Name of the job's folder at the provider."""
    run_name: str
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
    instance_request: InstanceRequest | None = None
    """The instance to rent; None where the job runs on a machine of yours."""


def command_words(variable: str, default: str) -> list[str]:
    """Return the words of a command that an environment variable may replace.

    Raise UserError when no shell could read the variable, such as for a quotation that is not closed.
    """
    try:
        return shlex.split(os.environ.get(variable) or default) or [default]
    except ValueError as error:
        raise UserError(
            f"{variable} is not a valid command line: {error}",
            f"fix {variable}, or unset it",
            code="environment.invalid_command",
        ) from None


class Provider(Protocol):
    """A place where jobs run.

    Every method raises ConnectionLost when the provider cannot be reached now, and UserError for what a retry does not
    cure.
    """

    label: str
    """Name for messages, such as 'you@host' or 'SkyPilot on aws'."""
    is_local: bool
    """Whether it is this machine. Then Ctrl-C ends the job too."""
    is_rented: bool
    """Whether an instance is rented for each job and given back after it. Then only what is on the Hub stays."""

    @property
    def checkpoints(self) -> str | None:
        """Return owner/name of the repo that gets a rented instance's checkpoints; None for a machine of yours."""

    def inspect_machine(self) -> Machine:
        """Return the machine, or the types of instances that can be rented."""

    def read_job_state(self, job_name: str) -> JobState:
        """Return the state of the job."""

    def send_job(self, job: Job) -> None:
        """Send the tree, the config and all files into the job's folder; what is there already is not sent again."""

    def start_job(self, job: Job, goal: str, environment: dict[str, str]) -> None:
        """Start `make <goal>`, detached, with these environment variables; do nothing when the job runs already."""

    def follow_log(self, job_name: str, offset: int, write: Callable[[bytes], object]) -> None:
        """Pass the job's log from this offset on to `write`, until the job's make ends."""

    def read_file(self, job_name: str, path: str, offset: int = 0) -> Iterator[bytes]:
        """Yield a file of the job's folder from this offset on. Raise RemoteFileMissing."""

    def pack_run(self, job_name: str, run_name: str) -> Iterator[bytes]:
        """Yield a tar of what the run made, without the 16-bit weights. Raise RemoteFileMissing."""

    def stop_job(self, job_name: str) -> None:
        """Tell the job to write its state and end."""

    def teardown_command(self, job_name: str) -> str | None:
        """Return the command that gives back what was rented for the job.

        None when nothing was rented, or when the provider takes it back by itself.
        """

    def describe_costs(self, job_name: str, is_running: bool) -> str:
        """Return a sentence on what still costs money, and on where the job's files are."""
