"""When the state of a run leaves its machine: as the checkpoints are written, at a signal, and when a stage is done.

$FERRY_CHECKPOINTS names the repo (`make train CHECKPOINTS=`); without it nothing leaves.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from common import console, hub
from pipeline.run.run_folder import Run

REPO = "FERRY_CHECKPOINTS"
# Seconds after a signal: setup/container.py raises those of docker stop to 120, and a spot machine often has so many.
GRACE = 100
BROKEN = 3  # exit code of push.py: the client broke in an unknown way
LONGEST = 900  # seconds for the state after a stage


def repo() -> str | None:
    """owner/name, {run} and {user} not filled in yet."""
    return os.environ.get(REPO) or None


class Pusher:
    """Sends checkpoints one at a time, by a process beside the training. minutes: between the starts of two."""

    def __init__(self, run: Run, repo: str | None, minutes: float):
        self.run, self.repo, self.pace = run, repo, 60 * minutes
        self.process: subprocess.Popen | None = None
        self.began, self.sending = float("-inf"), None
        self.plain = False  # after one that hung (xet-core#883) or broke

    @property
    def busy(self) -> Path | None:
        """The checkpoint that is on its way: it must stay on the disk until then."""
        return self.sending if self.process and self.process.poll() is None else None

    def offer(self, checkpoint: Path) -> None:
        """A new whole checkpoint; sent when it is time and the one before has arrived."""
        waited = time.monotonic() - self.began
        if not self.repo or waited < self.pace:
            return
        if self.busy and waited < max(LONGEST, self.pace):
            return
        self.plain = self.plain or bool(self.busy) or (self.process and self.process.poll()) == BROKEN
        self._start(checkpoint)

    def _start(self, checkpoint: Path | None) -> None:
        self.close()
        self.began, self.sending = time.monotonic(), checkpoint
        self.process = started(self.run, self.repo, self.plain)

    def last(self, checkpoint: Path | None) -> None:
        """Before the machine goes: what is on its way, and then the newest, in $FERRY_GRACE_SECONDS."""
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
        """Nothing of it goes on."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def after(run: Run) -> None:
    """The state after a stage. What cannot be sent now is said, and goes with the next one."""
    if not (target := repo()):
        return
    for plain in (False, True):
        process = started(run, target, plain)
        if waited(process, LONGEST) and process.returncode != BROKEN:
            return  # sent, or it has said why not
        process.kill()
        process.wait()
    hub.say(f"note: the state of {run.folder.name} did not get to {target}; it is tried again after the next stage")


def started(run: Run, repo: str, plain: bool = False) -> subprocess.Popen:
    """plain: without Xet. In a session of its own: a signal is for the training to hear."""
    # -W: the client thinks that rows belong into a data set repo
    command = [sys.executable, "-W", "ignore", "-m", "pipeline.checkpoint_sync.push", str(run.folder), repo]
    settings = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_HUB_DISABLE_XET": "1"} if plain else {})
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console.message_stream(), stderr=console.message_stream(),
                            env=settings, start_new_session=True)  # fmt: skip


def waited(process: subprocess.Popen, seconds: float) -> bool:
    """Has it ended by then?"""
    try:
        process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True
