"""The config: every fault at once, with its line, and every usual knob reaches its library."""

import re
import subprocess
import sys

import pytest

from pipeline.base_model.model_config import refuse_unsupported_base
from pipeline.config import schema
from pipeline.config.advice import list_warnings
from pipeline.config.load import load_config
from pipeline.config.schema import Config, Finetune
from tests.helpers.commands import ROOT, refuses

GOOD = "base:\n  model: some/model\ndata:\n  source: rows.jsonl\n"


def written(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def read_fault(tmp_path, code, text, *overrides) -> str:
    """Return the message of the error with that code."""
    with refuses(code) as caught:
        load_config(written(tmp_path, text), overrides)
    return caught.value.message


def test_every_fault_is_reported_at_once_with_its_line(tmp_path):
    text = GOOD + "finetune:\n  learning_rat: 1\n  r: 0\n  optim: [1]\nexprot: {}\n"
    message = read_fault(tmp_path, "config.invalid", text)
    assert "c.yaml:6: finetune.learning_rat: unknown key, did you mean learning_rate?" in message
    assert "c.yaml:7: finetune.r:" in message and "c.yaml:8: finetune.optim" in message
    assert "c.yaml:9: exprot: unknown key, did you mean export?" in message
    assert "4 faults" in message


def test_unknown_keys_alone_have_a_code_of_their_own(tmp_path):
    message = read_fault(tmp_path, "config.unknown_key", GOOD + "finetune: {learning_rat: 1}\nexprot: {}\n")
    assert "learning_rat" in message and "exprot" in message


@pytest.mark.parametrize(
    ("text", "code", "value"),
    [
        ("base: [\n", "config.invalid_yaml", "c.yaml:2:"),
        ("", "config.no_sections", "c.yaml"),
        ("- 1\n", "config.no_sections", "c.yaml"),
        ("base: 3\ndata: {source: a.jsonl}\n", "config.invalid", "c.yaml:1: base:"),
        (GOOD + "base: {}\n", "config.duplicate_key", "c.yaml:5: the key base occurs twice (first"),
        ("data:\n  source: a\n", "config.invalid", "base: Field required"),
        (GOOD + "export: {quantizations: [q9]}\n", "config.invalid", "c.yaml:5: export.quantizations"),
        (GOOD + "export: {quantizations: []}\n", "config.invalid", "quantizations: name at least one"),
        (GOOD + "export: {quantizations: [q8_0, q8_0]}\n", "config.invalid", "each only once"),
        (GOOD + "export: {quantizations: [iq2_xs], imatrix: false}\n", "config.invalid", "iq2_xs"),
        (GOOD + "verify: {min_score: 0.9}\n", "config.invalid", "verify.min_score"),
        (GOOD + "finetune: {loftq_bits: 4}\n", "config.invalid", "set base.load_in_4bit to false"),
    ],
)
def test_a_bad_config_is_one_clear_error(tmp_path, text, code, value):
    assert value in read_fault(tmp_path, code, text)


def test_overrides(tmp_path):
    path = written(tmp_path, GOOD)
    assert load_config(path, ("finetune.max_steps=20", "finetune.learning_rate=2e-4")).finetune.learning_rate == 2e-4
    assert 'SET="finetune.r=x"' in read_fault(tmp_path, "config.invalid", GOOD, "finetune.r=x")
    assert "max_steps" in read_fault(tmp_path, "config.bad_override", GOOD, "max_steps")
    assert "base" in read_fault(tmp_path, "config.not_a_section", "base: 3\n", "base.model=m")


def test_an_unknown_architecture_is_refused_before_anything_is_downloaded(tmp_path):
    base = schema.Base(model="some/model", architecture="NoSuchForCausalLM")
    with refuses("base_model.unknown_architecture") as error:
        refuse_unsupported_base(base)
    assert "NoSuchForCausalLM" in error.value.message


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
        "unsloth/x-bnb-4bit is already quantized",
        "40 training rows",
        "5.0 epochs",
        "max_seq_length 8192",
    ):
        assert word in said
    assert list_warnings(load_config(written(tmp_path, GOOD)), row_count=5000, longest_row=2000) == []
    assert isinstance(tree, Config)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("per_device_train_batch_size", "train_batch_size is"),
        ("gradient_accumulation_steps", "train_batch_size is"),
        ("save_strategy", "save_minutes"),
        ("save_total_limit", "best checkpoint"),
    ],
)
def test_a_name_of_the_library_that_means_something_else_here_is_explained(name, setting, tmp_path):
    message = read_fault(tmp_path, "config.unknown_key", GOOD + f"finetune:\n  {name}: 2\n")
    assert re.search(f"finetune.{name}: unknown key: .*{setting}", message)
