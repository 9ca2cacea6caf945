"""Estimate the peak GPU memory of a LoRA training from the model's shape, by part, in bytes.

The constants were fitted on an H100 (Llama-3.1-8B shape and others, nf4 and 16 bit, torch 2.11). The errors on settings
that they were not fitted on are in benchmarks/results/gpu.md. Unsloth's fused loss never holds all logits in memory, so
there is no part for them.
"""

from dataclasses import dataclass
from typing import Literal

from common import gguf_reader
from pipeline.config.schema import SEVEN, Base, Finetune

# Bytes of a weight: four bits, an 8-bit scale for every 64 weights, and a 32-bit scale for every 256 of these scales.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
WORKSPACE = 0.30e9  # of the matrix multiplications, and what the allocator cannot use
CONTEXT = 0.7e9  # memory of CUDA itself, which torch does not count


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, from its config.json.

    `query_size` and `key_size` are the widths of all query heads and of all key heads together. Input and output
    embeddings are one matrix when `tied`, else two.
    """

    layers: int
    hidden: int
    q: int
    k: int
    intermediate: int
    heads: int
    vocab: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the seven matrices of a layer, {name: (inputs, outputs)}."""
        d, i = self.hidden, self.intermediate
        sizes = ((d, self.q), (d, self.k), (d, self.k), (self.q, d), (d, i), (d, i), (i, d))
        return dict(zip(SEVEN, sizes, strict=True))

    @property
    def matrices(self) -> int:
        """Return the number of weights in the matrices of all layers."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def embeddings(self) -> int:
        """Return the number of weights in the embeddings."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def sixteen(self) -> int:
        """Return the bytes of all weights in 16 bit."""
        return 2 * (self.matrices + self.embeddings)

    def flops(self) -> float:
        """Return the FLOPs to train on one token, forward and backward.

        The weights are frozen and get no gradients, so it is 4 FLOPs for each weight and not 6.
        """
        return 4.0 * (self.matrices + self.vocab * self.hidden)

    def lora(self, tune: Finetune) -> int:
        """Return the number of trainable parameters on the usual seven matrices; other targets are not counted."""
        return self.layers * sum(
            tune.r * sum(self.linears[name]) for name in tune.target_modules if name in self.linears
        )


def shape(config: dict) -> Shape | None:
    """Return the shape in a config.json; None for models other than plain decoders (experts, state spaces, vision)."""
    text = config.get("text_config", config)
    if any("expert" in key or "mamba" in key or key.startswith("ssm") for key in text):
        return None
    try:
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        size = text.get("head_dim") or hidden // heads
        return Shape(
            text["num_hidden_layers"],
            hidden,
            heads * size,
            (text.get("num_key_value_heads") or heads) * size,
            text["intermediate_size"],
            heads,
            text["vocab_size"],
            is_tied(config, text),
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def is_tied(config: dict, text: dict) -> bool:
    """Return whether input and output embeddings are one matrix.

    A config.json leaves out values that are the default of its class, and for Gemma that default is true.
    """
    for place in (text, config):
        if "tie_word_embeddings" in place:
            return bool(place["tie_word_embeddings"])
    try:
        from transformers import CONFIG_MAPPING

        return bool(CONFIG_MAPPING[text.get("model_type") or config["model_type"]]().tie_word_embeddings)
    except (ImportError, KeyError, TypeError, ValueError):
        return False


def gguf_shape(header: gguf_reader.Header) -> Shape | None:
    """Return the shape in the header of a GGUF; None for models other than plain decoders."""
    name = header.metadata.get(gguf_reader.ARCHITECTURE)

    def of(key: str) -> int | None:
        value = header.metadata.get(f"{name}.{key}")
        return value if type(value) is int and value > 0 else None

    if of("expert_count"):
        return None
    return shape(
        {
            "num_hidden_layers": of("block_count"),
            "hidden_size": of("embedding_length"),
            "intermediate_size": of("feed_forward_length"),
            "num_attention_heads": of("attention.head_count"),
            "num_key_value_heads": of("attention.head_count_kv"),
            "head_dim": of("attention.key_length"),
            "vocab_size": len(header.metadata.get("tokenizer.ggml.tokens", ())),
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
        }
    )


Checkpointing = Literal["unsloth", True, False]


def parts(
    model: Shape, base: Base, tune: Finetune, tokens: int, checkpointing: Checkpointing, packed: bool = True
) -> dict[str, float]:
    """Return the peak bytes by part, for micro-batches of at most `tokens` tokens, padding included."""
    p = model.lora(tune)
    weights = NF4 * model.matrices + 2 * model.embeddings if base.load_in_4bit else model.sixteen
    return {
        "weights": weights,
        "LoRA and its gradients": 8.0 * p,
        "optimizer": moments(tune) * p,
        "activations": float(activations(model, tokens, checkpointing, packed)),
        "workspace": WORKSPACE,
    }


def moments(tune: Finetune) -> float:
    """Return the bytes of the optimizer's two moments for each trainable parameter."""
    return 2.03 if "8bit" in tune.optim else 8.0


def activations(model: Shape, tokens: int, checkpointing: Checkpointing, packed: bool = True) -> float:
    """Return the bytes that the backward pass needs.

    These are the activations of every layer, or with checkpointing those of one layer and the inputs of the others.
    """
    d, i = model.hidden, model.intermediate
    layer = 2 * (4 * d + 2 * model.q + 2 * model.k + 2 * i) + 4 * model.heads + (0 if packed else 2.3 * model.q)
    if not checkpointing:
        return tokens * (model.layers * layer + 7 * d)
    inputs = 2 * d * model.layers if checkpointing is True else 8 * d  # "unsloth" keeps them in main memory
    return tokens * (inputs + layer + 2 * i + 2 * d)


def peak(
    model: Shape, base: Base, tune: Finetune, tokens: int, checkpointing: Checkpointing, packed: bool = True
) -> float:
    """Return the peak bytes of a training, as torch.cuda.max_memory_allocated counts them."""
    return sum(parts(model, base, tune, tokens, checkpointing, packed).values())
