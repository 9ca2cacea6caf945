"""Compare a run with its config, its data and its own records, and decide what is refused and what runs again.

Making the rows and training take hours, so a change that affects them is refused: the next version of the model is
another run. The later stages take minutes, so a change that affects one of them makes it and all stages after it stale,
and only those run again.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common import files
from common.errors import UserError
from pipeline.config.schema import Config
from pipeline.config.stage_settings import settings_of_stage
from pipeline.run.records import DataRecord, Record
from pipeline.run.run_folder import RESTORED_FILE, STAGES, Run, next_version_name

ONE_TIME_STAGES = ("data", "finetune")  # stages that never run a second time in the same run
CLEANED_FILE = "cleaned.json"  # lists the outputs that `clean` removed; only a stage that runs again would need them


@dataclass
class Changes:
    """What has changed, as sentences: faults stop the run, stale stages run again."""

    faults: list[str] = field(default_factory=list)
    stale: dict[str, list[str]] = field(default_factory=dict)
    """{stage: reasons}, in the order of the stages."""

    def describe_reruns(self) -> list[str]:
        """Return which stages run again and why, as sentences for the user."""
        if not self.stale:
            return []
        reasons = next(iter(self.stale.values()))
        return [f"{', '.join(self.stale)} {'run' if len(self.stale) > 1 else 'runs'} again: {'; '.join(reasons)}"]

    def add_reasons(self, stage: str, reasons: list[str]) -> None:
        """Add the reasons why `stage` no longer holds: as faults where it never runs again, else as a stale stage."""
        if not reasons:
            return
        if stage in ONE_TIME_STAGES:
            self.faults += reasons
        else:
            self.stale[stage] = reasons


def find_changes(run: Run, config: Config) -> Changes:
    """Compare the run's records with `config`, with its input files and with each other.

    A run whose `data` stage was never completed has no record, so it fits any config. Outputs that `clean` removed
    count as missing only when a stale stage would need them.
    """
    cleaned_paths = read_cleaned_paths(run)
    changes = _compare_records(run, config, cleaned_paths)
    needs_cleaned_paths = set(changes.stale) - {"publish"} or (changes.stale and config.publish.merged)
    return _compare_records(run, config, []) if cleaned_paths and needs_cleaned_paths else changes


def read_cleaned_paths(run: Run) -> list[str]:
    """Return the outputs that `clean` removed, relative to the run's folder."""
    cleaned_file = run.folder / CLEANED_FILE
    return files.read_json(cleaned_file)["paths"] if cleaned_file.is_file() else []


def _compare_records(run: Run, config: Config, cleaned_paths: list[str]) -> Changes:
    """Compare all records. `cleaned_paths` are the outputs that may be missing."""
    changes = Changes()
    for stage in filter(run.is_done, STAGES):
        record = run.read_stage_record(stage)
        reasons = describe_differences(record.settings, settings_of_stage(config, stage))
        reasons += _find_input_changes(run, record) if isinstance(record, DataRecord) else []
        reasons += _find_source_changes(run, stage, record, changes)
        reasons += _find_missing_outputs(run, stage, record, cleaned_paths)
        changes.add_reasons(stage, reasons)
    if not run.is_done("finetune") and (run.folder / "finetune" / "choice.json").is_file():
        changes.faults += _find_training_changes(run, config)
    return changes


def _find_training_changes(run: Run, config: Config) -> list[str]:
    """Return the changed settings of a training that is not complete.

    Its checkpoints were made with the settings of the frozen config.
    """
    if not run.config_file.is_file():
        return []
    return describe_differences(settings_of_stage(run.read_config(), "finetune"), settings_of_stage(config, "finetune"))


def _find_input_changes(run: Run, record: DataRecord) -> list[str]:
    """Return the data files that are gone or whose content has changed since the rows were made."""
    faults = []
    # A restored run comes from another machine, which had the data files. Its rows were restored with it.
    is_restored = (run.folder / RESTORED_FILE).is_file()
    for name, digest in record.inputs.items():
        path = Path(name)
        if not path.is_file():
            faults += [] if is_restored else [f"{name}: the run was made from it, but it is missing"]
        elif files.sha256(path) != digest:
            faults.append(f"{name}: its content has changed")
    return faults


def _find_source_changes(run: Run, stage: str, record: Record, changes: Changes) -> list[str]:
    """Return which of the records that this one was made from have changed, or will change."""
    reasons = []
    for name, digest in record.sources.items():
        if name in changes.stale:
            reasons.append(f"{name} runs again")
        elif not run.is_done(name) or files.sha256(run.record_path(name)) != digest:
            remedy = _describe_remedy(run, stage)
            reasons.append(f"{run.record_path(stage)} was made from a different {name}.json{remedy}")
    return reasons


def _describe_remedy(run: Run, stage: str) -> str:
    """Return what makes the record of a stage again that does not run a second time by itself; else ''."""
    return f" (delete {run.record_path(stage)} to make it again)" if stage in ONE_TIME_STAGES else ""


def _find_missing_outputs(run: Run, stage: str, record: Record, cleaned_paths: list[str]) -> list[str]:
    """Return the outputs that are missing or have another size than the record says."""
    needed_outputs = [output for output in record.outputs.values() if output.path not in cleaned_paths]
    return [
        f"{run.folder / output.path}: missing, or its size differs from {stage}.json{_describe_remedy(run, stage)}"
        for output in needed_outputs
        if not _has_size(run.folder / output.path, output.bytes)
    ]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def describe_differences(old: dict, new: dict, old_label: str = "in the run", new_label: str = "now") -> list[str]:
    """Return a sentence for each setting that has another value."""
    return [
        f"{name}: {old.get(name)!r} {old_label}, {new.get(name)!r} {new_label}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def find_allowed_changes(run: Run, config: Config, is_own_config: bool) -> Changes:
    """Return what would run again with `config`.

    Args:
        is_own_config: `config` was read from the run's own config.yaml, so an edit there is intended.

    Raises:
        UserError: the rows or the training would change, or config.yaml was edited and CONFIG names another file.
    """
    if run.is_config_edited() and not is_own_config:
        raise UserError(
            f"{run.config_file} was edited, but CONFIG names a different file",
            f"put the change into CONFIG and delete {run.config_file}; or leave out CONFIG to use the edit: "
            f"RUN={run.name}",
            code="run.edited_config",
        )
    changes = find_changes(run, config)
    if changes.faults:
        raise UserError(
            f"the run {run.folder} cannot be resumed after these changes:\n  " + "\n  ".join(changes.faults),
            f"undo the change, or train the next version of the model: RUN={next_version_name(run.name)}",
            code="run.changed",
        )
    return changes


def apply_config(run: Run, config: Config, changes: Changes) -> None:
    """Continue the run with `config`: remove the records of stale stages and freeze the config."""
    for stage in reversed(changes.stale):
        files.remove(run.record_path(stage))
    if not run.config_file.is_file() or run.is_config_edited() or run.read_config() != config:
        run.freeze_config(config)
