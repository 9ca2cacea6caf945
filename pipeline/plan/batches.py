"""Which rows make an optimizer step, and how many of them go through the model at once.

The first is exact and follows from the seed alone: every step has `train_batch_size` rows, the last one what is left. The
second is not the model's business: the gradients of a step's micro-batches add up to those of the whole step, so fewer
tokens at once cost time and save memory, and nothing else changes. That is why a run that ran out of memory, or goes on
with another card, still trains the same steps.
"""

import functools
import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.run.training_rows import IGNORED

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

PACKED, PADDED = 64, 8  # tokens that a micro-batch's length is rounded up to: what the kernels like, and its cost


@dataclass(frozen=True)
class ShuffledRows:
    """The rows of a training in order: epoch after epoch, each shuffled by its own seed.

    A slice of it is an array of row numbers, int64. Only epochs in use are in memory, so a hundred optimizer steps and a
    million take the same.
    """

    rows: int
    visits: int
    """Rows trained on; a row that is trained on twice counts twice."""
    seed: int

    def __len__(self) -> int:
        return self.visits

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.visits)
        epochs = range(start // self.rows, math.ceil(max(start + 1, stop) / self.rows))
        numbers = np.concatenate([_shuffled_epoch(self.rows, self.seed, epoch) for epoch in epochs])
        return numbers[start - epochs[0] * self.rows : stop - epochs[0] * self.rows]

    def count_tokens(self, lengths: np.ndarray, visits: int) -> int:
        """Return the tokens of the first `visits` rows. lengths: tokens of each row, int [rows]."""
        epochs, rest = divmod(min(visits, self.visits), self.rows)
        begun = lengths[_shuffled_epoch(self.rows, self.seed, epochs)[:rest]] if rest else lengths[:0]
        return epochs * int(lengths.sum()) + int(begun.sum())


@functools.lru_cache(maxsize=2)
def _shuffled_epoch(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


@dataclass(frozen=True)
class Rows:
    """One step's rows: their numbers in train.parquet, token ids and labels."""

    numbers: list[int]
    ids: list[np.ndarray]
    labels: list[np.ndarray]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def targets(self) -> int:
        """Tokens that carry loss. A row's first token follows nothing and never does."""
        return int(sum(np.count_nonzero(labels[1:] != IGNORED) for labels in self.labels))


def lengths(table: "pa.Table") -> np.ndarray:
    """Tokens of each row, int [rows]."""
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in table["input_ids"].chunks])


def step_rows(table: "pa.Table", numbers: np.ndarray) -> Rows:
    """The rows of these numbers, read from the table."""
    taken = table.take(numbers)
    columns = ([row.values.to_numpy() for row in taken[name]] for name in ("input_ids", "labels"))
    return Rows(numbers.tolist(), *columns)


def dataset(table: "pa.Table", order: ShuffledRows | np.ndarray, per_step: int) -> "Dataset":
    """One item a step, {"rows": Rows}, made when it is asked for: it costs no memory, whatever the number of epochs."""
    from datasets import Dataset

    def items(batch: dict) -> dict:
        return {"rows": [step_rows(table, order[k * per_step : (k + 1) * per_step]) for k in batch["step"]]}

    steps = math.ceil(len(order) / per_step)
    return Dataset.from_dict({"step": np.arange(steps)}).with_transform(items)


def micro_batches(lengths: list[int], budget: int, packed: bool) -> list[list[int]]:
    """Positions of rows that go through the model together, at most `budget` tokens a micro-batch, padding counted.

    A row that is longer than that goes alone.
    """
    return _packs(lengths, budget) if packed else _padded(lengths, budget)


def _packs(lengths: list[int], budget: int) -> list[list[int]]:
    """As few as possible and equally full: rows one after another in one row. Longest first, into the emptiest."""
    count = max(1, math.ceil(sum(lengths) / budget))
    while True:
        heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(min(count, len(lengths)))]
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            full, number, pack = heap[0]
            pack.append(i)
            heapq.heapreplace(heap, (full + lengths[i], number, pack))
        if count >= len(lengths) or max(heap)[0] <= budget:
            return [sorted(pack) for _, _, pack in sorted(heap, key=lambda entry: entry[1])]
        count += 1


def _padded(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows of similar length together, each padded to the longest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and _up(lengths[groups[-1][0]], PADDED) * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def largest_micro_batch(lengths: np.ndarray, per_step: int, budget: int, packed: bool) -> int:
    """Tokens of the largest one of these steps, padding counted. lengths: of the rows in the order of training."""
    largest = 0
    for start in range(0, len(lengths), per_step):
        step = lengths[start : start + per_step]
        for group in micro_batches(step.tolist(), budget, packed):
            largest = max(largest, size(step[group], packed))
    return largest


def size(lengths: np.ndarray, packed: bool) -> int:
    """Tokens of a micro-batch of such rows, padding counted."""
    return _up(int(lengths.sum()), PACKED) if packed else _up(int(lengths.max()), PADDED) * len(lengths)


def examples(rows: Rows, group: list[int], packed: bool) -> list[dict]:
    """A micro-batch as TRL's collator takes it: one long row with `seq_lengths`, or the rows themselves."""
    if not packed:
        return [{"input_ids": rows.ids[i], "labels": rows.labels[i]} for i in group]
    ids, labels = (np.concatenate([column[i] for i in group]) for column in (rows.ids, rows.labels))
    return [{"input_ids": ids, "labels": labels, "seq_lengths": [len(rows.ids[i]) for i in group]}]


def largest_step(lengths: np.ndarray, budget: int, packed: bool) -> int:
    """How many rows a step can have so that each of them fits into one micro-batch. lengths: in the order of training."""
    for count in range(max(1, int(budget // lengths.mean())), 1, -1):
        starts = np.arange(0, len(lengths), count)
        longest, rows = np.maximum.reduceat(lengths, starts), np.diff([*starts, len(lengths)])
        sizes = np.add.reduceat(lengths, starts) if packed else _up(longest, PADDED) * rows
        if sizes.max() <= budget:
            return count
    return 1


def _up(length, multiple: int):
    return -(-length // multiple) * multiple
