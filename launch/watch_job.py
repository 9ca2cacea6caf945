"""Watch a job: copy its log to this terminal and into a file, through lost connections, until the job ends."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from common import hub
from common.errors import UserError
from launch.provider import Launcher, Lost, State

PAUSE = 5  # seconds between the first two tries to reach a provider again
LONGEST = 30


class Running(UserError):
    """The job may still run, but this command no longer watches it."""


class Patience:
    """Waits between retries, with growing pauses, for up to $FERRY_SSH_SECONDS (by default 15 minutes)."""

    def __init__(self):
        self.since, self.pause = time.monotonic(), PAUSE
        self.limit = hub.seconds_of("FERRY_SSH_SECONDS", 900)

    def for_another_try(self, error: Lost) -> None:
        """Report `error` and pause before the next try. Raises `error` when the time limit has passed."""
        if time.monotonic() - self.since > self.limit:
            raise error
        hub.say(f"{error.message}; again in {self.pause} s")
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, LONGEST)


def through(launcher: Launcher, name: str, log: Path) -> State:
    """Watch the job until it ends and return its state.

    What `log` already contains is not shown again. Ctrl-C ends the watching; a job on this machine is stopped too.

    Args:
        provider: Where the job runs.
        job_name: The job's.
        log: The local copy of the job's log; it grows as the job's own one does.

    Raises:
        JobStillRunning: The provider could not be reached for too long.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _watched(launcher, name, log)
    except KeyboardInterrupt:
        if launcher.ours:
            launcher.stop(name)
            hub.say("stopping: the stage in progress writes its state")
            return _watched(launcher, name, log)
        raise


def _watched(launcher: Launcher, name: str, log: Path) -> State:
    """Copy the job's log until the job ends, and retry after each lost connection."""
    waiting: Patience | None = None
    with log.open("ab") as copy:

        def out(block: bytes) -> None:
            nonlocal waiting
            waiting = None
            copy.write(block)
            copy.flush()
            shown(block)

        while True:
            try:
                state = _once(launcher, name, copy, out)
                if state:
                    return state
                waiting = None
            except Lost as error:
                waiting = waiting or Patience()
                try:
                    waiting.for_another_try(error)
                except Lost:
                    raise Running(f"{error.message}; the job may go on there", error.hint) from error
            except UserError as error:
                raise Running(f"{error.message}; the job may go on there", error.hint) from error


def _once(launcher: Launcher, name: str, copy: IO[bytes], out: Callable[[bytes], None]) -> State | None:
    """Pass on the job's log from where the copy ends, until the job or the connection ends.

    Return the state of a job that has ended, or None when it may still run.
    """
    state = launcher.state(name)
    if state.word == "absent":
        return state
    if state.log is not None and state.log < copy.tell():  # the copy is the log of an earlier job
        copy.truncate(0)
        copy.seek(0)
    if state.word != "running":
        for block in launcher.rest(name, "job/log", copy.tell()):
            out(block)
        return state
    launcher.follow(name, copy.tell(), out)
    time.sleep(0.2)  # the exit code is written a moment after the job has ended
    return None


def shown(block: bytes) -> None:
    """Write bytes of the log to stdout."""
    sys.stdout.flush()
    sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()
