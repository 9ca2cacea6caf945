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

from common import files, hub
from common.errors import UserError
from contract import manifest
from deploy import store

BREW = "brew install --cask lm-studio, or " if sys.platform == "darwin" else ""
INSTALL = f"{BREW}https://lmstudio.ai, and start it once"
RECORD = "lmstudio.json"
FOUND = "found"  # the origin of a file that was there before Ferry: the user's own download
PATIENCE = 30  # seconds for an answer of the app
COPYING = 1800  # seconds for `lms import`, which may copy 100 GB to a slow disk


class Absent(UserError):
    """LM Studio is not installed; the other apps can be used without it."""


def home() -> Path:
    """Return LM Studio's folder, looked up as its own programs do it."""
    user, said = Path.home(), ""
    with contextlib.suppress(OSError, ValueError):  # no such file, or not text
        said = (user / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip().replace("\0", "")
    old = user / ".cache" / "lm-studio"
    return Path(said) if said else old if old.is_dir() else user / ".lmstudio"


def models() -> Path:
    """Return the folder where LM Studio looks for models: the one in its settings, else <home>/models."""
    try:
        said = json.loads((home() / "settings.json").read_text(encoding="utf-8")).get("downloadsFolder")
    except (OSError, ValueError, AttributeError):
        said = None
    return Path(said.replace("\0", "")) if isinstance(said, str) and said else home() / "models"


def program() -> str | None:
    """Return the path of the `lms` command, on PATH or where the app installs it; None when there is none."""
    inside = home() / "bin" / "lms"
    return shutil.which("lms") or (str(inside) if os.access(inside, os.X_OK) else None)


def stage(version: Path) -> dict:
    """Put the file of a version into LM Studio in place of other versions, write lmstudio.json and return it.

    Raises LMStudioMissing when LM Studio is not installed, UserError when a file that is not Ferry's is in the way.
    """
    made, path = store.passed(version)
    if program() is None and not home().is_dir():
        raise Absent("LM Studio is not installed", INSTALL)
    artifact, target = made.artifact(path.name), place(version, path)
    how = there(path, target, artifact.sha256)
    if how and set(list_origins(target, version.parent)) <= {FOUND}:
        how = FOUND
    if how is None:
        refuse_anothers(target, version.parent)
        files.remove(target)
        # Recorded before the import begins, so that half a file found there later is known to be Ferry's.
        files.write_json(version / RECORD, {"stage": "lmstudio", "target": str(target), "done": False})
        how = put(path, target, artifact.sha256)
    leave_elsewhere(version, target)
    record = {"stage": "lmstudio", "target": str(target), "done": True, "how": how, "key": key(target)}
    files.write_json(version / RECORD, record)
    return record


def place(version: Path, path: Path) -> Path:
    """Return <models>/<publisher>/<model>/<file> for a version.

    Publisher and model are those of its repo on the Hub; for a folder hub they are `ferry` and the name in the store.
    """
    pulled = store.record(version)
    user, name = pulled["repo"].split("/") if pulled["commit"] else ("ferry", version.parent.name)
    return models() / user / name / path.name


def there(path: Path, target: Path, sha256: str) -> str | None:
    """Return 'hard link' or 'copy' when the target is the same file as `path`; None when it is not, or is missing."""
    if not target.is_file():
        return None
    if target.samefile(path):
        return "hard link"
    same = target.stat().st_size == path.stat().st_size and files.sha256(target) == sha256
    return "copy" if same else None


def list_origins(target: Path, folder: Path) -> list[str | None]:
    """Return how the file came to the target, for each record of the model's versions that names it.

    An item is None when Ferry began to import the file and did not finish. folder: that of the model in the store.
    """
    return [r.get("how") for r in store.records(folder, RECORD).values() if r["target"] == str(target)]


def is_inside(target: Path) -> bool:
    """Return whether the target is <models>/<publisher>/<model>/<file>.gguf. Ferry writes to such paths only.

    <models> is the folder where LM Studio looks now, or its default one, where it looked before its settings changed.
    """
    roots = [root for root in (models(), home() / "models") if target.is_relative_to(root)]
    parts = [target.relative_to(root).parts for root in roots]
    return target.suffix == ".gguf" and any(len(each) == 3 and ".." not in each for each in parts)


def refuse_anothers(target: Path, folder: Path) -> None:
    """Raise UserError when the target is a file that Ferry did not put there. folder: the model's in the store."""
    if os.path.lexists(target) and not ours(target, folder):
        raise UserError(
            f"{target} is there already and Ferry did not put it there",
            "delete it in LM Studio (My Models) or move it away, then run the same command again",
        )


def ours(target: Path, folder: Path) -> bool:
    """Return whether Ferry put this file there.

    It did when a record names the file, and the file is an unfinished import or still equal to a file of one of the
    model's versions. Without a record such a file is the user's own download.
    """
    origins = list_origins(target, folder)
    if not target.is_file() or not origins or FOUND in origins:
        return False
    begun = any(r["target"] == str(target) and not r["done"] for r in store.records(folder, RECORD).values())
    linked = any(target.samefile(path) for path in folder.glob("*/*.gguf"))
    return begun or linked or files.sha256(target) in published(folder)


def published(folder: Path) -> set[str]:
    """Return the sha256 of every file that the manifests of the model's versions name."""
    found = []
    for version in store.versions(folder):
        with contextlib.suppress(UserError):
            found += manifest.read(version / manifest.NAME).artifacts
    return {artifact.sha256 for artifact in found}


def put(path: Path, target: Path, sha256: str) -> str:
    """Import the file, with `lms import` where that works, and return 'hard link' or 'copy'.

    Raises UserError when the target is not the same file afterwards.
    """
    linked = can_link(path, target)
    if not (command := program()) or not through(command, path, target, linked):
        files.remove(target)  # `lms import` leaves half a copy on a full disk
        lay(path, target, linked)
    how = there(path, target, sha256)
    if how is None:
        raise UserError(f"{target} is not the file that was to be imported", "run the same command again")
    return how


def can_link(path: Path, target: Path) -> bool:
    """Return whether a hard link to the target works, by creating one and removing it again.

    It needs one file system for both files, and one that supports hard links. Raises UserError when the folder of the
    target is not writable.
    """
    probe = target.with_name(f".{target.name}.ferry")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        files.remove(probe)
        os.link(path, probe)
    except OSError as error:
        if isinstance(known := files.translated(error, target), UserError) and not os.access(target.parent, os.W_OK):
            raise known from error
        return False
    files.remove(probe)
    return True


def through(command: str, path: Path, target: Path, linked: bool) -> bool:
    """Import the file with `lms import` and return whether that worked. With some settings of LM Studio it fails.

    `lms import` moves a file by default, so it is always told to link or to copy.
    """
    user = f"{target.parent.parent.name}/{target.parent.name}"
    how = "--hard-link" if linked else "--copy"
    try:
        done = subprocess.run(
            [command, "import", str(path.absolute()), how, "--user-repo", user, "-y"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COPYING,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and target.is_file()


def lay(path: Path, target: Path, linked: bool) -> None:
    """Link or copy the file to the target without `lms`; the layout of the folder is documented."""
    with files.writing(target) as part:
        os.link(path, part) if linked else files.copy(path, part)


def leave_elsewhere(version: Path, target: Path) -> None:
    """Remove what other versions of the model put elsewhere, and their records: LM Studio has one version only."""
    for other, record in store.records(version.parent, RECORD).items():
        if record["target"] != str(target):
            _away(Path(record["target"]), version.parent)
        if other != version:
            files.remove(other / RECORD)


def _away(target: Path, folder: Path) -> int:
    """Remove a file that Ferry put there, and folders left empty; return the bytes that became free.

    They are 0 for one of several hard links, and for a file that has to stay.
    """
    if not target.is_file():
        return 0
    if reason := reason_to_keep(target, folder):
        hub.say(f"lmstudio: {target} {reason}: it stays")
        return 0
    facts = target.stat()
    files.remove(target)
    for empty in (target.parent, target.parent.parent):
        with contextlib.suppress(OSError):  # not empty
            empty.rmdir()
    return facts.st_size if facts.st_nlink == 1 else 0


def reason_to_keep(target: Path, folder: Path) -> str | None:
    """Return why a recorded file must not be removed; None when it is Ferry's."""
    if FOUND in list_origins(target, folder):
        return "was there before Ferry"
    if not is_inside(target):
        return "is no model's place in LM Studio's models folder"
    return None if ours(target, folder) else "is no longer the file that Ferry put there"


def gone(version: Path) -> int:
    """Remove a version from LM Studio and return the bytes that became free."""
    said = store.read(version / RECORD)
    back = _away(Path(said["target"]), version.parent) if said else 0
    files.remove(version / RECORD)
    return back


def key(target: Path) -> str | None:
    """Return the name under which LM Studio lists the file; None when the app cannot be asked or does not list it."""
    command = program()
    if command is None:
        return None
    try:
        done = subprocess.run(
            [command, "ls", "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )
        listed = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    inside = "/".join(target.parts[-3:])
    found = [m for m in listed if isinstance(m, dict) and m.get("path") == inside] if isinstance(listed, list) else []
    return str(found[0].get("modelKey")) if found else None
