"""Nothing of a user's is deleted or replaced without proof that it is Ferry's: on machines, on the Hub, in a rescue."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from common import files, hub
from contract import manifest
from launch import cloud_to_local, job_script, rescue, source_archive
from launch.costs import JobSession
from launch.provider import ConnectionLost, InstanceRequest, InstanceType, Job, JobState, Machine
from launch.providers import skypilot
from launch.providers.hub_job import HubJobProvider
from launch.providers.ssh import SshProvider
from pipeline.checkpoint_sync import push
from pipeline.checkpoint_sync import snapshot as states
from pipeline.publish import upload_process
from pipeline.run.run_folder import Run
from tests.helpers import boxes, repos
from tests.helpers.commands import refuses
from tests.helpers.hub import Fault, Hub, lfs_entry

MODEL, CHECKPOINTS, JOB = "models/you/tickets-GGUF", "models/you/tickets-checkpoints", "datasets/you/tickets-job"


@pytest.fixture
def home(tmp_path) -> Path:
    """Of the machine where jobs lie."""
    return tmp_path / "home"


@pytest.fixture
def box(home) -> SshProvider:
    """That machine, with ssh_box.sh, but without a network between."""
    return SshProvider(None, str(home))


@pytest.fixture
def job(tmp_path) -> Job:
    """A run `website` of a tree of two files."""
    checkout = tmp_path / "checkout"
    fill(checkout, {"Makefile": "train:\n", "README.md": "of Ferry\n"})
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it is"]):
        boxes.git(checkout, *words)
    order = InstanceRequest(InstanceType("CPU", "", None), 1, 1, job_script.DEFAULT_IMAGE)
    return Job(
        "website", "website", checkout, source_archive.head_commit(checkout), None, "base: {}\n", instance_request=order
    )


def fill(folder: Path, contents: dict[str, str | bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def contents_of(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


# A machine that ssh reaches, or a rented one: what lies where the job is to go


FOREIGN = {
    "a site": {"README.md": "of my site\n", "Makefile": "site:\n", "src/index.html": "mine\n"},
    "hidden files": {".git/config": "mine\n"},
    "half of a mark": {"job/commit": "0" * 40, "README.md": "of my site\n"},
    "another job": {"job/listing": "README.md\n", "README.md": "of my site\n"},
    "a folder called job": {"job/offer.pdf": "mine\n"},
}
OURS = {
    "nothing": None,
    "an empty folder": {},
    "a claim that was interrupted": {"job/listing": ""},
    "an older Ferry's": {
        "job/commit": "0" * 40,
        "job/listing": "old.py\n",
        "old.py": "",
        "runs/website/data.json": "{}",
    },
}


@pytest.mark.parametrize("there", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_of_something_else_is_left_alone_and_named(box, home, job, there):
    fill(home / "website", there)
    names = {part for name in there for part in name.split("/")}
    with refuses("job.foreign_folder") as error:
        box.send_job(job)
    named = error.value.message.removeprefix(f"this machine: {home}/website contains ").partition(", which")[0]
    assert named != error.value.message and names & set(named.split(", ")), error.value
    assert "RUN=another-name" in error.value.hint
    assert contents_of(home / "website") == {name: content.encode() for name, content in there.items()}


@pytest.mark.parametrize("there", OURS.values(), ids=OURS)
def test_a_new_folder_and_that_of_a_job_are_sent_to(box, home, job, there):
    fill(home / "website", there or {})
    if there == {}:
        (home / "website").mkdir(parents=True)
    box.send_job(job)
    now = contents_of(home / "website")
    assert now["README.md"] == b"of Ferry\n" and now["job/commit"].decode() == job.commit
    assert "old.py" not in now and ("runs/website/data.json" in now) == ("runs/website/data.json" in (there or {}))


def test_a_send_that_was_interrupted_is_sent_again(box, home, job, monkeypatch):
    def break_off(remote, write) -> None:
        fill(home / "website", {"README.md": "of Ferry, ha"})
        raise ConnectionLost("the connection was closed", "the same command", code="ssh.unreachable")

    with monkeypatch.context() as patched:
        patched.setattr(box, "_run_with_input", break_off)
        with pytest.raises(ConnectionLost):
            box.send_job(job)
    box.send_job(job)
    assert contents_of(home / "website")["README.md"] == b"of Ferry\n"


def test_a_listing_that_leads_out_deletes_nothing_there(box, home, job):
    diary = fill(home, {"diary.txt": "mine", "notes/diary.txt": "mine"})
    listing = f"{diary}/diary.txt\n../notes/diary.txt\nold.py\n"
    fill(home / "website", {"job/commit": "0" * 40, "job/listing": listing, "old.py": ""})
    box.send_job(job)
    assert (home / "diary.txt").exists() and (home / "notes/diary.txt").exists()
    assert not (home / "website/old.py").exists(), "what was sent before goes"


def unpack(job: Job, home: Path, archive: Path) -> subprocess.CompletedProcess:
    """Run the beginning of a rented machine's line, up to where it fetches the data."""
    line = job_script.build_command_line(job, "train").partition(" && python3 launch/providers/fetch_data.py")[0]
    settings = {
        "HOME": str(home),
        "PATH": f"{archive}:/usr/bin:/bin",
        "FERRY_JOB": f"file://{archive}/",
        "HF_TOKEN": "hf_x",
    }
    return subprocess.run(["sh", "-c", line], env=settings, cwd=archive, capture_output=True, text=True)


@pytest.fixture
def archive(job, tmp_path) -> Path:
    """The folder of job.tar, and of the machine's python3."""
    folder = fill(tmp_path / "archive", {"job.tar": source_archive.build_archive(job)})
    (folder / "python3").symlink_to(sys.executable)
    return folder


@pytest.mark.parametrize("there", FOREIGN.values(), ids=FOREIGN)
def test_a_rented_machine_unpacks_over_nothing_of_anothers(job, archive, home, there):
    fill(home / "ferry" / "website", there)
    done = unpack(job, home, archive)
    assert done.returncode == 1 and "error: " in done.stderr and " next: RUN=" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert contents_of(home / "ferry" / "website") == {name: content.encode() for name, content in there.items()}


@pytest.mark.parametrize("there", OURS.values(), ids=OURS)
def test_a_rented_machine_unpacks_into_a_new_folder_and_a_jobs(job, archive, home, there):
    fill(home / "ferry" / "website", there or {})
    done = unpack(job, home, archive)
    assert done.returncode == 0, done.stderr
    assert contents_of(home / "ferry" / "website")["job/commit"].decode() == job.commit


def test_what_was_unpacked_by_half_is_unpacked_again(job, archive, home):
    whole = (archive / "job.tar").read_bytes()
    (archive / "job.tar").write_bytes(whole[: whole.index(b"of Ferry") + 2])
    assert unpack(job, home, archive).returncode == 1
    assert "Makefile" in contents_of(home / "ferry" / "website")
    (archive / "job.tar").write_bytes(whole)
    assert unpack(job, home, archive).returncode == 0


# What a run made, before its machine goes


def pack(contents: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


class Failing(SshProvider):
    """A machine of which so many bytes come before it is gone."""

    def __init__(self, home: Path, count: int):
        super().__init__(None, str(home))
        self.count = count

    def pack_run(self, name: str, run: str):
        content = pack({"config.yaml": b"x" * 2000, "finetune/adapter.safetensors": b"x" * 90_000})
        yield from filter(None, [content[: self.count]])
        raise ConnectionLost("the connection was closed", "the same command", code="ssh.unreachable")


def tear_down(launcher, tmp_path: Path) -> tuple[str, bool]:
    """What is said at the end, and whether the machine was given back."""
    session = JobSession(
        launcher, "website", "", f"echo ended >> {tmp_path}/bill", rescue_folder=tmp_path / "cloud" / "rescued"
    )
    said = session.teardown_and_report(succeeded=False)
    return said, (tmp_path / "bill").exists()


def test_a_tar_that_fails_at_its_end_is_no_rescue(box, home, tmp_path, monkeypatch):
    fill(home / "website" / "runs" / "website", {"config.yaml": "x", "finetune/adapter.safetensors": "x" * 1000})
    fill(tmp_path / "cloud" / "rescued", {"config.yaml": "the one before"})
    program = fill(tmp_path / "bin", {"tar": f'#!/bin/sh\n{shutil.which("tar")} "$@"\nexit 2\n'}) / "tar"
    program.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        said, ended = tear_down(box, tmp_path)
    assert "TEARDOWN was not run" in said and not ended, said
    assert contents_of(tmp_path / "cloud") == {"rescued/config.yaml": b"the one before"}
    assert tear_down(box, tmp_path)[1], "a tar that ends well is one"
    assert "finetune/adapter.safetensors" in contents_of(tmp_path / "cloud" / "rescued")


@pytest.mark.parametrize("count", [1, 3000, 80_000])
def test_a_machine_that_is_lost_in_the_middle_is_not_given_back(home, tmp_path, count):
    said, ended = tear_down(Failing(home, count), tmp_path)
    assert "TEARDOWN was not run" in said and "the connection was closed" in said and not ended
    assert not (tmp_path / "cloud" / "rescued").exists()


def test_a_machine_that_is_out_of_reach_is_given_back(home, tmp_path):
    assert tear_down(Failing(home, 0), tmp_path)[1]


def test_what_was_brought_home_before_is_kept_beside_it(box, home, tmp_path, capfd):
    rescued, there = tmp_path / "cloud" / "rescued", home / "website" / "runs" / "website"
    fill(rescued, {"finetune/checkpoints/checkpoint-2000/adapter.safetensors": "hours of work"})
    for text in ("first", "second"):
        fill(there, {"log": text})
        assert rescue.rescue_run(box, "website", "website", rescued) is None
    assert contents_of(rescued) == {"log": b"second"}
    assert contents_of(rescued.with_name("rescued.before")) == {
        "finetune/checkpoints/checkpoint-2000/adapter.safetensors": b"hours of work"
    }
    assert contents_of(rescued.with_name("rescued.before.2")) == {"log": b"first"}
    assert str(rescued.with_name("rescued.before.2")) in capfd.readouterr().err


@pytest.fixture
def launched(box, job, tmp_path, monkeypatch):
    """cloud.stage with a job that ends well, without the checks before it. Called with what is found there."""
    run = Run(tmp_path / "runs" / "website")
    answers = {
        "refuse_folder_hub": None, "build_job": job, "find_earlier_result": None, "require_suitable_machine": Machine("Linux", 0),
        "run_local_checks": None, "add_job_files": job, "estimate_work": None, "estimate_disk_bytes": 0, "plan_on_machine": None,
        "refuse_full_disk": None, "confirm_start": None, "submit_job": None, "wait_for_job": JobState("ended", 0),
        "fetch_job_result": "./hub/website",
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(cloud_to_local, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(cloud_to_local.load, "load_config", lambda *_: None)

    def launch(found: JobState) -> Path:
        monkeypatch.setattr(cloud_to_local, "resume_existing_job", lambda *_: found)
        cloud_to_local.run_cloud_to_local(Path("config.yaml"), run, box, "ssh://box", cloud_to_local.LaunchOptions())
        return run.folder / "cloud"

    return launch


def test_when_it_is_delivered_all_that_was_brought_home_goes(launched, tmp_path):
    notes = tmp_path / "runs" / "website" / "cloud"
    fill(notes, {"rescued/log": "x", "rescued.before/adapter": "x", "rescued.before.2/log": "x", "log": "kept"})
    launched(JobState("ended", 0))
    assert contents_of(notes) == {"log": b"kept"}


def test_the_log_of_each_machine_is_kept(launched, tmp_path):
    notes = tmp_path / "runs" / "website" / "cloud"
    for text in ("first", "second", "third"):
        fill(notes, {"log": text})
        launched(JobState("absent"))
    assert {path.name: path.read_text() for path in notes.glob("log*")} == {
        "log.before": "first", "log.before.2": "second", "log.before.3": "third",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tickets.v2", "Tickets_v2", "TICKETS-v2", "-tickets-v2", "..."])
def test_no_two_runs_share_a_cluster(name):
    others = {"tickets-v2", "tickets.v2", "Tickets_v2", "tickets_v2", "tickets-v2-", "_"} - {name}
    assert skypilot.cluster_name(name) not in {skypilot.cluster_name(other) for other in others}
    assert skypilot.cluster_name(name) == skypilot.cluster_name(name) and "--" not in skypilot.cluster_name(name)
    assert set(skypilot.cluster_name(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_cluster_whose_run_has_a_plain_name_is_called_like_it():
    assert skypilot.cluster_name("tickets-v2") == "ferry-tickets-v2"


# Repos of the Hub


def add(server: Hub, name: str, contents: dict[str, bytes]) -> None:
    """Files that a user adds to a repo, by the site or another program."""
    stored = {path: store(server, path, content) for path, content in contents.items()}
    if server.refs(name) is None:
        server.create(name, True, stored, "by hand")
    else:
        server.commit(name, "main", server.files(name) | stored, "by hand")


def store(server: Hub, path: str, content: bytes) -> dict:
    """A file's entry in a tree, for LFS where the Hub would do so."""
    if not server.is_lfs(path, len(content), content):
        return server.store(content)
    digest = files.sha256_bytes(content)
    (server.folder / "objects" / digest).write_bytes(content)
    return lfs_entry(digest, len(content))


def contents_on(server: Hub, name: str) -> dict[str, bytes]:
    return {path: server.read(name, path) for path in server.files(name)}


@pytest.fixture
def push_state(online, tmp_path, monkeypatch):
    """Push a run whose checkpoint holds these bytes."""
    run = Run(tmp_path / "runs" / "tickets")
    checkpoint = "finetune/checkpoints/checkpoint-8/adapter.safetensors"

    def snapshot(_) -> states.RunState:
        described = {name: states.describe_file(run.folder / name) for name in contents_of(run.folder)}
        return states.RunState("tickets", described["config.yaml"]["sha256"], ("data",), 8, described)

    def send(content: bytes) -> states.RunState | None:
        fill(run.folder, {"config.yaml": "base: {}\n", "data.json": "{}", checkpoint: content})
        return push.push_state(run, "you/tickets-checkpoints")

    monkeypatch.setattr(states, "snapshot_run", snapshot)
    return send


def test_only_files_of_the_state_before_leave_the_storage(push_state, online):
    """Not what a user put there, nor a checkpoint that he copied to keep it."""
    first, second, notes = b"first" * 500, b"second" * 500, b"%PDF\0" * 500
    push_state(first)
    add(online, CHECKPOINTS, {"my-notes.pdf": notes})
    push_state(second)
    assert files.sha256_bytes(first) not in online.large(CHECKPOINTS), "the state before"
    add(online, CHECKPOINTS, {"best/adapter.safetensors": second})
    push_state(b"third" * 500)
    there = contents_on(online, CHECKPOINTS)
    assert (there["my-notes.pdf"], there["best/adapter.safetensors"]) == (notes, second)


def test_a_push_whose_answer_was_lost_still_clears_the_state_before(push_state, online):
    first = b"first" * 500
    push_state(first)
    online.faults.append(Fault("POST .*/commit/", lose=True))
    assert push_state(b"second" * 500) is not None
    assert files.sha256_bytes(first) not in online.large(CHECKPOINTS)


def send_job(job: Job, *names: str) -> None:
    """To the Hub, as a launcher does that rents a machine."""
    data = fill(job.repository.parent / "rows", {name: name for name in names})
    whole = Job("tickets", "tickets", job.repository, job.commit, None, "", {name: data / name for name in names})
    HubJobProvider("there", "you/tickets-checkpoints").send_job(whole)


NOTE = {"run": "tickets", "config": "0" * 64, "commit": "0" * 40}
NOT_OURS = {
    "a list": [], "another program's": {"cron": "* * * * *"}, "another run's": NOTE | {"run": "letters"},
    "without a commit": {"run": "tickets", "config": "0" * 64}, "no text": NOTE | {"commit": 1},
}  # fmt: skip


@pytest.mark.parametrize("note", [*map(json.dumps, NOT_OURS.values()), "no JSON"], ids=[*NOT_OURS, "no JSON"])
def test_a_data_set_with_a_job_file_of_something_else_is_left_alone(job, online, note):
    mine = {"job.json": note.encode(), "data/rows.csv": b"mine", "README.md": b"mine"}
    add(online, JOB, mine)
    with refuses("job.repo_of_other_run" if "letters" in note else "job.foreign_repo") as error:
        send_job(job, "rows.jsonl")
    assert "you/tickets-job" in error.value.message and ("letters" in error.value.message) == ("letters" in note)
    assert error.value.hint == "RUN=another-name" and contents_on(online, JOB) == mine
    if "letters" not in note:
        assert HubJobProvider("there", "you/tickets-checkpoints").fetch_job_note("tickets") == {}


@pytest.mark.parametrize("older", [False, True], ids=["sent", "an older Ferry's"])
def test_of_an_older_job_goes_the_data_that_it_named(job, online, older):
    if older:
        add(online, JOB, {"job.json": json.dumps(NOTE).encode(), "data/first.jsonl": b"x"})
    else:
        send_job(job, "first.jsonl")
    add(online, JOB, {"data/mine.csv": b"mine"})
    send_job(job, "second.jsonl")
    data = {name for name in online.files(JOB) if name.startswith("data/")}
    assert data == {"data/mine.csv", "data/second.jsonl"} | ({"data/first.jsonl"} if older else set())
    assert HubJobProvider("there", "you/tickets-checkpoints").fetch_job_note("tickets")["commit"] == job.commit


def publish(folder: Path) -> None:
    """One commit of what the folder's manifest names."""
    api = hub.create_client()
    api.create_repo("you/tickets-GGUF", private=True, exist_ok=True)
    upload_process.commit_folder(
        api, folder, "you/tickets-GGUF", True, manifest.read_manifest(folder / manifest.FILE_NAME)
    )


def test_a_model_does_not_take_the_place_of_another(online, tmp_path):
    publish(repos.make(tmp_path / "tickets", 1 << 16, name="tickets"))
    before = online.files(MODEL)
    with refuses("hub.other_model") as error:
        publish(repos.make(tmp_path / "letters", 1 << 16, name="letters"))
    assert "tickets" in error.value.message and "letters" in error.value.message
    assert "publish.repo" in error.value.hint and online.files(MODEL) == before
    publish(repos.make(tmp_path / "again", 1 << 16, seed=2, name="tickets"))
    assert online.files(MODEL) != before, "its own next version does"


OLDER = {"schema_version": 1, "name": "tickets", "artifacts": [], "golden": []}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"schema_version": 1}, "hub.foreign_manifest"),
        ({"schema_version": 2, "packages": {"a": "1.0"}}, "hub.foreign_manifest"),
        ({"schema_version": 2, "artifacts": []}, "hub.foreign_manifest"),
        ([{"schema_version": 1}], "hub.foreign_manifest"),
        (OLDER | {"name": "letters"}, "hub.other_model"),
        (OLDER, None),
    ],
)
def test_a_manifest_that_this_ferry_cannot_read_must_be_a_ferrys_and_this_models(online, tmp_path, content, code):
    mine = {manifest.FILE_NAME: json.dumps(content).encode(), "README.md": b"mine"}
    add(online, MODEL, mine)
    folder = repos.make(tmp_path / "tickets", 1 << 16, name="tickets")
    if code is None:
        publish(folder)
        assert online.read(MODEL, manifest.FILE_NAME) == (folder / manifest.FILE_NAME).read_bytes()
    else:
        with refuses(code) as error:
            publish(folder)
        assert "you/tickets-GGUF" in error.value.message
        assert contents_on(online, MODEL) == mine
