"""Merge an adapter into the base model: merged 16-bit weights, tensor by tensor.

The memory needed follows the largest tensor, not the model. Unsloth's merged_16bit is not used because it rounds to
bfloat16: most changes of a short training are below half a bfloat16 step of their weight, and vanish there. PEFT's
merge_and_unload is not used because it holds the whole model in memory; the result here is the same as PEFT's, bit for
bit (tests/test_export.py). `find_merge_faults` then reads the written files again and compares them with the formula.
"""

import json
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common import console, files
from common.errors import UserError

if TYPE_CHECKING:
    import torch

# Rows of a matrix that `find_merge_faults` reads at a time: float64 needs four times the memory of the weights.
ROWS = 1024
HALF_STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a step relative to a value, at most
TINY = {"float16": 2.0**-25, "bfloat16": 2.0**-134}  # half a step between the smallest numbers
NAMES = {"float16": "F16", "bfloat16": "BF16"}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Adapter:
    """A LoRA adapter: which tensors of the base model it changes, and what it adds to them.

    Source: PEFT's LoraLayer: delta = scale * B @ A, scale = alpha / r (rsLoRA: alpha / sqrt(r)).
    """

    def __init__(self, folder: Path, names: set[str]):
        """Open an adapter.

        Args:
            folder: The adapter folder in PEFT's layout.
            tensor_names: The tensors of the base model.

        Raises:
            UserError: The adapter is more than LoRA matrices and biases.
        """
        from safetensors import safe_open

        self.settings = files.read_json(folder / "adapter_config.json")
        self.file = safe_open(folder / "adapter_model.safetensors", framework="pt")
        self.pairs: dict[str, str] = {}
        self.replaced: dict[str, str] = {}
        for key in list(self.file.keys()):
            path = key.removeprefix("base_model.model.").replace(".base_layer", "")
            if match := re.fullmatch(r"(.+)\.lora_A\.weight", path):
                self.pairs[_tensor(match[1] + ".weight", names)] = key
            elif path.endswith(".bias"):
                self.replaced[_tensor(path, names)] = key
            elif not path.endswith(".lora_B.weight"):
                raise UserError(
                    f"the adapter holds {key}, which is no LoRA matrix",
                    "train without DoRA, modules_to_save and trained embeddings",
                )
        if self.settings.get("fan_in_fan_out"):
            raise UserError("the adapter belongs to Conv1D layers (fan_in_fan_out)", "choose a base with Linear layers")

    def matrices(self, name: str) -> tuple["torch.Tensor", "torch.Tensor", float]:
        """Return A of shape (r, in), B of shape (out, r), and the scale, for a tensor of the base model."""
        key = self.pairs[name]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = self.file.get_tensor(key), self.file.get_tensor(key.replace(".lora_A.", ".lora_B."))
        rank = _pattern(self.settings.get("rank_pattern"), module, self.settings["r"])
        alpha = _pattern(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"])
        return a, b, alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def _pattern(patterns: dict | None, module: str, usual: float) -> float:
    """Return a module's own value from PEFT's rank_pattern or alpha_pattern, else the default."""
    return next((v for k, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?{k}", module)), usual)


def _tensor(path: str, names: set[str]) -> str:
    """Return the base model's tensor that a module path of the adapter means; wrappers may add a prefix to the path.

    Raises:
        UserError: The base model has no such tensor.
    """
    if path in names:
        return path
    parts = path.split(".")
    for i in range(1, len(parts) - 2):
        found = [name for name in names if name.endswith("." + ".".join(parts[i:]))]
        if len(found) == 1:
            return found[0]
    raise UserError(
        f"the adapter changes {path}, and the base has no such tensor",
        "train on a base whose layers are stored one by one (no fused experts)",
    )


def merge(weights: Path, adapter: Path, target: Path, dtype: str) -> None:
    """Write the merged model to `target`: scale * B @ A is added to the base in float32 and rounded once to `dtype`.

    Args:
        weights: The 16- or 32-bit base model, a folder in Transformers layout.
        adapter: The adapter folder.
        target: The folder to write.
        dtype: float16 or bfloat16.

    Raises:
        UserError: A value does not fit `dtype`.
    """
    from safetensors import safe_open

    shards = safetensors_of(weights)
    names = {name for shard in shards for name in header(shard)}
    lora = Adapter(adapter, names)
    target.mkdir(parents=True, exist_ok=True)
    with console.progress(sum(shard.stat().st_size for shard in shards), "merging", "B") as tick:
        for shard in shards:
            with safe_open(shard, framework="pt") as source:
                tensors = (_merged(name, source.get_tensor(name), lora, dtype) for name in header(shard))
                write(target / shard.name, header(shard), tensors, dtype, tick)
    _other_files(weights, target, dtype)


def _merged(name: str, base: "torch.Tensor", lora: Adapter, dtype: str) -> "torch.Tensor":
    """Return a tensor of the merged model.

    Raises:
        UserError: A value of the result is not finite.
    """
    import torch

    if name in lora.replaced:
        base = lora.file.get_tensor(lora.replaced[name])
    if not base.is_floating_point():
        return base
    if name in lora.pairs:
        a, b, scale = lora.matrices(name)
        base = base.float() + (b.float() @ a.float()) * scale
    merged = base.to(getattr(torch, dtype))
    if not bool(merged.isfinite().all()):
        if not bool(base.isfinite().all()):
            raise UserError(
                f"{name} of the base model holds NaN or infinity",
                "fetch the base model again, or name another base.model with a new RUN=name",
            )
        raise UserError(
            f"{name} does not fit {dtype} (largest value {base.abs().max():.4g})",
            'start a new run: RUN=another-name SET="export.dtype=bfloat16"',
        )
    return merged


def safetensors_of(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        UserError: There are none, or they hold quantized weights.
    """
    shards = sorted(folder.glob("model*.safetensors"))
    kinds = {item["dtype"] for shard in shards for item in header(shard).values()}
    if not shards or not kinds & BYTES.keys() or kinds & {"U8", "I8", "F8_E4M3", "F8_E5M2"}:
        raise UserError(
            f"{folder} holds no 16-bit weights in safetensors (there: {', '.join(sorted(kinds)) or 'none'})",
            "name the model's 16-bit id in base.model; QLoRA rounds it itself",
        )
    return shards


def header(shard: Path) -> dict[str, dict]:
    """Return {name: {dtype, shape, data_offsets}} of a safetensors file, in the order of the file."""
    with shard.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def sixteen_bits(shards: list[Path]) -> int:
    """Return the bytes of the model once every floating-point tensor has 16 bits."""
    return sum(_size(item) for shard in shards for item in header(shard).values())


def _size(item: dict) -> int:
    """Return the bytes of a tensor once its floats have 16 bits."""
    size = item["data_offsets"][1] - item["data_offsets"][0]
    return size * 2 // BYTES[item["dtype"]] if item["dtype"] in BYTES else size


def write(path: Path, described: dict[str, dict], tensors: Iterator["torch.Tensor"], dtype: str, tick) -> None:
    """Write a safetensors file from tensors that come one by one (the library's own writer wants all of them at once).

    Args:
        path: The file to write.
        header: The tensors of the base model, as `read_shard_header` returns them.
        tensors: The merged tensors in the same order.
        dtype: The type of their floats, float16 or bfloat16.
        advance: A function that gets the number of bytes done, for the progress bar.
    """
    import torch

    written, place = {"__metadata__": {"format": "pt"}}, 0
    for name, item in described.items():
        kind = NAMES[dtype] if item["dtype"] in BYTES else item["dtype"]
        written[name] = {"dtype": kind, "shape": item["shape"], "data_offsets": [place, place + _size(item)]}
        place += _size(item)
    text = json.dumps(written).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for item, tensor in zip(described.values(), tensors, strict=True):
            out.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
            tick(item["data_offsets"][1] - item["data_offsets"][0])


def _other_files(weights: Path, target: Path, dtype: str) -> None:
    """Copy the generation config, the index and the SentencePiece model of the base model, and write the config.

    The converter reads a SentencePiece model, and a fast tokenizer does not save it.
    """
    for name in ("generation_config.json", "model.safetensors.index.json", "tokenizer.model"):
        if (weights / name).is_file():
            files.copy(weights / name, target / name)
    config = files.read_json(weights / "config.json")
    config.pop("torch_dtype", None)
    files.write_json(target / "config.json", config | {"dtype": dtype})


def check(weights: Path, adapter: Path, merged: Path, dtype: str) -> list[dict]:
    """Run the merge gate and return the faults, {tensor, what, ...} each; an empty list when the merge is right.

    Every targeted tensor must be W + scale * B @ A within the rounding of `dtype`. Every other tensor must be the
    base's, rounded to `dtype`, bit for bit. The comparison is computed in float64 from the files on disk, in pieces.
    """
    from safetensors import safe_open

    where = {name: shard for shard in sorted(merged.glob("*.safetensors")) for name in header(shard)}
    shards = safetensors_of(weights)
    names = {name for shard in shards for name in header(shard)}
    lora, faults = (
        Adapter(adapter, names),
        [{"tensor": n, "what": "the base has none"} for n in sorted(where.keys() - names)],
    )
    with console.progress(sum(shard.stat().st_size for shard in shards), "checking the merge", "B") as tick:
        for shard in shards:
            with safe_open(shard, framework="pt") as source:
                for name, item in header(shard).items():
                    faults += _compared(name, source, where, lora, dtype)
                    tick(item["data_offsets"][1] - item["data_offsets"][0])
    return faults


def _compared(name: str, source, where: dict[str, Path], lora: Adapter, dtype: str) -> list[dict]:
    """Return the faults of one tensor.

    Args:
        name: The tensor's name in the base model.
        source: The opened shard of the base model that holds it.
        merged_shards: The shard of the merged model that holds each tensor.
        lora: The adapter.
        dtype: The type of the merged weights.
    """
    import torch
    from safetensors import safe_open

    if name not in where:
        return [{"tensor": name, "what": "missing"}]
    base = lora.file.get_tensor(lora.replaced[name]) if name in lora.replaced else source.get_tensor(name)
    with safe_open(where[name], framework="pt") as file:
        made = file.get_tensor(name)
    if made.shape != base.shape:
        return [{"tensor": name, "what": f"shape {tuple(made.shape)}, not {tuple(base.shape)}"}]
    if name not in lora.pairs:
        same = torch.equal(made, base.to(getattr(torch, dtype)) if base.is_floating_point() else base)
        return [] if same else [{"tensor": name, "what": "not the base's, and the adapter does not change it"}]
    worst = _worst(made, base, *lora.matrices(name), dtype)
    return [] if worst <= 1 else [{"tensor": name, "what": "not W + scale * B @ A", "error_in_bounds": round(worst, 1)}]


def _worst(
    made: "torch.Tensor", base: "torch.Tensor", a: "torch.Tensor", b: "torch.Tensor", scale: float, dtype: str
) -> float:
    """Return the largest error of a merged matrix, as a multiple of what rounding explains; infinite for NaN."""
    a, worst, lost = a.double(), 0.0, (len(a) + 3) * 2.0**-24
    for start in range(0, len(base), ROWS):
        rows = slice(start, start + ROWS)
        w, left = base[rows].double(), b[rows].double() * scale
        exact = w + left @ a
        error = made[rows].double().sub_(exact).abs_()
        # The bound is half a step of dtype, plus what float32 may lose in a sum of r products that cancel (Higham's
        # gamma). It is computed in place: new memory for every step took twice the time.
        bound = exact.abs_().mul_(HALF_STEP[dtype] * (1 + 2**-6)).add_(TINY[dtype])
        bound.add_(w.abs_().add_(left.abs() @ a.abs()), alpha=lost)
        worst = max(worst, error.div_(bound).max().nan_to_num(nan=math.inf).item())
    return worst
