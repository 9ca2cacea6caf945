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

from common import files, hub
from common.errors import UserError, shown
from contract import manifest

NAMES = "names.json"
MAIN = "main"
CURRENT = "current"  # a symbolic link to the version in use
RECORD = "pull.json"
VERSION = re.compile(r"[0-9a-f]{12}")  # no folder with another name is ever listed or removed
NUMBER = int | float
# The fields of a version's records that are read again, with their types.
KINDS = {
    RECORD: {"repo": str, "file": str, "sha256": str, "bytes": int, "manifest_sha256": str, "commit": str | None},
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
    if re.fullmatch(manifest.PLAIN, name) and (models / name).is_dir():
        return models / name, version or None
    path, _, version = repo.rpartition("@")
    if path and re.fullmatch(r"[0-9a-f]{7,12}", version) and hub.is_folder(path) and not hub.is_folder_there(repo):
        return models / _name_of_folder(path), version
    if hub.is_folder(repo):
        return models / _name_of_folder(repo), None
    if re.fullmatch(manifest.PLAIN, name):
        raise UserError(
            f"{models} holds no model {name}", "`make models` lists what it holds; owner/name is one on the Hub"
        )
    name, version = hub.split(repo)
    return models / name.replace("/", "--"), version


def _name_of_folder(repo: str) -> str:
    """Return the name of a folder hub. Raises UserError for a folder without one, such as /."""
    name = hub.folder(repo).resolve().name
    if not name:
        raise UserError(f"REPO {shown(repo)} is no model", "write owner/name for the Hub, ./folder for a folder hub")
    return name


def place(models: Path, repo: str) -> Path:
    """Return the folder of a model in the store."""
    return find_model(models, repo)[0]


def resolve(repo: str | None, models: Path) -> str:
    """Return the model that a command is about: `repo` when one is given, else the only model of the store.

    Raises UserError when the store holds no model, or more than one.
    """
    if repo is not None:
        return repo
    names = [folder.name for folder in sorted(models.glob("*/")) if versions(folder)]
    if len(names) == 1:
        return names[0]
    if not names:
        raise UserError(f"{models} holds no model", "`make deploy-mac REPO=you/model`, or a folder such as ./hub/demo")
    raise UserError(f"REPO is missing, and {models} holds {len(names)} models", f"REPO=one of: {', '.join(names)}")


def which(repo: str, models: Path) -> str:
    """Return the arguments of a `make` command: REPO=, and MODELS= when the store is not the default one."""
    given = f"REPO={shlex.quote(shown(repo))}"
    return given if models == Path("models") else f"{given} MODELS={shlex.quote(str(models))}"


def current(models: Path, repo: str) -> Path:
    """Return the version that `repo` names, else the one in use. Raises UserError when it was not pulled."""
    folder, version = find_model(models, repo)
    found = known(models, repo) if version else in_use(folder)
    if not found or not (found / RECORD).is_file():
        raise UserError(f"{shown(repo)} was not pulled to {models}", f"run `make pull {which(repo, models)}`")
    return found


def in_use(folder: Path) -> Path | None:
    """Return the version that a model's `current` link leads to; None when there is no such link."""
    link = folder / CURRENT
    name = Path(os.readlink(link)).name if link.is_symlink() else ""
    return folder / name if VERSION.fullmatch(name) else None


def use(version: Path) -> None:
    """Make this version the current one. (In a copied store the link may have become a folder, which is replaced.)"""
    link, part = version.parent / CURRENT, version.parent / f".{CURRENT}.part"
    if in_use(version.parent) == version:
        return
    try:
        refuse_foreign_link(link)
        files.remove(part)
        part.symlink_to(version.name)
        if not link.is_symlink():
            files.remove(link)
        os.replace(part, link)
    except OSError as error:
        raise files.translated(error, link) from error


def refuse_foreign_link(link: Path) -> None:
    """Raise UserError when `current` is neither Ferry's link nor the copy of a version.

    When a store is copied, the link may become a copy of the version that it leads to.
    """
    ours = in_use(link.parent) is not None if link.is_symlink() else not link.exists() or bool(read(link / RECORD))
    if not ours:
        raise UserError(f"{link} is not Ferry's", "move it away, or choose another store: MODELS=folder")


def names(folder: Path) -> dict[str, str]:
    """Return {requested name (a tag, branch or commit): the version that was pulled under it}."""
    return {name: version for name, version in read(folder / NAMES).items() if isinstance(version, str)}


def read(path: Path) -> dict:
    """Return a record; {} when it is missing or damaged."""
    try:
        found = files.read_json(path)
    except UserError:
        return {}
    return found if all(isinstance(found.get(key), kind) for key, kind in KINDS.get(path.name, {}).items()) else {}


def records(folder: Path, name: str) -> dict[Path, dict]:
    """Return {version: its record of that name} for the versions of a model; damaged records are left out."""
    found = {version: read(version / name) for version in folders(folder)}
    return {version: record for version, record in found.items() if record}


def beside(folder: Path, name: str) -> dict[Path, dict]:
    """Return {version: its record of that name} for all other models of the store."""
    others = [other for other in folder.parent.glob("*/") if other.name != folder.name]
    return {version: record for other in others for version, record in records(other, name).items()}


def folders(folder: Path) -> list[Path]:
    """Return the versions of a model, unfinished ones too."""
    return [path for path in folder.glob("*/") if VERSION.fullmatch(path.name) and is_ours(path)]


def is_ours(version: Path) -> bool:
    """Return whether Ferry made this folder.

    It did when the folder has a pull.json, when its name is the hash of its manifest, or when it holds nothing but
    unfinished downloads.
    """
    if version.is_symlink():
        return False
    beside = version / manifest.NAME
    if read(version / RECORD) or (beside.is_file() and files.sha256(beside).startswith(version.name)):
        return True
    return all(path.name.startswith(".") and path.name.endswith(".part") for path in version.iterdir())


def remember(version: Path, pulled: dict, asked: str) -> None:
    """Write pull.json, add the requested name to names.json, and make the version the current one.

    What is recorded already is not written again, so that a read-only store can be used.
    """
    if read(version / RECORD) != pulled:
        files.write_json(version / RECORD, pulled)
    before = names(version.parent)
    if before.get(asked) != version.name:
        files.write_json(version.parent / NAMES, before | {asked: version.name})
    use(version)


def record(version: Path) -> dict:
    """Return the pull.json of a version. Raises UserError when it is not what `pull` wrote."""
    found = read(version / RECORD)
    if not found or found["file"] != Path(found["file"]).name:
        raise UserError(f"{version / RECORD} is damaged", f"delete {version} and pull again")
    return found


def versions(folder: Path) -> list[Path]:
    """Return the versions of a model that were pulled completely, newest first."""
    found = [version for version in folders(folder) if (version / RECORD).is_file()]
    return sorted(found, key=lambda version: (version / RECORD).stat().st_mtime, reverse=True)


def known(models: Path, repo: str) -> Path | None:
    """Return the version that was last pulled under exactly this name, or that is this commit; None when there is none.

    It can be used without a network.
    """
    folder, version = find_model(models, repo)
    asked = version or MAIN
    found = names(folder).get(asked)
    if found and (folder / found / RECORD).is_file():
        return folder / found
    return next((version for version in versions(folder) if _is(version, asked)), None)


def pulled(version: Path) -> tuple[manifest.Manifest, Path]:
    """Return the manifest and the file of a complete pull. Both are hashed again.

    Raises UserError when either has changed since the pull.
    """
    said = record(version)
    path, beside = version / said["file"], version / manifest.NAME
    whole = path.is_file() and beside.is_file() and files.sha256(path) == said["sha256"]
    if not whole or files.sha256(beside) != said["manifest_sha256"]:
        raise UserError(
            f"{version} is not what was pulled from {said['repo']}: a file is gone or changed",
            f"delete {version / RECORD} and run the same command again",
        )
    return manifest.read(beside), path


def stamp(path: Path) -> list[int]:
    """Return size, modification time and inode, which change when a file does.

    Hashing 5 GB in every stage would take longer than the stage.
    """
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def passed(version: Path) -> tuple[manifest.Manifest, Path]:
    """Return the manifest and the file of a version that passed its smoke test.

    The file is hashed again only if it was touched since the test. Raises UserError when the version has not passed the
    test, or has changed since.
    """
    said, smoked = record(version), read(version / "smoke.json")
    path, beside = version / said["file"], version / manifest.NAME
    if smoked.get("sha256") != said["sha256"]:
        exactly = f"@{said['commit']}" if said["commit"] else ""
        again = which(said["repo"] + exactly, version.parent.parent)
        raise UserError(f"{said['file']} in {version} has not passed its smoke test", f"run `make smoke {again}`")
    same = path.is_file() and smoked.get("stamp") == stamp(path) and beside.is_file()
    if same and files.sha256(beside) == said["manifest_sha256"]:
        return manifest.read(beside), path
    return pulled(version)


def proven(version: Path) -> bool:
    """Return whether a version passed its smoke test and has not changed since."""
    with contextlib.suppress(UserError):
        return bool(passed(version))
    return False


def list_for_terminal(models: Path) -> str:
    """Return the text of `make models`: two lines for each version, also for one whose pull was interrupted.

    The other commands take NAME@VERSION as it is listed here.
    """
    lines = []
    for version in list_versions(models):
        mark = "*" if in_use(version.parent) == version else " "
        lines += [f"{mark} {version.parent.name}@{version.name}", f"    {_facts(version)}"]
    return "\n".join(lines) or f"{models} holds no models: `make deploy-mac REPO=you/model`"


def list_as_json(models: Path) -> str:
    """Return the versions as JSON: a list of {model, version, in_use, ...the fields of pull.json}."""
    found = [
        {"model": version.parent.name, "version": version.name, "in_use": in_use(version.parent) == version}
        | read(version / RECORD)
        for version in list_versions(models)
    ]
    return json.dumps(found, indent=2)


def list_versions(models: Path) -> list[Path]:
    """Return all versions of all models, the oldest of each model first."""
    return [
        version
        for folder in sorted(path for path in models.glob("*") if path.is_dir())
        for version in sorted(folders(folder), key=_age)
    ]


def _age(version: Path) -> float:
    """Return when a version was pulled, in seconds since the epoch."""
    note = version / RECORD
    return note.stat().st_mtime if note.is_file() else version.stat().st_mtime


def _facts(version: Path) -> str:
    """Return the second line of a version in `make models`."""
    if not (version / RECORD).is_file():
        there = sum(path.stat().st_size for path in version.glob(".*.part"))
        return f"unfinished, {there / 1e9:.2f} GB are there: pull it again, or remove it"
    try:
        said = record(version)
    except UserError:
        return "damaged: pull it again, or remove it"
    asked = ", ".join(name for name, at in names(version.parent).items() if at == version.name)
    day = time.strftime("%Y-%m-%d", time.localtime((version / RECORD).stat().st_mtime))
    return f"{said['file']}  {said['bytes'] / 1e9:.2f} GB  {asked}  {day}  from {said['repo']}"


def matching(models: Path, repo: str) -> list[Path]:
    """Return the versions that `repo` names (REPO@tag, REPO@commit, REPO@version), unfinished ones too.

    A REPO without a version names all versions of the model. Raises UserError when there is no version of that name.
    """
    folder, wanted = find_model(models, repo)
    found = [version for version in folders(folder) if wanted is None or _is(version, wanted)]
    if not found:
        raise UserError(f"{shown(repo)} is not in {models}", "`make models` lists what is")
    return found


def _is(version: Path, name: str) -> bool:
    """Return whether `name` means this version: a name of names.json, or 7 or more digits of its hash or commit."""
    try:
        commit = record(version)["commit"] or ""
    except UserError:
        commit = ""
    return names(version.parent).get(name) == version.name or (
        len(name) >= 7 and (version.name.startswith(name) or commit.startswith(name))
    )


def forget(version: Path) -> int:
    """Delete a version and return the bytes that became free. If it was in use, the newest other one replaces it."""
    with locked(version.parent):
        try:
            back = sum(path.stat().st_size for path in version.iterdir() if path.stat().st_nlink == 1)
            _forget(version)
        except OSError as error:
            raise files.translated(error, version) from error
    return back


def _forget(version: Path) -> None:
    folder = version.parent
    if in_use(folder) == version:
        files.remove(folder / CURRENT)
    files.remove(version / RECORD)  # first: a folder without it is not a complete version
    files.remove(version)
    rest = {name: at for name, at in names(folder).items() if at != version.name}
    if others := versions(folder):
        files.write_json(folder / NAMES, rest)
        use(in_use(folder) or others[0])
    else:
        files.remove(folder / NAMES)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work in a model's folder.

    The lock is on the folder itself and ends with its process. Empty folders are removed afterwards.
    """
    handle = _lock(folder)
    try:
        yield
    finally:
        for path in [*folders(folder), folder, folder.parent]:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        os.close(handle)


def _lock(folder: Path) -> int:
    """Create the folder, wait for its lock and return the open file descriptor that holds it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process, the last one to use the folder, has just removed it
            continue
        except OSError as error:
            raise files.translated(error, folder) from error
        try:
            _wait(handle, folder)
            if os.fstat(handle).st_ino == os.stat(folder).st_ino:
                return handle
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            raise files.translated(error, folder) from error
        os.close(handle)  # the folder was removed while this process waited


def _wait(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hub.say(f"another pull works in {folder}: waiting for it")
        fcntl.flock(handle, fcntl.LOCK_EX)
