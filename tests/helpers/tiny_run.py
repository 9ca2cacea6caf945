"""A run of a tiny Llama whose data stage is done, and its training, here or in a process of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common import files
from pipeline.config.schema import Finetune
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run
from tests.helpers import tiny
from tests.helpers.commands import ROOT

WORDS = ["red", "green", "blue", "amber", "violet", "white", "black", "golden", "silver", "brown"]


TUNE = {
    "r": 8, "lora_dropout": 0.1, "train_batch_size": 6, "num_train_epochs": 3, "learning_rate": 5.0e-3, "warmup_steps": 2,
    "lr_scheduler_type": "cosine", "logging_steps": 1, "optim": "adamw_torch_fused",
}  # fmt: skip


def rows(count: int) -> list[dict]:
    """Of many lengths."""
    return [
        {
            "question": f"Which colour has box {i}?" + " Please." * (i % 7),
            "answer": f"Box {i} is {' '.join(WORDS[i % 10 : i % 10 + 1 + i % 4])}.",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A run whose `data` is done: 43 rows for a tiny Llama."""
    folder = tmp_path_factory.mktemp("finetune")
    files.write_rows(folder / "rows.jsonl", rows(50))
    tree = {
        "base": {"model": str(tiny.base("llama-3", folder / "base")), "max_seq_length": 256, "load_in_4bit": False, "license": "apache-2.0"},
        "data": {"source": str(folder / "rows.jsonl"), "validation_share": 0.2},
        "clean": {"near_duplicates": False, "leakage": False},
        "finetune": TUNE,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run([sys.executable, "-m", "cli", "data", str(folder / "config.yaml"), "--run", str(folder / "run")],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(made, tmp_path) -> Run:
    shutil.copytree(made, tmp_path / "run")
    return Run(tmp_path / "run")


def trained(run: Run, **changes) -> dict:
    from pipeline.finetune.stage import run_finetune

    return run_finetune(
        run.read_config().base, Finetune(**(TUNE | changes)), run.read_record(DataRecord), run
    ).model_dump()


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in files.read_rows(run.folder / "finetune" / "log.jsonl") if "loss" in entry]


def begin(run: Run, **settings) -> subprocess.Popen:
    """The stage in a process of its own, with these settings in its frozen config."""
    tree = yaml.safe_load(run.config_file.read_text())
    tree["finetune"] |= settings
    run.config_file.write_text(yaml.safe_dump(tree))
    return subprocess.Popen([sys.executable, "-m", "pipeline", "finetune", str(run.folder)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.fixture(scope="session")
def whole(made, tmp_path_factory) -> tuple[dict, list[float]]:
    """The training that nothing disturbed: record and losses."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(made, folder)
    record = trained(Run(folder))
    return record, losses(Run(folder))
