"""Record files: `runs/<run>/<stage>.json`, each written as a stage's last act.

A record names its outputs with size and sha256, and hashes the records it was made from; so Make only
asks whether a record exists, and `check` asks whether it still holds.
"""

import time
from pathlib import Path

import yaml

from contract import files
from contract.errors import UserError
from pipeline.config import Config, build, dump

RESTORED = "restored.json"  # of a run that came from another machine (pipeline/offsite/restore.py)
STAGES = ("data", "finetune", "evaluate", "export", "verify", "publish")


class Run:
    """The folder of one run: its frozen config, its records, its outputs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = time.time()

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    def path(self, stage: str) -> Path:
        return self.folder / f"{stage}.json"

    def done(self, stage: str) -> bool:
        return self.path(stage).is_file()

    def config(self) -> Config:
        """The config that `data` froze. Raises UserError when there is none."""
        if not self.config_file.is_file():
            raise UserError(
                f"{self.folder} is no run: it holds no config.yaml", "start one: `make data CONFIG=configs/...`"
            )
        try:
            return build(yaml.safe_load(self.config_file.read_text(encoding="utf-8")), {}, self.config_file)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{self.config_file} cannot be read any more: {str(error).splitlines()[0]}",
                "start a new run with RUN=another-name",
            ) from error

    def freeze(self, config: Config) -> None:
        """Write the resolved config, the first thing in a run folder."""
        with files.writing(self.config_file) as part:
            part.write_text(dump(config), encoding="utf-8")

    def read(self, stage: str) -> dict:
        if not self.done(stage):
            raise UserError(f"{self.path(stage)} is missing", f"run `make {stage}` first")
        return files.read_json(self.path(stage))

    def workspace(self, stage: str, source: str) -> Path:
        """The stage's folder, emptied when what is in it was begun from another `source` record.

        So an interrupted stage goes on with its own half-done work, never with that of other data or another adapter.
        """
        folder = self.folder / stage
        begun, now = folder / "source.json", {source: files.sha256(self.path(source))}
        if not begun.is_file() or files.read_json(begun) != now:
            files.remove(folder)
            files.write_json(begun, now)
        return folder

    def write(self, stage: str, sources: tuple[str, ...], outputs: dict[str, Path], **facts) -> dict:
        """The stage's last act. sources: stages it was made from; outputs: its files, which must exist by now."""
        value = {
            "stage": stage,
            "seconds": round(time.time() - self.started, 1),
            "sources": {name: files.sha256(self.path(name)) for name in sources},
            "outputs": {name: self._described(path) for name, path in outputs.items()},
            **facts,
        }
        files.write_json(self.path(stage), value)
        return value

    def _described(self, path: Path) -> dict:
        return {"path": str(path.relative_to(self.folder)), "bytes": path.stat().st_size, "sha256": files.sha256(path)}

    def output(self, stage: str, name: str) -> Path:
        """The path of one output of a finished stage."""
        return self.folder / self.read(stage)["outputs"][name]["path"]


def check(run: Run, config: Config) -> list[str]:
    """What no longer holds, as sentences; empty when the run can go on with this config.

    A run whose `data` never came to its end belongs to no config yet.
    """
    return [*(_changed(run, config) if run.done("data") else []), *_stale(run)]


def _changed(run: Run, config: Config) -> list[str]:
    frozen, now = run.config().model_dump(mode="json"), config.model_dump(mode="json")
    faults = [f"{key}: {old!r} in the run, {new!r} now" for key, old, new in differences(frozen, now)]
    came = (run.folder / RESTORED).is_file()  # from another machine, which had the files; the rows came along
    for name, wanted in run.read("data")["inputs"].items():
        path = Path(name)
        if not path.is_file() and came:
            continue
        if not path.is_file():
            faults.append(f"{name}: the run was made from it and it is gone")
        elif files.sha256(path) != wanted:
            faults.append(f"{name}: its content has changed")
    return faults


def differences(old: dict, new: dict, place: str = ""):
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{place}{key}.")
        elif a != b:
            yield f"{place}{key}", a, b


def _stale(run: Run) -> list[str]:
    faults = []
    for stage in filter(run.done, STAGES):
        record = run.read(stage)
        faults += [f"{run.path(stage)} was made from another {name}.json (delete it to make it again)"
                   for name, digest in record["sources"].items() if not run.done(name) or files.sha256(run.path(name)) != digest]  # fmt: skip
        for output in record["outputs"].values():
            path = run.folder / output["path"]
            if not path.is_file() or path.stat().st_size != output["bytes"]:
                faults.append(
                    f"{path}: gone or of another size than {stage}.json says (delete {run.path(stage)} to make it again)"
                )
    return faults
