"""Seven families end to end, with tiny random weights of their real classes: trained, merged, converted, quantized, proven."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common import files
from contract import manifest
from tests.helpers import tiny
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.slow  # trains

FAMILIES = ("llama-3", "mistral", "gemma-2", "gemma-3", "qwen-2", "qwen-3", "phi-3")
# One process for all stages: importing Unsloth takes longer than training two steps.
STAGES = """
import sys
from pathlib import Path
from pipeline.__main__ import RUN_STAGE
from pipeline.config.load import load_config
from pipeline.run.run_folder import STAGES, Run
run = Run(Path(sys.argv[2]))
run.freeze_config(load_config(Path(sys.argv[1])))
for stage in STAGES:
    RUN_STAGE[stage](run)
"""


def rows(count: int) -> list[dict]:
    words = ["red", "green", "blue", "amber", "violet", "white", "black", "golden", "silver", "brown"]
    return [
        {"question": f"Which colour has box {i}, the {words[i % 10]} one?", "answer": f"Box {i} is {words[i % 10]}."}
        for i in range(count)
    ]


def trained(name: str, folder: Path, **changes) -> subprocess.CompletedProcess:
    """A tiny base of that family through every stage."""
    base = tiny.base(name, folder / "base")
    files.write_rows(folder / "rows.jsonl", rows(40))
    config = {
        "base": {"model": str(base), "max_seq_length": 256, "load_in_4bit": False, "license": "apache-2.0"},
        "data": {"source": str(folder / "rows.jsonl"), "validation_share": 0.2},
        "clean": {"near_duplicates": False, "leakage": False},
        # a high rate: in two steps the adapter must become visible
        "finetune": {"max_steps": 2, "learning_rate": 2.0e-2, "warmup_steps": 0, "use_gradient_checkpointing": False},
        "evaluate": {"rule": "exact", "max_new_tokens": 8, "max_rows": 6},
        "export": {"quantizations": ["q8_0", "q4_k_m"], "imatrix_tokens": 1024},
        "verify": {"max_extra_loss": 5.0, "max_score_drop": 1.0},  # random weights: no quality to lose
        "publish": {"repo": str(folder / "hub")},
        "generation": {"smoke_prompts": ["Which box?"], "max_tokens": 8},
    }  # fmt: skip
    for section, values in changes.items():
        config[section] |= values
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-c", STAGES, str(folder / "config.yaml"), str(folder / "run")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


ALWAYS = ("gemma-3",)  # the others take three minutes, and the release workflow runs them


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.release) for name in FAMILIES]
)
def test_a_family_is_what_was_trained(name, tmp_path):
    done = trained(name, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run = tmp_path / "run"
    verify, evaluate = files.read_json(run / "verify.json"), files.read_json(run / "evaluate.json")
    scores = verify["scores"]
    assert evaluate["scores"]["adapter"]["loss"] < evaluate["scores"]["base"]["loss"] - 0.3, "it has not learned"
    assert verify["conversion"]["kl"] < 1e-3 and verify["conversion"]["positions"] > 400
    assert abs(scores["merged"]["loss"] - scores["f16"]["loss"]) < 5e-3
    assert abs(scores["merged"]["loss"] - evaluate["scores"]["adapter"]["loss"]) < 0.05
    assert 0 < scores["q8_0"]["kl"] < scores["q4_k_m"]["kl"]
    made = manifest.read_manifest(tmp_path / "hub" / manifest.FILE_NAME)
    assert {artifact.quantization for artifact in made.artifacts} == {"q8_0", "q4_k_m", None}
    assert len(made.golden) >= 16 and len({json.dumps(golden.messages) for golden in made.golden}) >= 8
    assert made.chat.turns is not None or made.chat.embedded
