"""Files as both sides need them: written whole or not at all, hashed, looked up."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from common import console
from common.errors import UserError, shown

CHUNK = 1 << 20
# What is wrong with a place that a user named, or with its rights.
MENDABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)


def cache_dir() -> Path:
    """Where slow results live outside every checkout: $FERRY_CACHE or ~/.cache/ferry."""
    return Path(os.environ.get("FERRY_CACHE") or "~/.cache/ferry").expanduser()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; fsync and rename it on success, remove it on any error.

    So a final name never holds half a file, whatever kills the process.
    Raises UserError when the folder cannot be written or the disk is full.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        yield part
        sync(part)
        if path.is_dir() and part.is_dir():  # a folder in a file's place is somebody else's, and rename refuses it
            remove(path)
        part.rename(path)
        _sync(path.parent)  # the name itself; what else is in there is not ours
    except OSError as error:
        raise translated(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # what went wrong before says more
            remove(part)


def once(target: Path, write) -> Path:
    """Write `target` whole or not at all; what an interrupted stage left complete is kept."""
    if not target.exists():
        with writing(target) as part:
            write(part)
    return target


def translated(error: OSError, path: Path) -> Exception:
    """The OSErrors that a user can mend, as a UserError; every other one unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(nearest(path)).free / 1e9
        return UserError(
            f"no space left while writing {path} ({free:.1f} GB free)",
            "free some disk, then run the same command again",
        )
    if error.errno in (*MENDABLE, errno.ENOENT):
        return UserError(
            f"cannot write {path}: {error.strerror}", f"make {path.parent} a writable folder, or choose another"
        )
    return error


def explain_unhandled(error: OSError) -> UserError:
    """An OSError that no stage knew more about, as a UserError. Raises it again where a user cannot cure it."""
    if error.errno not in MENDABLE or error.filename is None:
        raise error
    hint = "correct its name, owner or permissions, then run the same command again"
    return UserError(f"{shown(str(error.filename))}: {error.strerror}", hint)


def user_path(text: str, setting: str) -> Path:
    """Return the path that a user wrote, `~` expanded. Raises UserError, which names the setting, for the home of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{setting}: {shown(text, 100)}: {error}", "write the path of the file") from None


def refuse_no_file(path: Path) -> None:
    """Raise OSError for a pipe or a device, which would be waited for without end. (Reading says what else is wrong.)"""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is no file", str(path))


def nearest(path: Path) -> Path:
    """The nearest ancestor of `path` that exists."""
    path = path.absolute()
    while not os.path.exists(path):  # Path.exists raises for a name that is too long
        path = path.parent
    return path


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def set_aside(path: Path) -> Path | None:
    """Rename `path` to the first free name of path.before, path.before.2, ... and return it; None: nothing is there."""
    if not os.path.lexists(path):
        return None
    older, number = path.with_name(f"{path.name}.before"), 1
    while os.path.lexists(older):
        number += 1
        older = path.with_name(f"{path.name}.before.{number}")
    path.rename(older)
    return older


def sync(path: Path) -> None:
    """fsync a file, or a folder and all that is in it."""
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _sync(item)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict) -> None:
    """`value` as JSON under `path`, whole or not at all."""
    with writing(path) as part:
        part.write_bytes(to_json(value))


def to_json(value: dict) -> bytes:
    """Return `value` as JSON. A file name that is no UTF-8 holds half characters: they become JSON's own escapes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_json(path: Path) -> dict:
    """Raises UserError when the file is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing", "run the stage that writes it (`make` lists them)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}", f"delete {path} and run the stage again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", f"delete {path} and run the stage again")
    return value


def write_rows(path: Path, rows: list[dict]) -> None:
    """One JSON object a line, whole or not at all."""
    with writing(path) as part, part.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict]:
    """The rows that write_rows wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def sha256(path: Path) -> str:
    """Hex digest of a file; its progress is shown when it takes long."""
    return copy(path, None)


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def copy(source: Path, target: Path | None) -> str:
    """Copy `source` to `target` (None: only read it); returns the sha256 of the bytes that went through."""
    digest = hashlib.sha256()
    size = source.stat().st_size
    with (
        source.open("rb") as src,
        open(target or os.devnull, "wb") as out,
        console.progress(size, f"reading {source.name}", "B") as tick,
    ):
        while block := src.read(CHUNK):
            digest.update(block)
            if target:
                out.write(block)
            tick(len(block))
    return digest.hexdigest()
