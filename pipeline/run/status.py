"""How far runs are, and what of them can be removed: from their records, without any library."""

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
    """One run. Stages are named in their order; sizes are bytes."""

    name: str
    model: str
    done: tuple[str, ...]
    next_stage: str | None
    """None: the run is complete."""
    held_by: str | None
    """The command that works in it now, with its pid."""
    step: int | None
    """Of the training that is under way."""
    loss: float | None
    seconds_left: float | None
    score: float | None
    """Of the default file, by the task's rule, 0 to 1."""
    heldout_loss: float | None
    published: str | None
    bytes: int


def read_status(run: Run) -> RunStatus:
    done = tuple(stage for stage in STAGES if run.done(stage))
    holder = read_holder(lock_file(run))
    last = _last_log_entry(run) if "data" in done and "finetune" not in done else {}
    scores = _scores_of_default(run) if "verify" in done else {}
    return RunStatus(
        name=run.name, model=run.model, done=done, next_stage=next((stage for stage in STAGES if stage not in done), None),
        held_by=str(holder) if holder else None, step=last.get("step"), loss=last.get("loss"),
        seconds_left=last.get("seconds_left") if holder else None, score=scores.get("score"), heldout_loss=scores.get("loss"),
        published=run.read("publish")["repo"] if "publish" in done else None, bytes=_size(run.folder),
    )  # fmt: skip


def _scores_of_default(run: Run) -> dict:
    verify = run.read("verify")
    return verify["scores"][verify["default"]]


def _last_log_entry(run: Run) -> dict:
    log = run.folder / "finetune" / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    return next((entry for entry in reversed(entries) if "loss" in entry), {})


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def list_runs(runs: Path) -> list[Run]:
    """All folders that are a run of Ferry's, in order of their names. Raises UserError where `runs` is no folder."""
    if runs.exists() and not runs.is_dir():
        raise UserError(f"RUNS={runs} is no folder", "name the folder that runs are in")
    return [Run(folder) for folder in sorted(runs.glob("*/")) if is_run_folder(folder)]


def format_runs(statuses: list[RunStatus]) -> str:
    """A line a run."""
    lines = [f"{'run':<26}{'stage':<16}{'score':>7}{'loss':>9}{'disk':>10}"]
    for status in statuses:
        stage = "complete" if status.next_stage is None else f"{len(status.done)}/{len(STAGES)} {status.next_stage}"
        score = "-" if status.score is None else f"{status.score:.0%}"
        loss = "-" if status.heldout_loss is None else f"{status.heldout_loss:.3f}"
        lines.append(f"{status.name:<26}{stage:<16}{score:>7}{loss:>9}{status.bytes / 1e9:>7.2f} GB")
        lines += [f"  in use by {status.held_by}"] if status.held_by else []
    return "\n".join(lines)


def format_status(status: RunStatus, run: Run) -> str:
    """A line a stage, and what works in the run now."""
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
    return json.dumps([asdict(one) for one in value] if isinstance(value, list) else asdict(value), indent=2)


def find_removable(run: Run) -> list[Path]:
    """What can be made again from the adapter, and what no later stage reads: 16-bit weights, unweighted GGUFs, checkpoints."""
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
    """A record names paths; one from elsewhere may name any."""
    return path.resolve().is_relative_to(folder.resolve()) and path.resolve() != folder.resolve()


def remove(run: Run, paths: list[Path]) -> int:
    """Remove these parts of the run, and note which of its outputs are gone on purpose; returns the bytes that came back."""
    size = sum(_size(path) if path.is_dir() else path.stat().st_size for path in paths)
    note = run.folder / CLEANED
    before = files.read_json(note)["paths"] if note.is_file() else []
    now = [str(path.relative_to(run.folder)) for path in paths]
    files.write_json(note, {"paths": sorted({*before, *now})})
    for path in paths:
        files.remove(path)
    return size


def require_run(folder: Path) -> Run:
    """Raises UserError for a folder that is no run of Ferry's."""
    if not is_run_folder(folder):
        raise UserError(f"{folder} is no run of Ferry's", "`ferry runs` lists them")
    return Run(folder)
