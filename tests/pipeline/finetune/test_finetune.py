"""finetune: exact steps however they are dealt, and nothing lost when a run is killed, stopped, out of memory or broken."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import files
from common.errors import UserError
from pipeline.config.schema import Finetune
from pipeline.finetune import stop_signals, training_log
from pipeline.plan import batches
from pipeline.run import checkpoint_files
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run
from pipeline.toolchain import finite_numbers
from tests.helpers.commands import ROOT, refuses
from tests.helpers.tiny_run import TUNE, begin, losses, trained

pytestmark = pytest.mark.slow  # trains a tiny model again and again

# Which rows make a step


@given(st.integers(1, 50), st.integers(1, 200), st.integers(0, 2**32))
def test_the_order_is_epoch_after_epoch_and_the_seeds_alone(rows, count, seed):
    order = batches.ShuffledRows(rows, count, seed)
    found = order[:]
    assert len(found) == len(order) == count
    for start in range(0, count, rows):
        epoch = found[start : start + rows]
        assert len(set(epoch)) == len(epoch) and (len(epoch) < rows or set(epoch) == set(range(rows)))
    assert list(batches.ShuffledRows(rows, max(1, count // 2), seed)[:]) == list(found[: max(1, count // 2)])
    for start, stop in ((0, 1), (count // 3, 2 * count // 3), (rows - 1, rows + 2), (count - 1, count)):
        assert list(order[start:stop]) == list(found[start:stop])
    tokens = np.arange(1, rows + 1)
    for visits in (0, 1, count // 2, rows, count, 2 * count):
        assert order.count_tokens(tokens, visits) == tokens[found[:visits]].sum()
    if rows > 20 and count >= 2 * rows:
        assert list(found[:rows]) != list(found[rows : 2 * rows]), "an epoch has its own order"
    if rows > 20:
        assert list(batches.ShuffledRows(rows, rows, seed + 1)[:]) != list(batches.ShuffledRows(rows, rows, seed)[:])


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(lengths, st.integers(64, 2000), st.booleans())
def test_every_row_is_dealt_once_and_within_the_budget(lengths, budget, packed):
    groups = batches.split_into_micro_batches(lengths, budget, packed)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group in groups:
        held = [lengths[i] for i in group]
        size = sum(held) if packed else -(-max(held) // batches.PADDED_MULTIPLE) * batches.PADDED_MULTIPLE * len(held)
        assert size <= budget or len(group) == 1


def test_packs_are_few_and_equally_full():
    lengths = [170] * 90 + [900] * 7
    groups = batches.split_into_micro_batches(lengths, 8192, packed=True)
    sizes = [sum(lengths[i] for i in group) for group in groups]
    assert len(groups) == 3 and max(sizes) - min(sizes) < 200, sizes


@given(lengths, st.integers(300, 3000), st.booleans())
def test_a_free_step_is_the_largest_that_fits(lengths, budget, packed):
    lengths = np.array(lengths)
    found = batches.max_rows_per_step(lengths, budget, packed)

    def fits(count):
        steps = [lengths[k : k + count].tolist() for k in range(0, len(lengths), count)]
        return all(len(batches.split_into_micro_batches(step, budget, packed)) == 1 for step in steps)

    assert fits(found)
    assert found >= min(len(lengths), budget // int(lengths.max() + 8))


def test_steps_hold_the_tables_rows(made):
    from pipeline.run import training_rows

    table = training_rows.read_table(Run(made).read_stage_record("data").output_path("train"))
    order = batches.ShuffledRows(len(table), 2 * len(table) + 5, 7)
    steps = batches.build_step_dataset(table, order, 6)
    seen = [item["rows"] for item in steps]
    assert [len(step.numbers) for step in seen[:-1]] == [6] * (len(steps) - 1)
    assert list(itertools.chain(*(step.numbers for step in seen))) == order[:].tolist()
    written = table.to_pylist()
    for step in seen:
        for number, ids, labels in zip(step.numbers, step.ids, step.labels, strict=True):
            assert (ids.tolist(), labels.tolist()) == (written[number]["input_ids"], written[number]["labels"])
        assert step.targets == sum(label != -100 for n in step.numbers for label in written[n]["labels"][1:])


def test_a_rows_first_token_is_no_target():
    """It follows nothing, whatever its label."""
    step = batches.StepRows([0, 1], [np.arange(3), np.arange(4)], [np.array([5, -100, 7]), np.array([5, 6, 7, 8])])
    assert (step.targets, step.tokens) == (1 + 3, 7)


# What is trained does not depend on how it is dealt


def test_smaller_micro_batches_train_the_same(run, whole):
    record = trained(run, lora_dropout=0.0)
    at_once = losses(run)
    shutil.rmtree(run.folder / "finetune")
    run.record_path("finetune").unlink()
    again = trained(run, lora_dropout=0.0, micro_batch_tokens=64)
    assert record["micro_batch_tokens"] == 4096 and again["micro_batch_tokens"] < 100
    assert losses(run) == pytest.approx(at_once, rel=0.02), "bfloat16, another order of sums"
    assert (again["steps"], again["rows"], again["tokens"]) == (record["steps"], record["rows"], record["tokens"])


def test_the_record_counts_rows_and_tokens(made, whole):
    from pipeline.run import training_rows

    record, _ = whole
    table = training_rows.read_table(Run(made).read_stage_record("data").output_path("train"))
    assert record["rows"] == 3 * len(table) and record["epochs"] == 3
    assert record["steps"] == -(-3 * len(table) // 6) and record["train_batch_size"] == 6
    assert record["tokens"] == 3 * sum(len(ids) for ids in table["input_ids"].to_pylist())


def test_a_free_batch_fills_the_budget_and_raises_the_rate(run):
    record = trained(run, train_batch_size="auto", max_steps=2, micro_batch_tokens=800)
    assert record["train_batch_size"] > 8
    assert record["learning_rate"] == pytest.approx(5.0e-3 * (record["train_batch_size"] / 8) ** 0.5)


def test_between_two_log_lines_nothing_waits_for_the_card(run, monkeypatch):
    """A number that is taken from a tensor would wait on a GPU: none is, in steps that log and save nothing.

    The loss itself is not looked at: here it is of Unsloth's CPU backend, which counts; on a GPU it is other code.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import TrainerCallback

    from pipeline.finetune import stage

    waits = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func == torch.ops.aten._local_scalar_dense.default:
                frames = traceback.extract_stack()
                if not any(frame.name in ("compute_loss", "forward") for frame in frames):
                    waits.append("".join(traceback.format_list(frames[-12:])))
            return func(*args, **(kwargs or {}))

    look = Look()

    class Between(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                look.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                look.__exit__(None, None, None)

    real = stage.build_trainer

    def build(*given):
        trainer = real(*given)
        trainer.add_callback(Between())
        return trainer

    monkeypatch.setattr(stage, "build_trainer", build)
    trained(run, max_steps=9, logging_steps=100)
    assert not waits, waits[0]


# What is killed goes on


def until(process: subprocess.Popen, ready, limit: float = 300) -> None:
    end = time.monotonic() + limit
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None, process.stdout.read()


def logged(run: Run, step: int):
    log = run.folder / "finetune" / "log.jsonl"
    return lambda: log.is_file() and len(log.read_text().splitlines()) >= step


@pytest.mark.parametrize(
    "kill", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.release)]
)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(run, whole, kill):
    """Dropout is on and the rate follows a curve: data order, optimizer, scheduler and random numbers all go on."""
    process = begin(run, save_steps=4)
    until(process, logged(run, 7))
    process.send_signal(kill)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[kill], printed
    left = checkpoint_files.prune_and_find_checkpoint(run.folder / "finetune" / "checkpoints")
    step = int(left.name.split("-")[1])
    if kill == signal.SIGKILL:
        assert step % 4 == 0
    else:
        assert f"{kill.name} after step {step}" in printed and "the same command resumes from here" in printed
        assert step == len(losses(run)), "the checkpoint is of the last step"
    record = trained(run, save_steps=4)
    assert record["resumed_from"] == left.name
    assert losses(run) == pytest.approx(whole[1], rel=1e-6)
    assert [record[name] for name in ("steps", "rows", "tokens")] == [
        whole[0][name] for name in ("steps", "rows", "tokens")
    ]


def test_a_signal_told_twice_is_one_and_a_second_one_is_obeyed_at_once():
    """Who ends a job tells every process of it, and make tells its children what it was told."""
    obeyed, signals = [], stop_signals.StopSignals()
    before = signal.signal(signal.SIGTERM, lambda *_: obeyed.append("at once"))
    try:
        with signals.capture_signals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert signals.number == signal.SIGTERM and not obeyed
            signals.received_at -= 2
            signal.raise_signal(signal.SIGTERM)
            assert obeyed
    finally:
        signal.signal(signal.SIGTERM, before)


def test_checkpoints_come_by_the_clock_and_only_the_newest_stays(run, monkeypatch):
    real, there = checkpoint_files.remove_other_checkpoints, []

    def keep(folder, kept):
        real(folder, kept)
        there.append(sorted(path.name for path in folder.glob("checkpoint-*")))

    monkeypatch.setattr(checkpoint_files, "remove_other_checkpoints", keep)
    record = trained(run, save_minutes=1e-6)
    assert there == [[f"checkpoint-{step}"] for step in range(1, record["steps"] + 1)]


def test_a_checkpoint_that_cannot_be_written_costs_nothing(run, whole, monkeypatch, capsys):
    """From step 8 until the adapter is written no file can grow over 4 kB, as on a disk that is full."""
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    mark, writing, left = checkpoint_files.mark_complete, files.write_atomically, []

    def full(path, step):
        mark(path, step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    def free(path):
        if path.name == "adapter":
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            left.append(checkpoint_files.prune_and_find_checkpoint(run.folder / "finetune" / "checkpoints").name)
        return writing(path)

    monkeypatch.setattr(checkpoint_files, "mark_complete", full)
    monkeypatch.setattr("pipeline.finetune.stage.files.write_atomically", free)
    try:
        record = trained(run, save_steps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "no checkpoint was written at step 16" in capsys.readouterr().err
    assert left == ["checkpoint-8"], "the last whole one was there until the end"
    assert record["steps"] == whole[0]["steps"] and losses(run) == pytest.approx(whole[1], rel=1e-6)


# What does not fit, what breaks


@pytest.fixture
def small_card(monkeypatch):
    """A model that runs out of memory with more than so many tokens at once, as a card does: in forward or in backward."""
    from pipeline.finetune import stage

    real, sizes = stage.build_model, []

    def fits(limit: int):
        def build(*given):
            import torch

            model = real(*given)

            def look(module, args, kwargs):
                sizes.append(kwargs["input_ids"].numel())
                if sizes[-1] > limit:
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {sizes[-1]} tokens.\nmore")

            model.register_forward_pre_hook(look, with_kwargs=True)
            return model

        monkeypatch.setattr(stage, "build_model", build)
        return sizes

    return fits


def test_out_of_memory_trains_the_same_step_with_less_at_once(run, small_card, capsys):
    record = trained(run, lora_dropout=0.0)
    at_once = losses(run)
    shutil.rmtree(run.folder / "finetune")
    run.record_path("finetune").unlink()
    sizes = small_card(200)
    again = trained(run, lora_dropout=0.0)
    said = " ".join(capsys.readouterr().err.split())
    before, after = map(
        int, re.search(r"out of GPU memory with (\d+) tokens .*; the step is repeated with (\d+)", said).groups()
    )
    assert after == before // 2, "not less than it takes"
    assert sum(size > 200 for size in sizes) < 4, "it was not tried again at each step"
    assert losses(run) == pytest.approx(at_once, rel=0.02)
    assert (again["steps"], again["rows"]) == (record["steps"], record["rows"])


def test_what_a_broken_step_had_added_up_is_forgotten(run, monkeypatch):
    """Memory ends once, at the second micro-batch of the first step."""
    from pipeline.finetune import stage

    def first_norm() -> float:
        return next(
            entry["grad_norm"] for entry in files.read_rows(run.folder / "finetune" / "log.jsonl") if "loss" in entry
        )

    small = {"lora_dropout": 0.0, "micro_batch_tokens": 128, "max_steps": 1}
    trained(run, **small)
    undisturbed = first_norm()
    shutil.rmtree(run.folder / "finetune")
    run.record_path("finetune").unlink()
    real, calls = stage.build_model, itertools.count(1)

    def build(*given):
        import torch

        model = real(*given)

        def look(module, args):
            if next(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        model.register_forward_pre_hook(look)
        return model

    monkeypatch.setattr(stage, "build_model", build)
    trained(run, **small)
    assert next(calls) > 3 and first_norm() == pytest.approx(undisturbed, rel=0.03)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(run):
    """The first one, of the base still: held against one row at a time in plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.run import training_rows

    record = trained(run, max_steps=1, lora_dropout=0.0)
    model = AutoModelForCausalLM.from_pretrained(record["weights"], dtype=torch.bfloat16).eval()
    table = training_rows.read_table(run.read_stage_record("data").output_path("train"))
    sums, counts = 0.0, 0
    for row in table.take(batches.ShuffledRows(len(table), 6, 3407)[:]).to_pylist():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:])
        sums += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        counts += int((labels != -100).sum())
    assert losses(run) == pytest.approx([sums / counts], rel=5e-3)


def test_too_small_a_card_starts_again_with_gradient_checkpointing(run, small_card, monkeypatch, capsys):

    class Again(Exception):
        pass

    def execv(program, arguments):
        assert program == sys.executable and arguments == sys.orig_argv
        raise Again

    monkeypatch.setattr(os, "execv", execv)
    small_card(8)
    with pytest.raises(Again):
        trained(run)
    assert files.read_json(run.folder / "finetune" / "choice.json")["after_out_of_memory"] == {
        "use_gradient_checkpointing": "unsloth"
    }
    with refuses("gpu.out_of_memory") as error:
        trained(run)
    assert "CUDA out of memory. Tried to allocate" in error.value.message


def test_a_card_that_is_taken_is_one_error(run, monkeypatch):
    import torch

    from pipeline.finetune import stage

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB.\nmore")

    monkeypatch.setattr(stage, "build_model", full)
    with refuses("gpu.memory_in_use") as error:
        trained(run)
    assert re.search(r" CPU.*: CUDA out of memory. Tried to allocate 2 GB", error.value.message)
    assert "make doctor" in error.value.hint


def test_a_model_that_unsloth_does_not_pack_is_padded_and_it_is_said(run, monkeypatch, capsys):
    """As on a GPU: memory enough for anything, and the CPU backend, which packs nothing."""
    from pipeline.toolchain import unsloth_loader

    monkeypatch.setattr(unsloth_loader, "gpu_memory_bytes", lambda: 80e9)
    record = trained(run, max_steps=2)
    assert record["packing"] is False and record["use_gradient_checkpointing"] is False
    assert "Unsloth does not pack llama: rows of similar length are padded instead" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run_and_spoils_nothing(run, monkeypatch):
    from pipeline.finetune import stage

    real = stage.build_model

    def build(*given):
        model, calls = real(*given), itertools.count(1)

        def poison(module, args, output):
            if next(calls) >= 10:
                output.loss = output.loss * float("nan") if output.loss is not None else None
                if getattr(output, "log_probs", None) is not None:
                    output.log_probs = output.log_probs * float("nan")

        model.register_forward_hook(poison)
        return model

    monkeypatch.setattr(stage, "build_model", build)
    with refuses("finetune.loss_not_finite") as error:
        trained(run, save_steps=4, logging_steps=5)
    order = batches.ShuffledRows(43, 129, 3407)[:]
    rows_of_step = ", ".join(map(str, order[54:60]))
    for value in ("step 10 is nan", f"rows {rows_of_step} of", "checkpoint-8"):
        assert value in error.value.message
    assert checkpoint_files.prune_and_find_checkpoint(run.folder / "finetune" / "checkpoints").name == "checkpoint-8"
    monkeypatch.setattr(stage, "build_model", real)
    assert trained(run, save_steps=4)["resumed_from"] == "checkpoint-8"


def poison(monkeypatch, when):
    """when(step): what the adapter's first tensor holds after that optimizer step; None: what was trained."""
    from transformers import TrainerCallback

    from pipeline.finetune import callbacks

    class Poison(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            value = when(state.global_step + 1)
            tensor = next(tensor for tensor in model.parameters() if tensor.requires_grad)
            if value is not None:
                tensor.data.view(-1)[0] = value

    real = callbacks.CheckpointCallback
    monkeypatch.setattr(callbacks, "CheckpointCallback", lambda *arguments: pair(real(*arguments), Poison()))


def pair(keeper, poison):
    keeper.on_optimizer_step = poison.on_optimizer_step
    return keeper


BROKEN = {
    "every step, logged at the first alone": (
        {"max_steps": 3, "learning_rate": "inf"},
        None,
        ("loss_not_finite",),
        "step 2",
    ),
    "a rate that overflows": (
        {"max_steps": 3, "learning_rate": 1e38},
        None,
        ("loss_not_finite", "weights_not_finite"),
        "step",
    ),
    "the last step's weights": (
        {"max_steps": 3},
        lambda step: float("nan") if step == 3 else None,
        ("weights_not_finite",),
        "after step 3",
    ),
    "infinity in the last step's weights": (
        {"max_steps": 3},
        lambda step: float("inf") if step == 3 else None,
        ("weights_not_finite",),
        "after step 3",
    ),
    "the only step": ({"max_steps": 1}, lambda step: float("nan"), ("weights_not_finite",), "after step 1"),
    "weights at a checkpoint": (
        {"max_steps": 4, "save_steps": 2},
        lambda step: float("nan") if step == 2 else None,
        ("weights_not_finite",),
        "after step 2",
    ),
    "a step between two logged ones": (
        {"max_steps": 6, "logging_steps": 100},
        lambda step: float("nan") if step == 3 else None,
        ("loss_not_finite",),
        "step 4",
    ),
    "held-out losses": (
        {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2},
        lambda step: float("nan") if step == 2 else None,
        ("heldout_loss_not_finite",),
        "step 2",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_no_training_with_broken_numbers_is_a_success(run, monkeypatch, case):
    changes, when, reasons, value = BROKEN[case]
    rate = changes.get("learning_rate")
    changes = {name: value for name, value in changes.items() if name != "learning_rate"}
    if when:
        poison(monkeypatch, when)
    from pipeline.finetune.stage import run_finetune

    tune = Finetune(**(TUNE | changes)).model_copy(update={"learning_rate": float(rate)} if rate else {})
    with pytest.raises(UserError) as caught:
        run_finetune(run.read_config().base, tune, run.read_record(DataRecord), run)
    assert caught.value.code in [f"finetune.{reason}" for reason in reasons] and value in caught.value.message, caught
    cure = float(re.search(r"learning_rate=([\d.e+-]+)", caught.value.hint)[1])
    assert 0 < cure <= 2e-4, "a cure is one"
    assert not run.is_done("finetune") and not (run.folder / "finetune" / "adapter").exists()
    for path in (run.folder / "finetune").glob("checkpoints/*/adapter_model.safetensors"):
        finite_numbers.refuse_broken_adapter(path)


@pytest.mark.parametrize("rate", [".inf", "-.inf", ".nan", "1e999", "2", "1e38"])
def test_a_rate_that_is_no_rate_is_refused_by_the_config(rate):
    from pipeline.config import load

    with refuses("config.invalid") as error:
        load.load_config(ROOT / "configs" / "demo.yaml", (f"finetune.learning_rate={rate}",))
    assert "finetune.learning_rate" in error.value.message


def test_the_losses_of_a_long_training_are_looked_at_now_and_then(run, monkeypatch):
    """Their tensors stay on the GPU, and their rows in memory, until then."""
    from pipeline.finetune import trainer

    monkeypatch.setattr(trainer, "LOSS_CHECK_STEPS", 2)
    poison(monkeypatch, lambda step: float("nan") if step == 1 else None)
    with refuses("finetune.loss_not_finite") as error:
        trained(run, max_steps=40, logging_steps=1000)
    assert "step 2 is nan" in error.value.message
    assert len(losses(run)) <= 1, "it ended soon after"


def test_the_best_adapter_is_kept_and_patience_ends_the_run(run, monkeypatch):
    """Held-out losses are dictated; everything else is the real thing."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from pipeline.finetune import stage

    real, dictated, seen = stage.build_trainer, iter([3.0, 2.0, 2.5, 2.6]), {}

    def build(*given):
        import torch

        trainer = real(*given)

        def loss(inputs, targets):
            seen[trainer.state.global_step] = {
                name: value.clone() for name, value in get_peft_model_state_dict(trainer.model).items()
            }
            return torch.tensor(next(dictated))

        trainer._micro_batch_loss = loss
        return trainer

    monkeypatch.setattr(stage, "build_trainer", build)
    record = trained(run, eval_strategy="steps", eval_steps=3, early_stopping_patience=2)
    assert (record["best_step"], record["best_loss"], record["steps"]) == (6, 2.0, 12)
    kept = load_file(run.read_stage_record("finetune").output_path("adapter"))
    assert all((kept[name] == seen[6][name]).all() for name in kept)
    assert any((kept[name] != seen[12][name]).any() for name in kept)


def test_the_held_out_loss_is_the_mean_over_tokens(run):
    """Held against one row at a time in plain transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    record = trained(run, eval_strategy="epoch", lora_dropout=0.0)
    entries = [entry for entry in files.read_rows(run.folder / "finetune" / "log.jsonl") if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [8, 16, 22], "43 rows are 8 steps of 6, and at the end"
    assert record["best_loss"] == min(entry["eval_loss"] for entry in entries)
    model = AutoModelForCausalLM.from_pretrained(record["weights"], dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, run.read_stage_record("finetune").output_path("adapter").parent).eval()
    sums, counts = [], []
    for row in files.read_rows(run.read_stage_record("data").output_path("heldout")):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:])
        sums.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
        counts.append(int((labels != -100).sum()))
    assert record["best_loss"] == pytest.approx(sum(sums) / sum(counts), rel=2e-3)
    assert record["best_loss"] != pytest.approx(np.mean(np.array(sums) / counts), rel=4e-3), (
        "the mean of means is another number"
    )


def test_a_disk_without_room_for_a_checkpoint_is_noticed_first(run, monkeypatch):
    from pipeline.finetune import stage

    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with refuses("disk.too_little_for_checkpoints") as error:
        trained(run)
    assert "0.00 GB are free" in error.value.message
    assert not run.is_done("finetune")


def test_an_adapter_that_cannot_be_written_keeps_the_last_checkpoint(run, monkeypatch):
    """No file can grow over 4 kB from the last checkpoint on; then the same command ends it without another step."""
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    mark = checkpoint_files.mark_complete

    def full(path, step):
        mark(path, step)
        if step == 22:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    monkeypatch.setattr(checkpoint_files, "mark_complete", full)
    try:
        with refuses("finetune.adapter_not_written"):
            trained(run, save_steps=22)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert checkpoint_files.prune_and_find_checkpoint(run.folder / "finetune" / "checkpoints").name == "checkpoint-22"
    monkeypatch.setattr(checkpoint_files, "mark_complete", mark)
    assert trained(run, save_steps=22)["resumed_from"] == "checkpoint-22"


# What a probe finds


def test_a_probe_measures_the_longest_rows_and_finetune_takes_the_fastest(run, monkeypatch, capsys):
    """Here on a CPU, where only what was measured is another number: the stage itself asks for a GPU."""
    from pipeline.finetune import probe

    config = run.read_config()
    base, tune = config.base, config.finetune.model_copy(update={"lora_dropout": 0.0})
    monkeypatch.setattr(probe, "TOKEN_LIMITS", (512, 256))
    found = probe.measure_micro_batches(run, base, tune, False)
    assert [row["micro_batch_tokens"] for row in found] == [512, 256] and all(
        row["tokens_per_second"] > 0 for row in found
    )
    assert [
        json.loads(line.removeprefix(probe.RESULT_PREFIX))
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(probe.RESULT_PREFIX)
    ] == found
    assert not (run.folder / "finetune").exists(), "it was trained elsewhere"
    monkeypatch.setattr(
        probe,
        "measure_in_process",
        lambda run, bits, policy: [row | {"load_in_4bit": bits, "use_gradient_checkpointing": policy} for row in found],
    )
    page = probe.run_probe(run)
    best = max(found, key=lambda row: row["tokens_per_second"])
    line = next(line for line in page.splitlines() if "finetune uses this" in line)
    assert f"{best['micro_batch_tokens']:,}" in line and "16 bit" in line
    assert trained(run, max_steps=2)["micro_batch_tokens"] == best["micro_batch_tokens"]


def test_a_probe_says_what_does_not_fit(run, small_card, monkeypatch):
    from pipeline.finetune import probe, stage

    small_card(300)
    monkeypatch.setattr(probe, "build_model", stage.build_model)
    config = run.read_config()
    found = probe.measure_micro_batches(
        run, config.base, config.finetune.model_copy(update={"micro_batch_tokens": 512}), False
    )
    assert [(row["micro_batch_tokens"], row["tokens_per_second"]) for row in found] == [(512, None)]


@pytest.mark.parametrize("packed, tokens", [(True, 384), (False, 448)])
def test_the_longest_rows_fill_a_micro_batch(packed, tokens):
    from pipeline.finetune import probe

    lengths = np.array([10, 90, 20, 100, 95, 97, 5])
    order = probe.select_longest_rows(lengths, tokens, packed)
    assert len(order) == 4 and set(order) == {1, 3, 4, 5}
    assert batches.count_batch_tokens(lengths[order], packed) <= tokens


def test_compiled_kernels_are_kept_between_runs(monkeypatch):
    from pipeline.toolchain import unsloth_loader

    for name in unsloth_loader.COMPILE_CACHES:
        monkeypatch.delenv(name, raising=False)
    unsloth_loader.import_unsloth()
    assert all(Path(os.environ[name]).is_relative_to(files.cache_dir()) for name in unsloth_loader.COMPILE_CACHES)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    unsloth_loader.import_unsloth()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere", "as the image sets it"


# What it says


def test_speed_memory_time_left_and_cost_are_said(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now[0])
    meter = training_log.SpeedMeter(lambda step: 1000 * step, 10, flops=2e9, peak_flops=1e13, dollars_per_hour=3.6)
    meter.start_at(0)
    now[0] += 4
    meter.leave_out(2)
    entry = meter.read_entry(2, 5.5)
    assert entry == {
        "tokens": 2000,
        "tokens_per_second": 1000.0,
        "memory_gb": 5.5,
        "mfu": 0.2,
        "seconds_left": 16,
        "dollars": 0.004,
    }
    now[0] += 8
    assert meter.read_entry(4, 5.5)["tokens_per_second"] == 250.0
    said = training_log.format_entry(4, 10, entry | {"loss": 0.5})
    assert said == "finetune: step 4/10, loss 0.5000, 1,000 tokens/s, MFU 20%, 5.5 GB, $0.00, 16 s left"


def test_a_resumed_run_counts_its_own_speed_only():
    meter = training_log.SpeedMeter(lambda step: 1000 * step, 10, 1.0, None, None)
    meter.start_at(5)
    found = meter.read_entry(6, 1.0)
    assert found["tokens"] == 6000 and "mfu" not in found and "dollars" not in found
    assert meter.first_step == 5


@pytest.mark.release
def test_a_resumed_trainings_speed_starts_where_it_goes_on(run, monkeypatch):
    real, began = training_log.SpeedMeter.start_at, []

    def start(meter, step):
        began.append(step)
        real(meter, step)

    monkeypatch.setattr(training_log.SpeedMeter, "start_at", start)
    process = begin(run, save_steps=4)
    until(process, logged(run, 7))
    process.kill()
    process.communicate()
    trained(run)
    assert began == [int(files.read_json(run.record_path("finetune"))["resumed_from"].split("-")[1])]


def test_report_to_gets_what_the_log_gets(run, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    class Recorder(TrainerCallback):
        seen: ClassVar[list[dict]] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    trained(run, max_steps=3, report_to=("recorder",))
    assert [{"loss", "tokens_per_second", "memory_gb"} <= logs.keys() for logs in Recorder.seen[:3]] == [True] * 3


@pytest.mark.parametrize(
    "name, code",
    [("tensorbored", "finetune.unknown_reporter"), ("tensorboard", "finetune.reporter_not_installed")],
)
def test_a_reporter_that_is_not_there_is_one_error(name, code):
    """tensorboard is not among the locked packages."""
    from pipeline.finetune.build_trainer import create_reporters

    with refuses(code) as error:
        create_reporters((name,))
    assert re.search(f"finetune.report_to: .*{name}", error.value.message)
    assert f"pip install {name}" in error.value.hint


def test_each_step_is_in_the_log(whole):
    record, curve = whole
    assert len(curve) == record["steps"] and curve[-1] < curve[0]
