"""pull: the manifest first, then one artifact, hashed on the way in; nothing lands that is not what was published."""

import shutil
from pathlib import Path

from contract import files, manifest
from contract.errors import UserError


def stage(repo: str, folder: Path) -> dict:
    """Fetch manifest and default artifact into `folder`, and write pull.json. Raises UserError on any difference."""
    hub = find(repo)
    made = manifest.read(hub / manifest.NAME)
    artifact = made.default()
    source, target = hub / artifact.file, folder / artifact.file
    refuse(source, target, artifact)
    if not target.is_file() or files.sha256(target) != artifact.sha256:
        fetch(source, target, artifact)
    with files.writing(folder / manifest.NAME) as part:
        files.copy(hub / manifest.NAME, part)
    record = {
        "stage": "pull", "repo": repo, "file": artifact.file, "sha256": artifact.sha256, "bytes": artifact.bytes,
        "manifest_sha256": files.sha256(folder / manifest.NAME),
    }  # fmt: skip
    files.write_json(folder / "pull.json", record)
    return record


def find(repo: str) -> Path:
    """The folder that holds the repo. Raises UserError when there is none."""
    hub = Path(repo.removeprefix("file://")).expanduser()
    if not hub.is_dir():
        raise UserError(
            f"REPO {repo}: no such folder",
            "name the folder that `make publish` printed; repos on the Hugging Face Hub are not supported yet",
        )
    if not (hub / manifest.NAME).is_file():
        raise UserError(
            f"{hub} holds no {manifest.NAME}: nothing was published there, or not to its end",
            "run `make publish` again where the model was trained",
        )
    return hub


def refuse(source: Path, target: Path, artifact: manifest.Artifact) -> None:
    """What can be known before a long copy."""
    size = source.stat().st_size if source.is_file() else None
    if size != artifact.bytes:
        raise UserError(
            f"{source} is {'missing' if size is None else f'{size} bytes'}, the manifest says {artifact.bytes} bytes",
            "publish it again: `make publish`",
        )
    free = shutil.disk_usage(files.nearest(target)).free
    if free < artifact.bytes:
        raise UserError(
            f"{artifact.file} needs {artifact.bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free at {target.parent}",
            "free some disk, then run the same command again",
        )


def fetch(source: Path, target: Path, artifact: manifest.Artifact) -> None:
    with files.writing(target) as part:
        digest = files.copy(source, part)
        if digest != artifact.sha256:
            raise UserError(
                f"{source} has sha256 {digest}, the manifest says {artifact.sha256}",
                "the file was damaged or replaced: publish it again with `make publish`",
            )


def pulled(folder: Path) -> tuple[manifest.Manifest, Path]:
    """The manifest and the file of a finished pull, hashed again: the very bytes that were pulled.

    Raises UserError when either has changed since.
    """
    record = files.read_json(folder / "pull.json")
    path = folder / record["file"]
    if (
        not path.is_file()
        or files.sha256(path) != record["sha256"]
        or files.sha256(folder / manifest.NAME) != record["manifest_sha256"]
    ):
        raise UserError(
            f"{folder} is not what was pulled from {record['repo']}: a file is gone or changed",
            f"delete {folder / 'pull.json'} and run the same command again",
        )
    return manifest.read(folder / manifest.NAME), path
