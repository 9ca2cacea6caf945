"""Checkpoints that leave the machine: another one, which knows the repo's name and nothing else, goes on from them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from common import files
from pipeline.checkpoint_sync import background_push, push, restore
from pipeline.checkpoint_sync import snapshot as states
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run
from tests.helpers import boxes
from tests.helpers.chain import SHORT
from tests.helpers.commands import refuses
from tests.helpers.hub import Fault
from tests.helpers.tiny_run import begin, losses, trained

pytestmark = pytest.mark.slow  # trains a tiny model

REPO = "you/boat-checkpoints"
NAME = f"models/{REPO}"


def there(hub) -> states.RunState:
    return states.parse_state(hub.read(NAME, states.STATE_FILE), REPO)


def at(hub, step: int, limit: float = 120) -> None:
    """Wait until the repo holds that step or a later one."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if hub.refs(NAME) and states.STATE_FILE in hub.files(NAME) and there(hub).step >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not arrive")


def elsewhere(folder: Path) -> Run:
    """Another machine, which has nothing."""
    return Run(folder / restore.resume_run(REPO, folder).run)


@pytest.fixture
def leaving(monkeypatch, online):
    monkeypatch.setenv(background_push.REPO_VARIABLE, REPO)
    return online


def test_another_machine_goes_on_as_if_nothing_had_been(run, whole, leaving, tmp_path):
    """Killed with kill -9; what is on the Hub is some steps older, and the losses from there on are the same."""
    process = begin(run, save_minutes=1e-6)
    at(leaving, 1)
    process.kill()
    process.communicate()
    left = there(leaving)
    shutil.rmtree(run.folder)
    other = elsewhere(tmp_path / "other")
    assert other.read_record(DataRecord).outputs["train"].sha256 == files.sha256(
        other.read_stage_record("data").output_path("train")
    )
    record = trained(other)
    assert record["resumed_from"].startswith("checkpoint-") and int(record["resumed_from"][11:]) >= left.step
    assert losses(other) == pytest.approx(whole[1], rel=1e-6)
    assert [record[name] for name in ("steps", "rows", "tokens")] == [
        whole[0][name] for name in ("steps", "rows", "tokens")
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.release)])
def test_at_a_signal_the_last_step_leaves(run, leaving, number):
    process = begin(run, save_minutes=1000)
    log = run.folder / "finetune" / "log.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < 5:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(number)
    printed = process.communicate(timeout=90)[0]
    step = len(losses(run))
    assert f"checkpoints: step {step}, in {REPO}" in printed, printed
    assert there(leaving).step == step


def test_an_upload_that_was_killed_half_way_is_never_gone_on_from(run, leaving, tmp_path):
    """The second state dies on the wire: the first one is what another machine gets, whole."""
    process = begin(run, save_steps=2, max_steps=6)
    process.communicate()
    shutil.copytree(run.folder / "finetune" / "adapter", tmp_path / "adapter")
    (run.folder / "finetune.json").unlink()  # as it was before the end
    state, before = there(leaving), len(leaving.commits(NAME))
    assert state.done == ("data", "finetune")
    (run.folder / "finetune" / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(3 << 20))
    (run.folder / "finetune.json").write_text(json.dumps(run_record(run)))
    leaving.faults.append(Fault("PUT /lfs", rate=1e5, times=-1))
    sender = background_push.start_push_process(run, REPO)
    until = time.monotonic() + 60
    sent = leaving.sent["uploads"]
    while leaving.sent["uploads"] < sent + 200_000 and time.monotonic() < until:
        time.sleep(0.02)
    assert leaving.sent["uploads"] >= sent + 200_000 and sender.poll() is None, "it is in the middle"
    sender.kill()
    sender.wait()
    assert len(leaving.commits(NAME)) == before and there(leaving) == state
    other = elsewhere(tmp_path / "other")
    got = other.folder / "finetune" / "adapter" / "adapter_model.safetensors"
    assert files.sha256(got) == files.sha256(tmp_path / "adapter" / "adapter_model.safetensors")


def run_record(run: Run) -> dict:
    path = run.folder / "finetune" / "adapter" / "adapter_model.safetensors"
    return {
        "stage": "finetune",
        "sources": {},
        "outputs": {"adapter": {"path": str(path.relative_to(run.folder)), "bytes": 1, "sha256": "0"}},
    }


def test_old_checkpoints_go_from_the_storage(run, leaving):
    sizes = []
    for step in (4, 8):
        trained(run, max_steps=step) if step == 4 else None
        push.push_state(run, REPO)
        sizes.append(sum(size for _, size in leaving.large(NAME).values()))
        (run.folder / "finetune" / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(1 << 20))
    push.push_state(run, REPO)
    kept = {item["sha256"] for item in there(leaving).files.values()}
    assert set(leaving.large(NAME)) <= kept, "no file of an older state is stored"
    assert len(leaving.commits(NAME)) == 4, "one commit a state, after the empty one"


def test_what_did_not_change_is_not_sent_again(run, leaving):
    push.push_state(run, REPO)
    commits, sent = len(leaving.commits(NAME)), leaving.sent["uploads"]
    assert push.push_state(run, REPO) is None
    assert (len(leaving.commits(NAME)), leaving.sent["uploads"]) == (commits, sent)


def test_the_repo_is_private_and_holds_nothing_but_the_state(run, leaving):
    push.push_state(run, REPO)
    assert leaving.refs(NAME)["private"]
    assert set(leaving.files(NAME)) == {*there(leaving).files, states.STATE_FILE, "README.md", ".gitattributes"} & set(
        leaving.files(NAME)
    )
    assert f"make resume CHECKPOINTS={REPO}" in leaving.read(NAME, "README.md").decode()
    assert not leaving.leaks


def test_refusals(run, leaving, tmp_path, monkeypatch):
    leaving.add("models/you/open", folder_with(tmp_path / "a", "x.txt"), private=False)
    leaving.add("models/you/other", folder_with(tmp_path / "b", "x.txt"), private=True)
    with refuses("checkpoints.public_repo") as error:
        push.push_state(run, "you/open")
    assert "you/open" in error.value.message
    with refuses("checkpoints.foreign_repo") as error:
        push.push_state(run, "you/other")
    assert "you/other" in error.value.message and "x.txt" in error.value.message
    push.push_state(run, REPO)
    tree = yaml.safe_load(run.config_file.read_text())
    run.config_file.write_text(yaml.safe_dump(tree | {"finetune": tree["finetune"] | {"seed": 1}}))
    with refuses("checkpoints.other_config") as error:
        push.push_state(run, REPO)
    assert "the run run " in error.value.message
    with refuses("checkpoints.other_config") as error:
        restore.restore_run(REPO, Run(tmp_path / "elsewhere" / "run"), run.read_config())
    assert error.value.message.endswith("\n  finetune.seed: 3407 in the repo, 1 here")
    with refuses("checkpoints.other_run") as error:
        restore.restore_run(REPO, Run(tmp_path / "elsewhere" / "boat"), run.read_config())
    assert "the run run," in error.value.message and error.value.message.endswith(" boat")
    assert not (tmp_path / "elsewhere").exists()
    for checkpoints in ("", "boat", "./boat", "you/boat@v1", "you/{run}"):
        with refuses("checkpoints.invalid_repo_name") as error:
            restore.resume_run(checkpoints, tmp_path)
        assert f"CHECKPOINTS={checkpoints} " in error.value.message
        assert error.value.hint == "CHECKPOINTS=owner/name"
    with refuses("checkpoints.no_run") as error:
        restore.resume_run("you/nothing", tmp_path)
    assert "you/nothing" in error.value.message
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with refuses("hub.forbidden") as error:
        push.push_state(run, "you/new")
    assert "you/new" in error.value.message


def folder_with(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / name).write_text("x")
    return folder


def test_a_machine_that_was_left_behind_does_not_write_over_the_other(run, leaving, tmp_path):
    shutil.copytree(run.folder, tmp_path / "behind" / "run")
    trained(run, max_steps=4)
    push.push_state(run, REPO)
    with refuses("checkpoints.newer_state") as error:
        push.push_state(Run(tmp_path / "behind" / "run"), REPO)
    assert isinstance(error.value, push.NewerStateError)
    assert re.search(r"is at finetune done, .* at data done.* run$", error.value.message)


def test_a_flipped_bit_is_noticed_and_nothing_appears(run, leaving, tmp_path):
    push.push_state(run, REPO)
    name = "data/train.parquet"
    content = bytearray(leaving.read(NAME, name))
    content[100] ^= 1
    entry = leaving.files(NAME)[name]
    leaving.object(entry).write_bytes(content)
    with refuses("checkpoints.damaged_file") as error:
        restore.resume_run(REPO, tmp_path / "other")
    assert name in error.value.message
    assert [path.name for path in (tmp_path / "other").iterdir()] == [".run.lock"]


@pytest.mark.parametrize("content", [
    b"[]", b"{}", b"no json", b'{"schema": 2}', b'{"schema": 1, "run": "../x", "config": "", "done": [], "step": 0, "files": {}}',
    json.dumps({"schema": 1, "run": "x", "config": "", "done": [], "step": 0, "files": {n: {"sha256": "0" * 64, "bytes": 1} for n in ("config.yaml", "data.json", "../../etc/passwd")}}).encode(),
], ids=["a list", "empty", "no JSON", "no more than a schema", "a run that leads out", "a file that leads out"])  # fmt: skip
def test_an_index_that_lies(content):
    with refuses("checkpoints.invalid_state") as error:
        states.parse_state(content, "you/x/state.json")
    assert "you/x/state.json" in error.value.message


def test_an_index_of_a_newer_ferry():
    with refuses("checkpoints.newer_schema") as error:
        states.parse_state(b'{"schema": 3}', "you/x/state.json")
    assert "you/x/state.json has schema 3" in error.value.message


@pytest.mark.release
def test_a_hub_that_is_away_costs_the_training_nothing(run, whole, leaving):
    leaving.faults.append(Fault("(POST|GET) /api/(?!whoami)", status=503, times=-1))
    process = begin(run, save_minutes=1e-6)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert losses(run) == pytest.approx(whole[1], rel=1e-6)
    assert "error: checkpoints to you/boat-checkpoints: the Hub answers 503" in printed and "Traceback" not in printed


def test_a_sender_that_hangs_is_replaced(run, leaving, monkeypatch):
    """Such as one over Xet, where no time limit reaches: the next is told to use plain LFS."""
    monkeypatch.setattr(background_push, "PUSH_TIMEOUT", 0.5)
    told: list[bool] = []

    def started(run, repo, plain):
        told.append(plain)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    monkeypatch.setattr(background_push, "start_push_process", started)
    sending = background_push.CheckpointSync(run, REPO, 1e-6)
    sending.send_if_due(Path("checkpoint-1"))
    first = sending.process
    sending.send_if_due(Path("checkpoint-2"))
    assert sending.process is first and sending.checkpoint_in_transit == Path("checkpoint-1"), "one at a time"
    time.sleep(0.6)
    sending.send_if_due(Path("checkpoint-3"))
    assert first.poll() is not None and told == [False, True] and sending.checkpoint_in_transit == Path("checkpoint-3")
    sending.kill_push()
    assert sending.checkpoint_in_transit is None


# The whole chain, on the demo's real weights


def machine(folder: Path) -> Path:
    """A checkout of its own, as on a machine of its own."""
    folder.mkdir()
    return boxes.laptop(folder)


def start(place: Path, *words: str) -> subprocess.Popen:
    return boxes.started_at(place, *words, HF_HOME=str(place / "hf"))


@pytest.mark.release
def test_a_machine_is_taken_away_and_another_has_nothing_but_the_repos_name(chain, online, tmp_path):
    """Machine A is killed in the middle; B resumes by the repo's name, and ends as the run that nobody disturbed."""
    words = [
        f"SET={SHORT} publish.repo={{user}}/{{run}}-GGUF finetune.save_minutes=0.001",
        "RUN=boat",
        "CONFIG=configs/demo.yaml",
    ]
    a, b = machine(tmp_path / "a"), machine(tmp_path / "b")
    first = start(a, "train", "CHECKPOINTS={user}/{run}-checkpoints", *words)
    at(online, 8, 300)
    os.killpg(first.pid, signal.SIGKILL)
    assert "checkpoints go to you/boat-checkpoints on the Hub (new, private)" in first.communicate()[0]
    shutil.rmtree(a)  # the machine is gone
    second = start(b, "resume", f"CHECKPOINTS={REPO}")
    printed = second.communicate()[0]
    assert second.returncode == 0, printed
    tuned = files.read_json(b / "runs" / "boat" / "finetune.json")
    assert int(tuned["resumed_from"].split("-")[1]) >= 8 and tuned["steps"] == 30, printed
    alone = files.read_json(chain.run / "finetune.json")
    assert tuned["final_loss"] == pytest.approx(alone["final_loss"], rel=0.005)
    assert "  you/boat-GGUF@v1\n" in printed
    assert json.loads(online.read(NAME, "publish.json"))["tag"] == "v1", "whoever waits for it finds where it is"
    third = start(b, "resume", f"CHECKPOINTS={REPO}", "RUNS=again")
    printed = third.communicate()[0]
    assert third.returncode == 2 and "the run boat is complete" in printed and "you/boat-GGUF@v1" in printed, printed


def test_preflight_asks_before_any_gpu_work(run, leaving, tmp_path, monkeypatch):
    from pipeline.preflight import check_run

    config, name = run.read_config(), run.folder.name
    assert check_run.check_checkpoint_repo(config, run, REPO) == f"checkpoints go to {REPO} on the Hub (new, private)"
    push.push_state(run, REPO)
    assert (
        check_run.check_checkpoint_repo(config, run, REPO)
        == f"checkpoints go to {REPO} on the Hub (at data done, private)"
    )
    leaving.add("models/you/open", folder_with(tmp_path / "a", "x.txt"), private=False)
    with refuses("checkpoints.public_repo") as error:
        check_run.check_checkpoint_repo(config, run, "you/open")
    assert "you/open" in error.value.message
    with refuses("checkpoints.other_run") as error:
        check_run.check_checkpoint_repo(config, Run(run.folder.with_name("other")), REPO)
    assert f"the run {name}," in error.value.message and error.value.message.endswith(" other")
    with refuses("hub.no_write_access") as error:
        check_run.check_checkpoint_repo(config, run, "strangers/x")
    assert "strangers/x" in error.value.message
    monkeypatch.delenv("HF_TOKEN")
    with refuses("hub.no_token") as error:
        check_run.check_checkpoint_repo(config, run, REPO)
    assert REPO in error.value.message


def test_rows_whose_file_is_elsewhere_are_still_the_runs_rows(run, leaving, tmp_path):
    """On the machine that made them a data file that is gone is a fault; on the next one it never was."""
    from pipeline.run.changes import find_changes

    config = run.read_config()
    push.push_state(run, REPO)
    other = elsewhere(tmp_path / "other")
    source = Path(config.data.source)
    aside = source.rename(source.with_name("aside.jsonl"))
    try:
        assert any(f"{source}: " in fault for fault in find_changes(run, config).faults)
        assert not find_changes(other, config).faults and not find_changes(other, config).stale
    finally:
        aside.rename(source)


@pytest.mark.release
def test_the_checkpoint_on_its_way_stays_until_it_has_arrived(run, leaving):
    """A slow Hub: newer ones come meanwhile, and the one that is being sent is not removed."""
    leaving.faults.append(Fault("objects/batch", stall=2, times=1))
    process = begin(run, save_minutes=1e-6, num_train_epochs=12)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "not sent" not in printed and "Traceback" not in printed, printed
    sent = re.findall(r"checkpoints: step (\d+), in", printed)
    assert sent and there(leaving).done == ("data", "finetune"), printed


def test_what_leaves_is_whole_checkpoints_the_newest_and_the_best(run):
    folder = run.folder / "finetune" / "checkpoints"
    for step, marked in ((2, True), (4, True), (6, True), (8, False)):
        files.write_json(
            folder / f"checkpoint-{step}" / "trainer_state.json", {"best_model_checkpoint": "elsewhere/checkpoint-2"}
        )
        if marked:
            files.write_json(folder / f"checkpoint-{step}" / "ferry-complete", {"step": step})
    for copy in ("checkpoint-best", "checkpoint-6.bak", "checkpoint-7-mine"):  # a user's
        shutil.copytree(folder / "checkpoint-6", folder / copy)
    (run.folder / "export").mkdir()
    (run.folder / "export" / "run.f16.gguf").write_bytes(b"large")
    state = states.snapshot_run(run)
    left = {name.split("/")[2] for name in state.files if name.startswith("finetune/checkpoints/")}
    assert state.step == 6 and left == {"checkpoint-2", "checkpoint-6"}
    assert not any("gguf" in name for name in state.files), "it is made again in minutes"
    assert {"config.yaml", "data.json", "data/train.parquet", "data/heldout.jsonl"} <= state.files.keys()
