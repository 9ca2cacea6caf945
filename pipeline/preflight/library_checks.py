"""Checks of Unsloth, torch, Triton and bitsandbytes: whether they load together, and which attention is in use."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from common.checks import Check
from common.errors import printable_line
from pipeline.preflight import gpu_work
from pipeline.toolchain import machine
from pipeline.toolchain.machine import CommandResult, CommandRunner, NvidiaStatus

LOAD_TIMEOUT = 300  # seconds; it takes 7 with warm caches and no GPU, and minutes from a pod's network disk
VARLEN_CAPABILITY = 8.0  # the lowest compute capability that PyTorch's varlen attention supports
SERIAL_ATTENTION = "SDPA, packed rows one after the other"


def check_libraries(nvidia: NvidiaStatus, tools: Sequence[Check], ask: CommandRunner) -> list[Check]:
    """Run gpu_work.py in a process of its own, which a library may end, and judge its steps.

    Args:
        tools: The checks of what Triton compiles with; their cures apply when Triton fails.
    """
    if not machine.has_torch():
        return []
    if nvidia.state == "hangs":
        reason = "not checked: a program that uses the driver would hang too"
        return [Check("libraries", "lack", reason, "fix the driver (above), then make doctor")]
    answer = ask([sys.executable, "-m", gpu_work.__name__], LOAD_TIMEOUT)
    steps = parse_steps(answer.stdout)
    results: list[Check] = []
    for name, (label, check_step) in STEP_CHECKS.items():
        if name not in steps:  # this step ended the process or hangs, so the later steps are unknown
            return [*results, report_no_answer(label, answer)]
        step = steps[name]
        results.append(report_step_error(label, step["error"], tools) if "error" in step else check_step(step, nvidia))
    return results


def parse_steps(output: str) -> dict[str, dict[str, Any]]:
    """Return the JSON lines of gpu_work.py by step, and skip what libraries print between them."""
    steps = {}
    for line in output.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            step = json.loads(line)
            steps[step["step"]] = step
    return steps


def report_no_answer(label: str, answer: CommandResult) -> Check:
    """Return the fault of the step that printed no line."""
    if answer.state == "hangs":
        cure = f"make doctor again, because a slow disk is cached by now; else {reinstall_command()}"
        return Check(label, "fault", f"no answer within {LOAD_TIMEOUT} s", cure)
    last_line = machine.last_output_line(CommandResult(answer.state, "", answer.stderr))
    return Check(label, "fault", f"it ended the process: {last_line}", reinstall_command())


def report_step_error(label: str, reason: str, tools: Sequence[Check]) -> Check:
    """Return the fault of a step that raised an error. When Triton lacks a tool, the cure is the one of that tool."""
    cure = next((tool.cure for tool in tools if tool.cure and label == "triton"), reinstall_command())
    if "out of memory" in reason:
        cure = "free the GPU's memory (above)"
    return Check(label, "fault", printable_line(reason), cure)


def reinstall_command() -> str:
    """Return the command that installs the locked packages again: one that does not load is changed or incomplete."""
    if "FERRY_IMAGE" in os.environ:
        return "make image"
    if sys.prefix == sys.base_prefix:  # this Python belongs to no virtual environment
        return "make env"
    return f"rm -r {shlex.quote(os.path.relpath(sys.prefix))}, then make env"


def check_unsloth(step: dict[str, Any], nvidia: NvidiaStatus) -> Check:
    """Report Unsloth's version."""
    return Check("unsloth", "ok", f"Unsloth {step['version']} loads together with the libraries below")


def check_torch(step: dict[str, Any], nvidia: NvidiaStatus) -> Check:
    """Check that torch is built for the GPUs of this machine and sees them."""
    text = f"{step['version']}, built for {'CUDA ' + step['cuda'] if step['cuda'] else 'the CPU'}"
    if not nvidia.gpus:
        return Check("torch", "ok", f"{text}, runs on the CPU")
    if not step["cuda"]:
        cure = "unset FERRY_DEVICE, then make env (it installs torch for CUDA where driver and GPUs allow it)"
        return Check("torch", "lack", f"{text}: the GPUs of this machine are not used", cure)
    if step["cards"]:
        return Check("torch", "ok", f"{text}, sees {step['cards']} of {len(nvidia.gpus)} GPUs")
    return report_unseen_gpu(text, step["why"], os.environ.get("CUDA_VISIBLE_DEVICES"))


def report_unseen_gpu(text: str, reason: str, visible_devices: str | None) -> Check:
    """Return the fault that nvidia-smi names a GPU and torch, although built for CUDA, sees none."""
    if visible_devices is not None:
        text = f"{text}, sees no GPU with CUDA_VISIBLE_DEVICES={printable_line(visible_devices)}"
        return Check("torch", "fault", text, "unset CUDA_VISIBLE_DEVICES")
    cure = "fix the driver or the GPU if a line above reports a fault; else reboot, or use a different machine"
    return Check("torch", "fault", f"{text}, sees no GPU: {printable_line(reason)}", cure)


def check_triton(step: dict[str, Any], nvidia: NvidiaStatus) -> Check:
    """Check that Triton compiles a kernel with correct results; on the CPU it is not needed."""
    text = f"Triton {step['version']}" if step["version"] else "not installed"
    if "right" not in step:
        return Check("triton", "ok", f"{text}, not needed on the CPU")
    if step["right"]:
        return Check("triton", "ok", f"{text} compiled a kernel of Unsloth, and the GPU computed it correctly")
    return Check("triton", "fault", f"{text}: a kernel of Unsloth gives wrong values", reinstall_command())


def check_bitsandbytes(step: dict[str, Any], nvidia: NvidiaStatus) -> Check:
    """Check that bitsandbytes quantizes to 4 bit with correct results."""
    text = f"bitsandbytes {step['version']}, nf4 and back on the {'GPU' if step['device'] == gpu_work.CUDA else 'CPU'}"
    if step["right"]:
        return Check("4-bit", "ok", text)
    return Check("4-bit", "fault", f"{text}: wrong values", reinstall_command())


def check_attention(step: dict[str, Any], nvidia: NvidiaStatus) -> Check:
    """Check which attention Unsloth uses for packed rows.

    Its order is FlashAttention; PyTorch's varlen (torch 2.12, compute capability from 8.0); xFormers; SDPA.
    """
    if step["chosen"] in BACKEND_DESCRIPTIONS:
        return Check("attention", "ok", BACKEND_DESCRIPTIONS[step["chosen"]])
    if step["capability"] is None:
        return Check("attention", "ok", f"{SERIAL_ATTENTION}: Unsloth has no alternative on the CPU")
    if step["capability"] < VARLEN_CAPABILITY:
        text = f"{SERIAL_ATTENTION}: PyTorch's varlen needs compute capability {VARLEN_CAPABILITY}"
        return Check("attention", "ok", text)
    if step["loaded"]:
        return Check("attention", "ok", f"PyTorch's own varlen for packed rows (torch {step['torch']})")
    return report_serial_attention(step)


def report_serial_attention(step: dict[str, Any]) -> Check:
    """Return the lack of PyTorch's varlen on a GPU that supports it."""
    if step["varlen"]:
        cure = f"unset UNSLOTH_TORCH_VARLEN; if it is not set: {reinstall_command()}"
        return Check("attention", "lack", f"{SERIAL_ATTENTION}: Unsloth does not use this torch's varlen", cure)
    text = f"{SERIAL_ATTENTION}: the varlen of torch {step['torch']} has no enable_gqa (from 2.12 on)"
    return Check("attention", "lack", text, reinstall_command())


BACKEND_DESCRIPTIONS = {
    "flash_varlen": "FlashAttention, which Unsloth prefers",
    "xformers": "xFormers, which Unsloth uses where PyTorch's varlen does not support this torch or GPU",
}
STEP_CHECKS: dict[str, tuple[str, Callable[[dict[str, Any], NvidiaStatus], Check]]] = {
    "unsloth": ("unsloth", check_unsloth),
    "torch": ("torch", check_torch),
    "triton": ("triton", check_triton),
    "bitsandbytes": ("4-bit", check_bitsandbytes),
    "attention": ("attention", check_attention),
}
