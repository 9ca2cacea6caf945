"""Tokenized training rows on disk: Parquet with input_ids and labels, lists of int32, one entry a row."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

IGNORED = -100  # the label of a token that carries no loss (torch's and transformers' convention)


def schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})


def read(path: Path) -> "pa.Table":
    """All rows, in order."""
    from pyarrow import parquet

    return parquet.read_table(path)


def first(path: Path, count: int) -> list[dict]:
    """The first rows as {input_ids, labels}."""
    from pyarrow import parquet

    batch = next(parquet.ParquetFile(path).iter_batches(count), None)
    return batch.to_pylist() if batch is not None else []
