"""The store holds versions and lists and removes nothing else, whatever lies beside them."""

import json
import os
import subprocess
import sys

import pytest

from common import files
from contract import manifest
from deploy import store, summary, versions
from tests.helpers import repos
from tests.helpers.commands import ferry, refuses

PULLED = {
    "repo": "./hub/x", "file": "x.gguf", "sha256": "0" * 64, "bytes": 3, "manifest_sha256": "0" * 64, "commit": None,
}  # fmt: skip


@pytest.fixture
def models(tmp_path):
    """A model `x` of three versions, the newest in use; beside it what is nobody's business."""
    for age, name in enumerate(("c" * 12, "b" * 12, "a" * 12)):
        version = tmp_path / "models" / "x" / name
        version.mkdir(parents=True)
        (version / "x.gguf").write_bytes(b"abc")
        files.write_json(version / store.PULL_RECORD, PULLED)
        os.utime(version / store.PULL_RECORD, (age, age))
    store.set_current_version(version)
    (tmp_path / "models" / "x" / "taxes").mkdir()
    (tmp_path / "models" / "x" / "taxes" / "2026.txt").write_text("mine")
    return tmp_path / "models"


def test_undeploy_removes_versions_and_no_other_folder(models):
    assert len(versions.undeploy_model("./hub/x", models)) == 3
    assert [str(path.relative_to(models)) for path in models.rglob("*")] == ["x", "x/taxes", "x/taxes/2026.txt"]


@pytest.mark.parametrize(
    ("repo", "code"), [("/", "store.unnamed_folder"), ("./x/taxes", "store.not_found"), ("./models", "store.not_found")]
)
def test_a_folder_that_is_no_model_is_not_undeployed(models, repo, code):
    with refuses(code) as caught:
        versions.undeploy_model(repo, models)
    assert repo in caught.value.message
    assert len(store.list_complete_versions(models / "x")) == 3


@pytest.mark.parametrize("link", ["{there}", "../x/{name}", "{name}/"])
def test_prune_keeps_the_version_in_use_however_it_is_linked(models, monkeypatch, link):
    oldest = models / "x" / ("c" * 12)
    (models / "x" / store.CURRENT_LINK).unlink()
    (models / "x" / store.CURRENT_LINK).symlink_to(link.format(there=oldest.absolute(), name=oldest.name))
    monkeypatch.chdir(models.parent)
    versions.prune_versions("./hub/x", models.relative_to(models.parent), 1)
    assert {path.name for path in store.list_complete_versions(models / "x")} == {"a" * 12, "c" * 12}


def test_a_link_to_something_else_is_no_version(models):
    (models / "x" / store.CURRENT_LINK).unlink()
    (models / "x" / store.CURRENT_LINK).symlink_to("taxes")
    files.write_json(models / "x" / "taxes" / store.PULL_RECORD, PULLED)
    with refuses("store.not_pulled") as caught:
        versions.roll_back("./hub/x", models)
    assert "./hub/x" in caught.value.message


def test_what_is_to_be_typed_names_the_store_and_is_quoted(tmp_path):
    with refuses("store.not_pulled") as caught:
        store.require_version(tmp_path / "my models", "./my hub/x")
    assert caught.value.hint == f"run `make pull REPO='./my hub/x' MODELS='{tmp_path}/my models'`"


@pytest.mark.parametrize("content", ['{"file": 5}', "{}", "[]", '{"fi', "[" * 100_000, "\udcff"])
@pytest.mark.parametrize("name", store.RECORD_FIELDS)
def test_a_record_of_another_shape_is_none(tmp_path, name, content):
    (tmp_path / name).write_text(content, errors="surrogateescape")
    assert store.read_record(tmp_path / name) == {}


@pytest.mark.parametrize(
    "scores", [{"heldout": []}, {"heldout": {"base": {}}}, {"heldout": {"base": {"loss": "x"}}}, {"notes": "no list"}]
)
def test_scores_that_summary_could_not_print_are_no_manifest(tmp_path, scores):
    value = json.loads((repos.make(tmp_path / "x") / manifest.FILE_NAME).read_text()) | {"scores": scores}
    with refuses("manifest.invalid") as caught:
        manifest.parse_manifest(json.dumps(value).encode(), "manifest.json")
    assert "scores" in caught.value.message


def test_a_manifest_without_scores_has_a_summary(tmp_path):
    made = manifest.read_manifest(repos.make(tmp_path / "x") / manifest.FILE_NAME)
    assert summary._score_lines(made) == ["(nothing was scored)"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["serve", "./x", "--port", "abc"], "--port"), (["prune", "./x", "--keep", "0"], "--keep"), (["frobnicate"], "frobnicate"),
        (["pull", "./" + "x" * 300], "File name too long"), (["list", "--models", "m" * 300], "MODELS|m{300}: File name too long"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_two_lines(command, said):
    done = ferry(*command)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    if done.returncode:
        assert done.stderr.startswith("error: ") and "\n next: " in done.stderr


def test_closed_streams_and_letters_that_a_terminal_lacks_are_no_traceback(models):
    command = f"{sys.executable} -m cli %s ./hub/x --models '{models}'"
    for line in (command % "chat" + " <&-", command % "chat" + " </dev/null >&-"):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
    (models / "x").rename(models / os.fsdecode(b"\xff"))
    done = ferry("models", "--models", str(models), PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0 and [line[2] for line in done.stdout.splitlines()[::2]] == ["?"] * 3
