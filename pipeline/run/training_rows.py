"""Tokenized training rows on disk: a Parquet file with input_ids and labels, both lists of int32, for each row."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

IGNORED_LABEL = -100  # the label of a token that carries no loss, by convention of torch and transformers


def row_schema() -> "pa.Schema":
    """Return the Parquet schema of training rows."""
    import pyarrow as pa

    return pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})


def read_table(path: Path) -> "pa.Table":
    """Return all rows as a table, in order."""
    from pyarrow import parquet

    return parquet.read_table(path)


def read_first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the first `count` rows as {input_ids, labels}."""
    from pyarrow import parquet

    batch = next(parquet.ParquetFile(path).iter_batches(count), None)
    return batch.to_pylist() if batch is not None else []


def decode_tokens(tokenizer: "PreTrainedTokenizerFast", token_ids: list[int]) -> str:
    """Return the text of the token ids of one row."""
    return tokenizer.decode(token_ids)  # type: ignore[return-value]  # only the ids of several rows give a list
