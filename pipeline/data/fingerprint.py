"""Compute the fingerprint of a data file, which shows what rows were changed later but not what the rows say.

It holds one byte of each row's BLAKE2b hash. That detects 255 of 256 changed rows, and does not confirm a guessed row,
because every 256th guess has the same byte. This matters because the fingerprint is part of the manifest, and so of
public repos. Beyond MAX_BYTES rows, one byte stands for a group of several rows.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipeline.config import references
from pipeline.data import file_formats

MAX_BYTES = 4096  # bytes of the longest fingerprint
MAX_SHOWN_ROWS = 3  # rows of a group that a message shows


def compute_fingerprint(path: Path) -> str:
    """Return the fingerprint of a data file as `<rows a byte>:<hex>`; '' for a file that holds no rows.

    Raises:
        UserError: The file is damaged.
    """
    if references.row_file_suffix(path) not in file_formats.READER_BY_SUFFIX:
        return ""
    digests = bytearray()  # 8 bytes a row
    for _, _, digest in _read_hashed_rows(path):
        digests += digest
    rows_per_byte = max(1, -(-len(digests) // (8 * MAX_BYTES)))
    group_size = 8 * rows_per_byte
    groups = (digests[start : start + group_size] for start in range(0, len(digests), group_size))
    return f"{rows_per_byte}:{''.join(map(_hash_group, groups))}"


def find_differing_rows(path: Path, expected: str) -> list[str]:
    """Return the first rows of `path` that do not match the fingerprint, each as a line with its place in the file.

    The list is empty when the fingerprint shows no difference, or is not valid.

    Raises:
        UserError: The file is damaged.
    """
    group_size, _, expected_hex = expected.partition(":")
    if not (group_size.isascii() and group_size.isdecimal() and int(group_size)):
        return []
    rows_per_byte, rows = int(group_size), _read_hashed_rows(path)
    group = 0
    while group_rows := list(islice(rows, rows_per_byte)):
        if _hash_group(b"".join(digest for *_, digest in group_rows)) != expected_hex[2 * group : 2 * group + 2]:
            return _show_group(path, group_rows)
        group += 1
    missing_groups = len(expected_hex) // 2 - group
    if missing_groups <= 0:
        return []
    return [f"{path}: ends after {group * rows_per_byte:,} rows, {missing_groups * rows_per_byte:,} fewer than before"]


def _show_group(path: Path, rows: list[tuple[int, str, bytes]]) -> list[str]:
    """Return lines that show the rows of one byte, of which at least one differs."""
    lines = [f"{path}:{line}: {text[:300]}" for line, text, _ in rows[:MAX_SHOWN_ROWS]]
    other_count = len(rows) - MAX_SHOWN_ROWS
    return [*lines, f"... and {other_count} more, of which at least one differs"] if other_count > 0 else lines


def _read_hashed_rows(path: Path) -> Iterator[tuple[int, str, bytes]]:
    """Yield each row of a file as (line, text, 8 bytes of its hash)."""
    for line, payload in file_formats.read_rows(path):
        text = payload if isinstance(payload, bytes) else json.dumps(payload, default=repr).encode()
        yield line, text.decode(errors="replace").strip(), hashlib.blake2b(text.strip(), digest_size=8).digest()


def _hash_group(digests: bytes | bytearray) -> str:
    """Return one byte, in hex, for the digests of a group of rows."""
    return hashlib.blake2b(digests, digest_size=1).hexdigest()
