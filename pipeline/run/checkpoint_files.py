"""Checkpoints of a training on this disk: which are complete, which are kept.

A checkpoint is complete once it is marked. Older ones are removed only after that, so there is always a complete one, and a
disk that is full costs the new one, never the last.
"""

import re
import shutil
from pathlib import Path

from common import files
from common.errors import UserError

COMPLETE = "ferry-complete"
NAME = re.compile(r"checkpoint-[0-9]+")  # checkpoint-best, checkpoint-8-mine: a user's own copies


def mark_complete(path: Path, step: int) -> None:
    """All of it is on disk, and then it says so, with the names of its files."""
    files.sync(path)
    files.write_json(path / COMPLETE, {"step": step, "files": sorted(item.name for item in path.iterdir())})


def remove_all_but(folder: Path, kept: set[Path]) -> None:
    """Remove all checkpoints but these."""
    names = {path.name for path in kept}
    for path in list_checkpoints(folder):
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints, the oldest first: folders that are called as the trainer calls them, and no others."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_last_complete(folder: Path) -> Path | None:
    """The newest marked checkpoint; unmarked ones are removed.

    Raises UserError when a file of it is gone: without its optimizer state, say, another training would go on from it.
    """
    found = list_checkpoints(folder)
    for path in found:
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path)
    newest = next((path for path in reversed(found) if path.is_dir()), None)
    lost = (
        [name for name in files.read_json(newest / COMPLETE).get("files", []) if not (newest / name).exists()]
        if newest
        else []
    )
    if lost:
        raise UserError(
            f"{newest} lacks {', '.join(lost)}: a training that resumes without would be another one",
            f"put the file back, or remove {newest} to resume from the checkpoint before it, or from the start",
        )
    return newest
