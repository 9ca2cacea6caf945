"""The signals and errors that end a training early, with a checkpoint."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

LAST_LOSS_FILE = "last-loss.json"  # in a checkpoint: the loss of its last step
SignalHandler = Callable[[int, FrameType | None], object] | int | None  # what signal.signal takes and returns


class StopTraining(Exception):
    """Ends the training early, because of a signal or because GPU memory is too small. A checkpoint follows."""


class OutOfGpuMemory(StopTraining):
    """Not even the smallest micro-batch fits into GPU memory."""


class StopSignals:
    """Records SIGTERM (docker stop, a spot instance that is taken away) and Ctrl-C, so that a checkpoint comes first.

    A second signal ends the process at once, except within one second of the first: whoever ends a job often signals
    each of its processes, and make passes its signals on to its children. An instance is true after a signal.
    """

    ECHO_SECONDS = 1.0  # seconds in which a second signal counts as the same one
    # Seconds that the step in progress may take; setup/container.py raises the 10 of docker stop to 120.
    STEP_TIMEOUT = 10

    def __init__(self) -> None:
        self.number: int | None = None
        self.received_at = 0.0
        self.previous_handlers: dict[int, SignalHandler] = {}

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def is_urgent(self) -> bool:
        """Return whether the step in progress must be abandoned, because it takes too long after the signal."""
        return bool(self) and time.monotonic() - self.received_at > self.STEP_TIMEOUT

    @contextmanager
    def capture_signals(self) -> Iterator["StopSignals"]:
        """Record signals as long as the block runs, then restore the previous handlers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous_handlers[number] = signal.signal(number, self._handle_signal)
        try:
            yield self
        finally:
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if not self:
            self.number, self.received_at = number, time.monotonic()
        elif time.monotonic() - self.received_at > self.ECHO_SECONDS:
            self._restore_handlers()
            signal.raise_signal(number)
