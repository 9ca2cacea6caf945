"""reproduce: a published model made again from its manifest.json alone, and a table that says whether it is the same.

The code is the commit's own, the environment that of its locks, base and data set those of its revisions; local data is
found by sha256. Rows come first: where they are others, nothing is trained.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from contract import files, hub, manifest, source
from contract.errors import UserError, shown
from contract.manifest import Manifest
from launch import cloud, parcel, result, tree, verdict
from launch.bill import Session, ask
from launch.cloud import Wish
from launch.launcher import Job, Launcher, Machine
from pipeline import base as bases
from pipeline.data import fingerprint, read
from pipeline.plan import cards
from pipeline.plan.stage import duration

COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Asked:
    """What was published, and where it is made again."""

    repo: str
    made: Manifest
    folder: Path
    """Of this machine, for the log and the verdict."""

    @property
    def name(self) -> str:
        """Of the job."""
        return self.folder.name


def asked(repo: str, runs: Path) -> Asked:
    """Raises UserError when there is no such repo, or it cannot be made again."""
    content = source.find(repo).manifest()
    made = manifest.parse(content, f"{shown(repo)}/{manifest.NAME}")
    return Asked(repo, made, runs / "reproduce" / f"{made.name}-{files.sha256_bytes(content)[:12]}")


def stage(this: Asked, launcher: Launcher, again: str, data: Path | None, wish: Wish) -> list[verdict.Row]:
    """Make it again and compare. again: the command that ends a running job.

    Raises UserError where code, data or machine are not to be had, and where the rows are others than those published.
    """
    wish = as_before(this.made, wish)
    job = prepared(this, data, wish)
    session, log = Session(launcher, this.name, again, wish.teardown), this.folder / "log"
    with session.billed():
        state = cloud.found(session, job)
        if session.running:
            state = cloud.watched(session, job, log)
        if (state.goal, state.code) != ("train", 0):
            agree(this, launcher, cloud.launched_on(launcher, wish), wish)
            trained(session, job, this, wish, log)
        rows = verdict.rows(this.made, remade(launcher, job))
    hub.say(session.ended())
    return rows


def as_before(made: Manifest, wish: Wish) -> Wish:
    """What was trained on a CPU is trained on one again, if nothing else was typed."""
    typed = any(word.startswith("DEVICE=") for word in wish.settings)
    on_cpu = str(made.training.get("device", "")).startswith("CPU")
    return replace(wish, settings=(*wish.settings, "DEVICE=cpu")) if on_cpu and not typed else wish


def trained(session: Session, job: Job, this: Asked, wish: Wish, log: Path) -> None:
    """The rows, compared; then all the rest."""
    cloud.begin(session, job, "data", wish)
    cloud.watched(session, job, log)
    same_rows(this, session.launcher, job)
    cloud.begin(session, job, "train", wish)
    cloud.watched(session, job, log)


def prepared(this: Asked, data: Path | None, wish: Wish) -> Job:
    """The job: config, commit, files. Raises UserError where one of them is not to be had."""
    commit = code_of(this.made)
    settings = pinned(this.made)
    found = located(this.made, settings, commit, data)
    settings, _ = moved(settings)
    url = this.made.provenance["git"].get("url")
    # The name of the run stands in the files: it stays. They go to a folder, whatever they went to before.
    return Job(
        this.name, this.made.name, tree.ROOT, commit, url, parcel.dump(settings), parcel.untold(tree.ROOT, commit, found), wish.settings
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
    if not tree.has(tree.ROOT, commit):
        try:
            tree.git(tree.ROOT, "fetch", "--quiet", "origin", commit)
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
    if bases.hub_id(made.base.model):
        settings["base"]["revision"] = made.base.revision
    if not made.dataset.sha256:
        settings["data"]["revision"] = made.dataset.revision
    settings["publish"] |= {"repo": "./hub/{run}", "tag": None}
    return settings


def moved(settings: dict) -> tuple[dict, dict[str, str]]:
    """Paths of the machine that trained it, as places in the tree; whether they are here is `located`'s to say."""
    settings, moves = {section: dict(values) for section, values in settings.items()}, {}
    for section, key in parcel.NAMING:
        value = settings.get(section, {}).get(key)
        if value and _path(section, key, value):
            moves[value] = settings[section][key] = parcel.place(section, key, value)
    return settings, moves


def _path(section: str, key: str, value: str) -> bool:
    """Was it a path there? What is a name on the Hub, of a package or of ours stays what it is."""
    if key == "template":
        return value.endswith(".jinja")
    return not (bases.PYPI.match(value) or bases.hub_id(value)) if section == "base" else not read.is_hub(value)


def located(made: Manifest, settings: dict, commit: str, data: Path | None) -> dict[str, Path]:
    """{path in the tree: file here} of the local data, each by its sha256. Raises UserError with the rows that differ."""
    _, moves = moved(settings)
    given = (
        [data]
        if data and data.is_file()
        else sorted(path for path in data.rglob("*") if path.is_file())
        if data
        else []
    )
    if data and not given:
        raise UserError(
            f"DATA={data}: no such file or folder", "name the file, or the folder, that the model was trained on"
        )
    hashes = {path: files.sha256(path) for path in given}
    found, missing = {}, {}
    for name, digest in made.dataset.sha256.items():
        path = next((path for path, its in hashes.items() if its == digest), None) or _as_named(name, digest)
        if path:
            found[_there(name, moves)] = path
        elif (held := tree.content(tree.ROOT, commit, name)) is None or files.sha256_bytes(held) != digest:
            missing[name] = digest
    strange = [path for path, its in hashes.items() if its not in made.dataset.sha256.values()]
    if missing or (strange and data and data.is_file()):
        raise changed(made, commit, missing or dict(made.dataset.sha256), strange)
    return found


def _as_named(name: str, digest: str) -> Path | None:
    """Where the manifest says, on this machine."""
    path = Path(name).expanduser()
    return path if path.is_file() and files.sha256(path) == digest else None


def _there(name: str, moves: dict[str, str]) -> str:
    """Its place in the tree."""
    for value, target in moves.items():
        if name == value:
            return target
        if Path(name).is_relative_to(value):
            return f"{target}/{Path(name).relative_to(value)}"
    return name


def changed(made: Manifest, commit: str, missing: dict[str, str], strange: list[Path]) -> UserError:
    """What is there instead, as far as it can be said."""
    lines = []
    for path in strange:
        name = next((name for name in missing if Path(name).name == path.name), next(iter(missing)))
        lines.append(f"{path} has sha256 {files.sha256(path)[:12]}, {name} had {made.dataset.sha256[name][:12]}")
        lines += [f"  {line}" for line in _rows(path, name, made, commit)]
    lines += [] if strange else [f"{name} (sha256 {digest[:12]}) is not here" for name, digest in missing.items()]
    return UserError(
        f"{made.name} was trained on other rows, nothing was started:\n  " + "\n  ".join(lines),
        "DATA=the file as it was then, or the folder that holds it",
    )


def _rows(path: Path, name: str, made: Manifest, commit: str) -> list[str]:
    """The first rows that differ, with what they were where the commit holds the file."""
    try:
        now = fingerprint.differing(path, made.dataset.fingerprints.get(name, ""))
    except UserError as error:
        return [error.message]
    held = tree.content(tree.ROOT, commit, name)
    if held is None or files.sha256_bytes(held) != made.dataset.sha256[name]:
        return now or ["which row, its fingerprint does not show"]
    before, after = held.decode(errors="replace").splitlines(), path.read_text(errors="replace").splitlines()
    number = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    return [
        f"{path}:{number + 1}: {_line(after, number)}",
        f"{name}:{number + 1} of {commit[:12]}: {_line(before, number)}",
    ]


def _line(lines: list[str], number: int) -> str:
    return lines[number][:300] if number < len(lines) else "(no such row)"


def agree(this: Asked, launcher: Launcher, machine: Machine, wish: Wish) -> None:
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
    seconds, before = made.training.get("seconds"), cards.find(str(made.training.get("device", "")))
    card = cards.find(machine.cards[0]) if machine.cards else None
    if not isinstance(seconds, int | float) or (card is None) != (before is None):
        return None, None
    hours = seconds / 3600 * (before.tflops / card.tflops if card and before else 1)
    return hours, hours * card.dollars_per_hour if card else None


def same_rows(this: Asked, launcher: Launcher, job: Job) -> None:
    """Raises UserError when the rows made there are others than those published."""
    there, wanted = result.record(launcher, job.name, job.run, "data"), this.made.dataset
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
    if said:
        raise UserError(
            f"{this.made.name}: the same code and sources give other rows, nothing was trained:\n  "
            + "\n  ".join(said),
            f"see runs/{job.run}/data/rejected.jsonl in {launcher.where}'s {job.name}, and whether the data set's revision still is what it was",
        )


def remade(launcher: Launcher, job: Job) -> Manifest:
    """The manifest of what was made there."""
    there = result.record(launcher, job.name, job.run, "publish")["repo"]
    return manifest.parse(
        result.small(launcher, job.name, f"{there}/{manifest.NAME}"), f"{launcher.where}:{there}/{manifest.NAME}"
    )
