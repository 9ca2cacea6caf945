"""The table of GPU types, configs/gpus.csv: yours to edit, prices above all.

match: a regular expression for the name that torch gives the card. memory_gb: what torch sees of it, 1 GB = 1e9 bytes.
tflops: dense bf16 (fp16 before Ampere) with 32-bit sums, from NVIDIA's data sheets. dollars_per_hour: about what an hour
of it costs when rented alone.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

TABLE = Path("configs/gpus.csv")  # of the current folder; where it has none, the checkout's
OLDEST, BF16 = 7.5, 8.0  # compute capabilities: the first that CUDA 13 compiles for (T4), the first with bf16 (A100)


@dataclass(frozen=True)
class Card:
    """One line of the table."""

    name: str
    match: str
    memory_gb: float
    capability: float
    tflops: float
    dollars_per_hour: float


def table(path: Path = TABLE) -> list[Card]:
    """All cards. Raises UserError for a line that cannot be read."""
    path = path if path.is_file() else Path(__file__).parents[2] / path
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                Card(
                    row["name"],
                    re.compile(row["match"]).pattern,
                    *(float(row[name]) for name in list(Card.__annotations__)[2:]),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, re.error) as error:
        raise UserError(f"{path} cannot be read: {error!r}", f"correct it, or `git checkout {path}`") from error


def find(device: str) -> Card | None:
    """The card of that name, such as NVIDIA H100 80GB HBM3."""
    return next((card for card in table() if re.search(rf"\b{card.match}\b", device)), None)


def of(device: str) -> tuple[float | None, float | None]:
    """FLOP/s and dollars an hour; None where the table does not have the card."""
    card = find(device)
    return (card.tflops * 1e12, card.dollars_per_hour) if card else (None, None)


def unfit(capability: float, model_type: str) -> str | None:
    """Why such a card cannot train such a model; None: it can. model_type: of config.json."""
    if capability < OLDEST:
        return f"compute capability {capability}: CUDA 13, and torch, Triton and bitsandbytes with it, begin with {OLDEST} (T4)"
    if capability < BF16 and model_type.startswith("gemma"):
        return f"compute capability {capability} has no bf16, and Gemma's activations overflow float16 (its losses become NaN)"
    return None
