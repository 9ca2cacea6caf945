"""Push the state of a run to the Hub in the background: after a checkpoint, at a signal, and after each stage.

$FERRY_CHECKPOINTS names the repo (`make train CHECKPOINTS=`); without it nothing is sent.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from common import console, hub
from pipeline.run.run_folder import Run

REPO_VARIABLE = "FERRY_CHECKPOINTS"
# Seconds that a push may take after a signal: setup/container.py raises the time limit of docker stop to 120 seconds,
# and a spot instance often has that long.
GRACE_SECONDS = 100
CLIENT_ERROR_CODE = 3  # exit code of push.py: the Hub client failed in an unknown way
PUSH_TIMEOUT = 900  # seconds after which a push is given up


def checkpoint_repo() -> str | None:
    """Return owner/name from the environment, with {run} and {user} not filled in yet; None when it is not set."""
    return os.environ.get(REPO_VARIABLE) or None


class CheckpointSync:
    """Sends checkpoints one at a time, in a process beside the training.

    minutes: the least time between the starts of two pushes.
    """

    def __init__(self, run: Run, repo: str | None, minutes: float):
        self.run, self.repo, self.min_seconds = run, repo, 60 * minutes
        self.process: subprocess.Popen | None = None
        self.push_started = float("-inf")
        self.sent_checkpoint: Path | None = None
        self.without_xet = False  # True after a push that hung (xet-core#883) or failed: the next ones go without Xet

    @property
    def checkpoint_in_transit(self) -> Path | None:
        """Return the checkpoint that is being sent and must stay on the disk until it has arrived; None otherwise."""
        return self.sent_checkpoint if self.process and self.process.poll() is None else None

    def send_if_due(self, checkpoint: Path) -> None:
        """Start sending a new complete checkpoint when one is due and the last one has arrived.

        A push that takes longer than its time limit is replaced by one without Xet.
        """
        elapsed = time.monotonic() - self.push_started
        if not self.repo or elapsed < self.min_seconds:
            return
        if self.checkpoint_in_transit and elapsed < max(PUSH_TIMEOUT, self.min_seconds):
            return
        self.without_xet = (
            self.without_xet
            or bool(self.checkpoint_in_transit)
            or (self.process and self.process.poll()) == CLIENT_ERROR_CODE
        )
        self._start_push(self.repo, checkpoint)

    def _start_push(self, repo: str, checkpoint: Path) -> subprocess.Popen:
        """End the push in progress, start a new one, and return its process."""
        self.kill_push()
        self.push_started, self.sent_checkpoint = time.monotonic(), checkpoint
        self.process = start_push_process(self.run, repo, self.without_xet)
        return self.process

    def send_final_checkpoint(self, checkpoint: Path | None) -> None:
        """Send the newest checkpoint before the machine is taken away, and wait until it has arrived.

        A push in progress gets half of $FERRY_GRACE_SECONDS, and the newest checkpoint gets what is left.
        """
        if not self.repo or not checkpoint:
            return
        deadline = time.monotonic() + hub.seconds_from_environment("FERRY_GRACE_SECONDS", GRACE_SECONDS)
        if self.process and self.checkpoint_in_transit:
            wait_for_exit(self.process, (deadline - time.monotonic()) / 2)
        process = self._start_push(self.repo, checkpoint)
        if not wait_for_exit(process, deadline - time.monotonic()):
            hub.print_message(
                f"checkpoints: {checkpoint.name} did not reach {self.repo} in time; the repo holds an older one"
            )
        self.kill_push()

    def kill_push(self) -> None:
        """Kill the push in progress."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def push_after_stage(run: Run) -> None:
    """Push the run's state after a stage and wait for it, first with Xet and then without.

    When both fail, print a note: the state is sent again after the next stage.
    """
    if not (repo := checkpoint_repo()):
        return
    for without_xet in (False, True):
        process = start_push_process(run, repo, without_xet)
        if wait_for_exit(process, PUSH_TIMEOUT) and process.returncode != CLIENT_ERROR_CODE:
            return  # it was sent, or the process has printed the reason
        process.kill()
        process.wait()
    hub.print_message(
        f"note: the state of {run.folder.name} did not reach {repo}; it is sent again after the next stage"
    )


def start_push_process(run: Run, repo: str, without_xet: bool = False) -> subprocess.Popen:
    """Start a process that pushes the run's state, and return it.

    The process has a session of its own, because a signal is for the training to handle.

    Args:
        without_xet: send over plain LFS.
    """
    # -W: the client warns that rows belong in a data set repo
    command = [sys.executable, "-W", "ignore", "-m", "pipeline.checkpoint_sync.push", str(run.folder), repo]
    environment = (
        os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_HUB_DISABLE_XET": "1"} if without_xet else {})
    )
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=console.message_stream(),
        stderr=console.message_stream(),
        env=environment,
        start_new_session=True,
    )


def wait_for_exit(process: subprocess.Popen, seconds: float) -> bool:
    """Wait at most `seconds` for a process and return whether it has ended."""
    try:
        process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True
