"""Checkpoints: when they are written, which are whole, which are kept; and the signals that end a training early.

A checkpoint is whole once it is marked. Older ones go only after that, so there is always a whole one, and a disk that is
full costs the new one, never the last.
"""

import re
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

from contract import files
from contract.errors import UserError
from pipeline.offsite.pusher import Pusher

COMPLETE = "ferry-complete"
NAME = re.compile(r"checkpoint-[0-9]+")  # checkpoint-best, checkpoint-8-mine: a user's own copies


class Stop(Exception):
    """The training ends here, its state saved or about to be: a signal, or memory that is too small."""


class Signals:
    """SIGTERM (docker stop, a spot machine that is taken back) and Ctrl-C, heard and not obeyed at once.

    The second one is obeyed at once, but for one that comes in the same second: who ends a job tells every process of it,
    and make tells its children what it was told.
    """

    ECHO = 1.0  # seconds
    PATIENCE = 10  # seconds for the step in progress; docker stop's 10 are raised to 120 by setup/container.py

    def __init__(self):
        self.number: int | None = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def urgent(self) -> bool:
        return bool(self) and time.monotonic() - self.since > self.PATIENCE

    @contextmanager
    def heard(self):
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        self.before = before
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame) -> None:
        if not self:
            self.number, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > self.ECHO:
            for known, handler in self.before.items():
                signal.signal(known, handler)
            signal.raise_signal(number)


def keeper(folder: Path, minutes: float, steps: int | None, signals: Signals, pusher: Pusher):
    """A callback that asks for a checkpoint every so many minutes (and steps) and at a signal, and keeps what is whole.

    pusher: gets each one, and holds the one that it sends.
    """
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        saved = time.monotonic()

        def on_train_begin(self, args, state, control, **kwargs):
            self.saved = time.monotonic()

        def on_step_end(self, args, state, control, **kwargs):
            due = time.monotonic() - self.saved >= minutes * 60 or (steps and state.global_step % steps == 0)
            control.should_save = control.should_save or bool(due or signals)
            control.should_training_stop = control.should_training_stop or bool(signals)

        def on_save(self, args, state, control, **kwargs):
            self.saved = time.monotonic()
            path = folder / f"checkpoint-{state.global_step}"
            if path.is_dir():  # it is gone when the disk was full
                mark(path, state.global_step)
                keep(folder, {path, Path(state.best_model_checkpoint or path), pusher.busy or path})
                if not signals:  # the last one is sent when the training has ended
                    pusher.offer(path)

    return Keeper()


def mark(path: Path, step: int) -> None:
    """All of it is on disk, and then it says so, with the names of its files."""
    files.sync(path)
    files.write_json(path / COMPLETE, {"step": step, "files": sorted(item.name for item in path.iterdir())})


def keep(folder: Path, kept: set[Path]) -> None:
    """Remove all checkpoints but these."""
    names = {path.name for path in kept}
    for path in list_checkpoints(folder):
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, the oldest first: folders that are called as the trainer calls them, and no others."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_complete(folder: Path) -> Path | None:
    """The newest marked checkpoint; unmarked ones are removed.

    Raises UserError when a file of it is gone: without its optimizer state, say, another training would go on from it.
    """
    found = list_checkpoints(folder)
    for path in found:
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path)
    newest = next((path for path in reversed(found) if path.is_dir()), None)
    lost = (
        [name for name in files.read_json(newest / COMPLETE).get("files", []) if not (newest / name).exists()]
        if newest
        else []
    )
    if lost:
        raise UserError(
            f"{newest} lacks {', '.join(lost)}: a training that resumes without would be another one",
            f"put the file back, or remove {newest} to resume from the checkpoint before it, or from the start",
        )
    return newest
