"""Decide when checkpoints are written, and handle the signals that end a training early."""

import signal
import time
from contextlib import contextmanager
from pathlib import Path

from pipeline.checkpoint_sync.background_push import Pusher
from pipeline.run.checkpoint_files import mark_complete, remove_all_but


class Stop(Exception):
    """Ends the training early, because of a signal or because GPU memory is too small. A checkpoint follows."""


class Signals:
    """Records SIGTERM (docker stop, a spot instance that is taken away) and Ctrl-C, so that a checkpoint comes first.

    A second signal ends the process at once, except within one second of the first: whoever ends a job often signals
    each of its processes, and make passes its signals on to its children. An instance is true after a signal.
    """

    ECHO = 1.0  # seconds in which a second signal counts as the same one
    PATIENCE = 10  # seconds that the step in progress may take; setup/container.py raises the 10 of docker stop to 120

    def __init__(self):
        self.number: int | None = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def urgent(self) -> bool:
        """Return whether the step in progress must be abandoned, because it takes too long after the signal."""
        return bool(self) and time.monotonic() - self.since > self.PATIENCE

    @contextmanager
    def heard(self):
        """Record signals as long as the block runs, then restore the previous handlers."""
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
    """Return a trainer callback that requests checkpoints, marks them complete, removes old ones and sends new ones.

    A checkpoint is requested every `minutes`, every `steps` where they are set, and at a signal. The newest one, the
    best one and the one that is being sent stay.

    Args:
        folder: the folder of the checkpoints.
        checkpoint_sync: sends new checkpoints in the background.
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
            if path.is_dir():  # it was removed if the disk is full
                mark_complete(path, state.global_step)
                remove_all_but(folder, {path, Path(state.best_model_checkpoint or path), pusher.busy or path})
                if not signals:  # after a signal it is sent when the training has ended
                    pusher.offer(path)

    return Keeper()
