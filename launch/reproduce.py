"""reproduce: a published model made again from its manifest.json alone, and a table that says whether it is the same.

The code is the commit's own, the environment that of its locks, base and data set those of its revisions; local data is
found by sha256. Rows come first: where they are others, nothing is trained.
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
    """A model, and where the log and the verdict of making it again go."""

    repo: str
    made: Manifest
    folder: Path

    @property
    def name(self) -> str:
        """Of the job."""
        return self.folder.name


def published(repo: str, runs: Path) -> Published:
    """Raises UserError when there is no such repo, or it cannot be made again."""
    content = published_model.find(repo).manifest()
    made = manifest.parse(content, f"{shown(repo)}/{manifest.NAME}")
    return Published(repo, made, runs / "reproduce" / f"{made.name}-{files.sha256_bytes(content)[:12]}")


def stage(this: Published, launcher: Launcher, again: str, data: Path | None, wish: Wish) -> list[verdict.Row]:
    """Make it again and compare. again: the command that ends a running job.

    Raises UserError where code, data or machine are not to be had, and where the rows are others than those published.
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
    hub.say(session.ended())
    return rows


def as_before(made: Manifest, wish: Wish) -> Wish:
    """What was trained on a CPU is trained on one again, if nothing else was typed."""
    typed = any(word.startswith("DEVICE=") for word in wish.settings)
    on_cpu = str(made.training.get("device", "")).startswith("CPU")
    return replace(wish, settings=(*wish.settings, "DEVICE=cpu")) if on_cpu and not typed else wish


def trained(session: Session, job: Job, this: Published, wish: Wish, log: Path) -> None:
    """The rows, compared; then all the rest."""
    cloud_to_local.begin(session, job, "data", wish)
    cloud_to_local.watched(session, job, log)
    same_rows(this, session.launcher, job)
    cloud_to_local.begin(session, job, "train", wish)
    cloud_to_local.watched(session, job, log)


def prepared(this: Published, data: Path | None, wish: Wish) -> Job:
    """The job: code, config, files. Raises UserError where one of them is not to be had."""
    made, commit = this.made, code_of(this.made)
    found = published_sources.located(made, pinned(made), commit, data)
    settings, _ = published_sources.moved(pinned(made))
    hub.say(f"{this.repo}: {made.name}, by the code of {commit[:12]}, trained on {made.training.get('device')}")
    return Job(
        this.name, made.name, source_archive.ROOT, commit, made.provenance["git"].get("url"), upload_files.dump(settings),
        upload_files.untold(source_archive.ROOT, commit, found), wish.settings,
    )  # fmt: skip


def code_of(made: Manifest) -> str:
    """The commit, which this checkout has or its origin gives. Raises UserError otherwise."""
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
            # Not fetched from where the manifest says: whoever wrote it would choose what runs here.
            raise UserError(
                f"this checkout does not have the commit {commit[:12]}, and its origin does not give it ({error.message})",
                f"if you trust {shown(str(git.get('url')))}: `git fetch {shown(str(git.get('url')))} {commit}`, then the same command",
            ) from error
    return commit


def pinned(made: Manifest) -> dict:
    """The config with every revision as it was resolved, and a folder to publish to."""
    settings = {section: dict(values) for section, values in made.config.items()}
    if references.is_hub_model(made.base.model):
        settings.setdefault("base", {})["revision"] = made.base.revision
    if not made.dataset.sha256:
        settings.setdefault("data", {})["revision"] = made.dataset.revision
    settings["publish"] = settings.get("publish", {}) | {"repo": "./hub/{run}", "tag": None}
    return settings


def agree(this: Published, launcher: Launcher, machine: Machine, wish: Wish) -> None:
    """Hours and price, from how long it took before and what the two cards can do."""
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
    """(hours, dollars), None where a card is not in the table."""
    seconds, before = made.training.get("seconds"), gpu_table.find(str(made.training.get("device", "")))
    card = gpu_table.find(machine.cards[0]) if machine.cards else None
    if not isinstance(seconds, int | float) or (card is None) != (before is None):
        return None, None
    hours = seconds / 3600 * (before.tflops / card.tflops if card and before else 1)
    return hours, hours * card.dollars_per_hour if card else None


def same_rows(this: Published, launcher: Launcher, job: Job) -> None:
    """Raises UserError when the rows made there are others than those published."""
    there, wanted = fetch_result.record(launcher, job.name, job.run, "data"), this.made.dataset
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
            f"see runs/{job.run}/data/rejected.jsonl in {launcher.where}'s {job.name}, and whether the data set's revision still is what it was",
        )


def remade(launcher: Launcher, job: Job) -> Manifest:
    """The manifest of what was made there."""
    there = fetch_result.record(launcher, job.name, job.run, "publish")["repo"]
    return manifest.parse(
        fetch_result.small(launcher, job.name, f"{there}/{manifest.NAME}"), f"{launcher.where}:{there}/{manifest.NAME}"
    )
