"""A machine rented for one job: Hugging Face Jobs on loopback, by the unmodified client, with the demo's chain in it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import files
from contract import manifest
from tests.helpers import boxes
from tests.helpers.hub import Fault, Hub, serving
from tests.helpers.laptop import SECRET, SET, at_step, watched

pytestmark = pytest.mark.slow  # trains

WORDS = ("cloud-to-local", "CONFIG=configs/demo.yaml", "CLOUD=hf-jobs", "RUN=boat", "DEVICE=cpu")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as running:
        running.users[SECRET] = {"name": "you", "role": "write", "orgs": ["crew"]}
        # What an image would bring.
        running.jobs.settings |= {
            "VENV": sys.prefix,
            "FERRY_CACHE": os.environ.get("FERRY_CACHE") or str(Path("~/.cache/ferry").expanduser()),
        }
        yield running


@pytest.fixture(scope="module")
def laptop(tmp_path_factory) -> Path:
    return boxes.laptop(tmp_path_factory.mktemp("laptop"))


@dataclass
class Delivered:
    laptop: Path
    hub: Hub
    said: dict[str, str]


@pytest.fixture(scope="module")
def delivered(laptop, hub) -> Delivered:
    """Launched, the lid closed, watched again, cancelled, started again, timed out, started again, deployed."""
    said = {}
    first = watched(laptop, hub, *WORDS, SET, "YES=1")
    first.until(lambda: at_step(hub, 1))
    first.kill()
    said["first"] = first.said

    second = watched(laptop, hub, *WORDS, SET)
    second.until(lambda: "boat is already running" in second.said)
    stop = watched(laptop, hub, "cloud-stop", "CLOUD=hf-jobs", "RUN=boat")
    assert stop.end() == 0, stop.said
    assert second.end() == 2, second.said
    said |= {"second": second.said, "stop": stop.said}

    third = watched(laptop, hub, *WORDS, SET, "YES=1", "HOURS=0.015")
    assert third.end() == 2, third.said
    said["third"] = third.said

    fourth = watched(laptop, hub, *WORDS, SET, "YES=1", "MAX_DOLLARS=0.05")
    assert fourth.end() == 0, fourth.said
    said["fourth"] = fourth.said
    return Delivered(laptop, hub, said)


@pytest.mark.release
def test_the_whole_demo(delivered):
    said = delivered.said["fourth"]
    assert "cloud: you/boat-GGUF@v1\n  trained on Hugging Face Jobs with the code of commit" in said, said
    assert "smoke: passed" in said and "Traceback" not in "".join(delivered.said.values())
    made = manifest.parse_manifest(delivered.hub.read("models/you/boat-GGUF", manifest.FILE_NAME), "")
    assert (
        made.provenance["git"]["commit"] == boxes.git(delivered.laptop, "rev-parse", "HEAD")
        and made.training["steps"] == 30
    )


@pytest.mark.release
def test_the_request_is_the_clients_own_and_says_all(delivered):
    """Image, machine, command of one line, an explicit time limit; the token among the secrets and nowhere else."""
    jobs = delivered.hub.jobs.of("you")
    assert len(jobs) == 3, "one a start: the second launch only watched"
    for job in jobs:
        spec = job.spec
        assert spec["dockerImage"] == "python:3.12-bookworm" and spec["flavor"] == "cpu-basic"
        assert spec["command"][:2] == ["sh", "-c"] and "\n" not in spec["command"][2]
        assert spec["secrets"] == {"HF_TOKEN": SECRET} and spec["labels"]["ferry-run"] == "boat"
        assert SECRET not in json.dumps(spec | {"secrets": {}})
    # of three hours, what was asked for, and what five cents buy at a cent an hour: three hours again
    assert [job.spec["timeoutSeconds"] for job in jobs] == [10800, 54, 10800]


@pytest.mark.release
def test_a_closed_lid_and_the_same_command_watches(delivered):
    assert "sending" in delivered.said["first"] and "scheduling, http" in delivered.said["first"]
    second = delivered.said["second"]
    assert "Hugging Face Jobs: boat is already running" in second and "sending" not in second
    assert second.count("[1/6] data\n") == 0, "what was seen is not shown again"


@pytest.mark.release
def test_cancelled_from_another_terminal(delivered):
    assert "error: `make train` on Hugging Face Jobs ended: canceled" in delivered.said["second"]
    assert "boat does not run on Hugging Face Jobs. Nothing is billed for it now" in delivered.said["stop"]
    assert "`hf repos delete you/boat-job --type dataset`" in delivered.said["second"].splitlines()[-4]


@pytest.mark.release
def test_timed_out_with_its_state_saved(delivered):
    """`timeout` inside is earlier than the Hub's own: the stage is told, and what it has leaves the machine."""
    said = delivered.said["third"]
    assert "at most 54 s, $0.00 at $0.01 an hour" in said
    assert "error: `make train` on Hugging Face Jobs ended: error Job failed with exit code: 124" in said
    assert re.search(r"SIGTERM after step|\[2/6\] finetune|\[3/6\] evaluate", said), "wherever it was by then"


@pytest.mark.release
def test_each_machine_goes_on_where_the_last_one_was(delivered):
    for name in ("third", "fourth"):
        said = delivered.said[name].split("starting `make train`")[1]
        where = re.search(r"checkpoints: runs/boat from you/boat-checkpoints, (step \d+|finetune done)", said)
        assert where and "[1/6] data" not in said.replace("[1/6] data: done already", ""), said
        assert where[1] == "finetune done" or "  continuing from checkpoint-" in said or name == "third"


@pytest.mark.release
def test_the_log_here_is_that_of_the_last_machine(delivered):
    folder = delivered.laptop / "runs" / "boat" / "cloud"
    assert (folder / "log").read_bytes() == delivered.hub.jobs.of("you")[-1].log.read_bytes()
    assert "exit code" not in (folder / "log").read_text() and (folder / "log.before").is_file()


@pytest.mark.release
def test_code_and_data_went_through_a_private_repo(delivered):
    name = "datasets/you/boat-job"
    assert delivered.hub.refs(name)["private"] and {"job.tar", "job.json"} <= set(delivered.hub.files(name))
    assert not delivered.hub.leaks, "the token went to the Hub's own host only"


@pytest.mark.release
def test_the_token_is_in_no_file_and_no_log(delivered):
    places = [delivered.laptop / "runs", delivered.laptop / "models", delivered.hub.folder]
    found = subprocess.run(["grep", "-rl", SECRET, *places], capture_output=True, text=True)
    assert found.returncode == 1, found.stdout
    assert not any(SECRET in said for said in delivered.said.values())


@pytest.mark.release
def test_again_it_is_deployed_not_trained(delivered):
    again = watched(delivered.laptop, delivered.hub, *WORDS, SET)
    assert again.end() == 0 and "smoke: passed" in again.said, again.said
    assert len(delivered.hub.jobs.of("you")) == 3


def test_ctrl_c_ends_the_watching_and_says_what_bills(laptop, hub):
    words = [*(word for word in WORDS if not word.startswith("RUN=")), "RUN=dinghy", SET]
    watch = watched(laptop, hub, *words, "YES=1")
    watch.until(lambda: "train: natively" in watch.said)
    os.killpg(watch.process.pid, signal.SIGINT)
    watch.end()
    assert (
        "still running on Hugging Face Jobs: dinghy; `make cloud-stop CLOUD=hf-jobs RUN=dinghy` ends it. It bills by the minute"
        in watch.said
    )
    assert "Traceback" not in watch.said
    job = next(job for job in hub.jobs.of("you") if job.spec["labels"]["ferry-run"] == "dinghy")
    assert job.stage == "RUNNING"
    stop = watched(laptop, hub, "cloud-stop", "CLOUD=hf-jobs", "RUN=dinghy")
    assert stop.end() == 0 and job.stage == "CANCELED", stop.said


@pytest.mark.release
def test_private_data_goes_along(laptop, hub, tmp_path, monkeypatch):
    """Rows that no commit holds: from a folder of this machine, by sha256, to where the job's config names them."""
    monkeypatch.setattr(hub, "lfs_from", 1000)  # the Hub sends who asks for it to another host
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((laptop / "configs" / "demo" / "train.jsonl").read_bytes() + b"\n")
    words = [*(word for word in WORDS if not word.startswith("RUN=")), "RUN=raft", f"{SET} data.source={rows}"]
    watch = watched(laptop, hub, *words, "YES=1")
    watch.until(lambda: "checkpoints: data done" in watch.said)
    stop = watched(laptop, hub, "cloud-stop", "CLOUD=hf-jobs", "RUN=raft")
    assert stop.end() == 0 and watch.end() == 2, stop.said
    job = next(job for job in hub.jobs.of("you") if job.spec["labels"]["ferry-run"] == "raft")
    there = next(job.home.glob("ferry/raft/job/files/*/rows.jsonl"))
    assert files.sha256(there) == files.sha256(rows)
    assert f"data/{there.relative_to(job.home / 'ferry' / 'raft')}" in hub.files("datasets/you/raft-job")
    assert any("GET /blobs" in asked for asked in hub.asked) and not hub.leaks


@pytest.mark.parametrize(("words", "said"), [
    (["SET=publish.repo=./hub/x"], r"publish.repo=./hub/x is a folder, and Hugging Face Jobs keeps no files .*\n next: .*\{user\}/\{run\}-GGUF"),
    (["MAX_DOLLARS=0.001", "HOURS=3"], r"the limit is \$0.00"),
    (["CLOUD=hf-jobs/strangers"], r"you may not run jobs here"),
    (["CLOUD=hf-jobs//x"], r"CLOUD=hf-jobs//x is not a known provider\n next: CLOUD=ssh://.*sky or sky/<infra>.*hf-jobs"),
    (["CLOUD=modal"], r"CLOUD=modal is not a known provider"),
    (["SPOT=1"], r"Hugging Face Jobs has no spot instances"),
    (["DEVICE=cuda", "GPU=H100"], r"no instance type on offer can run the job\n next: on offer: cpu-basic, .*l4x1"),
    ([], r"cannot ask for confirmation without a terminal\n next: add YES=1"),
    (["HOURS=0"], r"0.0 is not in the range"),
])  # fmt: skip
def test_refusals(laptop, hub, words, said):
    before = len(hub.jobs.jobs)
    asked = [
        *(word for word in WORDS if word.split("=")[0] not in {w.split("=")[0] for w in (*words, "RUN")}),
        "RUN=refused",
    ]
    asked += [] if any(word.startswith("SET=") for word in words) else [SET]
    watch = watched(laptop, hub, *asked, *words)
    assert watch.end() == 2 and re.search(said, watch.said), watch.said
    assert "Traceback" not in watch.said and len(hub.jobs.jobs) == before


def test_no_token(laptop, hub):
    watch = watched(laptop, hub, *WORDS, SET, HF_TOKEN="")
    assert watch.end() == 2 and "no Hub token is set" in watch.said and "Traceback" not in watch.said


def test_no_credit_is_one_line_and_nothing_bills(laptop, hub):
    hub.jobs.credit = False
    try:
        watch = watched(laptop, hub, *(w if w != "RUN=boat" else "RUN=poor" for w in WORDS), SET, "YES=1")
        assert watch.end() == 2, watch.said
    finally:
        hub.jobs.credit = True
    assert "the Hub requires payment (Payment required: add credits to run Jobs)" in watch.said
    assert "Nothing is billed for it now" in watch.said and "Traceback" not in watch.said


def test_a_public_job_repo_is_refused(laptop, hub, tmp_path):
    (tmp_path / "x").write_text("x")
    hub.add("datasets/you/bare-job", tmp_path, private=False)
    watch = watched(laptop, hub, *(w if w != "RUN=boat" else "RUN=bare" for w in WORDS), SET, "YES=1")
    assert watch.end() == 2 and "you/bare-job is public, and a job contains your data" in watch.said, watch.said


@pytest.mark.release
def test_a_hub_that_is_away_for_a_moment_is_asked_again(laptop, hub):
    """The watch ends in nothing but a pause; the job never knows."""
    words = [*(word for word in WORDS if not word.startswith("RUN=")), "RUN=skiff", SET]
    watch = watched(laptop, hub, *words, "YES=1", FERRY_HUB_SECONDS="1")
    watch.until(lambda: "train: natively" in watch.said)
    fault = Fault("GET /api/jobs", status=503, times=-1)
    hub.faults.append(fault)
    for connection in list(hub.connections):
        connection.shutdown(socket.SHUT_RDWR)
    watch.until(lambda: "; retrying in 5 s" in watch.said, 60)
    hub.faults.remove(fault)
    watch.until(lambda: "[2/6] finetune" in watch.said)
    stop = watched(laptop, hub, "cloud-stop", "CLOUD=hf-jobs", "RUN=skiff")
    assert stop.end() == 0 and watch.end() == 2, stop.said


def test_a_job_that_ended_without_a_result_did_not_end_well(online):
    """Its machine is gone: whoever believed the exit code would ask for ever for what is not there."""
    from common import hub as client
    from launch.providers.hf_jobs import HfJobsProvider

    launcher = HfJobsProvider(
        "you/ghost-checkpoints", "you"
    )  # without it the client asks as it was when it was imported
    assert launcher.read_job_state("ghost").status == "absent"
    client.create_client().run_job(
        image="x", command=["true"], flavor="cpu-basic", labels={"ferry-run": "ghost"}, namespace="you"
    )
    until = time.monotonic() + 20
    while (state := launcher.read_job_state("ghost")).status == "running" and time.monotonic() < until:
        time.sleep(0.1)
    assert (state.status, state.reason) == ("died", "ended, and its result is not on the Hub")
