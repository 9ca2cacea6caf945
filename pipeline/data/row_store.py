"""Store all rows of a data set between the workers and the outputs.

Token ids and labels are on disk, and hashes of the rows are in memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import files
from pipeline.config.schema import Clean
from pipeline.data import duplicates
from pipeline.data.process_rows import Done, Tally
from pipeline.run import training_rows as trained

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

ROW_GROUP = 10_000  # rows that are read from the spool and written at once
COLUMNS = ("part", "lines", "held", "lengths", "learned", "digests", "questions")


class Spool:
    """Collect the results of the workers in order, find rows to drop among all of them, and write the outputs.

    After `close`, each of COLUMNS is an attribute: an array with one entry a row.

    Attributes:
        part: The number of the part that the row came from.
        lines: Its line or row number there.
        held: Whether it is held out.
        lengths: Its number of tokens.
        learned: Its number of tokens that carry loss.
        digests: Its hash for exact duplicates.
        questions: The hash of its question.
        kept: Whether it is kept.
        tally: What happened to all rows.
    """

    def __init__(self, folder: Path, names: list[str]):
        """Open the spool.

        Args:
            folder: The folder of the outputs.
            names: The names of the parts in messages.
        """
        import pyarrow as pa

        self.folder, self.names, self.tally = folder, names, Tally()
        self.at = folder / "spool"
        self.at.mkdir(parents=True)
        self._texts: list[bytes] = []  # of held-out rows, as JSON
        self.questions_asked: list[str] = []  # of the first training rows
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self._rows = pa.ipc.new_file(str(self.at / "rows.arrow"), trained.schema())
        self._signatures = (self.at / "signatures").open("wb")
        self._rejected = (folder / "rejected.jsonl").open("w", encoding="utf-8", errors="backslashreplace")

    def add(self, done: Done) -> None:
        """Write the rows of one chunk to the spool."""
        self.tally.add(done.tally)
        self._note(done.tally.notes)
        ends = np.concatenate([[0], np.cumsum(done.lengths)])
        learned = np.concatenate([[0], np.cumsum(done.loss)])
        more = {"part": np.full(len(done.lines), done.part), "learned": np.diff(learned[ends])}
        for name in COLUMNS:
            self._columns[name].append(more[name] if name in more else getattr(done, name))
        self._texts += [json.dumps(text, ensure_ascii=False).encode() for text in done.texts]
        self.questions_asked += done.questions_asked
        self._signatures.write(done.signatures.tobytes())
        self._rows.write_batch(_batch(done, ends))

    def _note(self, notes: list[dict]) -> None:
        self._rejected.writelines(json.dumps(note, ensure_ascii=False) + "\n" for note in notes)

    def close(self) -> None:
        """Close the spool after the last chunk, and make the columns."""
        self._rows.close()
        self._signatures.close()
        self._rejected.flush()
        for name in COLUMNS:
            setattr(self, name, np.concatenate(self._columns.pop(name)))
        self.kept = np.ones(len(self.lines), dtype=bool)

    def where(self, row: int) -> str:
        """Return the place of a row for messages, such as rows.jsonl:12."""
        return f"{self.names[self.part[row]]}:{self.lines[row]}"

    def decide(self, clean: Clean, split: bool) -> None:
        """Mark duplicates, and training rows that leak held-out ones, as dropped.

        Args:
            clean: The section of the config that says which of them to drop.
            split: Whether the held-out rows were split off here and so may be dropped as duplicates; held-out rows that
                the user gave are used as they are.
        """
        self._repeated: dict[int, dict] = {}
        signatures = np.fromfile(self.at / "signatures", np.uint16).reshape(-1, duplicates.PERMUTATIONS)
        compared = np.flatnonzero(~self.held | split)
        if clean.exact_duplicates:
            first = compared[duplicates.exact(self.digests[compared])]
            again = first != compared
            self._drop(
                "duplicate", dict(zip(compared[again].tolist(), ((int(row), 1.0) for row in first[again]), strict=True))
            )
        if clean.near_duplicates:
            left = compared[self.kept[compared]]
            self._drop("near_duplicate", duplicates.near(signatures, clean.near_duplicates, left))
        if clean.leakage:
            self._drop("leaked", duplicates.asked(self.questions, self.held, self.kept))
            self._drop("leaked", duplicates.near(signatures, clean.leakage, np.flatnonzero(self.kept), self.held))

    def _drop(self, reason: str, found: dict[int, tuple[int, float]]) -> None:
        """Mark rows as dropped, given as {row: (the row that it repeats, similarity)}."""
        for row, (other, alike) in sorted(found.items()):
            self.kept[row] = False
            detail = f"{'equal to' if alike == 1 else f'{alike:.2f} like'} {self.where(other)}"
            self._repeated[row] = {"reason": reason, "detail": detail}
            self.tally.dropped[reason] += 1
            self.tally.examples.setdefault(reason, f"{self.where(row)}: {detail}")

    def write(self, tokenizer: "PreTrainedTokenizerFast") -> dict[str, Path]:
        """Write train.parquet, heldout.jsonl and the rest of rejected.jsonl, and remove the spool.

        Returns:
            The outputs by name.
        """
        from pyarrow import parquet

        outputs = {
            name.split(".")[0]: self.folder / name for name in ("train.parquet", "heldout.jsonl", "rejected.jsonl")
        }
        texts = iter(self._texts)
        with (
            files.writing(outputs["train"]) as train,
            files.writing(outputs["heldout"]) as held,
            held.open("wb") as out,
            parquet.ParquetWriter(train, trained.schema(), compression="zstd") as writer,
        ):
            for table, numbers in self._groups():
                writer.write_table(table.filter(self.kept[numbers] & ~self.held[numbers]), ROW_GROUP * 2)
                self._write_held(out, table.filter(self.held[numbers]), numbers[self.held[numbers]], texts)
                self._note_repeated(table, numbers, tokenizer)
        self._rejected.close()
        files.remove(self.at)
        return outputs

    def _groups(self) -> Iterator[tuple["pa.Table", np.ndarray]]:
        """Yield the spool in tables of about GROUP_ROWS rows, each with the numbers of its rows."""
        import pyarrow as pa

        with pa.OSFile(str(self.at / "rows.arrow")) as source:
            spooled = pa.ipc.open_file(source)
            batches, at = [], 0
            for i in range(spooled.num_record_batches):
                batches.append(spooled.get_batch(i))
                if (count := sum(map(len, batches))) >= ROW_GROUP or i == spooled.num_record_batches - 1:
                    yield pa.Table.from_batches(batches), np.arange(at, at + count)
                    batches, at = [], at + count

    def _write_held(self, out, table: "pa.Table", numbers: np.ndarray, texts: Iterator[bytes]) -> None:
        """Write the held-out rows of a table that are kept, and take the texts of all its held-out rows."""
        for number, row in zip(numbers, table.to_pylist(), strict=True):
            line = {**row, **json.loads(next(texts))}
            if self.kept[number]:
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _note_repeated(self, table: "pa.Table", numbers: np.ndarray, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Write the rows of a table that repeat another row to rejected.jsonl."""
        for place, number in enumerate(numbers.tolist()):
            if number in self._repeated:
                text = tokenizer.decode(table["input_ids"][place].as_py())
                self._note(
                    [{"where": self.where(number), "action": "dropped", **self._repeated[number], "text": text[:2000]}]
                )


def _batch(done: Done, ends: np.ndarray) -> "pa.RecordBatch":
    """Return the token ids and labels of a chunk as an Arrow batch.

    Args:
        chunk: The kept rows.
        row_offsets: Where the tokens of each row begin, and where those of the last one end.
    """
    import pyarrow as pa

    offsets = pa.array(ends.astype(np.int32))
    columns = (done.ids, np.where(done.loss, done.ids, np.int32(trained.IGNORED)))
    return pa.record_batch(
        [pa.ListArray.from_arrays(offsets, pa.array(column, pa.int32())) for column in columns], schema=trained.schema()
    )
