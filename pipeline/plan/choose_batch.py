"""Choose micro-batch size and gradient checkpointing for a GPU, and the rows of a step where the config has "auto".

Measured on an H100 with an 8B model: micro-batches of 16,384 tokens without gradient checkpointing train 16,289 tokens
a second, those of 4,096 tokens still 14,939, and those of any size with gradient checkpointing 11,290. Therefore the
micro-batch shrinks to 4,096 tokens before gradient checkpointing is turned on.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from pipeline.config.schema import MAX_STEPS, Base, Finetune
from pipeline.plan import batches, memory_need

TOKEN_LIMITS = (16384, 12288, 8192, 6144, 4096)  # micro-batch sizes to try without gradient checkpointing
CHECKPOINTED_TOKEN_LIMITS = (8192, 4096, 2048, 1024, 512)  # with it
# The share of GPU memory that torch may fill; the rest is for fragments and for errors of up to 10 % in the estimate.
USABLE_MEMORY_SHARE = 0.92
# The rows of a step that finetune.learning_rate refers to when train_batch_size is "auto".
DEFAULT_ROWS_PER_STEP = 8
# Model types whose rows Unsloth does not pack (its PADDING_FREE_BLOCKLIST): rows of similar length are padded.
UNPACKED_MODEL_TYPES = ("gemma2", "gpt_oss")
# The least optimizer steps when train_batch_size is "auto", where there are enough rows.
MIN_STEPS = 100
# The number of rows whose micro-batches are computed. In a longer training the first rows stand for all of them, so a
# plan of a million steps takes no longer than one of two thousand.
SAMPLE_ROWS = 16_384


@dataclass(frozen=True)
class BatchChoice:
    """The batch settings that a training runs with."""

    train_batch_size: int
    learning_rate: float
    micro_batch_tokens: int
    """The most tokens of a micro-batch, padding included."""
    largest_micro_batch: int
    """Tokens of the largest micro-batch that these rows make, padding included."""
    use_gradient_checkpointing: memory_need.CheckpointingPolicy
    packing: bool


@dataclass(frozen=True)
class TrainingTask:
    """What is trained, and on what."""

    shape: memory_need.ModelShape | None
    """None when the memory of such a model cannot be estimated; then the first candidate is chosen."""
    base: Base
    lengths: np.ndarray
    """Tokens of each row, int [rows]."""
    gpu_bytes: float | None
    """GPU memory, None on a CPU."""
    resumed_rows_per_step: int | None = None
    """Rows of a step in the training that is resumed."""


def choose_batch_settings(task: TrainingTask, tune: Finetune, packed: bool) -> tuple[BatchChoice, batches.ShuffledRows]:
    """Return the first candidate that fits the GPU, and the rows in the order of training.

    A `micro_batch_tokens` from the config is returned even if it does not fit: the training then lowers it.

    Raises:
        UserError: not even the smallest candidate fits, or the training would have too many steps.
    """
    least_need, longest = math.inf, int(task.lengths.max())
    for tokens, policy in list_candidates(tune, longest, task.gpu_bytes):
        choice, order = build_choice(tune, task.lengths, tokens, policy, packed, task.resumed_rows_per_step)
        need = estimate_need(task, tune, choice)
        if need is None or task.gpu_bytes is None or need <= USABLE_MEMORY_SHARE * task.gpu_bytes:
            return choice, order
        least_need = min(least_need, need)
    if tune.micro_batch_tokens and tune.micro_batch_tokens > longest:
        return choice, order  # as configured: if it does not fit, the training lowers it
    raise small_gpu_error(task, least_need)


def estimate_need(task: TrainingTask, tune: Finetune, choice: BatchChoice) -> float | None:
    """Return the bytes of GPU memory that a training needs; None when they cannot be estimated."""
    if task.shape is None:
        return None
    tokens, policy = choice.largest_micro_batch, choice.use_gradient_checkpointing
    peak = memory_need.peak_bytes(task.shape, task.base, tune, tokens, policy, choice.packing)
    return peak + memory_need.CUDA_CONTEXT_BYTES


def small_gpu_error(task: TrainingTask, least_need: float) -> UserError:
    """Return the error that the smallest candidate, which needs `least_need` bytes, does not fit."""
    return UserError(
        f"{task.base.model} needs {least_need / USABLE_MEMORY_SHARE / 1e9:.0f} GB of GPU memory for its longest row "
        f"({task.lengths.max():,} tokens); this GPU has {(task.gpu_bytes or 0) / 1e9:.0f} GB",
        "use a larger GPU (`make plan` names one), base.load_in_4bit: true, or a smaller base.max_seq_length, "
        "with a new RUN=name",
        code="gpu.too_small",
    )


def can_pack_rows(model_type: str) -> bool:
    """Return whether Unsloth packs rows for models of this kind (`model_type` of config.json)."""
    return model_type not in UNPACKED_MODEL_TYPES


def list_candidates(
    tune: Finetune, longest: int, gpu_bytes: float | None
) -> list[tuple[int, memory_need.CheckpointingPolicy]]:
    """Return (micro-batch tokens, checkpointing policy) pairs, the fastest first.

    Args:
        longest: tokens of the longest row. A micro-batch may always have so many.
        gpu_bytes: GPU memory, None on a CPU.
    """
    policies = list_policies(tune)
    if gpu_bytes is None:
        return [(tune.micro_batch_tokens or max(longest, TOKEN_LIMITS[-1]), policies[0])]
    return [(max(tokens, longest), policy) for policy in policies for tokens in list_token_limits(tune, policy)]


def list_policies(tune: Finetune) -> tuple[memory_need.CheckpointingPolicy, ...]:
    """Return the gradient checkpointing policies that the config allows, the fastest first."""
    configured = tune.use_gradient_checkpointing
    return (False, "unsloth") if configured == "auto" else (configured,)


def list_token_limits(tune: Finetune, policy: memory_need.CheckpointingPolicy) -> tuple[int, ...]:
    """Return the micro-batch sizes to try with a policy, in tokens, the largest first."""
    if tune.micro_batch_tokens:
        return (tune.micro_batch_tokens,)
    return CHECKPOINTED_TOKEN_LIMITS if policy else TOKEN_LIMITS


def build_choice(
    tune: Finetune,
    lengths: np.ndarray,
    tokens: int,
    policy: memory_need.CheckpointingPolicy,
    packed: bool,
    resumed_rows_per_step: int | None,
) -> tuple[BatchChoice, batches.ShuffledRows]:
    """Return the batch settings for a micro-batch of at most `tokens`, and the rows in the order of training.

    Raises:
        UserError: the training would have more than MAX_STEPS steps.
    """
    rows_per_step = resumed_rows_per_step or choose_rows_per_step(tune, lengths, tokens, packed)
    order = batches.ShuffledRows(len(lengths), count_visits(tune, len(lengths), rows_per_step), tune.seed)
    refuse_too_many_steps(tune, len(order), rows_per_step)
    first_lengths = lengths[select_first_rows(order, rows_per_step)]
    largest = batches.largest_micro_batch_tokens(first_lengths, rows_per_step, tokens, packed)
    longest = batches.count_batch_tokens(lengths[[lengths.argmax()]], packed)  # it may come after the sample
    learning_rate = scale_learning_rate(tune, rows_per_step)
    return BatchChoice(rows_per_step, learning_rate, tokens, max(largest, longest), policy, packed), order


def refuse_too_many_steps(tune: Finetune, visits: int, rows_per_step: int) -> None:
    """Raise UserError when a training on `visits` rows would have more than MAX_STEPS steps."""
    if visits > MAX_STEPS * rows_per_step:
        raise UserError(
            f"finetune.num_train_epochs {tune.num_train_epochs:g} makes {visits // rows_per_step:,} steps; "
            f"at most {MAX_STEPS:,} are allowed",
            "set fewer epochs, or finetune.max_steps, with a new RUN=name",
            code="finetune.too_many_steps",
        )


def select_first_rows(order: batches.ShuffledRows, rows_per_step: int) -> np.ndarray:
    """Return the row numbers of the first steps, about SAMPLE_ROWS rows and one step at least."""
    return order[: max(1, SAMPLE_ROWS // rows_per_step) * rows_per_step]


def count_visits(tune: Finetune, row_count: int, rows_per_step: int) -> int:
    """Return the number of rows trained on, where a row that is trained on twice counts twice, for `row_count` rows."""
    return tune.max_steps * rows_per_step if tune.max_steps else math.ceil(tune.num_train_epochs * row_count)


def choose_rows_per_step(tune: Finetune, lengths: np.ndarray, tokens: int, packed: bool) -> int:
    """Return `train_batch_size` from the config, or for "auto" as many rows as a micro-batch of `tokens` holds."""
    if tune.train_batch_size != "auto":
        return tune.train_batch_size
    visits = count_visits(tune, len(lengths), tokens)
    first_rows = batches.ShuffledRows(len(lengths), visits, tune.seed)[:SAMPLE_ROWS]
    fitting_rows = batches.max_rows_per_step(lengths[first_rows], tokens, packed)
    return max(DEFAULT_ROWS_PER_STEP, min(fitting_rows, visits // MIN_STEPS))


def scale_learning_rate(tune: Finetune, rows_per_step: int) -> float:
    """Return the configured rate, scaled for an "auto" batch by the square root of its rows relative to the usual 8."""
    scale = math.sqrt(rows_per_step / DEFAULT_ROWS_PER_STEP) if tune.train_batch_size == "auto" else 1
    return tune.learning_rate * scale
