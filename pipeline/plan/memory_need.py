"""Estimate the peak GPU memory of a LoRA training from the model's shape, by part, in bytes.

The constants were fitted on an H100 (Llama-3.1-8B shape and others, nf4 and 16 bit, torch 2.11). The errors on settings
that they were not fitted on are in benchmarks/results/gpu.md. Unsloth's fused loss never holds all logits in memory, so
there is no part for them.
"""

import contextlib
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Literal

from common import gguf_reader
from pipeline.config.schema import LINEAR_LAYERS, Base, Finetune

# Bytes of a weight: four bits, an 8-bit scale for every 64 weights, and a 32-bit scale for every 256 of these scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
WORKSPACE_BYTES = 0.30e9  # of the matrix multiplications, and what the allocator cannot use
CUDA_CONTEXT_BYTES = 0.7e9  # memory of CUDA itself, which torch does not count
# The sizes of a config.json by the keys that they have in a GGUF, after the name of the architecture.
GGUF_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}


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
        d, q, k, i = self.hidden, self.query_size, self.key_size, self.intermediate
        sizes = ((d, q), (d, k), (d, k), (q, d), (d, i), (d, i), (i, d))
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


def shape_from_config(config: dict[str, Any]) -> ModelShape | None:
    """Return the shape in a config.json; None for models other than plain decoders (experts, state spaces, vision)."""
    text_config = config.get("text_config", config)
    if any("expert" in key or "mamba" in key or key.startswith("ssm") for key in text_config):
        return None
    with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):
        return _read_shape(config, text_config)
    return None


def _read_shape(config: dict[str, Any], text_config: dict[str, Any]) -> ModelShape:
    """Return the shape of a plain decoder. Raise KeyError, TypeError or ZeroDivisionError when a size is missing."""
    heads, hidden = text_config["num_attention_heads"], text_config["hidden_size"]
    head_size = text_config.get("head_dim") or hidden // heads
    return ModelShape(
        layers=text_config["num_hidden_layers"],
        hidden=hidden,
        query_size=heads * head_size,
        key_size=(text_config.get("num_key_value_heads") or heads) * head_size,
        intermediate=text_config["intermediate_size"],
        heads=heads,
        vocab=text_config["vocab_size"],
        tied=has_tied_embeddings(config, text_config),
    )


def has_tied_embeddings(config: dict[str, Any], text_config: dict[str, Any]) -> bool:
    """Return whether input and output embeddings are one matrix."""
    for section in (text_config, config):
        if "tie_word_embeddings" in section:
            return bool(section["tie_word_embeddings"])
    return _is_tied_by_default(text_config.get("model_type") or config.get("model_type", ""))


def _is_tied_by_default(model_type: str) -> bool:
    """Return the default of the model's config class, which a config.json leaves out. For Gemma it is true."""
    try:
        from transformers import CONFIG_MAPPING

        return bool(CONFIG_MAPPING[model_type]().tie_word_embeddings)
    except (ImportError, KeyError, TypeError, ValueError):
        return False


def shape_from_gguf(header: gguf_reader.Header) -> ModelShape | None:
    """Return the shape in the header of a GGUF; None for models other than plain decoders."""
    if _read_size(header, "expert_count"):
        return None
    tokens = header.metadata.get("tokenizer.ggml.tokens", ())
    sizes = {name: _read_size(header, key) for name, key in GGUF_SIZES.items()}
    sizes["vocab_size"] = len(tokens) if isinstance(tokens, Sized) else None
    is_tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    return shape_from_config(sizes | {"tie_word_embeddings": is_tied})


def _read_size(header: gguf_reader.Header, key: str) -> int | None:
    """Return a size of the architecture in the header; None when it is missing or no size."""
    value = header.metadata.get(f"{header.metadata.get(gguf_reader.ARCHITECTURE_KEY)}.{key}")
    return value if type(value) is int and value > 0 else None


CheckpointingPolicy = Literal["unsloth", True, False]


def memory_parts(
    shape: ModelShape, base: Base, tune: Finetune, tokens: int, checkpointing: CheckpointingPolicy, packed: bool = True
) -> dict[str, float]:
    """Return the peak bytes by part, for micro-batches of at most `tokens` tokens, padding included."""
    lora_parameters = shape.lora_parameters(tune)
    return {
        "weights": loaded_weight_bytes(shape, base.load_in_4bit),
        "LoRA and its gradients": 8.0 * lora_parameters,
        "optimizer": moment_bytes(tune) * lora_parameters,
        "activations": float(activation_bytes(shape, tokens, checkpointing, packed)),
        "workspace": WORKSPACE_BYTES,
    }


def loaded_weight_bytes(shape: ModelShape, load_in_4bit: bool) -> float:
    """Return the bytes of the base model's weights: with QLoRA the matrices are nf4 and the embeddings 16 bit."""
    return NF4_BYTES * shape.matrix_weights + 2 * shape.embedding_weights if load_in_4bit else shape.weight_bytes


def moment_bytes(tune: Finetune) -> float:
    """Return the bytes of the optimizer's two moments for each trainable parameter."""
    return 2.03 if "8bit" in tune.optim else 8.0


def activation_bytes(shape: ModelShape, tokens: int, checkpointing: CheckpointingPolicy, packed: bool = True) -> float:
    """Return the bytes that the backward pass needs.

    These are the activations of every layer, or with checkpointing those of one layer and the inputs of the others.
    """
    d, i, layer = shape.hidden, shape.intermediate, _layer_activation_bytes(shape, packed)
    if not checkpointing:
        return tokens * (shape.layers * layer + 7 * d)
    inputs = 2 * d * shape.layers if checkpointing is True else 8 * d  # "unsloth" keeps them in main memory
    return tokens * (inputs + layer + 2 * i + 2 * d)


def _layer_activation_bytes(shape: ModelShape, packed: bool) -> float:
    """Return the bytes of one layer's activations for a token."""
    widths = 4 * shape.hidden + 2 * shape.query_size + 2 * shape.key_size + 2 * shape.intermediate
    return 2 * widths + 4 * shape.heads + (0 if packed else 2.3 * shape.query_size)


def peak_bytes(
    shape: ModelShape, base: Base, tune: Finetune, tokens: int, checkpointing: CheckpointingPolicy, packed: bool = True
) -> float:
    """Return the peak bytes of a training, as torch.cuda.max_memory_allocated counts them."""
    return sum(memory_parts(shape, base, tune, tokens, checkpointing, packed).values())
