"""Read rows from one file: JSON Lines, JSON, CSV or Parquet, each also compressed with gzip.

A file that is damaged or of another kind is refused with an error that says so.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from common.errors import UserError
from pipeline.config.references import row_file_suffix

# (line or row number, row); the row is JSON text that is not parsed yet, or an object.
NumberedRow = tuple[int, bytes | dict]

# What a file with these first bytes is, when its name says something else, and how to fix it.
KNOWN_BEGINNINGS = {
    b"PAR1": ("a Parquet file", "name it .parquet"),
    b"\x1f\x8b": ("a gzip file", "name it .gz"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"version https://git-lfs": ("a Git LFS pointer", "run `git lfs pull`"),
    b"<!DOCTYPE": ("an HTML page, perhaps a failed download", "download it again"),
    b"<html": ("an HTML page, perhaps a failed download", "download it again"),
    b"\xff\xfe\0\0": ("UTF-32 text", "convert it with `iconv -f utf-32 -t utf-8`"),
    b"\xff\xfe": ("UTF-16 text", "convert it with `iconv -f utf-16 -t utf-8`"),
    b"\xfe\xff": ("UTF-16 text", "convert it with `iconv -f utf-16 -t utf-8`"),
}
NOT_WHITE_SPACE = re.compile(r"\S")
RENEW_HINT = "download or create the file again"


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a file, each with its line or row number. Raise UserError for a damaged or an empty file."""
    _refuse_wrong_content(path)
    with explain_damaged_file(path):
        yield from READER_BY_SUFFIX[row_file_suffix(path)](path)


def _open_binary(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")


@contextmanager
def explain_damaged_file(path: Path) -> Iterator[None]:
    """Translate damage of the file, such as a broken gzip stream, into a UserError that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: broken gzip: {error}", RENEW_HINT, code="data.broken_gzip") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}",
            "check the file and its permissions",
            code="data.unreadable_file",
        ) from error


def _refuse_wrong_content(path: Path) -> None:
    """Raise UserError when the first bytes show that the file is empty or holds no rows."""
    with explain_damaged_file(path), _open_binary(path) as file:
        beginning = file.read(4096)
        while beginning.isspace() and (next_bytes := file.read(4096)):
            beginning = next_bytes
    if not beginning.strip():
        raise UserError(
            f"{path} is empty", "put rows into it, or name a different file in data.source", code="data.empty_file"
        )
    if row_file_suffix(path) == ".parquet":
        return
    for marker, (description, fix) in KNOWN_BEGINNINGS.items():
        if beginning.lower().startswith(marker.lower()):
            raise UserError(
                f"{path} is {description}", f"{fix}, then run the same command again", code="data.wrong_file_type"
            )
    if b"\0" in beginning:
        raise UserError(
            f"{path} is a binary file (a zero byte at {beginning.index(0)})",
            "name a file of rows in data.source",
            code="data.binary_file",
        )


def _read_jsonl(path: Path) -> Iterator[NumberedRow]:
    """Yield the lines of a JSON Lines file as they are; the worker that cleans a row parses it.

    A .jsonl file that holds an array is read as JSON.
    """
    with _open_binary(path) as file:
        lines = enumerate(file, 1)
        first_line = next(((n, line) for n, line in lines if line.strip(b" \t\r\n\xef\xbb\xbf")), None)
        if first_line and first_line[1].lstrip(b" \t\xef\xbb\xbf").startswith(b"["):
            yield from _read_json(path)
            return
        for number, line in (
            chain([(first_line[0], first_line[1].removeprefix(b"\xef\xbb\xbf"))], lines) if first_line else ()
        ):
            if line.strip():
                yield number, line


def _read_json(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a JSON file: an array, an object that holds one array, or values one after the other."""
    with _open_binary(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 ({error.reason})",
            "convert the file to UTF-8, or use .jsonl, where one bad line is one rejected row",
            code="data.not_utf8",
        ) from error
    yield from _read_json_values(text, path)


def _read_json_values(text: str, path: Path) -> Iterator[NumberedRow]:
    """Yield one value at a time as text, so that the rows of a large file are never all in memory as objects."""
    decoder, position = json.JSONDecoder(object_pairs_hook=mark_duplicate_keys), _skip_white_space(text, 0)
    line = 1 + text.count("\n", 0, position)
    is_array = text.startswith("[", position)
    if not is_array and (rows := _find_wrapped_rows(decoder, text, position, path)):
        yield from enumerate(rows, 1)
        return
    position += is_array
    while (start := _skip_white_space(text, position)) < len(text) and not (is_array and text.startswith("]", start)):
        line += text.count("\n", position, start)
        try:
            _, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise json_error(path, line, error) from error
        yield line, text[start:end].encode()
        position = _skip_white_space(text, end)
        line += text.count("\n", start, position)
        if is_array and text.startswith(",", position):
            position += 1
        elif is_array and not text.startswith("]", position):
            raise json_error(path, line, "expected , or ] after a value of the array")
    if is_array and start == len(text):
        raise json_error(path, line, "the array is not closed")
    if is_array and text[start + 1 :].strip():
        raise json_error(path, line, "unexpected text after the array")


def _skip_white_space(text: str, start: int) -> int:
    """Return the index of the first character from `start` on that is not white space, or the length of the text."""
    match = NOT_WHITE_SPACE.search(text, start)
    return match.start() if match else len(text)


def _find_wrapped_rows(decoder: json.JSONDecoder, text: str, start: int, path: Path) -> list | None:
    """Return the rows of a file that is one object with one list of objects, such as {"data": [...]}; else None."""
    try:
        value, end = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or text[end:].strip() or {"messages", "conversations"} & value.keys():
        return None
    if isinstance(value, DuplicateKeys) and any(isinstance(v, list) for v in value.values()):
        raise json_error(path, 1, f"the object repeats one of its keys {', '.join(value)}", code="data.duplicate_keys")
    lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    return lists[0] if len(lists) == 1 else None


class DuplicateKeys(dict):
    """An object that has a key twice in the JSON text, of which the json module would silently keep the last one."""


def mark_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return the pairs as a dict; as DuplicateKeys when a key is there twice (the `object_pairs_hook` of json)."""
    value = dict(pairs)
    return value if len(value) == len(pairs) else DuplicateKeys(value)


def json_error(path: Path | str, line: int, error: object, code: str = "data.invalid_json") -> UserError:
    """Return the error to raise for a line that is not JSON, or whose JSON holds no rows."""
    return UserError(
        f"{path}:{line}: invalid JSON: {error}",
        f"correct line {line} of {path}; if the file is cut off, download or create it again",
        code=code,
    )


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a CSV file as objects; the separator is the most frequent of , ; tab and | in the header."""
    csv.field_size_limit(2**31 - 1)
    with _open_binary(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            header = text.readline()
            text.seek(0)
            separator = max(",;\t|", key=header.count)
            reader = csv.DictReader(text, delimiter=separator, strict=True)
            columns = reader.fieldnames or []
            _refuse_duplicate_columns(f"{path}:1", columns)
            _refuse_unnamed_columns(f"{path}:1", columns)
            for row in reader:
                yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{_find_non_utf8_line(path)}: not UTF-8 ({error.reason})",
                "convert the file to UTF-8",
                code="data.not_utf8",
            ) from error
        except csv.Error as error:
            line = reader.line_num + 1  # behind the last row that was read
            raise UserError(
                f"{path}:{line}: invalid CSV: {error}", f"correct line {line} of {path}", code="data.invalid_csv"
            ) from error


def _refuse_unnamed_columns(place: str, columns: Sequence[str]) -> None:
    """Raise UserError when a column of a table has no name."""
    if not all(name.strip() for name in columns):
        text = f"{place}: a column has no name: {', '.join(map(repr, columns))}"
        raise UserError(text, "give each column a name in the first line", code="data.unnamed_column")


def _refuse_duplicate_columns(place: str, columns: Sequence[str]) -> None:
    """Raise UserError when two columns of a table have the same name."""
    if len(set(columns)) < len(columns):
        raise UserError(
            f"{place}: a column name is repeated in {', '.join(columns)}",
            "give each column its own name",
            code="data.duplicate_column",
        )


def _find_non_utf8_line(path: Path) -> int:
    """Return the number of the first line that is not UTF-8."""
    with _open_binary(path) as file:
        return next((number for number, line in enumerate(file, 1) if not _is_utf8(line)), 1)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a Parquet file as objects, read 500 rows at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with _open_binary(path) as file:
            table = parquet.ParquetFile(pa.BufferReader(file.read()) if path.suffix == ".gz" else path)
            _refuse_duplicate_columns(str(path), table.schema_arrow.names)
            rows = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(500))
            yield from enumerate(rows, 1)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: invalid Parquet: {reason}", RENEW_HINT, code="data.invalid_parquet") from error


READER_BY_SUFFIX = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
