"""Repos that are broken or mean harm: each refused with one clear line and exit code 2, and nothing of it stays."""

import json
import os
import struct
from pathlib import Path

import pytest

from cli.main import main
from common import files
from contract import manifest
from tests import repos
from tests.conftest import ferry
from tests.repos import rewrite

GGUF = "tiny.q4_k_m.gguf"


def artifact(**changes):
    """A change of the default artifact in the manifest."""

    def change(made: dict) -> None:
        made["artifacts"][0] |= changes

    return lambda folder: rewrite(folder, change)


def top(**changes):
    return lambda folder: rewrite(folder, lambda made: made | changes)


def patched(offset: int, content: bytes):
    """A GGUF whose header lies, its sha256 made to fit."""

    def change(folder: Path) -> None:
        with (folder / GGUF).open("r+b") as file:
            file.seek(offset)
            file.write(content)
        fit(folder)

    return change


def fit(folder: Path) -> None:
    path = folder / GGUF
    rewrite(folder, lambda made: made["artifacts"][0].update(sha256=files.sha256(path), bytes=path.stat().st_size))


def replaced(content: bytes):
    def change(folder: Path) -> None:
        (folder / GGUF).write_bytes(content)
        fit(folder)

    return change


def text(content: str):
    return lambda folder: (folder / manifest.FILE_NAME).write_text(content)


def endless(folder: Path) -> None:
    with (folder / manifest.FILE_NAME).open("w") as file:
        file.truncate(1 << 30)


def link(name: str, target: str):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def template(text: str):
    """A manifest and a GGUF that agree on a template, which is a trap."""

    def change(folder: Path) -> None:
        repos.write_gguf(folder / GGUF, 4096, 1, text)
        repos.described(folder, template=text)
        files.write_json(folder / manifest.FILE_NAME, repos.described(folder, template=text))

    return change


PICKLE = b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02ls\x94\x85\x94R\x94."
HOSTILE = {
    "path traversal": (artifact(file="../../x.gguf"), "no safe file name"),
    "path traversal inside": (artifact(file="a/../../x.gguf"), "no safe file name"),
    "absolute name": (artifact(file="/tmp/x.gguf"), "no safe file name"),
    "backslashes": (artifact(file="..\\..\\x.gguf"), "no safe file name"),
    "home": (artifact(file="~/x.gguf"), "no safe file name"),
    "hidden": (artifact(file=".x.gguf"), "no safe file name"),
    "our own record": (artifact(file="pull.json"), "no safe file name"),
    "newline in a name": (artifact(file="x\n.gguf"), "no safe file name"),
    "a pickle by name": (artifact(file="model.pkl"), "no safe file name"),
    "a pickle as adapter": (lambda f: rewrite(f, lambda m: m["artifacts"][1].update(file="adapter/adapter_model.bin")), "no safe file name"),
    "a pickle in a GGUF's name": (replaced(PICKLE * 100), "no sound GGUF"),
    "symbolic link": (link(GGUF, "/etc/passwd"), "symbolic link"),
    "linked manifest": (link(manifest.FILE_NAME, "/etc/passwd"), "symbolic link"),
    "a manifest of 1 GB": (endless, "is larger than"),
    "no JSON": (text("{"), "no JSON"),
    "JSON nested without end": (text("[" * 200_000), "no JSON"),
    "half characters": (text(json.dumps({"name": "\ud800"})), "no JSON"),
    "no object": (text("[]"), "no valid manifest"),
    "newer schema": (top(schema_version=99), "update Ferry"),
    "no chat": (lambda f: rewrite(f, lambda m: {k: m[k] for k in m if k != "chat"}), "chat: Field required"),
    "unknown field": (top(run_this="rm -rf"), "Extra inputs"),
    "a name for a shell": (top(name="x; rm -rf ~"), "name"),
    "escape sequences": (top(name="\x1b[2J"), "name"),
    "no artifact": (top(artifacts=[]), "exactly one GGUF"),
    "two defaults": (lambda f: rewrite(f, lambda m: m["artifacts"].append(m["artifacts"][0] | {"file": "b.gguf"})), "exactly one GGUF"),
    "one name twice": (lambda f: rewrite(f, lambda m: m["files"].append(m["files"][0] | {"file": "readme.MD"})), "stands twice"),
    "wrong sha256": (artifact(sha256="0" * 64), "its manifest says"),
    "wrong size": (artifact(bytes=5), "the manifest says 5 bytes"),
    "no room for it": (artifact(bytes=10**13), "the manifest says"),
    "negative size": (artifact(bytes=-1), "artifacts"),
    "manifest without its GGUF": (lambda f: (f / GGUF).unlink(), "is missing"),
    "another template's sha256": (lambda f: rewrite(f, lambda m: m["chat"].update(template="x")), "another sha256"),
    "not a number": (lambda f: rewrite(f, lambda m: m["generation"].update(temperature=float("nan"))), "no JSON"),
    "a context without end": (lambda f: rewrite(f, lambda m: m["generation"].update(num_ctx=1 << 60)), "generation"),
    "no sound GGUF": (replaced(b"GGML" + bytes(4096)), "no sound GGUF"),
    "tensor count": (patched(8, struct.pack("<Q", 1 << 60)), "tensors"),
    "key-value count": (patched(16, struct.pack("<Q", 1 << 60)), GGUF),
    "string length": (patched(24, struct.pack("<Q", 1 << 62)), GGUF),
    "another GGUF version": (patched(4, struct.pack("<I", 77)), "version"),
    "other tensors than said": (artifact(tensor_types={"Q4_K": 200}), "other tensors"),
    "cut off": (lambda f: (os.truncate(f / GGUF, 4096 * 100), fit(f)), GGUF),
    "another template inside": (lambda f: (repos.write_gguf(f / GGUF, 4096, 1, "other"), fit(f)), "another chat template"),
    "another prompt": (lambda f: rewrite(f, lambda m: m["golden"][0].update(prompt="x")), "does not give the manifest's prompt"),
    "a golden prompt of no message": (lambda f: rewrite(f, lambda m: m["golden"][0].update(messages=[], prompt="x")), "golden"),
    "a golden message of no content": (lambda f: rewrite(f, lambda m: m["golden"][0].update(messages=[{"role": "user"}], prompt="x")), "a role and a content"),
    "answers without log-probabilities": (lambda f: rewrite(f, lambda m: m.update(smoke=[{"message": "", "ids": [1], "answer": "", "answer_ids": [1, 2], "log_probs": [0.5]}])), "different lengths"),
    "tokens below nought": (lambda f: rewrite(f, lambda m: m["golden"][0].update(ids=[-1])), "golden"),
    "a GGUF in a folder": (artifact(file="a/x.gguf"), "lies in no folder"),
    "a template that never ends": (template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), "took more than"),
    "a template that wants all memory": (template("{{ 'a' * 100000000000 }}"), "template"),
    "a template that breaks out": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "template"),
    "a template that reads": (template("{{ cycler.__init__.__globals__.os.environ }}"), "template"),
    "a template that raises": (template("{{ 1 // 0 }}"), "template"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_refused_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, case):
    change, expected = HOSTILE[case]
    folder = repos.make(tmp_path / "repo", 1 << 20)
    change(folder)
    before = {path for path in tmp_path.rglob("*")}
    monkeypatch.setattr("sys.argv", ["ferry", "pull", str(folder), "--models", str(tmp_path / "models")])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 2, said
    assert expected in said.err and "next:" in said.err and "Traceback" not in said.err, said.err
    assert "\x1b" not in said.err and len(said.err) < 2000
    assert {path for path in tmp_path.rglob("*")} == before, "it left something behind"


OVER_HTTP = ["wrong sha256", "wrong size", "path traversal", "a manifest of 1 GB", "string length", "newer schema", "a template that breaks out", "manifest without its GGUF", "another template inside"]  # fmt: skip


@pytest.mark.parametrize("case", OVER_HTTP)
def test_over_http_too(online, tmp_path, case):
    folder = repos.make(tmp_path / "repo", 1 << 20)
    HOSTILE[case][0](folder)
    online.add("models/you/tiny", folder, private=True)
    done = ferry("pull", "you/tiny", "--models", tmp_path / "models")
    assert done.returncode == 2 and "next:" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").rglob("*"))
    assert online.sent["downloads"] < 20_000_000, "a manifest is never read without end"


def test_a_file_changed_under_the_same_name(online, tmp_path):
    """A new GGUF, the old manifest: the Hub's own hash gives it away before a byte is fetched."""
    folder = repos.make(tmp_path / "repo", 6 << 20)
    repos.write_gguf(folder / GGUF, 6 << 20, seed=9)
    online.add("models/you/tiny", folder, private=True)
    done = ferry("pull", "you/tiny", "--models", tmp_path / "models")
    assert done.returncode == 2 and "was replaced after it was published" in done.stderr
    assert online.sent["downloads"] < 100_000


@pytest.mark.parametrize(
    "repo", ["../x", "https://evil.example/you/model", "you/../model", "you/model@", "you/model@../x", "you/mo del", "-x/y", "", "a/b/c", "hf_token@evil/x", "~nobody/x", "a" * 300]
)  # fmt: skip
def test_a_repo_that_is_none(tmp_path, repo):
    done = ferry("pull", "--models", tmp_path / "models", "--", repo)
    assert done.returncode == 2 and "next:" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "models").exists()
