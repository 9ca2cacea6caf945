"""Report the progress of a training: a line in the terminal, an entry in log.jsonl, and the same entry to `report_to`.

All values are read at the logging steps, where the trainer waits for the GPU anyway.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import console, files


@dataclass
class SpeedMeter:
    """Measures speed, MFU, remaining time and costs of a training. Padding is not counted."""

    count_tokens: Callable[[int], int]
    """Returns the number of tokens in the first so many steps."""
    steps: int
    """Optimizer steps of the whole training."""
    flops: float
    """FLOPs to train on one token, forward and backward, without recomputation."""
    peak_flops: float | None
    """FLOP/s of the GPU, None when unknown."""
    dollars_per_hour: float | None
    """Price of the GPU, None when unknown."""

    def __post_init__(self) -> None:
        self.started_at = self.interval_started = time.monotonic()
        self.first_step = self.last_step = 0

    def start_at(self, step: int) -> None:
        """Start to measure at this step; the steps that an earlier process trained do not count."""
        self.started_at = self.interval_started = time.monotonic()
        self.first_step = self.last_step = step

    def leave_out(self, seconds: float) -> None:
        """Leave out seconds that were not spent on training, but on an evaluation or a checkpoint."""
        self.interval_started += seconds

    def read_entry(self, step: int, memory_gb: float) -> dict[str, float]:
        """Return the values for a log entry, and start a new interval. The speed is that since the last entry."""
        now, tokens = time.monotonic(), self.count_tokens(step)
        spent, speed = now - self.started_at, self._tokens_per_second(tokens, now - self.interval_started)
        self.interval_started, self.last_step = now, step
        entry = {"tokens": tokens, "tokens_per_second": round(speed, 1), "memory_gb": memory_gb}
        return entry | self._mfu(speed) | self._seconds_left(tokens, spent) | self._dollars(spent)

    def _tokens_per_second(self, tokens: int, seconds: float) -> float:
        """Return the speed since the last entry, which was `seconds` ago; `tokens` are trained by now."""
        return (tokens - self.count_tokens(self.last_step)) / seconds if seconds > 0 else 0.0

    def _mfu(self, tokens_per_second: float) -> dict[str, float]:
        """Return the share of the GPU's speed that is used, as an entry has it; {} when the GPU is unknown."""
        return {"mfu": round(tokens_per_second * self.flops / self.peak_flops, 4)} if self.peak_flops else {}

    def _seconds_left(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return the remaining time as an entry has it; {} before this process has trained a token."""
        tokens_trained = tokens - self.count_tokens(self.first_step)
        tokens_left = self.count_tokens(self.steps) - tokens
        return {"seconds_left": round(tokens_left * seconds / tokens_trained)} if tokens_trained else {}

    def _dollars(self, seconds: float) -> dict[str, float]:
        """Return the costs so far as an entry has them; {} when the price is unknown."""
        return {"dollars": round(seconds / 3600 * self.dollars_per_hour, 3)} if self.dollars_per_hour else {}


ENTRY_TEMPLATES = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
    "memory_gb": "{:.1f} GB",
    "dollars": "${:.2f}",
}


def format_entry(step: int, steps: int, entry: dict) -> str:
    """Return a log entry as a line for the terminal."""
    parts = [f"step {step:,}/{steps:,}"]
    parts += [template.format(entry[name]) for name, template in ENTRY_TEMPLATES.items() if name in entry]
    if "seconds_left" in entry:
        parts.append(f"{console.format_duration(entry['seconds_left'])} left")
    return "finetune: " + ", ".join(parts)


def write_log(log: Path, history: list[dict]) -> None:
    """Write all entries to the log file, which they replace."""
    with files.write_atomically(log) as part:
        part.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
