"""The model in Ollama: made from the Modelfile, asked on the live server, and only then NAME:latest.

The server is a stand-in that behaves as Ollama's source says (tests/helpers/standins), with real llama.cpp behind it.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from cli.deploy import install_in_ollama
from common import files
from deploy import store, trace, versions
from deploy.apps import ollama
from deploy.apps import ollama_server as api
from tests.helpers import apps, installed, repos
from tests.helpers.commands import ferry, refuses

pytestmark = pytest.mark.slow  # each model is made by the stand-in and asked through llama.cpp


@pytest.fixture(scope="module")
def made(real, tmp_path_factory):
    """Two versions, the older one first."""
    return installed.two(real, tmp_path_factory.mktemp("two"))


@pytest.fixture
def pair(made, tmp_path):
    models = tmp_path / "my models ü"  # a path as users have them
    newer = installed.copied(made[1], models)
    return [newer.parent / made[0].name, newer]


@pytest.fixture
def server(tmp_path, monkeypatch):
    with apps.ollama(tmp_path / "apps") as running:
        enter(monkeypatch, running.env)
        yield running


def enter(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def digests() -> dict[str, str]:
    return {name: facts["digest"] for name, facts in api.Server(api.server_url()).list_models().items()}


def test_it_is_made_asked_and_then_latest(pair, server):
    record = ollama.run_ollama(pair[1])
    model = f"real:{pair[1].name}"
    assert record["model"] == model and record["latest"] == "real:latest" and record["created"]
    assert digests() == {model: record["digest"], "real:latest": record["digest"]}
    assert record["score"] > 0 and len(record["answers"]) == 3 and record["template"] == "TEMPLATE"
    asked = server.requests
    assert asked.index("POST /api/copy") > max(i for i, line in enumerate(asked) if line == "POST /api/chat")
    assert asked.count("POST /api/chat") == 11 + 3, "every golden prompt, and every smoke prompt"


def test_again_it_is_asked_but_not_made(pair, server):
    ollama.run_ollama(pair[1])
    before = server.requests.count("POST /api/create")
    record = ollama.run_ollama(pair[1])
    assert not record["created"] and server.requests.count("POST /api/create") == before
    api.Server(server.url).delete_model(record["model"])
    assert ollama.run_ollama(pair[1])["created"]


def test_a_changed_modelfile_is_made_again(pair, server):
    ollama.run_ollama(pair[1])
    text = (pair[1] / "Modelfile").read_text()
    (pair[1] / "Modelfile").unlink()
    (pair[1] / "Modelfile").write_text(text.replace("temperature 0.0", "temperature 0.5"))
    assert ollama.run_ollama(pair[1])["created"]


def test_another_prompt_than_the_trained_one_withdraws_the_new_version_only(pair, server):
    """The server ignores TEMPLATE, as Ollama does where it likes the GGUF's own better; here that has another system prompt."""
    ollama.run_ollama(pair[0])
    before = digests()
    text = (pair[1] / "Modelfile").read_text()
    assert "assistant\\n" in text
    text = text.replace("assistant\\n", "assistant:\\n")
    (pair[1] / "Modelfile").unlink()
    (pair[1] / "Modelfile").write_text(text)
    with refuses("ollama.wrong_prompt") as caught:
        ollama.run_ollama(pair[1])
    assert caught.value.message.endswith(f"; real:{pair[1].name} was removed")
    assert digests() == before and not (pair[1] / "ollama.json").exists()


def test_answers_of_another_model_withdraw_it(pair, server):
    server.faults(wrong="Bonjour le monde")
    with refuses("ollama.wrong_answers") as caught:
        ollama.run_ollama(pair[1])
    assert "Bonjour" in caught.value.message and caught.value.message.endswith(f"; real:{pair[1].name} was removed")
    assert digests() == {}


def test_a_version_that_stood_its_test_is_not_withdrawn_when_the_server_changes(pair, server):
    ollama.run_ollama(pair[1])
    server.faults(wrong="Bonjour le monde")
    with refuses("ollama.wrong_answers") as caught:
        ollama.run_ollama(pair[1])
    assert f"real:{pair[1].name} is kept" in caught.value.message
    assert len(digests()) == 2


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"die": "create"}, "ollama.create_failed"), ({"full": True}, "ollama.disk_full"),
        ({"broken": ["create"]}, "ollama.create_failed"), ({"broken": ["copy"]}, "ollama.error_response"),
    ],
)  # fmt: skip
def test_what_fails_in_the_middle_leaves_latest_as_it_was(pair, server, fault, code):
    ollama.run_ollama(pair[0])
    before = digests()
    server.faults(**fault)
    with refuses(code) as caught:
        ollama.run_ollama(pair[1])
    assert "Traceback" not in str(caught.value) and ("OLLAMA_MODELS" in caught.value.hint) == ("full" in fault)
    server.faults()
    server.stop()
    server.start()
    assert digests()["real:latest"] == before["real:latest"]
    assert ollama.run_ollama(pair[1])["latest"] == "real:latest" and digests()["real:latest"] != before["real:latest"]


def test_ctrl_c_between_making_and_asking_leaves_no_unproven_model(pair, server, monkeypatch):
    monkeypatch.setattr(ollama, "compare_prompts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ollama.run_ollama(pair[1])
    assert digests() == {}


def test_what_a_fault_left_in_ollama_is_taken_out_by_undeploy(pair, server):
    server.faults(broken=["copy"])
    with refuses("ollama.error_response") as caught:
        ollama.run_ollama(pair[1])
    assert "/api/copy" in caught.value.message
    assert len(digests()) == 1
    server.faults()
    versions.undeploy_model(files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent)
    assert digests() == {}


def test_a_server_that_takes_nothing_back_is_said_beside_the_reason(pair, server):
    server.faults(wrong="Bonjour le monde", broken=["delete"])
    with refuses("ollama.wrong_answers") as caught:
        ollama.run_ollama(pair[1])
    assert f"`ollama rm real:{pair[1].name}`" in caught.value.message
    assert len(digests()) == 1 and store.read_record(pair[1] / ollama.RECORD).get("digest") is None


@pytest.mark.release
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("fault", "code"), [({"wrong": "Bonjour le monde"}, "ollama.wrong_answers"), ({"full": True}, "ollama.disk_full")]
)
def test_a_version_made_anew_that_fails_leaves_its_latest_known_as_ours(pair, server, fault, code, again):
    """Its Modelfile was changed, or its name: what was there before is still known."""
    ollama.run_ollama(pair[1])
    text = (pair[1] / "Modelfile").read_text()
    (pair[1] / "Modelfile").unlink()
    (pair[1] / "Modelfile").write_text(text.replace("temperature 0.0", "temperature 0.5"))
    server.faults(**fault)
    for name in (None, "bbb"):
        with refuses(code):
            ollama.run_ollama(pair[1], name)
    server.faults()
    if again:
        assert ollama.run_ollama(pair[1])["latest"] == "real:latest"
    versions.undeploy_model(files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent)
    assert digests() == {}


def test_another_name_leaves_nothing_under_the_old_one(pair, server):
    ollama.run_ollama(pair[1], "aaa")
    assert ollama.run_ollama(pair[1], "bbb")["latest"] == "bbb:latest"
    assert set(digests()) == {f"bbb:{pair[1].name}", "bbb:latest"}


def test_another_model_of_the_same_name_is_not_overwritten(pair, server):
    ollama.run_ollama(pair[0])
    folder = shutil.copytree(pair[0].parent, pair[0].parent.parent / "bobs", symlinks=True, copy_function=os.link)
    for record in folder.glob(f"*/{ollama.RECORD}"):
        record.unlink()
    before = digests()
    with refuses("ollama.name_taken") as caught:
        ollama.run_ollama(folder / pair[1].name)
    assert str(pair[0].parent) in caught.value.message and "NAME=" in caught.value.hint and digests() == before
    assert ollama.run_ollama(folder / pair[1].name, "bobs")["latest"] == "bobs:latest"


def test_without_ollama_what_it_had_is_forgotten_and_the_rest_goes(pair, server, tmp_path, monkeypatch):
    ollama.run_ollama(pair[1])
    server.stop()
    repo, models = files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent
    with refuses("ollama.not_running"):
        versions.undeploy_model(repo, models)
    assert pair[1].is_dir()
    enter(monkeypatch, apps.without(tmp_path / "none"))
    versions.undeploy_model(repo, models)
    assert not models.exists()


def test_a_program_that_cannot_be_run_is_one_clear_error(pair, server):
    program = Path(api.find_command())
    program.unlink()
    program.write_bytes(b"")
    program.chmod(0o755)
    with refuses("ollama.command_broken") as caught:
        ollama.run_ollama(pair[1])
    assert f"{program} cannot be run: Exec format error" in caught.value.message


@pytest.mark.parametrize("content", ['{"model":null}', '{"model":7}', "[]", "{", '{"stage":"ollama"}', "[" * 100_000])
def test_a_damaged_record_is_none(pair, server, content):
    (pair[0] / ollama.RECORD).write_text(content)
    (pair[1] / ollama.RECORD).write_text(content)
    assert ollama.run_ollama(pair[1])["created"]
    versions.undeploy_model(files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent)
    assert digests() == {}


def test_a_rollback_passes_by_what_did_not_pass_its_smoke_test(pair):
    models, repo = pair[0].parent.parent, files.read_json(pair[1] / "pull.json")["repo"]
    (pair[0] / "smoke.json").unlink()
    with refuses("store.no_older_version"):
        versions.roll_back(repo, models)
    assert store.require_version(models, repo) == pair[1]
    folder = pair[0].parent.rename(models / "you--model")
    files.write_json(folder / store.NAMES_FILE, {"v1": pair[0].name})
    with refuses("smoke.not_passed"):
        versions.roll_back("you/model@v1", models)
    assert store.require_version(models, "you/model").name == pair[1].name


def test_where_the_record_is_lost_nothing_proves_what_is_there_and_the_hint_cures_it(pair, server):
    ollama.run_ollama(pair[1], "MiXed")
    (pair[1] / ollama.RECORD).unlink()
    before = digests()
    for name in ("mixed:latest", f"mixed:{pair[1].name}"):
        with refuses("ollama.foreign_model") as caught:
            ollama.run_ollama(pair[1], "mixed")
        assert name in caught.value.message and "`ollama rm mixed" in caught.value.hint and digests() == before
        before = {kept: digest for kept, digest in before.items() if kept != name}
        api.Server(server.url).delete_model(name)
    assert ollama.run_ollama(pair[1], "mixed")["latest"] == "mixed:latest"
    assert set(digests()) == {f"mixed:{pair[1].name}", "mixed:latest"}


def test_a_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    assert api.find_server_version()


def test_a_rollback_takes_the_version_that_was_named(pair):
    models = pair[0].parent.parent
    folder = pair[0].parent.rename(models / "you--model")
    files.write_json(folder / store.NAMES_FILE, {"v1": pair[0].name, "v2": pair[1].name})
    assert versions.roll_back("you/model@v2", models)[0] == folder / pair[1].name
    assert versions.roll_back("you/model@v1", models)[0] == folder / pair[0].name


def test_a_latest_that_a_full_disk_emptied_is_made_again(pair, server):
    for version in pair:
        ollama.run_ollama(version)
    server.faults(full=True)
    with refuses("ollama.disk_full") as caught:
        ollama.run_ollama(pair[0])
    assert "OLLAMA_MODELS" in caught.value.hint and "real:latest" not in digests()
    server.faults()
    assert not ollama.run_ollama(pair[0])["created"] and digests()["real:latest"] == digests()[f"real:{pair[0].name}"]


def test_a_model_of_that_name_which_is_not_ours_stays(pair, server):
    ollama.run_ollama(pair[1], "mine")
    client = api.Server(server.url)
    client.copy_model(f"mine:{pair[1].name}", "real:latest")
    client.copy_model("real:latest", "real:7b")
    # Another content than any version's: as if somebody had pulled it.
    Path(pair[1] / "Other").write_text(f"FROM ./{store.load_tested(pair[1])[1].name}\nSYSTEM another\n")
    import subprocess

    subprocess.run(["ollama", "create", "real:latest", "-f", str(pair[1] / "Other")], check=True, capture_output=True)
    before = digests()
    (pair[1] / "ollama.json").unlink()
    with refuses("ollama.foreign_model") as caught:
        ollama.run_ollama(pair[1])
    assert "real:latest" in caught.value.message and "NAME=" in caught.value.hint and digests() == before
    assert ollama.run_ollama(pair[1], "real-2")["latest"] == "real-2:latest"
    assert digests()["real:latest"] == before["real:latest"]


def test_the_name_is_remembered(pair, server):
    ollama.run_ollama(pair[0], "chosen")
    assert ollama.run_ollama(pair[1])["latest"] == "chosen:latest"


@pytest.mark.parametrize("name", ["../x", "a b", "a/b", "a:b", "", "-x", "ä", "x" * 81, "--help"])
def test_a_name_that_ollama_cannot_have_is_refused_before_anything_is_made(pair, server, name):
    if name:
        with refuses("ollama.invalid_name") as caught:
            ollama.run_ollama(pair[1], name)
        assert repr(name) in caught.value.message
    else:
        with refuses("ollama.invalid_name"):
            ollama.normalize_name(name)
    assert "POST /api/create" not in server.requests


def test_rollback_makes_the_older_version_latest_and_the_store_follows(pair, server):
    for version in pair:
        ollama.run_ollama(version)
    models = pair[0].parent.parent
    repo = files.read_json(pair[1] / "pull.json")["repo"]
    version, _ = versions.roll_back(repo, models)
    assert version == pair[0] and store.require_version(models, repo) == pair[0]
    assert digests()["real:latest"] == digests()[f"real:{pair[0].name}"] != digests()[f"real:{pair[1].name}"]
    with refuses("store.no_older_version") as caught:
        versions.roll_back(repo, models)
    assert pair[0].name in caught.value.message


def test_a_rollback_that_ollama_refuses_changes_nothing(pair, server):
    for version in pair:
        ollama.run_ollama(version)
    server.stop()
    models, repo = pair[0].parent.parent, files.read_json(pair[1] / "pull.json")["repo"]
    with refuses("ollama.not_running"):
        versions.roll_back(repo, models)
    assert store.require_version(models, repo) == pair[1]


def test_undeploy_takes_away_what_was_installed_and_counts_the_bytes(pair, server):
    for version in pair:
        ollama.run_ollama(version)
    models, repo = pair[0].parent.parent, files.read_json(pair[1] / "pull.json")["repo"]
    held = server.disk()
    went = versions.undeploy_model(repo, models)
    assert sorted(version.name for version, _ in went) == sorted(version.name for version in pair)
    assert digests() == {} and not models.exists()
    own = sum(back for _, back in went) - (held - server.disk())
    assert held > server.disk() and 0 <= own < 1_000_000, "the store's own files are linked to those of another test"


def test_undeploy_of_the_version_in_use_goes_back_to_the_other_one(pair, server):
    for version in pair:
        ollama.run_ollama(version)
    record = files.read_json(pair[1] / "pull.json")
    files.write_json(
        pair[1] / "pull.json", record | {"repo": "you/real"}
    )  # only a repo of the Hub has names for versions
    models = pair[0].parent.parent
    pair[0].parent.rename(models / "you--real")
    newer = models / "you--real" / pair[1].name
    assert [version for version, _ in versions.undeploy_model(f"you/real@{newer.name}", models)] == [newer]
    assert set(digests()) == {f"real:{pair[0].name}", "real:latest"} and len(set(digests().values())) == 1
    assert store.require_version(models, "you/real").name == pair[0].name


def test_prune_keeps_the_newest_and_the_one_in_use(pair, server):
    for version in pair:
        ollama.run_ollama(version)
    models, repo = pair[0].parent.parent, files.read_json(pair[1] / "pull.json")["repo"]
    store.set_current_version(pair[0])
    assert versions.prune_versions(repo, models, 1) == [], "the older one is in use"
    store.set_current_version(pair[1])
    assert [version for version, _ in versions.prune_versions(repo, models, 1)] == [pair[0]]
    assert set(digests()) == {f"real:{pair[1].name}", "real:latest"} and store.require_version(models, repo) == pair[1]


def test_without_ollama_the_rest_goes_on(pair, tmp_path, monkeypatch, capsys):
    environment = apps.without(tmp_path / "none")
    repo, models = files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent
    done = ferry("ollama", repo, "--models", models, **environment)
    assert done.returncode == 2 and "error: Ollama is not installed" in done.stderr and "Traceback" not in done.stderr
    enter(monkeypatch, environment)
    install_in_ollama(pair[1], None, start=False, optional=True)
    shown = capsys.readouterr().out
    assert "skipped: Ollama is not installed" in shown and "https://ollama.com/download" in shown
    assert ("brew" in shown) == (sys.platform == "darwin")


def test_a_server_is_started_only_with_consent(pair, tmp_path, monkeypatch, capsys):
    with apps.ollama(tmp_path / "apps", running=False, mac=True) as app:
        enter(monkeypatch, app.env)
        repo, models = files.read_json(pair[1] / "pull.json")["repo"], pair[1].parent.parent
        install_in_ollama(pair[1], None, start=False, optional=True)
        shown = capsys.readouterr().out
        assert "skipped: Ollama is installed, but no server answers" in shown and "START=1" in shown
        assert not app.woken and api.find_server_version() is None
        done = ferry("ollama", repo, "--models", models, "--start", FERRY_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert "it keeps running (pid" in done.stderr and api.find_server_version() is not None
        pid = int(done.stderr.split("(pid ")[1].split(",")[0])
        alone = os.getsid(pid) == pid  # Ctrl-C in this terminal is not for it
        os.kill(pid, 15)
        assert alone


def test_a_server_elsewhere_is_never_started(pair, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "http://192.0.2.1:1")
    monkeypatch.setattr(api, "find_server_version", lambda: None)
    monkeypatch.setattr(api, "find_command", lambda: "/bin/true")
    with refuses("ollama.host_unreachable") as caught:
        api.ensure_server(start=True)
    assert isinstance(caught.value, api.OllamaUnavailable) and "http://192.0.2.1:1" in caught.value.message


@pytest.mark.parametrize(
    ("said", "url"),
    [
        ("", "http://127.0.0.1:11434"), ("0.0.0.0", "http://127.0.0.1:11434"), ("0.0.0.0:80", "http://127.0.0.1:80"),
        (":5000", "http://127.0.0.1:5000"), ("example.com", "http://example.com:11434"), ("localhost:1", "http://localhost:1"),
        ("http://h", "http://h:80"), ("https://h", "https://h:443"), ("https://h:9/ollama", "https://h:9/ollama"),
        ("[::1]:7", "http://[::1]:7"), ("::1", "http://[::1]:11434"), ("[::1]", "http://[::1]:11434"),
        ("h:99999", "http://h:11434"), ("h:x", "http://h:11434"), (' "h:1" ', "http://h:1"),
    ],
)  # fmt: skip
def test_ollama_host_is_read_as_ollama_reads_it(monkeypatch, said, url):
    monkeypatch.setenv("OLLAMA_HOST", said)
    assert api.server_url() == url


def test_what_a_manifest_says_never_becomes_a_command(real, tmp_path, server):
    """A system prompt that tries to break out of the Modelfile arrives as it is, and nothing else does."""
    hostile = 'x\nADAPTER /etc/passwd\n"" {{ .System }} $name ${name}\nFROM other\nPARAMETER stop a'
    repo = repos.rewrite(
        shutil.copytree(real, tmp_path / "hub" / "real"), lambda value: value["chat"].update(system=hostile)
    )
    version = installed.ready(repo, tmp_path / "models")
    server.faults(ignore_template=False)
    client, model = api.Server(server.url), "real:hostile"
    ollama.create_model(client, model, version)
    facts = client.request("POST", "/api/show", {"model": model})
    assert facts["system"] == hostile and "ADAPTER" not in facts["parameters"] and "stop" in facts["parameters"]
    assert facts["parameters"].count("stop ") == 1


def test_without_a_modelfile_nothing_is_made(pair, server):
    """`ollama create -f` of a missing file takes whatever GGUFs lie in the current folder."""
    (pair[1] / "Modelfile").unlink()
    with refuses("ollama.no_modelfile") as caught:
        ollama.run_ollama(pair[1])
    assert str(pair[1]) in caught.value.message
    assert "POST /api/create" not in server.requests


def test_trace_knows_a_model_by_its_name_also_when_the_server_is_down(pair, server):
    ollama.run_ollama(pair[1])
    models, made = pair[1].parent.parent, store.load_tested(pair[1])[0]
    for name in ("real", "real:latest", f"real:{pair[1].name}"):
        assert f"its run, {pair[1]}" in trace.run_trace(name, models) and made.base.model in trace.run_trace(
            name, models
        )
    server.stop()
    assert f"its run, {pair[1]}" in trace.run_trace("real", models)
    with refuses("ollama.no_answer") as caught:
        trace.run_trace("another", models)
    assert server.url in caught.value.message


def test_trace_of_a_copy_under_another_name_and_of_a_strangers_model(pair, server, tmp_path):
    ollama.run_ollama(pair[1])
    models, client = pair[1].parent.parent, api.Server(api.server_url())
    client.copy_model("real:latest", "mine")
    assert f"its run, {pair[1]}" in trace.run_trace("mine", models), "the same digest"
    with refuses("trace.not_created_by_ferry") as caught:
        trace.run_trace("mine", tmp_path / "no models")
    assert "mine" in caught.value.message
    with refuses("trace.not_in_ollama") as caught:
        trace.run_trace("nobody", models)
    assert "nobody:latest" in caught.value.message
