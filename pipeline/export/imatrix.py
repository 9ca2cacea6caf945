"""Compute the importance matrix of the quantizations from training rows, rendered as they were trained."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from common import files
from pipeline.config.schema import Export
from pipeline.run import training_rows
from pipeline.run.records import DataRecord, FinetuneRecord
from pipeline.run.run_folder import Run
from pipeline.toolchain import llama_tools

if TYPE_CHECKING:
    import pyarrow as pa

IMATRIX_TIME_SHARE = 0.1  # the share of the training time that the importance matrix may take without a GPU


def build_imatrix(base_gguf: Path, data: DataRecord, run: Run, token_count: int) -> Path:
    """Write imatrix.gguf from training rows unless it exists; return its path."""
    folder = base_gguf.parent
    text_path, log = folder / "imatrix.txt", folder / "imatrix.log"
    text_path.write_text(build_imatrix_text(data, run, token_count), encoding="utf-8")
    compute = functools.partial(llama_tools.compute_imatrix, base_gguf, text_path, token_count=token_count, log=log)
    return files.write_if_missing(folder / "imatrix.gguf", compute)


def count_imatrix_tokens(export: Export, data: DataRecord, finetune: FinetuneRecord) -> int:
    """Return the number of tokens for the importance matrix: as configured, at most as many as the training rows hold.

    On a CPU it is also at most as many as can be read in a tenth of the training time. (Training takes about three
    times as long for a token: forward, and backward through it.) The number is at least one chunk.
    """
    limits = [export.imatrix_tokens, data.tokens.train]
    limits += [int(IMATRIX_TIME_SHARE * 3 * finetune.tokens)] if finetune.device.startswith("CPU") else []
    return max(llama_tools.CHUNK_TOKENS, min(limits))


def build_imatrix_text(data: DataRecord, run: Run, min_tokens: int) -> str:
    """Return the text of evenly spaced training rows, rendered as trained; too few rows are repeated.

    Held-out rows are never used. The text has at least `min_tokens` tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer")
    id_column = training_rows.read_table(data.output_path("train"))["input_ids"]
    mean_length = sum(map(len, id_column)) / len(id_column)
    step = max(1, int(len(id_column) * mean_length / min_tokens))
    rows = take_rows(id_column, step, min_tokens + llama_tools.CHUNK_TOKENS)
    return "".join(tokenizer.batch_decode(rows))


def take_rows(id_column: "pa.ChunkedArray", step: int, min_tokens: int) -> list[list[int]]:
    """Return the token ids of every so many rows, around and around, until they are `min_tokens`."""
    rows: list[list[int]] = []
    token_count = 0
    while token_count < min_tokens:
        rows.append(id_column[len(rows) * step % len(id_column)].as_py())
        token_count += len(rows[-1])
    return rows
