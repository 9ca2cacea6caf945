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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypedDict

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


class TensorEntry(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]
    """Where its bytes begin and end, counted from the end of the header."""


class MergeFault(TypedDict, total=False):
    """A tensor of the merged model that is wrong."""

    tensor: Required[str]
    what: Required[str]
    error_in_bounds: float
    """The largest error, as a multiple of what rounding explains."""


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
            self._assign_key(key, tensor_names)
        self._refuse_conv1d_layers()

    def _assign_key(self, key: str, tensor_names: set[str]) -> None:
        """Find the base model's tensor that a key changes. Raise UserError for a key that is no matrix and no bias."""
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

    def _refuse_conv1d_layers(self) -> None:
        if self.settings.get("fan_in_fan_out"):
            raise UserError(
                "the adapter was trained on Conv1D layers (fan_in_fan_out)",
                "choose a base model with Linear layers",
                code="adapter.conv1d_layers",
            )

    def load_matrices(self, name: str) -> tuple["torch.Tensor", "torch.Tensor", float]:
        """Return A of shape (r, in), B of shape (out, r), and the scale, for a tensor of the base model."""
        key = self.matrix_keys[name]
        a, b = self.file.get_tensor(key), self.file.get_tensor(key.replace(".lora_A.", ".lora_B."))
        return a, b, self._scale(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))

    def _scale(self, module: str) -> float:
        """Return the scale of a module's matrices."""
        rank = _module_value(self.settings.get("rank_pattern"), module, self.settings["r"])
        alpha = _module_value(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def replace_bias(self, name: str, base: "torch.Tensor") -> "torch.Tensor":
        """Return the trained bias of that name, or the base model's tensor where the adapter has none."""
        return self.file.get_tensor(self.bias_keys[name]) if name in self.bias_keys else base


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
    shards = list_weight_shards(weights)
    lora = LoraAdapter(adapter, list_tensor_names(shards))
    target.mkdir(parents=True, exist_ok=True)
    with console.show_progress(sum(shard.stat().st_size for shard in shards), "merging", "B") as advance:
        for shard in shards:
            _merge_shard(shard, target / shard.name, lora, dtype, advance)
    _copy_other_files(weights, target, dtype)


def _merge_shard(shard: Path, target: Path, lora: LoraAdapter, dtype: str, advance: Callable[[float], None]) -> None:
    """Write one file of the merged model."""
    from safetensors import safe_open

    header = read_shard_header(shard)
    with safe_open(shard, framework="pt") as source:
        tensors = (_merge_tensor(name, source.get_tensor(name), lora, dtype) for name in header)
        write_shard(target, header, tensors, dtype, advance)


def _merge_tensor(name: str, base: "torch.Tensor", lora: LoraAdapter, dtype: str) -> "torch.Tensor":
    """Return a tensor of the merged model. Raise UserError when a value of it is not finite."""
    import torch

    base = lora.replace_bias(name, base)
    if not base.is_floating_point():
        return base
    if name in lora.matrix_keys:
        a, b, scale = lora.load_matrices(name)
        base = base.float() + (b.float() @ a.float()) * scale
    merged = base.to(getattr(torch, dtype))
    if not bool(merged.isfinite().all()):
        raise _overflow_error(name, base, dtype)
    return merged


def _overflow_error(name: str, tensor: "torch.Tensor", dtype: str) -> UserError:
    """Return the error for a tensor that has no finite values in `dtype`, or none at all."""
    if bool(tensor.isfinite().all()):
        return UserError(
            f"{name} does not fit {dtype} (largest value {tensor.abs().max():.4g})",
            'start a new run: RUN=another-name SET="export.dtype=bfloat16"',
            code="merge.overflow",
        )
    return UserError(
        f"{name} of the base model holds NaN or infinity",
        "download the base model again, or set a different base.model with a new RUN=name",
        code="base_model.not_finite",
    )


def list_weight_shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder. Raise UserError without any, or for quantized weights."""
    shards = sorted(folder.glob("model*.safetensors"))
    dtypes = {entry["dtype"] for shard in shards for entry in read_shard_header(shard).values()}
    if not shards or not dtypes & FLOAT_BYTES.keys() or dtypes & {"U8", "I8", "F8_E4M3", "F8_E5M2"}:
        raise UserError(
            f"{folder} holds no 16-bit weights in safetensors (found: {', '.join(sorted(dtypes)) or 'none'})",
            "set base.model to the model's 16-bit id; QLoRA quantizes it itself",
            code="base_model.no_16_bit_weights",
        )
    return shards


def list_tensor_names(shards: list[Path]) -> set[str]:
    """Return the names of all tensors in safetensors files."""
    return {name for shard in shards for name in read_shard_header(shard)}


def read_shard_header(shard: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file by name, in the order of the file."""
    with shard.open("rb") as file:
        entries = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    entries.pop("__metadata__", None)
    return dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))


def merged_bytes(shards: list[Path]) -> int:
    """Return the bytes of the model once every floating-point tensor has 16 bits."""
    return sum(_merged_tensor_bytes(entry) for shard in shards for entry in read_shard_header(shard).values())


def _merged_tensor_bytes(entry: TensorEntry) -> int:
    """Return the bytes of a tensor once its floats have 16 bits."""
    size, dtype = _tensor_bytes(entry), entry["dtype"]
    return size * 2 // FLOAT_BYTES[dtype] if dtype in FLOAT_BYTES else size


def _merged_dtype(entry: TensorEntry, dtype: str) -> str:
    """Return the type of a tensor, as safetensors names it, once its floats are of `dtype`."""
    return DTYPE_NAMES[dtype] if entry["dtype"] in FLOAT_BYTES else entry["dtype"]


def _tensor_bytes(entry: TensorEntry) -> int:
    """Return the bytes of a tensor in its file."""
    start, end = entry["data_offsets"]
    return end - start


def write_shard(
    path: Path,
    header: dict[str, TensorEntry],
    tensors: Iterator["torch.Tensor"],
    dtype: str,
    advance: Callable[[float], None],
) -> None:
    """Write a safetensors file from tensors that come one by one (the library's own writer wants all of them at once).

    Args:
        path: The file to write.
        header: The tensors of the base model, as `read_shard_header` returns them.
        tensors: The merged tensors in the same order.
        dtype: The type of their floats, float16 or bfloat16.
        advance: A function that gets the number of bytes done, for the progress bar.
    """
    import torch

    with path.open("wb") as file:
        file.write(_encode_header(header, dtype))
        for entry, tensor in zip(header.values(), tensors, strict=True):
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            advance(_tensor_bytes(entry))


def _encode_header(header: dict[str, TensorEntry], dtype: str) -> bytes:
    """Return the start of a safetensors file for these tensors with floats of `dtype`: the header and its length."""
    new_header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in header.items():
        dtype_name, end = _merged_dtype(entry, dtype), offset + _merged_tensor_bytes(entry)
        new_header[name] = {"dtype": dtype_name, "shape": entry["shape"], "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(new_header).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def _copy_other_files(weights: Path, target: Path, dtype: str) -> None:
    """Write the config, and copy files that others do not write, such as the SentencePiece model for the converter."""
    for name in ("generation_config.json", "model.safetensors.index.json", "tokenizer.model"):
        if (weights / name).is_file():
            files.copy_and_hash(weights / name, target / name)
    config = files.read_json(weights / "config.json")
    config.pop("torch_dtype", None)
    files.write_json(target / "config.json", config | {"dtype": dtype})


def find_merge_faults(weights: Path, adapter: Path, merged_folder: Path, dtype: str) -> list[MergeFault]:
    """Run the merge gate and return the faults; an empty list when the merge is right.

    Every targeted tensor must be W + scale * B @ A within the rounding of `dtype`. Every other tensor must be the
    base's, rounded to `dtype`, bit for bit. The comparison is computed in float64 from the files on disk, in pieces.
    """
    merged_files = sorted(merged_folder.glob("*.safetensors"))
    merged_shards = {name: shard for shard in merged_files for name in read_shard_header(shard)}
    shards = list_weight_shards(weights)
    tensor_names = list_tensor_names(shards)
    lora = LoraAdapter(adapter, tensor_names)
    faults = [
        MergeFault(tensor=name, what="not in the base model") for name in sorted(merged_shards.keys() - tensor_names)
    ]
    with console.show_progress(sum(shard.stat().st_size for shard in shards), "checking the merge", "B") as advance:
        for shard in shards:
            for entry, fault in _compare_shard(shard, merged_shards, lora, dtype):
                faults += [fault] if fault else []
                advance(_tensor_bytes(entry))
    return faults


def _compare_shard(
    shard: Path, merged_shards: dict[str, Path], lora: LoraAdapter, dtype: str
) -> Iterator[tuple[TensorEntry, MergeFault | None]]:
    """Yield each tensor of a file of the base model, and its fault in the merged model."""
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as source:
        for name, entry in read_shard_header(shard).items():
            # No name holds the tensor while the next one is read: one tensor at a time is in memory.
            yield entry, _compare_tensor(name, source.get_tensor(name), merged_shards.get(name), lora, dtype)


def _compare_tensor(
    name: str, base: "torch.Tensor", merged_shard: Path | None, lora: LoraAdapter, dtype: str
) -> MergeFault | None:
    """Return the fault of one tensor, which the file `merged_shard` of the merged model holds."""
    from safetensors import safe_open

    if merged_shard is None:
        return MergeFault(tensor=name, what="missing")
    base = lora.replace_bias(name, base)
    with safe_open(merged_shard, framework="pt") as file:
        merged = file.get_tensor(name)
    if merged.shape != base.shape:
        return MergeFault(tensor=name, what=f"shape {tuple(merged.shape)}, not {tuple(base.shape)}")
    if name in lora.matrix_keys:
        return _compare_targeted_tensor(name, merged, base, lora, dtype)
    return _compare_other_tensor(name, merged, base, dtype)


def _compare_targeted_tensor(
    name: str, merged: "torch.Tensor", base: "torch.Tensor", lora: LoraAdapter, dtype: str
) -> MergeFault | None:
    """Return the fault of a tensor to which the adapter adds something."""
    ratio = _max_error_ratio(merged, base, *lora.load_matrices(name), dtype)
    if ratio <= 1:
        return None
    return MergeFault(tensor=name, what="not W + scale * B @ A", error_in_bounds=round(ratio, 1))


def _compare_other_tensor(name: str, merged: "torch.Tensor", base: "torch.Tensor", dtype: str) -> MergeFault | None:
    """Return the fault of a tensor to which the adapter adds nothing."""
    import torch

    if torch.equal(merged, base.to(getattr(torch, dtype)) if base.is_floating_point() else base):
        return None
    return MergeFault(tensor=name, what="not equal to the base model's, and the adapter does not change it")


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
