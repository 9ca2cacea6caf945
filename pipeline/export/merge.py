"""Merge an adapter into the base model: merged 16-bit weights, tensor by tensor.

The memory needed follows the largest tensor, not the model. Unsloth's merged_16bit is not used because it rounds to
bfloat16: most changes of a short training are below half a bfloat16 step of their weight, and vanish there. PEFT's
merge_and_unload is not used because it holds the whole model in memory; the result here is the same as PEFT's, bit for
bit (tests/pipeline/export/test_export.py). `find_merge_faults` then reads the written files again and compares them
with the formula.
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
CHUNK_ROWS = 1024
HALF_STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a step relative to a value, at most
HALF_SMALLEST_STEP = {"float16": 2.0**-25, "bfloat16": 2.0**-134}  # half a step between the smallest numbers
DTYPE_NAMES = {"float16": "F16", "bfloat16": "BF16"}
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class LoraAdapter:
    """A LoRA adapter: which tensors of the base model it changes, and what it adds to them.

    Source: PEFT's LoraLayer: delta = scale * B @ A, scale = alpha / r (rsLoRA: alpha / sqrt(r)).
    """

    def __init__(self, folder: Path, tensor_names: set[str]):
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
        self.matrix_keys: dict[str, str] = {}
        self.bias_keys: dict[str, str] = {}
        for key in list(self.file.keys()):
            tensor_path = key.removeprefix("base_model.model.").replace(".base_layer", "")
            if match := re.fullmatch(r"(.+)\.lora_A\.weight", tensor_path):
                self.matrix_keys[_find_base_tensor(match[1] + ".weight", tensor_names)] = key
            elif tensor_path.endswith(".bias"):
                self.bias_keys[_find_base_tensor(tensor_path, tensor_names)] = key
            elif not tensor_path.endswith(".lora_B.weight"):
                raise UserError(
                    f"the adapter holds {key}, which is not a LoRA matrix",
                    "train without DoRA, modules_to_save and trained embeddings",
                    code="adapter.not_lora",
                )
        if self.settings.get("fan_in_fan_out"):
            raise UserError(
                "the adapter was trained on Conv1D layers (fan_in_fan_out)",
                "choose a base model with Linear layers",
                code="adapter.conv1d_layers",
            )

    def load_matrices(self, name: str) -> tuple["torch.Tensor", "torch.Tensor", float]:
        """Return A of shape (r, in), B of shape (out, r), and the scale, for a tensor of the base model."""
        key = self.matrix_keys[name]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = self.file.get_tensor(key), self.file.get_tensor(key.replace(".lora_A.", ".lora_B."))
        rank = _module_value(self.settings.get("rank_pattern"), module, self.settings["r"])
        alpha = _module_value(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"])
        return a, b, alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def _module_value(patterns: dict | None, module: str, default: float) -> float:
    """Return a module's own value from PEFT's rank_pattern or alpha_pattern, else the default."""
    return next(
        (value for pattern, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?{pattern}", module)), default
    )


def _find_base_tensor(path: str, tensor_names: set[str]) -> str:
    """Return the base model's tensor that a module path of the adapter means; wrappers may add a prefix to the path.

    Raises:
        UserError: The base model has no such tensor.
    """
    if path in tensor_names:
        return path
    parts = path.split(".")
    for i in range(1, len(parts) - 2):
        matches = [name for name in tensor_names if name.endswith("." + ".".join(parts[i:]))]
        if len(matches) == 1:
            return matches[0]
    raise UserError(
        f"the adapter changes {path}, which the base model does not have",
        "train on a base model whose layers are stored one by one (no fused experts)",
        code="adapter.unknown_tensor",
    )


def merge_adapter(weights: Path, adapter: Path, target: Path, dtype: str) -> None:
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

    shards = list_weight_shards(weights)
    tensor_names = {name for shard in shards for name in read_shard_header(shard)}
    lora = LoraAdapter(adapter, tensor_names)
    target.mkdir(parents=True, exist_ok=True)
    with console.show_progress(sum(shard.stat().st_size for shard in shards), "merging", "B") as advance:
        for shard in shards:
            with safe_open(shard, framework="pt") as source:
                tensors = (
                    _merge_tensor(name, source.get_tensor(name), lora, dtype) for name in read_shard_header(shard)
                )
                write_shard(target / shard.name, read_shard_header(shard), tensors, dtype, advance)
    _copy_other_files(weights, target, dtype)


def _merge_tensor(name: str, base: "torch.Tensor", lora: LoraAdapter, dtype: str) -> "torch.Tensor":
    """Return a tensor of the merged model.

    Raises:
        UserError: A value of the result is not finite.
    """
    import torch

    if name in lora.bias_keys:
        base = lora.file.get_tensor(lora.bias_keys[name])
    if not base.is_floating_point():
        return base
    if name in lora.matrix_keys:
        a, b, scale = lora.load_matrices(name)
        base = base.float() + (b.float() @ a.float()) * scale
    merged = base.to(getattr(torch, dtype))
    if not bool(merged.isfinite().all()):
        if not bool(base.isfinite().all()):
            raise UserError(
                f"{name} of the base model holds NaN or infinity",
                "download the base model again, or set a different base.model with a new RUN=name",
                code="base_model.not_finite",
            )
        raise UserError(
            f"{name} does not fit {dtype} (largest value {base.abs().max():.4g})",
            'start a new run: RUN=another-name SET="export.dtype=bfloat16"',
            code="merge.overflow",
        )
    return merged


def list_weight_shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        UserError: There are none, or they hold quantized weights.
    """
    shards = sorted(folder.glob("model*.safetensors"))
    dtypes = {item["dtype"] for shard in shards for item in read_shard_header(shard).values()}
    if not shards or not dtypes & FLOAT_BYTES.keys() or dtypes & {"U8", "I8", "F8_E4M3", "F8_E5M2"}:
        raise UserError(
            f"{folder} holds no 16-bit weights in safetensors (found: {', '.join(sorted(dtypes)) or 'none'})",
            "set base.model to the model's 16-bit id; QLoRA quantizes it itself",
            code="base_model.no_16_bit_weights",
        )
    return shards


def read_shard_header(shard: Path) -> dict[str, dict]:
    """Return {name: {dtype, shape, data_offsets}} of a safetensors file, in the order of the file."""
    with shard.open("rb") as file:
        entries = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    entries.pop("__metadata__", None)
    return dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))


def merged_bytes(shards: list[Path]) -> int:
    """Return the bytes of the model once every floating-point tensor has 16 bits."""
    return sum(_merged_tensor_bytes(item) for shard in shards for item in read_shard_header(shard).values())


def _merged_tensor_bytes(item: dict) -> int:
    """Return the bytes of a tensor once its floats have 16 bits."""
    size = item["data_offsets"][1] - item["data_offsets"][0]
    return size * 2 // FLOAT_BYTES[item["dtype"]] if item["dtype"] in FLOAT_BYTES else size


def write_shard(path: Path, header: dict[str, dict], tensors: Iterator["torch.Tensor"], dtype: str, advance) -> None:
    """Write a safetensors file from tensors that come one by one (the library's own writer wants all of them at once).

    Args:
        path: The file to write.
        header: The tensors of the base model, as `read_shard_header` returns them.
        tensors: The merged tensors in the same order.
        dtype: The type of their floats, float16 or bfloat16.
        advance: A function that gets the number of bytes done, for the progress bar.
    """
    import torch

    new_header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, item in header.items():
        dtype_name = DTYPE_NAMES[dtype] if item["dtype"] in FLOAT_BYTES else item["dtype"]
        new_header[name] = {
            "dtype": dtype_name,
            "shape": item["shape"],
            "data_offsets": [offset, offset + _merged_tensor_bytes(item)],
        }
        offset += _merged_tensor_bytes(item)
    header_bytes = json.dumps(new_header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header_bytes)) + header_bytes)
        for item, tensor in zip(header.values(), tensors, strict=True):
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
            advance(item["data_offsets"][1] - item["data_offsets"][0])


def _copy_other_files(weights: Path, target: Path, dtype: str) -> None:
    """Copy the generation config, the index and the SentencePiece model of the base model, and write the config.

    The converter reads a SentencePiece model, and a fast tokenizer does not save it.
    """
    for name in ("generation_config.json", "model.safetensors.index.json", "tokenizer.model"):
        if (weights / name).is_file():
            files.copy_and_hash(weights / name, target / name)
    config = files.read_json(weights / "config.json")
    config.pop("torch_dtype", None)
    files.write_json(target / "config.json", config | {"dtype": dtype})


def find_merge_faults(weights: Path, adapter: Path, merged_folder: Path, dtype: str) -> list[dict]:
    """Run the merge gate and return the faults, {tensor, what, ...} each; an empty list when the merge is right.

    Every targeted tensor must be W + scale * B @ A within the rounding of `dtype`. Every other tensor must be the
    base's, rounded to `dtype`, bit for bit. The comparison is computed in float64 from the files on disk, in pieces.
    """
    from safetensors import safe_open

    merged_shards = {
        name: shard for shard in sorted(merged_folder.glob("*.safetensors")) for name in read_shard_header(shard)
    }
    shards = list_weight_shards(weights)
    tensor_names = {name for shard in shards for name in read_shard_header(shard)}
    lora, faults = (
        LoraAdapter(adapter, tensor_names),
        [{"tensor": n, "what": "not in the base model"} for n in sorted(merged_shards.keys() - tensor_names)],
    )
    with console.show_progress(sum(shard.stat().st_size for shard in shards), "checking the merge", "B") as advance:
        for shard in shards:
            with safe_open(shard, framework="pt") as source:
                for name, item in read_shard_header(shard).items():
                    faults += _compare_tensor(name, source, merged_shards, lora, dtype)
                    advance(item["data_offsets"][1] - item["data_offsets"][0])
    return faults


def _compare_tensor(name: str, source, merged_shards: dict[str, Path], lora: LoraAdapter, dtype: str) -> list[dict]:
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

    if name not in merged_shards:
        return [{"tensor": name, "what": "missing"}]
    base = lora.file.get_tensor(lora.bias_keys[name]) if name in lora.bias_keys else source.get_tensor(name)
    with safe_open(merged_shards[name], framework="pt") as file:
        merged = file.get_tensor(name)
    if merged.shape != base.shape:
        return [{"tensor": name, "what": f"shape {tuple(merged.shape)}, not {tuple(base.shape)}"}]
    if name not in lora.matrix_keys:
        is_equal = torch.equal(merged, base.to(getattr(torch, dtype)) if base.is_floating_point() else base)
        return (
            []
            if is_equal
            else [{"tensor": name, "what": "not equal to the base model's, and the adapter does not change it"}]
        )
    error_ratio = _max_error_ratio(merged, base, *lora.load_matrices(name), dtype)
    return (
        []
        if error_ratio <= 1
        else [{"tensor": name, "what": "not W + scale * B @ A", "error_in_bounds": round(error_ratio, 1)}]
    )


def _max_error_ratio(
    merged: "torch.Tensor", base: "torch.Tensor", a: "torch.Tensor", b: "torch.Tensor", scale: float, dtype: str
) -> float:
    """Return the largest error of a merged matrix, as a multiple of what rounding explains; infinite for NaN."""
    a, max_ratio, float32_loss = a.double(), 0.0, (len(a) + 3) * 2.0**-24
    for start in range(0, len(base), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        w, scaled_b = base[rows].double(), b[rows].double() * scale
        exact = w + scaled_b @ a
        error = merged[rows].double().sub_(exact).abs_()
        # The bound is half a step of dtype, plus what float32 may lose in a sum of r products that cancel (Higham's
        # gamma). It is computed in place: new memory for every step took twice the time.
        bound = exact.abs_().mul_(HALF_STEP[dtype] * (1 + 2**-6)).add_(HALF_SMALLEST_STEP[dtype])
        bound.add_(w.abs_().add_(scaled_b.abs() @ a.abs()), alpha=float32_loss)
        max_ratio = max(max_ratio, error.div_(bound).max().nan_to_num(nan=math.inf).item())
    return max_ratio
