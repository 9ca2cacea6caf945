"""Estimate the peak GPU memory of a LoRA training from the model's shape, by part, in bytes.

The constants were fitted on an H100 (Llama-3.1-8B shape and others, nf4 and 16 bit, torch 2.11). The errors on settings
that they were not fitted on are in benchmarks/results/gpu.md. Unsloth's fused loss never holds all logits in memory, so
there is no part for them.
"""

from dataclasses import dataclass
from typing import Literal

from common import gguf_reader
from pipeline.config.schema import LINEAR_LAYERS, Base, Finetune

# Bytes of a weight: four bits, an 8-bit scale for every 64 weights, and a 32-bit scale for every 256 of these scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
WORKSPACE_BYTES = 0.30e9  # of the matrix multiplications, and what the allocator cannot use
CUDA_CONTEXT_BYTES = 0.7e9  # memory of CUDA itself, which torch does not count


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, from its config.json.

    `query_size` and `key_size` are the widths of all query heads and of all key heads together. Input and output
    embeddings are one matrix when `tied`, else two.
    """

    layers: int
    hidden: int
    query_size: int
    key_size: int
    intermediate: int
    heads: int
    vocab: int
    tied: bool

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """Return the seven matrices of a layer, {name: (inputs, outputs)}."""
        d, i = self.hidden, self.intermediate
        sizes = (
            (d, self.query_size),
            (d, self.key_size),
            (d, self.key_size),
            (self.query_size, d),
            (d, i),
            (d, i),
            (i, d),
        )
        return dict(zip(LINEAR_LAYERS, sizes, strict=True))

    @property
    def matrix_weights(self) -> int:
        """Return the number of weights in the matrices of all layers."""
        return self.layers * sum(a * b for a, b in self.layer_matrices.values())

    @property
    def embedding_weights(self) -> int:
        """Return the number of weights in the embeddings."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights in 16 bit."""
        return 2 * (self.matrix_weights + self.embedding_weights)

    def flops_per_token(self) -> float:
        """Return the FLOPs to train on one token, forward and backward.

        The weights are frozen and get no gradients, so it is 4 FLOPs for each weight and not 6.
        """
        return 4.0 * (self.matrix_weights + self.vocab * self.hidden)

    def lora_parameters(self, tune: Finetune) -> int:
        """Return the number of trainable parameters on the usual seven matrices; other targets are not counted."""
        return self.layers * sum(
            tune.r * sum(self.layer_matrices[name]) for name in tune.target_modules if name in self.layer_matrices
        )


def shape_from_config(config: dict) -> ModelShape | None:
    """Return the shape in a config.json; None for models other than plain decoders (experts, state spaces, vision)."""
    text_config = config.get("text_config", config)
    if any("expert" in key or "mamba" in key or key.startswith("ssm") for key in text_config):
        return None
    try:
        heads, hidden = text_config["num_attention_heads"], text_config["hidden_size"]
        head_size = text_config.get("head_dim") or hidden // heads
        return ModelShape(
            text_config["num_hidden_layers"],
            hidden,
            heads * head_size,
            (text_config.get("num_key_value_heads") or heads) * head_size,
            text_config["intermediate_size"],
            heads,
            text_config["vocab_size"],
            has_tied_embeddings(config, text_config),
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def has_tied_embeddings(config: dict, text_config: dict) -> bool:
    """Return whether input and output embeddings are one matrix.

    A config.json leaves out values that are the default of its class, and for Gemma that default is true.
    """
    for section in (text_config, config):
        if "tie_word_embeddings" in section:
            return bool(section["tie_word_embeddings"])
    try:
        from transformers import CONFIG_MAPPING

        return bool(CONFIG_MAPPING[text_config.get("model_type") or config["model_type"]]().tie_word_embeddings)
    except (ImportError, KeyError, TypeError, ValueError):
        return False


def shape_from_gguf(header: gguf_reader.Header) -> ModelShape | None:
    """Return the shape in the header of a GGUF; None for models other than plain decoders."""
    architecture = header.metadata.get(gguf_reader.ARCHITECTURE_KEY)

    def read_size(key: str) -> int | None:
        value = header.metadata.get(f"{architecture}.{key}")
        return value if type(value) is int and value > 0 else None

    if read_size("expert_count"):
        return None
    return shape_from_config(
        {
            "num_hidden_layers": read_size("block_count"),
            "hidden_size": read_size("embedding_length"),
            "intermediate_size": read_size("feed_forward_length"),
            "num_attention_heads": read_size("attention.head_count"),
            "num_key_value_heads": read_size("attention.head_count_kv"),
            "head_dim": read_size("attention.key_length"),
            "vocab_size": len(header.metadata.get("tokenizer.ggml.tokens", ())),
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
        }
    )


CheckpointingPolicy = Literal["unsloth", True, False]


def memory_parts(
    shape: ModelShape, base: Base, tune: Finetune, tokens: int, checkpointing: CheckpointingPolicy, packed: bool = True
) -> dict[str, float]:
    """Return the peak bytes by part, for micro-batches of at most `tokens` tokens, padding included."""
    lora_parameters = shape.lora_parameters(tune)
    weights = (
        NF4_BYTES * shape.matrix_weights + 2 * shape.embedding_weights if base.load_in_4bit else shape.weight_bytes
    )
    return {
        "weights": weights,
        "LoRA and its gradients": 8.0 * lora_parameters,
        "optimizer": moment_bytes(tune) * lora_parameters,
        "activations": float(activation_bytes(shape, tokens, checkpointing, packed)),
        "workspace": WORKSPACE_BYTES,
    }


def moment_bytes(tune: Finetune) -> float:
    """Return the bytes of the optimizer's two moments for each trainable parameter."""
    return 2.03 if "8bit" in tune.optim else 8.0


def activation_bytes(shape: ModelShape, tokens: int, checkpointing: CheckpointingPolicy, packed: bool = True) -> float:
    """Return the bytes that the backward pass needs.

    These are the activations of every layer, or with checkpointing those of one layer and the inputs of the others.
    """
    d, i = shape.hidden, shape.intermediate
    layer = (
        2 * (4 * d + 2 * shape.query_size + 2 * shape.key_size + 2 * i)
        + 4 * shape.heads
        + (0 if packed else 2.3 * shape.query_size)
    )
    if not checkpointing:
        return tokens * (shape.layers * layer + 7 * d)
    inputs = 2 * d * shape.layers if checkpointing is True else 8 * d  # "unsloth" keeps them in main memory
    return tokens * (inputs + layer + 2 * i + 2 * d)


def peak_bytes(
    shape: ModelShape, base: Base, tune: Finetune, tokens: int, checkpointing: CheckpointingPolicy, packed: bool = True
) -> float:
    """Return the peak bytes of a training, as torch.cuda.max_memory_allocated counts them."""
    return sum(memory_parts(shape, base, tune, tokens, checkpointing, packed).values())
