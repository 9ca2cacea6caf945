"""Whole or not at all."""

import errno
import hashlib
import os
import signal
import subprocess
import sys

import pytest

from common import files
from tests.helpers.commands import refuses


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), files.write_atomically(path) as part:
        part.write_text("half")
        1 / 0  # noqa: B018
    assert files.read_json(path) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_write_leaves_nothing_under_the_final_name(tmp_path, kill):
    code = (
        "import sys, time; from pathlib import Path; from common import files\n"
        "with files.write_atomically(Path(sys.argv[1])) as part:\n    part.write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(kill)
    process.wait()
    assert not (tmp_path / "x").exists()
    with files.write_atomically(tmp_path / "x") as part:  # the next run is not disturbed by what was left
        part.write_text("whole")
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with files.write_atomically(tmp_path / "d") as part:
            part.mkdir()
            (part / text).write_text(text)
    assert [item.name for item in (tmp_path / "d").iterdir()] == ["new"]


def test_sha256_is_that_of_the_bytes(tmp_path):
    data = os.urandom(3 << 20)
    (tmp_path / "x").write_bytes(data)
    assert (
        files.sha256(tmp_path / "x")
        == hashlib.sha256(data).hexdigest()
        == files.copy_and_hash(tmp_path / "x", tmp_path / "y")
    )
    assert (tmp_path / "y").read_bytes() == data


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with refuses("file.unwritable") as error:
        files.write_json(tmp_path / "file" / "x.json", {})
    assert str(tmp_path / "file" / "x.json") in error.value.message


def test_a_full_disk_is_one_clear_error(tmp_path):
    with refuses("disk.full") as error, files.write_atomically(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path / "x") in error.value.message and " GB free" in error.value.message


@pytest.mark.parametrize(
    ("text", "code"),
    [("", "file.not_json"), ("{", "file.not_json"), ("[1]", "file.not_json_object"), ("\xff", "file.not_json")],
)
def test_a_broken_record_is_one_clear_error(tmp_path, text, code):
    (tmp_path / "r.json").write_bytes(text.encode("latin-1"))
    with refuses(code) as error:
        files.read_json(tmp_path / "r.json")
    assert str(tmp_path / "r.json") in error.value.message and str(tmp_path / "r.json") in error.value.hint


def test_a_record_that_is_not_there_is_one_clear_error(tmp_path):
    with refuses("file.missing") as error:
        files.read_json(tmp_path / "r.json")
    assert str(tmp_path / "r.json") in error.value.message
