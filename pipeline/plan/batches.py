"""Which rows make an optimizer step, and how a step is split into micro-batches.

The rows of a step follow from the seed alone: every step has `train_batch_size` rows, and the last one has the rest.
The split does not change what is learned: the gradients of a step's micro-batches add up to those of the whole step, so
smaller micro-batches only take more time and less memory. Therefore a run that ran out of memory, or that resumes on
another GPU, still trains the same steps.
"""

import functools
import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.run.training_rows import IGNORED_LABEL

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# The length of a micro-batch is rounded up to a multiple of so many tokens, which the kernels need to be fast.
PACKED_MULTIPLE, PADDED_MULTIPLE = 64, 8


@dataclass(frozen=True)
class ShuffledRows:
    """The order of a training's rows: one epoch after another, each shuffled by its own seed.

    A slice is an array of row numbers, int64. Only the epochs in use are in memory, so that a million optimizer steps
    take no more memory than a hundred.
    """

    row_count: int
    visits: int
    """Number of rows trained on; a row that is trained on twice counts twice."""
    seed: int

    def __len__(self) -> int:
        return self.visits

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.visits)
        epochs = range(start // self.row_count, math.ceil(max(start + 1, stop) / self.row_count))
        row_numbers = np.concatenate([_shuffle_epoch(self.row_count, self.seed, epoch) for epoch in epochs])
        return row_numbers[start - epochs[0] * self.row_count : stop - epochs[0] * self.row_count]

    def count_tokens(self, lengths: np.ndarray, visits: int) -> int:
        """Return the number of tokens in the first `visits` rows of the order; `lengths` are int [rows]."""
        epochs, remainder = divmod(min(visits, self.visits), self.row_count)
        last_epoch_lengths = (
            lengths[_shuffle_epoch(self.row_count, self.seed, epochs)[:remainder]] if remainder else lengths[:0]
        )
        return epochs * int(lengths.sum()) + int(last_epoch_lengths.sum())


@functools.lru_cache(maxsize=2)
def _shuffle_epoch(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled row numbers of one epoch, int64 [rows]."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


@dataclass(frozen=True)
class StepRows:
    """The rows of one optimizer step: their numbers in train.parquet, token ids and labels."""

    numbers: list[int]
    ids: list[np.ndarray]
    labels: list[np.ndarray]

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        return [len(ids) for ids in self.ids]

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all rows."""
        return sum(self.lengths)

    @property
    def targets(self) -> int:
        """Return the number of tokens that carry loss. The first token of a row follows nothing, so it never does."""
        return int(sum(np.count_nonzero(labels[1:] != IGNORED_LABEL) for labels in self.labels))


def row_lengths(table: "pa.Table") -> np.ndarray:
    """Return the number of tokens of each row in the training table, int [rows]."""
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in table["input_ids"].chunks])


def take_step_rows(table: "pa.Table", numbers: np.ndarray) -> StepRows:
    """Return the rows with these numbers from the training table."""
    selected_rows = table.take(numbers)
    columns = ([row.values.to_numpy() for row in selected_rows[name]] for name in ("input_ids", "labels"))
    return StepRows(numbers.tolist(), *columns)


def build_step_dataset(table: "pa.Table", order: ShuffledRows | np.ndarray, rows_per_step: int) -> "Dataset":
    """Return a data set with one item for each optimizer step, {"rows": StepRows}.

    An item is made when it is read, so the data set takes no memory for any number of epochs.
    """
    from datasets import Dataset

    def load_steps(batch: dict) -> dict:
        starts = [step * rows_per_step for step in batch["step"]]
        return {"rows": [take_step_rows(table, order[start : start + rows_per_step]) for start in starts]}

    steps = math.ceil(len(order) / rows_per_step)
    return Dataset.from_dict({"step": np.arange(steps)}).with_transform(load_steps)


def split_into_micro_batches(lengths: list[int], max_tokens: int, packed: bool) -> list[list[int]]:
    """Split the rows of a step into micro-batches and return the positions of the rows in each.

    A micro-batch has at most `max_tokens` tokens, padding included, or is one longer row. The rows of a packed one
    follow each other in one sequence; those of another one are padded.
    """
    return _split_packed(lengths, max_tokens) if packed else _split_padded(lengths, max_tokens)


def _split_packed(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Make as few packed micro-batches as possible, of equal size."""
    batch_count = max(1, math.ceil(sum(lengths) / max_tokens))
    while True:
        packs = _fill_packs(lengths, min(batch_count, len(lengths)))
        if batch_count >= len(lengths) or max(packs)[0] <= max_tokens:
            return [sorted(positions) for _, _, positions in sorted(packs, key=lambda pack: pack[1])]
        batch_count += 1


def _fill_packs(lengths: list[int], count: int) -> list[tuple[int, int, list[int]]]:
    """Return packs of rows, each (tokens, number, positions of its rows): the longest row first, into the emptiest."""
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, number, positions = heap[0]
        positions.append(i)
        heapq.heapreplace(heap, (tokens + lengths[i], number, positions))
    return heap


def _split_padded(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Make padded micro-batches of rows of similar length, each row padded to the longest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or _round_up(lengths[groups[-1][0]], PADDED_MULTIPLE) * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def largest_micro_batch_tokens(lengths: np.ndarray, rows_per_step: int, max_tokens: int, packed: bool) -> int:
    """Return the tokens of the largest micro-batch, padding included. The rows are in the order of training."""
    largest = 0
    for start in range(0, len(lengths), rows_per_step):
        step_lengths = lengths[start : start + rows_per_step]
        for group in split_into_micro_batches(step_lengths.tolist(), max_tokens, packed):
            largest = max(largest, count_batch_tokens(step_lengths[group], packed))
    return largest


def count_batch_tokens(lengths: np.ndarray, packed: bool) -> int:
    """Return the tokens of a micro-batch of rows with these lengths, padding included."""
    return (
        _round_up(int(lengths.sum()), PACKED_MULTIPLE)
        if packed
        else _round_up(int(lengths.max()), PADDED_MULTIPLE) * len(lengths)
    )


def build_examples(rows: StepRows, group: list[int], packed: bool) -> list[dict]:
    """Return a micro-batch as TRL's collator takes it: one long row with `seq_lengths` when packed, else the rows."""
    if not packed:
        return [{"input_ids": rows.ids[i], "labels": rows.labels[i]} for i in group]
    token_ids, labels = (np.concatenate([column[i] for i in group]) for column in (rows.ids, rows.labels))
    return [{"input_ids": token_ids, "labels": labels, "seq_lengths": [len(rows.ids[i]) for i in group]}]


def max_rows_per_step(lengths: np.ndarray, max_tokens: int, packed: bool) -> int:
    """Return how many rows a step can have so that every step fits into one micro-batch.

    Args:
        lengths: tokens of the rows in the order of training, int [rows].
        max_tokens: the most tokens of a micro-batch, padding included.
    """
    counts = range(max(1, int(max_tokens // lengths.mean())), 1, -1)
    return next((count for count in counts if _count_step_tokens(lengths, count, packed).max() <= max_tokens), 1)


def _count_step_tokens(lengths: np.ndarray, rows_per_step: int, packed: bool) -> np.ndarray:
    """Return the tokens of each step as one micro-batch, int [steps]."""
    starts = np.arange(0, len(lengths), rows_per_step)
    if packed:
        return np.add.reduceat(lengths, starts)
    longest, row_counts = np.maximum.reduceat(lengths, starts), np.diff([*starts, len(lengths)])
    return _round_up(longest, PADDED_MULTIPLE) * row_counts


def _round_up(length, multiple: int):
    """Round a number, or an array of numbers, up to a multiple."""
    return -(-length // multiple) * multiple
