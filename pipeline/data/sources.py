"""Read rows from files, folders and Hub data sets, in order, each with its line or row number."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common import files
from common.errors import UserError
from contract import limits
from pipeline.config.references import ROW_FILE_SUFFIXES, expand_source_path, is_hub_dataset, row_file_suffix
from pipeline.config.schema import Data
from pipeline.data import file_formats
from pipeline.data.file_formats import NumberedRow

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval", "test")}
LOCAL_SPLIT = re.compile(r"(?P<name>\w+)(?:\[(?P<start>\d{0,15}):(?P<stop>\d{0,15})\])?$")


@dataclass(frozen=True)
class Part:
    """A part of a data set: one file, or one split of a Hub data set.

    Attributes:
        name: The name of the part in messages.
        path: The file; None for a split of a Hub data set.
        hub_rows: The loaded split of a Hub data set; None for a file.
        start: The index of the first row.
        stop: The index behind the last row; None: to the end.
    """

    name: str
    path: Path | None = None
    hub_rows: object = None
    start: int = 0
    stop: int | None = None

    def read_rows(self) -> Iterator[NumberedRow]:
        """Yield the rows, each with its line or row number. Raise UserError when the file itself is damaged."""
        rows = _read_hub_rows(self.hub_rows) if self.path is None else file_formats.read_rows(self.path)
        return islice(rows, self.start, self.stop)


@dataclass(frozen=True)
class DataSource:
    """The rows that a setting names.

    Attributes:
        parts: The files or the split, in order.
        inputs: The sha256 of each local file, by its path.
        facts: What the record says about a Hub data set; empty for files.
    """

    parts: list[Part]
    inputs: dict[str, str]
    facts: dict


def load_training_source(data: Data) -> DataSource:
    """Load the rows that data.source and data.split name."""
    return _load_source(data.source, data.split, data)


def load_validation_source(data: Data) -> DataSource | None:
    """Load the held-out rows that the user gives; None where they are split off from the training rows.

    They are those of data.validation (a file, a folder, or a split of the same Hub data set), or the validation files
    of the folder data.source.
    """
    if data.validation:
        is_hub_split = (
            is_hub_dataset(data.source) and LOCAL_SPLIT.match(data.validation) and not Path(data.validation).exists()
        )
        if is_hub_split:
            return _load_source(data.source, data.validation, data)
        return _load_source(data.validation, "validation", data, "data.validation")
    folder = expand_source_path(data.source)
    if folder.is_dir() and (validation_files := _list_split_files(folder, "validation")):
        return _build_local_source(validation_files, slice(None), folder)
    return None


def _load_source(source: str, split: str, data: Data, setting: str = "data.source") -> DataSource:
    """Load the rows of one split of a data set.

    Args:
        source: A file, a folder, or the id of a Hub data set.
        split: The split: a name, or NAME[FIRST:LAST] in rows.
        data: The section of the config.
        setting: The setting that names `source`, for messages.

    Raises:
        UserError: The source is missing or of no known kind, or has no such split.
    """
    if is_hub_dataset(source):
        return _load_hub_source(source, split, data)
    path = expand_source_path(source)
    match = LOCAL_SPLIT.match(split)
    if not match:
        raise UserError(
            f"the split {split!r} is not supported for files",
            "write data.split as NAME or NAME[FIRST:LAST], in rows",
            code="data.invalid_split",
        )
    rows = slice(int(match["start"] or 0), int(match["stop"]) if match["stop"] else None)
    if path.is_dir():
        split_files = _list_split_files(path, match["name"])
        if not split_files:
            present_files = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise UserError(
                f"the folder {source} has no {match['name']} file; it contains {present_files}",
                f"name one {match['name']}.jsonl (or .json, .csv, .parquet), or name the file itself in {setting}",
                code="data.split_not_found",
            )
        return _build_local_source(split_files, rows, path)
    if not path.is_file():
        raise UserError(
            f"data file {source} is missing", f"correct {setting}, or put the file there", code="data.file_not_found"
        )
    if row_file_suffix(path) not in ROW_FILE_SUFFIXES:
        raise UserError(
            f"{source}: unknown type of data file",
            f"name a file that ends in {', '.join(ROW_FILE_SUFFIXES)}, each also with .gz",
            code="data.unknown_file_type",
        )
    return _build_local_source([path], rows, None)


def _list_split_files(folder: Path, split: str) -> list[Path]:
    """Return a folder's files of one split: train.jsonl, or train-00000-of-00002.parquet and those after it."""
    row_files = _list_row_files(folder)
    for name in SPLIT_NAMES.get(split, (split,)):
        if split_files := [path for path in row_files if re.match(rf"{re.escape(name)}(?![a-zA-Z])", path.name)]:
            return split_files
    return []


def _list_row_files(folder: Path) -> list[Path]:
    """Return the files of rows in a folder, in order of their names."""
    return sorted(p for p in folder.iterdir() if p.is_file() and row_file_suffix(p) in ROW_FILE_SUFFIXES)


def _build_local_source(paths: list[Path], rows: slice, folder: Path | None) -> DataSource:
    """Return the rows of local files, with the files' hashes.

    Raises:
        UserError: There are too many files, or rows are to be cut from several of them.
    """
    if rows != slice(0, None) and len(paths) > 1 and rows != slice(None):
        raise UserError(
            f"data.split selects rows, but {folder} has {len(paths)} files",
            "name one file in data.source, or remove the rows from data.split",
            code="data.split_of_many_files",
        )
    if len(paths) > limits.MAX_FILES:
        raise UserError(
            f"{folder} has {len(paths):,} data files, at most {limits.MAX_FILES:,} are supported",
            "put the rows into fewer files",
            code="data.too_many_files",
        )
    parts = [Part(str(path), path, start=rows.start or 0, stop=rows.stop) for path in paths]
    inputs = {}
    for path in paths:
        with file_formats.explain_damaged_file(path):
            inputs[str(path)] = files.sha256(path)
    return DataSource(parts, inputs, {})


def _load_hub_source(source: str, split: str, data: Data) -> DataSource:
    """Load one split of a Hub data set, from the cache where the Hub cannot be reached."""
    from datasets import load_dataset
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub_error, revision = None, data.revision
    try:
        revision = HfApi().dataset_info(source, revision=revision).sha
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:  # offline: load_dataset tries the cache
        hub_error = error
    try:
        rows = load_dataset(source, data.subset, revision=revision, split=split)
    except Exception as error:  # load_dataset raises the errors of all its libraries; they mean the same to a user
        raise UserError(
            f"the data set {source} cannot be loaded: "
            f"{(str(hub_error or error).strip() or type(error).__name__).splitlines()[0][:300]}",
            "check data.source, subset, revision and split, the network and HF_TOKEN; a local file ends in "
            + ", ".join(ROW_FILE_SUFFIXES),
            code="data.dataset_not_loaded",
        ) from error
    facts = {"revision": revision, "split": split, "subset": data.subset, "rows": len(rows)}
    return DataSource([Part(f"{source}[{split}]", hub_rows=rows)], {}, facts)


def _read_hub_rows(rows) -> Iterator[NumberedRow]:
    """Yield the rows of a loaded Hub data set, read 500 at a time, each with its row number."""
    for start in range(0, len(rows), 500):
        for offset, row in enumerate(rows.select(range(start, min(start + 500, len(rows)))).to_list()):
            yield start + offset + 1, row
