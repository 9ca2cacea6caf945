"""The store holds the models of this machine in models/<model>/<version>/; one version of each model is `current`.

A version is named after the first 12 digits of its manifest's sha256: one publication is one folder, whatever name it
was pulled under, and another publication never overwrites it. Its pull.json is written last and says what must be
there.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from common import files, hub
from common.errors import UserError, printable_line
from contract import manifest

NAMES_FILE = "names.json"
DEFAULT_REVISION = "main"
CURRENT_LINK = "current"  # a symbolic link to the version in use
PULL_RECORD = "pull.json"
VERSION_PATTERN = re.compile(r"[0-9a-f]{12}")  # no folder with another name is ever listed or removed
NUMBER = int | float
# The fields of a version's records that are read again, with their types.
RECORD_FIELDS: dict[str, dict[str, type | UnionType]] = {
    PULL_RECORD: {"repo": str, "file": str, "sha256": str, "bytes": int, "manifest_sha256": str, "commit": str | None},
    "smoke.json": {
        "file": str,
        "tokens_per_second": NUMBER,
        "load_seconds": NUMBER,
        "difference": NUMBER,
        "answers": list,
    },
    "ollama.json": {"model": str, "latest": str, "digest": str | None},  # no digest: not tested yet
    "lmstudio.json": {"target": str, "done": bool, "key": str | None},
}


def find_model(models: Path, repo: str) -> tuple[Path, str | None]:
    """Return the folder of a model in the store, and the version that the name asks for or None.

    Args:
        models: The store.
        repo: NAME or NAME@VERSION as `make models` lists them, a folder hub (also with @VERSION), or
            owner/name[@revision].

    Raises:
        UserError: The store does not hold that name, or the folder has no name.
    """
    name, _, version = repo.partition("@")
    if re.fullmatch(manifest.NAME_PATTERN, name) and (models / name).is_dir():
        return models / name, version or None
    path, _, version = repo.rpartition("@")
    if path and re.fullmatch(r"[0-9a-f]{7,12}", version) and hub.is_folder(path) and not hub.is_existing_folder(repo):
        return models / _folder_name(path), version
    if hub.is_folder(repo):
        return models / _folder_name(repo), None
    if re.fullmatch(manifest.NAME_PATTERN, name):
        raise UserError(
            f"there is no model {name} in {models}",
            "`make models` lists the models there; owner/name is a model on the Hub",
            code="store.not_found",
        )
    repo_id, revision = hub.parse_repo_id(repo)
    return models / repo_id.replace("/", "--"), revision


def _folder_name(repo: str) -> str:
    """Return the name of a folder hub. Raise UserError for a folder without one, such as /."""
    name = hub.folder_path(repo).resolve().name
    if not name:
        raise UserError(
            f"REPO {printable_line(repo)} is not a model",
            "write owner/name for the Hub, ./folder for a folder hub",
            code="store.unnamed_folder",
        )
    return name


def model_folder(models: Path, repo: str) -> Path:
    """Return the folder of a model in the store."""
    return find_model(models, repo)[0]


def resolve_model(repo: str | None, models: Path) -> str:
    """Return the model that a command is about: `repo` when one is given, else the only model of the store.

    Raise UserError when the store holds no model, or more than one.
    """
    if repo is not None:
        return repo
    names = [folder.name for folder in sorted(models.glob("*/")) if list_complete_versions(folder)]
    if len(names) == 1:
        return names[0]
    if not names:
        raise UserError(
            f"there is no model in {models}",
            "`make deploy-mac REPO=you/model`, or a folder such as ./hub/demo",
            code="store.empty",
        )
    raise UserError(
        f"REPO is missing, and there are {len(names)} models in {models}",
        f"REPO=one of: {', '.join(names)}",
        code="store.ambiguous_model",
    )


def format_make_arguments(repo: str, models: Path) -> str:
    """Return the arguments of a `make` command: REPO=, and MODELS= when the store is not the default one."""
    arguments = f"REPO={shlex.quote(printable_line(repo))}"
    return arguments if models == Path("models") else f"{arguments} MODELS={shlex.quote(str(models))}"


def require_version(models: Path, repo: str) -> Path:
    """Return the version that `repo` names, else the one in use. Raise UserError when it was not pulled."""
    folder, version = find_model(models, repo)
    version_folder = find_version_by_name(models, repo) if version else current_version(folder)
    if not version_folder or not (version_folder / PULL_RECORD).is_file():
        raise UserError(
            f"{printable_line(repo)} was not pulled to {models}",
            f"run `make pull {format_make_arguments(repo, models)}`",
            code="store.not_pulled",
        )
    return version_folder


def current_version(folder: Path) -> Path | None:
    """Return the version that a model's `current` link leads to; None when there is no such link."""
    link = folder / CURRENT_LINK
    name = Path(os.readlink(link)).name if link.is_symlink() else ""
    return folder / name if VERSION_PATTERN.fullmatch(name) else None


def set_current_version(version: Path) -> None:
    """Make this version the current one.

    In a copied store the link may have become a folder, which is replaced.
    """
    link, part = version.parent / CURRENT_LINK, version.parent / f".{CURRENT_LINK}.part"
    if current_version(version.parent) == version:
        return
    try:
        refuse_foreign_link(link)
        files.remove(part)
        part.symlink_to(version.name)
        if not link.is_symlink():
            files.remove(link)
        os.replace(part, link)
    except OSError as error:
        raise files.translate_write_error(error, link) from error


def refuse_foreign_link(link: Path) -> None:
    """Raise UserError when `current` is neither Ferry's link nor the copy of a version.

    When a store is copied, the link may become a copy of the version that it leads to.
    """
    if link.is_symlink():
        is_acceptable = current_version(link.parent) is not None
    else:
        is_acceptable = not link.exists() or bool(read_record(link / PULL_RECORD))
    if not is_acceptable:
        raise UserError(
            f"{link} was not created by Ferry",
            "move it away, or choose a different store: MODELS=folder",
            code="store.foreign_link",
        )


def read_names(folder: Path) -> dict[str, str]:
    """Return {requested name (a tag, branch or commit): the version that was pulled under it}."""
    return {name: version for name, version in read_record(folder / NAMES_FILE).items() if isinstance(version, str)}


def read_record(path: Path) -> dict[str, Any]:
    """Return a record; {} when it is missing or damaged."""
    try:
        record = files.read_json(path)
    except UserError:
        return {}
    kinds = RECORD_FIELDS.get(path.name, {})
    return record if all(isinstance(record.get(key), kind) for key, kind in kinds.items()) else {}


def read_records(folder: Path, name: str) -> dict[Path, dict[str, Any]]:
    """Return {version: its record of that name} for the versions of a model; damaged records are left out."""
    records_by_version = {version: read_record(version / name) for version in list_version_folders(folder)}
    return {version: record for version, record in records_by_version.items() if record}


def list_other_models(folder: Path, name: str) -> dict[Path, dict[str, Any]]:
    """Return {version: its record of that name} for all other models of the store."""
    other_folders = [other_folder for other_folder in folder.parent.glob("*/") if other_folder.name != folder.name]
    return dict(item for other_folder in other_folders for item in read_records(other_folder, name).items())


def list_version_folders(folder: Path) -> list[Path]:
    """Return the versions of a model, unfinished ones too."""
    return [path for path in folder.glob("*/") if VERSION_PATTERN.fullmatch(path.name) and is_ours(path)]


def is_ours(version: Path) -> bool:
    """Return whether Ferry made this folder.

    It did when the folder has a pull.json, when its name is the hash of its manifest, or when it holds nothing but
    unfinished downloads.
    """
    if version.is_symlink():
        return False
    if read_record(version / PULL_RECORD) or _is_named_after_manifest(version):
        return True
    return all(path.name.startswith(".") and path.name.endswith(".part") for path in version.iterdir())


def _is_named_after_manifest(version: Path) -> bool:
    path = version / manifest.FILE_NAME
    return path.is_file() and files.sha256(path).startswith(version.name)


def record_pull(version: Path, pull_record: dict[str, Any], requested_name: str) -> None:
    """Write pull.json and the requested name, and make the version the current one. A read-only store may have both."""
    if read_record(version / PULL_RECORD) != pull_record:
        files.write_json(version / PULL_RECORD, pull_record)
    versions_by_name = read_names(version.parent)
    if versions_by_name.get(requested_name) != version.name:
        files.write_json(version.parent / NAMES_FILE, versions_by_name | {requested_name: version.name})
    set_current_version(version)


def read_pull_record(version: Path) -> dict[str, Any]:
    """Return the pull.json of a version. Raise UserError when it is not what `pull` wrote."""
    pull_record = read_record(version / PULL_RECORD)
    if not pull_record or pull_record["file"] != Path(pull_record["file"]).name:
        raise UserError(
            f"{version / PULL_RECORD} is damaged", f"delete {version} and pull again", code="store.damaged_record"
        )
    return pull_record


def list_complete_versions(folder: Path) -> list[Path]:
    """Return the versions of a model that were pulled completely, newest first."""
    complete = [version for version in list_version_folders(folder) if (version / PULL_RECORD).is_file()]
    return sorted(complete, key=lambda version: (version / PULL_RECORD).stat().st_mtime, reverse=True)


def find_version_by_name(models: Path, repo: str) -> Path | None:
    """Return the version last pulled under exactly this name, or of this commit, without a network; None: no such."""
    folder, version = find_model(models, repo)
    requested_name = version or DEFAULT_REVISION
    version_name = read_names(folder).get(requested_name)
    if version_name and (folder / version_name / PULL_RECORD).is_file():
        return folder / version_name
    return next((version for version in list_complete_versions(folder) if _has_name(version, requested_name)), None)


def load_pulled(version: Path) -> tuple[manifest.Manifest, Path]:
    """Return the manifest and the file of a complete pull. Both are hashed again.

    Raise UserError when either has changed since the pull.
    """
    pull_record = read_pull_record(version)
    path, manifest_path = version / pull_record["file"], version / manifest.FILE_NAME
    is_unchanged = path.is_file() and manifest_path.is_file() and files.sha256(path) == pull_record["sha256"]
    if not is_unchanged or files.sha256(manifest_path) != pull_record["manifest_sha256"]:
        raise UserError(
            f"{version} differs from what was pulled from {pull_record['repo']}: a file is missing or changed",
            f"delete {version / PULL_RECORD} and run the same command again",
            code="store.changed",
        )
    return manifest.read_manifest(manifest_path), path


def file_stamp(path: Path) -> list[int]:
    """Return size, modification time and inode, which change when a file does.

    Hashing 5 GB in every stage would take longer than the stage.
    """
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def load_tested(version: Path) -> tuple[manifest.Manifest, Path]:
    """Return the manifest and the file of a version that passed its smoke test.

    The file is hashed again only if it was touched since the test. Raise UserError when the version has not passed the
    test, or has changed since.
    """
    pull_record, smoke_record = read_pull_record(version), read_record(version / "smoke.json")
    path, manifest_path = version / pull_record["file"], version / manifest.FILE_NAME
    if smoke_record.get("sha256") != pull_record["sha256"]:
        revision = f"@{pull_record['commit']}" if pull_record["commit"] else ""
        arguments = format_make_arguments(pull_record["repo"] + revision, version.parent.parent)
        raise UserError(
            f"{pull_record['file']} in {version} has not passed its smoke test",
            f"run `make smoke {arguments}`",
            code="smoke.not_passed",
        )
    is_unchanged = path.is_file() and smoke_record.get("stamp") == file_stamp(path) and manifest_path.is_file()
    if is_unchanged and files.sha256(manifest_path) == pull_record["manifest_sha256"]:
        return manifest.read_manifest(manifest_path), path
    return load_pulled(version)


def is_tested(version: Path) -> bool:
    """Return whether a version passed its smoke test and has not changed since."""
    with contextlib.suppress(UserError):
        return bool(load_tested(version))
    return False


def list_for_terminal(models: Path) -> str:
    """Return the text of `make models`: two lines for each version, also for one whose pull was interrupted.

    The other commands take NAME@VERSION as it is listed here.
    """
    lines = []
    for version in list_all_versions(models):
        mark = "*" if current_version(version.parent) == version else " "
        lines += [f"{mark} {version.parent.name}@{version.name}", f"    {_describe_version(version)}"]
    return "\n".join(lines) or f"there are no models in {models}: `make deploy-mac REPO=you/model`"


def list_as_json(models: Path) -> str:
    """Return the versions as JSON: a list of {model, version, in_use, ...the fields of pull.json}."""
    entries = [
        {"model": version.parent.name, "version": version.name, "in_use": current_version(version.parent) == version}
        | read_record(version / PULL_RECORD)
        for version in list_all_versions(models)
    ]
    return json.dumps(entries, indent=2)


def list_all_versions(models: Path) -> list[Path]:
    """Return all versions of all models, the oldest of each model first."""
    return [
        version
        for folder in sorted(path for path in models.glob("*") if path.is_dir())
        for version in sorted(list_version_folders(folder), key=_version_mtime)
    ]


def _version_mtime(version: Path) -> float:
    """Return when a version was pulled, in seconds since the epoch."""
    record_path = version / PULL_RECORD
    return record_path.stat().st_mtime if record_path.is_file() else version.stat().st_mtime


def _describe_version(version: Path) -> str:
    """Return the second line of a version in `make models`."""
    if not (version / PULL_RECORD).is_file():
        partial_bytes = sum(path.stat().st_size for path in version.glob(".*.part"))
        return f"unfinished, {partial_bytes / 1e9:.2f} GB downloaded: pull it again, or remove it"
    try:
        record = read_pull_record(version)
    except UserError:
        return "damaged: pull it again, or remove it"
    names = read_names(version.parent)
    requested_names = ", ".join(name for name in names if names[name] == version.name)
    day = time.strftime("%Y-%m-%d", time.localtime((version / PULL_RECORD).stat().st_mtime))
    return f"{record['file']}  {record['bytes'] / 1e9:.2f} GB  {requested_names}  {day}  from {record['repo']}"


def find_matching_versions(models: Path, repo: str) -> list[Path]:
    """Return the versions that `repo` names (REPO@tag, REPO@commit, REPO@version), unfinished ones too.

    A REPO without a version names all versions of the model. Raise UserError when there is no version of that name.
    """
    folder, requested_name = find_model(models, repo)
    versions = list_version_folders(folder)
    matches = [version for version in versions if requested_name is None or _has_name(version, requested_name)]
    if not matches:
        raise UserError(
            f"{printable_line(repo)} is not in {models}",
            "`make models` lists the models there",
            code="store.not_found",
        )
    return matches


def _has_name(version: Path, name: str) -> bool:
    """Return whether `name` means this version: a name of names.json, or 7 or more digits of its hash or commit."""
    if read_names(version.parent).get(name) == version.name:
        return True
    return len(name) >= 7 and (version.name.startswith(name) or _read_commit(version).startswith(name))


def _read_commit(version: Path) -> str:
    """Return the commit that a version was pulled at; '' when it is damaged, or from a folder."""
    try:
        return read_pull_record(version)["commit"] or ""
    except UserError:
        return ""


def delete_version(version: Path) -> int:
    """Delete a version and return the bytes that became free. If it was in use, the newest other one replaces it."""
    with lock_model(version.parent):
        try:
            freed_bytes = sum(path.stat().st_size for path in version.iterdir() if path.stat().st_nlink == 1)
            _delete_version(version)
        except OSError as error:
            raise files.translate_write_error(error, version) from error
    return freed_bytes


def _delete_version(version: Path) -> None:
    folder = version.parent
    if current_version(folder) == version:
        files.remove(folder / CURRENT_LINK)
    files.remove(version / PULL_RECORD)  # first: a folder without it is not a complete version
    files.remove(version)
    remaining_names = {name: other for name, other in read_names(folder).items() if other != version.name}
    if others := list_complete_versions(folder):
        files.write_json(folder / NAMES_FILE, remaining_names)
        set_current_version(current_version(folder) or others[0])
    else:
        files.remove(folder / NAMES_FILE)


@contextlib.contextmanager
def lock_model(folder: Path) -> Iterator[None]:
    """Let one process at a time work in a model's folder.

    The lock is on the folder itself and ends with its process. Empty folders are removed afterwards.
    """
    handle = _acquire_lock(folder)
    try:
        yield
    finally:
        for path in [*list_version_folders(folder), folder, folder.parent]:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        os.close(handle)


def _acquire_lock(folder: Path) -> int:
    """Create the folder, wait for its lock and return the open file descriptor that holds it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process, the last one to use the folder, has just removed it
            continue
        except OSError as error:
            raise files.translate_write_error(error, folder) from error
        try:
            _wait_for_lock(handle, folder)
            if os.fstat(handle).st_ino == os.stat(folder).st_ino:
                return handle
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            raise files.translate_write_error(error, folder) from error
        os.close(handle)  # the folder was removed while this process waited


def _wait_for_lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hub.print_message(f"waiting for another pull, which uses {folder}")
        fcntl.flock(handle, fcntl.LOCK_EX)
