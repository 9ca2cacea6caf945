"""Verify that the model is trained on exactly the rows that `data` wrote.

Each check raises RuntimeError, because a fault means that a library has changed the rows.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

    from pipeline.finetune.trainer import StepTrainer
    from pipeline.plan.batches import StepRows

Row = tuple[list[int], list[int]]  # (token ids, labels)


def verify_first_step(trainer: "StepTrainer", training_table: "pa.Table") -> None:
    """Raise RuntimeError unless the trainer's first step has exactly its rows of the training table.

    Token ids and labels are compared without padding, and the step must be packed if packing was chosen.
    """
    step_rows = next(iter(trainer.get_train_dataloader()))["rows"]
    rows_on_disk = training_table.take(step_rows.numbers).to_pylist()
    expected_hashes = {_hash_row(row["input_ids"], row["labels"]) for row in rows_on_disk}
    row_count = 0
    for token_ids, labels in _unpack_micro_batches(trainer, step_rows):
        row_count += 1
        if _hash_row(token_ids, labels) not in expected_hashes:
            raise RuntimeError(
                f"the trainer's first step holds a row that data did not write: {token_ids[:20]}... "
                f"labels {labels[:20]}..."
            )
    if row_count != len(step_rows.numbers):
        raise RuntimeError(f"the first step has {row_count} rows instead of {len(step_rows.numbers)}")


def _unpack_micro_batches(trainer: "StepTrainer", step_rows: "StepRows") -> Iterator[Row]:
    """Yield the rows in the micro-batches of a step. Raise RuntimeError when they should be packed and are not."""
    for batch in trainer.iter_micro_batches(step_rows):
        if trainer.packed and "packed_seq_lengths" not in batch:
            raise RuntimeError(f"packing is on, but Unsloth does not pack: a micro-batch has only {sorted(batch)}")
        yield from _split_into_rows(batch)


def end_token_ids(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> set[int]:
    """Return the ids of the tokens that end an answer: EOS and the tokens of `texts`."""
    ids = tokenizer.convert_tokens_to_ids(texts)
    return {tokenizer.eos_token_id, *ids}  # type: ignore[misc]  # a list of texts gives a list


def verify_answer_ends(training_table: "pa.Table", end_ids: set[int], truncated_rows: int = 0) -> None:
    """Raise RuntimeError when more than `truncated_rows` rows teach the model no stop: no label ends an answer."""
    endless_rows = _find_endless_rows(training_table, end_ids)
    if len(endless_rows) > truncated_rows:  # rows truncated at max_seq_length, as clean.too_long configures
        raise RuntimeError(
            f"training row {endless_rows[0]} has no end token: none of its labels is one of {sorted(end_ids)}"
        )


def _find_endless_rows(training_table: "pa.Table", end_ids: set[int]) -> "np.ndarray":
    """Return the numbers of the rows without a label that is one of `end_ids`, int [rows]."""
    import numpy as np

    labels = training_table["labels"].combine_chunks()
    ends_before = np.concatenate([[0], np.cumsum(np.isin(labels.values.to_numpy(), list(end_ids)))])
    offsets = labels.offsets.to_numpy()
    return np.flatnonzero(ends_before[offsets[1:]] == ends_before[offsets[:-1]])


def _hash_row(token_ids: list[int], labels: list[int]) -> int:
    """Return a hash of one row without its first label, which carries no loss and is masked by packing."""
    return hash((tuple(token_ids), tuple(labels[1:])))


def _split_into_rows(batch: dict) -> Iterator[Row]:
    """Yield the rows in a padded batch, or in a packed batch of TRL, which is one long row of them all."""
    for index, (token_ids, labels) in enumerate(
        zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ):
        for start, end in pairwise(_find_row_bounds(batch, index)):
            yield token_ids[start:end], labels[start:end]


def _find_row_bounds(batch: dict, index: int) -> list[int]:
    """Return where each row of a sequence begins, and where the last one ends."""
    if "attention_mask" in batch:
        return [0, int(batch["attention_mask"][index].sum())]
    return [0, *accumulate(batch["packed_seq_lengths"].tolist())]
