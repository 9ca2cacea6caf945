"""The config: every fault at once, with its line, and every usual knob reaches its library."""

import subprocess
import sys

import pytest

from common.errors import UserError
from pipeline.base_model.model_config import refuse_unsupported_base
from pipeline.config import schema
from pipeline.config.advice import list_warnings
from pipeline.config.load import load_config
from pipeline.config.schema import Config, Finetune
from tests.conftest import ROOT

GOOD = "base:\n  model: some/model\ndata:\n  source: rows.jsonl\n"


def written(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def fault(tmp_path, text, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load_config(written(tmp_path, text), overrides)
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
    assert load_config(path, ("finetune.max_steps=20", "finetune.learning_rate=2e-4")).finetune.learning_rate == 2e-4
    assert 'SET="finetune.r=x"' in fault(tmp_path, GOOD, "finetune.r=x")
    assert "cannot read the override" in fault(tmp_path, GOOD, "max_steps")


def test_an_unknown_architecture_is_refused_before_anything_is_downloaded(tmp_path):
    base = schema.Base(model="some/model", architecture="NoSuchForCausalLM")
    with pytest.raises(UserError, match="cannot convert the architecture NoSuchForCausalLM"):
        refuse_unsupported_base(base)


def test_known_architectures_are_the_converters_own():
    from pipeline.toolchain import llama_tools

    done = subprocess.run(
        [
            sys.executable,
            str(llama_tools.require_folder() / "convert" / "convert_hf_to_gguf.py"),
            "--print-supported-models",
        ],
        capture_output=True,
        text=True,
    )
    listed = {
        line.split("-")[-1].strip()
        for line in (done.stdout + done.stderr).splitlines()
        if line.strip().startswith("-") or ":  -" in line
    }
    assert {"LlamaForCausalLM", "Gemma2ForCausalLM", "Qwen3ForCausalLM"} <= listed
    assert listed <= llama_tools.list_architectures()


def test_the_named_knobs_reach_the_library():
    """Each with a value that is not its default, looked up in what the library is given."""
    from pipeline.toolchain import unsloth_loader

    unsloth_loader.import_unsloth()
    from unittest.mock import patch

    from pipeline.config.schema import Base
    from pipeline.finetune.build_trainer import lora_arguments, trainer_arguments
    from pipeline.plan.choose_batch import BatchChoice

    tune = Finetune(
        r=8, lora_alpha=24, lora_dropout=0.1, bias="all", target_modules=("q_proj",), use_rslora=True, loftq_bits=4, lr_scheduler_type="cosine",
        warmup_steps=9, weight_decay=0.02, max_grad_norm=0.5, optim="adagrad", eval_strategy="steps", eval_steps=11,
        logging_steps=6, seed=17, report_to=("tensorboard",),
    )  # fmt: skip
    choice = BatchChoice(
        train_batch_size=3,
        learning_rate=3e-4,
        micro_batch_tokens=999,
        largest_micro_batch=999,
        use_gradient_checkpointing=True,
        packing=True,
    )
    lora = lora_arguments(tune, choice)
    names = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "target_modules",
        "use_rslora",
        "use_gradient_checkpointing",
        "random_state",
    )
    assert [lora[name] for name in names] == [8, 24, 0.1, "all", ["q_proj"], True, True, 17]
    assert lora["loftq_config"].loftq_bits == 4
    with patch("trl.SFTConfig") as config:
        trainer_arguments(tune, Base(model="m", max_seq_length=333), choice, 7, 100, ROOT / "runs" / "x")
    given = config.call_args.kwargs
    for name in (
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "optim",
        "eval_strategy",
        "eval_steps",
        "logging_steps",
        "seed",
    ):
        assert given[name] == getattr(tune, name), name
    assert (given["max_length"], given["report_to"], given["max_steps"], given["learning_rate"]) == (
        333,
        "none",
        7,
        3e-4,
    )
    assert given["packing"] and given["gradient_checkpointing"] and given["gradient_accumulation_steps"] == 1
    with patch("trl.SFTConfig") as config:
        trainer_arguments(
            tune.model_copy(update={"eval_strategy": "epoch", "optim": "paged_adamw_32bit"}),
            Base(model="m"),
            choice,
            7,
            100,
            ROOT / "runs" / "x",
        )
    given = config.call_args.kwargs
    assert (given["eval_strategy"], given["eval_steps"], given["save_strategy"]) == ("steps", 34, "best"), (
        "100 rows, three a step"
    )
    assert given["optim"] == "adamw_torch_fused", "no GPU, nothing to page to"


def test_a_costly_choice_is_said_aloud(tmp_path):
    tree = load_config(
        written(
            tmp_path,
            "base: {model: unsloth/x-bnb-4bit, max_seq_length: 8192}\ndata: {source: a.jsonl, system: kind}\nfinetune: {lora_dropout: 0.1, bias: all, r: 128, learning_rate: 1.0e-3, num_train_epochs: 5}\n",
        )
    )
    said = "\n".join(list_warnings(tree, row_count=40, longest_row=100))
    for word in (
        "lora_dropout",
        "bias",
        "rank 128",
        "learning_rate",
        "quantized already",
        "40 training rows",
        "5.0 epochs",
        "max_seq_length 8192",
    ):
        assert word in said
    assert list_warnings(load_config(written(tmp_path, GOOD)), row_count=5000, longest_row=2000) == []
    assert isinstance(tree, Config)


@pytest.mark.parametrize(
    "name", ["per_device_train_batch_size", "gradient_accumulation_steps", "save_strategy", "save_total_limit"]
)
def test_a_name_of_the_library_that_means_something_else_here_is_explained(name, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(f"base: {{model: m}}\ndata: {{source: x.jsonl}}\nfinetune:\n  {name}: 2\n")
    with pytest.raises(
        UserError, match=f"finetune.{name}: unknown key: .*(rows of a whole step|save_minutes|the best)"
    ):
        load_config(path)
