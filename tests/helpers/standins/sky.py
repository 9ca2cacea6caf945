"""`sky` of SkyPilot 0.14 without a cloud: the real package reads, checks and prices each task (its optimizer, on a small
catalogue); what it would start on a machine runs here, as a process with a home of its own.

    SKY_STATE=folder python tests/helpers/standins/sky.py launch -c ferry-boat -i 10 --down -y -d sky.yaml --secret HF_TOKEN

Written from the package: commands, words, JSON and exit codes as the real one gives them. `evict ID` is ours: it takes a
machine away, and a managed job goes on on the next.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

STATE = Path(os.environ["SKY_STATE"])
OVER = ("SUCCEEDED", "FAILED", "FAILED_SETUP", "CANCELLED")
CLOUDS = (
    json.loads((STATE / "clouds.json").read_text()) if (STATE / "clouds.json").is_file() else ["aws", "gcp", "runpod"]
)
# Round prices of our own, in the columns of the catalogues' schema 8.
CATALOGUE = {
    "aws/vms.csv": """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch
g6.xlarge,L4,1.0,4.0,16.0,x,0.80,0.30,us-east-1,use1-az1,x86_64
p5.4xlarge,H100,1.0,16.0,256.0,x,6.00,2.50,us-east-1,use1-az1,x86_64
m6i.2xlarge,,,8.0,32.0,,0.40,0.15,us-east-1,use1-az1,x86_64
""",
    "gcp/vms.csv": """\
InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice
g2-standard-4,4.0,16.0,,,,us-central1,us-central1-a,0.20,0.07
,,,L4,1.0,x,us-central1,us-central1-a,0.56,0.20
n2-standard-8,8.0,32.0,,,,us-central1,us-central1-a,0.39,0.09
""",
    "runpod/vms.csv": """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Region,SpotPrice,Price,AvailabilityZone,GpuInfo
1x_L4_SECURE,L4,1.0,4.0,24.0,US,0.22,0.44,US-CA-1,x
1x_RTX4090_SECURE,RTX4090,1.0,4.0,24.0,US,0.35,0.70,US-CA-1,x
1x_A100-80GB_SECURE,A100-80GB,1.0,8.0,120.0,US,0.90,1.80,US-CA-1,x
""",
    "lambda/vms.csv": """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice
gpu_1x_a10,A10,1.0,30.0,200.0,0.75,us-east-1,x,
""",
    "aws/images.csv": "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId\n",
    "aws/instance_quota_mapping.csv": "InstanceType,OnDemandInstanceCode,SpotInstanceCode\n",
    "gcp/images.csv": "Tag,Region,OS,OSVersion,ImageId,CreationDate\n",
    "gcp/accelerator_quota_mapping.csv": "Accelerator,OnDemandInstanceCode,SpotInstanceCode\n",
    "common/accelerators.csv": (
        "AcceleratorName,Clouds\nL4,\"['AWS', 'GCP', 'RunPod']\"\nH100,\"['AWS']\"\nA10,\"['Lambda']\"\n"
        "RTX4090,\"['RunPod']\"\nA100-80GB,\"['RunPod']\"\n"
    ),
}


def catalogue() -> None:
    """Into $HOME, where the package looks; a catalogue without a digest is never fetched anew."""
    for name, text in CATALOGUE.items():
        path = Path.home() / ".sky" / "catalogs" / "v8" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def planned(file: str, secrets: list[str]):
    """The task, and what the real optimizer chooses for it. Ends as the real command does where it cannot."""
    catalogue()
    import sky
    from sky import check, exceptions, optimizer
    from sky.utils import registry
    from sky.utils.common import OptimizeTarget

    clouds = [registry.CLOUD_REGISTRY.from_str(name) for name in CLOUDS]
    check.get_cached_enabled_clouds_or_refresh = lambda *_, **__: clouds  # without credentials none is
    try:
        task = sky.Task.from_yaml(file)
    except (ValueError, exceptions.InvalidTaskYAMLError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for name in secrets:
        if name not in os.environ:
            print(f"Error: {name} is not set in local environment.", file=sys.stderr)
            sys.exit(2)
    with sky.Dag() as dag:
        dag.add(task)
    try:
        dag = optimizer.Optimizer.optimize(dag, minimize=OptimizeTarget.COST, quiet=True)
    except exceptions.ResourcesUnavailableError as error:
        print(f"sky.exceptions.ResourcesUnavailableError: {error}", file=sys.stderr)
        sys.exit(1)
    return task, dag.tasks[0].best_resources


def gpus(infra: str) -> None:
    catalogue()
    from sky import catalog

    found = catalog.list_accelerators(gpus_only=True, clouds=infra.split("/")[0], all_regions=False, require_price=True)
    print(json.dumps({name: [plain(row._asdict()) for row in rows] for name, rows in found.items()}))


def plain(row: dict) -> dict:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def launch(options) -> None:
    task, machine = planned(options.file, options.secret)
    chosen = {"cloud": str(machine.cloud).lower(), "instance": machine.instance_type, "spot": machine.use_spot, "dollars": machine.get_cost(3600),
              "disk": machine.disk_size, "image": machine.image_id, "accelerators": machine.accelerators}  # fmt: skip
    with (STATE / "chosen.jsonl").open("a") as out:
        out.write(json.dumps(chosen) + "\n")
    if options.dryrun:
        print("Dryrun finished.")
        return
    number = 1 + len(list(STATE.glob("jobs/*/job.json")))
    folder = STATE / "jobs" / str(number)
    folder.mkdir(parents=True)
    (folder / "log").touch()
    given = {name: os.environ[name] for name in options.secret}
    machine_settings = json.loads((STATE / "settings.json").read_text())
    write(number, {"job_id": number, "job_name": task.name, "cluster": options.cluster, "managed": options.managed, "status": "STARTING",
                   "recovery_count": 0, "failure_reason": None, "argv": sys.argv})  # fmt: skip
    print(f"Launching on {chosen['cloud']} {chosen['instance']}")
    supervisor = subprocess.Popen(
        [sys.executable, __file__, "supervise", str(number)], start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, text=True, env={"SKY_STATE": str(STATE), "PATH": os.environ["PATH"]},
    )  # fmt: skip
    supervisor.stdin.write(
        json.dumps({"setup": task.setup, "run": task.run, "envs": machine_settings | dict(task.envs) | given})
    )
    supervisor.stdin.close()
    print(f"Job submitted, ID: {number}")


def supervise(number: int) -> None:
    """What SkyPilot's agents do on a machine, and its controller beside it."""
    task, folder = json.load(sys.stdin), STATE / "jobs" / str(number)
    for machine in range(100):
        home = folder / f"machine{machine}"
        home.mkdir()
        script = f"set -e\n{task['setup'] or ''}\necho ready >{home}/ready\n{task['run']}\n"
        with (folder / "log").open("wb") as log:  # a new machine begins a new one
            process = subprocess.Popen(["bash", "-c", script], cwd=home, env=task["envs"] | {"HOME": str(home)}, stdout=log,
                                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
            change(number, status="RUNNING")
            while (code := process.poll()) is None and not (evicted := (folder / "evict").exists()):
                if (folder / "cancel").exists():
                    end(process)
                    change(number, status="CANCELLED")
                    return
                time.sleep(0.1)
        if code is not None:
            status = "SUCCEEDED" if code == 0 else "FAILED" if (home / "ready").exists() else "FAILED_SETUP"
            change(number, status=status, failure_reason=None if code == 0 else f"exit code {code}")
            return
        if evicted:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            (folder / "evict").unlink()
            if not read(number)["managed"]:
                change(number, status="FAILED", failure_reason="the machine is gone")
                return
            change(number, status="RECOVERING", recovery_count=machine + 1)
            time.sleep(1)


def end(process: subprocess.Popen) -> None:
    """SkyPilot asks all processes of a cancelled job, and kills them 30 seconds later."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read(number: int) -> dict:
    return json.loads((STATE / "jobs" / str(number) / "job.json").read_text())


def write(number: int, job: dict) -> None:
    path = STATE / "jobs" / str(number) / "job.json"
    part = path.with_suffix(".new")
    part.write_text(json.dumps(job))
    part.replace(path)


def change(number: int, **values) -> None:
    write(number, read(number) | values)


def jobs(managed: bool, cluster: str | None = None) -> list[dict]:
    found = [json.loads(path.read_text()) for path in STATE.glob("jobs/*/job.json")]
    down = (STATE / "down").read_text().split() if (STATE / "down").exists() else []
    return [
        job
        for job in found
        if job["managed"] == managed and (cluster is None or job["cluster"] == cluster and cluster not in down)
    ]


def queue(managed: bool, cluster: str | None) -> None:
    found = jobs(managed, cluster)
    if managed:
        if not found:
            print("sky.exceptions.ClusterNotUpError: No in-progress managed jobs.", file=sys.stderr)
            sys.exit(1)
        print(json.dumps(found))
        return
    print(f"Fetching job queue for: {cluster}")
    if not found:
        print(
            f"Failed to get the job queue for cluster '{cluster}'.\n  sky.exceptions.ClusterDoesNotExist: Cluster '{cluster}' does not exist."
        )
    print(json.dumps({cluster: found} if found else {}))


def logs(number: int, follow: bool) -> None:
    job = read(number)
    print(
        "├── Waiting for task resources on 1 node.\n└── Job started. Streaming logs... (Ctrl-C to exit log streaming)",
        flush=True,
    )
    path, pending, machine = STATE / "jobs" / str(number) / "log", b"", job["recovery_count"]
    log = path.open("rb")
    while True:
        job = read(number)
        over = job["status"] in OVER
        if job["recovery_count"] != machine and job["status"] == "RUNNING":
            machine, log = job["recovery_count"], path.open("rb")
        pending += log.read()
        *lines, pending = pending.split(b"\n")
        for line in lines:
            sys.stdout.buffer.write(f"({job['job_name']}, pid=4242) ".encode() + line + b"\n")
        sys.stdout.flush()
        if over or not follow:
            break
        time.sleep(0.1)
    sys.exit({"SUCCEEDED": 0, "CANCELLED": 103}.get(job["status"], 100 if over else 101 if not follow else 100))


def cancel(number: int) -> None:
    if read(number)["status"] not in OVER:
        (STATE / "jobs" / str(number) / "cancel").touch()
    print(f"Cancelling job {number}.")


def down(cluster: str) -> None:
    for job in jobs(False, cluster):
        if job["status"] not in OVER:
            cancel(job["job_id"])
    with (STATE / "down").open("a") as out:
        out.write(f"{cluster}\n")
    print(f"Terminating cluster {cluster}...done.")


def main() -> None:
    with (STATE / "asked").open("a") as out:
        out.write(json.dumps(sys.argv[1:]) + "\n")
    words = sys.argv[1:]
    managed = words[:1] == ["jobs"]
    words = words[1:] if managed else words
    parser = argparse.ArgumentParser(prog="sky")
    for flag in ("-y", "-d", "-a", "-v", "--down", "--dryrun", "--all", "--follow", "--no-follow"):
        parser.add_argument(flag, action="store_true")
    for name in ("-o", "-i", "--infra"):
        parser.add_argument(name)
    parser.add_argument("-n" if managed else "-c", dest="cluster")
    parser.add_argument("--secret", action="append", default=[])
    parser.add_argument("words", nargs="*")
    options = parser.parse_args(words[1:])
    options.managed, rest = managed, options.words
    match words[0]:
        case "check":
            print(json.dumps({"default": {name.upper(): ["compute", "storage"] for name in CLOUDS}}))
        case "gpus":
            gpus(options.infra)
        case "launch":
            options.file = rest[0]
            launch(options)
        case "queue":
            queue(managed, rest[0] if rest else None)
        case "logs":
            logs(int(rest[-1]), options.follow)
        case "cancel":
            cancel(int(rest[-1]))
        case "down":
            down(rest[0])
        case "supervise":
            supervise(int(rest[0]))
        case "evict":
            (STATE / "jobs" / rest[0] / "evict").touch()
        case _:
            sys.exit(f"No such command {words[0]!r}")


if __name__ == "__main__":
    main()
