"""Nothing of a user's is deleted or replaced without proof that it is Ferry's own: environments, the apps, small files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import files
from deploy import store, versions
from deploy.apps import lmstudio, ollama
from deploy.apps import ollama_server as api
from deploy.stages import modelfile, pull
from deploy.stages.partial_download import PartialDownload
from pipeline.run import checkpoint_files
from tests.helpers import apps, repos
from tests.helpers.commands import ROOT, refuses

SETUP = ROOT / "setup"
PACKAGES = "lib/python{}.{}/site-packages".format(*sys.version_info)


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The set-up's modules, with a cache of their own."""
    monkeypatch.syspath_prepend(str(SETUP))
    monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FERRY_LLAMA_FLAGS", raising=False)
    import container
    import env
    import llamacpp
    import lock
    import packages
    import pin

    return SimpleNamespace(env=env, packages=packages, llamacpp=llamacpp, lock=lock, pin=pin, container=container)


def tree(folder: Path) -> dict[str, object]:
    """{path: what a link names, or a file's bytes, or None of a folder}"""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {
        name: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for name, path in found.items()
    }


def refusal(text: str) -> tuple[str, str]:
    """The two lines of an error."""
    error, hint = text.strip().splitlines()
    assert error.startswith("error: ") and hint.startswith("next: ")
    return error, hint


# Environments


def make_venv(folder: Path, *content: str) -> Path:
    """A virtual environment without pip, with these files in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    for name in content:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


@pytest.fixture
def ran(setup, monkeypatch) -> list:
    """Each `python -m venv` that would have been run."""
    commands = []
    monkeypatch.setattr(setup.packages, "run_or_fail", lambda command, *_: commands.append(command))
    return commands


@pytest.mark.parametrize("has_pip", [True, False])
@pytest.mark.parametrize(
    "mine", [f"{PACKAGES}/jupyter/__init__.py", "bin/ferry", "include/site/greenlet.h", "notes.md"]
)
def test_an_environment_of_the_users_own_is_left_as_it_is(setup, ran, monkeypatch, capsys, tmp_path, mine, has_pip):
    """With a pip it would be built upon, without one it would be emptied; through a link, too."""
    monkeypatch.setattr(setup.packages, "is_usable_python", lambda *_: has_pip)
    venv = make_venv(tmp_path / "work", mine)
    (tmp_path / ".venv").symlink_to(venv)
    before = tree(venv)
    for place in (venv, tmp_path / ".venv"):
        for change in (
            setup.packages.make_venv,
            lambda *words: setup.env.set_up_environment(words[0], "data", {}, words[2]),
        ):
            with pytest.raises(SystemExit):
                change(str(place), (3, 11), str(tmp_path / "log"))
            error, hint = refusal(capsys.readouterr().err)
            assert "an environment of yours" in error and str(place) in error and "VENV=/some/other/folder" in hint
    assert tree(venv) == before and not ran


@pytest.mark.parametrize("options", [["--light"], ["--deploy"]])
def test_the_command_leaves_it_too_and_names_the_setting_for_another_folder(tmp_path, options):
    venv = make_venv(tmp_path / "venv", f"{PACKAGES}/jupyter/__init__.py")
    before = tree(venv)
    command = [sys.executable, SETUP / "env.py", "--quiet", "--venv", venv, *options]
    settings = {"FERRY_CACHE": str(tmp_path / "cache"), "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert ("DEPLOY_VENV=" if "--deploy" in options else " VENV=") in refusal(done.stderr)[1]
    assert tree(venv) == before


@pytest.mark.parametrize("left", ["ferry-environment", "ferry.json", "pip-is-running", "bin/ferry"])
def test_an_environment_that_a_ferry_made_is_used_and_marked(setup, ran, tmp_path, left):
    """Also one of an older Ferry, which left no mark: its record, pip's marker or the link to its checkout."""
    venv = make_venv(tmp_path / "venv", f"{PACKAGES}/torch/__init__.py")
    (venv / left).symlink_to("/old/checkout/ferry") if left == "bin/ferry" else (venv / left).write_text("{}")
    setup.packages.make_venv(str(venv), (3, 11), "log")
    assert len(ran) == 1 and list(tree(venv)) == [setup.packages.OWNER_MARK], "without pip: emptied, to be made anew"


def test_the_mark_is_there_before_the_record_of_an_older_ferry_goes(setup, ran, monkeypatch, tmp_path):
    venv = make_venv(tmp_path / "venv", f"{PACKAGES}/torch/__init__.py", "ferry.json")
    make = setup.packages.make_venv
    monkeypatch.setattr(setup.env, "make_venv", interrupt)
    with pytest.raises(KeyboardInterrupt):
        setup.env.set_up_environment(str(venv), "data", {}, "log")
    assert not (venv / "ferry.json").exists()
    make(str(venv), (3, 11), "log")
    assert ran


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_an_environment_that_was_half_emptied_is_still_known_as_ferrys(setup, ran, monkeypatch, tmp_path):
    venv = make_venv(tmp_path / "venv", f"{PACKAGES}/torch/__init__.py", "share/man/torch.1", setup.packages.OWNER_MARK)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup.packages.make_venv(str(venv), (3, 11), "log")
    (venv / "pyvenv.cfg").unlink(missing_ok=True)
    setup.packages.make_venv(str(venv), (3, 11), "log")
    assert list(tree(venv)) == [setup.packages.OWNER_MARK]


@pytest.mark.parametrize("maker", ["venv", "venv --without-pip", "uv", "an empty folder"])
def test_a_new_environment_in_which_nothing_is_yet_is_taken_over(setup, tmp_path, maker):
    """`python -m venv .venv` or `uv venv` before the first command of Ferry's."""
    venv = tmp_path / "venv"
    uv = str(Path(sys.executable).with_name("uv"))
    made = {"uv": [uv, "venv", "--quiet"], "an empty folder": ["mkdir"]}.get(
        maker, [sys.executable, "-m", *maker.split()]
    )
    subprocess.run([*made, venv], check=True)
    log = str(tmp_path / "log")
    setup.packages.make_venv(str(venv), (3, 11), log)
    assert (venv / setup.packages.OWNER_MARK).is_file() and setup.packages.can_reuse_venv(str(venv), (3, 11))
    assert ("venv" in Path(log).read_text() if Path(log).exists() else False) == (maker != "venv"), "with pip: kept"


@pytest.mark.parametrize("mine", [f"{PACKAGES}/six.py", "bin/tool", "data", "lib/notes.txt"])
def test_one_file_of_the_users_makes_a_new_environment_his(setup, ran, capsys, tmp_path, mine):
    venv = make_venv(tmp_path / "venv")
    (tmp_path / "elsewhere").mkdir()
    (venv / mine).symlink_to(tmp_path / "elsewhere") if mine == "data" else (venv / mine).touch()
    with pytest.raises(SystemExit):
        setup.packages.make_venv(str(venv), (3, 11), "log")
    assert "an environment of yours" in refusal(capsys.readouterr().err)[0]
    assert not ran and os.path.lexists(venv / mine)


# The store that the apps' tests deploy from: no weights that answer, so that it is made in a moment


@pytest.fixture
def pair(tmp_path):
    """Two versions of a model that passed their smoke test, the older one first; one file name, two contents."""
    models = tmp_path / "models"
    return [deployable(repos.make(tmp_path / str(seed) / "tiny", 1 << 16, seed), models) for seed in (1, 2)]


def deployable(repo: Path, models: Path) -> Path:
    """A version of the store with a smoke test that it passed and a Modelfile."""
    version = Path(pull.run_pull(str(repo), models)["folder"])
    pulled = store.read_pull_record(version)
    passed = {"file": pulled["file"], "sha256": pulled["sha256"], "stamp": store.file_stamp(version / pulled["file"])}
    measured = {"tokens_per_second": 1, "load_seconds": 1, "difference": 0, "answers": []}
    files.write_json(version / "smoke.json", passed | measured)
    (version / "Modelfile").write_text(f"FROM ./{pulled['file']}\nPARAMETER temperature 0.5\n")
    return version


def artifact(version: Path) -> Path:
    return version / store.read_pull_record(version)["file"]


# LM Studio


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """LM Studio's models folder, on a machine without `lms`."""
    for name, value in apps.without(tmp_path / "apps").items():
        monkeypatch.setenv(name, value)
    folder = Path.home() / ".lmstudio" / "models"
    folder.mkdir(parents=True)
    return folder


def download(shelf: Path, version: Path) -> Path:
    """The user's own download of the very file."""
    target = shelf / "ferry" / "tiny" / artifact(version).name
    target.parent.mkdir(parents=True)
    return shutil.copy(artifact(version), target)


def test_a_download_of_the_users_own_is_found_and_stays(pair, shelf, capsys):
    target = download(shelf, pair[1])
    for _ in range(2):
        assert lmstudio.run_lmstudio(pair[1])["how"] == "found"
    versions.undeploy_model("tiny", pair[1].parent.parent)
    assert files.sha256(target) and not pair[1].exists()
    assert f"{target} was there before Ferry: it is kept" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [False, True])
def test_another_version_does_not_replace_the_users_download(pair, shelf, recorded):
    """A rollback is the same with the versions exchanged. recorded: whether Ferry has met the file before."""
    for first, then in (pair, reversed(pair)):
        target = download(shelf, first)
        digest = files.sha256(target)
        if recorded:
            lmstudio.run_lmstudio(first)
        with refuses("lmstudio.foreign_file") as caught:
            lmstudio.run_lmstudio(then)
        assert str(target) in caught.value.message
        assert files.sha256(target) == digest
        lmstudio.remove_version(first)
        shutil.rmtree(target.parent)


def test_what_ferry_put_there_is_ferrys_however_often_it_looks(pair, shelf):
    for _ in range(2):
        assert lmstudio.run_lmstudio(pair[1])["how"] == "hard link"
    lmstudio.remove_version(pair[1])
    assert list(shelf.iterdir()) == []


def test_a_file_that_came_whole_before_the_import_was_killed_is_ferrys(pair, shelf):
    target = download(shelf, pair[1])
    files.write_json(pair[1] / lmstudio.RECORD, {"target": str(target), "done": False})
    assert lmstudio.run_lmstudio(pair[1])["how"] == "copy"
    lmstudio.remove_version(pair[1])
    assert not target.exists()


@pytest.mark.parametrize(
    "place",
    ["{home}/thesis.docx", "{home}/thesis.gguf", "{shelf}/x/y/thesis.docx", "{shelf}/../x/y/thesis.gguf", "{shelf}/thesis.gguf",
     "{shelf}/x/thesis.gguf", "{shelf}/../x/thesis.gguf", "{shelf}/x/y/../../../thesis.gguf"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["begun", "done"])
def test_a_record_is_no_proof_of_a_file_that_is_not_in_a_models_place(pair, shelf, place, how):
    """Not even with the content of a published file."""
    target = Path(place.format(home=Path.home(), shelf=shelf))
    for folder in (target.parent, shelf / "x" / "y"):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(artifact(pair[1]), target)
    files.write_json(
        pair[1] / lmstudio.RECORD, {"target": str(target), "done": how == "done", "how": "copy", "key": None}
    )
    lmstudio.remove_version(pair[1])
    assert target.is_file()
    files.write_json(
        pair[0] / lmstudio.RECORD, {"target": str(target), "done": how == "done", "how": "copy", "key": None}
    )
    lmstudio.run_lmstudio(pair[1])
    assert target.is_file(), "nor for a version that takes its place"


def test_half_a_file_in_a_models_place_is_taken_away(pair, shelf):
    target = shelf / "ferry" / "tiny" / artifact(pair[1]).name
    target.parent.mkdir(parents=True)
    target.write_bytes(b"half")
    files.write_json(pair[1] / lmstudio.RECORD, {"target": str(target), "done": False})
    lmstudio.remove_version(pair[1])
    assert list(shelf.iterdir()) == []


# Ollama


class Shelf(api.Server):
    """An Ollama server as far as names and digests go. (tests/deploy/apps/test_ollama.py asks one that answers.)"""

    def __init__(self, url: str):
        super().__init__(url)
        self.held: dict[str, str] = {}

    def list_models(self) -> dict[str, dict]:
        return {name: {"digest": digest} for name, digest in self.held.items()}

    def copy_model(self, source: str, target: str) -> None:
        self.held[target] = self.held[source]

    def delete_model(self, model: str) -> None:
        del self.held[model]

    def create(self, command: list[str], **_) -> subprocess.CompletedProcess:
        """`ollama create MODEL -f MODELFILE`: the same Modelfile beside the same file gives the same digest."""
        _, _, model, _, path = command
        weights = next(Path(path).parent.glob("*.gguf"))
        self.held[model] = files.sha256_bytes(Path(path).read_bytes() + weights.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def server(monkeypatch) -> Shelf:
    """A server that makes and lists models. Whether they answer as trained is another test's matter."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:2")
    running = Shelf(api.server_url())
    replaced = {
        "ensure_server": lambda start: running, "find_command": lambda: "ollama", "measure_storage": lambda server: len(server.held),
        "server_version": lambda server: "0", "compare_prompts": lambda *_: "TEMPLATE", "compare_answers": lambda *_: {},
        "subprocess": SimpleNamespace(**vars(subprocess) | {"run": running.create}),
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(ollama, name, value)
    return running


def change(record: Path, **values) -> None:
    files.write_json(record, {k: v for k, v in (files.read_json(record) | values).items() if v is not None})


def test_a_store_that_was_deleted_finds_its_models_again_by_their_own_headers(pair, server):
    ollama.run_ollama(pair[1])
    made = dict(server.held)
    for version in pair:
        (version / ollama.RECORD).unlink(missing_ok=True)
    with refuses("ollama.foreign_model"):
        ollama.run_ollama(pair[1])
    server.read_header = lambda model: {"ferry.manifest_id": "0" * 64}
    ollama.run_ollama(pair[1])
    assert server.held == made
    server.held = {"tickets:latest": "theirs", "tickets:mine": "theirs"}
    with refuses("ollama.foreign_model"):  # made of Ferry's file, and under a name of the user's
        ollama.run_ollama(pair[1], "tickets")


def test_a_tag_of_twelve_digits_does_not_make_a_model_ferrys(pair, server):
    server.held = {"tickets:202401311530": "theirs", "tickets:latest": "theirs"}
    before = dict(server.held)
    with refuses("ollama.foreign_model") as caught:
        ollama.run_ollama(pair[1], "tickets")
    assert "tickets:latest" in caught.value.message
    assert server.held == before and not (pair[1] / ollama.RECORD).exists()


@pytest.mark.parametrize("record", ["none", "of another digest", "of another server"])
def test_a_version_that_another_one_made_is_not_made_anew(pair, server, record):
    model = f"tiny:{pair[1].name}"
    if record != "none":
        ollama.run_ollama(pair[1])
        server.delete_model("tiny:latest")
    server.held[model] = "theirs"
    if record == "of another server":
        change(pair[1] / ollama.RECORD, host="http://gpu-box:11434", digest="theirs")
    before = dict(server.held)
    with refuses("ollama.foreign_model") as caught:
        ollama.run_ollama(pair[1])
    assert model in caught.value.message and f"ollama rm {model}" in caught.value.hint
    assert server.held == before
    assert ollama.run_ollama(pair[1], "other")["latest"] == "other:latest"


def test_undeploy_leaves_what_is_not_the_very_model_that_ferry_made(pair, server, capsys):
    record = ollama.run_ollama(pair[1])
    server.held[record["model"]] = "theirs"
    versions.undeploy_model("tiny", pair[1].parent.parent)
    assert set(server.held) == {record["model"]}, "latest was still Ferry's"
    assert f"{record['model']} is no longer the model that Ferry created: it is kept" in capsys.readouterr().err


def test_a_latest_of_the_users_stays_when_its_version_goes(pair, server):
    record = ollama.run_ollama(pair[1])
    server.held["tiny:latest"] = "theirs"
    ollama.remove_version(pair[1])
    assert record["latest"] in server.held and record["model"] not in server.held


def test_a_latest_that_is_another_versions_copy_too_stays_with_that(pair, server):
    for version in pair:
        record = ollama.run_ollama(version)
    server.copy_model(record["model"], f"tiny:{pair[0].name}")  # the same weights and the same Modelfile
    change(pair[0] / ollama.RECORD, digest=record["digest"])
    ollama.remove_version(pair[0])
    assert set(server.held) == {record["model"], "tiny:latest"}


@pytest.mark.parametrize("digest", ["the same", None])
def test_a_record_of_another_server_deletes_nothing_here(pair, server, capsys, digest):
    """OLLAMA_HOST names a machine on which a colleague has the same version."""
    record = ollama.run_ollama(pair[1])
    change(pair[1] / ollama.RECORD, host="http://127.0.0.1:1", **({} if digest else {"digest": None}))
    before = dict(server.held)
    versions.undeploy_model("tiny", pair[1].parent.parent)
    assert server.held == before
    assert (
        f"{record['model']} is on the server at http://127.0.0.1:1, not on {server.url}: it is kept there"
        in capsys.readouterr().err
    )


def test_the_records_of_another_server_prove_no_latest_here(pair, server):
    ollama.run_ollama(pair[1])
    server.delete_model(f"tiny:{pair[1].name}")
    change(pair[1] / ollama.RECORD, host="http://gpu-box:11434")
    with refuses("ollama.foreign_model") as caught:
        ollama.run_ollama(pair[1])
    assert "tiny:latest" in caught.value.message


def test_the_servers_address_is_recorded_and_a_name_of_this_machine_is_as_good_as_another(pair, server, monkeypatch):
    assert ollama.run_ollama(pair[1])["host"] == server.url == files.read_json(pair[1] / ollama.RECORD)["host"]
    monkeypatch.setenv("OLLAMA_HOST", server.url.replace("127.0.0.1", "localhost"))
    ollama.remove_version(pair[1])
    assert server.held == {}


def test_what_an_older_ferry_recorded_without_an_address_is_taken_away(pair, server):
    ollama.run_ollama(pair[1])
    change(pair[1] / ollama.RECORD, host=None)
    assert not ollama.run_ollama(pair[1])["created"]
    change(pair[1] / ollama.RECORD, host=None)
    ollama.remove_version(pair[1])
    assert server.held == {}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_create_that_was_killed_is_ferrys_to_repeat_and_to_take_away(pair, server, monkeypatch, again, copied):
    """latest is a copy of what was there before, or, killed a moment later, of what has just been made."""
    ollama.run_ollama(pair[1])
    (pair[1] / "Modelfile").write_text((pair[1] / "Modelfile").read_text().replace("0.5", "0.6"))
    with monkeypatch.context() as patch:
        patch.setattr(ollama, "withdraw_on_error", killed(copied, server))
        with pytest.raises(RuntimeError):
            ollama.run_ollama(pair[1])
    record = files.read_json(pair[1] / ollama.RECORD)
    assert "digest" not in record and record["host"] == server.url
    assert len(set(server.held.values())) == 2 - copied
    if again:
        assert ollama.run_ollama(pair[1])["created"] and len(set(server.held.values())) == 1
    ollama.remove_version(pair[1])
    assert server.held == {}


def killed(copied: bool, server):
    """An end after `ollama create` that runs no clean-up."""

    def end(_, model: str, *__):
        if copied:
            server.copy_model(model, ollama.latest_name(model))
        raise RuntimeError

    return end


def test_an_unfinished_record_is_no_proof_of_another_name(pair, server):
    server.held = {"llama3:latest": "theirs", "llama3:8b": "theirs"}
    before = dict(server.held)
    files.write_json(pair[1] / ollama.RECORD, {"model": "llama3:8b", "latest": "llama3:latest"})
    ollama.remove_version(pair[1])
    assert server.held == before


# Small ones


def test_only_what_is_called_a_checkpoint_is_a_checkpoint(tmp_path):
    mine = ["checkpoint-best", "checkpoint-8-mine", "checkpoint-", "checkpoint-8.bak"]
    for name in [*mine, "checkpoint-8", "checkpoint-16", "checkpoint-24"]:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    checkpoint_files.mark_complete(tmp_path / "checkpoint-16", 16)
    assert checkpoint_files.prune_and_find_checkpoint(tmp_path) == tmp_path / "checkpoint-16"
    checkpoint_files.remove_other_checkpoints(tmp_path, set())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "checkpoint-99"])


@pytest.mark.parametrize("broken", [False, True])
def test_a_download_never_writes_through_a_link(tmp_path, broken):
    thesis, path = tmp_path / "thesis.txt", tmp_path / "store" / ".x.gguf.part"
    path.parent.mkdir()
    path.symlink_to(thesis)
    if not broken:
        thesis.write_text("mine")
    with PartialDownload(path, SimpleNamespace(file="x.gguf", bytes=4, sha256=""), lambda _: None) as part:
        assert part.size == 0
        part.file.write(b"data")
        part._restart()
    assert not path.is_symlink() and path.is_file()
    assert not thesis.exists() if broken else thesis.read_text() == "mine"


@pytest.fixture
def write(pair, monkeypatch):
    """Write the Modelfile of the newer version, as of a machine with so much room."""

    def stage(num_ctx: int = 256) -> Path:
        monkeypatch.setattr(modelfile, "choose_context", lambda *_: num_ctx)
        modelfile.run_modelfile(pair[1])
        return pair[1] / "Modelfile"

    (pair[1] / "Modelfile").unlink()
    return stage


def test_a_modelfile_that_was_edited_is_kept_aside(write, capsys):
    path = write()
    for number, edit in enumerate(("# first\n", "# second\n")):
        edited = path.read_text() + edit
        path.write_text(edited)
        write()
        kept = path.with_name("Modelfile.before" + (f".{number + 1}" if number else ""))
        assert kept.read_text() == edited and edit not in path.read_text()
        assert capsys.readouterr().err.count(f"was edited: it is kept as {kept.name}") == 1


def test_a_modelfile_of_ferrys_own_is_replaced_without_a_word(write, capsys):
    path = write(256)
    first = path.read_text()
    assert write(128).read_text() != first
    path.with_name(modelfile.RECORD).unlink()  # killed before it was written
    write(128)
    assert not list(path.parent.glob("Modelfile.before*")) and "edited" not in capsys.readouterr().err


def test_a_modelfile_that_no_record_knows_is_kept_aside(write):
    path = write()
    path.with_name(modelfile.RECORD).unlink()
    path.write_text("FROM mine\n")
    assert write().with_name("Modelfile.before").read_text() == "FROM mine\n"


def test_of_unfinished_builds_only_those_of_ferrys_name_are_removed(setup, tmp_path):
    version = setup.llamacpp.version()
    mine = [
        "notes.part-1",
        f"{version}-mine.part-1",
        f"{version}-0123abcd-mine.part-1",
        f"{version}-0123abcd.part-1.bak",
        "x.part-y",
    ]
    for name in [*mine, f"{version}-0123abcd.part-x_1", f"{version}-0123abcd-wheel.part-x_1"]:
        (tmp_path / name).mkdir()
    setup.llamacpp.remove_unfinished_builds(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)


def test_a_build_removes_only_those(setup, monkeypatch, tmp_path):
    (tmp_path / "notes.part-1").mkdir()
    monkeypatch.setattr(setup.llamacpp, "DISK", 1e18)
    with pytest.raises(SystemExit):
        setup.llamacpp.build_llama_cpp(tmp_path / "0-0", print, only_wheel=True)
    assert (tmp_path / "notes.part-1").is_dir()


@pytest.fixture
def engine(tmp_path):
    """A container engine with two images: acme/app, and acme/ferry with Ferry's label. `built` lists its builds."""
    path, log = tmp_path / "engine", tmp_path / "said"
    script = (
        f'[ "$1" = build ] && echo "$@" >> {log}\n'
        'for name; do :; done\ncase "$1$2" in imageinspect) case $name in acme/*|ferry:*) ;; *) exit 1;; esac\n'
        'case "$*" in *--format*) [ $name = acme/ferry:1 ] && label=012345; echo "$label sha256:1";; *) echo "[{}]";; esac;; esac\n'
    )
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)
    return SimpleNamespace(path=str(path), built=lambda: log.read_text().splitlines() if log.exists() else [])


@pytest.mark.parametrize("name", ["acme/ferry:1", "new:1", "ferry:cpu", None])
def test_an_image_is_built_under_a_name_that_is_free_or_ferrys(setup, engine, name):
    settings = {"IMAGE": name} if name else {}
    setup.container.build_image(settings, engine.path, "cpu", name or "ferry:cpu")
    assert len(engine.built()) == 1


def test_the_name_of_an_image_that_is_not_ferrys_stays_with_it(setup, engine, capsys):
    with pytest.raises(SystemExit):
        setup.container.build_image({"IMAGE": "acme/app:latest"}, engine.path, "cpu", "acme/app:latest")
    error, hint = refusal(capsys.readouterr().err)
    assert "acme/app:latest that Ferry did not build" in error and "IMAGE=" in hint and not engine.built()


def test_locks_and_digests_are_put_in_their_place_whole(setup, monkeypatch, tmp_path):
    """A second name of the old file still holds it: the new one was written beside it."""
    docker = tmp_path / "Dockerfile"
    docker.write_text("ARG BASE_IMAGE=debian:12\n")
    docker.chmod(0o640)
    (tmp_path / "link").symlink_to(docker)
    monkeypatch.setattr(setup.lock, "LOCKS_DIR", tmp_path)
    monkeypatch.setattr(setup.pin, "DOCKERFILE", tmp_path / "link")
    monkeypatch.setattr(setup.pin, "fetch_digest", lambda name: "sha256:" + "0" * 64)
    setup.lock.write_lock("x.txt", ["a==1"])
    for path, write in (
        (tmp_path / "x.txt", lambda: setup.lock.write_lock("x.txt", ["a==2"])),
        (docker, setup.pin.main),
    ):
        old = path.read_text()
        os.link(path, path.with_suffix(".old"))
        write()
        assert path.with_suffix(".old").read_text() == old != path.read_text()
    assert docker.stat().st_mode & 0o777 == 0o640 and (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 5, "nothing is left beside them"
