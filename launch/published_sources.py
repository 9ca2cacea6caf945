"""Find the local data of a published model by its sha256; when it is not here, report what differs, down to the row."""

import os
from pathlib import Path

from common import files, hub
from common.errors import UserError
from contract.manifest import Manifest
from launch import source_archive, upload_files
from pipeline.config import references
from pipeline.data import fingerprint

LINES = (".jsonl", ".json", ".csv")  # files of lines: git's copy can be shown next to the local one


def moved(settings: dict) -> tuple[dict, dict[str, str]]:
    """Return the config with paths in the sent tree, and {path on the machine that trained: path in the tree}."""
    return upload_files.moved(settings, _path)


def _path(section: str, key: str, value: str) -> bool:
    """Return whether the value was a path on the machine that trained.

    A name on the Hub, of a package or of one of Ferry's templates stays what it is.
    """
    if key == "template":
        return value.endswith(".jinja")
    return (
        not (references.PYPI_MODEL.match(value) or references.is_hub_model(value))
        if section == "base"
        else not references.is_hub_dataset(value)
    )


def located(made: Manifest, settings: dict, commit: str, data: Path | None) -> dict[str, Path]:
    """Return path in the sent tree -> local file of all that the config names and this machine has.

    Data is found by its sha256; a data file that the commit contains need not be here.

    Args:
        manifest: The published model's.
        config: Its config.
        commit: The commit whose code trained it.
        data: Where else to look, a file or a folder.

    Raises:
        UserError: A data file is missing or differs; the message shows the rows.
    """
    given = {path: files.sha256(path) for path in _given(made, data)}
    _, moves = moved(settings)
    found, missing = {}, []
    for name, digest in made.dataset.sha256.items():
        path = next((path for path, its in given.items() if its == digest), None) or _as_named(name, digest)
        if path:
            found[_there(name, moves)] = path
        elif not _held(commit, name, digest):
            missing.append(name)
    names = {Path(name).name for name in missing}
    strange = [path for path, its in given.items() if its not in made.dataset.sha256.values()]
    strange = [path for path in strange if path == data or path.name in names]
    if missing or strange:
        raise changed(made, commit, missing, strange)
    # The manifest may be a stranger's: of this machine's files only those of the checkout are sent by their names.
    others = {target: Path(value) for value, target in moves.items() if target == value and Path(value).is_file()}
    return {name: path for name, path in others.items() if name not in made.dataset.sha256} | found


def _given(made: Manifest, data: Path | None) -> list[Path]:
    """Return the files that DATA names. Raises UserError when there are none, or when the data is on the Hub."""
    if data is None:
        return []
    found = [data] if data.is_file() else sorted(path for path in data.rglob("*") if path.is_file())
    if not found:
        raise UserError(f"DATA={data}: no such file or folder", "name the file, or the folder, that it was trained on")
    if not made.dataset.sha256:
        raise UserError(
            f"{made.name} was trained on {made.dataset.source} from the Hub, at {made.dataset.revision}",
            "leave out DATA",
        )
    return found


def _as_named(name: str, digest: str) -> Path | None:
    """Return the file at the path that the manifest names, if this machine has it with the same sha256."""
    path = Path(name).expanduser()
    return path if path.is_file() and files.sha256(path) == digest else None


def _held(commit: str, name: str, digest: str) -> bool:
    """Return whether the commit contains this file with this sha256."""
    content = source_archive.content(source_archive.ROOT, commit, name)
    return content is not None and files.sha256_bytes(content) == digest


def _there(name: str, moves: dict[str, str]) -> str:
    """Return a data file's path in the sent tree; no name in a stranger's manifest leads out of the tree."""
    name = os.path.normpath(name)
    for value, target in moves.items():
        if Path(name).is_relative_to(os.path.normpath(value)):
            return os.path.normpath(f"{target}/{os.path.relpath(name, value)}")
    return upload_files.place(name)


def changed(made: Manifest, commit: str, missing: list[str], strange: list[Path]) -> UserError:
    """Return the error for missing or different data, with what is here instead as far as it can be told."""
    lines, known = [], missing or list(made.dataset.sha256)
    for path in strange:
        name = next((name for name in known if Path(name).name == path.name), known[0])
        lines.append(f"{path} has sha256 {files.sha256(path)[:12]}, {name} had {made.dataset.sha256[name][:12]}")
        lines += [f"  {line}" for line in rows(path, name, made, commit)]
    lines += [] if strange else [f"{name} (sha256 {made.dataset.sha256[name][:12]}) is not here" for name in missing]
    return UserError(
        f"{made.name} was trained on other rows, nothing was started:\n  " + "\n  ".join(lines),
        "DATA=the file as it was then, or the folder that holds it",
    )


def rows(path: Path, name: str, made: Manifest, commit: str) -> list[str]:
    """Return lines that describe the first rows that differ, with the earlier row where the commit has the file."""
    if path.suffix in LINES and _held(commit, name, made.dataset.sha256[name]):
        before = source_archive.content(source_archive.ROOT, commit, name).decode(errors="replace").splitlines()
        return beside(path, path.read_text(errors="replace").splitlines(), f"{name} of {commit[:12]}", before)
    try:
        return fingerprint.differing(path, made.dataset.fingerprints.get(name, "")) or ["which row is not known"]
    except UserError as error:
        return [error.message]


def beside(path: Path, now: list[str], then: str, before: list[str]) -> list[str]:
    """Return the first line that differs, from the local file and from the earlier one, which is called `old_name`."""
    pairs = enumerate(zip(before, now, strict=False))
    number = next((i for i, (a, b) in pairs if a != b), min(len(before), len(now)))
    if number == len(before) == len(now):
        return ["its lines are the same, their ends are not"]
    return [
        f"{of}, line {number + 1}: {hub.shown(lines[number]) if number < len(lines) else '(it ends before)'}"
        for of, lines in ((path, now), (then, before))
    ]
