"""Store all rows of a data set between the workers and the outputs.

Token ids and labels are on disk, and hashes of the rows are in memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from common import files
from pipeline.config.schema import Clean
from pipeline.data import duplicates
from pipeline.data.process_rows import ProcessedChunk, Tally
from pipeline.run import training_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

GROUP_ROWS = 10_000  # rows that are read from the spool and written at once
COLUMNS = ("part", "lines", "held", "lengths", "learned", "digests", "questions")


class RowSpool:
    """Collect the results of the workers in order, find rows to drop among all of them, and write the outputs.

    After `close`, each of COLUMNS is an attribute: an array with one entry a row.
    """

    part: np.ndarray
    """The number of the part that the row came from."""
    lines: np.ndarray
    """Its line or row number there."""
    held: np.ndarray
    """Whether it is held out."""
    lengths: np.ndarray
    """Its number of tokens."""
    learned: np.ndarray
    """Its number of tokens that carry loss."""
    digests: np.ndarray
    """Its hash for exact duplicates."""
    questions: np.ndarray
    """The hash of its question."""
    kept: np.ndarray
    """Whether it is kept."""
    tally: Tally
    """What happened to all rows."""

    def __init__(self, folder: Path, names: list[str]):
        """Open the spool.

        Args:
            folder: The folder of the outputs.
            names: The names of the parts in messages.
        """
        import pyarrow as pa

        self.folder, self.names, self.tally = folder, names, Tally()
        self.spool_dir = folder / "spool"
        self.spool_dir.mkdir(parents=True)
        self._texts: list[bytes] = []  # of held-out rows, as JSON
        self.sample_questions: list[str] = []  # of the first training rows
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self._rows = pa.ipc.new_file(str(self.spool_dir / "rows.arrow"), training_rows.row_schema())
        self._signatures = (self.spool_dir / "signatures").open("wb")
        self._rejected = (folder / "rejected.jsonl").open("w", encoding="utf-8", errors="backslashreplace")

    def add_chunk(self, chunk: ProcessedChunk) -> None:
        """Write the rows of one chunk to the spool."""
        self.tally.add(chunk.tally)
        self._write_notes(chunk.tally.notes)
        row_offsets = np.concatenate([[0], np.cumsum(chunk.lengths)])
        loss_counts = np.concatenate([[0], np.cumsum(chunk.loss)])
        computed_columns = {"part": np.full(len(chunk.lines), chunk.part), "learned": np.diff(loss_counts[row_offsets])}
        for name in COLUMNS:
            self._columns[name].append(computed_columns[name] if name in computed_columns else getattr(chunk, name))
        self._texts += [json.dumps(text, ensure_ascii=False).encode() for text in chunk.texts]
        self.sample_questions += chunk.sample_questions
        self._signatures.write(chunk.signatures.tobytes())
        self._rows.write_batch(_build_record_batch(chunk, row_offsets))

    def _write_notes(self, notes: list[dict]) -> None:
        self._rejected.writelines(json.dumps(note, ensure_ascii=False) + "\n" for note in notes)

    def close(self) -> None:
        """Close the spool after the last chunk, and make the columns."""
        self._rows.close()
        self._signatures.close()
        self._rejected.flush()
        for name in COLUMNS:
            setattr(self, name, np.concatenate(self._columns.pop(name)))
        self.kept = np.ones(len(self.lines), dtype=bool)

    def row_place(self, row: int) -> str:
        """Return the place of a row for messages, such as rows.jsonl:12."""
        return f"{self.names[self.part[row]]}:{self.lines[row]}"

    def drop_repeated_rows(self, clean: Clean, split: bool) -> None:
        """Mark duplicates, and training rows that leak held-out ones, as dropped.

        Args:
            clean: The section of the config that says which of them to drop.
            split: Whether the held-out rows were split off here and so may be dropped as duplicates; held-out rows that
                the user gave are used as they are.
        """
        self._repeated: dict[int, dict[str, str]] = {}
        signatures = np.fromfile(self.spool_dir / "signatures", np.uint16).reshape(-1, duplicates.PERMUTATIONS)
        candidates = np.flatnonzero(~self.held | split)
        if clean.exact_duplicates:
            self._mark_dropped("duplicate", self._find_equal_rows(candidates))
        if clean.near_duplicates:
            remaining = candidates[self.kept[candidates]]
            repeated = duplicates.find_near_duplicates(signatures, clean.near_duplicates, remaining)
            self._mark_dropped("near_duplicate", repeated)
        if clean.leakage:
            self._mark_dropped("leaked", duplicates.find_shared_questions(self.questions, self.held, self.kept))
            remaining = np.flatnonzero(self.kept)
            repeated = duplicates.find_near_duplicates(signatures, clean.leakage, remaining, self.held)
            self._mark_dropped("leaked", repeated)

    def _find_equal_rows(self, candidates: np.ndarray) -> dict[int, tuple[int, float]]:
        """Return {row: (the first row that is equal to it, 1.0)} among the candidates."""
        first_rows = candidates[duplicates.find_first_equal(self.digests[candidates])]
        is_repeated = first_rows != candidates
        pairs = zip(candidates[is_repeated].tolist(), first_rows[is_repeated].tolist(), strict=True)
        return {row: (first_row, 1.0) for row, first_row in pairs}

    def _mark_dropped(self, reason: str, repeated: dict[int, tuple[int, float]]) -> None:
        """Mark rows as dropped, given as {row: (the row that it repeats, similarity)}."""
        for row, (original, similarity) in sorted(repeated.items()):
            self.kept[row] = False
            detail = f"{'equal to' if similarity == 1 else f'{similarity:.2f} similar to'} {self.row_place(original)}"
            self._repeated[row] = {"reason": reason, "detail": detail}
            self.tally.dropped[reason] += 1
            self.tally.examples.setdefault(reason, f"{self.row_place(row)}: {detail}")

    def write_outputs(self, tokenizer: "PreTrainedTokenizerFast") -> dict[str, Path]:
        """Write train.parquet, heldout.jsonl and the rest of rejected.jsonl, and remove the spool.

        Returns:
            The outputs by name.
        """
        from pyarrow import parquet

        names = ("train.parquet", "heldout.jsonl", "rejected.jsonl")
        outputs = {name.split(".")[0]: self.folder / name for name in names}
        texts = iter(self._texts)
        with (
            files.write_atomically(outputs["train"]) as train_path,
            files.write_atomically(outputs["heldout"]) as heldout_path,
            heldout_path.open("wb") as heldout_file,
            parquet.ParquetWriter(train_path, training_rows.row_schema(), compression="zstd") as writer,
        ):
            for table, row_numbers in self._read_groups():
                writer.write_table(table.filter(self.kept[row_numbers] & ~self.held[row_numbers]), GROUP_ROWS * 2)
                self._write_heldout(
                    heldout_file, table.filter(self.held[row_numbers]), row_numbers[self.held[row_numbers]], texts
                )
                self._write_repeated(table, row_numbers, tokenizer)
        self._rejected.close()
        files.remove(self.spool_dir)
        return outputs

    def _read_groups(self) -> Iterator[tuple["pa.Table", np.ndarray]]:
        """Yield the spool in tables of about GROUP_ROWS rows, each with the numbers of its rows."""
        import pyarrow as pa

        with pa.OSFile(str(self.spool_dir / "rows.arrow")) as file:
            reader = pa.ipc.open_file(file)
            batches, first_number = [], 0
            for i in range(reader.num_record_batches):
                batches.append(reader.get_batch(i))
                if (count := sum(map(len, batches))) >= GROUP_ROWS or i == reader.num_record_batches - 1:
                    yield pa.Table.from_batches(batches), np.arange(first_number, first_number + count)
                    batches, first_number = [], first_number + count

    def _write_heldout(
        self, file: BinaryIO, table: "pa.Table", row_numbers: np.ndarray, texts: Iterator[bytes]
    ) -> None:
        """Write the held-out rows of a table that are kept, and take the texts of all its held-out rows."""
        for number, row in zip(row_numbers, table.to_pylist(), strict=True):
            line = {**row, **json.loads(next(texts))}
            if self.kept[number]:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _write_repeated(self, table: "pa.Table", row_numbers: np.ndarray, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Write the rows of a table that repeat another row to rejected.jsonl."""
        for index, number in enumerate(row_numbers.tolist()):
            if number in self._repeated:
                text = training_rows.decode_tokens(tokenizer, table["input_ids"][index].as_py())[:2000]
                note = {"where": self.row_place(number), "action": "dropped", **self._repeated[number], "text": text}
                self._write_notes([note])


def _build_record_batch(chunk: ProcessedChunk, row_offsets: np.ndarray) -> "pa.RecordBatch":
    """Return the token ids and labels of a chunk as an Arrow batch.

    Args:
        chunk: The kept rows.
        row_offsets: Where the tokens of each row begin, and where those of the last one end.
    """
    import pyarrow as pa

    offsets = pa.array(row_offsets.astype(np.int32))
    columns = (chunk.ids, np.where(chunk.loss, chunk.ids, np.int32(training_rows.IGNORED_LABEL)))
    return pa.record_batch(
        [pa.ListArray.from_arrays(offsets, pa.array(column, pa.int32())) for column in columns],
        schema=training_rows.row_schema(),
    )
