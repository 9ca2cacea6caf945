"""export: adapter -> merged 16-bit weights -> f16 GGUF -> quantized GGUFs, by the pinned llama.cpp only."""

import shutil
from pathlib import Path

from contract import files
from contract.errors import UserError
from pipeline import llamacpp
from pipeline.config import Export
from pipeline.record import Run


def stage(export: Export, run: Run) -> dict:
    """Write export/merged/, export/<name>.f16.gguf, one GGUF a quantization, and the record."""
    folder = run.workspace("export", "finetune")
    adapter = run.output("finetune", "adapter").parent
    merged = folder / "merged"
    if not merged.is_dir():
        weights = Path(run.read("finetune")["weights"])
        merge(weights, adapter, run.folder / "data" / "tokenizer", merged)
    refuse_full_disk(merged, export)
    gguf = folder / f"{run.folder.name}.f16.gguf"
    make(gguf, lambda part: llamacpp.convert(merged, part, folder / "convert.log"))
    outputs = {"f16": gguf}
    for kind in export.quantizations:
        outputs[kind] = folder / f"{run.folder.name}.{kind}.gguf"
        make(outputs[kind], lambda part, kind=kind: llamacpp.quantize(gguf, part, kind, folder / "quantize.log"))
    return run.write("export", ("finetune",), outputs, llama_cpp=llamacpp.version(), default=export.quantizations[0])


def make(target: Path, write) -> None:
    """Write `target` whole or not at all; what an interrupted export left complete is kept."""
    if not target.is_file():
        with files.writing(target) as part:
            write(part)


def merge(weights: Path, adapter: Path, tokenizer: Path, target: Path) -> None:
    """W + scale * B * A in float16, on the CPU; the trained tokenizer, with the trained template, beside it.

    Not Unsloth's merged_16bit, which rounds to bfloat16: most of a short training's changes are below half a
    bfloat16 step of the weight they belong to and vanish there (tests/test_export.py).
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with files.writing(target) as part:
        base = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float16, low_cpu_mem_usage=True)
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload(progressbar=True, safe_merge=True)
        merged.save_pretrained(part)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(part)


def refuse_full_disk(merged: Path, export: Export) -> None:
    """f16 and every quantization stand beside the merged weights at the peak."""
    weights = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    need = weights * (1 + sum(llamacpp.BITS[kind] / 16 for kind in export.quantizations))
    free = shutil.disk_usage(merged).free
    if free < need:
        raise UserError(
            f"export needs {need / 1e9:.1f} GB beside {merged}, {free / 1e9:.1f} GB are free",
            "free some disk, then run the same command again",
        )
