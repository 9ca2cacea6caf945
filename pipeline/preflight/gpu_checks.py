"""Checks of the NVIDIA driver and the GPUs: whether the locked torch can use them, and whether they are free."""

import re
from pathlib import Path

from common.checks import Check
from common.errors import UserError, printable_line
from pipeline.plan import gpu_table
from pipeline.toolchain import machine
from pipeline.toolchain.machine import Gpu, NvidiaStatus, TrainLocation, format_gb

CUDA, DRIVER = (13, 0), 580  # what the locked torch needs, as in setup/packages.py
IDLE_BYTES = 1 << 30  # bytes of GPU memory that a desktop or the driver itself may use
TORCH_CUDA = f"torch is built for CUDA {CUDA[0]}.{CUDA[1]}"
INSTALL_DRIVER = f"sudo apt-get install nvidia-driver-{DRIVER}-server (its name on Ubuntu), then reboot"
RENT_NEWER_DRIVER = f"rent a machine with driver {DRIVER} or newer: a container uses the driver of its host"
EXPOSE_GPUS = "start the container with its GPUs (docker run --gpus all), or rent a machine that has one"


def check_gpus(nvidia: NvidiaStatus, run_location: TrainLocation) -> list[Check]:
    """Check the driver, then for each GPU its type, its memory and its price."""
    checks = [check_driver(nvidia, run_location)]
    for gpu in nvidia.gpus:
        checks += [check_gpu_type(gpu), check_gpu_memory(gpu, nvidia), check_gpu_price(gpu)]
    return checks


def check_driver(nvidia: NvidiaStatus, run_location: TrainLocation) -> Check:
    """Check that the NVIDIA driver answers, names a GPU and is new enough for the locked torch."""
    if nvidia.state == "absent":
        return report_no_driver(run_location)
    if is_driver_too_old(nvidia):
        text = f"{nvidia.driver or 'the driver'} {format_cuda(nvidia)} at most; {TORCH_CUDA} (driver {DRIVER} or newer)"
        return Check("driver", "fault", text, RENT_NEWER_DRIVER if run_location.is_container else INSTALL_DRIVER)
    if not nvidia.gpus:
        return report_no_gpu(nvidia, run_location)
    return Check("driver", "ok", f"{nvidia.driver} {format_cuda(nvidia)}; {TORCH_CUDA}")


def report_no_driver(run_location: TrainLocation) -> Check:
    """Return the lack of a driver, without which there is no GPU."""
    text = "no nvidia-smi, so no NVIDIA GPU: `make demo` works, training a model of your own needs one"
    cure = f"if there is a GPU: {INSTALL_DRIVER}; else rent a machine that has one"
    return Check("driver", "lack", text, EXPOSE_GPUS if run_location.is_container else cure)


def report_no_gpu(nvidia: NvidiaStatus, run_location: TrainLocation) -> Check:
    """Return the fault of a driver that names no GPU."""
    text = f"nvidia-smi fails: {nvidia.error_line or 'it lists no GPU'}"
    if nvidia.state == "hangs":
        text = f"nvidia-smi did not answer within {machine.COMMAND_TIMEOUT} s"
    cure = EXPOSE_GPUS if run_location.is_container else f"reboot; if that does not help: {INSTALL_DRIVER}"
    return Check("driver", "fault", text, cure)


def is_driver_too_old(nvidia: NvidiaStatus) -> bool:
    """Return whether the driver is too old for the locked torch.

    The CUDA version that it runs decides, because NVIDIA's compatibility packages raise that. A driver that does not
    state it is judged by its own version number.
    """
    major = nvidia.driver.partition(".")[0]
    return nvidia.cuda < CUDA if nvidia.cuda else major.isdecimal() and int(major) < DRIVER


def format_cuda(nvidia: NvidiaStatus) -> str:
    """Return which CUDA the driver runs, for messages."""
    return "runs CUDA {}.{}".format(*nvidia.cuda) if nvidia.cuda else "runs an unknown version of CUDA"


def check_gpu_type(gpu: Gpu) -> Check:
    """Check the compute capability of a GPU, and whether it computes in bf16."""
    name, model = f"GPU {gpu.index}", printable_line(gpu.name, 80)
    if reason := gpu_table.find_gpu_fault(gpu.capability, ""):
        cure = f"use a machine with a newer GPU; {gpu_table.TABLE_PATH} has a list"
        return Check(name, "fault", f"{model}, {reason}", cure)
    note = "bf16"
    if gpu.capability < gpu_table.BF16_CAPABILITY:
        note = "no bf16, so fp16. Gemma models are refused, because their activations overflow float16"
    return Check(name, "ok", f"{model}, compute capability {gpu.capability}: {note}")


def check_gpu_memory(gpu: Gpu, nvidia: NvidiaStatus) -> Check:
    """Check that no other process uses the GPU: it would take memory and computing time."""
    name, text = f"memory {gpu.index}", f"{format_gb(gpu.free_bytes)} of {format_gb(gpu.total_bytes)} free"
    if is_idle(gpu):
        return Check(name, "ok", text)
    cure = f"wait for it, or stop it if it is yours; or {find_idle_gpu(nvidia)}"
    return Check(name, "lack", f"{text}: {describe_users(gpu)}", cure)


def describe_users(gpu: Gpu) -> str:
    """Return which processes use a GPU, and how much of its memory."""
    users = [
        f"{printable_line(Path(user.name).name, 40)} (process {user.pid}) uses {format_gb(user.memory_bytes)}"
        for user in gpu.processes
    ]
    unseen = f"{format_gb(gpu.used_bytes)} are used by processes that are not visible here (in another container?)"
    return ", ".join(users) or unseen


def find_idle_gpu(nvidia: NvidiaStatus) -> str:
    """Return how to use a GPU that is idle and can train."""
    usable_gpus = [gpu for gpu in nvidia.gpus if is_idle(gpu) and gpu.capability >= gpu_table.MIN_CAPABILITY]
    if not usable_gpus:
        return "use a different machine"
    return f"use a different GPU: CUDA_VISIBLE_DEVICES={usable_gpus[0].index}"


def is_idle(gpu: Gpu) -> bool:
    """Return whether no process uses the GPU, as far as the driver reports."""
    return not gpu.processes and (gpu.used_bytes or 0) < IDLE_BYTES


def check_gpu_price(gpu: Gpu) -> Check:
    """Check that the GPU is in the table, which only serves to report a run's price and share of the GPU's speed."""
    name = f"price {gpu.index}"
    try:
        row = gpu_table.find_gpu(gpu.name)
    except UserError as error:
        return Check(name, "lack", error.message, error.hint, error.code)
    if row:
        return Check(name, "ok", f"about {row.dollars_per_hour:.2f} $ an hour ({row.name} in {gpu_table.TABLE_PATH})")
    unknown = f"{printable_line(gpu.name, 80)} is not in {gpu_table.TABLE_PATH}"
    text = f"{unknown}: a run's price and share of its speed are not reported"
    return Check(name, "lack", text, f"add a line: {gpu_table_line(gpu)}")


def gpu_table_line(gpu: Gpu) -> str:
    """Return a line for the GPU table with what the driver reports. Its field `match` is a regular expression."""
    name_pattern = re.sub(r"[^\w .-]", ".", re.sub(r"^(NVIDIA|Tesla)( GeForce)? ", "", printable_line(gpu.name, 80)))
    return f"{name_pattern},{name_pattern},{(gpu.total_bytes or 0) / 1e9:.1f},{gpu.capability},TFLOPS in bf16,$ an hour"
