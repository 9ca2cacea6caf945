"""reproduce: train a published model again from its manifest.json alone, and compare the two.

The code is that of the manifest's commit, the environment that of its lock files, base model and data set those of
their revisions; local data is found by its sha256. The rows are made first: when they differ, nothing is trained.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from common import files, hub
from common.console import format_duration as duration
from common.errors import UserError, shown
from contract import manifest, published_model
from contract.manifest import Manifest
from launch import cloud_to_local, fetch_result, published_sources, source_archive, upload_files, verdict
from launch.cloud_to_local import Wish
from launch.costs import Session, ask
from launch.provider import Job, Launcher, Machine
from pipeline.config import references
from pipeline.plan import gpu_table

COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Published:
    """A published model to make again, and the folder for the log and the verdict."""

    repo: str
    made: Manifest
    folder: Path

    @property
    def name(self) -> str:
        """Return the name of the job."""
        return self.folder.name


def published(repo: str, runs: Path) -> Published:
    """Read the manifest of a published model. Raises UserError when there is no such repo or no valid manifest."""
    content = published_model.find(repo).manifest()
    made = manifest.parse(content, f"{shown(repo)}/{manifest.NAME}")
    return Published(repo, made, runs / "reproduce" / f"{made.name}-{files.sha256_bytes(content)[:12]}")


def stage(this: Published, launcher: Launcher, again: str, data: Path | None, wish: Wish) -> list[verdict.Row]:
    """Train a published model again and return the rows of the comparison.

    Args:
        reproduction: The published model.
        provider: Where it is trained.
        stop_command: The command that ends a running job, as the end of a sentence.
        data: Where to look for its local data, a file or a folder.
        options: What else the user typed.

    Raises:
        UserError: Code, data or machine cannot be had, or the rows differ from the published ones.
    """
    wish = as_before(this.made, wish)
    job = prepared(this, data, wish)
    session, log = Session(launcher, this.name, again, wish.teardown), this.folder / "log"
    with session.billed():
        state = cloud_to_local.found(session, job)
        if session.running:
            state = cloud_to_local.watched(session, job, log)
        if (state.goal, state.code) != ("train", 0):
            agree(this, launcher, cloud_to_local.launched_on(launcher, wish), wish)
            trained(session, job, this, wish, log)
        rows = verdict.rows(this.made, remade(launcher, job))
    report = session.ended()
    hub.say(report)
    return rows


def as_before(made: Manifest, wish: Wish) -> Wish:
    """Return the options with DEVICE=cpu when the model was trained on a CPU and the user typed no DEVICE."""
    typed = any(word.startswith("DEVICE=") for word in wish.settings)
    on_cpu = str(made.training.get("device", "")).startswith("CPU")
    return replace(wish, settings=(*wish.settings, "DEVICE=cpu")) if on_cpu and not typed else wish


def trained(session: Session, job: Job, this: Published, wish: Wish, log: Path) -> None:
    """Make the rows and compare them, then run all the other stages. Raises UserError when the rows differ."""
    cloud_to_local.begin(session, job, "data", wish)
    cloud_to_local.watched(session, job, log)
    same_rows(this, session.launcher, job)
    cloud_to_local.begin(session, job, "train", wish)
    cloud_to_local.watched(session, job, log)


def prepared(this: Published, data: Path | None, wish: Wish) -> Job:
    """Return the job with code, config and files. Raises UserError when one of them cannot be had."""
    made, commit = this.made, code_of(this.made)
    found = published_sources.located(made, pinned(made), commit, data)
    settings, _ = published_sources.moved(pinned(made))
    hub.say(f"{this.repo}: {made.name}, by the code of {commit[:12]}, trained on {made.training.get('device')}")
    return Job(
        this.name,
        made.name,
        source_archive.ROOT,
        commit,
        made.provenance["git"].get("url"),
        upload_files.dump(settings),
        upload_files.untold(source_archive.ROOT, commit, found),
        wish.settings,
    )


def code_of(made: Manifest) -> str:
    """Return the commit that trained the model, after fetching it from origin when this checkout does not have it.

    Raises UserError when origin does not have it either.
    """
    git = made.provenance.get("git") or {}
    commit = str(git.get("commit") or "")
    if not COMMIT.fullmatch(commit):
        raise UserError(
            f"the manifest of {made.name} names no commit: its code is not known",
            "nothing can be made again without it",
        )
    if git.get("dirty"):
        hub.say(
            f"note: {made.name} cannot be reproduced exactly: its checkout had changes that {commit[:12]} does not have"
        )
    if not source_archive.has(source_archive.ROOT, commit):
        try:
            source_archive.git(source_archive.ROOT, "fetch", "--quiet", "origin", commit)
        except UserError as error:
            # Never fetched from the address in the manifest: whoever wrote that would choose which code runs here.
            raise UserError(
                f"this checkout does not have the commit {commit[:12]}, "
                f"and its origin does not give it ({error.message})",
                f"if you trust {shown(str(git.get('url')))}: "
                f"`git fetch {shown(str(git.get('url')))} {commit}`, then the same command",
            ) from error
    return commit


def pinned(made: Manifest) -> dict:
    """Return the model's config with every revision as it was resolved, and with a folder to publish to."""
    settings = {section: dict(values) for section, values in made.config.items()}
    if references.is_hub_model(made.base.model):
        settings.setdefault("base", {})["revision"] = made.base.revision
    if not made.dataset.sha256:
        settings.setdefault("data", {})["revision"] = made.dataset.revision
    settings["publish"] = settings.get("publish", {}) | {"repo": "./hub/{run}", "tag": None}
    return settings


def agree(this: Published, launcher: Launcher, machine: Machine, wish: Wish) -> None:
    """Ask the user to confirm hours and price; once for the same machine, and never on this one."""
    note = this.folder / "agreed.json"
    mine = {"where": launcher.where, "cards": list(machine.cards)}
    if launcher.ours:
        return
    before = note.is_file() and files.read_json(note) == mine
    hours, dollars = estimate(this.made, machine)
    cost = f"about {duration(3600 * hours)} of training" if hours else "hours not known"
    price = f" and ${dollars:.2f}" if dollars is not None else ", price not known"
    what = f"{this.repo} again on {launcher.where}: {cost}{price}, set-up and downloads not counted"
    ask(what, dollars, wish.limit, wish.yes or before)
    files.write_json(note, mine)


def estimate(made: Manifest, machine: Machine) -> tuple[float | None, float | None]:
    """Return (hours, dollars) of a training, from the time that it took before and the speed of the two GPUs.

    Both are None when only one of the two GPUs is in configs/gpus.csv, or when that time is not known; dollars are None
    when neither GPU is there.
    """
    seconds = made.training.get("seconds")
    before = gpu_table.find(str(made.training.get("device", "")))
    card = gpu_table.find(machine.cards[0]) if machine.cards else None
    if not isinstance(seconds, int | float) or (card is None) != (before is None):
        return None, None
    hours = seconds / 3600 * (before.tflops / card.tflops if card and before else 1)
    return hours, hours * card.dollars_per_hour if card else None


def same_rows(this: Published, launcher: Launcher, job: Job) -> None:
    """Raise UserError when the rows made there, or the base model, differ from the published ones."""
    there = fetch_result.record(launcher, job.name, job.run, "data")
    wanted = this.made.dataset
    pairs = (("held-out rows", wanted.split_hash, "heldout"), ("training rows", wanted.train_sha256, "train"))
    said = [
        f"{what}: {before[:12]} published, {there['outputs'][name]['sha256'][:12]} now"
        for what, before, name in pairs
        if before and before != there["outputs"][name]["sha256"]
    ]
    said += [
        f"rows {kind}: {wanted.rows.get(kind)} published, {count} now"
        for kind, count in there["rows"].items()
        if wanted.rows.get(kind) != count
    ]
    base = there["base"]["revision"]
    said += [f"base model: {this.made.base.revision} published, {base} now"] if base != this.made.base.revision else []
    if said:
        raise UserError(
            f"{this.made.name}: the same code and sources give other rows, nothing was trained:\n  "
            + "\n  ".join(said),
            f"see runs/{job.run}/data/rejected.jsonl in {launcher.where}'s {job.name}, "
            "and whether the data set's revision still is what it was",
        )


def remade(launcher: Launcher, job: Job) -> Manifest:
    """Return the manifest of the model that the job made."""
    there = fetch_result.record(launcher, job.name, job.run, "publish")["repo"]
    return manifest.parse(
        fetch_result.small(launcher, job.name, f"{there}/{manifest.NAME}"), f"{launcher.where}:{there}/{manifest.NAME}"
    )
