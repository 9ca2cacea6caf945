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

from common import files, hub
from common.errors import UserError, shown
from contract.manifest import PLAIN
from pipeline.config.stage_settings import hash_training_settings
from pipeline.run.checkpoint_files import COMPLETE
from pipeline.run.run_folder import Run

INDEX = "state.json"
MOST = 16 << 20  # bytes that state.json may have
LEAVING = ("data", "finetune", "evaluate")
RESULT = "publish.json"  # names the published model; a run that has it is complete, and no machine continues it
SCHEMA = 2


@dataclass(frozen=True)
class State:
    """The state of a run at one point: its progress and its files."""

    run: str
    config: str
    """sha256 of config.yaml."""
    done: tuple[str, ...] = ()
    """The completed stages."""
    step: int = 0
    """The step of the newest checkpoint, 0 without one."""
    files: dict[str, dict] = field(default_factory=dict)
    """{path in the run's folder: {"sha256", "bytes"}}."""
    training: str = ""
    """Hash of the settings that rows and training depend on (stage_settings.py); empty in a state of schema 1."""
    schema: int = SCHEMA

    def is_same_training(self, other: "State") -> bool:
        """Return whether both are states of the same run with the same rows and training settings.

        Where one of them has no hash of these settings, their whole configs are compared.
        """
        known = bool(self.training and other.training)
        same = self.training == other.training if known else self.config == other.config
        return same and self.run == other.run

    @property
    def reached(self) -> tuple[int, int]:
        """Return a key that sorts the states of a run by their progress: (number of completed stages, step)."""
        return len(self.done), self.step

    def __str__(self) -> str:
        return f"step {self.step:,}" if self.step else f"{self.done[-1] if self.done else 'nothing'} done"


def repository(checkpoints: str, run: str | None) -> str:
    """Return owner/name with {user} and {run} filled in. Raise UserError when it is not the name of a repo."""
    name = hub.named(checkpoints, run)
    if not hub.ID.fullmatch(name):
        raise UserError(f"CHECKPOINTS={shown(name)} is no repo of the Hub", "CHECKPOINTS=owner/name")
    return name


def of(run: Run) -> State:
    """Return the state of the run's folder as it is now. Raise UserError before `data` is complete."""
    step, paths = newest(run)
    names = sorted(path.relative_to(run.folder).as_posix() for path in paths)
    described = {name: describe(run.folder / name) for name in names}
    done = tuple(stage for stage in (*LEAVING, Path(RESULT).stem) if run.done(stage))
    config = described["config.yaml"]["sha256"]
    return State(run.name, config, done, step, described, hash_training_settings(run.config()))


def newest(run: Run) -> tuple[int, list[Path]]:
    """Return the step of the newest complete checkpoint and all files that are sent.

    The step is 0 without a checkpoint, and when the training is complete: then the adapter is sent instead.
    Raise UserError before `data` is complete.
    """
    run.read("data")
    found = [run.config_file, *filter(Path.is_file, map(run.path, LEAVING)), *below(run.folder / "data")]
    found += [run.folder / RESULT] if (run.folder / RESULT).is_file() else []
    if run.done("evaluate"):
        found += below(run.folder / "evaluate")
    if run.done("finetune"):
        return 0, found + [p for p in below(run.folder / "finetune") if "checkpoints" not in p.parts]
    step, kept = checkpoints(run.folder / "finetune" / "checkpoints")
    # The log is left out: it grows during the upload, and each checkpoint holds its entries.
    beside = (run.folder / "finetune" / name for name in ("source.json", "choice.json"))
    return step, [*found, *filter(Path.is_file, beside), *(path for folder in kept for path in below(folder))]


def checkpoints(folder: Path) -> tuple[int, list[Path]]:
    """Return the newest complete checkpoint's step, and the folders needed to resume: it and the best one so far."""
    whole = {int(path.parent.name.split("-")[1]): path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")}
    if not whole:
        return 0, []
    last = whole[max(whole)]
    best = files.read_json(last / "trainer_state.json").get("best_model_checkpoint")
    also = folder / Path(best).name if best else last
    return max(whole), [path for path in whole.values() if path in (last, also)]


def below(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, without hidden ones."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def describe(path: Path) -> dict:
    """Return sha256 and size in bytes of a file."""
    return {"sha256": files.sha256(path), "bytes": path.stat().st_size}


def dump(state: State) -> bytes:
    """Return the content of state.json."""
    return json.dumps(asdict(state), indent=1).encode()


def parse(content: bytes, where: str) -> State:
    """Return the state in the content of a state.json.

    Args:
        file_name: name of the file, for messages.

    Raises:
        UserError: Ferry did not write it, or a newer Ferry did.
    """
    try:
        said = json.loads(content)
        version = said.pop("schema")
        if version > SCHEMA:
            raise UserError(
                f"{where} has schema {version}, this Ferry reads up to {SCHEMA}", "git pull, then the same command"
            )
        state = State(**(said | {"done": tuple(said["done"])}))
        sound = (
            bool(re.fullmatch(PLAIN, state.run))
            and state.step >= 0
            and {"config.yaml", "data.json"} <= state.files.keys()
        )
        sound = sound and all(map(plain, state.files))
        sound = sound and all(len(item["sha256"]) == 64 and item["bytes"] >= 0 for item in state.files.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{where} is no state of a run", "CHECKPOINTS=another repo; this one is something else's")
    return state


def plain(name: str) -> bool:
    """Return whether a name is a normalized relative path that stays inside the folder and is not state.json."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name
    return inside and str(path) == name and name != INDEX
