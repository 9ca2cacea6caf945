"""lmstudio: the pulled file in LM Studio's models folder, as a hard link where the disk allows it, else as a copy.

Always the version in use: LM Studio knows a model by its file's place, <models>/<publisher>/<model>/<file>.gguf.
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
FOUND = "found"  # how a file came there that was there before Ferry: the user's own download
PATIENCE = 30  # seconds for a word of the app's
COPYING = 1800  # seconds for `lms import`, which may copy 100 GB to a slow disk


class Absent(UserError):
    """LM Studio is not there: the other parts can go on without it."""


def home() -> Path:
    """LM Studio's folder, found as its own programs find it."""
    user, said = Path.home(), ""
    with contextlib.suppress(OSError, ValueError):  # none, or no text
        said = (user / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip().replace("\0", "")
    old = user / ".cache" / "lm-studio"
    return Path(said) if said else old if old.is_dir() else user / ".lmstudio"


def models() -> Path:
    """Where it looks for models: what its settings say, else <home>/models."""
    try:
        said = json.loads((home() / "settings.json").read_text(encoding="utf-8")).get("downloadsFolder")
    except (OSError, ValueError, AttributeError):
        said = None
    return Path(said.replace("\0", "")) if isinstance(said, str) and said else home() / "models"


def program() -> str | None:
    """Its command line, also where the app puts it without touching PATH."""
    inside = home() / "bin" / "lms"
    return shutil.which("lms") or (str(inside) if os.access(inside, os.X_OK) else None)


def stage(version: Path) -> dict:
    """Put the version's file into LM Studio, in place of an older version's, and write lmstudio.json.

    Raises Absent when there is no LM Studio, UserError when another one's file is in the way.
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
        # Said before it begins: half a file found there later is ours.
        files.write_json(version / RECORD, {"stage": "lmstudio", "target": str(target), "done": False})
        how = put(path, target, artifact.sha256)
    leave_elsewhere(version, target)
    record = {"stage": "lmstudio", "target": str(target), "done": True, "how": how, "key": key(target)}
    files.write_json(version / RECORD, record)
    return record


def place(version: Path, path: Path) -> Path:
    """<models>/<publisher>/<model>/<file>: of a repo on the Hub its own names, else ferry and the store's."""
    pulled = store.record(version)
    user, name = pulled["repo"].split("/") if pulled["commit"] else ("ferry", version.parent.name)
    return models() / user / name / path.name


def there(path: Path, target: Path, sha256: str) -> str | None:
    """'hard link' or 'copy' when the very file is there already."""
    if not target.is_file():
        return None
    if target.samefile(path):
        return "hard link"
    same = target.stat().st_size == path.stat().st_size and files.sha256(target) == sha256
    return "copy" if same else None


def list_origins(target: Path, folder: Path) -> list[str | None]:
    """Return how the file came there, by each record of this model's versions that names it; None: Ferry began to."""
    return [r.get("how") for r in store.records(folder, RECORD).values() if r["target"] == str(target)]


def is_inside(target: Path) -> bool:
    """Whether it is <models>/<publisher>/<model>/<file>.gguf, the one kind of place that Ferry puts a file to.

    <models> is where LM Studio looks now, or its usual folder, where it looked before a change of its settings.
    """
    roots = [root for root in (models(), home() / "models") if target.is_relative_to(root)]
    parts = [target.relative_to(root).parts for root in roots]
    return target.suffix == ".gguf" and any(len(each) == 3 and ".." not in each for each in parts)


def refuse_anothers(target: Path, folder: Path) -> None:
    """A file that Ferry did not put there stays. folder: the model's in the store, which says what is ours."""
    if os.path.lexists(target) and not ours(target, folder):
        raise UserError(
            f"{target} is there already and Ferry did not put it there",
            "delete it in LM Studio (My Models) or move it away, then run the same command again",
        )


def ours(target: Path, folder: Path) -> bool:
    """Did Ferry put this file there? A record says so, and it is an import that did not come to its end, or still a file of
    one of the model's versions. (Without a record such a file is the user's own download.)"""
    origins = list_origins(target, folder)
    if not target.is_file() or not origins or FOUND in origins:
        return False
    begun = any(r["target"] == str(target) and not r["done"] for r in store.records(folder, RECORD).values())
    linked = any(target.samefile(path) for path in folder.glob("*/*.gguf"))
    return begun or linked or files.sha256(target) in published(folder)


def published(folder: Path) -> set[str]:
    """sha256 of every file of this model's versions."""
    found = []
    for version in store.versions(folder):
        with contextlib.suppress(UserError):
            found += manifest.read(version / manifest.NAME).artifacts
    return {artifact.sha256 for artifact in found}


def put(path: Path, target: Path, sha256: str) -> str:
    """'hard link' or 'copy'; through `lms import` where that works. Raises UserError when it does not arrive whole."""
    linked = can_link(path, target)
    if not (command := program()) or not through(command, path, target, linked):
        files.remove(target)  # `lms import` leaves half a copy on a full disk
        lay(path, target, linked)
    how = there(path, target, sha256)
    if how is None:
        raise UserError(f"{target} is not the file that was to be imported", "run the same command again")
    return how


def can_link(path: Path, target: Path) -> bool:
    """A hard link needs one file system, and one that has them: tried, not guessed. Raises UserError when nothing can be
    written there."""
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
    """`lms import`, told never to move our file (it would by default); false when it fails, as with some settings it does."""
    user = f"{target.parent.parent.name}/{target.parent.name}"
    how = "--hard-link" if linked else "--copy"
    try:
        done = subprocess.run(
            [command, "import", str(path.absolute()), how, "--user-repo", user, "-y"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=COPYING,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and target.is_file()


def lay(path: Path, target: Path, linked: bool) -> None:
    """The documented layout by our own hands."""
    with files.writing(target) as part:
        os.link(path, part) if linked else files.copy(path, part)


def leave_elsewhere(version: Path, target: Path) -> None:
    """What older versions of this model had put to other places: LM Studio shows the one in use."""
    for other, record in store.records(version.parent, RECORD).items():
        if record["target"] != str(target):
            _away(Path(record["target"]), version.parent)
        if other != version:
            files.remove(other / RECORD)


def _away(target: Path, folder: Path) -> int:
    """Remove a file of ours and its empty folders; returns the bytes that came back (0 for one of several hard links)."""
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
    """Return why a recorded file is not to be removed; None where it is Ferry's."""
    if FOUND in list_origins(target, folder):
        return "was there before Ferry"
    if not is_inside(target):
        return "is no model's place in LM Studio's models folder"
    return None if ours(target, folder) else "is no longer the file that Ferry put there"


def gone(version: Path) -> int:
    """Take a version out of LM Studio; returns the bytes that came back."""
    said = store.read(version / RECORD)
    back = _away(Path(said["target"]), version.parent) if said else 0
    files.remove(version / RECORD)
    return back


def key(target: Path) -> str | None:
    """The name under which LM Studio lists the file; None where the app cannot be asked."""
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
