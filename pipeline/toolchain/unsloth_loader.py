"""Load models with Unsloth, as all torch stages do: quietly, and without telemetry."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from common import files
from common.errors import UserError
from pipeline.config.schema import Base

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# By default the libraries send statistics and flood the terminal. These are set before the first import.
QUIET_ENVIRONMENT = {
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


# Loggers that warn about kernels which a CPU does not have.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "bitsandbytes", "kernels")


# Kernels that are compiled for a GPU are kept between runs, and not in /tmp, which a container loses.
COMPILE_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def silence_libraries() -> None:
    """Turn off telemetry and most log messages. Call this before transformers is imported."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def import_unsloth() -> ModuleType:
    """Import Unsloth (7-9 s), with its banner on stderr, and return it; transformers must not be imported before."""
    silence_libraries()
    for name, folder in COMPILE_CACHES.items():
        os.environ.setdefault(name, str(files.cache_dir() / "compiled" / folder))
    with contextlib.redirect_stdout(sys.stderr):
        import unsloth
    return unsloth


def load_model(folder: Path, base: Base) -> tuple["PreTrainedModel | PeftModel", "PreTrainedTokenizerFast"]:
    """Load a model folder, or an adapter folder together with its base model, for training or inference.

    Raises:
        UserError: The config asks for QLoRA, and torch sees no GPU.
    """
    unsloth = import_unsloth()
    import torch

    if base.load_in_4bit and not torch.cuda.is_available():
        raise UserError(
            "base.load_in_4bit is QLoRA, which needs an NVIDIA GPU, and torch sees none",
            'run on a machine with a GPU, or train 16-bit LoRA here: SET="base.load_in_4bit=false" with a new RUN=name',
            code="environment.no_gpu",
        )
    with contextlib.redirect_stdout(sys.stderr):
        return unsloth.FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=base.max_seq_length,
            load_in_4bit=base.load_in_4bit,
            use_gradient_checkpointing=False,
        )


def gpu_memory_bytes() -> float | None:
    """Return the memory of the first GPU in bytes; None where torch sees no GPU."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def gpu_capability() -> float | None:
    """Return the compute capability of the GPU, such as 9.0; None where torch sees no GPU."""
    import torch

    return float("{}.{}".format(*torch.cuda.get_device_capability())) if torch.cuda.is_available() else None


def describe_device() -> str:
    """Return the name of the GPU, or the CPU with its number of threads."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def peak_memory_gb() -> float:
    """Return the peak memory of this process in GB (1e9 bytes): GPU memory if there is a GPU, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return round(peak_resident_bytes() / 1e9, 2)


def peak_resident_bytes() -> int:
    """Return the peak of this process's resident memory in bytes; only macOS reports it in bytes, Linux in KiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak_memory() -> None:
    """Measure the peak of GPU memory from now on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
