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
from pipeline.run.run_folder import RESTORED, STAGES, Run, next_version

KEPT = ("data", "finetune")  # stages that never run a second time in the same run
CLEANED = "cleaned.json"  # lists the outputs that `clean` removed; only a stage that runs again would need them


@dataclass
class Changes:
    """What has changed, as sentences: faults stop the run, stale stages run again."""

    faults: list[str] = field(default_factory=list)
    stale: dict[str, list[str]] = field(default_factory=dict)
    """{stage: reasons}, in the order of the stages."""

    def describe(self) -> list[str]:
        """Return which stages run again and why, as sentences for the user."""
        if not self.stale:
            return []
        reasons = next(iter(self.stale.values()))
        return [f"{', '.join(self.stale)} {'run' if len(self.stale) > 1 else 'runs'} again: {'; '.join(reasons)}"]

    def add(self, stage: str, reasons: list[str]) -> None:
        """Add the reasons why `stage` no longer holds: as faults where it never runs again, else as a stale stage."""
        if not reasons:
            return
        if stage in KEPT:
            self.faults += reasons
        else:
            self.stale[stage] = reasons


def find_changes(run: Run, config: Config) -> Changes:
    """Compare the run's records with `config`, with its input files and with each other.

    A run whose `data` stage was never completed has no record, so it fits any config.

    Outputs that `clean` removed count as missing only when a stale stage would need them.
    """
    note = run.folder / CLEANED
    cleaned = files.read_json(note)["paths"] if note.is_file() else []
    changes = _find_changes(run, config, cleaned)
    needs_them = set(changes.stale) - {"publish"} or (changes.stale and config.publish.merged)
    return _find_changes(run, config, []) if cleaned and needs_them else changes


def _find_changes(run: Run, config: Config, cleaned: list[str]) -> Changes:
    """Compare all records. `cleaned_paths` are the outputs that may be missing."""
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
    """Return the changed settings of a training that is not complete.

    Its checkpoints were made with the settings of the frozen config.
    """
    if not run.config_file.is_file():
        return []
    return describe_differences(settings_of_stage(run.config(), "finetune"), settings_of_stage(config, "finetune"))


def _changed_inputs(run: Run, record: dict) -> list[str]:
    """Return the data files that are gone or whose content has changed since the rows were made."""
    faults = []
    # A restored run comes from another machine, which had the data files. Its rows were restored with it.
    is_restored = (run.folder / RESTORED).is_file()
    for name, digest in record["inputs"].items():
        path = Path(name)
        if not path.is_file():
            faults += [] if is_restored else [f"{name}: the run was made from it and it is gone"]
        elif files.sha256(path) != digest:
            faults.append(f"{name}: its content has changed")
    return faults


def _changed_sources(run: Run, stage: str, record: dict, changes: Changes) -> list[str]:
    """Return which of the records that this one was made from have changed, or will change."""
    reasons = []
    for name, digest in record["sources"].items():
        if name in changes.stale:
            reasons.append(f"{name} runs again")
        elif not run.done(name) or files.sha256(run.path(name)) != digest:
            again = f" (delete {run.path(stage)} to make it again)" if stage in KEPT else ""
            reasons.append(f"{run.path(stage)} was made from another {name}.json{again}")
    return reasons


def _lost_outputs(run: Run, stage: str, record: dict, cleaned: list[str]) -> list[str]:
    """Return the outputs that are missing or have another size than the record says."""
    reasons = []
    for output in record["outputs"].values():
        path = run.folder / output["path"]
        whole = path.is_file() and path.stat().st_size == output["bytes"]
        if not whole and output["path"] not in cleaned:
            again = f" (delete {run.path(stage)} to make it again)" if stage in KEPT else ""
            reasons.append(f"{path}: gone or of another size than {stage}.json says{again}")
    return reasons


def describe_differences(before: dict, now: dict, there: str = "in the run", here: str = "now") -> list[str]:
    """Return a sentence for each setting that has another value."""
    return [
        f"{name}: {before.get(name)!r} {there}, {now.get(name)!r} {here}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
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
            f"{run.config_file} was edited, and CONFIG names another file",
            f"put the change into CONFIG and delete {run.config_file}; or leave out CONFIG to take the edit: "
            f"RUN={run.name}",
        )
    changes = find_changes(run, config)
    if changes.faults:
        raise UserError(
            f"the run {run.folder} does not fit any more:\n  " + "\n  ".join(changes.faults),
            f"undo the change, or train the next version of the model: RUN={next_version(run.name)}",
        )
    return changes


def accept_config(run: Run, config: Config, changes: Changes) -> None:
    """Continue the run with `config`: remove the records of stale stages and freeze the config."""
    for stage in reversed(changes.stale):
        files.remove(run.path(stage))
    if not run.config_file.is_file() or run.is_config_edited() or run.config() != config:
        run.freeze(config)
