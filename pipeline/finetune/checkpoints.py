"""When checkpoints are written, and the signals that end a training early."""

import signal
import time
from contextlib import contextmanager
from pathlib import Path

from pipeline.checkpoint_sync.background_push import Pusher
from pipeline.run.checkpoint_files import mark_complete, remove_all_but


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
                mark_complete(path, state.global_step)
                remove_all_but(folder, {path, Path(state.best_model_checkpoint or path), pusher.busy or path})
                if not signals:  # the last one is sent when the training has ended
                    pusher.offer(path)

    return Keeper()
