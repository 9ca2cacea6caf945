"""What goes wrong between a laptop and a box: a real OpenSSH server on loopback, each fault one clear line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import files
from launch import upload_files
from launch.providers import ssh as boxes_there
from launch.providers import ssh_address
from tests.helpers import boxes
from tests.helpers.boxes import Box
from tests.helpers.chain import SHORT
from tests.helpers.commands import ROOT, refuses
from tests.helpers.hub import serving

pytestmark = [
    pytest.mark.slow,  # starts jobs on an OpenSSH server
    pytest.mark.skipif(not shutil.which("sshd", path="/usr/sbin:/usr/bin"), reason="no OpenSSH server here"),
]


@pytest.fixture(scope="module")
def laptop(tmp_path_factory) -> Path:
    return boxes.laptop(tmp_path_factory.mktemp("laptop"))


@pytest.fixture
def box(tmp_path) -> Iterator[Box]:
    with boxes.running(tmp_path / "box") as running:
        yield running


def launched(
    laptop: Path, box: Box, *words: str, run: str = "fault", **environment: str
) -> subprocess.CompletedProcess:
    """The command that most faults happen to."""
    return boxes.make(
        laptop, box, "cloud-to-local", *config_of(words), f"CLOUD={box.address}", f"RUN={run}", f"SET={SHORT}", *words,
        **environment,
    )  # fmt: skip


def config_of(words: tuple[str, ...]) -> list[str]:
    """The demo's, unless another one is named."""
    return [] if any(word.startswith("CONFIG=") for word in words) else ["CONFIG=configs/demo.yaml"]


def refused(done: subprocess.CompletedProcess, what: str) -> str:
    """One clear line and the next command; before it, what still runs and bills."""
    out = done.stdout
    assert done.returncode == 2, out
    assert "Traceback" not in out
    errors = re.findall(r"^error: .*$", out, re.MULTILINE)
    assert len(errors) == 1 and what in errors[0], out
    assert re.search(r"^ next: \S", out, re.MULTILINE)
    assert "does not run on root@127.0.0.1" in out and "bills until" in out, out
    return out


def test_no_route(laptop, box):
    box.stop()
    refused(launched(laptop, box), "root@127.0.0.1 cannot be reached: connect to host 127.0.0.1 port")


def test_an_ssh_command_that_no_shell_reads(laptop, box):
    refused(launched(laptop, box, FERRY_SSH="ssh 'i"), "FERRY_SSH is not a valid command line: No closing quotation")


def test_a_box_that_cannot_be_told_to_stop_is_not_said_to_have_stopped(laptop, box, tmp_path):
    box.stop()
    done = boxes.make(laptop, box, "cloud-stop", f"CLOUD={box.address}", "RUN=fault", f"TEARDOWN=touch {tmp_path}/gone")
    assert done.returncode == 2 and "still running on root@127.0.0.1: fault" in done.stdout, done.stdout
    assert "error: root@127.0.0.1 cannot be reached" in done.stdout and not (tmp_path / "gone").exists()


def test_a_key_that_the_box_does_not_know(laptop, box):
    shutil.copy(box.folder / "stranger", box.folder / "user")
    (box.folder / "user.pub").unlink()
    assert "ssh-copy-id" in refused(launched(laptop, box), "does not accept this machine's key")


def test_a_changed_host_key(laptop, box):
    box.stop()
    box.key("host")
    box.start()
    out = refused(launched(laptop, box), "its host key differs from the known one")
    assert f"ssh-keygen -R '[127.0.0.1]:{box.port}'" in out
    assert not (box.home / "ferry").exists(), "nothing was sent to it"


def test_a_host_key_that_nobody_has_seen(laptop, box):
    (box.folder / "known").write_text("")
    refused(launched(laptop, box), "its host key is not known here")
    assert (box.folder / "known").read_text() == "", "it was not accepted without a word"


def test_no_gpu_on_the_box(laptop, box):
    assert "DEVICE=cpu" in refused(launched(laptop, box), "root@127.0.0.1 has no NVIDIA GPU")


def test_no_make_and_no_python_on_the_box(laptop, tmp_path):
    with boxes.running(tmp_path / "bare", only=True) as bare:
        bare.lend(
            "sh", "uname", "dirname", "df", "awk", "tar", "flock", "setsid", "sha256sum", "tail", "cat", "cut", "wc"
        )
        assert "apt-get install" in refused(launched(laptop, bare, "DEVICE=cpu"), "root@127.0.0.1 has no make, python3")


def test_a_token_without_the_right_to_write(laptop, box, tmp_path):
    with serving(tmp_path / "storage") as hub:
        done = launched(
            laptop, box, "DEVICE=cpu", "YES=1", f"SET={SHORT} publish.repo=you/boat", HF_TOKEN="hf_reader", HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "home"), run="owned",
        )  # fmt: skip
    refused(done, "the token may only read")
    assert not (box.home / "ferry" / "owned").exists()


def test_a_price_over_the_limit(laptop, box):
    box.program("nvidia-smi", 'echo "NVIDIA H100 80GB HBM3"')
    out = refused(launched(laptop, box, "YES=1", "MAX_DOLLARS=0.01"), "the limit is $0.01")
    assert "on H100 (85 GB)" in out and re.search(r"^  memory +\d", out, re.MULTILINE), "the plan"
    assert re.search(
        r"fault on root@127\.0\.0\.1 \(NVIDIA H100 80GB HBM3\): about \d+ (s|min) and \$0\.\d\d, set-up", out
    )
    assert not (box.home / "ferry" / "fault").exists()


def test_nobody_is_there_to_agree(laptop, box):
    assert "YES=1" in refused(launched(laptop, box, "DEVICE=cpu"), "cannot ask for confirmation")
    assert not (box.home / "ferry" / "fault").exists()


def test_a_disk_too_small_for_the_run(laptop, box):
    box.program("df", "echo Filesystem; echo /dev/vda 9 9 1000000 1% /")
    refused(
        launched(laptop, box, "DEVICE=cpu", "YES=1"),
        "has 1.0 GB of free disk where the job's folder goes, the job needs 5.",
    )


def test_a_disk_that_fills_up_while_it_is_sent(laptop, tmp_path):
    mount = 'mkdir -p "$0" && mount -t tmpfs -o size=300k tmpfs "$0" && exec "$@"'
    small = tmp_path / "box" / "small"
    prefix = ("unshare", "--mount", "sh", "-c", mount, str(small))
    if subprocess.run([*prefix[:-1], str(tmp_path / "probe"), "true"], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    with boxes.running(tmp_path / "box", prefix=prefix) as box:
        box.program("df", "echo Filesystem; echo /dev/vda 9 9 99999999 1% /")
        done = boxes.make(
            laptop,
            box,
            "cloud-to-local",
            f"CLOUD={box.address}{small}",
            "RUN=fault",
            f"SET={SHORT}",
            "DEVICE=cpu",
            "YES=1",
        )
        assert "free some disk there" in refused(done, "No space left on device")


@pytest.mark.parametrize(("code", "said"), [(0, "TEARDOWN has ended"), (3, "TEARDOWN failed (exit code 3)")])
def test_the_teardown_is_run_when_nothing_runs(laptop, box, tmp_path, code, said):
    done = launched(laptop, box, f"TEARDOWN=echo ended >> {tmp_path}/bill; exit {code}")
    assert done.returncode == 2 and said in done.stdout and "has no NVIDIA GPU" in done.stdout
    assert (tmp_path / "bill").read_text() == "ended\n"


def test_what_was_typed_goes_on_as_it_was_typed(monkeypatch):
    """Every option of the command line arrives where the job is made."""
    from cli.main import ferry
    from launch import cloud_to_local as module

    came = {}
    monkeypatch.setattr("launch.reproduce.load_reproduction", lambda repo, runs: SimpleNamespace(name="x", folder=runs))
    monkeypatch.setattr(
        "launch.reproduce.run_reproduce", lambda this, launcher, stop, data, wish: came.update(wish=wish) or []
    )
    monkeypatch.setattr("common.files.write_json", lambda path, value: None)
    monkeypatch.setattr("launch.verdict.format_verdict", lambda rows, repo: "")
    monkeypatch.setattr("launch.verdict.is_reproduced", lambda rows: True)
    words = ["MOUNT=/data /models", "TEARDOWN=echo 'it is' $HOME; true", "CLOUD=ssh://you@box", "MAX_DOLLARS=5", "YES=1",
             "DOCKER=0"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["ferry"])
    with pytest.raises(SystemExit) as ended:
        ferry.main(["make", "reproduce", "reproduce", "REPO=you/model", *words], standalone_mode=False)
    assert ended.value.code == 0
    there = ("MOUNT=/data /models", "DOCKER=0")
    assert came["wish"] == module.LaunchOptions((), there, "echo 'it is' $HOME; true", 5.0, True)


@pytest.mark.parametrize(
    ("cloud", "code", "value"),
    [
        ("", "provider.unknown", "CLOUD= "),
        ("box", "provider.unknown", "CLOUD=box "),
        ("sky://box", "provider.unknown", "CLOUD=sky://box "),
        ("ssh://", "ssh.invalid_address", "CLOUD=ssh:// "),
        ("ssh://-oProxyCommand=x", "ssh.invalid_address", "CLOUD=ssh://-oProxyCommand=x "),
        ("ssh://-l@box", "ssh.invalid_address", "CLOUD=ssh://-l@box "),
        ("ssh://box:99999", "ssh.invalid_address", "CLOUD=ssh://box:99999 "),
        ("ssh://box:0", "ssh.invalid_address", "CLOUD=ssh://box:0 "),
        ("ssh://you:secret@box", "ssh.password_in_address", "CLOUD"),
        ("ssh://box/../etc", "ssh.invalid_folder", "/../etc"),
        ("ssh://box/a b", "ssh.invalid_folder", "/a b"),
        ("ssh://box/$(id)", "ssh.invalid_folder", "/$(id)"),
        ("ssh://bo;x", "ssh.invalid_address", "CLOUD=ssh://bo;x "),
    ],
)
def test_what_is_no_address(cloud, code, value):
    with refuses(code) as error:
        ssh_address.parse_address(cloud)
    assert value in error.value.message
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("cloud", "words", "folder"),
    [
        ("ssh://box", ["box"], "ferry"),
        ("ssh://you@Box.example:2222/workspace/ferry/", ["-p", "2222", "you@Box.example"], "/workspace/ferry"),
        ("ssh://root@[::1]:22", ["-p", "22", "root@::1"], "ferry"),
    ],
)
def test_an_address(cloud, words, folder):
    found = ssh_address.parse_address(cloud)
    assert (found.ssh_arguments, found.folder) == (words, folder)


def test_what_travels_is_the_commit_and_the_data_that_the_config_names(laptop, tmp_path, monkeypatch):
    """Ignored, untracked and changed files stay; a data file goes whatever git thinks of it."""
    from launch import source_archive

    monkeypatch.chdir(laptop)
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/rows.jsonl").write_text("{}\n")
    outside = tmp_path / "held.jsonl"
    outside.write_text("{}\n")
    for name in ("secret.txt", "alpaca"):
        Path(name).write_text("untracked")
    held = f"job/files/{files.sha256_bytes(str(outside).encode())[:8]}/held.jsonl"
    config = {
        "base": {"model": "you/base"},
        "data": {"source": "runs/mine/rows.jsonl", "validation": str(outside), "template": "alpaca"},
        "evaluate": {"prompts": str(outside), "json_schema": "configs/demo/heldout.jsonl"},
    }
    changed, moves = upload_files.relocate_paths(config)
    assert changed["data"] == {
        "source": "runs/mine/rows.jsonl", "validation": held, "template": "alpaca",
    }  # fmt: skip
    found = upload_files.list_job_files(moves, ["runs/mine/rows.jsonl", str(outside)])
    sent = upload_files.select_uncommitted_files(laptop, "HEAD", found)
    assert sent == {
        "runs/mine/rows.jsonl": Path("runs/mine/rows.jsonl"),
        held: outside,
    }
    job = boxes_there.Job(
        "x", "x", laptop, source_archive.head_commit(laptop), None, upload_files.dump_config(changed), sent
    )
    names = source_archive.hash_archive_files(source_archive.build_archive(job)).keys()
    assert {"Makefile", "launch/providers/ssh_box.sh", "revision.json", "job/config.yaml"} <= names
    assert not [name for name in names if name.startswith("runs/") or name in ("secret.txt", "alpaca")]
    assert source_archive.list_unsent_files(laptop, set()) == ["alpaca", "secret.txt"]
    for name in ("secret.txt", "alpaca"):
        Path(name).unlink()


def test_data_from_elsewhere_arrives_on_the_box(box, laptop, tmp_path, monkeypatch):
    """Beside the list of the tree's files, which was called like its folder once."""
    from launch import source_archive

    monkeypatch.setenv("FERRY_SSH", " ".join(map(str, box.ssh)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n" * 9)
    there = upload_files.path_in_tree(str(rows))
    launcher = boxes_there.SshProvider(ssh_address.parse_address(box.address))
    job = boxes_there.Job("private", "private", laptop, source_archive.head_commit(laptop), None, "", {there: rows})
    for _ in range(2):  # the second time over what lies there
        launcher.send_job(job)
        assert files.sha256(box.home / "ferry" / "private" / there) == files.sha256(rows)


def test_a_folder_of_data_travels_with_the_files_that_were_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "elsewhere" / "rows"
    folder.mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl", "notes.txt"):
        (folder / name).write_text(name)
    changed, moves = upload_files.relocate_paths({"data": {"source": str(folder)}})
    there = changed["data"]["source"]
    assert re.fullmatch(r"job/files/\w{8}/rows", there)
    assert upload_files.list_job_files(moves, [str(folder / "train.jsonl"), str(folder / "test.jsonl")]) == {
        f"{there}/train.jsonl": folder / "train.jsonl",
        f"{there}/test.jsonl": folder / "test.jsonl",
    }


def test_a_sent_tree_knows_its_commit_and_whether_it_was_changed(laptop, tmp_path):
    """What a manifest made there says of its code, and what an image built there gets."""
    import io
    import tarfile

    from launch import source_archive
    from launch.provider import Job

    packed = source_archive.build_archive(
        Job("x", "x", laptop, source_archive.head_commit(laptop), "https://example.org/ferry.git", "base: {}\n")
    )
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(tmp_path, filter="data")
    code = "from pipeline.toolchain import git; print(git.read_checkout())"
    image = "import container; print(container.read_revision())"

    def said(code: str, folder: Path) -> dict:
        out = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        return eval(out.stdout)

    wanted = {"url": "https://example.org/ferry.git", "commit": source_archive.head_commit(laptop), "dirty": False}
    assert said(code, tmp_path) == wanted
    assert said(image, tmp_path / "setup") == {"COMMIT": wanted["commit"], "DIRTY": "false", "ORIGIN": wanted["url"]}
    with (tmp_path / "pipeline" / "run" / "training_rows.py").open("a") as file:
        file.write("# changed\n")
    assert said(code, tmp_path)["dirty"] is True and said(image, tmp_path / "setup")["DIRTY"] == "true"


def test_two_starts_at_once_are_one_job(box, laptop, tmp_path, monkeypatch):
    """Also when neither has seen the other: the lock on the box decides."""
    monkeypatch.setenv("FERRY_SSH", " ".join(map(str, box.ssh)))
    launcher = boxes_there.SshProvider(ssh_address.parse_address(box.address))
    folder = box.home / "ferry" / "twice"
    (folder / "job").mkdir(parents=True)
    (folder / "Makefile").write_text("train:\n\t@echo begun; sleep 8\n")
    job = boxes_there.Job("twice", "twice", laptop, "HEAD", None, "")
    launcher.start_job(job, "train", {"HF_TOKEN": "hf_in_the_environment"})
    launcher.start_job(job, "train", {})
    assert launcher.read_job_state("twice").status == "running"
    arguments = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True).stdout
    assert "make train" in arguments
    assert "hf_in_the_environment" not in arguments
    until = time.monotonic() + 30
    while launcher.read_job_state("twice").status == "running" and time.monotonic() < until:
        time.sleep(0.2)
    assert (launcher.read_job_state("twice").status, launcher.read_job_state("twice").exit_code) == ("ended", 0)
    assert (folder / "job" / "log").read_text() == "begun\n"


def test_a_job_that_was_killed_has_died_and_one_that_lost_its_make_still_runs(box, laptop, monkeypatch):
    monkeypatch.setenv("FERRY_SSH", " ".join(map(str, box.ssh)))
    launcher = boxes_there.SshProvider(ssh_address.parse_address(box.address))
    folder = box.home / "ferry" / "kill"
    (folder / "job").mkdir(parents=True)
    (folder / "Makefile").write_text("train:\n\t@sleep 60 & echo $$! > orphan; wait\n")
    launcher.start_job(boxes_there.Job("kill", "kill", laptop, "HEAD", None, ""), "train", {})
    until = time.monotonic() + 10
    while not (folder / "orphan").is_file() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    group = int((folder / "job" / "group").read_text())
    for pid in (group, *boxes.children(group)):
        os.kill(pid, signal.SIGKILL)
    os.kill(int((folder / "job" / "pid").read_text()), signal.SIGKILL)
    assert launcher.read_job_state("kill").status == "running", "what it started works on"
    launcher.stop_job("kill")
    time.sleep(0.5)
    assert launcher.read_job_state("kill").status == "died"


def test_what_a_run_made_comes_home_before_the_teardown_or_there_is_none(box, laptop, tmp_path, monkeypatch):
    from launch.costs import JobSession

    monkeypatch.setenv("FERRY_SSH", " ".join(map(str, box.ssh)))
    launcher, run = (
        boxes_there.SshProvider(ssh_address.parse_address(box.address)),
        box.home / "ferry" / "saved" / "runs" / "saved",
    )
    for name in (
        "config.yaml",
        "finetune/adapter/a.safetensors",
        "export/merged/m.safetensors",
        "export/saved.f16.gguf",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"x" * 1000)
    session = JobSession(launcher, "saved", "", f"echo ended >> {tmp_path}/bill", rescue_folder=tmp_path / "home")
    assert "TEARDOWN has ended" in session.teardown_and_report(succeeded=False)
    kept = {str(path.relative_to(session.rescue_folder)) for path in session.rescue_folder.rglob("*") if path.is_file()}
    assert kept == {"config.yaml", "finetune/adapter/a.safetensors"}
    box.program("tar", "exit 1")
    assert "TEARDOWN was not run" in session.teardown_and_report(succeeded=False)
    assert (tmp_path / "bill").read_text() == "ended\n"


@pytest.mark.parametrize(("words", "said"), [
    (["HOURS=2"], "GPU and HOURS choose a rented instance, and root@127.0.0.1 is a machine of yours"),
    (["SPOT=1"], "SPOT=1 needs CLOUD=sky: an SSH machine is not a spot instance"),
])  # fmt: skip
def test_a_box_that_is_there_is_not_chosen(laptop, box, words, said):
    done = launched(laptop, box, *words)
    assert done.returncode == 2 and f"error: {said}\n next: " in done.stdout and "Traceback" not in done.stdout, (
        done.stdout
    )


def test_a_boxs_checkpoints_leave_it_where_a_repo_is_named(laptop):
    from launch import cloud_to_local
    from pipeline.config import load
    from pipeline.run.run_folder import Run

    tree = load.load_config(Path("configs/demo.yaml"), ())
    box, wish = (
        boxes_there.SshProvider(ssh_address.parse_address("ssh://box")),
        cloud_to_local.LaunchOptions(settings=("DEVICE=cpu",), checkpoints="you/boat-checkpoints"),
    )
    assert cloud_to_local.build_job(tree, Run(Path("runs/boat")), box, wish).settings == (
        "DEVICE=cpu",
        "CHECKPOINTS=you/boat-checkpoints",
    )
    assert cloud_to_local.build_job(tree, Run(Path("runs/boat")), box, cloud_to_local.LaunchOptions()).settings == ()


@pytest.mark.parametrize(("wish", "said"), [
    ({}, "`make cloud-stop CLOUD=sky RUN=boat`"),
    ({"spot": True}, "`make cloud-stop CLOUD=sky RUN=boat SPOT=1`"),
    ({"checkpoints": "you/boat"}, "`make cloud-stop CLOUD=sky RUN=boat CHECKPOINTS=you/boat`"),
])  # fmt: skip
def test_the_command_that_ends_it_looks_where_it_was_started(wish, said):
    from launch import cloud_to_local

    assert cloud_to_local.stop_command("sky", "boat", cloud_to_local.LaunchOptions(**wish)) == said


def test_a_program_that_no_shell_reads_is_one_line(monkeypatch, tmp_path):
    from launch.providers.skypilot import SkyPilotProvider

    monkeypatch.setenv("FERRY_SKY", "sky 'x")
    with refuses("environment.invalid_command") as error:
        SkyPilotProvider("you/x", "", False, tmp_path).inspect_machine()
    assert "FERRY_SKY" in error.value.message and "No closing quotation" in error.value.message


@pytest.mark.parametrize(("stderr", "code"), [
    ("@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\nHost key verification failed.", "ssh.host_key_changed"),
    ("Host key verification failed.", "ssh.unknown_host_key"),
    ("No ED25519 host key is known for box and you have requested strict checking.", "ssh.unknown_host_key"),
    ("you@box: Permission denied (publickey).", "ssh.key_refused"),
    ("/home/you/.ssh/config: line 3: Bad configuration option: nonsense", "ssh.invalid_config"),
    ("ssh: Could not resolve hostname box: Name or service not known", "ssh.unknown_host"),
    ("ssh: connect to host box port 22: Connection refused", "ssh.unreachable"),
])  # fmt: skip
def test_each_fault_of_ssh_has_its_code(stderr, code):
    """Only a fault that may be gone at the next try is retried."""
    error = boxes_there.SshProvider(ssh_address.parse_address("ssh://you@box"))._ssh_error(stderr)
    assert error.code == code and "you@box" in error.message
    assert isinstance(error, boxes_there.ConnectionLost) == (code == "ssh.unreachable")


@pytest.mark.parametrize(("dollars", "max_dollars", "code", "value"), [
    (2.5, 2.0, "cost.over_limit", "$2.50, the limit is $2.00"),
    (None, 2.0, "cost.unknown_price", "the limit is $2.00"),
    (2.5, 3.0, "cost.no_terminal", "boat on box"),
    (None, None, "cost.no_terminal", "boat on box"),
])  # fmt: skip
def test_nothing_is_started_without_a_yes_or_over_the_limit(monkeypatch, dollars, max_dollars, code, value):
    from launch.costs import confirm_cost

    monkeypatch.setattr("sys.stdin", open(os.devnull))
    with refuses(code) as error:
        confirm_cost("boat on box", dollars, max_dollars, assume_yes=code != "cost.no_terminal")
    assert value in error.value.message


def test_reproduce_compares_the_records_of_the_run_there(tmp_path):
    """With the rows and the base model of the manifest; the new manifest is read from where `publish` says."""
    from contract import manifest
    from launch import reproduce

    samples, there = ROOT / "tests" / "samples", tmp_path / "again"
    for name in ("runs", "hub"):
        shutil.copytree(samples / name, there / name)
    published = manifest.read_manifest(samples / "hub" / "chain" / manifest.FILE_NAME)
    provider, job = boxes_there.SshProvider(None, str(tmp_path)), boxes_there.Job("again", "chain", ROOT, "", None, "")

    def compare(**changes) -> None:
        changed = published.model_copy(update=changes)
        reproduce.refuse_different_rows(reproduce.Reproduction("./hub/chain", changed, tmp_path), provider, job)

    compare()
    assert reproduce.read_new_manifest(provider, job) == published
    for changes, value in (
        ({"dataset": published.dataset.model_copy(update={"train_sha256": "0" * 64})}, "training rows: 000000000000"),
        ({"dataset": published.dataset.model_copy(update={"split_hash": "0" * 64})}, "held-out rows: 000000000000"),
        ({"dataset": published.dataset.model_copy(update={"rows": published.dataset.rows | {"train": 3}})}, "rows train: 3"),
        ({"base": published.base.model_copy(update={"revision": "1" * 40})}, f"base model: {'1' * 40}"),
    ):  # fmt: skip
        with refuses("data.not_reproduced") as error:
            compare(**changes)
        assert value in error.value.message and error.value.message.count("published") == 1
