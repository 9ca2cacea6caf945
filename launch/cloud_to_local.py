"""cloud-to-local: check the run, send code and data to a provider, run `make train` there, and fetch the result.

Meanwhile the job's log is shown here. Whatever is interrupted, the same command resumes it: a job that runs is watched
again, one that has ended is fetched or started again, and `make train` itself resumes from its records.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import console, files, hub
from common.errors import UserError
from contract import manifest
from launch import fetch_result, job_script, rescue, source_archive, upload_files, watch_job
from launch.choose_instance import InstanceNeeds, choose_cheapest_instance
from launch.costs import JobSession, confirm_cost
from launch.provider import InstanceRequest, Job, JobState, Machine, Provider
from pipeline.config import load
from pipeline.config.schema import Config
from pipeline.plan import estimate, gpu_table
from pipeline.preflight import check_run
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run
from pipeline.run.run_stages import run_stages
from pipeline.toolchain import git

# Variables of this machine that the job gets. They go over the connection, and stand in no file and no argument.
FORWARDED_VARIABLES = (
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
START_FILE = "started.json"
JOB_END_CODES = {"ended": "job.failed", "absent": "job.gone"}  # status of a job -> error code; of any other: job.died
ENVIRONMENT_BYTES = {"cuda": 9e9, "cpu": 4e9}  # peak bytes of disk: packages and the build of llama.cpp


@dataclass(frozen=True)
class LaunchOptions:
    """What the user typed."""

    overrides: tuple[str, ...] = ()
    """SECTION.KEY=VALUE for the config."""
    settings: tuple[str, ...] = ()
    """NAME=VALUE for the job's `make`, such as DOCKER=0."""
    teardown: str | None = None
    """The command that ends what bills."""
    max_dollars: float | None = None
    """The most that the job may cost, in dollars."""
    assume_yes: bool = False
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
        return self.get_setting("DEVICE", "cuda")

    def get_setting(self, name: str, default: str) -> str:
        """Return the value of a setting for the job's `make`, or the default."""
        return dict(setting.split("=", 1) for setting in self.settings).get(name, default)


@dataclass(frozen=True)
class PlannedJob:
    """A job, and what is known of its training and its machine before it starts."""

    job: Job
    config: Config
    machine: Machine
    work: estimate.Workload | None
    """What the training needs; None when that is not known."""
    plan: estimate.TrainingPlan | None
    """The training on that machine; None when it cannot be planned."""
    disk_bytes: int
    """Disk that the environment and the whole run need."""

    @property
    def hardware_label(self) -> str:
        """Return the name of the instance to rent, or of the machine's first GPU; 'CPU' when it has none."""
        if self.job.instance_request:
            return self.job.instance_request.instance_type.name
        return self.machine.gpu_names[0] if self.machine.gpu_names else "CPU"

    @property
    def dollars(self) -> float | None:
        """Return the price of the planned hours; None without a plan, or without a price for an hour."""
        if self.plan is None:
            return None
        request = self.job.instance_request
        dollars_per_hour = (request.instance_type if request else self.plan.gpu_type).dollars_per_hour
        return None if dollars_per_hour is None else self.plan.hours * dollars_per_hour


def run_cloud_to_local(
    config_file: Path, run: Run, provider: Provider, cloud: str, options: LaunchOptions, lock: int | None = None
) -> dict[str, Any]:
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
    config = load.load_config(config_file, options.overrides)
    cloud_folder = run.folder / "cloud"
    refuse_folder_hub(config, provider)
    refuse_instance_options(provider, options)
    job = build_job(config, run, provider, options)
    if record := find_earlier_result(run, job):
        return record
    session = JobSession(
        provider,
        job.name,
        stop_command(cloud, job.name, options),
        options.teardown,
        is_running=has_unfinished_job(run, provider),
        rescue_folder=cloud_folder / "rescued",
    )
    with session.report_costs_on_exit():
        state = resume_existing_job(session, job)
        if not session.is_running and state.exit_code != 0:
            machine = require_suitable_machine(provider, options)
            run_local_checks(config_file, run, provider, options, lock)
            planned_job = plan_job(add_job_files(job, config, run), config, run, provider, machine, options)
            start_training(session, planned_job, state, run, options)
        state = wait_for_job(session, job, cloud_folder / "log")
        files.remove(cloud_folder / START_FILE)
        repo = fetch_job_result(provider, job, run)
        rescue.remove_rescued_copies(cloud_folder / "rescued")
    billing = session.teardown_and_report()
    record = {
        "repo": repo,
        "where": provider.label,
        "commit": state.commit,
        "config": config_sha256(job),
        "billing": billing,
    }
    files.write_json(run.folder / "cloud.json", record)
    return record


def plan_job(
    job: Job, config: Config, run: Run, provider: Provider, machine: Machine, options: LaunchOptions
) -> PlannedJob:
    """Return the job, with the instance to rent where the provider rents one, and the plan of its training there."""
    plan: estimate.TrainingPlan | None
    work = estimate_work(config, run)
    disk_bytes = estimate_disk_bytes(config, work, options)
    if provider.is_rented:
        request, plan = choose_instance_request(machine, work, disk_bytes, options)
        job = replace(job, instance_request=request)
    else:
        plan = plan_on_machine(config, work, machine)
    return PlannedJob(job, config, machine, work, plan, disk_bytes)


def start_training(
    session: JobSession, planned_job: PlannedJob, old_state: JobState, run: Run, options: LaunchOptions
) -> None:
    """Ask the user to confirm the costs, then send the job and start it. `old_state`: what the provider has of it."""
    job, provider, cloud_folder = planned_job.job, session.provider, run.folder / "cloud"
    if old_state.status == "absent":
        refuse_full_disk(planned_job.disk_bytes, provider, planned_job.machine)
        job = replace(job, files=job.files | find_rescued_files(run))
    if old_state.status == "absent" or provider.is_rented:
        # it is of an earlier machine, and a log holds the output of one machine only
        files.set_aside(cloud_folder / "log")
    confirm_start(planned_job, provider.label, cloud_folder / "agreed.json", options)
    files.write_json(cloud_folder / START_FILE, {"where": provider.label})
    submit_job(session, job, "train", options)


def stop_job(provider: Provider, run_folder: Path, teardown: str | None) -> str:
    """Tell the job of a run to write its state and end, wait for that, and return what still bills."""
    job_name = run_folder.name
    # is_running=True: a job is taken to run until the provider says that it does not
    session = JobSession(
        provider,
        job_name,
        "the same command",
        teardown,
        is_running=True,
        rescue_folder=run_folder / "cloud" / "rescued",
    )
    with session.report_costs_on_exit():
        session.is_running = provider.read_job_state(job_name).status == "running"
        if session.is_running:
            provider.stop_job(job_name)
            watch_job.watch_until_end(provider, job_name, run_folder / "cloud" / "log")
            session.is_running = False
    return session.teardown_and_report(succeeded=False)


def stop_command(cloud: str, run_name: str, options: LaunchOptions) -> str:
    """Return the command that ends the job, with the settings by which it finds the job where it was started."""
    spot = " SPOT=1" if options.spot else ""
    checkpoints = f" CHECKPOINTS={options.checkpoints}" if options.checkpoints else ""
    return f"`make cloud-stop CLOUD={cloud} RUN={run_name}{spot}{checkpoints}`"


def find_earlier_result(run: Run, job: Job) -> dict[str, Any] | None:
    """Return cloud.json when the result of this very config was fetched before; its machine may be gone by now."""
    record_file = run.folder / "cloud.json"
    record = files.read_json(record_file) if record_file.is_file() else {}
    if record.get("config") != config_sha256(job):
        return None
    is_lost = hub.is_folder(record["repo"]) and not (Path(record["repo"]) / manifest.FILE_NAME).is_file()
    return None if is_lost else record


def config_sha256(job: Job) -> str:
    """Return the sha256 of the job's config, as JobState has it."""
    return files.sha256_bytes(job.config.encode())


def has_unfinished_job(run: Run, provider: Provider) -> bool:
    """Return whether this run was started at this provider and was not seen to end."""
    start_file = run.folder / "cloud" / START_FILE
    return start_file.is_file() and files.read_json(start_file).get("where") == provider.label


def refuse_folder_hub(config: Config, provider: Provider) -> None:
    """Raise UserError when the result would go into a folder of an instance, which is lost when that is given back."""
    if provider.is_rented and hub.is_folder(config.publish.repo):
        raise UserError(
            f"publish.repo={config.publish.repo} is a folder, and {provider.label} keeps no files after the job",
            'publish to a repo on the Hub: SET="publish.repo={user}/{run}-GGUF"',
            code="provider.folder_hub",
        )


def refuse_instance_options(provider: Provider, options: LaunchOptions) -> None:
    """Raise UserError when the options choose an instance and the job runs on a machine of yours."""
    if not provider.is_rented and (options.gpu or options.hours):
        raise UserError(
            f"GPU and HOURS choose a rented instance, and {provider.label} is a machine of yours",
            "leave them out, or use CLOUD=sky or CLOUD=hf-jobs",
            code="provider.not_rented",
        )


def build_job(config: Config, run: Run, provider: Provider, options: LaunchOptions) -> Job:
    """Return the job without its files, which are known once the data stage has read them."""
    job_config, _ = upload_files.relocate_paths(config.model_dump(mode="json"))
    url = git.read_checkout()["url"]
    run_name, commit = run.folder.name, source_archive.head_commit(source_archive.ROOT)
    make_settings = [
        setting for setting in options.settings if not (provider.is_rented and setting.startswith("IMAGE="))
    ]
    make_settings += [f"CHECKPOINTS={options.checkpoints}"] if options.checkpoints and not provider.is_rented else []
    return Job(
        run_name,
        run_name,
        source_archive.ROOT,
        commit,
        url,
        upload_files.dump_config(job_config),
        settings=tuple(make_settings),
    )


def resume_existing_job(session: JobSession, job: Job) -> JobState:
    """Return the state of the job at the provider, and go on with it when it still runs: the session then watches it.

    A job of that name with another config counts as died. Raise UserError when such a job still runs.
    """
    provider, state = session.provider, session.provider.read_job_state(job.name)
    session.is_running = state.status == "running"
    is_other_config = state.config_sha256 and state.config_sha256 != config_sha256(job)
    if is_other_config and session.is_running:
        raise UserError(
            f"{provider.label} is already running {job.name}, with a different config",
            "wait for it, or start this one under a different name: RUN=another-name",
            code="job.different_config",
        )
    if session.is_running:
        is_same_code = state.commit == job.commit
        note = "" if is_same_code else f", with the code of {state.commit[:12]}, not of {job.commit[:12]}"
        hub.print_message(f"{provider.label}: {job.name} is already running{note}")
    return replace(state, status="died", exit_code=None) if is_other_config else state


def run_local_checks(config_file: Path, run: Run, provider: Provider, options: LaunchOptions, lock: int | None) -> None:
    """Make the rows and run the preflight here, which takes seconds. Raise UserError, or SystemExit of a stage."""
    run_stages(run, "data", lock)
    config = load.load_config(config_file, options.overrides)
    checkpoints_repo = provider.checkpoints if provider.is_rented else options.checkpoints
    for warning in check_run.run_preflight(config, run, trains_here=False, checkpoints=checkpoints_repo):
        hub.print_message(f"preflight: {warning}")


def add_job_files(job: Job, config: Config, run: Run) -> Job:
    """Return the job with the files that its config names and the commit does not contain."""
    _, tree_paths = upload_files.relocate_paths(config.model_dump(mode="json"))
    config_files = upload_files.list_job_files(tree_paths, run.read_record(DataRecord).inputs)
    files_to_send = upload_files.select_uncommitted_files(job.repository, job.commit, config_files)
    note_unsent_files(job, {str(path) for path in config_files.values()})
    return replace(job, files=files_to_send)


def note_unsent_files(job: Job, sent_names: set[str]) -> None:
    """Print the names of files that the job does not get, because they are not committed and no config names them."""
    if names := source_archive.list_unsent_files(job.repository, sent_names):
        listing = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        hub.print_message(f"note: not committed, so not sent: {listing}; the job gets the commit {job.commit[:12]}")


def find_rescued_files(run: Run) -> dict[str, Path]:
    """Return path in the tree -> local file of what an earlier machine made of the run before it was given back."""
    rescued_files = rescue.list_rescued_files(run.folder / "cloud" / "rescued", run.folder.name)
    if rescued_files:
        hub.print_message(f"{run.folder.name} resumes there from {run.folder / 'cloud' / 'rescued'}")
    return rescued_files


def require_suitable_machine(provider: Provider, options: LaunchOptions) -> Machine:
    """Return what the provider has, if it can do the job. Raise UserError for what would fail there after minutes."""
    machine = provider.inspect_machine()
    if not machine.system.startswith("Linux"):
        raise UserError(
            f"{provider.label} is {machine.system}; Ferry trains on Linux",
            "use a Linux machine: CLOUD=ssh://user@host",
            code="provider.not_linux",
        )
    if machine.missing_programs:
        raise UserError(
            f"{provider.label} has no {', '.join(machine.missing_programs)}",
            "install it there (sudo apt-get install make python3 python3-venv python3-dev g++ util-linux), "
            "then run the same command again",
            code="provider.missing_programs",
        )
    if machine.unwritable_folder:
        raise UserError(
            f"{provider.label}: {machine.unwritable_folder} is not writable",
            "name a different folder: CLOUD=ssh://user@host/folder",
            code="provider.unwritable_folder",
        )
    if not machine.gpu_names and options.device != "cpu":
        raise UserError(
            f"{provider.label} {'offers' if provider.is_rented else 'has'} no NVIDIA GPU"
            f"{'' if provider.is_rented else ' that nvidia-smi lists'}",
            "use a different one, or train on the CPU: DEVICE=cpu",
            code="provider.no_gpu",
        )
    return machine


def choose_instance_request(
    machine: Machine, work: estimate.Workload | None, disk_bytes: int, options: LaunchOptions
) -> tuple[InstanceRequest, estimate.TrainingPlan | None]:
    """Return the request for the cheapest instance that fits the options, and the plan on it."""
    needs = InstanceNeeds(
        disk_bytes,
        options.get_setting("IMAGE", job_script.DEFAULT_IMAGE),
        gpu=options.gpu,
        cpu=options.device == "cpu",
        spot=options.spot,
        hours=options.hours,
        max_dollars=options.max_dollars,
    )
    return choose_cheapest_instance(machine, work, needs)


def confirm_start(planned_job: PlannedJob, label: str, agreed_file: Path, options: LaunchOptions) -> None:
    """Show the plan and ask the user to confirm hours and price; the same terms are asked for once.

    Args:
        planned_job: The job that would start.
        label: The provider's name.
        agreed_file: The terms that the user has agreed to.
        options: What the user typed.
    """
    terms, request = list_terms(planned_job, label), planned_job.job.instance_request
    was_confirmed = agreed_file.is_file() and files.read_json(agreed_file) == terms
    if planned_job.plan and planned_job.work and not was_confirmed:
        console.print_message(estimate.format_plan(planned_job.plan, planned_job.config, planned_job.work))
    dollars = planned_job.dollars
    if request and (dollars is None or options.hours):  # the time limit is all that is known, or the user set it
        dollars = request.max_dollars
    summary = f"{planned_job.job.run_name} on {label} ({planned_job.hardware_label}): {describe_cost(planned_job)}"
    confirm_cost(summary, dollars, options.max_dollars, options.assume_yes or was_confirmed)
    files.write_json(agreed_file, terms)


def list_terms(planned_job: PlannedJob, label: str) -> dict[str, object]:
    """Return what the user agrees to: where, which config, which GPUs; of a rented instance also hours and price."""
    request = planned_job.job.instance_request
    gpu_names = [planned_job.hardware_label] if request else list(planned_job.machine.gpu_names)
    terms: dict[str, object] = {"where": label, "config": config_sha256(planned_job.job), "cards": gpu_names}
    if request:
        terms |= {"hours": request.hours, "dollars": request.instance_type.dollars_per_hour, "spot": request.spot}
    return terms


def describe_cost(planned_job: PlannedJob) -> str:
    """Return the planned hours and their price, and the most that a rented instance can cost, for a message."""
    plan, dollars, text = planned_job.plan, planned_job.dollars, "hours and price are not known"
    if plan:
        price_text = f" and ${dollars:.2f}" if dollars is not None else ", price not known"
        text = f"about {console.format_duration(3600 * plan.hours)}{price_text}"
    return f"{text}, set-up and downloads not counted{describe_max_cost(planned_job.job.instance_request)}"


def describe_max_cost(request: InstanceRequest | None) -> str:
    """Return the most that a rented instance can cost, for a message; empty for a machine of yours."""
    if not request:
        return ""
    dollars_per_hour, dollars = request.instance_type.dollars_per_hour, request.max_dollars
    text = f"; at most {console.format_duration(3600 * request.hours)}"
    text += f", ${dollars:.2f}" if dollars is not None else ""
    text += f" at ${dollars_per_hour:.2f} an hour" if dollars_per_hour is not None else ""
    return f"{text}, spot" if request.spot else text


def estimate_disk_bytes(config: Config, work: estimate.Workload | None, options: LaunchOptions) -> int:
    """Return the bytes of disk that the environment and the whole run need."""
    run_bytes = sum(estimate.estimate_disk_parts(config, work).values()) if work else 0
    return round(ENVIRONMENT_BYTES[options.device] + run_bytes)


def refuse_full_disk(disk_bytes: int, provider: Provider, machine: Machine) -> None:
    """Raise UserError when a machine of yours has too little free disk."""
    if not provider.is_rented and machine.free_bytes < disk_bytes:
        raise UserError(
            f"{provider.label} has {machine.free_bytes / 1e9:.1f} GB of free disk where the job's folder goes, "
            f"the job needs {disk_bytes / 1e9:.1f} GB",
            "use a machine with more disk, or name a folder on a larger disk: CLOUD=ssh://user@host/folder",
            code="disk.too_small",
        )


def plan_on_machine(config: Config, work: estimate.Workload | None, machine: Machine) -> estimate.TrainingPlan | None:
    """Return the plan on the machine's first GPU; None when configs/gpus.csv does not have it.

    Raise UserError when the training does not fit.
    """
    gpu = gpu_table.find_gpu(machine.gpu_names[0]) if machine.gpu_names else None
    if not (gpu and work):
        return None
    try:
        return estimate.estimate_on_gpu(gpu, work)
    except UserError as error:
        reason = estimate.shorten_reason(error, work)
        raise UserError(
            f"{config.base.model} on {gpu.name}: {reason}", "`make plan` lists the GPUs that fit", code=error.code
        ) from error


def estimate_work(config: Config, run: Run) -> estimate.Workload | None:
    """Return what the training needs; None for a model that is no plain decoder, whose need is known when it runs."""
    try:
        return estimate.load_workload(config, run)
    except UserError as error:
        hub.print_message(f"plan: {error.message}")
        return None


def submit_job(session: JobSession, job: Job, goal: str, options: LaunchOptions) -> None:
    """Send the job and start `make <goal>`; from then on the session counts as running."""
    provider = session.provider
    hub.print_message(f"{provider.label}: sending {job.commit[:12]}")
    provider.send_job(job)
    variables = job_environment(options)
    hub.print_message(
        f"{provider.label}: starting `make {goal}`"
        + (f", with {', '.join(variables)} of this machine" if variables else "")
    )
    session.is_running = True  # before the call, which may fail after the job has started
    try:
        provider.start_job(job, goal, variables)
    except UserError:
        session.is_running = not provider.is_rented or can_be_running(provider, job.name)
        raise


def can_be_running(provider: Provider, job_name: str) -> bool:
    """Return whether a provider that refused a job may run it all the same."""
    try:
        return provider.read_job_state(job_name).status == "running"
    except UserError:
        return True


def job_environment(options: LaunchOptions) -> dict[str, str]:
    """Return the variables of this machine's environment that the job gets, and the Hub's token."""
    variables = {name: os.environ[name] for name in FORWARDED_VARIABLES if os.environ.get(name)}
    if token := hub.read_token():
        variables["HF_TOKEN"] = token
    return variables | ({"FERRY_DEVICE": "cpu"} if options.device == "cpu" else {})


def wait_for_job(session: JobSession, job: Job, log: Path) -> JobState:
    """Show the job's log until it ends and return its state. Raise UserError when it failed."""
    session.is_running = True
    state = watch_job.watch_until_end(session.provider, job.name, log)
    session.is_running = False
    if state.status == "ended" and state.exit_code == 0:
        return state
    ending = describe_failed_end(state, session.provider.is_rented)
    raise UserError(
        f"`make {state.goal or 'train'}` on {session.provider.label} {ending}; its log is above and in {log}",
        "read the log, then run the same command again: it resumes from the job's records",
        code=JOB_END_CODES.get(state.status, "job.died"),
    )


def describe_failed_end(state: JobState, is_rented: bool) -> str:
    """Return how a job ended that did not end well, as the predicate of a sentence."""
    if state.status == "absent":
        return "no longer exists" if is_rented else "no longer exists, nor does its folder"
    if state.reason:
        return f"ended: {state.reason}"
    if state.status == "ended":
        return f"ended with exit code {state.exit_code}"
    return "ended without an exit code (killed, or the machine was switched off)"


def fetch_job_result(provider: Provider, job: Job, run: Run) -> str:
    """Fetch what the job published, and return the repo that `make deploy-mac` takes. Note rows that differ."""
    if run.is_done("data"):
        remote_record = fetch_result.read_remote_record(provider, job.name, job.run_name, DataRecord)
        for difference in fetch_result.list_row_differences(run.read_record(DataRecord), remote_record):
            hub.print_message(f"note: the rows made there differ from the local ones: {difference}")
    return fetch_result.fetch_published_repo(provider, job.name, job.run_name, Path("hub"))
