"""Hugging Face Jobs on loopback: the endpoints that huggingface_hub's run_job, list_jobs, inspect_job, fetch_job_logs and
cancel_job speak, and a process of this machine for each job.

Written from the client (huggingface_hub 1.33 and 2.4) and its guide. What nobody told is a guess, and the same as in
Kubernetes: a cancelled or timed-out job gets SIGTERM, and SIGKILL when it is still there after a grace.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

TERMINAL = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
KNOWN = {
    "command", "arguments", "environment", "flavor", "secrets", "timeoutSeconds", "labels", "volumes", "dockerImage", "spaceId",
}  # fmt: skip
DEFAULT_TIMEOUT = 30 * 60  # https://huggingface.co/docs/huggingface_hub/guides/jobs


def machine(name: str, pretty: str, disk: str, dollars: float, gpu: tuple | None = None) -> dict:
    part = dict(zip(("model", "vram", "quantity", "manufacturer"), gpu, strict=True)) | {"type": "gpu"} if gpu else None
    return {
        "name": name, "prettyName": pretty, "cpu": "8 vCPU", "ram": "32 GB", "ephemeralStorage": disk, "accelerator": part,
        "unitCostMicroUSD": round(dollars * 1e6 / 60), "unitCostUSD": dollars / 60, "unitLabel": "minute",
    }  # fmt: skip


# Names and kinds of the real ones, round prices.
HARDWARE = [
    machine("cpu-basic", "CPU Basic", "50 GB", 0.01), machine("cpu-upgrade", "CPU Upgrade", "50 GB", 0.03),
    machine("t4-small", "Nvidia T4 - small", "50 GB", 0.40, ("T4", "16 GB", "1", "Nvidia")),
    machine("l4x1", "1x Nvidia L4", "400 GB", 0.80, ("L4", "24 GB", "1", "Nvidia")),
    machine("l4x4", "4x Nvidia L4", "3200 GB", 3.80, ("L4", "24 GB", "4", "Nvidia")),
    machine("a100-large", "Nvidia A100 - large", "1000 GB", 2.50, ("A100", "80 GB", "1", "Nvidia")),
    machine("h200", "Nvidia H200", "3000 GB", 5.00, ("H200", "141 GB", "1", "Nvidia")),
    machine("inf2x6", "AWS Inferentia", "100 GB", 1.00, ("Inferentia2", "32 GB", "1", "AWS")),
]  # fmt: skip


class Job:
    """One, and its process."""

    def __init__(self, folder: Path, owner: str, spec: dict, settings: dict[str, str], waits: float, grace: float):
        self.id, self.owner, self.spec, self.waits, self.grace = uuid.uuid4().hex[:24], owner, spec, waits, grace
        self.stage, self.message, self.created, self.process = "SCHEDULING", None, now(), None
        self.home, self.log = folder / self.id / "home", folder / self.id / "log"
        self.home.mkdir(parents=True)
        self.log.touch()
        self.environment = {"HOME": str(self.home), **settings, **spec["environment"], **spec.get("secrets", {})}
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        time.sleep(self.waits)
        if self.stage != "SCHEDULING":
            return
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.spec["command"] + self.spec["arguments"], cwd="/", env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self.stage = "RUNNING"
            try:
                code = self.process.wait(self.spec.get("timeoutSeconds", DEFAULT_TIMEOUT))
            except subprocess.TimeoutExpired:
                self.end("ERROR", "Job timeout")
                return
            if self.stage == "RUNNING":
                self.message = None if code == 0 else f"Job failed with exit code: {code}"
                self.stage = "COMPLETED" if code == 0 else "ERROR"

    def end(self, stage: str, message: str | None) -> None:
        """As Kubernetes ends a container: its first process is told, then all are killed."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(self.grace)
            self.kill()
        self.stage, self.message = stage, message

    def kill(self) -> None:
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def info(self) -> dict:
        return {
            "id": self.id, "createdAt": self.created, "dockerImage": self.spec.get("dockerImage"), "spaceId": None,
            "command": self.spec["command"], "arguments": self.spec["arguments"], "environment": self.spec["environment"],
            "secrets": {}, "flavor": self.spec["flavor"], "labels": self.spec.get("labels"), "volumes": None,
            "status": {"stage": self.stage, "message": self.message}, "owner": {"id": "1", "name": self.owner, "type": "user"},
            "initiator": {"type": "user", "id": "1", "name": self.owner},
        }  # fmt: skip


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Jobs:
    """All of a server. settings: of the environment of every job, as an image would bring it."""

    def __init__(self, folder: Path):
        self.folder, self.jobs = folder, []
        self.settings: dict[str, str] = {"PATH": os.environ["PATH"]}
        self.waits, self.grace = 0.5, 30.0  # seconds
        self.credit = True

    def of(self, owner: str) -> list[Job]:
        return [job for job in self.jobs if job.owner == owner]

    def close(self) -> None:
        for job in self.jobs:
            job.kill()


class JobAnswers:
    """Handlers of the requests; tests/helpers/hub.py's Answer inherits them."""

    def hardware(self) -> None:
        self.answer(HARDWARE)

    def jobs_owner(self, owner: str) -> None:
        user = self.user()
        if user is None:
            self.deny(401, "Invalid username or password.")
        if owner not in [user["name"], *user.get("orgs", [])] or user["role"] != "write":
            self.deny(403, "Forbidden: you may not run jobs here")

    def run_job(self, owner: str) -> None:
        spec = self.json()
        self.jobs_owner(owner)
        jobs = self.server.jobs
        if not jobs.credit:
            self.deny(402, "Payment required: add credits to run Jobs")
        if strange := set(spec) - KNOWN:
            self.deny(400, f"unknown fields {sorted(strange)}")
        if spec["flavor"] not in [item["name"] for item in HARDWARE]:
            self.deny(400, f"unknown flavor {spec['flavor']}")
        made = Job(jobs.folder, owner, spec, jobs.settings, jobs.waits, jobs.grace)
        jobs.jobs.append(made)
        self.answer(made.info())

    def list_jobs(self, owner: str) -> None:
        self.jobs_owner(owner)
        wanted = [item.split("=", 1) for item in self.queries.get("label", [])]
        found = [job for job in self.server.jobs.of(owner)
                 if all((job.spec.get("labels") or {}).get(key) == value for key, value in wanted)]  # fmt: skip
        self.answer([job.info() for job in reversed(found)])

    def one(self, owner: str, job: str) -> Job:
        self.jobs_owner(owner)
        found = next((item for item in self.server.jobs.of(owner) if item.id == job), None)
        return found or self.deny(404, "Job not found")

    def inspect_job(self, owner: str, job: str) -> None:
        self.answer(self.one(owner, job).info())

    def cancel_job(self, owner: str, job: str) -> None:
        found = self.one(owner, job)
        if found.stage not in TERMINAL:
            found.stage = "CANCELED" if found.process is None else found.stage
            threading.Thread(target=found.end, args=("CANCELED", None), daemon=True).start()
        self.answer(found.info())

    def job_logs(self, owner: str, job: str) -> None:
        """Server-sent events: all lines from the first on, then what comes, until the job ends."""
        found = self.one(owner, job)
        self.begin(200, {"Content-Type": "text/event-stream", "Connection": "close"})
        self.close_connection = True
        self.event(f"===== Job started at {found.created} =====")
        with found.log.open("rb") as log:
            pending = b""
            while True:
                over = found.stage in TERMINAL
                pending += log.read()
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    self.event(line.decode(errors="replace"))
                if over:
                    return
                time.sleep(0.1)

    def event(self, text: str) -> None:
        self.wfile.write(f"data: {json.dumps({'data': text, 'timestamp': now()})}\n\n".encode())
        self.wfile.flush()


OWNER, ONE = r"/api/jobs/(?P<owner>[\w.-]+)", r"/(?P<job>[0-9a-f]{24})"
JOB_ROUTES = [
    ("GET", re.compile("/api/jobs/hardware"), "hardware"), ("POST", re.compile(OWNER), "run_job"),
    ("GET", re.compile(OWNER), "list_jobs"), ("GET", re.compile(OWNER + ONE), "inspect_job"),
    ("POST", re.compile(f"{OWNER}{ONE}/cancel"), "cancel_job"), ("GET", re.compile(f"{OWNER}{ONE}/logs"), "job_logs"),
]  # fmt: skip
