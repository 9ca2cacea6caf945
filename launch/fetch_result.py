"""Fetch the result of a job: from the Hub, or over the connection to it, where each file is checked by its sha256."""

import json
from pathlib import Path

from common import console, files, hub
from common.errors import UserError
from contract import manifest
from launch.provider import Launcher, Lost
from launch.watch_job import Patience
from pipeline.publish.stage import claim_hub_folder, hub_folder
from pipeline.run.run_folder import Run

MOST = 64 << 20  # bytes of a record


def record(launcher: Launcher, name: str, run: str, stage: str) -> dict:
    """Return the record that a stage of the job's run wrote. Raises UserError when it is not JSON."""
    try:
        return json.loads(small(launcher, name, f"runs/{run}/{stage}.json"))
    except ValueError as error:
        raise UserError(
            f"{launcher.where}: runs/{run}/{stage}.json is no record: {error}", "delete it there, then the same command"
        ) from None


def small(launcher: Launcher, name: str, path: str) -> bytes:
    """Return a file of the job's folder. Raises UserError when it does not exist or is larger than 64 MiB."""
    content = bytearray()
    for block in launcher.rest(name, path):
        content += block
        if len(content) > MOST:
            raise UserError(f"{path} on {launcher.where} is larger than any record", f"see to {path} there")
    return bytes(content)


def home(launcher: Launcher, name: str, run: str, hubs: Path) -> str:
    """Return the repo on the Hub that the job published; download it first when it is a folder hub at the provider.

    The result is what `make deploy-mac REPO=` takes.
    """
    said = record(launcher, name, run, "publish")
    if not hub.is_folder(said["repo"]):
        return f"{said['repo']}@{said['tag']}"
    model = Run(Path(run)).model
    target = hub_folder(f"./{hubs / model}", model)
    claim_hub_folder(target, model)
    brought(launcher, name, said["repo"], target)
    return f"./{target}"


def brought(launcher: Launcher, name: str, there: str, target: Path) -> None:
    """Download a folder hub, its manifest last. Files that are complete here already are not downloaded again."""
    content = small(launcher, name, f"{there}/{manifest.NAME}")
    made = manifest.parse(content, f"{launcher.where}:{there}/{manifest.NAME}")
    if (target / manifest.NAME).is_file() and (target / manifest.NAME).read_bytes() != content:
        files.remove(target / manifest.NAME)  # an old manifest must not describe new files
    for item in (*made.artifacts, *made.files):
        fetch(launcher, name, f"{there}/{item.file}", target / item.file, item)
    with files.writing(target / manifest.NAME) as part:
        part.write_bytes(content)


def fetch(launcher: Launcher, name: str, there: str, target: Path, item: manifest.File) -> None:
    """Download one file; after a lost connection only what was in transit is sent again.

    Raises UserError when the file has another sha256 than the manifest says.
    """
    if target.is_file() and target.stat().st_size == item.bytes and files.sha256(target) == item.sha256:
        return
    part = target.with_name(f".{target.name}.{item.sha256[:12]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _filled(launcher, name, there, part, item)
        if files.sha256(part) != item.sha256:
            files.remove(part)
            raise UserError(
                f"{target.name} from {launcher.where} is not the file that was published", "run the same command again"
            )
        files.sync(part)
        part.replace(target)
    except OSError as error:
        raise files.translated(error, target) from error


def _filled(launcher: Launcher, name: str, there: str, part: Path, item: manifest.File) -> None:
    """Download the whole file into `part`, and retry after each lost connection. Progress resets the time limit."""
    waiting, have = Patience(), 0
    while True:
        try:
            return _append(launcher, name, there, part, item)
        except Lost as error:
            if part.is_file() and part.stat().st_size > have:
                waiting, have = Patience(), part.stat().st_size
            waiting.for_another_try(error)


def _append(launcher: Launcher, name: str, there: str, part: Path, item: manifest.File) -> None:
    """Download what `part` does not have yet, over one connection."""
    have = part.stat().st_size if part.is_file() else 0
    if have >= item.bytes:
        return
    with console.progress(item.bytes, item.file, "B") as tick, part.open("ab") as out:
        tick(have)
        for block in launcher.rest(name, there, have):
            out.write(block)
            tick(len(block))


def same_rows(local: dict, there: dict) -> list[str]:
    """Return how the training and held-out rows made there differ from those made here; empty when all bytes agree."""
    said = []
    for output in ("train", "heldout"):
        a, b = (record["outputs"][output]["sha256"] for record in (local, there))
        said += [f"{output}: {a[:12]} here, {b[:12]} there"] if a != b else []
    return said
