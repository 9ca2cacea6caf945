"""The file in LM Studio's models folder: linked or copied, never moved, one at a time, and gone without a trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.deploy import install_in_lmstudio
from common import files
from deploy import store, trace, versions
from deploy.apps import lmstudio
from tests.helpers import apps, installed
from tests.helpers.commands import ferry, refuses


@pytest.fixture(scope="module")
def made(real, tmp_path_factory):
    return installed.two(real, tmp_path_factory.mktemp("two"))


@pytest.fixture
def pair(made, tmp_path):
    newer = installed.copied(made[1], tmp_path / "my models ü")
    return [newer.parent / made[0].name, newer]


@pytest.fixture
def lms(tmp_path, monkeypatch):
    with apps.lms(tmp_path / "apps") as there:
        for name, value in there.env.items():
            monkeypatch.setenv(name, value)
        yield there


def inside(lms) -> list[Path]:
    return [path for path in lms.models.rglob("*") if path.is_file()]


def test_it_is_a_hard_link_and_the_app_lists_it(pair, lms):
    record = lmstudio.run_lmstudio(pair[1])
    target, path = Path(record["target"]), store.load_tested(pair[1])[1]
    assert target == lms.models / "ferry" / "real" / path.name and target.samefile(path) and path.is_file()
    assert record["how"] == "hard link" and record["key"] and inside(lms) == [target]


def test_again_nothing_changes(pair, lms):
    target = Path(lmstudio.run_lmstudio(pair[1])["target"])
    before = target.stat()
    assert lmstudio.run_lmstudio(pair[1])["how"] == "hard link" and target.stat().st_ino == before.st_ino


def test_without_lms_the_folder_is_laid_out_by_hand(pair, tmp_path, monkeypatch):
    for name, value in apps.without(tmp_path / "none").items():
        monkeypatch.setenv(name, value)
    (Path.home() / ".lmstudio").mkdir(parents=True)
    record = lmstudio.run_lmstudio(pair[1])
    assert (
        record["target"] == str(Path.home() / ".lmstudio/models/ferry/real/real.q4_k_m.gguf") and record["key"] is None
    )
    assert Path(record["target"]).samefile(store.load_tested(pair[1])[1])


def test_where_no_link_can_be_made_it_is_a_copy(pair, lms, monkeypatch):
    monkeypatch.setattr(lmstudio, "can_link", lambda path, target: False)
    record = lmstudio.run_lmstudio(pair[1])
    target, path = Path(record["target"]), store.load_tested(pair[1])[1]
    assert record["how"] == "copy" and not target.samefile(path) and files.sha256(target) == files.sha256(path)
    before = target.stat().st_ino
    assert lmstudio.run_lmstudio(pair[1])["how"] == "copy" and target.stat().st_ino == before


def test_what_has_not_passed_its_smoke_test_is_not_installed(pair, lms):
    (pair[1] / "smoke.json").unlink()
    with refuses("smoke.not_passed"):
        lmstudio.run_lmstudio(pair[1])
    assert inside(lms) == []


def test_when_lm_studio_looks_elsewhere_the_file_moves_with_it(pair, lms, tmp_path, monkeypatch):
    lmstudio.run_lmstudio(pair[0])
    monkeypatch.setattr(lmstudio, "models_folder", lambda: tmp_path / "elsewhere")
    monkeypatch.setattr(lmstudio, "import_with_lms", lambda *_: False)
    assert Path(lmstudio.run_lmstudio(pair[1])["target"]).is_relative_to(tmp_path / "elsewhere")
    assert inside(lms) == [] and not (pair[0] / lmstudio.RECORD).exists()


def test_an_interrupted_import_is_done_again(pair, lms, monkeypatch):
    monkeypatch.setattr(lmstudio, "can_link", lambda path, target: False)

    def killed(command, path, target, linked):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes()[:1000])
        raise KeyboardInterrupt

    whole = lmstudio.import_with_lms
    monkeypatch.setattr(lmstudio, "import_with_lms", killed)
    with pytest.raises(KeyboardInterrupt):
        lmstudio.run_lmstudio(pair[1])
    monkeypatch.setattr(lmstudio, "import_with_lms", whole)
    assert lmstudio.run_lmstudio(pair[1])["how"] == "copy"


@pytest.mark.parametrize("same_size", [False, True])
def test_a_file_of_somebody_else_stays(pair, lms, same_size):
    target = lms.models / "ferry" / "real" / "real.q4_k_m.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"mine")
    if same_size:
        os.truncate(target, store.load_tested(pair[1])[1].stat().st_size)
    with refuses("lmstudio.foreign_file") as caught:
        lmstudio.run_lmstudio(pair[1])
    assert str(target) in caught.value.message
    assert target.read_bytes()[:4] == b"mine"


def test_lms_that_fails_is_no_reason_to_give_up(pair, lms):
    (lms.home / "settings.json").parent.mkdir(parents=True, exist_ok=True)
    program = Path(lmstudio.find_command())
    program.unlink()
    program.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    program.chmod(0o755)
    assert lmstudio.run_lmstudio(pair[1])["how"] == "hard link"


def test_an_app_that_says_nothing_is_not_waited_for(pair, lms, monkeypatch):
    monkeypatch.setattr(lmstudio, "QUERY_TIMEOUT", 0.5)
    program = Path(lmstudio.find_command())
    program.unlink()
    program.write_text("#!/bin/sh\nif [ $1 = import ]; then exit 1; fi\nexec sleep 100\n")
    program.chmod(0o755)
    record = lmstudio.run_lmstudio(pair[1])
    assert record["how"] == "hard link" and record["key"] is None


def test_of_several_models_it_is_named_as_the_app_names_this_one(pair, lms):
    path = store.load_tested(pair[1])[1]
    for other in ("aaa/first", "zzz/last"):
        (lms.models / other).mkdir(parents=True)
        os.link(path, lms.models / other / path.name)
    assert lmstudio.run_lmstudio(pair[1])["key"] == "real"


def test_what_the_user_put_in_our_place_stays(pair, lms):
    target = Path(lmstudio.run_lmstudio(pair[1])["target"])
    target.unlink()
    target.write_bytes(b"own")
    with refuses("lmstudio.foreign_file") as caught:
        lmstudio.run_lmstudio(pair[1])
    assert str(target) in caught.value.message
    versions.undeploy_model(files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent)
    assert target.read_bytes() == b"own"


def test_an_import_that_hangs_or_cannot_be_run_is_done_by_hand(pair, lms, monkeypatch):
    monkeypatch.setattr(lmstudio, "IMPORT_TIMEOUT", 0.5)
    monkeypatch.setattr(lmstudio, "QUERY_TIMEOUT", 0.5)
    program = Path(lmstudio.find_command())
    for content in ("#!/bin/sh\nexec sleep 100\n", ""):
        program.unlink()
        program.write_text(content)
        program.chmod(0o755)
        assert lmstudio.run_lmstudio(pair[1])["how"] == "hard link"
        lmstudio.remove_version(pair[1])


def test_a_file_of_this_model_is_replaced_where_a_record_says_that_ferry_put_it_there(pair, lms):
    """Without the record it could be the user's own download: it stays."""
    target = Path(lmstudio.run_lmstudio(pair[1])["target"])
    record = (pair[1] / lmstudio.RECORD).rename(pair[1] / "kept")
    # As an older version with other weights left it: hashed there, and in that version's manifest.
    target.unlink()
    target.write_bytes(b"older weights")
    older = files.read_json(pair[0] / "manifest.json")
    older["artifacts"][0]["sha256"] = files.sha256(target)
    (pair[0] / "manifest.json").unlink()
    files.write_json(pair[0] / "manifest.json", older)
    with refuses("lmstudio.foreign_file") as caught:
        lmstudio.run_lmstudio(pair[1])
    assert str(target) in caught.value.message
    assert target.read_bytes() == b"older weights"
    record.rename(pair[1] / lmstudio.RECORD)
    assert lmstudio.run_lmstudio(pair[1])["how"] == "hard link"


def test_without_lm_studio_the_rest_goes_on(pair, tmp_path, monkeypatch, capsys):
    environment = apps.without(tmp_path / "none")
    repo, models = files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent
    assert ferry("lmstudio", repo, "--models", models, **environment).returncode == 2
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    install_in_lmstudio(pair[1], optional=True)
    assert "skipped: LM Studio is not installed" in capsys.readouterr().out


def test_rollback_and_undeploy(pair, lms):
    for version in pair:
        lmstudio.run_lmstudio(version)
    assert len(inside(lms)) == 1, "the version in use, and no other"
    models, repo = pair[0].parent.parent, files.read_json(pair[1] / "pull.json")["repo"]
    assert versions.roll_back(repo, models)[0] == pair[0]
    assert inside(lms)[0].samefile(store.load_tested(pair[0])[1])
    versions.undeploy_model(repo, models)
    assert inside(lms) == [] and not (lms.models / "ferry").exists() and not models.exists()


def test_undeploy_says_how_many_bytes_came_back(pair, lms):
    lmstudio.run_lmstudio(pair[1])
    repo, models = files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent
    path = store.load_tested(pair[1])[1]
    alone = path.with_suffix(".alone")
    alone.write_bytes(path.read_bytes())  # the test's stores share their file: here it is the only one
    os.replace(alone, path)
    said = ferry("undeploy", repo, "--models", models).stdout
    back = int(said.split("undeploy: freed ")[-1].split(" bytes")[0].replace(",", ""))
    assert 98_000_000 <= back < 110_000_000, "once, though two folders had it"


def test_a_home_that_cannot_be_written_is_one_clear_error(pair, lms):
    lms.home.mkdir(parents=True, exist_ok=True)
    # A mount, because root writes into every folder that has none.
    mount = 'mount --bind "$HOME" "$HOME" && mount -o remount,bind,ro "$HOME" && exec "$@"'
    prefix = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
    try:
        if subprocess.run([*prefix, "true"], env=os.environ | lms.env, capture_output=True).returncode:
            pytest.skip("nothing may be mounted here")
    except OSError:
        pytest.skip("no unshare here")
    repo, models = files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent
    command = [*prefix, sys.executable, "-m", "cli", "lmstudio", repo, "--models", str(models)]
    done = subprocess.run(command, env=os.environ | lms.env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "cannot write" in done.stderr, done.stderr
    assert store.load_tested(pair[1])[1].is_file() and inside(lms) == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"/somewhere/else\n"])
def test_its_home_is_where_the_pointer_says_if_it_says_anything(tmp_path, monkeypatch, content):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".lmstudio-home-pointer").write_bytes(content)
    assert lmstudio.home_folder() == (Path("/somewhere/else") if content.startswith(b"/") else tmp_path / ".lmstudio")


def test_trace_knows_a_file_by_its_place_in_lm_studio(pair, lms):
    target = Path(lmstudio.run_lmstudio(pair[1])["target"])
    for what in (str(target), str(target.relative_to(lms.models))):
        assert f"its manifest, {pair[1]}" in trace.run_trace(what, pair[1].parent.parent)
    with refuses("trace.no_such_file") as caught:
        trace.run_trace("ferry/real/gone.gguf", pair[1].parent.parent)
    assert "ferry/real/gone.gguf" in caught.value.message
