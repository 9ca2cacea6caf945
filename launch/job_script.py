"""A job as any provider of rented instances runs it: a shell command line, environment, secrets and a time limit.

All that is large goes through the Hub: the tree and private data are in a private data set repo (you/<run>-job), and
what the run makes goes to a private repo (you/<run>-checkpoints). So no provider needs storage of its own, and an
instance that replaces another one resumes where that one was.
"""

import shlex
from dataclasses import dataclass

from launch.provider import InstanceRequest, Job

DEFAULT_IMAGE = "python:3.12-bookworm"  # Python 3.11 or newer with headers, make and g++: what `make env` needs
SECRET_VARIABLES = ("HF_TOKEN", "WANDB_API_KEY")
SAVE_SECONDS = 180  # seconds before the provider's own time limit in which the state is written and uploaded
# The same rule as claim in ssh_box.sh: a folder with both marks is a job's, a new one becomes a job's, and nothing is
# unpacked over anything else. The token goes to the Hub only, never to where the Hub redirects us.
UNPACK_CODE = (
    "import os, sys, tarfile, urllib.request as u; marks = ['job/commit', 'job/listing']; "
    "names = os.listdir() + (os.listdir('job') if os.path.isdir('job') else []); "
    "strange = sorted({*names} - {'job', 'commit', 'listing'}) if not all(map(os.path.isfile, marks)) else []; "
    "strange and sys.exit("
    "f'error: {os.getcwd()} contains {strange[0]}, which Ferry did not send\\n next: RUN=another-name'); "
    "os.makedirs('job', exist_ok=True); [open(mark, 'a').close() for mark in marks]; "
    "q = u.Request(os.environ['FERRY_JOB'] + 'job.tar'); "
    "q.add_unredirected_header('Authorization', 'Bearer ' + os.environ['HF_TOKEN']); "
    "tarfile.open(fileobj=u.urlopen(q), mode='r|').extractall('.')"
)


@dataclass(frozen=True)
class JobTask:
    """A job from which each provider makes its own request."""

    name: str
    instance_request: InstanceRequest
    command_line: str
    """For `sh -c`; a single line, because some providers take no more."""
    environment: dict[str, str]
    secrets: dict[str, str]


def build_task(job: Job, goal: str, variables: dict[str, str], job_url: str) -> JobTask:
    """Return the task that runs `make <goal>` for a job.

    Args:
        job: What was sent.
        goal: The make target.
        variables: The environment that the job gets; those of SECRET_VARIABLES become secrets.
        job_url: Address of the job's files on the Hub; it ends in a slash.
    """
    secrets = {name: variables[name] for name in SECRET_VARIABLES if name in variables}
    environment = {name: value for name, value in variables.items() if name not in secrets}
    environment |= {"FERRY_JOB": job_url, "PYTHONUNBUFFERED": "1"}
    assert job.instance_request, "what runs on a rented instance has asked for one"
    return JobTask(job.name, job.instance_request, build_command_line(job, goal), environment, secrets)


def build_command_line(job: Job, goal: str) -> str:
    """Return the command line that unpacks a job, downloads its data and runs `make <goal>` within the time limit."""
    assert job.instance_request, "what runs on a rented instance has asked for one"
    timeout_seconds = job.instance_request.timeout_seconds
    make_seconds = max(timeout_seconds - SAVE_SECONDS, timeout_seconds // 2)
    settings = ["CONFIG=job/config.yaml", f"RUN={job.run_name}", "RUNS=runs", "DOCKER=0", *job.settings]
    make_words = ["make", "--no-print-directory", goal, *settings]
    # --foreground: only make gets the signal. It passes the signal on to the stage, which would take a second one as an
    # order to stop at once.
    steps = [
        f'mkdir -p "$HOME/ferry/{job.name}"',
        f'cd "$HOME/ferry/{job.name}"',
        f"python3 -W ignore -c {shlex.quote(UNPACK_CODE)}",
        "python3 launch/providers/fetch_data.py",
        f"exec timeout --foreground -k {SAVE_SECONDS} {make_seconds} {shlex.join(make_words)}",
    ]
    return " && ".join(steps)
