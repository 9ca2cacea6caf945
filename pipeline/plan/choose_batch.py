"""Micro-batch and gradient checkpointing for a card, and the rows of a step where the user leaves them free.

Measured on an H100 with an 8B model: 16,384 tokens at once without gradient checkpointing 16,289 tokens/s, 4,096 still
14,939, any number with it 11,290. So the micro-batch shrinks to 4,096 tokens before anything is computed twice.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from pipeline.config.schema import MOST_STEPS, Base, Finetune
from pipeline.plan import batches, memory_need

TOKENS = (16384, 12288, 8192, 6144, 4096)
CHECKPOINTED = (8192, 4096, 2048, 1024, 512)
SHARE = 0.92  # of the card's memory that torch may fill: fragments, and 10 % of error in the arithmetic
USUAL = 8  # rows a step that a learning rate is given for
# Model types whose rows Unsloth does not pack (its PADDING_FREE_BLOCKLIST): rows of similar length are padded.
PADDED = ("gemma2", "gpt_oss")
STEPS = 100  # optimizer steps that a free batch leaves at least, where the rows suffice
# Rows whose batches are looked at: the first ones of a longer training stand for all, so that a plan takes as long for a
# million steps as for two thousand.
SAMPLE = 16_384


@dataclass(frozen=True)
class Choice:
    """What a training runs with."""

    train_batch_size: int
    learning_rate: float
    micro_batch_tokens: int
    """The most that may go through the model at once."""
    largest_micro_batch: int
    """Tokens of the largest that these rows make, padding counted."""
    use_gradient_checkpointing: memory_need.Checkpointing
    packing: bool


def choose(
    model: memory_need.Shape | None, base: Base, tune: Finetune, lengths: np.ndarray, card: float | None, packed: bool,
    begun: int | None = None,
) -> tuple[Choice, batches.ShuffledRows]:  # fmt: skip
    """The first of the candidates that fits the card, and the rows in the order of training.

    model: None where the arithmetic does not know the shape. lengths: tokens of each row, int [rows]. card: its memory in
    bytes, None on a CPU. begun: rows a step of a training that goes on. Raises UserError where nothing fits.
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
        return made, order  # as asked: where it does not fit, the training takes less at once
    raise UserError(
        f"{base.model} needs {least / SHARE / 1e9:.0f} GB of GPU memory for its longest row ({lengths.max():,} tokens), this card has {card / 1e9:.0f} GB",
        "a larger card (`make plan` names one), base.load_in_4bit: true, or a smaller base.max_seq_length, with a new RUN=name",
    )


def packs(kind: str) -> bool:
    """Does Unsloth pack rows for such a model? kind: model_type of config.json."""
    return kind not in PADDED


def candidates(tune: Finetune, longest: int, card: float | None) -> list[tuple[int, memory_need.Checkpointing]]:
    """(tokens at once, checkpointing policy), the fastest first. longest: tokens of the longest row, which goes alone."""
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
    """The choice that goes with so many tokens at once, and the order of training."""
    per_step = begun or rows_per_step(tune, lengths, tokens, packed)
    order = batches.ShuffledRows(len(lengths), rows_seen(tune, len(lengths), per_step), tune.seed)
    if len(order) > MOST_STEPS * per_step:
        raise UserError(
            f"finetune.num_train_epochs {tune.num_train_epochs:g} makes {len(order) // per_step:,} steps, at most {MOST_STEPS:,} are trained",
            "set fewer epochs, or finetune.max_steps, with a new RUN=name",
        )
    largest = batches.largest_micro_batch(lengths[sample(order, per_step)], per_step, tokens, packed)
    longest = batches.size(lengths[[lengths.argmax()]], packed)  # it may stand behind the sample
    return Choice(per_step, learning_rate(tune, per_step), tokens, max(largest, longest), policy, packed), order


def sample(order: batches.ShuffledRows, per_step: int) -> np.ndarray:
    """Return the row numbers of the first steps: all of them up to about SAMPLE rows, and one step at least."""
    return order[: max(1, SAMPLE // per_step) * per_step]


def rows_seen(tune: Finetune, count: int, per_step: int) -> int:
    """Rows trained on, one that is trained on twice counted twice."""
    return tune.max_steps * per_step if tune.max_steps else math.ceil(tune.num_train_epochs * count)


def rows_per_step(tune: Finetune, lengths: np.ndarray, tokens: int, packed: bool) -> int:
    """As configured; or, left free, as many as one micro-batch holds. lengths: of each row, int [rows]."""
    if tune.train_batch_size != "auto":
        return tune.train_batch_size
    visits = rows_seen(tune, len(lengths), tokens)
    first = batches.ShuffledRows(len(lengths), visits, tune.seed)[:SAMPLE]
    return max(USUAL, min(batches.largest_step(lengths[first], tokens, packed), visits // STEPS))


def learning_rate(tune: Finetune, rows: int) -> float:
    """As configured for a batch that is; for a free one by the square root of its rows, from the usual 8."""
    return tune.learning_rate if tune.train_batch_size != "auto" else tune.learning_rate * math.sqrt(rows / USUAL)
