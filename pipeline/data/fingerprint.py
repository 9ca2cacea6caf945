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

GROUPS = 4096  # bytes of the longest fingerprint
MOST = 3  # rows of a group that a message shows


def of(path: Path) -> str:
    """Return the fingerprint of a data file as `<rows a byte>:<hex>`; '' for a file that holds no rows.

    Raises:
        UserError: The file is damaged.
    """
    if references.row_file_suffix(path) not in file_formats.READERS:
        return ""
    digests = bytearray()  # 8 bytes a row
    for _, _, digest in _rows(path):
        digests += digest
    each = max(1, -(-len(digests) // (8 * GROUPS)))
    return f"{each}:" + "".join(_byte(digests[start : start + 8 * each]) for start in range(0, len(digests), 8 * each))


def differing(path: Path, wanted: str) -> list[str]:
    """Return the first rows of `path` that do not match the fingerprint, each as a line with its place in the file.

    The list is empty when the fingerprint shows no difference, or is not valid.

    Raises:
        UserError: The file is damaged.
    """
    each, _, known = wanted.partition(":")
    if not (each.isascii() and each.isdecimal() and int(each)):
        return []
    size, rows = int(each), _rows(path)
    group = 0
    while some := list(islice(rows, size)):
        if _byte(b"".join(digest for *_, digest in some)) != known[2 * group : 2 * group + 2]:
            return _told(path, some)
        group += 1
    missing = len(known) // 2 - group
    return [f"{path}: it ends after {group * size:,} rows, {missing * size:,} fewer"] if missing > 0 else []


def _told(path: Path, rows: list[tuple[int, str, bytes]]) -> list[str]:
    """Return lines that show the rows of one byte, of which at least one differs."""
    said = [f"{path}:{line}: {text[:300]}" for line, text, _ in rows[:MOST]]
    more = len(rows) - MOST
    return [*said, f"... and {more} more, one of which differs at least"] if more > 0 else said


def _rows(path: Path) -> Iterator[tuple[int, str, bytes]]:
    """Yield each row of a file as (line, text, 8 bytes of its hash)."""
    for line, payload in file_formats.items(path):
        text = payload if isinstance(payload, bytes) else json.dumps(payload, default=repr).encode()
        yield line, text.decode(errors="replace").strip(), hashlib.blake2b(text.strip(), digest_size=8).digest()


def _byte(digests: bytes) -> str:
    """Return one byte, in hex, for the digests of a group of rows."""
    return hashlib.blake2b(digests, digest_size=1).hexdigest()
