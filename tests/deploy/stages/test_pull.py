"""pull from a Hub over HTTP and from folders: whatever fails, no file with a final name is ever wrong, and a rerun ends right."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common import files, hub
from contract import manifest
from deploy import store, versions
from deploy.stages import pull
from tests.helpers import repos
from tests.helpers.clients import client
from tests.helpers.commands import ROOT, ferry, refuses
from tests.helpers.hub import Fault, Hub

pytestmark = pytest.mark.slow  # waits for servers that hang

SIZE = 6 << 20
NAME = "tiny.q4_k_m.gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return repos.make(tmp_path_factory.mktemp("repo") / "tiny", SIZE)


@pytest.fixture
def server(online, tiny) -> Hub:
    online.add("models/you/tiny", tiny, private=True)
    return online


def right(models: Path, folder: Path, name: str = "you--tiny") -> None:
    """What has a final name has the right bytes."""
    version = models / name / files.sha256(folder / manifest.FILE_NAME)[:12]
    made, path = store.load_pulled(version)
    assert path.read_bytes() == (folder / made.default_artifact().file).read_bytes()
    assert not list(models.rglob("*.part"))


def never_wrong(models: Path, folder: Path) -> None:
    for path in models.rglob("*.gguf"):
        assert path.name.startswith(".") or path.read_bytes() == (folder / path.name).read_bytes()


PASSING = [
    Fault("GET /api/whoami", status=500),
    Fault("GET /api/models/you/tiny", status=503),
    Fault("GET /api/models/you/tiny", status=429, headers={"Retry-After": "1"}),
    Fault("GET .*manifest.json", status=502),
    Fault("GET .*manifest.json", cut=100),
    Fault("HEAD .*gguf", status=500),
    Fault("HEAD .*gguf", stall=5),
    Fault("GET (?!.*resolve).*gguf", status=500),
    Fault("GET (?!.*resolve).*gguf", status=403),  # a signed address grew old
    Fault("GET (?!.*resolve).*gguf", cut=2_000_000),
    Fault("GET (?!.*resolve).*gguf", cut=1_000_000, times=4),
    Fault("GET (?!.*resolve).*gguf", stall=5),
    Fault("GET (?!.*resolve).*gguf", rate=3e6),
]


@pytest.mark.parametrize(("number", "fault"), [*enumerate(PASSING)])
def test_what_passes_by_itself_is_waited_for(server, tiny, tmp_path, number, fault):
    fault = Fault(**{**vars(fault), "struck": 0})
    server.faults.append(fault)
    done = ferry("pull", "you/tiny", "--models", tmp_path / "m", **client("12"[number % 2]))
    assert done.returncode == 0, done.stderr
    assert fault.struck, "the fault never struck"
    right(tmp_path / "m", tiny)
    assert server.sent["downloads"] < SIZE + 1_000_000, "what was there was fetched again"
    assert not server.leaks


LASTING = [
    (Fault("GET /api/whoami", status=401), "does not accept this token"),
    (Fault("GET /api/models/you/tiny", status=404, code="RepoNotFound"), "does not exist on the Hub"),
    (Fault("GET /api/models/you/tiny", status=403, code="GatedRepo"), "gated"),
    (Fault("GET /api/models/you/tiny", status=503, times=99), "the Hub answers 503"),
    (Fault("GET .*manifest.json", status=403), "the Hub refuses"),
    (Fault("GET .*manifest.json", flip=5), "is not"),
    (Fault("HEAD .*gguf", status=404, code="EntryNotFound"), "does not exist on the Hub"),
    (Fault("GET (?!.*resolve).*gguf", flip=4_000_000), "its manifest says"),
    (Fault("GET (?!.*resolve).*gguf", status=500, times=99), "the Hub answers 500"),
]


@pytest.mark.parametrize(("number", "fault", "expected"), [(i, *case) for i, case in enumerate(LASTING)])
def test_what_does_not_pass_is_one_clear_error(server, tiny, tmp_path, number, fault, expected):
    server.faults.append(Fault(**{**vars(fault), "struck": 0}))
    command = ("pull", "you/tiny", "--models", tmp_path / "m")
    done = ferry(*command, **client("21"[number % 2]))
    assert done.returncode == 2 and expected in done.stderr and "next:" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "hf_writer" not in done.stderr
    never_wrong(tmp_path / "m", tiny)
    server.faults.clear()
    assert ferry(*command).returncode == 0
    right(tmp_path / "m", tiny)


@pytest.mark.parametrize("seed", range(8))
def test_kill_9_at_a_random_moment_then_again(server, tiny, tmp_path, seed):
    server.faults.append(Fault("GET (?!.*resolve).*gguf", rate=6e6))
    command = [sys.executable, "-m", "cli", "pull", "you/tiny", "--models", str(tmp_path / "m")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(random.Random(seed).uniform(0.3, 1.8))
    process.send_signal(signal.SIGKILL)
    process.wait()
    never_wrong(tmp_path / "m", tiny)
    there = sum(path.stat().st_size for path in (tmp_path / "m").rglob("*.part"))
    before = server.sent["downloads"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    right(tmp_path / "m", tiny)
    assert server.sent["downloads"] - before < SIZE - there + 700_000, (
        "it began anew"
    )  # one step of the slow link was on its way


def test_two_pulls_at_once_fetch_it_once(server, tiny, tmp_path):
    server.faults.append(Fault("GET (?!.*resolve).*gguf", rate=6e6))
    command = [sys.executable, "-m", "cli", "pull", "you/tiny", "--models", str(tmp_path / "m")]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    right(tmp_path / "m", tiny)
    assert server.sent["downloads"] < SIZE + 200_000


@pytest.fixture
def small_disk(tmp_path):
    """4 MB of disk, for a file of 6."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_noticed_first_and_costs_nothing(server, tiny, small_disk, monkeypatch):
    with refuses("disk.full") as caught:
        pull.run_pull("you/tiny", small_disk / "m")
    assert "0.01 GB" in caught.value.message and "0.00 GB" in caught.value.message
    assert not (small_disk / "m").exists() or not list((small_disk / "m").rglob("*"))
    monkeypatch.setattr(pull, "refuse_full_disk", lambda *_: None)  # another program was faster
    with refuses("disk.full"):
        pull.run_pull("you/tiny", small_disk / "m")
    never_wrong(small_disk / "m", tiny)
    assert list(small_disk.rglob("*.part")), "what is there is gone on with"


def test_versions_stand_side_by_side_offline_too(server, tiny, tmp_path, monkeypatch, capfd):
    models = tmp_path / "m"
    hub.retry("tag", lambda: hub.create_client().create_tag("you/tiny", tag="v1"))
    first = pull.run_pull("you/tiny@v1", models)["folder"]
    second_repo = repos.make(tmp_path / "second", SIZE, seed=2)
    commit = server.add("models/you/tiny", second_repo, private=True)
    second = pull.run_pull("you/tiny", models)["folder"]
    assert first != second and str(store.require_version(models, "you/tiny")) == second
    assert pull.run_pull(f"you/tiny@{commit}", models)["folder"] == second
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = ferry("pull", "you/tiny@v1", "--models", models)
    assert offline.returncode == 0 and f"using an earlier pull, {first}" in offline.stderr
    assert str(store.require_version(models, "you/tiny")) == first
    assert ferry("pull", "you/tiny@v7", "--models", models).returncode == 2
    listed = ferry("models", "--models", models).stdout.splitlines()
    assert len(listed) == 4 and [line[0] for line in listed[::2]] == ["*", " "] and any("v1" in line for line in listed)
    assert ferry("undeploy", "you/tiny@v1", "--models", models).returncode == 0
    assert not Path(first).exists() and Path(second).exists()
    assert ferry("undeploy", "you/tiny", "--models", models).returncode == 0
    assert not (models / "you--tiny").exists()
    done = ferry("undeploy", "you/tiny", "--models", models)
    assert done.returncode == 2 and f"you/tiny is not in {models}" in done.stderr


def test_a_moved_branch_keeps_both_versions(server, tiny, tmp_path):
    pull.run_pull("you/tiny", tmp_path / "m")
    server.add("models/you/tiny", repos.make(tmp_path / "second", SIZE, seed=2), private=True)
    pull.run_pull("you/tiny", tmp_path / "m")
    assert len(store.list_complete_versions(tmp_path / "m" / "you--tiny")) == 2


def test_only_the_artifact_asked_for_is_fetched(server, tiny, tmp_path):
    pull.run_pull("you/tiny", tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m" / "you--tiny" / "current").iterdir()) == [
        manifest.FILE_NAME,
        "pull.json",
        NAME,
    ]
    with refuses("pull.no_such_quantization") as caught:
        pull.run_pull("you/tiny", tmp_path / "m", "q8_0")
    assert "q8_0" in caught.value.message and "q4_k_m" in caught.value.hint


def test_a_private_repo_without_a_token_says_so(server, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    done = ferry("pull", "you/tiny", "--models", tmp_path / "m")
    assert done.returncode == 2 and "private, and no Hub token" in done.stderr and "hf auth login" in done.stderr
    assert not (tmp_path / "m").exists()


def test_pulled_again_nothing_is_fetched(server, tiny, tmp_path):
    pull.run_pull("you/tiny", tmp_path / "m")
    sent = server.sent["downloads"]
    pull.run_pull("you/tiny", tmp_path / "m")
    assert server.sent["downloads"] - sent < 100_000


def test_a_damaged_copy_is_fetched_again(server, tiny, tmp_path):
    path = Path(pull.run_pull("you/tiny", tmp_path / "m")["folder"]) / NAME
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    pull.run_pull("you/tiny", tmp_path / "m")
    right(tmp_path / "m", tiny)


def test_a_part_of_other_bytes_is_not_gone_on_with_twice(server, tiny, tmp_path):
    version = tmp_path / "m" / "you--tiny" / files.sha256(tiny / manifest.FILE_NAME)[:12]
    version.mkdir(parents=True)
    for junk in (b"x" * 1000, b"x" * (SIZE * 2)):
        (version / f".{NAME}.part").write_bytes(junk)
        with refuses("pull.wrong_content") as caught:
            pull.run_pull("you/tiny", tmp_path / "m")
        assert files.sha256(tiny / NAME) in caught.value.message
        pull.run_pull("you/tiny", tmp_path / "m")
        right(tmp_path / "m", tiny)
        shutil.rmtree(version)
        version.mkdir()


def test_the_token_is_sent_to_the_hub_only(server, tiny, tmp_path):
    pull.run_pull("you/tiny", tmp_path / "m")
    assert any("resolve" in asked for asked in server.asked) and not server.leaks
    assert os.environ["HF_TOKEN"] == "hf_writer"


def test_the_token_follows_no_redirect_to_another_port(server, tiny, tmp_path):
    from tests.helpers.hub import serving

    with serving(tmp_path / "elsewhere") as other:
        moved = {"Location": f"{other.url}/you/tiny/resolve/main/{NAME}"}
        server.faults.append(Fault("HEAD .*gguf", status=307, headers=moved))
        done = ferry("pull", "you/tiny", "--models", tmp_path / "m")
        assert done.returncode == 2 and not any(asked.startswith("HEAD") for asked in other.asked), done.stderr


@pytest.mark.parametrize(
    "record",
    [
        "{}",
        "[]",
        "{",
        '{"file": "../../x", "repo": "", "sha256": "", "bytes": 1, "manifest_sha256": "", "commit": null}',
    ],
)
def test_a_damaged_record_is_said_and_pulled_again(server, tiny, tmp_path, record):
    models = tmp_path / "m"
    version = Path(pull.run_pull("you/tiny", models)["folder"])
    (version / "pull.json").write_text(record)
    (version.parent / "names.json").write_text('{"main": 5}')
    assert "damaged" in ferry("models", "--models", models).stdout
    for command in ("smoke", "summary"):
        done = ferry(command, "you/tiny", "--models", models)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert ferry("pull", "you/tiny", "--models", models).returncode == 0
    right(models, tiny)
    (version / "pull.json").write_text(record)
    assert ferry("undeploy", "you/tiny", "--models", models).returncode == 0 and not version.exists()


def test_an_unfinished_download_is_listed_and_can_be_removed(server, tiny, tmp_path):
    version = tmp_path / "m" / "you--tiny" / "0123456789ab"
    version.mkdir(parents=True)
    (version / f".{NAME}.part").write_bytes(b"x" * 1000)
    assert "unfinished" in ferry("models", "--models", tmp_path / "m").stdout
    assert ferry("undeploy", "you/tiny", "--models", tmp_path / "m").returncode == 0
    assert not (tmp_path / "m").exists()


def test_a_copied_store_whose_link_became_a_folder(server, tiny, tmp_path):
    pull.run_pull("you/tiny", tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    assert not (tmp_path / "copy" / "you--tiny" / "current").is_symlink()
    assert len(store.list_all_versions(tmp_path / "copy")) == 1
    pull.run_pull("you/tiny", tmp_path / "copy")
    assert (tmp_path / "copy" / "you--tiny" / "current").is_symlink()


def test_offline_gives_the_quantization_asked_for_or_none(server, tiny, tmp_path, monkeypatch):
    pull.run_pull("you/tiny", tmp_path / "m")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = ferry("pull", "you/tiny", "--quantization", "q8_0", "--models", tmp_path / "m")
    assert done.returncode == 2 and "no q8_0 GGUF" in done.stderr
    assert ferry("pull", "you/tiny", "--quantization", "Q4_K_M", "--models", tmp_path / "m").returncode == 0


def test_a_named_version_is_not_the_one_in_use(server, tiny, tmp_path):
    models = tmp_path / "m"
    hub.retry("tag", lambda: hub.create_client().create_tag("you/tiny", tag="v1"))
    first = pull.run_pull("you/tiny@v1", models)["folder"]
    server.add("models/you/tiny", repos.make(tmp_path / "second", SIZE, seed=2), private=True)
    second = pull.run_pull("you/tiny", models)["folder"]
    assert (str(store.require_version(models, "you/tiny@v1")), str(store.require_version(models, "you/tiny"))) == (
        first,
        second,
    )
    with refuses("store.not_pulled") as caught:
        store.require_version(models, "you/tiny@v9")
    assert "you/tiny@v9" in caught.value.message
    versions.undeploy_model(f"you/tiny@{Path(second).name}", models)
    assert str(store.require_version(models, "you/tiny")) == first, "the newest of the others is in use then"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"HF_ENDPOINT": "http://[bad"}, "is not the address of a Hub"),
        ({"HF_ENDPOINT": "http://127.0.0.1:port"}, "is not the address of a Hub"),
        ({"HF_TOKEN": "hf_ü"}, "contains characters that no token has"),
        ({"FERRY_HUB_SECONDS": "soon"}, "is not a number of seconds"),
    ],
)
def test_settings_that_are_none(online, tmp_path, settings, expected):
    done = ferry("pull", "you/tiny", "--models", tmp_path / "m", **settings)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_what_answers_is_no_hub(online, tmp_path):
    """As in a hotel, whose page stands for every other one."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Welcome</html>")

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{page.server_port}"
        done = ferry("pull", "you/tiny", "--models", tmp_path / "m", HF_ENDPOINT=address)
        page.shutdown()
    assert done.returncode == 2 and "is not a Hub" in done.stderr and "Traceback" not in done.stderr, done.stderr
