"""The state of a run that checkpoint sync sends, so that another machine can continue it.

It goes to a private repo on the Hub that mirrors runs/<run>/:

    state.json    the progress of the run, and size and sha256 of every other file
    config.yaml  data.json  data/  finetune/checkpoints/checkpoint-80/  ...    as in the run's folder

Files that are made again in minutes (16-bit weights, GGUFs) and their records are not sent. Each commit holds a
complete state, so no machine ever continues from an upload that was interrupted.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from common import files, hub
from common.errors import UserError, printable_line
from contract.manifest import NAME_PATTERN
from pipeline.config.stage_settings import hash_training_settings
from pipeline.run.checkpoint_files import COMPLETE_MARKER, checkpoint_step, list_checkpoints
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run

STATE_FILE = "state.json"
MAX_STATE_BYTES = 16 << 20  # bytes that state.json may have
SYNCED_STAGES = ("data", "finetune", "evaluate")
RESULT_FILE = "publish.json"  # names the published model; a run that has it is complete, and no machine continues it
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class RunState:
    """The state of a run at one point: its progress and its files."""

    run: str
    config: str
    """sha256 of config.yaml."""
    done: tuple[str, ...] = ()
    """The completed stages."""
    step: int = 0
    """The step of the newest checkpoint, 0 without one."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{path in the run's folder: {"sha256", "bytes"}}."""
    training: str = ""
    """Hash of the settings that rows and training depend on (stage_settings.py); empty in a state of schema 1."""
    schema: int = SCHEMA_VERSION

    def is_same_training(self, other_state: "RunState") -> bool:
        """Return whether both are states of the same run with the same rows and training settings.

        Where one of them has no hash of these settings, their whole configs are compared.
        """
        have_hashes = bool(self.training and other_state.training)
        is_same = self.training == other_state.training if have_hashes else self.config == other_state.config
        return is_same and self.run == other_state.run

    @property
    def progress(self) -> tuple[int, int]:
        """Return a key that sorts the states of a run by their progress: (number of completed stages, step)."""
        return len(self.done), self.step

    def __str__(self) -> str:
        return f"step {self.step:,}" if self.step else f"{self.done[-1] if self.done else 'nothing'} done"


def fill_repo_name(template: str, run: str | None) -> str:
    """Return owner/name with {user} and {run} filled in. Raise UserError when it is not the name of a repo."""
    name = hub.fill_placeholders(template, run)
    if not hub.REPO_ID_PATTERN.fullmatch(name):
        text = f"CHECKPOINTS={printable_line(name)} is not the name of a repo on the Hub"
        raise UserError(text, "CHECKPOINTS=owner/name", code="checkpoints.invalid_repo_name")
    return name


def snapshot_run(run: Run) -> RunState:
    """Return the state of the run's folder as it is now. Raise UserError before `data` is complete."""
    step, paths = find_synced_files(run)
    names = sorted(path.relative_to(run.folder).as_posix() for path in paths)
    file_facts = {name: describe_file(run.folder / name) for name in names}
    done_stages = tuple(stage for stage in (*SYNCED_STAGES, Path(RESULT_FILE).stem) if run.is_done(stage))
    config_hash = file_facts["config.yaml"]["sha256"]
    return RunState(run.name, config_hash, done_stages, step, file_facts, hash_training_settings(run.read_config()))


def find_synced_files(run: Run) -> tuple[int, list[Path]]:
    """Return the step of the newest complete checkpoint and all files that are sent.

    The step is 0 without a checkpoint, and when the training is complete: then the adapter is sent instead.
    Raise UserError before `data` is complete.
    """
    run.read_record(DataRecord)
    paths = [
        run.config_file,
        *filter(Path.is_file, map(run.record_path, SYNCED_STAGES)),
        *list_files(run.folder / "data"),
    ]
    paths += [run.folder / RESULT_FILE] if (run.folder / RESULT_FILE).is_file() else []
    if run.is_done("evaluate"):
        paths += list_files(run.folder / "evaluate")
    if run.is_done("finetune"):
        return 0, paths + [p for p in list_files(run.folder / "finetune") if "checkpoints" not in p.parts]
    step, checkpoint_folders = find_needed_checkpoints(run.folder / "finetune" / "checkpoints")
    # The log is left out: it grows during the upload, and each checkpoint holds its entries.
    small_files = (run.folder / "finetune" / name for name in ("source.json", "choice.json"))
    return step, [
        *paths,
        *filter(Path.is_file, small_files),
        *(path for folder in checkpoint_folders for path in list_files(folder)),
    ]


def find_needed_checkpoints(folder: Path) -> tuple[int, list[Path]]:
    """Return the newest complete checkpoint's step, and the folders needed to resume: it and the best one so far."""
    complete = [path for path in list_checkpoints(folder) if (path / COMPLETE_MARKER).is_file()]
    if not complete:
        return 0, []
    newest = complete[-1]
    needed = (newest, find_best_checkpoint(newest))
    return checkpoint_step(newest), [path for path in complete if path in needed]


def find_best_checkpoint(newest: Path) -> Path:
    """Return the folder of the best checkpoint so far, as the newest one has it: itself where it names none."""
    best = files.read_json(newest / "trainer_state.json").get("best_model_checkpoint")
    return newest.parent / Path(best).name if best else newest


def list_files(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, without hidden ones."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def describe_file(path: Path) -> dict[str, Any]:
    """Return sha256 and size in bytes of a file."""
    return {"sha256": files.sha256(path), "bytes": path.stat().st_size}


def dump_state(state: RunState) -> bytes:
    """Return the content of state.json."""
    return json.dumps(asdict(state), indent=1).encode()


def parse_state(content: bytes, file_name: str) -> RunState:
    """Return the state in the content of a state.json.

    Args:
        file_name: name of the file, for messages.

    Raises:
        UserError: Ferry did not write it, or a newer Ferry did.
    """
    try:
        values = json.loads(content)
        version = values.pop("schema")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{file_name} has schema {version}, this Ferry reads up to {SCHEMA_VERSION}",
                "git pull, then run the same command again",
                code="checkpoints.newer_schema",
            )
        state = RunState(**(values | {"done": tuple(values["done"])}))
        is_valid = is_valid_state(state)
    except (ValueError, TypeError, KeyError, AttributeError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f"{file_name} is not the state of a run",
            "choose a different repo: CHECKPOINTS=owner/name",
            code="checkpoints.invalid_state",
        )
    return state


def is_valid_state(state: RunState) -> bool:
    """Return whether Ferry can have written a state; values of other types raise what Python raises for them."""
    has_safe_names = bool(re.fullmatch(NAME_PATTERN, state.run)) and all(map(is_safe_name, state.files))
    has_rows = {"config.yaml", "data.json"} <= state.files.keys()
    has_valid_files = all(len(item["sha256"]) == 64 and item["bytes"] >= 0 for item in state.files.values())
    return has_safe_names and state.step >= 0 and has_rows and has_valid_files


def is_safe_name(name: str) -> bool:
    """Return whether a name is a normalized relative path that stays inside the folder and is not state.json."""
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name
    return is_inside and str(path) == name and name != STATE_FILE
