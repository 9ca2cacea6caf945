"""Do Unsloth, torch, Triton and bitsandbytes load together, and compute here? `python -m pipeline.preflight.gpu_work`

A line of JSON a step, as soon as it is known: a library may end the process, and the step that has no line did it.
"""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable

CUDA, CPU = "cuda", "cpu"


def unsloth() -> dict:
    """First: it changes the others, and wants to be imported before them."""
    from pipeline.toolchain import unsloth_loader

    return {"version": unsloth_loader.start().__version__}


def torch() -> dict:
    """Which build, and the cards it sees. why: what it says when it was made for CUDA and sees none."""
    import torch

    found = {"version": torch.__version__, "cuda": torch.version.cuda, "cards": torch.cuda.device_count(), "why": ""}
    if torch.version.cuda:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            found |= {"cards": 0, "why": str(error)}
    return found


def triton() -> dict:
    """A kernel of Unsloth's, compiled now: that takes a C compiler, Python.h and the driver. Without a card only its version."""
    if not importlib.util.find_spec("triton"):
        return {"version": None}
    found = {"version": importlib.metadata.version("triton")}
    if device() == CPU:
        return found
    import torch
    from unsloth.kernels.swiglu import swiglu_fg_kernel

    e = torch.linspace(-4, 4, 512, device=CUDA, dtype=torch.float16).reshape(1, 8, 64)
    right = torch.allclose(swiglu_fg_kernel(e, e), torch.nn.functional.silu(e) * e, atol=0.05)
    return found | {"right": right}


def bitsandbytes() -> dict:
    """A row to nf4 and back: its 16 values lie at most 0.304 apart, so a value moves by at most 0.152."""
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    row = torch.linspace(-1, 1, 256, device=device(), dtype=torch.float16 if device() == CUDA else torch.float32)
    back = dequantize_4bit(*quantize_4bit(row, quant_type="nf4"), quant_type="nf4")
    return {"version": bitsandbytes.__version__, "right": bool((back - row).abs().max() < 0.16), "device": device()}


def attention() -> dict:
    """What Unsloth chose for packed rows when it was imported. varlen: has this torch what Unsloth wants of it?"""
    import torch
    from torch.nn.attention import varlen

    has = {"window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys()
    found = {"torch": torch.__version__, "varlen": has, "loaded": False, "chosen": "sdpa", "capability": None}
    dispatch = sys.modules.get("unsloth.utils.attention_dispatch")
    if dispatch and torch.cuda.is_available():  # on the CPU Unsloth loads no such thing
        found["capability"] = float("{}.{}".format(*torch.cuda.get_device_capability()))
        found["loaded"] = dispatch._TORCH_VARLEN_ATTN is not None
        found["chosen"] = dispatch.select_attention_backend(use_varlen=True)
    return found


def device() -> str:
    import torch

    return CUDA if torch.cuda.is_available() else CPU


STEPS: dict[str, Callable[[], dict]] = {
    "unsloth": unsloth, "torch": torch, "triton": triton, "bitsandbytes": bitsandbytes, "attention": attention,
}  # fmt: skip


def main() -> None:
    """All steps; one that fails does not hinder the next."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries have banners
        for name, step in STEPS.items():
            try:
                found = step()
            except Exception as error:  # noqa: BLE001  any of theirs: it is the answer
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps({"step": name, **found}), file=out, flush=True)


if __name__ == "__main__":
    main()
