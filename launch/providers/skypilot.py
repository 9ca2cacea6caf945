"""The provider SkyPilot, by the user's own `sky` (FERRY_SKY names another command): https://docs.skypilot.co

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

import yaml

from common import files, hub
from common.errors import UserError, shown
from launch import job_script
from launch.provider import Job, Lost, Machine, Offer, State, program
from launch.providers.hub_job import Engine, skipped

IDLE = 10  # minutes until the autostop takes down a cluster whose job has ended, if we have not done so before
UNKNOWN = r"No in-progress managed jobs|does not exist|ClusterNotUp"
# What SkyPilot puts before each line of a job's own output.
OURS = re.compile(rb"^(\x1b\[\d*m)*\([^)]*pid=\d+\)(\x1b\[\d*m)* ?")
# Installs what `make env` needs, on an image that lacks it.
SETUP = """\
lacks() { ! command -v make || ! command -v g++ || \
! python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'; }
if lacks >/dev/null 2>&1; then
    as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
    as_root apt-get update -q && as_root apt-get install -y -q make g++ python3 python3-venv python3-dev
fi
"""


class Sky(Engine):
    """Runs jobs by SkyPilot, on a cluster for each job or as managed spot jobs."""

    def __init__(self, checkpoints: str, infra: str, spot: bool, folder: Path):
        """Set where and how jobs run.

        Args:
            checkpoints: owner/name of the repo that gets what the run makes.
            infra: 'aws', 'aws/us-east-1', ... as SkyPilot names it; empty for the cheapest one.
            spot: Whether jobs are managed jobs on spot instances.
            folder: The folder for the task's YAML file.
        """
        super().__init__(f"SkyPilot{f' on {infra}' if infra else ''}", checkpoints)
        self.infra, self.spot, self.folder, self.there = infra, spot, folder, False

    def look(self) -> Machine:
        clouds = sorted({name.lower() for names in self._json("check", "-o", "json").values() for name in names})
        wanted = [self.infra] if self.infra else clouds
        if self.infra.split("/")[0] not in ("", *clouds):
            raise UserError(
                f"SkyPilot has no access to {self.infra}; it has to {', '.join(clouds) or 'no cloud'}",
                "`sky check` says what lacks",
            )
        if not wanted:
            raise UserError("SkyPilot has access to no cloud", "`sky check` says what lacks")
        offers = [Offer("CPU", "", None)]
        for place in wanted:
            offers += offered(self._json("gpus", "list", "--all", "--infra", place, "-o", "json"), self.spot)
        return Machine("Linux x86_64", 0, tuple(item.card for item in offers if item.card), offers=cheapest(offers))

    def start(self, job: Job, goal: str, secrets: dict[str, str]) -> None:
        if self.found(job.name).word == "running":
            return
        made, file = self.task(job, goal, secrets), self.folder / "sky.yaml"
        with files.writing(file) as part:
            part.write_text(yaml.safe_dump(request(made, self.infra), sort_keys=False), encoding="utf-8")
        # by name, so no argument has the value
        given = [word for name in made.secrets for word in ("--secret", name)]
        rehearsed = self._call(
            "launch", "-c", cluster(job.name), "--dryrun", "-y", str(file), *given, secrets=made.secrets
        )
        if rehearsed.returncode:
            raise UserError(
                f"{self.where}: {last(rehearsed)}",
                f"`sky launch --dryrun {file}` says more; SET, GPU= or HOURS= change what is asked for",
            )
        self.there = True
        words = (
            ["jobs", "launch", "-n", cluster(job.name)]
            if self.spot
            else ["launch", "-c", cluster(job.name), "-i", str(IDLE), "--down"]
        )
        done = self._told(*words, "-y", "-d", str(file), *given, secrets=made.secrets)
        if done.returncode:
            raise UserError(
                f"{self.where} does not start it: {last(done)}", "see what SkyPilot says above, then the same command"
            )

    def found(self, name: str) -> State:
        job = self._job(name)
        if job is None:
            return State()
        self.there, status = True, job["status"]
        why = " ".join(filter(None, (status.lower(), job.get("failure_reason"))))
        if status == "SUCCEEDED" or status.startswith("FAILED"):
            return State("ended", int(status != "SUCCEEDED"), why=why)
        return State("died" if status == "CANCELLED" else "running", why=why)

    def _job(self, name: str) -> dict | None:
        """Return the newest job of that name as SkyPilot's JSON describes it, or None."""
        words = ["jobs", "queue", "-a", "-v"] if self.spot else ["queue", cluster(name)]
        said = self._json(*words, "-o", "json", absent=UNKNOWN)
        jobs = said if isinstance(said, list) else (said or {}).get(cluster(name), [])
        return max(
            (job for job in jobs if not self.spot or job["job_name"] == cluster(name)),
            key=lambda job: job["job_id"],
            default=None,
        )

    def follow(self, name: str, seen: int, out: Callable[[bytes], object]) -> None:
        job = self._job(name) or {}
        # The log of a job on its second instance begins anew.
        for block in skipped(self.log(name, follow=True), 0 if job.get("recovery_count") else seen):
            out(block)

    def log(self, name: str, follow: bool) -> Iterator[bytes]:
        job = self._job(name)
        if job is None:
            return
        words = ["jobs", "logs", str(job["job_id"])] if self.spot else ["logs", cluster(name), str(job["job_id"])]
        process = self._open(*words, "--follow" if follow else "--no-follow", stderr=subprocess.DEVNULL)
        try:
            for row in process.stdout:
                if found := OURS.match(row):  # other lines are SkyPilot's own
                    yield row[found.end() :]
        finally:
            process.kill()
            process.wait()

    def stop(self, name: str) -> None:
        job = self._job(name)
        if job:
            words = ["jobs", "cancel", "-y"] if self.spot else ["cancel", "-y", cluster(name)]
            done = self._call(*words, str(job["job_id"]))
            if done.returncode:
                raise UserError(f"{self.where} does not cancel {name}: {last(done)}", "the same command again")

    def teardown(self, name: str) -> str | None:
        return f"{shlex.join(sky())} down -y {cluster(name)}" if self.there and not self.spot else None

    def bill(self, name: str, running: bool) -> str:
        if running and self.spot:
            return "It bills until it ends, at its time limit at the latest (`sky jobs queue`)"
        if running:
            return (
                "It bills until it ends, at its time limit at the latest; "
                f"its cluster goes {IDLE} idle minutes after (`sky status`)"
            )
        beside = (
            "SkyPilot's controller of managed jobs bills until it is idle for ten minutes "
            "(on clouds that cannot stop a machine, until `sky down` ends it; `sky status`); "
            if self.spot
            else ""
        )
        return f"{beside}{self.kept(name)}"

    def _json(self, *words: str, absent: str | None = None):
        """Run `sky` and return the JSON in its output, without the text before it.

        Return None when it fails with an error that matches `absent_pattern`: there is no such job or cluster.
        """
        done = self._call(*words)
        if done.returncode and absent and re.search(absent, done.stdout + done.stderr):
            return None
        if done.returncode:
            raise Lost(f"sky {words[0]}: {last(done)}", "see that `sky status` works, then the same command")
        start = re.search(r"^[\[{]", done.stdout, re.MULTILINE)
        try:
            return json.loads(done.stdout[start.start() if start else 0 :])
        except ValueError as error:
            raise UserError(
                f"sky {' '.join(words)} says no JSON: {error}",
                "Ferry was made for SkyPilot 0.14: see `sky --version`",
            ) from None

    def _call(self, *words: str, secrets: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        """Run `sky` and return its exit code and output."""
        process = self._open(*words, stderr=subprocess.PIPE, secrets=secrets)
        out, err = (text.decode(errors="replace") for text in process.communicate())
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def _told(self, *words: str, secrets: dict[str, str]) -> subprocess.CompletedProcess:
        """Run `sky` and also print its output as it comes, because finding an instance takes minutes."""
        process, rows = self._open(*words, stderr=subprocess.STDOUT, secrets=secrets), []
        for row in process.stdout:
            rows.append(row.decode(errors="replace").rstrip())
            hub.say(rows[-1])
        return subprocess.CompletedProcess(words, process.wait(), "\n".join(rows), "")

    def _open(self, *words: str, stderr: int, secrets: dict[str, str] | None = None) -> subprocess.Popen:
        """Start `sky` with the secrets in its environment, in a session of its own: Ctrl-C is handled by Ferry."""
        settings = os.environ | (secrets or {})
        try:
            return subprocess.Popen(
                [*sky(), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=settings,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(
                f"{sky()[0]} cannot be started: {error.strerror}",
                "install SkyPilot in an environment of its own: "
                "pipx install 'skypilot[aws]' (or gcp, runpod, ...), then `sky check`",
            ) from None


def sky() -> list[str]:
    """Return the words of the user's `sky` command."""
    return program("FERRY_SKY", "sky")


def cluster(name: str) -> str:
    """Return a cluster name that every cloud takes and no other run has: `tickets.v2` and `tickets-v2` are two runs."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"ferry-{plain}" if plain == name else "-".join(filter(None, ("ferry", plain, digest)))


def request(made: job_script.Task, infra: str) -> dict:
    """Return the task for SkyPilot's YAML file. It names the secrets; their values are passed by --secret."""
    order = made.order
    asked = {"infra": infra} if infra else {}
    asked |= {"accelerators": {order.offer.name: 1}} if order.offer.card else {"cpus": "4+", "memory": "16+"}
    asked |= {"disk_size": -(-order.disk // 10**9), "image_id": f"docker:{order.image}", "use_spot": order.spot}
    asked |= {"job_recovery": {"strategy": "EAGER_NEXT_REGION"}} if order.spot else {}
    return {
        "name": cluster(made.name),
        "resources": asked,
        "envs": made.environment,
        "secrets": dict.fromkeys(made.secrets),
        "setup": SETUP,
        "run": made.line,
    }


def offered(listed: dict, spot: bool) -> list[Offer]:
    """Return the types of instances with one GPU in the output of `sky gpus list`."""
    price = "spot_price" if spot else "price"
    rows = [
        (name, row.get(price))
        for name, rows in listed.items()
        if isinstance(rows, list)
        for row in rows
        if isinstance(row, dict) and row.get("accelerator_count") == 1
    ]
    # on demand an instance may have no price, as in one's own cluster; without a spot price there is no spot instance
    return [
        Offer(name, card(name), float(dollars) if dollars else None) for name, dollars in rows if dollars or not spot
    ]


def card(name: str) -> str:
    """Return the name that configs/gpus.csv would have for SkyPilot's name of a GPU."""
    return {"A100": "A100 40GB"}.get(name, re.sub(r"^RTX(?=[A\d])", "RTX ", name))


def cheapest(offers: list[Offer]) -> tuple[Offer, ...]:
    """Return one type of instance for each name: the cheapest."""
    best: dict[str, Offer] = {}
    for item in offers:
        if item.name not in best or (item.dollars or 0) < (best[item.name].dollars or 0):
            best[item.name] = item
    return tuple(best.values())


def last(done: subprocess.CompletedProcess) -> str:
    """Return the last line of a command's output that is not empty, for a message."""
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    return shown(re.sub(r"\x1b\[[\d;]*m", "", lines[-1])) if lines else f"exit code {done.returncode}"
