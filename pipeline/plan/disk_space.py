"""Estimate the disk space that a run needs until it is complete, by part, in bytes."""

from pipeline.config.schema import Config, Finetune
from pipeline.plan.memory_need import ModelShape, moment_bytes
from pipeline.toolchain import llama_tools

# Checkpoints on the disk at the same time: the older one is removed when the newest is complete, or it is the best one.
CHECKPOINTS_AT_ONCE = 2


def artifact_bytes(config: Config, weight_bytes: float) -> dict[str, float]:
    """Return bytes by part, without checkpoints. `weight_bytes`: size of the base model's 16-bit weights."""
    copies = 2 if config.export.imatrix else 1  # with and without the importance matrix, so that both can be compared
    quantized_bytes = sum(quantization_bytes(config, weight_bytes)) * copies
    unquantized_parts = ("base", "merged weights", "16-bit GGUF")
    return dict.fromkeys(unquantized_parts, weight_bytes) | {"quantized": quantized_bytes}


def quantization_bytes(config: Config, weight_bytes: float) -> list[float]:
    """Return the bytes of each configured quantization."""
    return [
        llama_tools.BITS_PER_WEIGHT[quantization] / 16 * weight_bytes for quantization in config.export.quantizations
    ]


def checkpoint_bytes(shape: ModelShape, tune: Finetune) -> float:
    """Return the bytes of all checkpoints that are on the disk at the same time.

    A checkpoint has the adapter in 32 bit and the optimizer's moments. With evaluation the newest and the best one are
    there, and one more while it is written.
    """
    count = CHECKPOINTS_AT_ONCE + (tune.eval_strategy != "no")
    return count * shape.lora_parameters(tune) * (4 + moment_bytes(tune))
