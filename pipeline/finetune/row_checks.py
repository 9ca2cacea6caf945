"""Verify that the model is trained on exactly the rows that `data` wrote.

Each check raises RuntimeError, because a fault means that a library has changed the rows.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

    from pipeline.finetune.trainer import StepTrainer


def verify_first_step(trainer: "StepTrainer", training_table: "pa.Table") -> None:
    """Raise RuntimeError unless the trainer's first step has exactly its rows of the training table.

    Token ids and labels are compared without padding, and the step must be packed if packing was chosen.
    """
    rows = next(iter(trainer.get_train_dataloader()))["rows"]
    expected_hashes = {
        _hash_row(row["input_ids"], row["labels"]) for row in training_table.take(rows.numbers).to_pylist()
    }
    row_count = 0
    for batch in trainer.iter_micro_batches(rows):
        if trainer.packed and "packed_seq_lengths" not in batch:
            raise RuntimeError(f"packing is on, but Unsloth does not pack: a micro-batch has only {sorted(batch)}")
        for token_ids, labels in zip(*_split_into_rows(batch), strict=True):
            row_count += 1
            if _hash_row(token_ids, labels) not in expected_hashes:
                raise RuntimeError(
                    f"the trainer's first step holds a row that data did not write: {token_ids[:20]}... "
                    f"labels {labels[:20]}..."
                )
    if row_count != len(rows.numbers):
        raise RuntimeError(f"the first step has {row_count} rows instead of {len(rows.numbers)}")


def end_token_ids(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> set[int]:
    """Return the ids of the tokens that end an answer: EOS and the tokens of `texts`."""
    return {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(texts)}


def verify_answer_ends(training_table: "pa.Table", end_ids: set[int], truncated_rows: int = 0) -> None:
    """Raise RuntimeError when more than `truncated_rows` rows have no token with loss that ends an answer.

    The model would never learn to stop.

    Args:
        training_table: the rows that `data` wrote.
        end_ids: ids of the tokens that end an answer.
        truncated_rows: number of rows that `data` truncated.
    """
    import numpy as np

    labels = training_table["labels"].combine_chunks()
    ends_before = np.concatenate([[0], np.cumsum(np.isin(labels.values.to_numpy(), list(end_ids)))])
    offsets = labels.offsets.to_numpy()
    endless_rows = np.flatnonzero(ends_before[offsets[1:]] == ends_before[offsets[:-1]])
    if len(endless_rows) > truncated_rows:  # rows truncated at max_seq_length, as clean.too_long configures
        raise RuntimeError(
            f"training row {endless_rows[0]} has no end token: none of its labels is one of {sorted(end_ids)}"
        )


def _hash_row(token_ids: list[int], labels: list[int]) -> int:
    """Return a hash of one row without its first label, which carries no loss and is masked by packing."""
    return hash((tuple(token_ids), tuple(labels[1:])))


def _split_into_rows(batch: dict) -> tuple[list[list[int]], list[list[int]]]:
    """Return (token ids, labels) of the rows in a padded batch, or in a packed batch of TRL.

    A packed batch is one long row, whose position_ids start again at each of its rows.
    """
    token_ids, labels = [], []
    for i, row in enumerate(batch["input_ids"].tolist()):
        row_labels = batch["labels"][i].tolist()
        if "attention_mask" in batch:
            starts = [0, int(batch["attention_mask"][i].sum())]
        else:
            lengths = batch["packed_seq_lengths"].tolist()
            starts = [sum(lengths[:k]) for k in range(len(lengths) + 1)]
        token_ids += [row[a:b] for a, b in pairwise(starts)]
        labels += [row_labels[a:b] for a, b in pairwise(starts)]
    return token_ids, labels
