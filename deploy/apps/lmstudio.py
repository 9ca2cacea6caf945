"""lmstudio: put the pulled file into LM Studio's models folder, as a hard link if the disk allows it, else as a copy.

LM Studio identifies a model by the path of its file, <models>/<publisher>/<model>/<file>.gguf, so it always has the one
version that is in use.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import files, hub
from common.errors import UserError
from contract import manifest
from deploy import store

BREW_HINT = "brew install --cask lm-studio, or " if sys.platform == "darwin" else ""
INSTALL_HINT = f"{BREW_HINT}https://lmstudio.ai, and start it once"
RECORD = "lmstudio.json"
PREEXISTING = "found"  # the origin of a file that was there before Ferry: the user's own download
QUERY_TIMEOUT = 30  # seconds for an answer of the app
IMPORT_TIMEOUT = 1800  # seconds for `lms import`, which may copy 100 GB to a slow disk


class LMStudioMissing(UserError):
    """LM Studio is not installed; the other apps can be used without it."""


def home_folder() -> Path:
    """Return LM Studio's folder, looked up as its own programs do it."""
    user_home, pointer = Path.home(), ""
    with contextlib.suppress(OSError, ValueError):  # no such file, or not text
        pointer = (user_home / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip().replace("\0", "")
    old_folder = user_home / ".cache" / "lm-studio"
    return Path(pointer) if pointer else old_folder if old_folder.is_dir() else user_home / ".lmstudio"


def models_folder() -> Path:
    """Return the folder where LM Studio looks for models: the one in its settings, else <home>/models."""
    try:
        settings = json.loads((home_folder() / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    folder = settings.get("downloadsFolder") if isinstance(settings, dict) else None
    return Path(folder.replace("\0", "")) if isinstance(folder, str) and folder else home_folder() / "models"


def find_command() -> str | None:
    """Return the path of the `lms` command, on PATH or where the app installs it; None when there is none."""
    app_command = home_folder() / "bin" / "lms"
    return shutil.which("lms") or (str(app_command) if os.access(app_command, os.X_OK) else None)


def run_lmstudio(version: Path) -> dict[str, Any]:
    """Put the file of a version into LM Studio in place of other versions, write lmstudio.json and return it.

    Raise LMStudioMissing when LM Studio is not installed, UserError when a file that is not Ferry's is in the way.
    """
    model_manifest, path = store.load_tested(version)
    if find_command() is None and not home_folder().is_dir():
        raise LMStudioMissing("LM Studio is not installed", INSTALL_HINT, code="lmstudio.not_installed")
    artifact, target = model_manifest.find_artifact(path.name), target_path(version, path)
    kind = import_kind(path, target, artifact.sha256)
    if kind and set(list_origins(target, version.parent)) <= {PREEXISTING}:
        kind = PREEXISTING
    if kind is None:
        refuse_foreign_file(target, version.parent)
        files.remove(target)
        # Recorded before the import begins, so that half a file found there later is known to be Ferry's.
        files.write_json(version / RECORD, {"stage": "lmstudio", "target": str(target), "done": False})
        kind = import_file(path, target, artifact.sha256)
    remove_other_copies(version, target)
    record = {"stage": "lmstudio", "target": str(target), "done": True, "how": kind, "key": find_model_key(target)}
    files.write_json(version / RECORD, record)
    return record


def target_path(version: Path, path: Path) -> Path:
    """Return <models>/<publisher>/<model>/<file> for a version.

    Publisher and model are those of its repo on the Hub; for a folder hub they are `ferry` and the name in the store.
    """
    pull_record = store.read_pull_record(version)
    publisher, name = pull_record["repo"].split("/") if pull_record["commit"] else ("ferry", version.parent.name)
    return models_folder() / publisher / name / path.name


def import_kind(path: Path, target: Path, sha256: str) -> str | None:
    """Return 'hard link' or 'copy' when the target is the same file as `path`; None when it is not, or is missing."""
    if not target.is_file():
        return None
    if target.samefile(path):
        return "hard link"
    is_same = target.stat().st_size == path.stat().st_size and files.sha256(target) == sha256
    return "copy" if is_same else None


def list_origins(target: Path, folder: Path) -> list[str | None]:
    """Return how the file came to the target, for each record of the model's versions that names it.

    An item is None when Ferry began to import the file and did not finish. folder: that of the model in the store.
    """
    return [r.get("how") for r in store.read_records(folder, RECORD).values() if r["target"] == str(target)]


def is_model_path(target: Path) -> bool:
    """Return whether the target is <models>/<publisher>/<model>/<file>.gguf. Ferry writes to such paths only.

    <models> is the folder where LM Studio looks now, or its default one, where it looked before its settings changed.
    """
    roots = [root for root in (models_folder(), home_folder() / "models") if target.is_relative_to(root)]
    parts = [target.relative_to(root).parts for root in roots]
    return target.suffix == ".gguf" and any(len(names) == 3 and ".." not in names for names in parts)


def refuse_foreign_file(target: Path, folder: Path) -> None:
    """Raise UserError when the target is a file that Ferry did not put there. folder: the model's in the store."""
    if os.path.lexists(target) and not is_ours(target, folder):
        raise UserError(
            f"{target} exists already and was not created by Ferry",
            "delete it in LM Studio (My Models) or move it away, then run the same command again",
            code="lmstudio.foreign_file",
        )


def is_ours(target: Path, folder: Path) -> bool:
    """Return whether Ferry put this file there.

    It did when a record names the file, and the file is an unfinished import or still equal to a file of one of the
    model's versions. Without a record such a file is the user's own download.
    """
    origins, records = list_origins(target, folder), store.read_records(folder, RECORD).values()
    if not target.is_file() or not origins or PREEXISTING in origins:
        return False
    is_unfinished = any(record["target"] == str(target) and not record["done"] for record in records)
    is_linked = any(target.samefile(path) for path in folder.glob("*/*.gguf"))
    return is_unfinished or is_linked or files.sha256(target) in list_manifest_hashes(folder)


def list_manifest_hashes(folder: Path) -> set[str]:
    """Return the sha256 of every file that the manifests of the model's versions name."""
    artifacts: list[manifest.Artifact] = []
    for version in store.list_complete_versions(folder):
        with contextlib.suppress(UserError):
            artifacts += manifest.read_manifest(version / manifest.FILE_NAME).artifacts
    return {artifact.sha256 for artifact in artifacts}


def import_file(path: Path, target: Path, sha256: str) -> str:
    """Import the file, with `lms import` where that works, and return 'hard link' or 'copy'.

    Raise UserError when the target is not the same file afterwards.
    """
    can_use_link = can_link(path, target)
    command, is_imported = find_command(), False
    if command:
        is_imported = import_with_lms(command, path, target, can_use_link)
    if not is_imported:
        files.remove(target)  # `lms import` leaves half a copy on a full disk
        place_file(path, target, can_use_link)
    kind = import_kind(path, target, sha256)
    if kind is None:
        raise UserError(
            f"{target} differs from {path} after the import",
            "run the same command again",
            code="lmstudio.import_failed",
        )
    return kind


def can_link(path: Path, target: Path) -> bool:
    """Return whether a hard link to the target works, by creating one and removing it again.

    It needs one file system for both files, and one that supports hard links. Raise UserError when the folder of the
    target is not writable.
    """
    probe = target.with_name(f".{target.name}.ferry")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        files.remove(probe)
        os.link(path, probe)
    except OSError as error:
        if isinstance(explained := files.translate_write_error(error, target), UserError) and not os.access(
            target.parent, os.W_OK
        ):
            raise explained from error
        return False
    files.remove(probe)
    return True


def import_with_lms(command: str, path: Path, target: Path, can_use_link: bool) -> bool:
    """Import the file with `lms import` and return whether that worked. With some settings of LM Studio it fails.

    `lms import` moves a file by default, so it is always told to link or to copy.
    """
    user_repo = f"{target.parent.parent.name}/{target.parent.name}"
    mode = "--hard-link" if can_use_link else "--copy"
    try:
        result = subprocess.run(
            [command, "import", str(path.absolute()), mode, "--user-repo", user_repo, "-y"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=IMPORT_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and target.is_file()


def place_file(path: Path, target: Path, can_use_link: bool) -> None:
    """Link or copy the file to the target without `lms`; the layout of the folder is documented."""
    with files.write_atomically(target) as part:
        if can_use_link:
            os.link(path, part)
        else:
            files.copy_and_hash(path, part)


def remove_other_copies(version: Path, target: Path) -> None:
    """Remove what other versions of the model put elsewhere, and their records: LM Studio has one version only."""
    for other_version, record in store.read_records(version.parent, RECORD).items():
        if record["target"] != str(target):
            _remove_file(Path(record["target"]), version.parent)
        if other_version != version:
            files.remove(other_version / RECORD)


def _remove_file(target: Path, folder: Path) -> int:
    """Remove a file that Ferry put there, and folders left empty; return the bytes that became free.

    They are 0 for one of several hard links, and for a file that has to stay.
    """
    if not target.is_file():
        return 0
    if reason := reason_to_keep(target, folder):
        hub.print_message(f"lmstudio: {target} {reason}: it is kept")
        return 0
    file_stat = target.stat()
    files.remove(target)
    for empty in (target.parent, target.parent.parent):
        with contextlib.suppress(OSError):  # not empty
            empty.rmdir()
    return file_stat.st_size if file_stat.st_nlink == 1 else 0


def reason_to_keep(target: Path, folder: Path) -> str | None:
    """Return why a recorded file must not be removed; None when it is Ferry's."""
    if PREEXISTING in list_origins(target, folder):
        return "was there before Ferry"
    if not is_model_path(target):
        return "is not a model's path in LM Studio's models folder"
    return None if is_ours(target, folder) else "is no longer the file that Ferry put there"


def remove_version(version: Path) -> int:
    """Remove a version from LM Studio and return the bytes that became free."""
    record = store.read_record(version / RECORD)
    freed_bytes = 0
    if record:
        freed_bytes = _remove_file(Path(record["target"]), version.parent)
    files.remove(version / RECORD)
    return freed_bytes


def find_model_key(target: Path) -> str | None:
    """Return the name under which LM Studio lists the file; None when the app cannot be asked or does not list it."""
    command, relative_path = find_command(), "/".join(target.parts[-3:])
    entries = query_app([command, "ls", "--json"]) if command else None
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("path") == relative_path:
            return str(entry.get("modelKey"))
    return None


def query_app(command: list[str]) -> object:
    """Return the JSON that a command of LM Studio prints; None when there is none in time."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=QUERY_TIMEOUT
        )
        return json.loads(result.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
