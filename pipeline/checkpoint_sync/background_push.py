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

REPO = "FERRY_CHECKPOINTS"
# Seconds that a push may take after a signal: setup/container.py raises the time limit of docker stop to 120 seconds,
# and a spot instance often has that long.
GRACE = 100
BROKEN = 3  # exit code of push.py: the Hub client failed in an unknown way
LONGEST = 900  # seconds after which a push is given up


def repo() -> str | None:
    """Return owner/name from the environment, with {run} and {user} not filled in yet; None when it is not set."""
    return os.environ.get(REPO) or None


class Pusher:
    """Sends checkpoints one at a time, in a process beside the training.

    minutes: the least time between the starts of two pushes.
    """

    def __init__(self, run: Run, repo: str | None, minutes: float):
        self.run, self.repo, self.pace = run, repo, 60 * minutes
        self.process: subprocess.Popen | None = None
        self.began, self.sending = float("-inf"), None
        self.plain = False  # True after a push that hung (xet-core#883) or failed: the next ones go without Xet

    @property
    def busy(self) -> Path | None:
        """Return the checkpoint that is being sent and must stay on the disk until it has arrived; None otherwise."""
        return self.sending if self.process and self.process.poll() is None else None

    def offer(self, checkpoint: Path) -> None:
        """Start sending a new complete checkpoint when one is due and the last one has arrived.

        A push that takes longer than its time limit is replaced by one without Xet.
        """
        waited = time.monotonic() - self.began
        if not self.repo or waited < self.pace:
            return
        if self.busy and waited < max(LONGEST, self.pace):
            return
        self.plain = self.plain or bool(self.busy) or (self.process and self.process.poll()) == BROKEN
        self._start(checkpoint)

    def _start(self, checkpoint: Path | None) -> None:
        """End the push in progress and start a new one."""
        self.close()
        self.began, self.sending = time.monotonic(), checkpoint
        self.process = started(self.run, self.repo, self.plain)

    def last(self, checkpoint: Path | None) -> None:
        """Send the newest checkpoint before the machine is taken away, and wait until it has arrived.

        A push in progress gets half of $FERRY_GRACE_SECONDS, and the newest checkpoint gets what is left.
        """
        if not self.repo or not checkpoint:
            return
        until = time.monotonic() + hub.seconds_of("FERRY_GRACE_SECONDS", GRACE)
        if self.busy:
            waited(self.process, (until - time.monotonic()) / 2)
        self._start(checkpoint)
        if not waited(self.process, until - time.monotonic()):
            hub.say(f"checkpoints: {checkpoint.name} did not get to {self.repo} in time; an older one is there")
        self.close()

    def close(self) -> None:
        """Kill the push in progress."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def after(run: Run) -> None:
    """Push the run's state after a stage and wait for it, first with Xet and then without.

    When both fail, print a note: the state is sent again after the next stage.
    """
    if not (target := repo()):
        return
    for plain in (False, True):
        process = started(run, target, plain)
        if waited(process, LONGEST) and process.returncode != BROKEN:
            return  # it was sent, or the process has printed the reason
        process.kill()
        process.wait()
    hub.say(f"note: the state of {run.folder.name} did not get to {target}; it is tried again after the next stage")


def started(run: Run, repo: str, plain: bool = False) -> subprocess.Popen:
    """Start a process that pushes the run's state, and return it.

    The process has a session of its own, because a signal is for the training to handle.

    Args:
        without_xet: send over plain LFS.
    """
    # -W: the client warns that rows belong in a data set repo
    command = [sys.executable, "-W", "ignore", "-m", "pipeline.checkpoint_sync.push", str(run.folder), repo]
    settings = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_HUB_DISABLE_XET": "1"} if plain else {})
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=console.message_stream(),
        stderr=console.message_stream(),
        env=settings,
        start_new_session=True,
    )


def waited(process: subprocess.Popen, seconds: float) -> bool:
    """Wait at most `seconds` for a process and return whether it has ended."""
    try:
        process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True
