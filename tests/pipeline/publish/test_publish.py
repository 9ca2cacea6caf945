"""publish to a Hub over HTTP, with the unmodified client: whatever fails, a rerun ends right and nothing is ever half there."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import files, hub
from contract import manifest
from pipeline.publish import upload
from tests.helpers import repos
from tests.helpers.clients import client
from tests.helpers.commands import ROOT, ferry, refuses
from tests.helpers.hub import Fault, Hub

pytestmark = pytest.mark.slow  # waits for servers that hang

REPO = "models/you/tiny"
OFTEN = 99  # for ever, as far as a test's patience goes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return repos.make(tmp_path_factory.mktemp("repo") / "tiny")


def job(folder: Path, **more) -> dict:
    return {"folder": str(folder), "repo": "you/tiny", "private": True, "tag": None} | more


def right(server: Hub, folder: Path, tag: str = "v1") -> None:
    """The Hub holds the folder under its tag, and no commit has a manifest without what it names."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert set(server.files(REPO, tag)) - {".gitattributes"} == set(names)
    for name in names:
        assert server.read(REPO, name, tag) == (folder / name).read_bytes()
    assert server.tags(REPO)[tag] == server.commits(REPO)[0]["id"]
    whole(server)


def whole(server: Hub) -> None:
    if not server.refs(REPO):
        return
    for commit in server.commits(REPO):
        there = server.files(REPO, commit["id"])
        if manifest.FILE_NAME in there:
            made = manifest.parse_manifest(server.read(REPO, manifest.FILE_NAME, commit["id"]), "the Hub's")
            for item in (*made.artifacts, *made.files):
                assert files.sha256_bytes(server.read(REPO, item.file, commit["id"])) == item.sha256


# What passes by itself: one run is enough, and nothing large is sent twice because of it.
PASSING = [
    Fault("POST /api/repos/create", status=500),
    Fault("POST /api/repos/create", status=503, times=2),
    Fault("POST /api/repos/create", status=429, headers={"Retry-After": "1"}),
    Fault("POST /api/repos/create", lose=True),
    Fault("GET /api/models/you/tiny$", status=502),
    Fault("POST .*/preupload/", status=500),
    Fault("POST .*/preupload/", stall=5),
    Fault("POST .*/objects/batch", status=429, headers={"Retry-After": "1"}),
    Fault("PUT ", status=500, skip=1),
    Fault("PUT ", cut=300_000, skip=1),
    Fault("PUT ", stall=5, skip=1),
    Fault("POST .*(complete|verify)", status=503),
    Fault("POST .*/commit/", status=500),
    Fault("POST .*/commit/", status=503),
    Fault("POST .*/commit/", status=409),
    Fault("POST .*/commit/", status=412),
    Fault("POST .*/commit/", lose=True),
    Fault("GET /api/models/you/tiny/revision", status=503),
    Fault("GET .*/resolve/.*README", status=500),
    Fault("GET .*/refs", status=503),
    Fault("POST .*/tag/", status=500),
    Fault("POST .*/tag/", lose=True),
    Fault("POST .*/tag/", cut=0),
]


def named(fault: Fault) -> str:
    kind = {key: getattr(fault, key) for key in ("status", "cut", "lose", "stall", "flip") if getattr(fault, key)}
    return f"{fault.match} {kind}"


@pytest.mark.parametrize(("number", "fault"), [*enumerate(PASSING)], ids=[named(fault) for fault in PASSING])
def test_what_passes_by_itself_is_waited_for(online, tiny, monkeypatch, number, fault):
    for name, value in client("12"[number % 2]).items():
        monkeypatch.setenv(name, value)
    fault = Fault(**{**vars(fault), "struck": 0})
    online.faults.append(fault)
    assert upload.upload_folder(job(tiny))["tag"] == "v1"
    assert fault.struck, "the fault never struck"
    right(online, tiny)
    assert len(online.commits(REPO)) == 2, "the first one is the Hub's own"
    assert online.sent["uploads"] < 1.6 * (tiny / "tiny.q4_k_m.gguf").stat().st_size


# What does not: one clear error, nothing lost, and the same command ends right once it is fixed.
LASTING = [
    (Fault("POST /api/repos/create", status=401), "hub.unauthorized"),
    (Fault("POST /api/repos/create", status=403), "hub.forbidden"),
    (Fault("POST /api/repos/create", status=503, times=OFTEN), "hub.unavailable"),
    (Fault("POST .*/preupload/", status=403), "hub.forbidden"),
    (Fault("POST .*/preupload/", status=404, code="RepoNotFound"), "hub.not_found"),
    (Fault("POST .*/objects/batch", status=413), "hub.upload_too_large"),
    (Fault("PUT ", status=403), "hub.forbidden"),
    (Fault("POST .*/commit/", status=402), "hub.payment_required"),
    (Fault("POST .*/commit/", status=403), "hub.forbidden"),
    (Fault("POST .*/commit/", status=429, times=OFTEN), "hub.rate_limited"),
    (Fault("POST .*/commit/", status=503, times=OFTEN), "hub.unavailable"),
    (Fault("GET .*/resolve/.*README", flip=10), "hub.upload_mismatch"),
    (Fault("POST .*/tag/", status=403), "hub.forbidden"),
]


@pytest.mark.parametrize(
    ("number", "fault", "code"),
    [(i, *case) for i, case in enumerate(LASTING)],
    ids=[named(case[0]) for case in LASTING],
)
def test_what_does_not_pass_is_one_clear_error_and_nothing_is_lost(online, tiny, monkeypatch, number, fault, code):
    for name, value in client("21"[number % 2]).items():
        monkeypatch.setenv(name, value)
    online.faults.append(Fault(**{**vars(fault), "struck": 0}))
    with refuses(code) as error:
        upload.upload_folder(job(tiny))
    assert "you/tiny" in error.value.message and "hf_writer" not in str(error.value)
    whole(online)
    online.faults.clear()
    assert upload.upload_folder(job(tiny))["tag"] == "v1"
    right(online, tiny)


def test_an_unreachable_hub_is_one_clear_error(online, tiny, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with refuses("hub.endpoint_unreachable") as error:
        upload.upload_folder(job(tiny))
    assert "http://127.0.0.1:9" in error.value.message


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("seed", range(6))
def test_kill_9_at_a_random_moment_then_again(online, tiny, seed):
    """Both processes at once, as when a pod is taken away; or the sender alone (seed 0), which the courier replaces."""
    online.faults.append(Fault("PUT ", rate=4e6, times=-1))  # 1.6 s for all of it
    code = f"from pipeline.publish import upload; print(upload.upload_folder({job(tiny)!r})['tag'])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    time.sleep(random.Random(seed).uniform(0.4, 2.4))
    if seed:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    else:
        for pid in children(process):
            os.kill(pid, signal.SIGKILL)
        assert process.communicate(timeout=60)[0].split() == [b"v1"]
    whole(online)
    online.faults.clear()
    assert upload.upload_folder(job(tiny))["tag"] == "v1"
    right(online, tiny)


def test_a_sender_whose_courier_is_gone_ends(online, tiny):
    online.faults.append(Fault("PUT ", stall=30, times=-1))
    code = f"from pipeline.publish import upload; upload.upload_folder({job(tiny)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.monotonic() + 20
    while (
        not (children(process) and any(asked.startswith("PUT") for asked in online.asked)) and time.monotonic() < until
    ):
        time.sleep(0.1)
    [pid] = children(process)
    process.kill()
    process.wait()
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until + 10, "an orphan goes on sending"
        time.sleep(0.1)


def test_only_what_is_missing_is_sent(online, tiny):
    upload.upload_folder(job(tiny))
    sent, commits = online.sent["uploads"], len(online.commits(REPO))
    assert upload.upload_folder(job(tiny))["tag"] == "v1"
    assert online.sent["uploads"] == sent and len(online.commits(REPO)) == commits


def test_the_next_version_gets_the_next_tag_and_leaves_no_file_of_the_old_one(online, tiny, tmp_path):
    upload.upload_folder(job(tiny))
    second = repos.make(tmp_path / "second", seed=2, name="tiny-2")
    repos.rewrite(second, lambda made: made | {"name": "tiny"})  # its file is called otherwise
    assert upload.upload_folder(job(second))["tag"] == "v2"
    right(online, second, "v2")
    assert "tiny.q4_k_m.gguf" not in online.files(REPO) and "tiny.q4_k_m.gguf" in online.files(REPO, "v1")


def test_a_wanted_tag_is_given_once(online, tiny, tmp_path):
    assert upload.upload_folder(job(tiny, tag="first"))["tag"] == "first"
    second = repos.make(tmp_path / "second", seed=2)
    with refuses("hub.tag_exists") as error:
        upload.upload_folder(job(second, tag="first"))
    assert "you/tiny" in error.value.message and "first" in error.value.message


def test_two_publishers_at_once_both_arrive(online, tiny, tmp_path):
    second = repos.make(tmp_path / "second", seed=2)
    online.faults.append(Fault("PUT ", rate=8e6, times=-1))
    code = "from pipeline.publish import upload; import sys; print(upload.upload_folder({})['tag'])"
    running = [
        subprocess.Popen([sys.executable, "-c", code.format(job(folder))], cwd=ROOT, stdout=subprocess.PIPE)
        for folder in (tiny, second)
    ]
    tags = [process.communicate(timeout=60)[0].split()[0].decode() for process in running]
    assert sorted(tags) == ["v1", "v2"]
    whole(online)
    for folder, tag in zip((tiny, second), tags, strict=True):
        assert online.read(REPO, "tiny.q4_k_m.gguf", tag) == (folder / "tiny.q4_k_m.gguf").read_bytes()


def test_a_repo_of_something_else_is_left_alone(online, tiny, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.pdf").write_bytes(b"years of work")
    online.add(REPO, tmp_path / "other", private=True)
    with refuses("hub.foreign_repo") as error:
        upload.upload_folder(job(tiny))
    assert "thesis.pdf" in error.value.message and "manifest.json" in error.value.message
    assert set(online.files(REPO)) == {"thesis.pdf"}


def test_nothing_private_goes_into_a_public_repo(online, tiny):
    upload.upload_folder(job(tiny, private=False))
    with refuses("hub.public_repo") as error:
        upload.upload_folder(job(tiny))
    assert "you/tiny" in error.value.message and "publish.private" in error.value.message


def test_a_hanging_xet_upload_is_replaced_by_plain_lfs_in_a_fresh_process(online, tiny, monkeypatch, capfd):
    """The real hf_xet asks for its token first, and gets no answer."""
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    monkeypatch.setenv("FERRY_SILENCE_SECONDS", "2")
    fault = Fault("GET .*xet-write-token", stall=60, times=-1)
    online.faults.append(fault)
    assert upload.upload_folder(job(tiny))["tag"] == "v1"
    assert fault.struck, "Xet was not tried"
    assert "over plain LFS" in capfd.readouterr().err
    right(online, tiny)


@pytest.fixture
def trained(chain, tmp_path) -> Path:
    """The chain's run, up to verify, that shall go to the Hub."""
    run = tmp_path / "runs" / "chain"
    shutil.copytree(chain.run, run, copy_function=os.link, ignore=shutil.ignore_patterns("publish.json", "config.yaml"))
    config = (chain.run / "config.yaml").read_text()
    config = config.replace(f"{chain.folder}/hub/{{run}}", "'{user}/{run}-GGUF'").replace(
        "merged: false", "merged: true"
    )
    (run / "config.yaml").write_text(config)
    return run


def test_the_whole_way_over_the_hub(online, trained, tmp_path):
    done = ferry("publish", "--run", trained)
    assert done.returncode == 0, done.stderr
    assert "make deploy-mac REPO=you/chain-GGUF@v1" in done.stdout
    record, repo = files.read_json(trained / "publish.json"), "models/you/chain-GGUF"
    assert record["repo"] == "you/chain-GGUF" and record["commit"] == online.tags(repo)["v1"]
    made = manifest.parse_manifest(online.read(repo, manifest.FILE_NAME), "the Hub's")
    assert {item.file for item in (*made.artifacts, *made.files)} | {manifest.FILE_NAME, ".gitattributes"} == set(
        online.files(repo)
    )
    assert {
        "README.md",
        "LICENSE",
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "adapter/chat_template.jinja",
    } <= {item.file for item in made.files}
    assert {"merged/config.json", "merged/model.safetensors"} <= set(online.files(repo))
    models = ("you/chain-GGUF@v1", "--models", tmp_path / "models")
    for command in (("pull", *models), ("smoke", *models), ("modelfile", *models), ("summary", *models)):
        done = ferry(*command)
        assert done.returncode == 0, done.stderr
    assert not online.leaks
    said = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and "storage" not in path.parts and b"hf_writer" in path.read_bytes()
    ]
    assert not said, "the token stands in a file"


@pytest.mark.parametrize("fault", [Fault("POST .*/commit/", status=403), Fault("GET /api/whoami", status=401)])
def test_a_failed_publish_says_how_to_save_it(online, trained, fault):
    online.faults.append(Fault(**{**vars(fault), "struck": 0}))
    done = ferry("publish", "--run", trained)
    folder = trained / "publish" / "chain"
    assert done.returncode == 2 and "Traceback" not in done.stderr and "hf_writer" not in done.stderr + done.stdout
    for words in (f"the complete model is in {folder}", f"{folder} .", "deploy-mac REPO=./chain"):
        assert words in done.stderr
    assert ferry("pull", folder, "--models", trained.parent / "models").returncode == 0


@pytest.mark.parametrize("token", ["hf_verysecret", "not-of-the-usual-form"])
def test_no_message_holds_a_token_or_a_signed_address(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    text = hub.redact_secrets(f"PUT https://s3.example/x?Signature=abc with {token} and hf_another1\x1b[31m")
    assert text == "PUT https://s3.example/x?... with hf_*** and hf_***?[31m"


def test_an_upload_may_take_longer_than_a_standstill(online, tmp_path, monkeypatch):
    """It moves all the time: the courier hears it, bars turned off or not."""
    monkeypatch.setenv("FERRY_SILENCE_SECONDS", "1.5")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    folder = repos.make(tmp_path / "large", 18 << 20)
    online.faults.append(Fault("PUT ", rate=2e6, times=-1))
    started = time.monotonic()
    assert upload.upload_folder(job(folder))["tag"] == "v1"
    assert time.monotonic() - started > upload.progress_timeout(), "too fast to show anything"
    assert online.sent["uploads"] < 20 << 20


def test_a_large_file_that_is_no_lfs_file_is_compared_too(online, tmp_path):
    folder = repos.make(tmp_path / "repo", 1 << 20)
    (folder / "adapter" / "tokenizer.json").write_bytes(b"x" * 9_000_000)
    made = repos.described(folder)
    extra = folder / "adapter" / "tokenizer.json"
    made["files"].append({"file": "adapter/tokenizer.json", "sha256": files.sha256(extra), "bytes": 9_000_000})
    files.write_json(folder / manifest.FILE_NAME, made)
    online.lfs_from = 10 << 20
    assert upload.upload_folder(job(folder))["tag"] == "v1"
    assert "sha256" not in online.files(REPO)["adapter/tokenizer.json"]


@pytest.mark.parametrize(("content", "code"), [({}, "hub.foreign_manifest"), ({"schema_version": 99}, "manifest.newer_schema"), ({"schema_version": 1, "artifacts": [], "golden": []}, None)])  # fmt: skip
def test_a_manifest_that_cannot_be_read_is_no_end(online, tiny, tmp_path, content, code):
    (tmp_path / "old").mkdir()
    files.write_json(tmp_path / "old" / manifest.FILE_NAME, content)
    online.add(REPO, tmp_path / "old", private=True)
    if code is None:
        assert upload.upload_folder(job(tiny))["tag"] == "v1"
    else:
        with refuses(code) as error:
            upload.upload_folder(job(tiny))
        assert "you/tiny" in error.value.message


def test_what_a_library_prints_is_not_taken_for_a_word(online, tiny, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os; os.write(1, b'warning: hello\\n')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert upload.upload_folder(job(tiny))["tag"] == "v1"


def test_a_file_that_is_gone_is_one_clear_error(online, tmp_path):
    folder = repos.make(tmp_path / "repo", 1 << 20)
    (folder / "LICENSE").unlink()
    with refuses("hub.upload_failed") as error:
        upload.upload_folder(job(folder))
    assert "LICENSE" in error.value.message
