"""Repos that are broken or mean harm: each refused with one clear line and exit code 2, and nothing of it stays."""

import json
import os
import struct
import sys
from pathlib import Path

import pytest

from cli import main as command_line
from common import files
from contract import manifest
from tests.helpers import repos
from tests.helpers.commands import ferry
from tests.helpers.repos import rewrite

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
    "path traversal": (artifact(file="../../x.gguf"), "manifest.invalid", "'../../x.gguf'"),
    "path traversal inside": (artifact(file="a/../../x.gguf"), "manifest.invalid", "'a/../../x.gguf'"),
    "absolute name": (artifact(file="/tmp/x.gguf"), "manifest.invalid", "'/tmp/x.gguf'"),
    "backslashes": (artifact(file="..\\..\\x.gguf"), "manifest.invalid", "'..\\\\..\\\\x.gguf'"),
    "home": (artifact(file="~/x.gguf"), "manifest.invalid", "'~/x.gguf'"),
    "hidden": (artifact(file=".x.gguf"), "manifest.invalid", "'.x.gguf'"),
    "our own record": (artifact(file="pull.json"), "manifest.invalid", "'pull.json'"),
    "newline in a name": (artifact(file="x\n.gguf"), "manifest.invalid", "'x\\n.gguf'"),
    "a pickle by name": (artifact(file="model.pkl"), "manifest.invalid", "'model.pkl'"),
    "a pickle as adapter": (lambda f: rewrite(f, lambda m: m["artifacts"][1].update(file="adapter/adapter_model.bin")), "manifest.invalid", "'adapter/adapter_model.bin'"),
    "a pickle in a GGUF's name": (replaced(PICKLE * 100), "gguf.bad_magic", "b'\\x80\\x04\\x95\\x1a'"),
    "symbolic link": (link(GGUF, "/etc/passwd"), "hub.symbolic_link", "tiny.q4_k_m.gguf"),
    "linked manifest": (link(manifest.FILE_NAME, "/etc/passwd"), "hub.symbolic_link", "manifest.json"),
    "a manifest of 1 GB": (endless, "manifest.too_large", "manifest.json is larger than 8388608"),
    "no JSON": (text("{"), "manifest.not_json", "line 1 column 2"),
    "JSON nested without end": (text("[" * 200_000), "manifest.not_json", "manifest.json"),
    "half characters": (text(json.dumps({"name": "\ud800"})), "manifest.not_json", "'\\ud800'"),
    "no object": (text("[]"), "manifest.invalid", "dictionary"),
    "newer schema": (top(schema_version=99), "manifest.newer_schema", "schema 99"),
    "no chat": (lambda f: rewrite(f, lambda m: {k: m[k] for k in m if k != "chat"}), "manifest.invalid", "chat: Field required"),
    "unknown field": (top(run_this="rm -rf"), "manifest.invalid", "run_this: Extra inputs"),
    "a name for a shell": (top(name="x; rm -rf ~"), "manifest.invalid", ": name: "),
    "escape sequences": (top(name="\x1b[2J"), "manifest.invalid", ": name: "),
    "no artifact": (top(artifacts=[]), "manifest.invalid", "exactly one GGUF"),
    "two defaults": (lambda f: rewrite(f, lambda m: m["artifacts"].append(m["artifacts"][0] | {"file": "b.gguf"})), "manifest.invalid", "exactly one GGUF"),
    "one name twice": (lambda f: rewrite(f, lambda m: m["files"].append(m["files"][0] | {"file": "readme.MD"})), "manifest.invalid", "'README.md' appears twice"),
    "wrong sha256": (artifact(sha256="0" * 64), "pull.wrong_content", "0" * 64),
    "wrong size": (artifact(bytes=5), "hub.file_changed", "its manifest says 5 bytes"),
    "no room for it": (artifact(bytes=10**13), "hub.file_changed", "its manifest says 10000000000000 bytes"),
    "negative size": (artifact(bytes=-1), "manifest.invalid", "artifacts.0.bytes"),
    "manifest without its GGUF": (lambda f: (f / GGUF).unlink(), "hub.file_missing", "tiny.q4_k_m.gguf is missing"),
    "another template's sha256": (lambda f: rewrite(f, lambda m: m["chat"].update(template="x")), "manifest.invalid", "chat: sha256"),
    "not a number": (lambda f: rewrite(f, lambda m: m["generation"].update(temperature=float("nan"))), "manifest.not_json", "NaN"),
    "a context without end": (lambda f: rewrite(f, lambda m: m["generation"].update(num_ctx=1 << 60)), "manifest.invalid", "generation.num_ctx"),
    "no sound GGUF": (replaced(b"GGML" + bytes(4096)), "gguf.bad_magic", "b'GGML'"),
    "tensor count": (patched(8, struct.pack("<Q", 1 << 60)), "gguf.too_many_entries", "1152921504606846976 tensors"),
    "key-value count": (patched(16, struct.pack("<Q", 1 << 60)), "gguf.too_many_entries", "1152921504606846976 metadata pairs"),
    "string length": (patched(24, struct.pack("<Q", 1 << 62)), "gguf.bad_length", "4611686018427387904 bytes"),
    "another GGUF version": (patched(4, struct.pack("<I", 77)), "gguf.unknown_version", "version 77"),
    "other tensors than said": (artifact(tensor_types={"Q4_K": 200}), "gguf.wrong_tensors", "tiny.q4_k_m.gguf"),
    "cut off": (lambda f: (os.truncate(f / GGUF, 4096 * 100), fit(f)), "gguf.truncated", "the file has 409600 bytes"),
    "another template inside": (lambda f: (repos.write_gguf(f / GGUF, 4096, 1, "other"), fit(f)), "gguf.wrong_template", "tiny.q4_k_m.gguf"),
    "another prompt": (lambda f: rewrite(f, lambda m: m["golden"][0].update(prompt="x")), "template.wrong_prompt", "'Hello'"),
    "a golden prompt of no message": (lambda f: rewrite(f, lambda m: m["golden"][0].update(messages=[], prompt="x")), "manifest.invalid", "golden.0.messages"),
    "a golden message of no content": (lambda f: rewrite(f, lambda m: m["golden"][0].update(messages=[{"role": "user"}], prompt="x")), "manifest.invalid", "golden.0: "),
    "answers without log-probabilities": (lambda f: rewrite(f, lambda m: m.update(smoke=[{"message": "", "ids": [1], "answer": "", "answer_ids": [1, 2], "log_probs": [0.5]}])), "manifest.invalid", "smoke.0: answer_ids and log_probs"),
    "tokens below nought": (lambda f: rewrite(f, lambda m: m["golden"][0].update(ids=[-1])), "manifest.invalid", "golden.0.ids.0"),
    "a GGUF in a folder": (artifact(file="a/x.gguf"), "manifest.invalid", "'a/x.gguf' is a GGUF"),
    "a template that never ends": (template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), "template.timeout", "10 s"),
    "a template that wants all memory": (template("{{ 'a' * 100000000000 }}"), "template.refused", "MemoryError"),
    "a template that breaks out": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "template.refused", "'__class__'"),
    "a template that reads": (template("{{ cycler.__init__.__globals__.os.environ }}"), "template.refused", "'__init__'"),
    "a template that raises": (template("{{ 1 // 0 }}"), "template.refused", "by zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_refused_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, case):
    change, code, value = HOSTILE[case]
    if not sys.platform.startswith("linux") and value == "MemoryError":
        pytest.skip("only Linux holds a process to RLIMIT_AS")
    folder = repos.make(tmp_path / "repo", 1 << 20)
    change(folder)
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr("sys.argv", ["ferry", "pull", str(folder), "--models", str(tmp_path / "models")])
    errors, translate_error = [], command_line.translate_error
    monkeypatch.setattr(command_line, "translate_error", lambda e: errors.append(translate_error(e)) or errors[-1])
    with pytest.raises(SystemExit) as caught:
        command_line.main()
    said = capsys.readouterr()
    assert caught.value.code == 2, said
    assert [error.code for error in errors] == [code], said.err
    assert value in said.err and "next:" in said.err and "Traceback" not in said.err, said.err
    assert "\x1b" not in said.err and len(said.err) < 2000
    assert set(tmp_path.rglob("*")) == before, "it left something behind"


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
    assert files.sha256(folder / GGUF) in done.stderr
    assert online.sent["downloads"] < 100_000


@pytest.mark.parametrize(
    "repo", ["../x", "https://evil.example/you/model", "you/../model", "you/model@", "you/model@../x", "you/mo del", "-x/y", "", "a/b/c", "hf_token@evil/x", "~nobody/x", "a" * 300]
)  # fmt: skip
def test_a_repo_that_is_none(tmp_path, repo):
    done = ferry("pull", "--models", tmp_path / "models", "--", repo)
    assert done.returncode == 2 and "next:" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "models").exists()
