"""Nothing of a user's is replaced or removed: a folder is Ferry's by its own marker or manifest, never by its name."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli import settings
from cli.main import main
from cli.table import load_command
from common import files
from contract import manifest
from deploy import store, versions
from pipeline.checkpoint_sync import snapshot as states
from pipeline.config.schema import Config
from pipeline.config.user_files import refuse_files_inside
from pipeline.publish.folder_hub import HUB_MARKER, back_up_edited_card, claim_hub_folder, hub_folder
from pipeline.run import run_folder, status
from tests.helpers import repos
from tests.helpers.commands import ROOT, refuses

# A folder hub


def listing(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


FOREIGN_HUBS = {
    "a README of a project": (lambda folder: (folder / "README.md").write_text("mine"), "hub.foreign_folder", "README.md"),
    "a licence": (lambda folder: (folder / "LICENSE").write_text("mine"), "hub.foreign_folder", "LICENSE"),
    "a GGUF of somebody's": (lambda folder: (folder / "x.gguf").write_bytes(b"GGUF"), "hub.foreign_folder", "x.gguf"),
    "a web page's manifest": (lambda folder: (folder / "manifest.json").write_text('{"name": "tiny", "icons": []}'), "hub.foreign_folder", "manifest.json"),
    "a hidden file": (lambda folder: (folder / ".env").write_text("SECRET=1"), "hub.foreign_folder", ".env"),
    "an adapter of another tool": (lambda folder: ((folder / "adapter").mkdir(), (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")), "hub.foreign_folder", "adapter"),
    "a hub of another model": (lambda folder: repos.make(folder, 1 << 14, name="other"), "hub.other_model", "other"),
    "a marker of another model": (lambda folder: claim_hub_folder(folder, "other"), "hub.other_model", "other"),
    "a marker that is damaged": (lambda folder: (folder / HUB_MARKER).write_text("{"), "hub.foreign_folder", HUB_MARKER),
    "a link to somewhere": (lambda folder: (repos.make(folder, 1 << 14), shutil.rmtree(folder / "adapter"), (folder / "adapter").symlink_to("/tmp")), "hub.symbolic_link", "adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN_HUBS)
def test_a_folder_that_is_no_hub_of_this_model_is_refused(tmp_path, case):
    write, code, value = FOREIGN_HUBS[case]
    write(tmp_path)
    before = listing(tmp_path)
    with refuses(code) as error:
        hub_folder(str(tmp_path), "tiny")
    assert "publish.repo" in error.value.message and value in error.value.message
    assert listing(tmp_path) == before


@pytest.mark.parametrize("repo", ["/dev/null", __file__])
def test_a_hub_is_a_folder(repo):
    with refuses("hub.foreign_folder") as error:
        hub_folder(repo, "tiny")
    assert f"publish.repo {repo}" in error.value.message


def test_an_empty_folder_ones_own_hub_and_one_that_was_interrupted_are_taken(tmp_path):
    assert hub_folder(str(tmp_path), "tiny") == tmp_path
    assert hub_folder(str(tmp_path / "new"), "tiny") == tmp_path / "new"
    repos.make(tmp_path, 1 << 14)
    assert hub_folder(str(tmp_path), "tiny") == tmp_path
    claim_hub_folder(tmp_path, "tiny")
    (tmp_path / manifest.FILE_NAME).unlink()  # files are exchanged
    assert hub_folder(str(tmp_path), "tiny") == tmp_path


def test_a_model_card_that_was_edited_is_kept(tmp_path):
    repos.make(tmp_path, 1 << 14)
    back_up_edited_card(tmp_path)
    assert (tmp_path / "README.md").is_file()
    (tmp_path / "README.md").write_text("with my own words")
    back_up_edited_card(tmp_path)
    assert (tmp_path / "README.md.before").read_text() == "with my own words" and not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("and more")
    back_up_edited_card(tmp_path)
    assert (tmp_path / "README.md.before").read_text() == "with my own words", "an earlier one stays"


# The folder of a run

FOREIGN_RUNS = {
    "rows": lambda folder: ((folder / "data").mkdir(), (folder / "data" / "rows.jsonl").write_text("{}")),
    "notes of a training": lambda folder: ((folder / "finetune").mkdir(), (folder / "finetune" / "notes.txt").write_text("x")),
    "a config and something else": lambda folder: ((folder / "config.yaml").write_text("x"), (folder / "thesis.txt").write_text("x")),
    "another tool's run.json": lambda folder: (folder / "run.json").write_text('{"run": 1}'),
    "a run.json that is damaged": lambda folder: (folder / "run.json").write_text("{"),
    "another tool's data.json": lambda folder: (folder / "data.json").write_text('{"stage": "data"}'),
    "a log of a job": lambda folder: ((folder / "cloud").mkdir(), (folder / "cloud" / "log").write_text("x")),
    "a repository": lambda folder: (folder / ".git").mkdir(),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN_RUNS)
@pytest.mark.parametrize("command", ["train", "data", "cloud-stop", "clean"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch, capsys, case, command):
    folder = tmp_path / "web"
    folder.mkdir()
    FOREIGN_RUNS[case](folder)
    before = listing(folder)
    more = {"cloud-stop": ["--cloud", "ssh://x@127.0.0.1:1"], "clean": ["--all", "--yes"]}.get(
        command, [str(ROOT / "configs" / "demo.yaml")]
    )
    monkeypatch.setattr("sys.argv", ["ferry", command, "--run", "web", "--runs", str(tmp_path), *more])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and "was not created by Ferry" in capsys.readouterr().err
    assert listing(folder) == before


def demo(tmp_path: Path) -> Config:
    return Config.model_validate({"base": {"model": "a/b"}, "data": {"source": "configs/demo/train.jsonl"}})


def test_a_run_marks_its_folder_before_anything_else_and_keeps_a_config_that_was_there(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("# mine\n")
    run_folder.Run(folder).freeze_config(demo(tmp_path))
    assert run_folder.is_run_folder(folder) and (folder / "config.yaml.before").read_text() == "# mine\n"
    assert not run_folder.Run(folder).is_config_edited()
    (folder / "config.yaml").unlink()
    assert run_folder.is_run_folder(folder), "a kill between marker and config leaves a run"


def test_runs_of_an_older_ferry_and_of_another_machine_are_runs(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config_sha256": "0" * 64}))
    assert run_folder.is_run_folder(tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / "data.json").write_text(json.dumps({"stage": "data", "outputs": {}}))
    assert run_folder.is_run_folder(tmp_path)


@pytest.mark.parametrize("setting", ["data.source", "data.validation", "evaluate.prompts", "base.model"])
def test_rows_in_a_folder_that_a_stage_empties_are_refused(tmp_path, setting):
    run = tmp_path / "runs" / "x"
    (run / "data").mkdir(parents=True)
    (run / "data" / "rows.jsonl").write_text("{}")
    section, key = setting.split(".")
    tree = {"base": {"model": "a/b"}, "data": {"source": "configs/demo/train.jsonl"}}
    tree.setdefault(section, {})[key] = str(run / "data" / "rows.jsonl")
    with refuses("config.file_in_run_folder") as error:
        refuse_files_inside(Config.model_validate(tree), run)
    assert setting in error.value.message and str(run) in error.value.message


def test_clean_removes_nothing_outside_the_run(tmp_path):
    run = run_folder.Run(tmp_path / "runs" / "x")
    (run.folder / "export").mkdir(parents=True)
    (tmp_path / "thesis").write_text("mine")
    outputs = {
        "f16": {"path": "../../thesis", "bytes": 4, "sha256": "0" * 64},
        "q4_k_m": {"path": "export/q", "bytes": 1, "sha256": "0" * 64},
    }
    export = {"llama_cpp": "x", "default": "q4_k_m", "sixteen": "f16", "id": "0" * 64, "imatrix": None}
    verify = {
        "scores": {},
        "default": "q4_k_m",
        "as_served": {"same_prompts": 1, "loss": 1.0, "rows": 1},
        "used": "1 of 1",
        "conversion": {"kl": 0.0, "top1": 1.0, "positions": 1},
        "notes": [],
        "sixteen": "f16",
        "template": "derived",
        "reasons": [],
    }
    for stage, more in (("export", export), ("verify", verify), ("publish", {})):
        files.write_json(
            run.record_path(stage),
            {"stage": stage, "seconds": 1, "settings": {}, "sources": {}, "outputs": outputs} | more,
        )
    assert status.find_removable_paths(run) == []


@pytest.mark.parametrize("words", [["RUN="], ["RUN=", "ALL=1", "YES=1"], ["CONFIG=", "ALL=1"], ["RUNS="]])
def test_an_empty_name_is_no_name(words):
    with refuses("command.empty_setting") as error:
        settings.translate_make_settings(load_command("clean"), words, {})
    assert words[0] in error.value.message


def test_all_of_a_run_is_removed_by_its_name_alone(tmp_path, monkeypatch, capsys):
    run_folder.Run(tmp_path / "only").freeze_config(demo(tmp_path))
    monkeypatch.setattr("sys.argv", ["ferry", "clean", "--runs", str(tmp_path), "--all", "--yes"])
    with pytest.raises(SystemExit):
        main()
    assert "needs its name" in capsys.readouterr().err and (tmp_path / "only").is_dir()


@pytest.mark.parametrize("name", [".", "..", "a/b", ".git", "tickets/export", "/tmp/x", "", "x\n", "-x"])
def test_a_state_from_elsewhere_names_no_other_folder(name):
    entry = {"sha256": "0" * 64, "bytes": 1}
    said = {
        "schema": states.SCHEMA_VERSION,
        "run": name,
        "config": "0" * 64,
        "training": "0" * 64,
        "done": [],
        "step": 0,
        "files": {"config.yaml": entry, "data.json": entry},
    }
    with refuses("checkpoints.invalid_state") as error:
        states.parse_state(json.dumps(said).encode(), "you/checkpoints")
    assert "you/checkpoints" in error.value.message


def test_what_is_set_aside_takes_the_place_of_nothing(tmp_path):
    for number in range(3):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "notes.md").write_text(str(number))
        files.set_aside(tmp_path / "x")
    kept = {path.name: (path / "notes.md").read_text() for path in tmp_path.iterdir()}
    assert kept == {"x.before": "0", "x.before.2": "1", "x.before.3": "2"} and files.set_aside(tmp_path / "x") is None


# The store of models


def test_folders_that_look_like_versions_stay(tmp_path, monkeypatch):
    photos = tmp_path / "photos" / "202401311530"
    photos.mkdir(parents=True)
    (photos / "a.jpg").write_bytes(b"x")
    (tmp_path / "photos" / "0123456789ab").symlink_to(photos)
    assert store.list_all_versions(tmp_path) == []
    with refuses("store.not_found") as error:
        versions.undeploy_model("photos", tmp_path, False)
    assert "photos" in error.value.message
    assert (photos / "a.jpg").is_file()


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_current_of_the_users_stays(tmp_path, kind):
    version = tmp_path / "tiny" / "0123456789ab"
    version.mkdir(parents=True)
    current = tmp_path / "tiny" / "current"
    {"folder": current.mkdir, "link": lambda: current.symlink_to("/tmp"), "file": current.touch}[kind]()
    with refuses("store.foreign_link") as error:
        store.set_current_version(version)
    assert str(current) in error.value.message
    assert os.path.lexists(current)


def test_a_folder_in_a_files_place_stays(tmp_path):
    (tmp_path / "README.md").mkdir()
    (tmp_path / "README.md" / "thesis.txt").write_text("mine")
    with refuses("file.unwritable") as error, files.write_atomically(tmp_path / "README.md") as part:
        part.write_text("x")
    assert str(tmp_path / "README.md") in error.value.message
    assert (tmp_path / "README.md" / "thesis.txt").is_file()


# What the kernel saw: each command writes only where docs/files.md says

CHANGES = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += +(-?\d+)")
WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
NAMES = re.compile(r'(?:AT_FDCWD(?:<([^>]*)>)?|\d+<([^>]*)>)?,? ?"((?:[^"\\]|\\.)*)"')
CALLS = "openat,open,creat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,linkat,symlink,symlinkat,truncate,chmod,fchmodat"


def trace(command: list[str], folder: Path) -> set[Path]:
    """Paths that a command and its children wrote, made or removed, by strace."""
    log = folder / "strace.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FERRY")}
    environment |= {
        "TMPDIR": str(folder / "tmp"),
        "HOME": str(folder / "home"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "FERRY_CACHE": str(files.cache_dir()),
    }
    for name in ("tmp", "home"):
        (folder / name).mkdir(exist_ok=True)
    strace = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(log)]
    done = subprocess.run(
        [*strace, sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path for line in log.read_text(errors="replace").splitlines() for path in changed_paths(line)}


def changed_paths(line: str) -> list[Path]:
    found = CHANGES.match(line)
    if not found or int(found[3]) < 0 or (found[1].startswith("open") and not WRITING.search(found[2])):
        return []
    names = NAMES.findall(found[2])
    made = names[-1:] if found[1].startswith(("link", "symlink")) else names  # what a link leads to is not changed
    return [Path(os.path.normpath(Path(here or there or ROOT) / name)) for here, there, name in made]


def can_trace() -> bool:
    return (
        bool(shutil.which("strace"))
        and not subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode
    )


@pytest.mark.skipif(not can_trace(), reason="needs strace, and a container that allows it")
def test_commands_write_only_where_the_table_of_owners_says(chain, tmp_path):
    runs, hub, models = tmp_path / "runs", tmp_path / "hub", tmp_path / "models"
    shutil.copytree(chain.run, runs / "chain", symlinks=True)
    (runs / "chain" / "publish.json").unlink()
    config = runs / "chain" / "config.yaml"
    config.write_text(config.read_text().replace(str(chain.folder / "hub"), str(hub)))
    harmless = (tmp_path / "tmp", tmp_path / "home", Path("/dev"), Path("/proc"), files.cache_dir())
    table = {
        "publish": (["-m", "pipeline", "publish", str(runs / "chain")], (runs / "chain", hub / "chain")),
        "pull": (["-m", "cli", "pull", str(hub / "chain"), "--models", str(models)], (models,)),
        "clean": (
            ["-m", "cli", "clean", "--run", "chain", "--runs", str(runs)],
            (runs / "chain", runs / ".chain.lock"),
        ),
        "undeploy": (["-m", "cli", "undeploy", "chain", "--models", str(models)], (models,)),
    }
    for name, (command, owned) in table.items():
        written = trace(command, tmp_path)
        assert any(path.is_relative_to(place) for path in written for place in owned), f"{name} writes nothing?"
        strange = sorted(
            str(path) for path in written if not any(path.is_relative_to(place) for place in (*owned, *harmless))
        )
        strange = [path for path in strange if path not in map(str, (hub, runs, tmp_path))]  # folders that hold them
        assert not strange, f"{name} wrote {strange[:10]}"
    assert not models.exists() and (hub / "chain" / manifest.FILE_NAME).is_file()
