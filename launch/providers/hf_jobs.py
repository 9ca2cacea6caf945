"""The provider Hugging Face Jobs, which needs only a Hub account with credit.

https://huggingface.co/docs/hub/jobs describes it.

A job is found again by its label, so nothing about it is kept here. The Hub keeps its log. The time limit is set at the
Hub, whose default is 30 minutes, and by `timeout` inside the job, a little earlier, so that the state can be uploaded.
"""

import functools
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from common import hub
from launch import job_script
from launch.provider import InstanceType, Job, JobState, Machine
from launch.providers.hub_job import HubJobProvider, T, call_hub, skip_bytes

if TYPE_CHECKING:
    from huggingface_hub import JobHardwareInfo, JobInfo

RUN_LABEL = "ferry-run"
WAITING_STAGES = ("SCHEDULING", "UPDATING")
EXIT_CODES = {"COMPLETED": 0, "ERROR": 1}
PERIODS_PER_HOUR = {"minute": 60, "hour": 1, "second": 3600}  # how many of them are an hour
POLL_SECONDS = 5  # seconds between two requests for the stage of a job that waits for its instance


class HfJobsProvider(HubJobProvider):
    """Runs jobs on Hugging Face Jobs."""

    def __init__(self, checkpoints: str, namespace: str | None = None):
        """namespace: the account that pays; None for the user of the token."""
        super().__init__("Hugging Face Jobs", checkpoints)
        self.namespace = namespace

    def inspect_machine(self) -> Machine:
        list_hardware = hub.create_client().list_jobs_hardware
        hardware = call_jobs_api("the hardware of Hugging Face Jobs", list_hardware)
        instance_types = tuple(filter(None, map(parse_hardware, hardware)))
        gpu_names = tuple(filter(None, (instance_type.gpu_name for instance_type in instance_types)))
        return Machine("Linux x86_64", 0, gpu_names, instance_types=instance_types)

    def start_job(self, job: Job, goal: str, environment: dict[str, str]) -> None:
        if self.read_provider_state(job.name).status == "running":
            return
        arguments = self.run_job_arguments(self.build_task(job, goal, environment))
        run_job = functools.partial(hub.create_client().run_job, **arguments)
        info = call_jobs_api(f"the job {job.name} to Hugging Face Jobs", run_job, retry_seconds=0)
        hub.print_message(f"{self.label}: {info.url}")

    def run_job_arguments(self, task: job_script.JobTask) -> dict[str, Any]:
        """Return the arguments of huggingface_hub's run_job."""
        return {
            "image": task.instance_request.image,
            "command": ["sh", "-c", task.command_line],
            "env": task.environment,
            "secrets": task.secrets,
            "flavor": task.instance_request.instance_type.name,
            "timeout": task.instance_request.timeout_seconds,
            "labels": {RUN_LABEL: task.name, "name": task.name},
            "namespace": self.namespace,
        }

    def read_provider_state(self, job_name: str) -> JobState:
        job = self.find_job(job_name)
        if job is None:
            return JobState()
        stage = find_stage(job)
        reason = " ".join(filter(None, (stage.lower(), job.status.message)))
        if stage in EXIT_CODES:
            return JobState("ended", EXIT_CODES[stage], reason=reason)
        return JobState("died" if stage in ("CANCELED", "DELETED") else "running", reason=reason)

    def find_job(self, job_name: str) -> "JobInfo | None":
        """Return the newest job of that name as huggingface_hub describes it, or None."""
        api = hub.create_client()

        def list_jobs() -> list["JobInfo"]:
            return list(api.list_jobs(labels={RUN_LABEL: job_name}, namespace=self.namespace))

        jobs = call_jobs_api("the jobs of Hugging Face Jobs", list_jobs)
        own_jobs = [job for job in jobs if (job.labels or {}).get(RUN_LABEL) == job_name]
        return max(own_jobs, key=lambda job: job.created_at.timestamp() if job.created_at else 0.0, default=None)

    def follow_log(self, job_name: str, offset: int, write: Callable[[bytes], object]) -> None:
        shown_stage = None
        while (job := self.find_job(job_name)) and (stage := find_stage(job)) in WAITING_STAGES:
            if stage != shown_stage:
                hub.print_message(f"{self.label}: {stage.lower()}, {job.url}")
            shown_stage = stage
            time.sleep(POLL_SECONDS)
        for block in skip_bytes(self.stream_log(job_name, follow=True), offset):
            write(block)

    def stream_log(self, job_name: str, follow: bool) -> Iterator[bytes]:
        job, api = self.find_job(job_name), hub.create_client()
        if job is None:
            return
        lines = read_in_thread(api.fetch_job_logs(job_id=job.id, namespace=job.owner.name, follow=follow))
        while (line := call_jobs_api("the log of the job", lambda: next(lines, None), retry_seconds=0)) is not None:
            yield line.rstrip("\n").encode() + b"\n"

    def stop_job(self, job_name: str) -> None:
        if job := self.find_job(job_name):
            cancel_job = functools.partial(hub.create_client().cancel_job, job_id=job.id, namespace=job.owner.name)
            call_jobs_api(f"cancel {job.url}", cancel_job)

    def describe_costs(self, job_name: str, is_running: bool) -> str:
        if is_running:
            return "It bills by the minute until it ends, at its time limit at the latest (`hf jobs ls`)"
        return f"Nothing is billed for it now; {self.describe_kept_repos(job_name)}"


def call_jobs_api(action: str, call: Callable[[], T], retry_seconds: float = hub.QUICK_RETRY_SECONDS) -> T:
    """Return `call()` with retries. Raise ConnectionLost when the Hub cannot be reached now."""
    return call_hub(lambda: hub.retry(action, call, retry_seconds=retry_seconds))


def find_stage(job: "JobInfo") -> str:
    """Return the stage of a job, such as 'RUNNING': huggingface_hub passes on what the Hub says, text or member."""
    return str(getattr(job.status.stage, "value", job.status.stage))


def read_in_thread(lines: Iterable[str]) -> Iterator[str]:
    """Yield the same lines, read by a thread: in the main thread the client takes Ctrl-C for the end of the log."""
    line_queue: queue.Queue[str | Exception | None] = queue.Queue()

    def fill_queue() -> None:
        try:
            for line in lines:
                line_queue.put(line)
            line_queue.put(None)
        except Exception as error:  # noqa: BLE001 raised again where the lines are read
            line_queue.put(error)

    threading.Thread(target=fill_queue, daemon=True).start()
    while (item := line_queue.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item


def parse_hardware(hardware: "JobHardwareInfo") -> InstanceType | None:
    """Return the type of instance of an entry in the Hub's list of hardware.

    None for what Ferry does not train on: more than one GPU, a GPU that is not NVIDIA's, a price by an unknown unit.
    """
    accelerator = hardware.accelerator
    gpu_name = f"{accelerator.model} {accelerator.vram.replace(' ', '')}" if accelerator else ""
    if hardware.unit_label not in PERIODS_PER_HOUR or (
        accelerator and (accelerator.quantity != "1" or accelerator.manufacturer.lower() != "nvidia")
    ):
        return None
    return InstanceType(
        hardware.name,
        gpu_name,
        hardware.unit_cost_usd * PERIODS_PER_HOUR[hardware.unit_label],
        parse_size(hardware.ephemeral_storage),
    )


def parse_size(text: str) -> int | None:
    """Return the bytes of a text such as '100 GB'; None when it has another form."""
    match = re.fullmatch(r"([\d.]+) *([GT])B", text)
    return int(float(match[1]) * {"G": 1e9, "T": 1e12}[match[2]]) if match else None
