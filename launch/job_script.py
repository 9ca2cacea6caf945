"""A job as any engine can run it: one line for a shell on a bare machine, its environment, its secrets, its time limit.

All that is large goes through the Hub: the tree and private data lie in a private data set repo (you/<run>-job), what the
run makes goes to a private repo (you/<run>-checkpoints). So no engine needs storage of its own, and a machine that takes
another one's place begins where that one was.
"""

import shlex
from dataclasses import dataclass

from launch.provider import Job, Order

IMAGE = "python:3.12-bookworm"  # Python 3.11 or newer with headers, make and g++: what `make env` needs
SECRET = ("HF_TOKEN", "WANDB_API_KEY")
SAVING = 180  # seconds before the engine's own time limit: the state is written and leaves
# As ssh_box.sh's claim: a folder with both marks is a job's, and so is a new one; nothing is unpacked over anything else.
# The token goes to the Hub only, never to where it sends us.
UNPACK = (
    "import os, sys, tarfile, urllib.request as u; marks = ['job/commit', 'job/listing']; "
    "names = os.listdir() + (os.listdir('job') if os.path.isdir('job') else []); "
    "strange = sorted({*names} - {'job', 'commit', 'listing'}) if not all(map(os.path.isfile, marks)) else []; "
    "strange and sys.exit("
    "f'error: {os.getcwd()} holds {strange[0]}, which Ferry did not send\\n next: RUN=another-name'); "
    "os.makedirs('job', exist_ok=True); [open(mark, 'a').close() for mark in marks]; "
    "q = u.Request(os.environ['FERRY_JOB'] + 'job.tar'); "
    "q.add_unredirected_header('Authorization', 'Bearer ' + os.environ['HF_TOKEN']); "
    "tarfile.open(fileobj=u.urlopen(q), mode='r|').extractall('.')"
)


@dataclass(frozen=True)
class Task:
    """What each engine makes its own request from."""

    name: str
    order: Order
    line: str
    """For `sh -c`; one line, for some engines take no more."""
    environment: dict[str, str]
    secrets: dict[str, str]


def of(job: Job, goal: str, passed: dict[str, str], where: str) -> Task:
    """passed: the environment that the job gets. where: of the job's repo, an address that ends in a slash."""
    secrets = {name: passed[name] for name in SECRET if name in passed}
    environment = {name: value for name, value in passed.items() if name not in secrets}
    environment |= {"FERRY_JOB": where, "PYTHONUNBUFFERED": "1"}
    return Task(job.name, job.order, line(job, goal), environment, secrets)


def line(job: Job, goal: str) -> str:
    stop = max(job.order.seconds - SAVING, job.order.seconds // 2)
    words = [
        "make",
        "--no-print-directory",
        goal,
        "CONFIG=job/config.yaml",
        f"RUN={job.run}",
        "RUNS=runs",
        "DOCKER=0",
        *job.settings,
    ]
    # --foreground: make alone is told; it tells the stage, which would take a second signal for impatience
    steps = [
        f'mkdir -p "$HOME/ferry/{job.name}"', f'cd "$HOME/ferry/{job.name}"', f"python3 -W ignore -c {shlex.quote(UNPACK)}",
        "python3 launch/providers/fetch_data.py", f"exec timeout --foreground -k {SAVING} {stop} {shlex.join(words)}",
    ]  # fmt: skip
    return " && ".join(steps)
