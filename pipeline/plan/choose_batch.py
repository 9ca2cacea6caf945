"""Choose micro-batch size and gradient checkpointing for a GPU, and the rows of a step where the config has "auto".

Measured on an H100 with an 8B model: micro-batches of 16,384 tokens without gradient checkpointing train 16,289 tokens
a second, those of 4,096 tokens still 14,939, and those of any size with gradient checkpointing 11,290. Therefore the
micro-batch shrinks to 4,096 tokens before gradient checkpointing is turned on.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from pipeline.config.schema import MOST_STEPS, Base, Finetune
from pipeline.plan import batches, memory_need

TOKENS = (16384, 12288, 8192, 6144, 4096)  # micro-batch sizes to try without gradient checkpointing
CHECKPOINTED = (8192, 4096, 2048, 1024, 512)  # with it
# The share of GPU memory that torch may fill; the rest is for fragments and for errors of up to 10 % in the estimate.
SHARE = 0.92
# The rows of a step that finetune.learning_rate refers to when train_batch_size is "auto".
USUAL = 8
# Model types whose rows Unsloth does not pack (its PADDING_FREE_BLOCKLIST): rows of similar length are padded.
PADDED = ("gemma2", "gpt_oss")
# The least optimizer steps when train_batch_size is "auto", where there are enough rows.
STEPS = 100
# The number of rows whose micro-batches are computed. In a longer training the first rows stand for all of them, so a
# plan of a million steps takes no longer than one of two thousand.
SAMPLE = 16_384


@dataclass(frozen=True)
class Choice:
    """The batch settings that a training runs with."""

    train_batch_size: int
    learning_rate: float
    micro_batch_tokens: int
    """The most tokens of a micro-batch, padding included."""
    largest_micro_batch: int
    """Tokens of the largest micro-batch that these rows make, padding included."""
    use_gradient_checkpointing: memory_need.Checkpointing
    packing: bool


def choose(
    model: memory_need.Shape | None,
    base: Base,
    tune: Finetune,
    lengths: np.ndarray,
    card: float | None,
    packed: bool,
    begun: int | None = None,
) -> tuple[Choice, batches.ShuffledRows]:
    """Return the first candidate that fits the GPU, and the rows in the order of training.

    A `micro_batch_tokens` from the config is returned even if it does not fit: the training then lowers it.

    Args:
        shape: None when the memory of such a model cannot be estimated; then the first candidate is returned.
        lengths: tokens of each row, int [rows].
        gpu_bytes: GPU memory, None on a CPU.
        resumed_rows_per_step: rows of a step in the training that is resumed.

    Raises:
        UserError: not even the smallest candidate fits, or the training would have too many steps.
    """
    least = np.inf
    for tokens, policy in candidates(tune, int(lengths.max()), card):
        made, order = with_tokens(tune, lengths, tokens, policy, packed, begun)
        if card is None or model is None:
            return made, order
        need = memory_need.peak(model, base, tune, made.largest_micro_batch, policy, packed) + memory_need.CONTEXT
        if need <= SHARE * card:
            return made, order
        least = min(least, need)
    if tune.micro_batch_tokens and tune.micro_batch_tokens > lengths.max():
        return made, order  # as configured: if it does not fit, the training lowers it
    raise UserError(
        f"{base.model} needs {least / SHARE / 1e9:.0f} GB of GPU memory for its longest row "
        f"({lengths.max():,} tokens), this card has {card / 1e9:.0f} GB",
        "a larger card (`make plan` names one), base.load_in_4bit: true, or a smaller base.max_seq_length, "
        "with a new RUN=name",
    )


def packs(kind: str) -> bool:
    """Return whether Unsloth packs rows for models of this kind (`model_type` of config.json)."""
    return kind not in PADDED


def candidates(tune: Finetune, longest: int, card: float | None) -> list[tuple[int, memory_need.Checkpointing]]:
    """Return (micro-batch tokens, checkpointing policy) pairs, the fastest first.

    Args:
        longest: tokens of the longest row. A micro-batch may always have so many.
        gpu_bytes: GPU memory, None on a CPU.
    """
    asked = tune.use_gradient_checkpointing
    if card is None:
        return [(tune.micro_batch_tokens or max(longest, TOKENS[-1]), False if asked == "auto" else asked)]
    return [
        (max(tokens, longest), policy)
        for policy in ((False, "unsloth") if asked == "auto" else (asked,))
        for tokens in ([tune.micro_batch_tokens] if tune.micro_batch_tokens else CHECKPOINTED if policy else TOKENS)
    ]


def with_tokens(
    tune: Finetune, lengths: np.ndarray, tokens: int, policy: memory_need.Checkpointing, packed: bool, begun: int | None
) -> tuple[Choice, batches.ShuffledRows]:
    """Return the batch settings for a micro-batch of at most `tokens`, and the rows in the order of training.

    Raises:
        UserError: the training would have more than MOST_STEPS steps.
    """
    per_step = begun or rows_per_step(tune, lengths, tokens, packed)
    order = batches.ShuffledRows(len(lengths), rows_seen(tune, len(lengths), per_step), tune.seed)
    if len(order) > MOST_STEPS * per_step:
        raise UserError(
            f"finetune.num_train_epochs {tune.num_train_epochs:g} makes {len(order) // per_step:,} steps, "
            f"at most {MOST_STEPS:,} are trained",
            "set fewer epochs, or finetune.max_steps, with a new RUN=name",
        )
    largest = batches.largest_micro_batch(lengths[sample(order, per_step)], per_step, tokens, packed)
    longest = batches.size(lengths[[lengths.argmax()]], packed)  # it may come after the sample
    return Choice(per_step, learning_rate(tune, per_step), tokens, max(largest, longest), policy, packed), order


def sample(order: batches.ShuffledRows, per_step: int) -> np.ndarray:
    """Return the row numbers of the first steps, about SAMPLE_ROWS rows and one step at least."""
    return order[: max(1, SAMPLE // per_step) * per_step]


def rows_seen(tune: Finetune, count: int, per_step: int) -> int:
    """Return the number of rows trained on, where a row that is trained on twice counts twice, for `row_count` rows."""
    return tune.max_steps * per_step if tune.max_steps else math.ceil(tune.num_train_epochs * count)


def rows_per_step(tune: Finetune, lengths: np.ndarray, tokens: int, packed: bool) -> int:
    """Return `train_batch_size` from the config, or for "auto" as many rows as one micro-batch holds.

    Args:
        lengths: tokens of each row, int [rows].
        tokens: the most tokens of a micro-batch.
    """
    if tune.train_batch_size != "auto":
        return tune.train_batch_size
    visits = rows_seen(tune, len(lengths), tokens)
    first = batches.ShuffledRows(len(lengths), visits, tune.seed)[:SAMPLE]
    return max(USUAL, min(batches.largest_step(lengths[first], tokens, packed), visits // STEPS))


def learning_rate(tune: Finetune, rows: int) -> float:
    """Return the configured rate, scaled for an "auto" batch by the square root of its rows relative to the usual 8."""
    return tune.learning_rate if tune.train_batch_size != "auto" else tune.learning_rate * math.sqrt(rows / USUAL)
