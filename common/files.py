"""File helpers for both sides: atomic writes, hashes, JSON, and file system errors as messages for the user."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common import console
from common.errors import UserError, printable_line

CHUNK_BYTES = 1 << 20  # read at once
# Errors that a user can fix: a wrong path, or missing permissions.
USER_ERRNOS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)


def cache_dir() -> Path:
    """Return the folder, outside any checkout, for results that are slow to make: $FERRY_CACHE or ~/.cache/ferry."""
    return Path(os.environ.get("FERRY_CACHE") or "~/.cache/ferry").expanduser()


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, on any error remove it.

    `path` therefore never holds an incomplete file or folder, whatever kills the process.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        yield part
        fsync_tree(part)
        if path.is_dir() and part.is_dir():  # a folder in the place of a file is not ours, and `rename` refuses it
            remove(path)
        part.rename(path)
        _fsync(path.parent)  # makes the new name durable; other files of the folder are not ours
    except OSError as error:
        raise translate_write_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # an earlier error says more
            remove(part)


def write_if_missing(target: Path, write: Callable[[Path], object]) -> Path:
    """Write `target` atomically with `write(part)`, unless an interrupted stage has already written it completely."""
    if not target.exists():
        with write_atomically(target) as part:
            write(part)
    return target


def translate_write_error(error: OSError, path: Path) -> Exception:
    """Return a UserError for an error that the user can fix while `path` is written, and any other error unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(nearest_existing_path(path)).free / 1e9
        return UserError(
            f"no space left while writing {path} ({free:.1f} GB free)",
            "free disk space, then run the same command again",
            code="disk.full",
        )
    if error.errno in (*USER_ERRNOS, errno.ENOENT):
        return UserError(
            f"cannot write {path}: {error.strerror}",
            f"make {path.parent} a writable folder, or choose another",
            code="file.unwritable",
        )
    return error


def translate_unhandled_error(error: OSError) -> UserError:
    """Return an OSError that was not handled as a UserError; raise it again when the user cannot fix it."""
    if error.errno not in USER_ERRNOS or error.filename is None:
        raise error
    hint = "correct its name, owner or permissions, then run the same command again"
    return UserError(f"{printable_line(str(error.filename))}: {error.strerror}", hint, code="file.inaccessible")


def expand_user_path(text: str, setting: str) -> Path:
    """Return a path of a setting with `~` expanded.

    Raises:
        UserError: the path begins with `~name`, and there is no such user. The message names the setting.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{setting}: {printable_line(text, 100)}: {error}", "write the path of the file", code="file.unknown_user"
        ) from None


def refuse_special_file(path: Path) -> None:
    """Raise OSError for a pipe or a device: reading it could block for ever. Other faults are reported by reading."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def nearest_existing_path(path: Path) -> Path:
    """Return `path`, or the nearest of its parents that exists."""
    path = path.absolute()
    while not os.path.exists(path):  # Path.exists raises for a name that is too long
        path = path.parent
    return path


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it; do nothing when `path` does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def set_aside(path: Path) -> Path | None:
    """Rename `path` to the first free one of path.before, path.before.2, ... and return it; None: `path` is missing."""
    if not os.path.lexists(path):
        return None
    backup, number = path.with_name(f"{path.name}.before"), 1
    while os.path.lexists(backup):
        number += 1
        backup = path.with_name(f"{path.name}.before.{number}")
    path.rename(backup)
    return backup


def fsync_tree(path: Path) -> None:
    """Call fsync for a file, or for a folder and all that is in it."""
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _fsync(item)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write `value` as JSON to `path`, atomically."""
    with write_atomically(path) as part:
        part.write_bytes(encode_json(value))


def encode_json(value: Mapping[str, object]) -> bytes:
    """Return `value` as JSON. Lone surrogates, as of a file name that is not UTF-8, become JSON escapes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise UserError when the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing", "run the stage that writes it (`make` lists them)", code="file.missing"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error}", f"delete {path} and run the stage again", code="file.unreadable"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON: {error}", f"delete {path} and run the stage again", code="file.not_json"
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} does not contain a JSON object",
            f"delete {path} and run the stage again",
            code="file.not_json_object",
        )
    return value


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write `rows` to `path`, one JSON object per line, atomically."""
    with write_atomically(path) as part, part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that `write_rows` wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sha256(path: Path) -> str:
    """Return the sha256 of a file as a hex digest; show progress when it takes long."""
    return copy_and_hash(path, None)


def sha256_bytes(content: bytes) -> str:
    """Return the sha256 of `content` as a hex digest."""
    return hashlib.sha256(content).hexdigest()


def copy_and_hash(source: Path, target: Path | None) -> str:
    """Copy `source` to `target` (None: only read it) and return the sha256 of the bytes that were read."""
    digest = hashlib.sha256()
    size = source.stat().st_size
    with (
        source.open("rb") as source_file,
        open(target or os.devnull, "wb") as target_file,
        console.show_progress(size, f"reading {source.name}", "B") as advance,
    ):
        while block := source_file.read(CHUNK_BYTES):
            digest.update(block)
            if target:
                target_file.write(block)
            advance(len(block))
    return digest.hexdigest()
