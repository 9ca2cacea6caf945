"""Report the progress of a training: a line in the terminal, an entry in log.jsonl, and the same entry to `report_to`.

All values are read at the logging steps, where the trainer waits for the GPU anyway.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import console, files


class Meter:
    """Measures speed, MFU, remaining time and costs of a training. Padding is not counted.

    Args:
        count_tokens: returns the number of tokens in the first so many steps.
        steps: optimizer steps of the whole training.
        flops: FLOPs to train on one token, forward and backward, without recomputation.
        peak_flops: FLOP/s of the GPU, None when unknown.
        dollars_per_hour: price of the GPU, None when unknown.
    """

    def __init__(
        self, count_tokens: Callable[[int], int], steps: int, flops: float, peak: float | None, price: float | None
    ):
        self.count_tokens, self.steps, self.flops, self.peak, self.price = count_tokens, steps, flops, peak, price
        self.began = self.last = time.monotonic()
        self.first = self.step = 0

    def start(self, step: int) -> None:
        """Start to measure at this step; the steps that an earlier process trained do not count."""
        self.began = self.last = time.monotonic()
        self.first = self.step = step

    def pause(self, seconds: float) -> None:
        """Leave out seconds that were not spent on training, but on an evaluation or a checkpoint."""
        self.last += seconds

    def read(self, step: int, memory_gb: float) -> dict:
        """Return the values for a log entry, and start a new interval. The speed is that since the last entry."""
        now = time.monotonic()
        tokens = self.count_tokens(step)
        seconds, done = now - self.last, tokens - self.count_tokens(self.step)
        spent, trained = now - self.began, tokens - self.count_tokens(self.first)
        speed = done / seconds if seconds > 0 else 0.0
        left = (self.count_tokens(self.steps) - tokens) * spent / trained if trained else None
        self.last, self.step = now, step
        found = {"tokens": tokens, "tokens_per_second": round(speed, 1), "memory_gb": memory_gb}
        found |= {"mfu": round(speed * self.flops / self.peak, 4)} if self.peak else {}
        found |= {"seconds_left": round(left)} if left is not None else {}
        return found | ({"dollars": round(spent / 3600 * self.price, 3)} if self.price else {})


def line(step: int, steps: int, entry: dict) -> str:
    """Return a log entry as a line for the terminal."""
    parts = [f"step {step:,}/{steps:,}"]
    for name, form in (
        ("loss", "loss {:.4f}"),
        ("eval_loss", "held-out loss {:.4f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "MFU {:.0%}"),
        ("memory_gb", "{:.1f} GB"),
        ("dollars", "${:.2f}"),
    ):
        if name in entry:
            parts.append(form.format(entry[name]))
    if "seconds_left" in entry:
        parts.append(f"{console.format_duration(entry['seconds_left'])} left")
    return "finetune: " + ", ".join(parts)


def watcher(log: Path, meter: Meter):
    """Return a trainer callback that writes each entry to the file `log` and prints it."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            meter.start(state.global_step)
            # A run that was killed may have logged steps that are now trained again.
            write(log, state.log_history)

        def on_log(self, args, state, control, logs=None, **kwargs):
            # An error is ignored, because the whole log is written at the end.
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")
            if "loss" in logs or "eval_loss" in logs:
                console.say(line(state.global_step, state.max_steps, logs))

    return Watcher()


@contextlib.contextmanager
def showing_steps(trainer, done: int) -> Iterator[None]:
    """Show a progress bar as long as the block runs.

    Args:
        done: steps that an earlier process trained.
    """
    from transformers import TrainerCallback

    with console.progress(trainer.args.max_steps, "finetune", "steps", done=done) as advance:

        class StepCounter(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                advance(1)

        trainer.add_callback(StepCounter)
        yield


def write(log: Path, history: list[dict]) -> None:
    """Write all entries to the log file, which they replace."""
    with files.writing(log) as part:
        part.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
