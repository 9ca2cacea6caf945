"""Read the status of runs from their records, and find what can be removed. Needs no machine learning library."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from common import console, files
from common.errors import UserError
from common.lock import read_holder
from pipeline.run.changes import CLEANED_FILE, read_cleaned_paths
from pipeline.run.records import ExportRecord, PublishRecord, Scores, VerifyRecord
from pipeline.run.run_folder import STAGES, Run, is_run_folder
from pipeline.run.run_stages import lock_path


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
    done_stages = tuple(stage for stage in STAGES if run.is_done(stage))
    holder = read_holder(lock_path(run))
    last_entry = _last_log_entry(run) if "data" in done_stages and "finetune" not in done_stages else {}
    scores = _default_file_scores(run) if "verify" in done_stages else None
    return RunStatus(
        name=run.name,
        model=run.model_name,
        done=done_stages,
        next_stage=next((stage for stage in STAGES if stage not in done_stages), None),
        held_by=str(holder) if holder else None,
        step=last_entry.get("step"),
        loss=last_entry.get("loss"),
        seconds_left=last_entry.get("seconds_left") if holder else None,
        score=scores.score if scores else None,
        heldout_loss=scores.loss if scores else None,
        published=run.read_record(PublishRecord).repo if "publish" in done_stages else None,
        bytes=_folder_bytes(run.folder),
    )


def _default_file_scores(run: Run) -> Scores:
    verify = run.read_record(VerifyRecord)
    return verify.scores[verify.default]


def _last_log_entry(run: Run) -> dict:
    """Return the last entry of the training log that has a loss, or {}."""
    log = run.folder / "finetune" / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    return next((entry for entry in reversed(entries) if "loss" in entry), {})


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def list_runs(runs: Path) -> list[Run]:
    """Return the runs in a folder, in the order of their names. Raise UserError when `runs` is a file."""
    if runs.exists() and not runs.is_dir():
        raise UserError(
            f"RUNS={runs} is not a folder", "name the folder that holds the runs", code="run.runs_no_folder"
        )
    return [Run(folder) for folder in sorted(runs.glob("*/")) if is_run_folder(folder)]


def format_runs(statuses: list[RunStatus]) -> str:
    """Return a table with one line for each run."""
    heading = f"{'run':<26}{'stage':<16}{'score':>7}{'loss':>9}{'disk':>10}"
    return "\n".join([heading, *map(_format_run, statuses)])


def _format_run(status: RunStatus) -> str:
    """Return the line of one run, and a second one while a command works in it."""
    stage = "complete" if status.next_stage is None else f"{len(status.done)}/{len(STAGES)} {status.next_stage}"
    score = "-" if status.score is None else f"{status.score:.0%}"
    loss = "-" if status.heldout_loss is None else f"{status.heldout_loss:.3f}"
    line = f"{status.name:<26}{stage:<16}{score:>7}{loss:>9}{status.bytes / 1e9:>7.2f} GB"
    return f"{line}\n  in use by {status.held_by}" if status.held_by else line


def format_status(status: RunStatus, run: Run) -> str:
    """Return one line for each stage, and the command that works in the run now."""
    lines = [f"{run.folder}" + (f", in use by {status.held_by}" if status.held_by else "")]
    for number, stage in enumerate(STAGES, 1):
        lines.append(f"  [{number}/{len(STAGES)}] {stage:<10}{_describe_stage(status, run, stage)}")
    lines += [f"  score {status.score:.1%}"] if status.score is not None else []
    lines += [f"  published: {status.published}"] if status.published else []
    return "\n".join(lines)


def _describe_stage(status: RunStatus, run: Run, stage: str) -> str:
    """Return how long a completed stage took, how far the next one is, and `-` for a later one."""
    if stage in status.done:
        return f"done in {console.format_duration(run.read_stage_record(stage).seconds)}"
    return _describe_progress(status) if stage == status.next_stage else "-"


def _describe_progress(status: RunStatus) -> str:
    """Return how far the next stage is; a training in progress has a step, and a time left while it runs."""
    text = "running" if status.held_by else "next"
    text += f", step {status.step:,}, loss {status.loss:.4f}" if status.step else ""
    return text + (f", about {console.format_duration(status.seconds_left)} left" if status.seconds_left else "")


def status_to_json(value: RunStatus | list[RunStatus]) -> str:
    """Return one status, or a list of them, as JSON."""
    return json.dumps([asdict(status) for status in value] if isinstance(value, list) else asdict(value), indent=2)


def find_removable_paths(run: Run) -> list[Path]:
    """Return what `clean` can remove: paths that can be made again from the adapter or that no later stage reads.

    These are the 16-bit weights, the GGUFs made without an importance matrix, and the checkpoints.
    """
    paths: list[Path] = []
    if run.is_done("finetune"):
        paths.append(run.folder / "finetune" / "checkpoints")
    if run.is_done("publish"):
        default_name, export = run.read_record(VerifyRecord).default, run.read_record(ExportRecord)
        paths.append(run.folder / "export" / "merged")
        paths += [
            export.output_path(name)
            for name in export.outputs
            if name != default_name and (name == export.sixteen or name.endswith("-static"))
        ]
    return [path for path in paths if path.exists() and _is_inside(path, run.folder)]


def _is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path is inside the folder. A record from another machine may name any path."""
    return path.resolve().is_relative_to(folder.resolve()) and path.resolve() != folder.resolve()


def remove_paths(run: Run, paths: list[Path]) -> int:
    """Remove these paths of the run and return the bytes freed. Record the paths first, as removed on purpose."""
    freed_bytes = sum(_folder_bytes(path) if path.is_dir() else path.stat().st_size for path in paths)
    new_paths = [str(path.relative_to(run.folder)) for path in paths]
    files.write_json(run.folder / CLEANED_FILE, {"paths": sorted({*read_cleaned_paths(run), *new_paths})})
    for path in paths:
        files.remove(path)
    return freed_bytes


def load_run(folder: Path) -> Run:
    """Return the run in a folder. Raise UserError when Ferry did not make the folder."""
    if not is_run_folder(folder):
        raise UserError(f"{folder} was not created by Ferry", "`ferry runs` lists the runs", code="run.foreign_folder")
    return Run(folder)
