"""The table of GPU types, configs/gpus.csv. Users can edit it, the prices above all.

Its columns:
    match: a regular expression for the name of the GPU in torch.
    memory_gb: the memory that torch sees, 1 GB = 1e9 bytes.
    tflops: dense bf16 (fp16 before Ampere) with 32-bit accumulation, from NVIDIA's data sheets.
    dollars_per_hour: the approximate price of an instance with one such GPU.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

TABLE_PATH = Path("configs/gpus.csv")  # in the current folder, or in the checkout where the current folder has none
# Compute capabilities: the oldest that CUDA 13 compiles for (T4), and the first one with bf16 (A100).
MIN_CAPABILITY, BF16_CAPABILITY = 7.5, 8.0


@dataclass(frozen=True)
class GpuType:
    """One line of the table; the fields are its columns."""

    name: str
    match: str
    memory_gb: float
    capability: float
    tflops: float
    dollars_per_hour: float


def read_gpu_table(path: Path = TABLE_PATH) -> list[GpuType]:
    """Return all GPU types of the table. Raise UserError for a line that cannot be read."""
    path = path if path.is_file() else Path(__file__).parents[2] / path
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_parse_gpu_type(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, re.error) as error:
        raise UserError(
            f"{path} cannot be read: {error!r}", f"fix it, or `git checkout {path}`", code="gpu.invalid_table"
        ) from error


def _parse_gpu_type(row: dict[str, str]) -> GpuType:
    """Return a line of the table. Raise ValueError, KeyError, TypeError or re.error for a damaged one."""
    pattern = re.compile(row["match"]).pattern
    numbers = (float(row[name]) for name in list(GpuType.__annotations__)[2:])
    return GpuType(row["name"], pattern, *numbers)


def find_gpu(device: str) -> GpuType | None:
    """Return the GPU type of a device by its name in torch, such as NVIDIA H100 80GB HBM3; None when there is none."""
    return next((gpu_type for gpu_type in read_gpu_table() if re.search(rf"\b{gpu_type.match}\b", device)), None)


def find_speed_and_price(device: str) -> tuple[float | None, float | None]:
    """Return FLOP/s and dollars per hour of a device; both are None when the table does not have it."""
    gpu_type = find_gpu(device)
    return (gpu_type.tflops * 1e12, gpu_type.dollars_per_hour) if gpu_type else (None, None)


def find_gpu_fault(capability: float, model_type: str) -> str | None:
    """Return why a GPU of this compute capability cannot train models of `model_type`, or None when it can."""
    if capability < MIN_CAPABILITY:
        return (
            f"compute capability {capability} is too low: CUDA 13, and with it torch, Triton and bitsandbytes, "
            f"need at least {MIN_CAPABILITY} (T4)"
        )
    if capability < BF16_CAPABILITY and model_type.startswith("gemma"):
        return (
            f"compute capability {capability} has no bf16, and Gemma's activations overflow float16 "
            "(its losses become NaN)"
        )
    return None
