"""The runs on this machine: begun by init, shown by runs and status, tidied by clean; and the versions of a model."""

import json
import re
import shutil
from pathlib import Path

import pytest

from common import files
from pipeline.run.run_folder import STAGES, Run
from tests.helpers import installed
from tests.helpers.commands import ROOT, ferry, make

SHAPES = {
    "messages": lambda question, answer: {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
    "alpaca": lambda question, answer: {"instruction": question, "input": "", "output": answer},
    "question-answer": lambda question, answer: {"question": question, "answer": answer},
    "sharegpt": lambda question, answer: {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
}  # fmt: skip


def demo_pairs(count: int) -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in (ROOT / "configs/demo/train.jsonl").read_text().splitlines()]
    return [(row[0]["content"], row[1]["content"]) for row in rows[:count]]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_init_writes_a_config_that_data_accepts(tmp_path, shape):
    rows = tmp_path / "My Tickets.jsonl"
    files.write_rows(rows, [SHAPES[shape](*pair) for pair in demo_pairs(80)])
    config = tmp_path / "tickets.yaml"
    done = make("init", f"DATA={rows}", f"CONFIG={config}")
    assert done.returncode == 0, done.stderr
    assert f"80 rows read as {shape}" in done.stdout and f"make preview CONFIG={config}" in done.stdout
    assert config.read_text().startswith(f"# make train CONFIG={config}\n") and "rule: exact" in config.read_text()
    done = make("data", f"CONFIG={config}", f"RUNS={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    assert files.read_json(tmp_path / "runs" / "tickets" / "data.json")["rows"]["read"] == 80


@pytest.mark.parametrize(
    ("answers", "goal"),
    [
        (["refund", "delay", "Refund"], "label"), (['{"a": 1}', '{"b": 2}'], "json"),
        ([f"It is {i} o'clock." for i in range(90)], "exact"), ([f"Well, {i}. " + "That is a long story. " * 20 for i in range(90)], "text"),
    ],
)  # fmt: skip
def test_the_goal_is_read_off_the_answers(answers, goal):
    from pipeline.preflight.new_config import guess_goal

    assert guess_goal(tuple((answers * 90)[:90])) == goal


def test_init_never_replaces_a_config(tmp_path):
    files.write_rows(tmp_path / "rows.jsonl", [SHAPES["question-answer"](*pair) for pair in demo_pairs(20)])
    config = tmp_path / "rows.yaml"
    config.write_text("mine")
    done = make("init", f"DATA={tmp_path}/rows.jsonl", f"CONFIG={config}")
    assert done.returncode == 2 and f"{config} already exists" in done.stderr and config.read_text() == "mine"


@pytest.fixture
def runs(chain, tmp_path) -> Path:
    """A folder of runs: the finished chain by links, one that has its rows alone, and a folder that is nobody's business."""
    link = {"copy_function": lambda a, b: Path(b).hardlink_to(a)}
    shutil.copytree(chain.run, tmp_path / "runs" / "chain", **link)
    shutil.copytree(chain.run, tmp_path / "runs" / "chain.v2", **link)
    for stage in STAGES[1:]:
        (tmp_path / "runs" / "chain.v2" / f"{stage}.json").unlink()
    (tmp_path / "runs" / "taxes").mkdir()
    (tmp_path / "runs" / "taxes" / "config.yaml").write_text("mine")
    return tmp_path / "runs"


def test_runs_and_status_as_text_and_json(runs):
    listed = ferry("runs", "--runs", runs)
    assert re.search(r"^chain +complete +\d+% +\d\.\d+ +\d+\.\d+ GB$", listed.stdout, re.MULTILINE)
    assert re.search(r"^chain\.v2 +1/6 finetune", listed.stdout, re.MULTILINE) and "taxes" not in listed.stdout
    found = {run["name"]: run for run in json.loads(ferry("runs", "--runs", runs, "--json").stdout)}
    assert (
        found["chain"]["next_stage"] is None
        and found["chain.v2"]["model"] == "chain"
        and found["chain.v2"]["done"] == ["data"]
    )
    status = ferry("status", "--runs", runs, "--run", "chain")
    assert all(f"[{number}/6] {stage:<10}done in" in status.stdout for number, stage in enumerate(STAGES, 1))
    assert (
        json.loads(ferry("status", "--runs", runs, "--run", "chain", "--json").stdout)["score"]
        == found["chain"]["score"]
    )
    missing = ferry("status", "--runs", runs)
    assert missing.returncode == 2 and "chain, chain.v2" in missing.stderr


def test_clean_removes_what_can_be_made_again_and_the_run_stays_complete(runs, chain):
    done = ferry("clean", "--runs", runs, "--run", "chain")
    assert done.returncode == 0 and re.search(r"freed \d+\.\d+ GB", done.stdout)
    run = runs / "chain"
    assert not (run / "export" / "merged").exists() and (run / "finetune" / "adapter").is_dir()
    assert (run / "export" / "chain.q4_k_m.gguf").is_file() and not (run / "export" / "chain.f16.gguf").exists()
    settings = [setting if not setting.startswith("RUNS=") else f"RUNS={runs}" for setting in chain.settings]
    checked = make(*settings, "check")
    assert checked.returncode == 0 and "no finished stage runs again" in checked.stdout, checked.stdout
    changed = make(*settings[:-1], settings[-1] + " verify.max_positions=100", "check")
    assert "export, verify, publish run again" in " ".join((changed.stdout + changed.stderr).split()), (
        "what verify needs was cleaned"
    )


def test_a_whole_run_is_removed_after_a_yes_only(runs):
    refused = ferry("clean", "--runs", runs, "--run", "chain", "--all")
    assert refused.returncode == 2 and "YES=1" in refused.stderr and (runs / "chain" / "data.json").is_file()
    for name in ("taxes", "nothing", "../runs/chain", ""):
        assert ferry("clean", "--runs", runs, "--run", name, "--all", "--yes").returncode == 2
    assert (runs / "taxes" / "config.yaml").read_text() == "mine" and (runs / "chain" / "data.json").is_file()
    assert ferry("clean", "--runs", runs, "--run", "chain", "--all", "--yes").returncode == 0
    assert not (runs / "chain").exists() and (runs / "chain.v2").is_dir()


def test_the_second_version_of_a_model_is_the_same_model():
    first, second = Run(Path("runs/tickets")), Run(Path("runs/tickets.v2"))
    assert first.model_name == second.model_name == "tickets" and second.name == "tickets.v2"


@pytest.mark.slow
def test_versions_go_back_and_forward_by_the_ids_that_models_shows(real, tmp_path):
    older, newer = installed.two(real, tmp_path)
    models = tmp_path / "models"

    def shown() -> dict[str, bool]:
        """{MODEL@VERSION: whether it is in use}"""
        lines = ferry("models", "--models", models).stdout.splitlines()
        return {word: line.startswith("*") for line in lines for word in line.split() if "@" in word}

    old, new = (f"real@{version.name}" for version in (older, newer))
    assert shown() == {old: False, new: True}
    for words, used in ((["rollback"], old), (["rollback", new], new), (["rollback", old], old)):
        done = ferry(*words, "--models", models)
        assert done.returncode == 0, done.stderr
        assert shown()[used] and sum(shown().values()) == 1
    assert ferry("undeploy", new, "--models", models).returncode == 0
    assert shown() == {old: True}
    listed = json.loads(ferry("models", "--models", models, "--json").stdout)
    assert len(listed) == 1
