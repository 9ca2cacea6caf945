"""cloud-to-local: check the run, send code and data to a provider, run `make train` there, and fetch the result.

Meanwhile the job's log is shown here. Whatever is interrupted, the same command resumes it: a job that runs is watched
again, one that has ended is fetched or started again, and `make train` itself resumes from its records.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from common import console, files, hub
from common.errors import UserError
from contract import manifest
from launch import choose_instance as orders
from launch import fetch_result, job_script, rescue, source_archive, upload_files, watch_job
from launch.costs import Session, ask
from launch.provider import Job, Launcher, Machine, Order, State
from pipeline.config import load
from pipeline.config.schema import Config
from pipeline.plan import estimate as plans
from pipeline.plan import gpu_table
from pipeline.preflight import check_run
from pipeline.run.run_folder import Run
from pipeline.run.run_stages import run_stages
from pipeline.toolchain import git

# Variables of this machine that the job gets. They go over the connection, and stand in no file and no argument.
PASSED = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET",
    "WANDB_API_KEY",
    "WANDB_MODE",
    "FERRY_HUB_SECONDS",
    "FERRY_SILENCE_SECONDS",
    "FERRY_DEVICE",
)
STARTED = "started.json"
ENVIRONMENT = {"cuda": 9e9, "cpu": 4e9}  # peak bytes of disk: packages and the build of llama.cpp


@dataclass(frozen=True)
class Wish:
    """What the user typed."""

    overrides: tuple[str, ...] = ()
    """SECTION.KEY=VALUE for the config."""
    settings: tuple[str, ...] = ()
    """NAME=VALUE for the job's `make`, such as DOCKER=0."""
    teardown: str | None = None
    """The command that ends what bills."""
    limit: float | None = None
    """The most that the job may cost, in dollars."""
    yes: bool = False
    """Start without asking."""
    checkpoints: str | None = None
    """Repo for the checkpoints of a machine of yours; those of a rented instance always go to a repo."""
    gpu: str | None = None
    """The GPU, or the type of instance, to rent."""
    hours: float | None = None
    """Time limit of a rented instance."""
    spot: bool = False
    """Rent an instance that the provider may take away."""

    @property
    def device(self) -> str:
        """Return what the job trains on: 'cuda' or 'cpu'."""
        return self.typed("DEVICE", "cuda")

    def typed(self, name: str, otherwise: str) -> str:
        """Return the value of a setting for the job's `make`, or the default."""
        return dict(word.split("=", 1) for word in self.settings).get(name, otherwise)


def stage(config_file: Path, run: Run, launcher: Launcher, cloud: str, wish: Wish, lock: int | None = None) -> dict:
    """Train a config at a provider, fetch the result, and write and return cloud.json.

    The record's `repo` is what `make deploy-mac` takes.

    Args:
        config_file: The config to train.
        run: The run here; it keeps the job's log and the records of this command.
        provider: Where the job runs.
        cloud: The provider as the user typed it (CLOUD=), for messages.
        options: What else the user typed.
        lock: File descriptor of the run's lock, which the caller holds.

    Raises:
        UserError: What went wrong. What still bills has been reported before.
    """
    settings = load.load_config(config_file, wish.overrides)
    name = run.folder.name
    notes = run.folder / "cloud"
    refuse_folder(settings, launcher)
    refuse_choice(launcher, wish)
    job = prepared(settings, run, launcher, wish)
    if record := here_already(run, job):
        return record
    session = Session(
        launcher,
        name,
        stopping(cloud, name, wish),
        wish.teardown,
        running=started(run, launcher),
        home=notes / "rescued",
    )
    with session.billed():
        state = found(session, job)
        if not session.running and state.code != 0:
            machine = launched_on(launcher, wish)
            checked(config_file, run, launcher, wish, lock)
            job = with_files(job, settings, run)
            work = work_of(settings, run)
            need = disk_of(settings, work, wish)
            if launcher.rented:
                order, plan = ordered(machine, work, need, wish)
                job = replace(job, order=order)
            else:
                plan = planned(settings, work, machine)
            if state.word == "absent":
                refuse_full_disk(need, launcher, machine)
                job = replace(job, files=job.files | brought_home(run))
            if state.word == "absent" or launcher.rented:
                # it is of an earlier machine, and a log holds the output of one machine only
                files.set_aside(notes / "log")
            agree(settings, work, plan, job, session, machine, wish)
            files.write_json(notes / STARTED, {"where": launcher.where})
            begin(session, job, "train", wish)
        state = watched(session, job, notes / "log")
        files.remove(notes / STARTED)
        repo = delivered(launcher, job, run)
        rescue.remove_copies(session.home)
    billing = session.ended()
    record = {
        "repo": repo,
        "where": launcher.where,
        "commit": state.commit,
        "config": digest(job),
        "billing": billing,
    }
    files.write_json(run.folder / "cloud.json", record)
    return record


def stop_job(launcher: Launcher, folder: Path, teardown: str | None) -> str:
    """Tell the job of a run to write its state and end, wait for that, and return what still bills."""
    name = folder.name
    # is_running=True: a job is taken to run until the provider says that it does not
    session = Session(launcher, name, "the same command", teardown, running=True, home=folder / "cloud" / "rescued")
    with session.billed():
        session.running = launcher.state(name).word == "running"
        if session.running:
            launcher.stop(name)
            watch_job.through(launcher, name, folder / "cloud" / "log")
            session.running = False
    return session.ended(well=False)


def stopping(cloud: str, name: str, wish: Wish) -> str:
    """Return the command that ends the job, with the settings by which it finds the job where it was started."""
    more = (" SPOT=1" if wish.spot else "") + (f" CHECKPOINTS={wish.checkpoints}" if wish.checkpoints else "")
    return f"`make cloud-stop CLOUD={cloud} RUN={name}{more}`"


def here_already(run: Run, job: Job) -> dict | None:
    """Return cloud.json when the result of this very config was fetched before; its machine may be gone by now."""
    note = run.folder / "cloud.json"
    said = files.read_json(note) if note.is_file() else {}
    if said.get("config") != digest(job):
        return None
    gone = hub.is_folder(said["repo"]) and not (Path(said["repo"]) / manifest.NAME).is_file()
    return None if gone else said


def digest(job: Job) -> str:
    """Return the sha256 of the job's config, as JobState has it."""
    return files.sha256_bytes(job.config.encode())


def started(run: Run, launcher: Launcher) -> bool:
    """Return whether this run was started at this provider and was not seen to end."""
    note = run.folder / "cloud" / STARTED
    return note.is_file() and files.read_json(note).get("where") == launcher.where


def refuse_folder(settings: Config, launcher: Launcher) -> None:
    """Raise UserError when the result would go into a folder of an instance, which is lost when that is given back."""
    if launcher.rented and hub.is_folder(settings.publish.repo):
        raise UserError(
            f"publish.repo is {settings.publish.repo}, a folder, and {launcher.where} keeps none",
            'a repo of the Hub: SET="publish.repo={user}/{run}-GGUF"',
        )


def refuse_choice(launcher: Launcher, wish: Wish) -> None:
    """Raise UserError when the options choose an instance and the job runs on a machine of yours."""
    if not launcher.rented and (wish.gpu or wish.hours):
        raise UserError(
            f"GPU and HOURS choose a machine that is rented, and {launcher.where} is there already",
            "leave them out, or CLOUD=sky or hf-jobs",
        )


def prepared(settings: Config, run: Run, launcher: Launcher, wish: Wish) -> Job:
    """Return the job without its files, which are known once the data stage has read them."""
    changed, _ = upload_files.moved(settings.model_dump(mode="json"))
    url = git.checkout()["url"]
    name, head = run.folder.name, source_archive.head(source_archive.ROOT)
    typed = [word for word in wish.settings if not (launcher.rented and word.startswith("IMAGE="))]
    typed += [f"CHECKPOINTS={wish.checkpoints}"] if wish.checkpoints and not launcher.rented else []
    return Job(name, name, source_archive.ROOT, head, url, upload_files.dump(changed), settings=tuple(typed))


def found(session: Session, job: Job) -> State:
    """Return the state of the job at the provider.

    A job of that name with another config counts as died. Raises UserError when such a job still runs.
    """
    launcher, state = session.launcher, session.launcher.state(job.name)
    session.running = state.word == "running"
    other = state.config and state.config != digest(job)
    if other and session.running:
        raise UserError(
            f"{launcher.where} runs {job.name} already, with another config",
            "wait for it, or start this one beside it: RUN=another-name",
        )
    if session.running:
        code = "" if state.commit == job.commit else f", by the code of {state.commit[:12]}, not of {job.commit[:12]}"
        hub.say(f"{launcher.where}: {job.name} runs there already{code}")
    return replace(state, word="died", code=None) if other else state


def checked(config_file: Path, run: Run, launcher: Launcher, wish: Wish, lock: int | None) -> None:
    """Make the rows and run the preflight here, which takes seconds.

    Raises UserError, or ends with the exit code of the data stage.
    """
    run_stages(run, "data", lock)
    leaving = getattr(launcher, "checkpoints", wish.checkpoints)
    for text in check_run.stage(load.load_config(config_file, wish.overrides), run, here=False, checkpoints=leaving):
        hub.say(f"preflight: {text}")


def with_files(job: Job, settings: Config, run: Run) -> Job:
    """Return the job with the files that its config names and the commit does not contain."""
    _, moves = upload_files.moved(settings.model_dump(mode="json"))
    beside = upload_files.below(moves, run.read("data")["inputs"])
    sent = upload_files.untold(job.repository, job.commit, beside)
    if left := source_archive.left_behind(job.repository, {str(path) for path in beside.values()}):
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        hub.say(f"note: {', '.join(left[:5])}{more}: not committed as they are here; what travels is {job.commit[:12]}")
    return replace(job, files=sent)


def brought_home(run: Run) -> dict[str, Path]:
    """Return path in the tree -> local file of what an earlier machine made of the run before it was given back."""
    found = rescue.along(run.folder / "cloud" / "rescued", run.folder.name)
    if found:
        hub.say(f"{run.folder.name} goes on there with what was brought home")
    return found


def launched_on(launcher: Launcher, wish: Wish) -> Machine:
    """Return what the provider has, if it can do the job. Raises UserError for what would fail there after minutes."""
    machine = launcher.look()
    if not machine.system.startswith("Linux"):
        raise UserError(f"{launcher.where} is {machine.system}; Ferry trains on Linux", "CLOUD=ssh://user@a-linux-box")
    if machine.lacks:
        raise UserError(
            f"{launcher.where} has no {', '.join(machine.lacks)}",
            "install it there (sudo apt-get install make python3 python3-venv python3-dev g++ util-linux), "
            "then the same command",
        )
    if machine.unwritable:
        raise UserError(
            f"{launcher.where}: nothing can be written in {machine.unwritable}",
            "name another folder: CLOUD=ssh://user@box/folder",
        )
    if not machine.cards and wish.device != "cpu":
        raise UserError(
            f"{launcher.where} {'offers' if launcher.rented else 'has'} no NVIDIA GPU"
            f"{'' if launcher.rented else ' that answers'}",
            "take another one, or train on a processor: DEVICE=cpu",
        )
    return machine


def ordered(machine: Machine, work: plans.Work | None, need: int, wish: Wish) -> tuple[Order, plans.Plan | None]:
    """Return the request for the cheapest instance that fits the options, and the plan on it."""
    return orders.order(
        machine,
        work,
        need,
        wish.typed("IMAGE", job_script.IMAGE),
        gpu=wish.gpu,
        cpu=wish.device == "cpu",
        spot=wish.spot,
        hours=wish.hours,
        dollars=wish.limit,
    )


def agree(
    settings: Config,
    work: plans.Work | None,
    plan: plans.Plan | None,
    job: Job,
    session: Session,
    machine: Machine,
    wish: Wish,
) -> None:
    """Show the plan and ask the user to confirm hours and price; the same run on the same machine is asked for once."""
    where = session.launcher.where
    note = session.home.with_name("agreed.json")
    order = job.order
    card = order.offer.name if order else machine.cards[0] if machine.cards else "CPU"
    this = {"where": where, "config": digest(job), "cards": [card] if order else list(machine.cards)}
    this |= {"hours": order.hours, "dollars": order.offer.dollars, "spot": order.spot} if order else {}
    before = note.is_file() and files.read_json(note) == this
    if plan and not before:
        console.say(plans.detail(plan, settings, work))
    hourly = order.offer.dollars if order else plan.card.dollars_per_hour if plan else None
    dollars = plan.hours * hourly if plan and hourly is not None else None
    about = f" and ${dollars:.2f}" if dollars is not None else ", price not known"
    cost = f"about {plans.duration(3600 * plan.hours)}{about}" if plan else "hours and price are not known"
    cost += f", set-up and downloads not counted{at_most(order)}"
    if order and (dollars is None or wish.hours):  # the time limit is all that is known, or the user set it
        dollars = order.most
    ask(f"{job.run} on {where} ({card}): {cost}", dollars, wish.limit, wish.yes or before)
    files.write_json(note, this)


def at_most(order: Order | None) -> str:
    """Return the most that a rented instance can cost, for a message; empty for a machine of yours."""
    if not order:
        return ""
    most = f", ${order.most:.2f}" if order.most is not None else ""
    hourly = f" at ${order.offer.dollars:.2f} an hour" if order.offer.dollars is not None else ""
    return f"; at most {plans.duration(3600 * order.hours)}{most}{hourly}{', spot' if order.spot else ''}"


def disk_of(settings: Config, work: plans.Work | None, wish: Wish) -> int:
    """Return the bytes of disk that the environment and the whole run need."""
    return round(ENVIRONMENT[wish.device] + (sum(plans.space_of(settings, work).values()) if work else 0))


def refuse_full_disk(need: int, launcher: Launcher, machine: Machine) -> None:
    """Raise UserError when a machine of yours has too little free disk."""
    if not launcher.rented and machine.free < need:
        raise UserError(
            f"{launcher.where} has {machine.free / 1e9:.1f} GB of disk free where the job goes, "
            f"it needs {need / 1e9:.1f} GB",
            "take a box with more disk, or name a larger folder: CLOUD=ssh://user@box/folder",
        )


def planned(settings: Config, work: plans.Work | None, machine: Machine) -> plans.Plan | None:
    """Return the plan on the machine's first GPU; None when configs/gpus.csv does not have it.

    Raises UserError when the training does not fit.
    """
    card = gpu_table.find(machine.cards[0]) if machine.cards else None
    made = plans.on(card, work) if card and work else None
    if isinstance(made, str):
        raise UserError(f"{settings.base.model} on {card.name}: {made}", "`make plan` names the cards that fit")
    return made


def work_of(settings: Config, run: Run) -> plans.Work | None:
    """Return what the training needs; None for a model that is no plain decoder, whose need is known when it runs."""
    try:
        return plans.work(settings, run)
    except UserError as error:
        hub.say(f"plan: {error.message}")
        return None


def begin(session: Session, job: Job, goal: str, wish: Wish) -> None:
    """Send the job and start `make <goal>`; from then on the session counts as running."""
    launcher = session.launcher
    hub.say(f"{launcher.where}: sending {job.commit[:12]}")
    launcher.send(job)
    passed = environment(wish)
    hub.say(f"{launcher.where}: starting `make {goal}`" + (f", with {', '.join(passed)} of here" if passed else ""))
    session.running = True  # before the call, which may fail after the job has started
    try:
        launcher.start(job, goal, passed)
    except UserError:
        session.running = not launcher.rented or may_run(launcher, job.name)
        raise


def may_run(launcher: Launcher, name: str) -> bool:
    """Return whether a provider that refused a job may run it all the same."""
    try:
        return launcher.state(name).word == "running"
    except UserError:
        return True


def environment(wish: Wish) -> dict[str, str]:
    """Return the variables of this machine's environment that the job gets, and the Hub's token."""
    passed = {name: os.environ[name] for name in PASSED if os.environ.get(name)}
    if token := hub.token():
        passed["HF_TOKEN"] = token
    return passed | ({"FERRY_DEVICE": "cpu"} if wish.device == "cpu" else {})


def watched(session: Session, job: Job, log: Path) -> State:
    """Show the job's log until it ends and return its state. Raises UserError when it failed."""
    session.running = True
    state = watch_job.through(session.launcher, job.name, log)
    session.running = False
    if state.word == "ended" and state.code == 0:
        return state
    ended = f"ended: {state.why}" if state.why else f"ended with exit code {state.code}"
    ends = {
        "ended": ended,
        "absent": "is not there any more" if session.launcher.rented else "is gone, with its folder",
    } | ({"died": ended} if state.why else {})
    how = ends.get(state.word, "ended without a word (killed, or the machine was switched off)")
    raise UserError(
        f"`make {state.goal or 'train'}` on {session.launcher.where} {how}; its log is above and in {log}",
        "see what it says; the same command goes on from its records",
    )


def delivered(launcher: Launcher, job: Job, run: Run) -> str:
    """Fetch what the job published and return the repo that `make deploy-mac` takes.

    Note where the rows made there differ from the rows made here.
    """
    if run.done("data"):
        for text in fetch_result.same_rows(run.read("data"), fetch_result.record(launcher, job.name, job.run, "data")):
            hub.say(f"note: the rows made there are others than those made here: {text}")
    return fetch_result.home(launcher, job.name, job.run, Path("hub"))
