"""The folder of a run and its records, `runs/<run>/<stage>.json`. A stage writes its record last.

A record names the stage's outputs with size and sha256, the settings that the stage depends on, and the hashes of the
records that it was made from. Its existence means that the stage is complete; `pipeline/run/changes.py` decides whether
it is still valid.
"""

import re
import time
from pathlib import Path

from pydantic import ValidationError

from common import files
from common.errors import UserError, printable_line
from pipeline.config import yaml_tree
from pipeline.config.load import build_config, dump_config
from pipeline.config.schema import Config
from pipeline.config.stage_settings import settings_of_stage
from pipeline.run.records import RECORD_TYPES, OutputFile, Record, RecordType

# Marks a folder as a run of Ferry ("made_by") and holds the hash of config.yaml as Ferry wrote it ("config_sha256").
MARKER_FILE = "run.json"
# Present in a run that was restored from another machine (pipeline/checkpoint_sync/restore.py).
RESTORED_FILE = "restored.json"
# The version in a run's name: the run `tickets.v2` trains version 2 of the model `tickets`.
VERSION_SUFFIX = re.compile(r"\.v(\d+)$")
STAGES = ("data", "finetune", "evaluate", "export", "verify", "publish")


def next_version_name(run: str) -> str:
    """Return the name of the run that trains the next version of the model, such as `tickets.v2` after `tickets`."""
    version = VERSION_SUFFIX.search(run)
    return f"{VERSION_SUFFIX.sub('', run)}.v{int(version[1]) + 1 if version else 2}"


def is_run_folder(folder: Path) -> bool:
    """Return whether Ferry made the folder: it has the marker, or a record of an older Ferry or of another machine."""
    marker, data = (_read_json_object(folder / name) for name in (MARKER_FILE, "data.json"))
    has_marker = marker.get("made_by") == "ferry" or re.fullmatch(r"[0-9a-f]{64}", str(marker.get("config_sha256")))
    return bool(has_marker) or (data.get("stage") == "data" and isinstance(data.get("outputs"), dict))


def _read_json_object(path: Path) -> dict:
    """Return the JSON object in a file, or {} where it cannot be read."""
    try:
        return files.read_json(path)
    except UserError:
        return {}


def refuse_foreign_folder(folder: Path) -> None:
    """Raise UserError when the folder holds files that Ferry did not write, because stages replace what they find."""
    if not folder.exists() or is_run_folder(folder):
        return
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file, but a run needs a folder of that name",
            "choose a different RUN=name",
            code="run.folder_is_file",
        )
    foreign_names = sorted(path.name for path in folder.iterdir() if path.name != "config.yaml")
    if foreign_names:
        raise UserError(
            f"{folder} was not created by Ferry: it holds {', '.join(map(printable_line, foreign_names[:3]))}"
            f"{', ...' if len(foreign_names) > 3 else ''}",
            "choose a different RUN=name, or a different folder for all runs: RUNS=folder",
            code="run.foreign_folder",
        )


class Run:
    """The folder of one run with its frozen config, its records and its outputs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started_at = time.time()

    @property
    def name(self) -> str:
        """Return the name of the run, which is that of its folder."""
        return self.folder.name

    @property
    def model_name(self) -> str:
        """Return the name of the model that the run trains. File names, {run} in publish.repo and Ollama have it."""
        return VERSION_SUFFIX.sub("", self.name)

    @property
    def config_file(self) -> Path:
        """Return the path of the frozen config."""
        return self.folder / "config.yaml"

    def record_path(self, stage: str) -> Path:
        """Return the path of a stage's record."""
        return self.folder / f"{stage}.json"

    def is_done(self, stage: str) -> bool:
        """Return whether the stage is complete: it has a record."""
        return self.record_path(stage).is_file()

    def read_config(self) -> Config:
        """Return the config that `data` froze. Raise UserError when there is none or it cannot be read."""
        if not self.config_file.is_file():
            raise UserError(
                f"{self.folder} is not a run: it has no config.yaml",
                "start one: `make data CONFIG=configs/...`",
                code="run.no_config",
            )
        try:
            tree, lines = yaml_tree.parse_yaml(yaml_tree.read_config_text(self.config_file), str(self.config_file))
            return build_config(tree, lines, self.config_file)
        except OSError as error:
            raise UserError(
                f"{self.config_file} cannot be read: {str(error).splitlines()[0]}",
                "start a new run with RUN=another-name",
                code="run.unreadable_config",
            ) from error

    def freeze_config(self, config: Config) -> None:
        """Write the resolved config and the marker with its hash, before anything else is in the run's folder."""
        text = dump_config(config)
        if not is_run_folder(self.folder):
            self.claim_folder()
        with files.write_atomically(self.config_file) as part:
            part.write_text(text, encoding="utf-8")
        self._write_marker(config_sha256=files.sha256_bytes(text.encode()))

    def claim_folder(self) -> None:
        """Mark the folder as Ferry's before anything else is written into it.

        A config.yaml that the user put there is set aside. Raise UserError when the folder holds other files.
        """
        refuse_foreign_folder(self.folder)
        files.set_aside(self.config_file)
        self._write_marker()

    def _write_marker(self, **facts: str) -> None:
        files.write_json(self.folder / MARKER_FILE, {"made_by": "ferry", **facts})

    def is_config_edited(self) -> bool:
        """Return whether config.yaml differs from what Ferry wrote."""
        marker = self.folder / MARKER_FILE
        if not marker.is_file() or not self.config_file.is_file():
            return False
        written_hash = files.read_json(marker).get("config_sha256")
        return written_hash is not None and written_hash != files.sha256(self.config_file)

    def log_file(self, stage: str) -> Path:
        """Return the path of the log that gets what libraries print while the stage runs."""
        return self.folder / "logs" / f"{stage}.log"

    def read_record(self, record_type: type[RecordType]) -> RecordType:
        """Return the record of a stage, such as `run.read_record(DataRecord)`.

        Raise UserError when it is missing or damaged.
        """
        stage = record_type.model_fields["stage"].default
        path = self.record_path(stage)
        if not path.is_file():
            raise UserError(f"{path} is missing", f"run `make {stage}` first", code="run.no_record")
        try:
            record = record_type.model_validate(files.read_json(path))
        except ValidationError as error:
            raise UserError(
                f"{path} is not a record of {stage}",
                f"delete it, and the same command runs {stage} again",
                code="run.invalid_record",
            ) from error
        record._run_folder = self.folder
        return record

    def read_stage_record(self, stage: str) -> Record:
        """Return the record of the stage of that name. Raise UserError when it is missing or damaged."""
        return self.read_record(RECORD_TYPES[stage])

    def prepare_stage_folder(self, stage: str, source_stage: str, **settings) -> Path:
        """Return the stage's folder, which is emptied first when it belongs to another source record or other settings.

        An interrupted stage therefore continues with its own unfinished work, never with that of other data or of
        another adapter.

        Args:
            source_stage: the stage whose record the work is made from.
            settings: further values that the unfinished work depends on.
        """
        folder = self.folder / stage
        source_file = folder / "source.json"
        current_source = {source_stage: files.sha256(self.record_path(source_stage))} | settings
        if not source_file.is_file() or files.read_json(source_file) != current_source:
            files.remove(folder)
            files.write_json(source_file, current_source)
        return folder

    def write_record(
        self, record_type: type[RecordType], sources: tuple[str, ...], outputs: dict[str, Path], **facts
    ) -> RecordType:
        """Write the record of a stage and return it. A stage does this last.

        Args:
            record_type: the class of the record, such as DataRecord.
            sources: the stages whose records it was made from.
            outputs: its files by name, which must exist by now.
            facts: the other fields of the record.
        """
        stage = record_type.model_fields["stage"].default
        record = record_type(
            stage=stage,
            seconds=round(time.time() - self.started_at, 1),
            settings=settings_of_stage(self.read_config(), stage),
            sources={name: files.sha256(self.record_path(name)) for name in sources},
            outputs={name: self._describe_output(path) for name, path in outputs.items()},
            **facts,
        )
        record._run_folder = self.folder
        files.write_json(self.record_path(stage), record.model_dump(mode="json", exclude_unset=True))
        return record

    def _describe_output(self, path: Path) -> OutputFile:
        return OutputFile(path=str(path.relative_to(self.folder)), bytes=path.stat().st_size, sha256=files.sha256(path))
