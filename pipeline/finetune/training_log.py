"""Report the progress of a training: a line in the terminal, an entry in log.jsonl, and the same entry to `report_to`.

All values are read at the logging steps, where the trainer waits for the GPU anyway.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

from common import console, files


class SpeedMeter:
    """Measures speed, MFU, remaining time and costs of a training. Padding is not counted.

    Args:
        count_tokens: returns the number of tokens in the first so many steps.
        steps: optimizer steps of the whole training.
        flops: FLOPs to train on one token, forward and backward, without recomputation.
        peak_flops: FLOP/s of the GPU, None when unknown.
        dollars_per_hour: price of the GPU, None when unknown.
    """

    def __init__(
        self,
        count_tokens: Callable[[int], int],
        steps: int,
        flops: float,
        peak_flops: float | None,
        dollars_per_hour: float | None,
    ):
        self.count_tokens, self.steps, self.flops, self.peak_flops, self.dollars_per_hour = (
            count_tokens,
            steps,
            flops,
            peak_flops,
            dollars_per_hour,
        )
        self.started_at = self.interval_started = time.monotonic()
        self.first_step = self.last_step = 0

    def start_at(self, step: int) -> None:
        """Start to measure at this step; the steps that an earlier process trained do not count."""
        self.started_at = self.interval_started = time.monotonic()
        self.first_step = self.last_step = step

    def leave_out(self, seconds: float) -> None:
        """Leave out seconds that were not spent on training, but on an evaluation or a checkpoint."""
        self.interval_started += seconds

    def read_entry(self, step: int, memory_gb: float) -> dict:
        """Return the values for a log entry, and start a new interval. The speed is that since the last entry."""
        now = time.monotonic()
        tokens = self.count_tokens(step)
        seconds, new_tokens = now - self.interval_started, tokens - self.count_tokens(self.last_step)
        seconds_spent, tokens_trained = now - self.started_at, tokens - self.count_tokens(self.first_step)
        tokens_per_second = new_tokens / seconds if seconds > 0 else 0.0
        seconds_left = (
            (self.count_tokens(self.steps) - tokens) * seconds_spent / tokens_trained if tokens_trained else None
        )
        self.interval_started, self.last_step = now, step
        values = {"tokens": tokens, "tokens_per_second": round(tokens_per_second, 1), "memory_gb": memory_gb}
        values |= {"mfu": round(tokens_per_second * self.flops / self.peak_flops, 4)} if self.peak_flops else {}
        values |= {"seconds_left": round(seconds_left)} if seconds_left is not None else {}
        return values | (
            {"dollars": round(seconds_spent / 3600 * self.dollars_per_hour, 3)} if self.dollars_per_hour else {}
        )


def format_entry(step: int, steps: int, entry: dict) -> str:
    """Return a log entry as a line for the terminal."""
    parts = [f"step {step:,}/{steps:,}"]
    for name, template in (
        ("loss", "loss {:.4f}"),
        ("eval_loss", "held-out loss {:.4f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "MFU {:.0%}"),
        ("memory_gb", "{:.1f} GB"),
        ("dollars", "${:.2f}"),
    ):
        if name in entry:
            parts.append(template.format(entry[name]))
    if "seconds_left" in entry:
        parts.append(f"{console.format_duration(entry['seconds_left'])} left")
    return "finetune: " + ", ".join(parts)


def write_log(log: Path, history: list[dict]) -> None:
    """Write all entries to the log file, which they replace."""
    with files.write_atomically(log) as part:
        part.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
