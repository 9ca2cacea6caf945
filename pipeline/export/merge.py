"""base + adapter -> merged 16-bit weights, tensor by tensor: memory follows the largest tensor, not the model.

Not Unsloth's merged_16bit, which rounds to bfloat16 (most of a short training's changes are below half a bfloat16 step of
the weight they belong to and vanish there), and not PEFT's merge_and_unload, which holds the whole model; the result is
PEFT's, bit for bit (tests/test_export.py). `check` then reads the written files again and holds them against the formula.
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

ROWS = 1024  # of a matrix at a time in `check`: float64 needs four times the room of the weights
HALF_STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative to a value, at most
TINY = {"float16": 2.0**-25, "bfloat16": 2.0**-134}  # half a step among the smallest numbers
NAMES = {"float16": "F16", "bfloat16": "BF16"}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Adapter:
    """A LoRA adapter: what it adds to which tensor of the base.

    Source: PEFT's LoraLayer: delta = scale * B @ A, scale = alpha / r (rsLoRA: alpha / sqrt(r)).
    """

    def __init__(self, folder: Path, names: set[str]):
        """names: the base's tensors. Raises UserError for an adapter that is more than LoRA matrices and biases."""
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
        """A of shape (r, in), B of shape (out, r), and the scale."""
        key = self.pairs[name]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = self.file.get_tensor(key), self.file.get_tensor(key.replace(".lora_A.", ".lora_B."))
        rank = _pattern(self.settings.get("rank_pattern"), module, self.settings["r"])
        alpha = _pattern(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"])
        return a, b, alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def _pattern(patterns: dict | None, module: str, usual: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: a module's own value."""
    return next((v for k, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?{k}", module)), usual)


def _tensor(path: str, names: set[str]) -> str:
    """The base's tensor that a module path of the adapter means: wrappers may put other words in front."""
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
    """Write `target`: the base's files with scale * B @ A added in float32 and rounded once to `dtype`.

    weights: the 16- or 32-bit base, a folder in Transformers layout. Raises UserError when a value does not fit `dtype`.
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
    """A model's weights. Raises UserError when it has none, or quantized ones."""
    shards = sorted(folder.glob("model*.safetensors"))
    kinds = {item["dtype"] for shard in shards for item in header(shard).values()}
    if not shards or not kinds & BYTES.keys() or kinds & {"U8", "I8", "F8_E4M3", "F8_E5M2"}:
        raise UserError(
            f"{folder} holds no 16-bit weights in safetensors (there: {', '.join(sorted(kinds)) or 'none'})",
            "name the model's 16-bit id in base.model; QLoRA rounds it itself",
        )
    return shards


def header(shard: Path) -> dict[str, dict]:
    """{name: {dtype, shape, data_offsets}} in the order of the file."""
    with shard.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def sixteen_bits(shards: list[Path]) -> int:
    """Bytes of the model with every floating-point tensor in 16 bits."""
    return sum(_size(item) for shard in shards for item in header(shard).values())


def _size(item: dict) -> int:
    """Bytes of a tensor once its floats have 16 bits."""
    size = item["data_offsets"][1] - item["data_offsets"][0]
    return size * 2 // BYTES[item["dtype"]] if item["dtype"] in BYTES else size


def write(path: Path, described: dict[str, dict], tensors: Iterator["torch.Tensor"], dtype: str, tick) -> None:
    """A safetensors file from tensors that come one by one (the library's own writer wants all of them at once)."""
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
    """Config, index and a SentencePiece model, which the converter reads and a fast tokenizer does not save."""
    for name in ("generation_config.json", "model.safetensors.index.json", "tokenizer.model"):
        if (weights / name).is_file():
            files.copy(weights / name, target / name)
    config = files.read_json(weights / "config.json")
    config.pop("torch_dtype", None)
    files.write_json(target / "config.json", config | {"dtype": dtype})


def check(weights: Path, adapter: Path, merged: Path, dtype: str) -> list[dict]:
    """The merge gate: what is not as it must be, empty when all is; {tensor, what, ...} each.

    Every targeted tensor is W + scale * B @ A within the rounding of `dtype`; every other one is the base's, rounded to
    `dtype`, bit for bit. Computed in float64 from the files on disk, in pieces.
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
    """The largest error of a merged matrix, as a multiple of what rounding explains; infinite for NaN."""
    a, worst, lost = a.double(), 0.0, (len(a) + 3) * 2.0**-24
    for start in range(0, len(base), ROWS):
        rows = slice(start, start + ROWS)
        w, left = base[rows].double(), b[rows].double() * scale
        exact = w + left @ a
        error = made[rows].double().sub_(exact).abs_()
        # half a step of dtype, and what float32 may lose in a sum of r products that cancel (Higham's gamma);
        # in place: fresh memory for every step took twice the time
        bound = exact.abs_().mul_(HALF_STEP[dtype] * (1 + 2**-6)).add_(TINY[dtype])
        bound.add_(w.abs_().add_(left.abs() @ a.abs()), alpha=lost)
        worst = max(worst, error.div_(bound).max().nan_to_num(nan=math.inf).item())
    return worst
