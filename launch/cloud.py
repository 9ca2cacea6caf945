"""cloud-to-local: checks, the tree and its data to a box, `make train` there, its log here, the result home.

Whatever is interrupted, the same command goes on: a job that runs is watched again, one that ended is fetched or started
again, and `make train` itself goes on from its records.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from contract import files, hub
from contract.errors import UserError
from launch import attend, parcel, result, tree
from launch.bill import Session, ask
from launch.launcher import Job, Launcher, Machine, State
from pipeline import code, config, preflight
from pipeline.config import Config
from pipeline.plan import cards
from pipeline.plan import stage as plans
from pipeline.record import Run

# Of this machine, for the job: over the connection, never in a file or an argument.
PASSED = (
    "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "WANDB_API_KEY", "WANDB_MODE", "FERRY_HUB_SECONDS",
    "FERRY_SILENCE_SECONDS", "FERRY_DEVICE",
)  # fmt: skip
STARTED = "started.json"
ENVIRONMENT = {"cuda": 9e9, "cpu": 4e9}  # bytes of disk: packages and llama.cpp, while they are made


@dataclass(frozen=True)
class Wish:
    """What was typed."""

    overrides: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """For the `make` there, such as DOCKER=0."""
    teardown: str | None = None
    limit: float | None = None
    """Dollars."""
    yes: bool = False

    @property
    def device(self) -> str:
        return dict(word.split("=", 1) for word in self.settings).get("DEVICE", "cuda")


def stage(config_file: Path, run: Run, launcher: Launcher, cloud: str, wish: Wish) -> dict:
    """From a config to a repo that `make deploy-mac` takes; returns cloud.json.

    Raises UserError with what went wrong, after the line that says what still bills.
    """
    tree_of = config.load(config_file, wish.overrides)
    name = run.folder.name
    session = Session(launcher, name, f"`make cloud-stop CLOUD={cloud} RUN={name}`", wish.teardown)
    with session.billed():
        session.running = started(run, launcher)  # as far as it is known before the box was asked
        job = prepared(tree_of, run, wish)
        state = found(session, job)
        if session.running:
            hub.say(f"{launcher.where}: {job.name} runs there already")
        elif state.code != 0:
            machine = launched_on(launcher, wish)
            checked(config_file, run, wish)
            job = with_files(job, tree_of, run)
            agree(tree_of, run, job, launcher, machine, wish)
            files.write_json(run.folder / "cloud" / STARTED, {"where": launcher.where})
            begin(session, job, "train", wish)
        watched(session, job, run.folder / "cloud" / "log")
        files.remove(run.folder / "cloud" / STARTED)
        repo = delivered(launcher, job, run)
    record = {"repo": repo, "where": launcher.where, "commit": job.commit, "billing": session.ended()}
    files.write_json(run.folder / "cloud.json", record)
    return record


def started(run: Run, launcher: Launcher) -> bool:
    """Was this run started there, and not seen to end?"""
    note = run.folder / "cloud" / STARTED
    return note.is_file() and files.read_json(note).get("where") == launcher.where


def prepared(settings: Config, run: Run, wish: Wish) -> Job:
    """The job without its files, which are known once `data` has read them."""
    changed, _ = parcel.moved(settings.model_dump(mode="json"))
    url = code.checkout()["url"]
    return Job(
        run.folder.name,
        run.folder.name,
        tree.ROOT,
        tree.head(tree.ROOT),
        url,
        parcel.dump(changed),
        settings=wish.settings,
    )


def found(session: Session, job: Job) -> State:
    """The job there. Raises UserError when another one of that name runs."""
    state = session.launcher.state(job.name)
    session.running = state.word == "running"
    other = state.config and state.config != files.sha256_bytes(job.config.encode())
    if other and session.running:
        raise UserError(
            f"{session.launcher.where} runs {job.name} already, with another config",
            "wait for it, or start this one beside it: RUN=another-name",
        )
    return State() if other else state


def checked(config_file: Path, run: Run, wish: Wish) -> None:
    """What can be known here, in seconds: the config, the rows, the Hub. Raises UserError or ends with its exit code."""
    overrides = [word for text in wish.overrides for word in ("--set", text)]
    for stage in ("check", "data"):
        command = [sys.executable, "-m", "pipeline", stage, str(config_file), "--run", str(run.folder), *overrides]
        if code := subprocess.call(command):
            raise SystemExit(code)
    for text in preflight.stage(config.load(config_file, wish.overrides), run, here=False):
        hub.say(f"preflight: {text}")


def with_files(job: Job, settings: Config, run: Run) -> Job:
    """The job with all that its config names."""
    _, moves = parcel.moved(settings.model_dump(mode="json"))
    beside = parcel.below(moves, run.read("data")["inputs"])
    sent = parcel.untold(job.repository, job.commit, beside)
    if left := tree.left_behind(job.repository, {str(path) for path in beside.values()}):
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        hub.say(f"note: {', '.join(left[:5])}{more}: not committed as they are here; what travels is {job.commit[:12]}")
    return Job(**{**vars(job), "files": sent})


def launched_on(launcher: Launcher, wish: Wish) -> Machine:
    """The machine, which can do it. Raises UserError for what would fail there after minutes."""
    machine = launcher.look()
    if machine.lacks:
        raise UserError(
            f"{launcher.where} has no {', '.join(machine.lacks)}",
            "install it there (sudo apt-get install make python3 python3-venv python3-dev g++ util-linux), then the same command",
        )
    if machine.unwritable:
        raise UserError(
            f"{launcher.where}: nothing can be written in {machine.unwritable}",
            "name another folder: CLOUD=ssh://user@box/folder",
        )
    if not machine.cards and wish.device != "cpu":
        raise UserError(
            f"{launcher.where} has no NVIDIA GPU that answers",
            "take another box, or train on its processor: DEVICE=cpu",
        )
    return machine


def agree(settings: Config, run: Run, job: Job, launcher: Launcher, machine: Machine, wish: Wish) -> None:
    """Hours and price of this run on that machine, agreed to once. Raises UserError where its disk is too small."""
    plan, space = planned(settings, run, machine)
    need, free = ENVIRONMENT[wish.device] + space, machine.free
    if free < need:
        raise UserError(
            f"{launcher.where} has {free / 1e9:.1f} GB of disk free where the job goes, it needs {need / 1e9:.1f} GB",
            "take a box with more disk, or name a larger folder: CLOUD=ssh://user@box/folder",
        )
    note = run.folder / "cloud" / "agreed.json"
    this = {"where": launcher.where, "config": files.sha256_bytes(job.config.encode()), "cards": list(machine.cards)}
    if note.is_file() and files.read_json(note) == this and wish.limit is None:
        return
    price = plan.dollars if plan else None
    cost = f"about {plans.duration(3600 * plan.hours)} and ${price:.2f}" if plan else "hours and price are not known"
    ask(
        f"{job.run} on {launcher.where} ({machine.cards[0] if machine.cards else 'CPU'}): {cost}, set-up and downloads not counted",
        price,
        wish.limit,
        wish.yes,
    )
    files.write_json(note, this)


def planned(settings: Config, run: Run, machine: Machine) -> tuple[plans.Plan | None, float]:
    """On its first card, where the table has that; and the disk that the run takes to its end, bytes."""
    try:
        work = plans.work(settings, run)
    except UserError as error:  # no plain decoder: what it needs is known when it runs
        hub.say(f"plan: {error.message}")
        return None, 0
    card = cards.find(machine.cards[0]) if machine.cards else None
    made = plans.on(card, work) if card else None
    if isinstance(made, str):
        raise UserError(f"{settings.base.model} on {card.name}: {made}", "`make plan` names the cards that fit")
    return made, sum(plans.space_of(settings, work).values())


def begin(session: Session, job: Job, goal: str, wish: Wish) -> None:
    """Send and start."""
    launcher = session.launcher
    hub.say(f"{launcher.where}: sending {job.commit[:12]}")
    launcher.send(job)
    passed = environment(wish)
    hub.say(f"{launcher.where}: starting `make {goal}`" + (f", with {', '.join(passed)} of here" if passed else ""))
    session.running = True  # or about to
    launcher.start(job, goal, passed)


def environment(wish: Wish) -> dict[str, str]:
    """What the job gets of this machine's environment."""
    passed = {name: os.environ[name] for name in PASSED if os.environ.get(name)}
    if token := hub.token():
        passed["HF_TOKEN"] = token
    return passed | ({"FERRY_DEVICE": "cpu"} if wish.device == "cpu" else {})


def watched(session: Session, job: Job, log: Path) -> State:
    """To its end. Raises UserError when it ended badly."""
    session.running = True
    state = attend.through(session.launcher, job.name, log)
    session.running = False
    if state.word == "ended" and state.code == 0:
        return state
    how = (
        f"ended with exit code {state.code}"
        if state.word == "ended"
        else "ended without a word (killed, or the machine was switched off)"
    )
    raise UserError(
        f"`make {state.goal}` on {session.launcher.where} {how}; its log is above and in {log}",
        "see what it says; the same command goes on from its records",
    )


def delivered(launcher: Launcher, job: Job, run: Run) -> str:
    """The repo that `make deploy-mac` takes."""
    if run.done("data"):
        for text in result.same_rows(run.read("data"), result.record(launcher, job.name, job.run, "data")):
            hub.say(f"note: the rows made there are others than those made here: {text}")
    return result.home(launcher, job.name, job.run, Path("hub"))
