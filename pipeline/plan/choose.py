"""Micro-batch and gradient checkpointing for a card, and the rows of a step where the user leaves them free.

Measured on an H100 with an 8B model: 16,384 tokens at once without gradient checkpointing 16,289 tokens/s, 4,096 still
14,939, any number with it 11,290. So the micro-batch shrinks to 4,096 tokens before anything is computed twice.
"""

import math
from dataclasses import dataclass

import numpy as np

from contract.errors import UserError
from pipeline.config import Base, Finetune
from pipeline.finetune import batches
from pipeline.plan import memory

TOKENS = (16384, 12288, 8192, 6144, 4096)
CHECKPOINTED = (8192, 4096, 2048, 1024, 512)
SHARE = 0.92  # of the card's memory that torch may fill: fragments, and 10 % of error in the arithmetic
USUAL = 8  # rows a step that a learning rate is given for
STEPS = 100  # optimizer steps that a free batch leaves at least, where the rows suffice


@dataclass(frozen=True)
class Choice:
    """What a training runs with."""

    train_batch_size: int
    learning_rate: float
    micro_batch_tokens: int
    use_gradient_checkpointing: memory.Checkpointing
    packing: bool


def micro_batch(model: memory.Shape | None, base: Base, tune: Finetune, longest: int, card: float | None, packed: bool) -> tuple[int, memory.Checkpointing]:
    """Tokens at once, and the checkpointing policy. longest: tokens of the longest row; card: bytes, None on a CPU.

    Raises UserError where nothing fits.
    """
    asked = tune.use_gradient_checkpointing
    if card is None or model is None:
        return tune.micro_batch_tokens or max(longest, TOKENS[-1]), "unsloth" if asked == "auto" and card else asked not in (False, "auto") and asked
    policies = [asked] if asked != "auto" else [False, "unsloth"]
    tried = [
        (max(tokens, longest), policy)
        for policy in policies
        for tokens in ([tune.micro_batch_tokens] if tune.micro_batch_tokens else CHECKPOINTED if policy else TOKENS)
    ]
    for tokens, policy in tried:
        if memory.peak(model, base, tune, tokens, policy, packed) + memory.CONTEXT <= SHARE * card:
            return tokens, policy
    least = memory.peak(model, base, tune, *tried[-1], packed) + memory.CONTEXT
    raise UserError(
        f"{base.model} needs {least / SHARE / 1e9:.0f} GB of GPU memory for its longest row ({longest:,} tokens), this card has {card / 1e9:.0f} GB",
        "a larger card, base.load_in_4bit: true, or a smaller base.max_seq_length, with a new RUN=name",
    )


def rows_per_step(tune: Finetune, lengths: np.ndarray, tokens: int, packed: bool) -> int:
    """As configured; or, left free, as many as one micro-batch holds. lengths: in the order of training, int [rows seen]."""
    if tune.train_batch_size != "auto":
        return tune.train_batch_size
    return max(USUAL, min(batches.largest_step(lengths, tokens, packed), len(lengths) // STEPS))


def learning_rate(tune: Finetune, rows: int) -> float:
    """As configured for a batch that is; for a free one by the square root of its rows, from the usual 8."""
    return tune.learning_rate if tune.train_batch_size != "auto" else tune.learning_rate * math.sqrt(rows / USUAL)
