"""The models on this machine: models/<model>/<version>/, any number of versions of each, one of them `current`.

A version is the first 12 digits of its manifest's sha256, so the same publication is one folder however it was asked
for, and another one never overwrites it. Its pull.json is written last and says what must be there.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from contract import files, hub, manifest
from contract.errors import UserError

NAMES = "names.json"
MAIN = "main"
CURRENT = "current"  # a symbolic link to the version that is used
RECORD = "pull.json"


def place(models: Path, repo: str) -> Path:
    """The folder of a model: the name of its folder hub, or owner--name."""
    if hub.is_folder(repo):
        return models / Path(repo.removeprefix("file://")).expanduser().resolve().name
    return models / hub.split(repo)[0].replace("/", "--")


def current(models: Path, repo: str) -> Path:
    """The version in use. Raises UserError when none was pulled."""
    folder = place(models, repo)
    if not (folder / CURRENT / RECORD).is_file():
        raise UserError(f"{hub.shown(repo)} was not pulled to {models}", f"run `make pull REPO={hub.shown(repo)}`")
    return folder / os.readlink(folder / CURRENT)


def use(version: Path) -> None:
    """Make this version the current one."""
    link = version.parent / f".{CURRENT}.part"
    files.remove(link)
    link.symlink_to(version.name)
    os.replace(link, version.parent / CURRENT)


def names(folder: Path) -> dict[str, str]:
    """{what was asked for (a tag, branch or commit): the version that it was then}"""
    return files.read_json(folder / NAMES) if (folder / NAMES).is_file() else {}


def remember(version: Path, asked: str) -> None:
    """The version was asked for by this name, and is the one in use."""
    files.write_json(version.parent / NAMES, names(version.parent) | {asked: version.name})
    use(version)


def versions(folder: Path) -> list[Path]:
    """Those that were pulled to their end, newest first."""
    found = [record.parent for record in folder.glob(f"*/{RECORD}") if not record.parent.is_symlink()]
    return sorted(found, key=lambda version: (version / RECORD).stat().st_mtime, reverse=True)


def known(models: Path, repo: str) -> Path | None:
    """The version that was last pulled under this very name: what can be used without a network."""
    folder = place(models, repo)
    found = names(folder).get(hub.split(repo)[1] or MAIN)
    return folder / found if found and (folder / found / RECORD).is_file() else None


def pulled(version: Path) -> tuple[manifest.Manifest, Path]:
    """The manifest and the file of a finished pull, hashed again: the very bytes that were pulled.

    Raises UserError when either has changed since.
    """
    record = files.read_json(version / RECORD)
    path = version / record["file"]
    if (
        not path.is_file()
        or files.sha256(path) != record["sha256"]
        or files.sha256(version / manifest.NAME) != record["manifest_sha256"]
    ):
        raise UserError(
            f"{version} is not what was pulled from {record['repo']}: a file is gone or changed",
            f"delete {version / RECORD} and run the same command again",
        )
    return manifest.read(version / manifest.NAME), path


def lines(models: Path) -> list[str]:
    """One line a version, for `make models`."""
    return [
        f"{_mark(version)} {folder.name}  {version.name}  {_facts(version)}"
        for folder in sorted(path for path in models.glob("*") if path.is_dir())
        for version in versions(folder)
    ]


def _mark(version: Path) -> str:
    link = version.parent / CURRENT
    return "*" if link.is_symlink() and os.readlink(link) == version.name else " "


def _facts(version: Path) -> str:
    record = files.read_json(version / RECORD)
    asked = ", ".join(name for name, at in names(version.parent).items() if at == version.name)
    day = time.strftime("%Y-%m-%d", time.localtime((version / RECORD).stat().st_mtime))
    return f"{record['file']}  {record['bytes'] / 1e9:.2f} GB  {asked}  {day}  from {record['repo']}"


def remove(models: Path, repo: str) -> list[Path]:
    """Delete a version (REPO@tag, REPO@commit, REPO@version) or, without one, the whole model; returns what went.

    Raises UserError when there is none of that name.
    """
    folder = place(models, repo)
    wanted = hub.split(repo)[1] if not hub.is_folder(repo) else None
    going = [version for version in versions(folder) if wanted is None or _is(version, wanted)]
    if not going:
        raise UserError(f"{hub.shown(repo)} is not in {models}", "`make models` lists what is")
    with locked(folder):
        for version in going:
            _forget(version)
        if not versions(folder):
            files.remove(folder / NAMES)
    return going


def _is(version: Path, name: str) -> bool:
    commit = files.read_json(version / RECORD)["commit"] or ""
    return names(version.parent).get(name) == version.name or (
        len(name) >= 7 and (version.name.startswith(name) or commit.startswith(name))
    )


def _forget(version: Path) -> None:
    if _mark(version) == "*":
        files.remove(version.parent / CURRENT)
    rest = {name: at for name, at in names(version.parent).items() if at != version.name}
    files.write_json(version.parent / NAMES, rest)
    files.remove(version / RECORD)  # first: without it the rest is no version
    files.remove(version)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time works in a model's folder; the lock is the folder itself and goes with its process.

    An empty folder is gone afterwards.
    """
    handle = _lock(folder)
    try:
        yield
    finally:
        for path in [*folder.glob("*/"), folder, folder.parent]:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        os.close(handle)


def _lock(folder: Path) -> int:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise files.translated(error, folder) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hub.say(f"another pull works in {folder}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.is_dir() and os.fstat(handle).st_ino == folder.stat().st_ino:
            return handle
        os.close(handle)  # it was removed while we waited
