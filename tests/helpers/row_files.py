"""Files of rows, and the data stage over them in a tenth of a second."""

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import files
from pipeline.config import load
from pipeline.data import chat_template, process_rows, statistics, synthetic_prompts
from pipeline.data import stage as data
from pipeline.run import training_rows
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run

WORDS = """harbour ferry ticket lighthouse captain engine island morning cabin vehicle storm anchor gangway deck pier
winter bicycle lantern coffee window orange railway garden mountain painter violin station blanket pepper kitchen
river castle candle market silver pocket thunder wagon meadow letter""".split()


@dataclass
class Made:
    """What one run of the stage made."""

    record: dict
    folder: Path
    tokenizer: object

    @property
    def rejected(self) -> list[dict]:
        return lines(self.folder / "rejected.jsonl")

    @property
    def dropped(self) -> list[dict]:
        return [note for note in self.rejected if note["action"] == "dropped"]

    @property
    def held(self) -> list[dict]:
        return lines(self.folder / "heldout.jsonl")

    @functools.cached_property
    def trained(self) -> list[dict]:
        return training_rows.read_table(self.folder / "train.parquet").to_pylist()

    def texts(self) -> list[str]:
        """Every kept row, trained or held out, decoded."""
        return [self.tokenizer.decode(row["input_ids"]) for row in [*self.trained, *self.held]]

    def learned(self) -> list[str]:
        """What each kept row learns."""
        kept = [*self.trained, *self.held]
        return [self.tokenizer.decode([n for n in row["labels"] if n != training_rows.IGNORED_LABEL]) for row in kept]

    def check(self) -> "Made":
        """Rows read == trained + held out + dropped, in the record and in the files."""
        count = self.record["rows"]
        assert count["read"] == count["train"] + count["heldout"] + count["dropped"]
        assert (count["train"], count["heldout"]) == (len(self.trained), len(self.held))
        assert count["dropped"] == len(self.dropped) == sum(self.record["dropped"].values())
        assert len({note["where"] for note in self.dropped}) == len(self.dropped)
        assert all(note["reason"] in self.record["dropped"] for note in self.dropped)
        assert statistics.format_record(DataRecord.model_validate(self.record))
        return self


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def quick():
    """Template and tokenizer are loaded once, few smoke prompts are drawn, and nothing is forced to the disk."""
    masker, kept = process_rows.Masker, {}

    def once(folder: Path, *more) -> process_rows.Masker:
        key = (files.sha256(folder / "tokenizer.json"), *more)
        return kept.get(key) or kept.setdefault(key, masker(folder, *more))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "load_chat_tokenizer", functools.cache(chat_template.load_chat_tokenizer))
        patch.setattr(process_rows, "Masker", once)
        patch.setattr(files, "fsync_tree", lambda path: None)
        patch.setattr(synthetic_prompts, "CHAINS_TO_DRAW", 200)
        yield


def made(base: Path, folder: Path, source: Path | str, name: str = "run", processes: int = 1, **settings) -> Made:
    tree = {
        "base": {"model": str(base), "max_seq_length": 256},
        "data": {"source": str(source), "validation_share": 0.2}, "clean": {},
    }  # fmt: skip
    for key, value in settings.items():
        section, key = key.split("__")
        tree[section][key] = value
    built = load.build_config(tree, {}, Path("test.yaml"))
    run = Run(folder / name)
    run.freeze_config(built)
    record = data.run_data(built, run, processes).model_dump()
    day = built.data.date
    tokenizer, *_ = chat_template.load_chat_tokenizer(base, built.data.template, day, False)
    return Made(record, folder / name / "data", tokenizer).check()


def words(seed: str, count: int = 8) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def pair(i: int | str) -> dict:
    return {"question": f"{words(f'q{i}')}?", "answer": f"{words(f'a{i}')}."}


def line(row: object) -> bytes:
    """One line of JSON Lines; bytes and text stay what they are."""
    if isinstance(row, bytes | str):
        return row if isinstance(row, bytes) else row.encode()
    return json.dumps(row).encode()


def jsonl(*given: object, end: bytes = b"\n") -> bytes:
    return b"".join(line(row) + end for row in given)
