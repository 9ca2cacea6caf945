"""SkyPilot: its own package reads and prices each task that we make; the demo's chain on machines that are taken away."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from common import files
from launch import job_script
from launch.choose_instance import InstanceNeeds, choose_cheapest_instance
from launch.provider import InstanceRequest, InstanceType, Job, Machine
from launch.providers import skypilot as launcher
from pipeline.plan import gpu_table
from tests.helpers import boxes, skypilot
from tests.helpers.boxes import Watch
from tests.helpers.commands import ROOT, refuses
from tests.helpers.hub import Hub, serving
from tests.helpers.laptop import SECRET, SET, at_step, watched
from tests.helpers.skypilot import Sky

pytestmark = pytest.mark.slow  # installs SkyPilot, and trains


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> Iterator[Sky]:
    made = Sky(tmp_path_factory.mktemp("sky"))
    yield made
    made.close()


def made(offer: InstanceType, spot: bool, image: str = job_script.DEFAULT_IMAGE) -> job_script.JobTask:
    job = Job(
        "boat", "boat", ROOT, "0" * 40, None, "", instance_request=InstanceRequest(offer, 2.5, 60 * 10**9, image, spot)
    )
    return job_script.build_task(
        job,
        "train",
        {"HF_TOKEN": SECRET, "HF_ENDPOINT": "https://huggingface.co"},
        "https://huggingface.co/datasets/you/boat-job/resolve/0/",
    )


@pytest.mark.parametrize("spot", [False, True], ids=["on demand", "spot"])
@pytest.mark.parametrize(("infra", "instance", "dollars"), [
    ("aws", "g6.xlarge", (0.80, 0.30)), ("gcp", "g2-standard-4", (0.76, 0.27)), ("runpod", "1x_L4_SECURE", (0.44, 0.22)), ("", "1x_L4_SECURE", (0.44, 0.22)),
])  # fmt: skip
def test_the_task_is_read_and_dry_run_by_skypilot(user, tmp_path, monkeypatch, infra, instance, dollars, spot):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    asked = launcher.build_sky_task(made(InstanceType("L4", "L4", 0.44), spot), infra)
    (tmp_path / "sky.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    done = user("launch", "-c", "x", "--dryrun", "-y", tmp_path / "sky.yaml", "--secret", "HF_TOKEN")
    assert done.returncode == 0, done.stdout + done.stderr
    chosen = user.chosen()[-1]
    assert (chosen["instance"], chosen["spot"], chosen["disk"]) == (instance, spot, 60)
    assert chosen["dollars"] == pytest.approx(dollars[spot]) and "python:3.12-bookworm" in str(chosen["image"])
    assert SECRET not in (tmp_path / "sky.yaml").read_text() and asked["secrets"] == {"HF_TOKEN": None}


@pytest.mark.parametrize(("change", "said"), [
    ({"resources": {"accelerators": "B200:1"}}, "ResourcesUnavailable"), ({"resourcess": {}}, "did you mean 'resources'"),
])  # fmt: skip
def test_skypilot_refuses_what_it_cannot_do(user, tmp_path, monkeypatch, change, said):
    """The dry run is one: a task that is wrong does not pass."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    asked = launcher.build_sky_task(made(InstanceType("L4", "L4", 0.44), False), "") | change
    (tmp_path / "sky.yaml").write_text(yaml.safe_dump(asked))
    done = user("launch", "-c", "x", "--dryrun", "-y", tmp_path / "sky.yaml", "--secret", "HF_TOKEN")
    assert done.returncode != 0 and said in done.stdout + done.stderr


def test_offers_are_the_cheapest_of_each_card(user, monkeypatch, tmp_path):
    monkeypatch.setenv("FERRY_SKY", skypilot.command(user))
    on_demand, spot = (
        launcher.SkyPilotProvider("you/x", "", spot, tmp_path).inspect_machine() for spot in (False, True)
    )
    assert {item.name: item.dollars_per_hour for item in on_demand.instance_types} == {
        "CPU": None,
        "L4": 0.44,
        "H100": 6.0,
        "RTX4090": 0.7,
        "A100-80GB": 1.8,
    }
    assert {item.name: item.dollars_per_hour for item in spot.instance_types}["H100"] == 2.5
    assert launcher.SkyPilotProvider("you/x", "gcp", False, tmp_path).inspect_machine().gpu_names == ("L4",)
    with refuses("sky.no_access") as error:
        launcher.SkyPilotProvider("you/x", "azure", False, tmp_path).inspect_machine()
    assert "azure" in error.value.message and "aws, gcp, runpod" in error.value.message


@pytest.mark.parametrize(("name", "card"), [
    ("T4", "T4"), ("RTX3090", "RTX 3090"), ("RTX4090", "RTX 4090"), ("A10", "A10"), ("A10G", "A10G"), ("L4", "L4"), ("L40S", "L40S"),
    ("RTXA6000", "RTX A6000"), ("A6000", "RTX A6000"), ("A100", "A100 40 GB"), ("A100-80GB", "A100 80 GB"), ("A100-80GB-SXM", "A100 80 GB"),
    ("H100", "H100"), ("H100-SXM", "H100"), ("H200", "H200"), ("B200", "B200"), ("RTX5090", "RTX 5090"), ("V100", None), ("T4g", None),
])  # fmt: skip
def test_skypilots_names_of_cards(name, card):
    found = gpu_table.find_gpu(launcher.gpu_table_name(name))
    assert (found and found.name) == card


# Which machine is asked for


def plan_of(run_work, card: str):
    from pipeline.plan import estimate

    return estimate.plan_on_gpu(estimate.select_gpu(card), run_work)


@pytest.fixture(scope="module")
def work():
    """An 8B model, 400 rows of 300 tokens."""
    import numpy as np

    from pipeline.config.schema import Base, Finetune
    from pipeline.plan import memory_need
    from pipeline.plan.estimate import Workload

    shape = memory_need.shape_from_config({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    })  # fmt: skip
    return Workload(Base(model="x/y", license="mit"), Finetune(), shape, "llama", np.full(400, 300))


OFFERS = (
    InstanceType("CPU", "", 0.1), InstanceType("t4", "T4 16GB", 0.4, 10**12), InstanceType("l4", "L4 24GB", 0.8, 10**12), InstanceType("h100", "H100 80GB", 4.0, 10**12),
    InstanceType("small", "H200 141GB", 0.1, 10**9), InstanceType("odd", "Radeon", 0.1, 10**12),
)  # fmt: skip
NEEDS = InstanceNeeds(50 * 10**9, "image")


def test_the_machine_is_the_cheapest_for_the_whole_job(work):
    """Not the cheapest hour: a faster card may cost less in the end. What is too small or unknown is not asked for."""
    wish, plan = choose_cheapest_instance(Machine("Linux", 0, instance_types=OFFERS), work, NEEDS)
    costs = {
        item.name: plan_of(work, item.name.upper()).hours * item.dollars_per_hour
        for item in OFFERS[1:4]
        if not isinstance(plan_of(work, item.name.upper()), str)
    }
    assert (
        wish.instance_type.name == min(costs, key=costs.get) and plan.gpu_type.name == wish.instance_type.name.upper()
    )
    assert wish.hours == pytest.approx(1 + 1.5 * plan.hours) and wish.max_dollars == pytest.approx(
        wish.hours * wish.instance_type.dollars_per_hour
    )


def test_a_limit_in_dollars_is_a_limit_in_hours(work):
    wish, _ = choose_cheapest_instance(
        Machine("Linux", 0, instance_types=OFFERS), work, replace(NEEDS, max_dollars=0.5, gpu="H100")
    )
    assert wish.instance_type.name == "h100" and wish.hours == pytest.approx(0.125) and wish.max_dollars <= 0.5


def test_no_machine_will_do_and_it_is_said_why(work):
    offers = (
        InstanceType("small", "H200 141GB", 0.1, 10**9),
        InstanceType("odd", "Radeon", 0.1),
        InstanceType("CPU", "", 0.1),
    )
    with refuses("provider.no_suitable_instance") as error:
        choose_cheapest_instance(Machine("Linux", 0, instance_types=offers), work, NEEDS)
    _, small, odd = error.value.message.split("\n")
    assert small.startswith("  small: 1 GB of disk") and "50 GB" in small
    assert odd.startswith("  odd: ") and "Radeon" in odd
    assert all(name in error.value.hint for name in ("small", "odd", "CPU"))


# The demo, on machines that are taken away


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as running:
        running.users[SECRET] = {"name": "you", "role": "write", "orgs": []}
        yield running


@pytest.fixture(scope="module")
def laptop(tmp_path_factory) -> Path:
    return boxes.laptop(tmp_path_factory.mktemp("laptop"))


@pytest.fixture(scope="module")
def rented(user) -> Sky:
    user.settings(
        VENV=sys.prefix, FERRY_CACHE=os.environ.get("FERRY_CACHE") or str(Path("~/.cache/ferry").expanduser())
    )
    return user


def start(laptop: Path, hub: Hub, user: Sky, *words: str) -> Watch:
    return watched(laptop, hub, *words, FERRY_SKY=skypilot.command(user))


@dataclass
class Evicted:
    said: str
    code: int
    job: dict
    homes: list[Path]


@pytest.fixture(scope="module")
def evicted(laptop, hub, rented) -> Evicted:
    """A managed spot job, whose first machine is taken away in the middle."""
    before = len(rented.jobs())
    watch = start(
        laptop,
        hub,
        rented,
        "cloud-to-local",
        "CONFIG=configs/demo.yaml",
        "CLOUD=sky",
        "SPOT=1",
        "RUN=boat",
        "DEVICE=cpu",
        SET,
        "YES=1",
    )
    watch.until(lambda: at_step(hub, 4))
    number = rented.jobs()[before]["job_id"]
    rented("evict", number)
    code = watch.end()
    return Evicted(
        watch.said, code, rented.jobs()[before], sorted((rented.state / "jobs" / str(number)).glob("machine*"))
    )


@pytest.mark.release
def test_a_spot_machine_is_taken_away_and_the_next_one_goes_on(evicted):
    said = evicted.said
    assert evicted.code == 0 and "Traceback" not in said, said
    assert (evicted.job["status"], evicted.job["recovery_count"], evicted.job["managed"]) == ("SUCCEEDED", 1, True)
    assert re.search(r"checkpoints: runs/boat from you/boat-checkpoints, step \d+", said), "on the second machine"
    assert "  continuing from checkpoint-" in said and "smoke: passed" in said
    assert "cloud: you/boat-GGUF@v1\n  trained on SkyPilot with the code of commit" in said
    last = said.rstrip().splitlines()[-1]
    assert "SkyPilot's controller of managed jobs bills until it is idle" in last
    assert "you/boat-checkpoints (checkpoints) stay" in last
    assert len(evicted.homes) == 2
    assert files.read_json(evicted.homes[1] / "ferry/boat/runs/boat/finetune.json")["steps"] == 30


@pytest.fixture(scope="module")
def cancelled(laptop, hub, rented) -> dict[str, str]:
    """A cluster's job: its first watcher is sent away by Ctrl-C, the second sees it cancelled by a third."""
    words, before = ("CLOUD=sky/runpod", "RUN=dinghy"), len(rented.jobs())
    first = start(laptop, hub, rented, "cloud-to-local", "CONFIG=configs/demo.yaml", *words, "DEVICE=cpu", SET, "YES=1")
    first.until(lambda: "checkpoints: data done" in first.said)
    os.killpg(first.process.pid, signal.SIGINT)
    first.end()
    assert rented.jobs()[before]["status"] == "RUNNING", "Ctrl-C ends the watching"
    again = start(laptop, hub, rented, "cloud-to-local", "CONFIG=configs/demo.yaml", *words, "DEVICE=cpu", SET)
    again.until(lambda: "finetune: step 1/30" in again.said)
    stop = start(laptop, hub, rented, "cloud-stop", *words)
    assert stop.end() == 0 and again.end() == 2, stop.said
    return {"first": first.said, "again": again.said, "stop": stop.said}


@pytest.mark.release
def test_a_cluster_is_watched_again_cancelled_and_taken_down(cancelled, rented):
    assert (
        "still running on SkyPilot on runpod: dinghy; `make cloud-stop CLOUD=sky/runpod RUN=dinghy` ends it. It bills until it ends"
        in cancelled["first"]
    )
    assert "dinghy is already running" in cancelled["again"] and "Traceback" not in "".join(cancelled.values())
    assert re.search("ended: cancelled|no longer exists", cancelled["again"]), "its cluster may be down before it asks"
    assert "finetune: SIGTERM after step" in "".join(cancelled.values()), (
        "all of its processes were told, and one wrote the state"
    )
    assert "down -y ferry-dinghy" in cancelled["stop"] and ["down", "-y", "ferry-dinghy"] in rented.asked()
    assert any(chosen["cloud"] == "runpod" and not chosen["spot"] for chosen in rented.chosen())


@pytest.mark.release
def test_skypilots_own_parser_takes_every_command_that_was_given(rented, evicted, cancelled):
    """All that Ferry ever says to `sky`, but for our own word."""
    lines = [words for words in rented.asked() if words[0] not in ("evict", "supervise")]
    assert {words[0] for words in lines} >= {"check", "gpus", "launch", "jobs", "queue", "logs", "cancel", "down"}
    assert rented.real_parser_takes(lines) == ""
    assert "No such option" in rented.real_parser_takes([["launch", "--nonsense", "x.yaml"]])


@pytest.mark.release
def test_the_token_is_in_no_argument_and_no_file_of_ours(rented, evicted, cancelled, laptop):
    assert not any(SECRET in " ".join(words) for words in rented.asked())
    found = subprocess.run(["grep", "-rl", SECRET, laptop / "runs", rented.state], capture_output=True, text=True)
    assert found.returncode == 1, found.stdout


def test_no_skypilot_is_one_line(laptop, hub, rented):
    watch = watched(
        laptop,
        hub,
        "cloud-to-local",
        "CONFIG=configs/demo.yaml",
        "CLOUD=sky",
        "RUN=x",
        "DEVICE=cpu",
        SET,
        FERRY_SKY="/no/such/sky",
    )
    assert watch.end() == 2 and "cannot start /no/such/sky" in watch.said and "pipx install 'skypilot" in watch.said
    assert "Traceback" not in watch.said


def test_no_cloud_is_one_line(laptop, hub, tmp_path):
    bare = Sky(tmp_path / "bare", clouds=())
    watch = start(laptop, hub, bare, "cloud-to-local", "CONFIG=configs/demo.yaml", "CLOUD=sky", "RUN=x", SET)
    assert watch.end() == 2 and "SkyPilot has no access to any cloud" in watch.said and "Traceback" not in watch.said, (
        watch.said
    )
