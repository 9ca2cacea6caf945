"""Checks of Unsloth, torch, Triton and bitsandbytes: whether they load together, and which attention is in use."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from common.checks import Check
from common.errors import shown
from pipeline.preflight import gpu_work
from pipeline.toolchain import machine
from pipeline.toolchain.machine import Ask, Nvidia, Said

LOADING = 300  # seconds; it takes 7 with warm caches and no GPU, and minutes from a pod's network disk
VARLEN = 8.0  # the lowest compute capability that PyTorch's varlen attention supports
SERIAL = "SDPA, packed rows one after the other"


def checks(found: Nvidia, tools: Sequence[Check], ask: Ask) -> list[Check]:
    """Run gpu_work.py in a process of its own, which a library may end, and judge its steps.

    Args:
        tools: The checks of what Triton compiles with; their cures apply when Triton fails.
    """
    if not machine.is_set_up():
        return []
    if found.state == "hangs":
        why = "not asked: what asks the driver would hang, too"
        return [Check("libraries", "lack", why, "mend the driver (above), then make doctor")]
    said = ask([sys.executable, "-m", gpu_work.__name__], LOADING)
    steps, judged = told(said.out), []
    for name, (label, judge) in JUDGES.items():
        if name not in steps:  # this step ended the process or hangs, so the later steps are unknown
            return [*judged, silent(label, said)]
        judged.append(
            failed(label, steps[name]["error"], tools) if "error" in steps[name] else judge(steps[name], found)
        )
    return judged


def told(out: str) -> dict[str, dict]:
    """Return the JSON lines of gpu_work.py by step, and skip what libraries print between them."""
    steps = {}
    for line in out.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            step = json.loads(line)
            steps[step["step"]] = step
    return steps


def silent(label: str, said: Said) -> Check:
    """Return the fault of the step that printed no line."""
    if said.state == "hangs":
        cure = f"make doctor once more, a slow disk has been read by now; else {anew()}"
        return Check(label, "fault", f"no answer within {LOADING} s", cure)
    return Check(label, "fault", f"it ended the process: {machine.last(Said(said.state, '', said.err))}", anew())


def failed(label: str, why: str, tools: Sequence[Check]) -> Check:
    """Return the fault of a step that raised an error. When Triton lacks a tool, the cure is the one of that tool."""
    cure = next((tool.cure for tool in tools if tool.cure and label == "triton"), anew())
    return Check(label, "fault", shown(why), "free the card's memory (above)" if "out of memory" in why else cure)


def anew() -> str:
    """Return the command that installs the locked packages again.

    The locks are tested together, so a package that does not load was changed or is incomplete.
    """
    if "FERRY_IMAGE" in os.environ:
        return "make image"
    if sys.prefix == sys.base_prefix:  # this Python belongs to no virtual environment
        return "make env"
    return f"rm -r {shlex.quote(os.path.relpath(sys.prefix))}, then make env"


def unsloth(step: dict, found: Nvidia) -> Check:
    """Report Unsloth's version."""
    return Check("unsloth", "ok", f"Unsloth {step['version']} loads together with those below")


def torch(step: dict, found: Nvidia) -> Check:
    """Check that torch is built for the GPUs of this machine and sees them."""
    text = f"{step['version']}, made for {'CUDA ' + step['cuda'] if step['cuda'] else 'the CPU'}"
    if not found.cards:
        return Check("torch", "ok", f"{text}, computes on the CPU")
    if not step["cuda"]:
        cure = "unset FERRY_DEVICE, then make env (it takes torch for CUDA where driver and cards allow it)"
        return Check("torch", "lack", f"{text}: the cards here are not used", cure)
    if step["cards"]:
        return Check("torch", "ok", f"{text}, sees {step['cards']} of {len(found.cards)} cards")
    return unseen(text, step["why"], os.environ.get("CUDA_VISIBLE_DEVICES"))


def unseen(text: str, why: str, visible: str | None) -> Check:
    """Return the fault that nvidia-smi names a GPU and torch, although built for CUDA, sees none."""
    if visible is not None:
        text, cure = f"{text}, sees no card with CUDA_VISIBLE_DEVICES={shown(visible)}", "unset CUDA_VISIBLE_DEVICES"
        return Check("torch", "fault", text, cure)
    cure = "mend the driver or the card where a line above says so; else reboot, or take another machine"
    return Check("torch", "fault", f"{text}, sees no card: {shown(why)}", cure)


def triton(step: dict, found: Nvidia) -> Check:
    """Check that Triton compiles a kernel with correct results; on the CPU it is not needed."""
    text = f"Triton {step['version']}" if step["version"] else "not here"
    if "right" not in step:
        return Check("triton", "ok", f"{text}, not needed on the CPU")
    if step["right"]:
        return Check("triton", "ok", f"{text} compiled a kernel of Unsloth's, and the card computed it right")
    return Check("triton", "fault", f"{text}: a kernel of Unsloth's gives wrong values", anew())


def bitsandbytes(step: dict, found: Nvidia) -> Check:
    """Check that bitsandbytes quantizes to 4 bit with correct results."""
    text = f"bitsandbytes {step['version']}, nf4 and back on the {'card' if step['device'] == gpu_work.CUDA else 'CPU'}"
    if step["right"]:
        return Check("4-bit", "ok", text)
    return Check("4-bit", "fault", f"{text}: wrong values", anew())


def attention(step: dict, found: Nvidia) -> Check:
    """Check which attention Unsloth uses for packed rows.

    Its order is FlashAttention; PyTorch's varlen (torch 2.12, compute capability from 8.0); xFormers; SDPA.
    """
    if step["chosen"] in CHOSEN:
        return Check("attention", "ok", CHOSEN[step["chosen"]])
    if step["capability"] is None:
        return Check("attention", "ok", f"{SERIAL}: Unsloth has no other on the CPU")
    if step["capability"] < VARLEN:
        return Check("attention", "ok", f"{SERIAL}: PyTorch's varlen is for cards from {VARLEN}")
    if step["loaded"]:
        return Check("attention", "ok", f"PyTorch's own varlen for packed rows (torch {step['torch']})")
    if step["varlen"]:
        cure = f"unset UNSLOTH_TORCH_VARLEN; where it is not set: {anew()}"
        return Check("attention", "lack", f"{SERIAL}: Unsloth does not take this torch's varlen", cure)
    return Check(
        "attention", "lack", f"{SERIAL}: the varlen of torch {step['torch']} has no enable_gqa (from 2.12 on)", anew()
    )


CHOSEN = {
    "flash_varlen": "FlashAttention, which Unsloth takes before all others",
    "xformers": "xFormers, which Unsloth takes where PyTorch's varlen is not for this torch or card",
}
JUDGES: dict[str, tuple[str, Callable[[dict, Nvidia], Check]]] = {
    "unsloth": ("unsloth", unsloth),
    "torch": ("torch", torch),
    "triton": ("triton", triton),
    "bitsandbytes": ("4-bit", bitsandbytes),
    "attention": ("attention", attention),
}
