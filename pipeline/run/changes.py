"""Does a run still fit its config, its data and its own records? What does not is refused, or made again.

Rows and training cost hours: a change of theirs is refused, and the next version of the model is another run. The stages
after them cost minutes: a change of theirs makes them and all that follow stale, and only those run again.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common import files
from common.errors import UserError
from pipeline.config.schema import Config
from pipeline.config.stage_settings import settings_of_stage
from pipeline.run.run_folder import RESTORED, STAGES, Run, next_version

KEPT = ("data", "finetune")  # stages that are never made again in the same run
CLEANED = "cleaned.json"  # outputs that `clean` removed, and that only an earlier stage would need


@dataclass
class Changes:
    """What no longer holds, as sentences: faults stop the run, stale stages run again."""

    faults: list[str] = field(default_factory=list)
    stale: dict[str, list[str]] = field(default_factory=dict)
    """{stage: why}, in the stages' order."""

    def describe(self) -> list[str]:
        """Which stages run again and why, as sentences for the user."""
        if not self.stale:
            return []
        reasons = next(iter(self.stale.values()))
        return [f"{', '.join(self.stale)} {'run' if len(self.stale) > 1 else 'runs'} again: {'; '.join(reasons)}"]

    def add(self, stage: str, reasons: list[str]) -> None:
        if not reasons:
            return
        if stage in KEPT:
            self.faults += reasons
        else:
            self.stale[stage] = reasons


def find_changes(run: Run, config: Config) -> Changes:
    """Compare the run's records with `config`, with its input files and with each other.

    A run whose `data` never came to its end belongs to no config yet.
    """
    note = run.folder / CLEANED
    cleaned = files.read_json(note)["paths"] if note.is_file() else []
    changes = _find_changes(run, config, cleaned)
    needs_them = set(changes.stale) - {"publish"} or (changes.stale and config.publish.merged)
    return _find_changes(run, config, []) if cleaned and needs_them else changes


def _find_changes(run: Run, config: Config, cleaned: list[str]) -> Changes:
    """cleaned: outputs that may be gone."""
    changes = Changes()
    for stage in filter(run.done, STAGES):
        record = run.read(stage)
        reasons = describe_differences(record["settings"], settings_of_stage(config, stage))
        reasons += _changed_inputs(run, record) if stage == "data" else []
        reasons += _changed_sources(run, stage, record, changes)
        reasons += _lost_outputs(run, stage, record, cleaned)
        changes.add(stage, reasons)
    if not run.done("finetune") and (run.folder / "finetune" / "choice.json").is_file():
        changes.faults += _changed_training(run, config)
    return changes


def _changed_training(run: Run, config: Config) -> list[str]:
    """Settings of a training that was begun and not ended: its checkpoints were made with the frozen ones."""
    if not run.config_file.is_file():
        return []
    return describe_differences(settings_of_stage(run.config(), "finetune"), settings_of_stage(config, "finetune"))


def _changed_inputs(run: Run, record: dict) -> list[str]:
    faults = []
    is_restored = (run.folder / RESTORED).is_file()  # from another machine, which had the files; the rows came along
    for name, digest in record["inputs"].items():
        path = Path(name)
        if not path.is_file():
            faults += [] if is_restored else [f"{name}: the run was made from it and it is gone"]
        elif files.sha256(path) != digest:
            faults.append(f"{name}: its content has changed")
    return faults


def _changed_sources(run: Run, stage: str, record: dict, changes: Changes) -> list[str]:
    """Records that this one was made from and that are others now, or will be."""
    reasons = []
    for name, digest in record["sources"].items():
        if name in changes.stale:
            reasons.append(f"{name} runs again")
        elif not run.done(name) or files.sha256(run.path(name)) != digest:
            again = f" (delete {run.path(stage)} to make it again)" if stage in KEPT else ""
            reasons.append(f"{run.path(stage)} was made from another {name}.json{again}")
    return reasons


def _lost_outputs(run: Run, stage: str, record: dict, cleaned: list[str]) -> list[str]:
    """Outputs that are gone or have another size."""
    reasons = []
    for output in record["outputs"].values():
        path = run.folder / output["path"]
        whole = path.is_file() and path.stat().st_size == output["bytes"]
        if not whole and output["path"] not in cleaned:
            again = f" (delete {run.path(stage)} to make it again)" if stage in KEPT else ""
            reasons.append(f"{path}: gone or of another size than {stage}.json says{again}")
    return reasons


def describe_differences(before: dict, now: dict, there: str = "in the run", here: str = "now") -> list[str]:
    """A sentence for each setting that has another value."""
    return [
        f"{name}: {before.get(name)!r} {there}, {now.get(name)!r} {here}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def find_allowed_changes(run: Run, config: Config, is_own_config: bool) -> Changes:
    """What would run again with `config`. Raises UserError when the rows or the training would be others.

    is_own_config: `config` was read from the run's own config.yaml, so an edit there is meant.
    """
    if run.is_config_edited() and not is_own_config:
        raise UserError(
            f"{run.config_file} was edited, and CONFIG names another file",
            f"put the change into CONFIG and delete {run.config_file}; or leave out CONFIG to take the edit: RUN={run.name}",
        )
    changes = find_changes(run, config)
    if changes.faults:
        raise UserError(
            f"the run {run.folder} does not fit any more:\n  " + "\n  ".join(changes.faults),
            f"undo the change, or train the next version of the model: RUN={next_version(run.name)}",
        )
    return changes


def accept_config(run: Run, config: Config, changes: Changes) -> None:
    """Let the run go on with `config`: remove the records of stale stages and freeze the config."""
    for stage in reversed(changes.stale):
        files.remove(run.path(stage))
    if not run.config_file.is_file() or run.is_config_edited() or run.config() != config:
        run.freeze(config)
