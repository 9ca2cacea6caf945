"""The data stage as a laptop runs it: an environment without torch and llama.cpp, base and rows from a Hub."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.commands import ROOT
from tests.helpers.hub import Hub, serving
from tests.helpers.shapes import LLAMA

pytestmark = pytest.mark.slow  # installs an environment

ROWS = [{"question": f"What is {i} plus {i}? Case {i * 7}.", "answer": f"It is {2 * i}."} for i in range(3000)]


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Path:
    """The environment that `make data` sets up on a laptop."""
    venv = tmp_path_factory.mktemp("light") / "venv"
    command = [sys.executable, "setup/env.py", "--light", "--venv", str(venv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return venv


@pytest.fixture(scope="module")
def hub(source, tmp_path_factory) -> Iterator[Hub]:
    """A base model of which only the tokenizer may be fetched, and a data set with two subsets."""
    from pipeline.base_model import restore_gguf

    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(restore_gguf.prepare_tokenizer(source), folder / "base")
    (folder / "base" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | LLAMA))
    (folder / "base" / "model.safetensors").write_bytes(b"not to be fetched")
    for name, rows in (("small", ROWS[:50]), ("large", ROWS)):
        (folder / "rows" / name).mkdir(parents=True)
        (folder / "rows" / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [{"config_name": name, "data_files": f"{name}/train.jsonl"} for name in ("small", "large")]
    (folder / "rows" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    with serving(folder / "storage") as hub:
        for name in ("models/you/base", "datasets/you/rows"):
            hub.add(name, folder / name.split("/")[-1])
        yield hub


def data(
    python: Path | str, url: str, folder: Path, *settings: str, stage: str = "data"
) -> subprocess.CompletedProcess:
    """The stage on the Hub at `url`, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    config = {
        "base": {"model": "you/base", "max_seq_length": 256},
        "data": {"source": "you/rows", "subset": "large", "split": "train[:2500]"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [str(python), "-m", "cli", stage, str(folder / "config.yaml"), "--run", str(folder / "run")]
    # An import of Unsloth in another test turns HF_HUB_OFFLINE into three variables of this process.
    online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment = online | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        command + [word for setting in settings for word in ("--set", setting)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_torch_and_llama_cpp_are_not_there(light):
    done = subprocess.run(
        [light / "bin" / "python", "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True
    )
    names = {line.split("==")[0].lower() for line in done.stdout.splitlines()}
    assert "transformers" in names and not names & {
        "torch",
        "unsloth",
        "llama_cpp_python",
        "gguf",
        "trl",
        "bitsandbytes",
    }


def test_rows_made_on_a_laptop_are_those_made_on_the_gpu_box(light, hub, tmp_path):
    for name, python in (("laptop", light / "bin" / "python"), ("box", sys.executable)):
        done = data(python, hub.url, tmp_path / name)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "question-answer (200 of the first 200 rows have question, answer)" in " ".join(done.stdout.split())
    assert hub.asked and not any("safetensors" in path for path in hub.asked), "the weights stay on the Hub"
    made = [json.loads((tmp_path / name / "run" / "data.json").read_text()) for name in ("laptop", "box")]
    for item in ("rows", "dropped", "tokens", "outputs", "base", "dataset"):
        assert made[0][item] == made[1][item]
    assert made[0]["rows"]["read"] == 2500
    assert made[0]["base"]["revision"] == hub.commits("models/you/base")[0]["id"]
    assert made[0]["dataset"]["training"]["revision"] == hub.commits("datasets/you/rows")[0]["id"]


def test_the_plan_of_an_8b_model_is_made_on_a_laptop(light, hub, tmp_path):
    done = data(light / "bin" / "python", hub.url, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    planned = data(light / "bin" / "python", hub.url, tmp_path, stage="plan")
    assert planned.returncode == 0, planned.stderr
    assert "5.7  weights" in planned.stdout and "cheapest that fits: " in planned.stdout
    assert not any("safetensors" in path for path in hub.asked), "the weights stay on the Hub"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.source=you/gone", "the data set you/gone cannot be loaded"),
        ("data.subset=medium", "the data set you/rows cannot be loaded: BuilderConfig 'medium' not found"),
        ("data.split=nonsense", "the data set you/rows cannot be loaded: Unknown split"),
        ("data.revision=v9", "the data set you/rows cannot be loaded"),
        ("base.model=you/gone", "base.model you/gone: it does not exist on the Hub or is private"),
        ("base.revision=v9", "base.model you/base, base.revision v9: no such revision"),
    ],
)
def test_what_the_hub_does_not_have_is_one_clear_error(hub, tmp_path, setting, expected):
    done = data(sys.executable, hub.url, tmp_path, setting)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and "next:" in done.stderr and "Traceback" not in done.stderr


def test_what_needs_more_says_so(light, tmp_path):
    command = [light / "bin" / "python", "-m", "cli", "data", "configs/demo.yaml", "--run", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "not installed in this environment" in done.stderr and "make env" in done.stderr


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["data", "configs/gemma-2-2b-alpaca.yaml"], "data"), (["data", "configs/demo.yaml"], "train"),
        (["plan", "configs/gemma-2-2b-alpaca.yaml"], "data"), (["train", "configs/gemma-2-2b-alpaca.yaml"], "train"),
        (["cloud-to-local", "configs/gemma-2-2b-alpaca.yaml", "--cloud", "ssh://you@box"], "data"),
        (["cloud-to-local", "configs/demo.yaml", "--cloud", "ssh://you@box"], "train"), (["models"], None), (["runs"], None),
        (["config", "configs/demo.yaml"], None), (["pull", "./hub/demo"], "deploy"),
    ],
)  # fmt: skip
def test_a_command_sets_up_no_more_than_it_needs(words, environment, monkeypatch):
    """A base that is a GGUF is read by llama.cpp; every other one's rows are made without torch."""
    from cli import environment as module
    from cli.main import ferry

    class Prepared(Exception):
        pass

    def prepare(kind: str):
        raise Prepared(kind)

    monkeypatch.setenv(module.MAY_SWITCH, "1")
    monkeypatch.setenv("DOCKER", "0")
    monkeypatch.setattr(module, "prepare_environment", prepare)
    monkeypatch.setattr(module, "run_in_image_if_chosen", lambda command, ctx: None)
    if environment is None:
        ferry.main(words, standalone_mode=False)
        return
    with pytest.raises(Prepared, match=environment):
        ferry.main(words, standalone_mode=False)


def test_the_launcher_runs_in_it(light):
    """A laptop launches with no more than that."""
    code = "import launch.cloud_to_local, launch.reproduce, launch.verdict, launch.providers.ssh, pipeline.data.fingerprint, cli.cloud"
    done = subprocess.run([light / "bin" / "python", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
