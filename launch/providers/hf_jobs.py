"""The provider Hugging Face Jobs, which needs only a Hub account with credit: https://huggingface.co/docs/hub/jobs

A job is found again by its label, so nothing about it is kept here. The Hub keeps its log. The time limit is set at the
Hub, whose default is 30 minutes, and by `timeout` inside the job, a little earlier, so that the state can be uploaded.
"""

import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from common import hub
from launch import job_script
from launch.provider import Job, Machine, Offer, State
from launch.providers.hub_job import Engine, reached, skipped

LABEL = "ferry-run"
WAITING = ("SCHEDULING", "UPDATING")
ENDS = {"COMPLETED": 0, "ERROR": 1}
PERIODS = {"minute": 60, "hour": 1, "second": 3600}  # how many of them are an hour
POLL = 5  # seconds between two requests for the stage of a job that waits for its instance


class HfJobs(Engine):
    """Runs jobs on Hugging Face Jobs."""

    def __init__(self, checkpoints: str, namespace: str | None = None):
        """namespace: the account that pays; None for the user of the token."""
        super().__init__("Hugging Face Jobs", checkpoints)
        self.namespace = namespace

    def look(self) -> Machine:
        offered = reached(
            lambda: hub.patiently("the hardware of Hugging Face Jobs", hub.api().list_jobs_hardware, seconds=hub.QUICK)
        )
        offers = tuple(filter(None, map(offer, offered)))
        return Machine("Linux x86_64", 0, tuple(item.card for item in offers if item.card), offers=offers)

    def start(self, job: Job, goal: str, secrets: dict[str, str]) -> None:
        if self.found(job.name).word == "running":
            return
        made = self.task(job, goal, secrets)

        def run_job():
            return hub.api().run_job(**self.request(made))

        info = reached(lambda: hub.patiently(f"the job {job.name} to Hugging Face Jobs", run_job, seconds=0))
        hub.say(f"{self.where}: {info.url}")

    def request(self, made: job_script.Task) -> dict:
        """Return the arguments of huggingface_hub's run_job."""
        return {
            "image": made.order.image,
            "command": ["sh", "-c", made.line],
            "env": made.environment,
            "secrets": made.secrets,
            "flavor": made.order.offer.name,
            "timeout": made.order.seconds,
            "labels": {LABEL: made.name, "name": made.name},
            "namespace": self.namespace,
        }

    def found(self, name: str) -> State:
        job = self.job(name)
        if job is None:
            return State()
        stage = str(getattr(job.status.stage, "value", job.status.stage))
        why = " ".join(filter(None, (stage.lower(), job.status.message)))
        if stage in ENDS:
            return State("ended", ENDS[stage], why=why)
        return State("died" if stage in ("CANCELED", "DELETED") else "running", why=why)

    def job(self, name: str):
        """Return the newest job of that name as huggingface_hub describes it, or None."""
        api = hub.api()
        asked = lambda: list(api.list_jobs(labels={LABEL: name}, namespace=self.namespace))
        jobs = reached(lambda: hub.patiently("the jobs of Hugging Face Jobs", asked, seconds=hub.QUICK))
        return max(
            (job for job in jobs if (job.labels or {}).get(LABEL) == name), key=lambda job: job.created_at, default=None
        )

    def follow(self, name: str, seen: int, out: Callable[[bytes], object]) -> None:
        said = None
        while (job := self.job(name)) and (stage := str(job.status.stage)) in WAITING:
            if stage != said:
                hub.say(f"{self.where}: {stage.lower()}, {job.url}")
            said = stage
            time.sleep(POLL)
        for block in skipped(self.log(name, follow=True), seen):
            out(block)

    def log(self, name: str, follow: bool) -> Iterator[bytes]:
        job, api = self.job(name), hub.api()
        if job is None:
            return
        lines = beside(api.fetch_job_logs(job_id=job.id, namespace=job.owner.name, follow=follow))
        while (
            line := reached(lambda: hub.patiently("the log of the job", lambda: next(lines, None), seconds=0))
        ) is not None:
            yield line.rstrip("\n").encode() + b"\n"

    def stop(self, name: str) -> None:
        job = self.job(name)
        if job:
            cancel = lambda: hub.api().cancel_job(job_id=job.id, namespace=job.owner.name)
            reached(lambda: hub.patiently(f"cancel {job.url}", cancel, seconds=hub.QUICK))

    def bill(self, name: str, running: bool) -> str:
        if running:
            return "It bills by the minute until it ends, at its time limit at the latest (`hf jobs ls`)"
        return f"Nothing of it bills there; {self.kept(name)}"


def beside(lines: Iterable[str]) -> Iterator[str]:
    """Yield the same lines, read by a thread: in the main thread the client takes Ctrl-C for the end of the log."""
    read: queue.Queue = queue.Queue()

    def reader() -> None:
        try:
            for line in lines:
                read.put(line)
            read.put(None)
        except Exception as error:  # noqa: BLE001 raised again where the lines are read
            read.put(error)

    threading.Thread(target=reader, daemon=True).start()
    while (found := read.get()) is not None:
        if isinstance(found, Exception):
            raise found
        yield found


def offer(hardware) -> Offer | None:
    """Return the type of instance of an entry in the Hub's list of hardware.

    None for what Ferry does not train on: more than one GPU, a GPU that is not NVIDIA's, a price by an unknown unit.
    """
    part = hardware.accelerator
    card = f"{part.model} {part.vram.replace(' ', '')}" if part else ""
    if hardware.unit_label not in PERIODS or (part and (part.quantity != "1" or part.manufacturer.lower() != "nvidia")):
        return None
    return Offer(
        hardware.name, card, hardware.unit_cost_usd * PERIODS[hardware.unit_label], size(hardware.ephemeral_storage)
    )


def size(text: str) -> int | None:
    """Return the bytes of a text such as '100 GB'; None when it has another form."""
    said = re.fullmatch(r"([\d.]+) *([GT])B", text)
    return int(float(said[1]) * {"G": 1e9, "T": 1e12}[said[2]]) if said else None
