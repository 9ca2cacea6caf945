"""Watching a job: its log onto this terminal and into a file, through lost connections, until it ends."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from contract import hub
from contract.errors import UserError
from launch.launcher import Launcher, Lost, State

PAUSE = 5  # seconds between two tries to reach a box again, at first
LONGEST = 30


class Running(UserError):
    """The job goes on, and we no longer watch."""


def patience() -> float:
    """Seconds without a connection after which watching is given up: $FERRY_SSH_SECONDS, by default 15 minutes."""
    return float(os.environ.get("FERRY_SSH_SECONDS") or 900)


def through(launcher: Launcher, name: str, log: Path) -> State:
    """Watch the job to its end; what the log holds already is not shown again. log: grows here as it does there.

    Raises Running when the place cannot be reached for longer than `patience()`. Ctrl-C ends the watching, and a job on this
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
    lost_at, pause = 0.0, PAUSE
    with log.open("ab") as copy:

        def out(block: bytes) -> None:
            nonlocal lost_at, pause
            lost_at, pause = 0.0, PAUSE
            copy.write(block)
            copy.flush()
            shown(block)

        while True:
            try:
                state = launcher.state(name)
                if state.log < copy.tell():  # another machine, or its folder was removed
                    copy.truncate(0)
                if state.word != "running":
                    for block in launcher.rest(name, "job/log", copy.tell()):
                        out(block)
                    return state
                launcher.follow(name, copy.tell(), out)
                time.sleep(0.2)  # make is gone, and the job is about to say so
            except Lost as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > patience():
                    raise Running(f"{error.message}; the job may go on there", error.hint) from error
                hub.say(f"{error.message}; the job goes on there; again in {pause} s")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST)
            except UserError as error:
                raise Running(f"{error.message}; the job may go on there", error.hint) from error


def shown(block: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def patient(what: str) -> Iterator[None]:
    """For what comes after the job: nothing of ours runs there any more, so one error is enough."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{what}: {error}", "read the log above; the same command goes on from where it stands"
        ) from error
