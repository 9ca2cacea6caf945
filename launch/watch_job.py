"""Watching a job: its log onto this terminal and into a file, through lost connections, until it ends."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from common import hub
from common.errors import UserError
from launch.provider import Launcher, Lost, State

PAUSE = 5  # seconds between two tries to reach a box again, at first
LONGEST = 30


class Running(UserError):
    """The job goes on, and we no longer watch."""


class Patience:
    """Tries again with growing pauses, $FERRY_SSH_SECONDS long (15 minutes)."""

    def __init__(self):
        self.since, self.pause = time.monotonic(), PAUSE
        self.limit = hub.seconds_of("FERRY_SSH_SECONDS", 900)

    def for_another_try(self, error: Lost) -> None:
        """Raises `error` when it has lasted too long."""
        if time.monotonic() - self.since > self.limit:
            raise error
        hub.say(f"{error.message}; again in {self.pause} s")
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, LONGEST)


def through(launcher: Launcher, name: str, log: Path) -> State:
    """Watch the job to its end; what the log holds already is not shown again. log: grows here as it does there.

    Raises Running when the place cannot be reached for too long. Ctrl-C ends the watching, and a job on this
    machine with it.
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
                if state := _once(launcher, name, copy, out):
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
    """Its log from where the copy ends, until it ends or the connection does. None: it may run yet."""
    state = launcher.state(name)
    if state.word == "absent":
        return state
    if state.log is not None and state.log < copy.tell():  # another one's, that lay here
        copy.truncate(0)
        copy.seek(0)
    if state.word != "running":
        for block in launcher.rest(name, "job/log", copy.tell()):
            out(block)
        return state
    launcher.follow(name, copy.tell(), out)
    time.sleep(0.2)  # it says how it ended a moment after it has
    return None


def shown(block: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()
