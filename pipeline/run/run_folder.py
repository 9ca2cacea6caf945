"""The folder of a run and its records, `runs/<run>/<stage>.json`. A stage writes its record last.

A record names the stage's outputs with size and sha256, the settings that the stage depends on, and the hashes of the
records that it was made from. Its existence means that the stage is complete; `pipeline/run/changes.py` decides whether
it is still valid.
"""

import re
import time
from pathlib import Path

from common import files
from common.errors import UserError, shown
from pipeline.config import yaml_tree
from pipeline.config.load import build_config, dump_config
from pipeline.config.schema import Config
from pipeline.config.stage_settings import settings_of_stage

# Marks a folder as a run of Ferry ("made_by") and holds the hash of config.yaml as Ferry wrote it ("config_sha256").
MARKER = "run.json"
# Present in a run that was restored from another machine (pipeline/checkpoint_sync/restore.py).
RESTORED = "restored.json"
# The version in a run's name: the run `tickets.v2` trains version 2 of the model `tickets`.
VERSION = re.compile(r"\.v(\d+)$")
STAGES = ("data", "finetune", "evaluate", "export", "verify", "publish")


def next_version(run: str) -> str:
    """Return the name of the run that trains the next version of the model, such as `tickets.v2` after `tickets`."""
    version = VERSION.search(run)
    return f"{VERSION.sub('', run)}.v{int(version[1]) + 1 if version else 2}"


def is_run_folder(folder: Path) -> bool:
    """Return whether Ferry made the folder: it has the marker, or a record of an older Ferry or of another machine."""
    marker, data = (_read_record(folder / name) for name in (MARKER, "data.json"))
    has_marker = marker.get("made_by") == "ferry" or re.fullmatch(r"[0-9a-f]{64}", str(marker.get("config_sha256")))
    return bool(has_marker) or (data.get("stage") == "data" and isinstance(data.get("outputs"), dict))


def _read_record(path: Path) -> dict:
    """Return the JSON object in a file, or {} where it cannot be read."""
    try:
        return files.read_json(path)
    except UserError:
        return {}


def is_sound_record(record: dict, stage: str) -> bool:
    """Return whether a record holds the keys that every stage writes, with values of the right type."""
    kinds = {"seconds": (int, float), "settings": dict, "sources": dict, "outputs": dict}
    if record.get("stage") != stage or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        return False
    files_of_stage = [item for item in record["outputs"].values() if isinstance(item, dict)]
    return len(files_of_stage) == len(record["outputs"]) and all(
        isinstance(item.get("path"), str) and isinstance(item.get("bytes"), int) and isinstance(item.get("sha256"), str)
        for item in files_of_stage
    )


def refuse_foreign_folder(folder: Path) -> None:
    """Raise UserError when the folder holds files that Ferry did not write, because stages replace what they find."""
    if not folder.exists() or is_run_folder(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, and a run needs a folder of that name", "choose another RUN=name")
    found = sorted(path.name for path in folder.iterdir() if path.name != "config.yaml")
    if found:
        raise UserError(
            f"{folder} is no run of Ferry's: it holds {', '.join(map(shown, found[:3]))}"
            f"{', ...' if len(found) > 3 else ''}",
            "choose another RUN=name, or another folder for all runs: RUNS=folder",
        )


class Run:
    """The folder of one run with its frozen config, its records and its outputs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = time.time()

    @property
    def name(self) -> str:
        """Return the name of the run, which is that of its folder."""
        return self.folder.name

    @property
    def model(self) -> str:
        """Return the name of the model that the run trains. File names, {run} in publish.repo and Ollama have it."""
        return VERSION.sub("", self.name)

    @property
    def config_file(self) -> Path:
        """Return the path of the frozen config."""
        return self.folder / "config.yaml"

    def path(self, stage: str) -> Path:
        """Return the path of a stage's record."""
        return self.folder / f"{stage}.json"

    def done(self, stage: str) -> bool:
        """Return whether the stage is complete: it has a record."""
        return self.path(stage).is_file()

    def config(self) -> Config:
        """Return the config that `data` froze. Raise UserError when there is none or it cannot be read."""
        if not self.config_file.is_file():
            raise UserError(
                f"{self.folder} is no run: it holds no config.yaml", "start one: `make data CONFIG=configs/...`"
            )
        try:
            tree, lines = yaml_tree.parse(yaml_tree.read_text(self.config_file), str(self.config_file))
            return build_config(tree, lines, self.config_file)
        except OSError as error:
            raise UserError(
                f"{self.config_file} cannot be read any more: {str(error).splitlines()[0]}",
                "start a new run with RUN=another-name",
            ) from error

    def freeze(self, config: Config) -> None:
        """Write the resolved config and the marker with its hash, before anything else is in the run's folder."""
        text = dump_config(config)
        if not is_run_folder(self.folder):
            self.claim()
        with files.writing(self.config_file) as part:
            part.write_text(text, encoding="utf-8")
        files.write_json(self.folder / MARKER, {"made_by": "ferry", "config_sha256": files.sha256_bytes(text.encode())})

    def claim(self) -> None:
        """Mark the folder as Ferry's before anything else is written into it.

        A config.yaml that the user put there is set aside. Raise UserError when the folder holds other files.
        """
        refuse_foreign_folder(self.folder)
        files.set_aside(self.config_file)
        files.write_json(self.folder / MARKER, {"made_by": "ferry"})

    def is_config_edited(self) -> bool:
        """Return whether config.yaml differs from what Ferry wrote."""
        marker = self.folder / MARKER
        if not marker.is_file() or not self.config_file.is_file():
            return False
        written = files.read_json(marker).get("config_sha256")
        return written is not None and written != files.sha256(self.config_file)

    def log_file(self, stage: str) -> Path:
        """Return the path of the log that gets what libraries print while the stage runs."""
        return self.folder / "logs" / f"{stage}.log"

    def read(self, stage: str) -> dict:
        """Return the record of a stage. Raise UserError when it is missing or damaged."""
        if not self.done(stage):
            raise UserError(f"{self.path(stage)} is missing", f"run `make {stage}` first")
        record = files.read_json(self.path(stage))
        if not is_sound_record(record, stage):
            raise UserError(
                f"{self.path(stage)} is no record of {stage}", f"delete it, and the same command runs {stage} again"
            )
        return record

    def workspace(self, stage: str, source: str, **settings) -> Path:
        """Return the stage's folder, which is emptied first when it belongs to another source record or other settings.

        An interrupted stage therefore continues with its own unfinished work, never with that of other data or of
        another adapter.

        Args:
            source_stage: the stage whose record the work is made from.
            settings: further values that the unfinished work depends on.
        """
        folder = self.folder / stage
        begun, now = folder / "source.json", {source: files.sha256(self.path(source))} | settings
        if not begun.is_file() or files.read_json(begun) != now:
            files.remove(folder)
            files.write_json(begun, now)
        return folder

    def write(self, stage: str, sources: tuple[str, ...], outputs: dict[str, Path], **facts) -> dict:
        """Write the record of a stage and return it. A stage does this last.

        Args:
            sources: the stages whose records it was made from.
            outputs: its files by name, which must exist by now.
            facts: further values of the record.
        """
        value = {
            "stage": stage,
            "seconds": round(time.time() - self.started, 1),
            "settings": settings_of_stage(self.config(), stage),
            "sources": {name: files.sha256(self.path(name)) for name in sources},
            "outputs": {name: self._described(path) for name, path in outputs.items()},
            **facts,
        }
        files.write_json(self.path(stage), value)
        return value

    def _described(self, path: Path) -> dict:
        """Return an output's path in the run's folder, its size in bytes and its sha256."""
        return {"path": str(path.relative_to(self.folder)), "bytes": path.stat().st_size, "sha256": files.sha256(path)}

    def output(self, stage: str, name: str) -> Path:
        """Return the path of one output of a completed stage."""
        return self.folder / self.read(stage)["outputs"][name]["path"]
