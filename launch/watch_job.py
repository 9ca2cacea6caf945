"""Watch a job: copy its log to this terminal and into a file, through lost connections, until the job ends."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from common import hub
from common.errors import UserError
from launch.provider import ConnectionLost, JobState, Provider

FIRST_PAUSE = 5  # seconds between the first two tries to reach a provider again
LONGEST_PAUSE = 30


class JobStillRunning(UserError):
    """The job may still run, but this command no longer watches it."""


class RetryTimer:
    """Waits between retries, with growing pauses, for up to $FERRY_SSH_SECONDS (by default 15 minutes)."""

    def __init__(self) -> None:
        self.start, self.next_pause = time.monotonic(), FIRST_PAUSE
        self.max_seconds = hub.seconds_from_environment("FERRY_SSH_SECONDS", 900)

    def pause_or_raise(self, error: ConnectionLost) -> None:
        """Report `error` and pause before the next try. Raises `error` when the time limit has passed."""
        if time.monotonic() - self.start > self.max_seconds:
            raise error
        hub.print_message(f"{error.message}; retrying in {self.next_pause} s")
        time.sleep(self.next_pause)
        self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE)


def watch_until_end(provider: Provider, job_name: str, log: Path) -> JobState:
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
        return _copy_log_until_end(provider, job_name, log)
    except KeyboardInterrupt:
        if provider.is_local:
            provider.stop_job(job_name)
            hub.print_message("stopping: the current stage saves its state")
            return _copy_log_until_end(provider, job_name, log)
        raise


def _copy_log_until_end(provider: Provider, job_name: str, log: Path) -> JobState:
    """Copy the job's log until the job ends, and retry after each lost connection."""
    retry_timer: RetryTimer | None = None
    with log.open("ab") as log_copy:

        def write_block(block: bytes) -> None:
            nonlocal retry_timer
            retry_timer = None
            write_log_block(block, log_copy)

        while True:
            try:
                state = _copy_log_once(provider, job_name, log_copy, write_block)
                if state:
                    return state
                retry_timer = None
            except ConnectionLost as error:
                retry_timer = retry_timer or RetryTimer()
                _pause_or_give_up(retry_timer, error)
            except UserError as error:
                raise job_still_running(error) from error


def _pause_or_give_up(retry_timer: RetryTimer, error: ConnectionLost) -> None:
    try:
        retry_timer.pause_or_raise(error)
    except ConnectionLost:
        raise job_still_running(error) from error


def job_still_running(error: UserError) -> JobStillRunning:
    """Return the error for a job that can no longer be watched because of `error`."""
    return JobStillRunning(f"{error.message}; the job may still be running there", error.hint, code=error.code)


def _copy_log_once(
    provider: Provider, job_name: str, log_copy: IO[bytes], write_block: Callable[[bytes], None]
) -> JobState | None:
    """Pass on the job's log from where the copy ends, until the job or the connection ends.

    Return the state of a job that has ended, or None when it may still run.
    """
    state = provider.read_job_state(job_name)
    if state.status == "absent":
        return state
    if state.log_bytes is not None and state.log_bytes < log_copy.tell():  # the copy is the log of an earlier job
        log_copy.truncate(0)
        log_copy.seek(0)
    if state.status != "running":
        for block in provider.read_file(job_name, "job/log", log_copy.tell()):
            write_block(block)
        return state
    provider.follow_log(job_name, log_copy.tell(), write_block)
    time.sleep(0.2)  # the exit code is written a moment after the job has ended
    return None


def write_log_block(block: bytes, log_copy: IO[bytes]) -> None:
    """Write bytes of the log to its copy and to stdout."""
    log_copy.write(block)
    log_copy.flush()
    sys.stdout.flush()
    sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()
