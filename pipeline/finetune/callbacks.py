"""The trainer's callbacks: when checkpoints are written and sent, what is logged, and the progress bar.

Import this module inside of a function: transformers takes seconds to import.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from common import console
from pipeline.checkpoint_sync.background_push import CheckpointSync
from pipeline.finetune.stop_signals import StopSignals
from pipeline.finetune.training_log import SpeedMeter, format_entry, write_log
from pipeline.run import checkpoint_files

if TYPE_CHECKING:
    from transformers import TrainerState

    from pipeline.finetune.trainer import StepTrainer


class CheckpointCallback(TrainerCallback):
    """Requests checkpoints, marks them complete, removes old ones and sends new ones.

    A checkpoint is requested every `minutes`, every `steps` where they are set, and at a signal. The newest one, the
    best one and the one that is being sent stay.
    """

    def __init__(
        self, folder: Path, minutes: float, steps: int | None, signals: StopSignals, checkpoint_sync: CheckpointSync
    ):
        """Create the callback for the checkpoints in `folder`; `checkpoint_sync` sends new ones in the background."""
        self.folder, self.minutes, self.steps = folder, minutes, steps
        self.signals, self.checkpoint_sync = signals, checkpoint_sync
        self.saved_at = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock for the first checkpoint."""
        self.saved_at = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Request a checkpoint when one is due, and the end of the training after a signal."""
        is_due = time.monotonic() - self.saved_at >= self.minutes * 60
        is_due = is_due or bool(self.steps and state.global_step % self.steps == 0)
        control.should_save = control.should_save or is_due or bool(self.signals)
        control.should_training_stop = control.should_training_stop or bool(self.signals)

    def on_save(self, args, state, control, **kwargs):
        """Complete the checkpoint, unless the disk is full and it was removed."""
        self.saved_at = time.monotonic()
        path = self.folder / f"checkpoint-{state.global_step}"
        if path.is_dir():
            self._complete_checkpoint(path, state)

    def _complete_checkpoint(self, path: Path, state: "TrainerState") -> None:
        """Mark the checkpoint complete, remove older ones and send it."""
        checkpoint_files.mark_complete(path, state.global_step)
        best_path = Path(state.best_model_checkpoint or path)
        kept_paths = {path, best_path, self.checkpoint_sync.checkpoint_in_transit or path}
        checkpoint_files.remove_other_checkpoints(self.folder, kept_paths)
        if not self.signals:  # after a signal it is sent when the training has ended
            self.checkpoint_sync.send_if_due(path)


class LogCallback(TrainerCallback):
    """Writes each entry to the log file and prints it."""

    def __init__(self, log_path: Path, meter: SpeedMeter):
        """Create the callback. The meter is started with the training."""
        self.log_path, self.meter = log_path, meter

    def on_train_begin(self, args, state, control, **kwargs):
        """Start to measure. A run that was killed may have logged steps that are now trained again."""
        self.meter.start_at(state.global_step)
        write_log(self.log_path, state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append the entry to the log; an error is ignored, because the whole log is written at the end."""
        with contextlib.suppress(OSError), self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(state.log_history[-1]) + "\n")
        if "loss" in logs or "eval_loss" in logs:
            console.print_message(format_entry(state.global_step, state.max_steps, logs))


class StepCounter(TrainerCallback):
    """Advances a progress bar by each step."""

    def __init__(self, advance: Callable[[int], None]):
        """Create the callback. `advance` takes the number of new steps."""
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs):
        """Advance the bar by one step."""
        self.advance(1)


@contextlib.contextmanager
def show_progress(trainer: "StepTrainer", done: int) -> Iterator[None]:
    """Show a progress bar as long as the block runs; an earlier process trained `done` steps."""
    with console.show_progress(trainer.args.max_steps, "finetune", "steps", initial=done) as advance:
        trainer.add_callback(StepCounter(advance))
        yield
