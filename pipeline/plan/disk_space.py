"""Disk that a run needs to its end, by part. Bytes."""

from pipeline.config.schema import Config, Finetune
from pipeline.plan.memory_need import Shape, moments
from pipeline.toolchain import llama_tools

EACH = 2  # checkpoints at once: the newest is whole before the older one goes, or it is the best one


def parts(config: Config, sixteen: float) -> dict[str, float]:
    """Without checkpoints. sixteen: of the base's 16-bit weights."""
    quants = sum(quantized(config, sixteen))
    return {
        "base": sixteen, "merged weights": sixteen, "16-bit GGUF": sixteen,
        "quantized": quants * (2 if config.export.imatrix else 1),  # with the matrix and without, to be compared
    }  # fmt: skip


def quantized(config: Config, sixteen: float) -> list[float]:
    """Of each quantization."""
    return [llama_tools.BITS[kind] / 16 * sixteen for kind in config.export.quantizations]


def checkpoints(model: Shape, tune: Finetune) -> float:
    """Adapter in 32 bit and the optimizer's moments; one more of them than the best and the newest, while it is written."""
    kept = EACH + (tune.eval_strategy != "no")
    return kept * model.lora(tune) * (4 + moments(tune))
