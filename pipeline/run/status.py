"""Read the status of runs from their records, and find what can be removed. Needs no machine learning library."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from common import console, files
from common.errors import UserError
from common.lock import read_holder
from pipeline.run.changes import CLEANED
from pipeline.run.run_folder import STAGES, Run, is_run_folder
from pipeline.run.run_stages import lock_file


@dataclass(frozen=True)
class RunStatus:
    """The status of one run. Stages are in their order; sizes are in bytes."""

    name: str
    model: str
    done: tuple[str, ...]
    next_stage: str | None
    """None when the run is complete."""
    held_by: str | None
    """The command that works in the run now, with its pid."""
    step: int | None
    """The last logged step of a training in progress."""
    loss: float | None
    seconds_left: float | None
    score: float | None
    """The score of the default file by the task's rule, 0 to 1."""
    heldout_loss: float | None
    published: str | None
    bytes: int


def read_status(run: Run) -> RunStatus:
    """Return the status of a run."""
    done = tuple(stage for stage in STAGES if run.done(stage))
    holder = read_holder(lock_file(run))
    last = _last_log_entry(run) if "data" in done and "finetune" not in done else {}
    scores = _scores_of_default(run) if "verify" in done else {}
    return RunStatus(
        name=run.name,
        model=run.model,
        done=done,
        next_stage=next((stage for stage in STAGES if stage not in done), None),
        held_by=str(holder) if holder else None,
        step=last.get("step"),
        loss=last.get("loss"),
        seconds_left=last.get("seconds_left") if holder else None,
        score=scores.get("score"),
        heldout_loss=scores.get("loss"),
        published=run.read("publish")["repo"] if "publish" in done else None,
        bytes=_size(run.folder),
    )


def _scores_of_default(run: Run) -> dict:
    verify = run.read("verify")
    return verify["scores"][verify["default"]]


def _last_log_entry(run: Run) -> dict:
    """Return the last entry of the training log that has a loss, or {}."""
    log = run.folder / "finetune" / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    return next((entry for entry in reversed(entries) if "loss" in entry), {})


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def list_runs(runs: Path) -> list[Run]:
    """Return the runs in a folder, in the order of their names. Raise UserError when `runs` is a file."""
    if runs.exists() and not runs.is_dir():
        raise UserError(f"RUNS={runs} is no folder", "name the folder that runs are in")
    return [Run(folder) for folder in sorted(runs.glob("*/")) if is_run_folder(folder)]


def format_runs(statuses: list[RunStatus]) -> str:
    """Return a table with one line for each run."""
    lines = [f"{'run':<26}{'stage':<16}{'score':>7}{'loss':>9}{'disk':>10}"]
    for status in statuses:
        stage = "complete" if status.next_stage is None else f"{len(status.done)}/{len(STAGES)} {status.next_stage}"
        score = "-" if status.score is None else f"{status.score:.0%}"
        loss = "-" if status.heldout_loss is None else f"{status.heldout_loss:.3f}"
        lines.append(f"{status.name:<26}{stage:<16}{score:>7}{loss:>9}{status.bytes / 1e9:>7.2f} GB")
        lines += [f"  in use by {status.held_by}"] if status.held_by else []
    return "\n".join(lines)


def format_status(status: RunStatus, run: Run) -> str:
    """Return one line for each stage, and the command that works in the run now."""
    lines = [f"{run.folder}" + (f", in use by {status.held_by}" if status.held_by else "")]
    for number, stage in enumerate(STAGES, 1):
        if stage in status.done:
            detail = f"done in {console.format_duration(run.read(stage)['seconds'])}"
        elif stage == status.next_stage:
            detail = "running" if status.held_by else "next"
            detail += f", step {status.step:,}, loss {status.loss:.4f}" if status.step else ""
            detail += f", about {console.format_duration(status.seconds_left)} left" if status.seconds_left else ""
        else:
            detail = "-"
        lines.append(f"  [{number}/{len(STAGES)}] {stage:<10}{detail}")
    lines += [f"  score {status.score:.1%}"] if status.score is not None else []
    lines += [f"  published: {status.published}"] if status.published else []
    return "\n".join(lines)


def to_json(value: RunStatus | list[RunStatus]) -> str:
    """Return one status, or a list of them, as JSON."""
    return json.dumps([asdict(one) for one in value] if isinstance(value, list) else asdict(value), indent=2)


def find_removable(run: Run) -> list[Path]:
    """Return what `clean` can remove: paths that can be made again from the adapter or that no later stage reads.

    These are the 16-bit weights, the GGUFs made without an importance matrix, and the checkpoints.
    """
    found: list[Path] = []
    if run.done("finetune"):
        found.append(run.folder / "finetune" / "checkpoints")
    if run.done("publish"):
        default = run.read("verify")["default"]
        found.append(run.folder / "export" / "merged")
        found += [
            run.folder / item["path"]
            for name, item in run.read("export")["outputs"].items()
            if name != default and (name == run.read("export")["sixteen"] or name.endswith("-static"))
        ]
    return [path for path in found if path.exists() and _is_inside(path, run.folder)]


def _is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path is inside the folder. A record from another machine may name any path."""
    return path.resolve().is_relative_to(folder.resolve()) and path.resolve() != folder.resolve()


def remove(run: Run, paths: list[Path]) -> int:
    """Remove these paths of the run and return the bytes freed. Record the paths first, as removed on purpose."""
    size = sum(_size(path) if path.is_dir() else path.stat().st_size for path in paths)
    note = run.folder / CLEANED
    before = files.read_json(note)["paths"] if note.is_file() else []
    now = [str(path.relative_to(run.folder)) for path in paths]
    files.write_json(note, {"paths": sorted({*before, *now})})
    for path in paths:
        files.remove(path)
    return size


def require_run(folder: Path) -> Run:
    """Return the run in a folder. Raise UserError when Ferry did not make the folder."""
    if not is_run_folder(folder):
        raise UserError(f"{folder} is no run of Ferry's", "`ferry runs` lists them")
    return Run(folder)
