"""The merge keeps what was trained."""

import json

import torch
from safetensors.torch import load_file

from contract import files
from pipeline import base, export
from pipeline.record import Run


def test_every_target_is_w_plus_scale_b_a_and_everything_else_the_base(chain, source):
    weights = load_file(base.weights(source) / "model.safetensors")
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
    weights = load_file(base.weights(source) / "model.safetensors")
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


def test_an_interrupted_export_goes_on_where_it_was(tmp_path):
    made = tmp_path / "x.gguf"
    export.make(made, lambda part: part.write_text("GGUF"))
    export.make(made, lambda part: 1 / 0)  # there already: not made again
    assert made.read_text() == "GGUF"


def test_half_done_work_of_another_adapter_is_not_reused(tmp_path):
    run = Run(tmp_path)
    files.write_json(run.path("finetune"), {"adapter": 1})
    left = run.workspace("export", "finetune") / "merged"
    left.mkdir()
    assert run.workspace("export", "finetune") and left.is_dir()  # the same adapter: it goes on
    files.write_json(run.path("finetune"), {"adapter": 2})
    assert run.workspace("export", "finetune").is_dir() and not left.exists()
