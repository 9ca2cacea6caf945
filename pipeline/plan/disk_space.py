"""Estimate the disk space that a run needs until it is complete, by part, in bytes."""

from pipeline.config.schema import Config, Finetune
from pipeline.plan.memory_need import Shape, moments
from pipeline.toolchain import llama_tools

# Checkpoints on the disk at the same time: the older one is removed when the newest is complete, or it is the best one.
EACH = 2


def parts(config: Config, sixteen: float) -> dict[str, float]:
    """Return bytes by part, without checkpoints. `weight_bytes`: size of the base model's 16-bit weights."""
    quants = sum(quantized(config, sixteen))
    return {
        "base": sixteen,
        "merged weights": sixteen,
        "16-bit GGUF": sixteen,
        # made with and without the importance matrix, so that both can be compared
        "quantized": quants * (2 if config.export.imatrix else 1),
    }


def quantized(config: Config, sixteen: float) -> list[float]:
    """Return the bytes of each configured quantization."""
    return [llama_tools.BITS[kind] / 16 * sixteen for kind in config.export.quantizations]


def checkpoints(model: Shape, tune: Finetune) -> float:
    """Return the bytes of all checkpoints that are on the disk at the same time.

    A checkpoint has the adapter in 32 bit and the optimizer's moments. With evaluation the newest and the best one are
    there, and one more while it is written.
    """
    kept = EACH + (tune.eval_strategy != "no")
    return kept * model.lora(tune) * (4 + moments(tune))
