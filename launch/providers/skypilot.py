"""The provider SkyPilot, by the user's own `sky` (FERRY_SKY names another command).

https://docs.skypilot.co describes it.

With SPOT=1 the job is a managed job, which SkyPilot starts again elsewhere when its instance is taken away. Without it
the job has a cluster of its own, which is taken down when the job ends, by us or by its autostop. SkyPilot chooses the
cloud.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from common import files, hub
from common.child_process import require_pipe
from common.errors import UserError, printable_line
from launch import job_script
from launch.provider import ConnectionLost, InstanceRequest, InstanceType, Job, JobState, Machine, command_words
from launch.providers.hub_job import HubJobProvider, skip_bytes

IDLE_MINUTES = 10  # minutes until the autostop takes down a cluster whose job has ended, if we have not done so before
UNKNOWN_JOB_PATTERN = r"No in-progress managed jobs|does not exist|ClusterNotUp"
# What SkyPilot puts before each line of a job's own output.
JOB_LINE_PREFIX = re.compile(rb"^(\x1b\[\d*m)*\([^)]*pid=\d+\)(\x1b\[\d*m)* ?")
# Installs what `make env` needs, on an image that lacks it.
SETUP_SCRIPT = """\
lacks() { ! command -v make || ! command -v g++ || \
! python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'; }
if lacks >/dev/null 2>&1; then
    as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
    as_root apt-get update -q && as_root apt-get install -y -q make g++ python3 python3-venv python3-dev
fi
"""


class SkyPilotProvider(HubJobProvider):
    """Runs jobs by SkyPilot, on a cluster for each job or as managed spot jobs."""

    def __init__(self, checkpoints: str, infra: str, spot: bool, folder: Path):
        """Set where and how jobs run.

        checkpoints: owner/name of the repo that gets what the run makes. infra: 'aws', 'aws/us-east-1', ... as SkyPilot
        names it; empty for the cheapest one. folder: for the task's YAML file.
        """
        super().__init__(f"SkyPilot{f' on {infra}' if infra else ''}", checkpoints)
        self.infra, self.spot, self.folder, self.has_job = infra, spot, folder, False

    def inspect_machine(self) -> Machine:
        instance_types = [InstanceType("CPU", "", None)]
        for infra in self._list_infras():
            gpu_list = self._read_json("gpus", "list", "--all", "--infra", infra, "-o", "json")
            instance_types += parse_gpu_list(gpu_list, self.spot)
        gpu_names = tuple(filter(None, (instance_type.gpu_name for instance_type in instance_types)))
        return Machine("Linux x86_64", 0, gpu_names, instance_types=keep_cheapest(instance_types))

    def _list_infras(self) -> list[str]:
        """Return the infra that was typed, else all clouds. Raise UserError when SkyPilot has no access to it."""
        clouds = sorted({name.lower() for names in self._read_json("check", "-o", "json").values() for name in names})
        if self.infra.split("/")[0] not in ("", *clouds):
            raise UserError(
                f"SkyPilot has no access to {self.infra}; it has access to {', '.join(clouds) or 'no cloud'}",
                "`sky check` shows what is missing",
                code="sky.no_access",
            )
        if not clouds and not self.infra:
            raise UserError(
                "SkyPilot has no access to any cloud", "`sky check` shows what is missing", code="sky.no_cloud"
            )
        return [self.infra] if self.infra else clouds

    def start_job(self, job: Job, goal: str, environment: dict[str, str]) -> None:
        if self.read_provider_state(job.name).status == "running":
            return
        task, task_file = self.build_task(job, goal, environment), self.folder / "sky.yaml"
        with files.write_atomically(task_file) as part:
            part.write_text(yaml.safe_dump(build_sky_task(task, self.infra), sort_keys=False), encoding="utf-8")
        # by name, so no argument has the value
        secret_options = [word for name in task.secrets for word in ("--secret", name)]
        cluster = cluster_name(job.name)
        words = ["launch", "-c", cluster, "--dryrun", "-y", str(task_file), *secret_options]
        dry_run = self._run_sky(*words, secrets=task.secrets)
        if dry_run.returncode:
            raise UserError(
                f"{self.label}: {last_line(dry_run)}",
                f"`sky launch --dryrun {task_file}` shows more; SET=, GPU= and HOURS= change the request",
                code="sky.task_refused",
            )
        self.has_job = True
        words = ["launch", "-c", cluster, "-i", str(IDLE_MINUTES), "--down"]
        if self.spot:
            words = ["jobs", "launch", "-n", cluster]
        result = self._run_sky_and_show(*words, "-y", "-d", str(task_file), *secret_options, secrets=task.secrets)
        if result.returncode:
            raise UserError(
                f"{self.label} did not start {job.name}: {last_line(result)}",
                "read SkyPilot's output above, then run the same command again",
                code="sky.launch_failed",
            )

    def read_provider_state(self, job_name: str) -> JobState:
        job = self._find_job(job_name)
        if job is None:
            return JobState()
        self.has_job, status = True, job["status"]
        reason = " ".join(filter(None, (status.lower(), job.get("failure_reason"))))
        if status == "SUCCEEDED" or status.startswith("FAILED"):
            return JobState("ended", int(status != "SUCCEEDED"), reason=reason)
        return JobState("died" if status == "CANCELLED" else "running", reason=reason)

    def _find_job(self, job_name: str) -> dict[str, Any] | None:
        """Return the newest job of that name as SkyPilot's JSON describes it, or None."""
        name = cluster_name(job_name)
        words = ["jobs", "queue", "-a", "-v"] if self.spot else ["queue", name]
        queue = self._read_json(*words, "-o", "json", absent_pattern=UNKNOWN_JOB_PATTERN)
        jobs = queue if isinstance(queue, list) else (queue or {}).get(name, [])
        own_jobs = [job for job in jobs if not self.spot or job["job_name"] == name]
        return max(own_jobs, key=lambda job: job["job_id"], default=None)

    def follow_log(self, job_name: str, offset: int, write: Callable[[bytes], object]) -> None:
        job = self._find_job(job_name) or {}
        # The log of a job on its second instance begins anew.
        for block in skip_bytes(self.stream_log(job_name, follow=True), 0 if job.get("recovery_count") else offset):
            write(block)

    def stream_log(self, job_name: str, follow: bool) -> Iterator[bytes]:
        job = self._find_job(job_name)
        if job is None:
            return
        words = ["jobs", "logs"] if self.spot else ["logs", cluster_name(job_name)]
        words += [str(job["job_id"]), "--follow" if follow else "--no-follow"]
        process = self._start_sky(*words, stderr=subprocess.DEVNULL)
        try:
            for row in require_pipe(process.stdout):
                if match := JOB_LINE_PREFIX.match(row):  # other lines are SkyPilot's own
                    yield row[match.end() :]
        finally:
            process.kill()
            process.wait()

    def stop_job(self, job_name: str) -> None:
        job = self._find_job(job_name)
        if not job:
            return
        words = ["jobs", "cancel", "-y"] if self.spot else ["cancel", "-y", cluster_name(job_name)]
        result = self._run_sky(*words, str(job["job_id"]))
        if result.returncode:
            message = f"{self.label} did not cancel {job_name}: {last_line(result)}"
            raise UserError(message, "run the same command again", code="sky.cancel_failed")

    def teardown_command(self, job_name: str) -> str | None:
        if self.spot or not self.has_job:
            return None
        return f"{shlex.join(sky_command())} down -y {cluster_name(job_name)}"

    def describe_costs(self, job_name: str, is_running: bool) -> str:
        if is_running and self.spot:
            return "It bills until it ends, at its time limit at the latest (`sky jobs queue`)"
        if is_running:
            return (
                "It bills until it ends, at its time limit at the latest; "
                f"its cluster is taken down {IDLE_MINUTES} idle minutes later (`sky status`)"
            )
        controller_note = (
            "SkyPilot's controller of managed jobs bills until it is idle for ten minutes "
            "(on clouds that cannot stop a machine, until `sky down` ends it; `sky status`); "
            if self.spot
            else ""
        )
        return f"{controller_note}{self.describe_kept_repos(job_name)}"

    def _read_json(self, *words: str, absent_pattern: str | None = None) -> Any:
        """Run `sky` and return the JSON in its output, without the text before it.

        Return None when it fails with an error that matches `absent_pattern`: there is no such job or cluster.
        """
        result = self._run_sky(*words)
        if result.returncode and absent_pattern and re.search(absent_pattern, result.stdout + result.stderr):
            return None
        if result.returncode:
            raise ConnectionLost(
                f"sky {words[0]}: {last_line(result)}",
                "check that `sky status` works, then run the same command again",
                code="sky.command_failed",
            )
        json_start = re.search(r"^[\[{]", result.stdout, re.MULTILINE)
        try:
            return json.loads(result.stdout[json_start.start() if json_start else 0 :])
        except ValueError as error:
            raise UserError(
                f"the output of `sky {' '.join(words)}` is not JSON: {error}",
                "Ferry supports SkyPilot 0.14: compare `sky --version`",
                code="sky.invalid_output",
            ) from None

    def _run_sky(self, *words: str, secrets: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run `sky` and return its exit code and output."""
        process = self._start_sky(*words, stderr=subprocess.PIPE, secrets=secrets)
        stdout, stderr = (text.decode(errors="replace") for text in process.communicate())
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    def _run_sky_and_show(self, *words: str, secrets: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run `sky` and also print its output as it comes, because finding an instance takes minutes."""
        process = self._start_sky(*words, stderr=subprocess.STDOUT, secrets=secrets)
        lines: list[str] = []
        for line in require_pipe(process.stdout):
            lines.append(line.decode(errors="replace").rstrip())
            hub.print_message(lines[-1])
        return subprocess.CompletedProcess(words, process.wait(), "\n".join(lines), "")

    def _start_sky(self, *words: str, stderr: int, secrets: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start `sky` with the secrets in its environment, in a session of its own: Ctrl-C is handled by Ferry."""
        environment = os.environ | (secrets or {})
        try:
            return subprocess.Popen(
                [*sky_command(), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(
                f"cannot start {sky_command()[0]}: {error.strerror}",
                "install SkyPilot in an environment of its own: "
                "pipx install 'skypilot[aws]' (or gcp, runpod, ...), then `sky check`",
                code="sky.not_installed",
            ) from None


def sky_command() -> list[str]:
    """Return the words of the user's `sky` command."""
    return command_words("FERRY_SKY", "sky")


def cluster_name(job_name: str) -> str:
    """Return a cluster name that every cloud takes and no other run has: `tickets.v2` and `tickets-v2` are two runs."""
    plain = re.sub(r"[^a-z0-9-]+", "-", job_name.lower()).strip("-")
    digest = hashlib.sha256(job_name.encode()).hexdigest()[:6]
    return f"ferry-{plain}" if plain == job_name else "-".join(filter(None, ("ferry", plain, digest)))


def build_sky_task(task: job_script.JobTask, infra: str) -> dict[str, Any]:
    """Return the task for SkyPilot's YAML file. It names the secrets; their values are passed by --secret."""
    return {
        "name": cluster_name(task.name),
        "resources": build_sky_resources(task.instance_request, infra),
        "envs": task.environment,
        "secrets": dict.fromkeys(task.secrets),
        "setup": SETUP_SCRIPT,
        "run": task.command_line,
    }


def build_sky_resources(request: InstanceRequest, infra: str) -> dict[str, Any]:
    """Return the instance that SkyPilot's task asks for."""
    resources: dict[str, Any] = {"infra": infra} if infra else {}
    if request.instance_type.gpu_name:
        resources |= {"accelerators": {request.instance_type.name: 1}}
    else:
        resources |= {"cpus": "4+", "memory": "16+"}
    disk_gb = -(-request.disk_bytes // 10**9)
    resources |= {"disk_size": disk_gb, "image_id": f"docker:{request.image}", "use_spot": request.spot}
    return resources | ({"job_recovery": {"strategy": "EAGER_NEXT_REGION"}} if request.spot else {})


def parse_gpu_list(gpu_list: dict[str, Any], spot: bool) -> list[InstanceType]:
    """Return the types of instances with one GPU in the output of `sky gpus list`."""
    price_key = "spot_price" if spot else "price"
    rows = [
        (name, row.get(price_key))
        for name, rows in gpu_list.items()
        if isinstance(rows, list)
        for row in rows
        if isinstance(row, dict) and row.get("accelerator_count") == 1
    ]
    # on demand an instance may have no price, as in one's own cluster; without a spot price there is no spot instance
    return [
        InstanceType(name, gpu_table_name(name), float(dollars) if dollars else None)
        for name, dollars in rows
        if dollars or not spot
    ]


def gpu_table_name(name: str) -> str:
    """Return the name that configs/gpus.csv would have for SkyPilot's name of a GPU."""
    return {"A100": "A100 40GB"}.get(name, re.sub(r"^RTX(?=[A\d])", "RTX ", name))


def keep_cheapest(instance_types: list[InstanceType]) -> tuple[InstanceType, ...]:
    """Return one type of instance for each name: the cheapest."""
    best: dict[str, InstanceType] = {}
    for instance_type in instance_types:
        cheapest = best.setdefault(instance_type.name, instance_type)
        if (instance_type.dollars_per_hour or 0) < (cheapest.dollars_per_hour or 0):
            best[instance_type.name] = instance_type
    return tuple(best.values())


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a command's output that is not empty, for a message."""
    lines = [line for line in (result.stdout + "\n" + result.stderr).splitlines() if line.strip()]
    return printable_line(re.sub(r"\x1b\[[\d;]*m", "", lines[-1])) if lines else f"exit code {result.returncode}"
