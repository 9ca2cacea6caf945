"""Load Unsloth, torch, Triton and bitsandbytes together and compute: `python -m pipeline.preflight.gpu_work`.

It prints a line of JSON after each step. A library may end the process; the first step without a line is the cause.
"""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

CUDA, CPU = "cuda", "cpu"


def load_unsloth() -> dict[str, Any]:
    """Import Unsloth. It has to be imported before the other libraries, because it changes them."""
    from pipeline.toolchain import unsloth_loader

    return {"version": unsloth_loader.import_unsloth().__version__}


def inspect_torch() -> dict[str, Any]:
    """Return torch's build and the number of GPUs it sees; `why` is its error when a CUDA build sees none."""
    import torch

    error = start_cuda() if torch.version.cuda else None
    gpu_count = torch.cuda.device_count() if error is None else 0
    return {"version": torch.__version__, "cuda": torch.version.cuda, "cards": gpu_count, "why": error or ""}


def start_cuda() -> str | None:
    """Start CUDA in this process and return its error, if there is one."""
    import torch

    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error)
    return None


def run_triton_kernel() -> dict[str, Any]:
    """Compile a kernel of Unsloth and compare its result with torch's; without a GPU only return Triton's version."""
    if not importlib.util.find_spec("triton"):
        return {"version": None}
    facts: dict[str, Any] = {"version": importlib.metadata.version("triton")}
    return facts if compute_device() == CPU else facts | {"right": has_right_kernel()}


def has_right_kernel() -> bool:
    """Return whether a kernel of Unsloth gives what torch gives. It takes a C compiler, Python.h and the driver."""
    import torch
    from unsloth.kernels.swiglu import swiglu_fg_kernel

    inputs = torch.linspace(-4, 4, 512, device=CUDA, dtype=torch.float16).reshape(1, 8, 64)
    return torch.allclose(swiglu_fg_kernel(inputs, inputs), torch.nn.functional.silu(inputs) * inputs, atol=0.05)


def run_nf4_round_trip() -> dict[str, Any]:
    """Quantize a row to nf4 and back, and compare.

    The 16 values of nf4 lie at most 0.304 apart, so a value moves by at most 0.152.
    """
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = compute_device()
    dtype = torch.float16 if device == CUDA else torch.float32
    row = torch.linspace(-1, 1, 256, device=device, dtype=dtype)
    restored = dequantize_4bit(*quantize_4bit(row, quant_type="nf4"), quant_type="nf4")
    is_right = bool((restored - row).abs().max() < 0.16)
    return {"version": bitsandbytes.__version__, "right": is_right, "device": device}


def inspect_attention() -> dict[str, Any]:
    """Return which attention Unsloth chose for packed rows when it was imported.

    `varlen` tells whether this torch's varlen attention has the parameters that Unsloth needs.
    """
    import torch
    from torch.nn.attention import varlen

    has_varlen = {"window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys()
    facts = {"torch": torch.__version__, "varlen": has_varlen, "loaded": False, "chosen": "sdpa", "capability": None}
    dispatch = sys.modules.get("unsloth.utils.attention_dispatch")
    if dispatch and torch.cuda.is_available():  # on the CPU Unsloth does not load it
        facts["capability"] = float("{}.{}".format(*torch.cuda.get_device_capability()))
        facts["loaded"] = dispatch._TORCH_VARLEN_ATTN is not None
        facts["chosen"] = dispatch.select_attention_backend(use_varlen=True)
    return facts


def compute_device() -> str:
    """Return the device that the steps compute on."""
    import torch

    return CUDA if torch.cuda.is_available() else CPU


STEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "unsloth": load_unsloth,
    "torch": inspect_torch,
    "triton": run_triton_kernel,
    "bitsandbytes": run_nf4_round_trip,
    "attention": inspect_attention,
}


def main() -> None:
    """Run all steps and print their results. When a step fails, its line holds the error and the next step runs."""
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries print banners
        for name, step in STEPS.items():
            print(json.dumps({"step": name, **run_step(step)}), file=output, flush=True)


def run_step(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a step, or its error."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001  any error of a library is the result of its step
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
