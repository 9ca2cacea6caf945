"""Find the local data of a published model by its sha256; when it is not here, report what differs, down to the row."""

import os
from pathlib import Path

from common import files
from common.errors import UserError, printable_line
from contract.manifest import Manifest
from launch import source_archive, upload_files
from launch.upload_files import Config
from pipeline.config import references
from pipeline.data import fingerprint

LINE_SUFFIXES = (".jsonl", ".json", ".csv")  # files of lines: git's copy can be shown next to the local one


def relocate_published_paths(config: Config) -> tuple[Config, dict[str, str]]:
    """Return the config with paths in the sent tree, and {path on the machine that trained: path in the tree}."""
    return upload_files.relocate_paths(config, _is_local_path)


def _is_local_path(section: str, key: str, value: str) -> bool:
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


def find_source_files(manifest: Manifest, config: Config, commit: str, data: Path | None) -> dict[str, Path]:
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
    data_files = {path: files.sha256(path) for path in _list_data_files(manifest, data)}
    _, tree_paths = relocate_published_paths(config)
    source_files, missing = {}, []
    for name, sha256 in manifest.dataset.sha256.items():
        path = next((path for path, file_sha256 in data_files.items() if file_sha256 == sha256), None) or _find_by_name(
            name, sha256
        )
        if path:
            source_files[_data_path_in_tree(name, tree_paths)] = path
        elif not _is_in_commit(commit, name, sha256):
            missing.append(name)
    missing_names = {Path(name).name for name in missing}
    unknown_files = [
        path for path, file_sha256 in data_files.items() if file_sha256 not in manifest.dataset.sha256.values()
    ]
    unknown_files = [path for path in unknown_files if path == data or path.name in missing_names]
    if missing or unknown_files:
        raise data_mismatch_error(manifest, commit, missing, unknown_files)
    # The manifest may be a stranger's: of this machine's files only those of the checkout are sent by their names.
    checkout_files = {
        target: Path(value) for value, target in tree_paths.items() if target == value and Path(value).is_file()
    }
    return {name: path for name, path in checkout_files.items() if name not in manifest.dataset.sha256} | source_files


def _list_data_files(manifest: Manifest, data: Path | None) -> list[Path]:
    """Return the files that DATA names. Raise UserError when there are none, or when the data is on the Hub."""
    if data is None:
        return []
    paths = [data] if data.is_file() else sorted(path for path in data.rglob("*") if path.is_file())
    if not paths:
        raise UserError(
            f"DATA={data}: no such file, or an empty folder",
            "name the file, or the folder, that it was trained on",
            code="data.file_not_found",
        )
    if not manifest.dataset.sha256:
        raise UserError(
            f"{manifest.name} was trained on {manifest.dataset.source} from the Hub, at {manifest.dataset.revision}",
            "leave out DATA",
            code="data.on_hub",
        )
    return paths


def _find_by_name(name: str, sha256: str) -> Path | None:
    """Return the file at the path that the manifest names, if this machine has it with the same sha256."""
    path = Path(name).expanduser()
    return path if path.is_file() and files.sha256(path) == sha256 else None


def _is_in_commit(commit: str, name: str, sha256: str) -> bool:
    """Return whether the commit contains this file with this sha256."""
    return _read_committed_data(commit, name, sha256) is not None


def _read_committed_data(commit: str, name: str, sha256: str) -> bytes | None:
    """Return a file of the commit; None when it has no file of that name with this sha256."""
    content = source_archive.read_committed_file(source_archive.ROOT, commit, name)
    return content if content is not None and files.sha256_bytes(content) == sha256 else None


def _data_path_in_tree(name: str, tree_paths: dict[str, str]) -> str:
    """Return a data file's path in the sent tree; no name in a stranger's manifest leads out of the tree."""
    name = os.path.normpath(name)
    for old_path, tree_path in tree_paths.items():
        if Path(name).is_relative_to(os.path.normpath(old_path)):
            return os.path.normpath(f"{tree_path}/{os.path.relpath(name, old_path)}")
    return upload_files.path_in_tree(name)


def data_mismatch_error(manifest: Manifest, commit: str, missing: list[str], unknown_files: list[Path]) -> UserError:
    """Return the error for missing or different data, with what is here instead as far as it can be told."""
    lines, names = [], missing or list(manifest.dataset.sha256)
    for path in unknown_files:
        name = next((name for name in names if Path(name).name == path.name), names[0])
        lines.append(f"{path} has sha256 {files.sha256(path)[:12]}, {name} had {manifest.dataset.sha256[name][:12]}")
        lines += [f"  {line}" for line in describe_row_differences(path, name, manifest, commit)]
    if unknown_files:
        problem, code = "was trained on different rows", "data.different_rows"
    else:
        problem, code = "was trained on files that were not found", "data.missing_source"
        lines += [f"{name} (sha256 {manifest.dataset.sha256[name][:12]}) is not on this machine" for name in missing]
    return UserError(
        f"{manifest.name} {problem}; nothing was started:\n  " + "\n  ".join(lines),
        "set DATA= to the file as it was then, or to a folder that contains it",
        code=code,
    )


def describe_row_differences(path: Path, name: str, manifest: Manifest, commit: str) -> list[str]:
    """Return lines that describe the first rows that differ, with the earlier row where the commit has the file."""
    old_content = _read_committed_data(commit, name, manifest.dataset.sha256[name])
    if path.suffix in LINE_SUFFIXES and old_content is not None:
        new_lines = path.read_text(errors="replace").splitlines()
        old_lines = old_content.decode(errors="replace").splitlines()
        return show_first_difference(path, new_lines, f"{name} of {commit[:12]}", old_lines)
    return describe_by_fingerprint(path, manifest.dataset.fingerprints.get(name, ""))


def describe_by_fingerprint(path: Path, old_fingerprint: str) -> list[str]:
    """Return the rows whose hash in the published fingerprint differs, or why they are not known."""
    try:
        return fingerprint.find_differing_rows(path, old_fingerprint) or ["it is not known which row differs"]
    except UserError as error:
        return [error.message]


def show_first_difference(path: Path, new_lines: list[str], old_name: str, old_lines: list[str]) -> list[str]:
    """Return the first line that differs, from the local file and from the earlier one, which is called `old_name`."""
    pairs = enumerate(zip(old_lines, new_lines, strict=False))
    number = next((i for i, (a, b) in pairs if a != b), min(len(old_lines), len(new_lines)))
    if number == len(old_lines) == len(new_lines):
        return ["the lines are equal, their line endings are not"]
    return [
        f"{source}, line {number + 1}: {printable_line(text)}"
        for source, lines in ((path, new_lines), (old_name, old_lines))
        for text in lines[number : number + 1] or ["(the file is shorter)"]
    ]
