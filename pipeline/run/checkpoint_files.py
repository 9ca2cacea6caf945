"""The checkpoints of a training on this disk: mark complete ones, list them, remove old and incomplete ones.

A checkpoint is complete when it contains the marker file. Older checkpoints are removed only after the new one is
marked, so there is always a complete one: when the disk is full, the new checkpoint is lost and the last one stays.
"""

import re
import shutil
from pathlib import Path

from common import files
from common.errors import UserError

COMPLETE_MARKER = "ferry-complete"
# Other names, such as checkpoint-best or checkpoint-8-mine, are a user's own copies.
CHECKPOINT_NAME = re.compile(r"checkpoint-[0-9]+")


def mark_complete(path: Path, step: int) -> None:
    """Sync the checkpoint to disk, then write its marker, which names the step and all files."""
    files.fsync_tree(path)
    files.write_json(path / COMPLETE_MARKER, {"step": step, "files": sorted(item.name for item in path.iterdir())})


def remove_other_checkpoints(folder: Path, keep: set[Path]) -> None:
    """Remove all checkpoints except those in `keep`, which are compared by name."""
    names = {path.name for path in keep}
    for path in list_checkpoints(folder):
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first. Folders whose names the trainer does not use are left out."""
    folders = [path for path in folder.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(path.name.split("-")[1])


def prune_and_find_checkpoint(folder: Path) -> Path | None:
    """Remove incomplete checkpoints and return the newest complete one, or None. Raise UserError if it lacks a file."""
    remove_incomplete_checkpoints(folder)
    newest = next(reversed(list_checkpoints(folder)), None)
    if newest:
        refuse_missing_files(newest)
    return newest


def remove_incomplete_checkpoints(folder: Path) -> None:
    """Remove the checkpoints without a marker."""
    for path in list_checkpoints(folder):
        if not (path / COMPLETE_MARKER).is_file():
            shutil.rmtree(path)


def refuse_missing_files(checkpoint: Path) -> None:
    """Raise UserError when a file of a complete checkpoint is missing.

    Without the optimizer state, for example, a resumed training would differ from the one that was interrupted.
    """
    names = files.read_json(checkpoint / COMPLETE_MARKER).get("files", [])
    if missing_files := [name for name in names if not (checkpoint / name).exists()]:
        raise UserError(
            f"{checkpoint} lacks {', '.join(missing_files)}: without it the resumed training would differ",
            f"put the file back, or delete {checkpoint} to resume from the checkpoint before it, or from the start",
            code="checkpoints.missing_file",
        )
