"""The config: every fault at once, with its line, and every usual knob reaches its library."""

import subprocess
import sys

import pytest

from contract.errors import UserError
from pipeline.config import Config, Finetune, load, warnings
from tests.conftest import ROOT

GOOD = "base:\n  model: some/model\ndata:\n  source: rows.jsonl\n"


def written(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def fault(tmp_path, text, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load(written(tmp_path, text), overrides)
    assert caught.value.hint
    return str(caught.value)


def test_every_fault_is_reported_at_once_with_its_line(tmp_path):
    said = fault(tmp_path, GOOD + "finetune:\n  learning_rat: 1\n  r: 0\n  optim: [1]\nexprot: {}\n")
    assert "c.yaml:6: finetune.learning_rat: unknown key, did you mean learning_rate?" in said
    assert "c.yaml:7: finetune.r:" in said and "c.yaml:8: finetune.optim" in said
    assert "c.yaml:9: exprot: unknown key, did you mean export?" in said
    assert "4 faults" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: [\n", "c.yaml:2: no valid YAML"),
        ("", "holds no sections"),
        ("- 1\n", "holds no sections"),
        ("base: 3\ndata: {source: a.jsonl}\n", "c.yaml:1: base:"),
        (GOOD + "base: {}\n", "c.yaml:5: base stands twice (first"),
        ("data:\n  source: a\n", "base: Field required"),
        (GOOD + "export: {quantizations: [q9]}\n", "c.yaml:5: export.quantizations"),
        (GOOD + "export: {quantizations: []}\n", "at least one"),
        (GOOD + "verify: {min_score: 0.9}\n", "needs a task score"),
        (GOOD + "finetune: {loftq_bits: 4}\n", "set base.load_in_4bit to false"),
    ],
)
def test_a_bad_config_is_one_clear_error(tmp_path, text, expected):
    assert expected in fault(tmp_path, text)


def test_overrides(tmp_path):
    path = written(tmp_path, GOOD)
    assert load(path, ("finetune.max_steps=20", "finetune.learning_rate=2e-4")).finetune.learning_rate == 2e-4
    assert 'SET="finetune.r=x"' in fault(tmp_path, GOOD, "finetune.r=x")
    assert "cannot read the override" in fault(tmp_path, GOOD, "max_steps")


def test_an_unknown_architecture_is_refused_before_anything_is_downloaded(tmp_path):
    said = fault(tmp_path, GOOD.replace("model: some/model", "model: some/model\n  architecture: NoSuchForCausalLM"))
    assert "cannot convert the architecture NoSuchForCausalLM" in said


def test_known_architectures_are_the_converters_own():
    from pipeline import llamacpp

    done = subprocess.run(
        [sys.executable, str(llamacpp.home() / "convert" / "convert_hf_to_gguf.py"), "--print-supported-models"],
        capture_output=True,
        text=True,
    )
    listed = {
        line.split("-")[-1].strip()
        for line in (done.stdout + done.stderr).splitlines()
        if line.strip().startswith("-") or ":  -" in line
    }
    assert {"LlamaForCausalLM", "Gemma2ForCausalLM", "Qwen3ForCausalLM"} <= listed
    assert listed <= llamacpp.architectures()


def test_the_named_knobs_reach_the_library():
    """Each with a value that is not its default, looked up in what the library is given."""
    from pipeline import unsloth

    unsloth.start()
    from unittest.mock import patch

    from pipeline.config import Base
    from pipeline.finetune import lora_arguments, trainer_arguments

    tune = Finetune(
        r=8, lora_alpha=24, lora_dropout=0.1, bias="all", target_modules=("q_proj",), use_rslora=True, loftq_bits=4, use_gradient_checkpointing=True,
        num_train_epochs=2, max_steps=7, per_device_train_batch_size=3, gradient_accumulation_steps=5, learning_rate=3e-4, lr_scheduler_type="cosine",
        warmup_steps=9, weight_decay=0.02, max_grad_norm=0.5, optim="paged_adamw_32bit", packing=True, eval_strategy="steps", eval_steps=11,
        save_strategy="epoch", save_steps=13, save_total_limit=4, logging_steps=6, seed=17, report_to=("tensorboard",),
    )  # fmt: skip
    lora = lora_arguments(tune)
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"], lora["bias"], lora["target_modules"]) == (
        8,
        24,
        0.1,
        "all",
        ["q_proj"],
    )
    assert (
        lora["use_rslora"],
        lora["loftq_config"].loftq_bits,
        lora["use_gradient_checkpointing"],
        lora["random_state"],
    ) == (True, 4, True, 17)
    with patch("trl.SFTConfig") as config:
        trainer_arguments(tune, Base(model="m", max_seq_length=333), ROOT / "runs" / "x")
    given = config.call_args.kwargs
    for name in (
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
        "weight_decay", "max_grad_norm", "optim", "packing", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "seed",
    ):  # fmt: skip
        assert given[name] == getattr(tune, name), name
    assert given["max_length"] == 333 and given["report_to"] == ["tensorboard"]


def test_a_costly_choice_is_said_aloud(tmp_path):
    tree = load(
        written(
            tmp_path,
            'base: {model: unsloth/x-bnb-4bit, max_seq_length: 8192}\ndata: {source: a.jsonl, system: "x\\u202f!"}\nfinetune: {lora_dropout: 0.1, bias: all, r: 128, learning_rate: 1.0e-3, num_train_epochs: 5}\n',
        )
    )
    said = "\n".join(warnings(tree, rows=40, longest=100))
    for word in (
        "lora_dropout",
        "bias",
        "rank 128",
        "learning_rate",
        "quantized already",
        "drops U+202F",
        "40 training rows",
        "5.0 epochs",
        "max_seq_length 8192",
    ):
        assert word in said
    assert warnings(load(written(tmp_path, GOOD)), rows=5000, longest=2000) == []
    assert isinstance(tree, Config)
