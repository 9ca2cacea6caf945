"""Peak GPU memory of a LoRA training, by part, from the model's shape. Bytes.

Fitted on an H100 (Llama-3.1-8B shape and others, nf4 and 16 bit, torch 2.11): benchmarks/results/gpu.md has the score on
settings it was not fitted on. Unsloth's fused loss never holds all logits, so there is no part for them.
"""

from dataclasses import dataclass
from typing import Literal

from common import gguf_reader
from pipeline.config.schema import SEVEN, Base, Finetune

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: four bits, an 8-bit scale each 64, a 32-bit one each 256 of those
WORKSPACE = 0.30e9  # of the matrix multiplies, and what the allocator cannot use
CONTEXT = 0.7e9  # CUDA's own, which torch does not count


@dataclass(frozen=True)
class Shape:
    """What a decoder's config.json says. q, k: all heads together; vocab rows exist twice unless tied."""

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
        """The seven matrices of a layer, (in, out)."""
        d, i = self.hidden, self.intermediate
        sizes = ((d, self.q), (d, self.k), (d, self.k), (self.q, d), (d, i), (d, i), (i, d))
        return dict(zip(SEVEN, sizes, strict=True))

    @property
    def matrices(self) -> int:
        """Weights of all layers' matrices."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def embeddings(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def sixteen(self) -> int:
        """Bytes of all weights in 16 bit."""
        return 2 * (self.matrices + self.embeddings)

    def flops(self) -> float:
        """Of one token, forward and backward through frozen weights: no gradients of them, so 4 a weight and not 6."""
        return 4.0 * (self.matrices + self.vocab * self.hidden)

    def lora(self, tune: Finetune) -> int:
        """Trainable parameters on the usual seven; other targets are counted as none."""
        return self.layers * sum(
            tune.r * sum(self.linears[name]) for name in tune.target_modules if name in self.linears
        )


def shape(config: dict) -> Shape | None:
    """From a config.json; None for what is no plain decoder (experts, state spaces, a vision tower)."""
    text = config.get("text_config", config)
    if any("expert" in key or "mamba" in key or key.startswith("ssm") for key in text):
        return None
    try:
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        size = text.get("head_dim") or hidden // heads
        return Shape(
            text["num_hidden_layers"], hidden, heads * size, (text.get("num_key_value_heads") or heads) * size,
            text["intermediate_size"], heads, text["vocab_size"], is_tied(config, text),
        )  # fmt: skip
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def is_tied(config: dict, text: dict) -> bool:
    """Whether input and output embeddings are one matrix. A config.json leaves out what is its class's default, and for Gemma
    that is true."""
    for place in (text, config):
        if "tie_word_embeddings" in place:
            return bool(place["tie_word_embeddings"])
    try:
        from transformers import CONFIG_MAPPING

        return bool(CONFIG_MAPPING[text.get("model_type") or config["model_type"]]().tie_word_embeddings)
    except (ImportError, KeyError, TypeError, ValueError):
        return False


def gguf_shape(header: gguf_reader.Header) -> Shape | None:
    """From a GGUF's header."""
    name = header.metadata.get(gguf_reader.ARCHITECTURE)

    def of(key: str) -> int | None:
        value = header.metadata.get(f"{name}.{key}")
        return value if type(value) is int and value > 0 else None

    if of("expert_count"):
        return None
    return shape({
        "num_hidden_layers": of("block_count"), "hidden_size": of("embedding_length"), "intermediate_size": of("feed_forward_length"),
        "num_attention_heads": of("attention.head_count"), "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("attention.key_length"), "vocab_size": len(header.metadata.get("tokenizer.ggml.tokens", ())),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
    })  # fmt: skip


Checkpointing = Literal["unsloth", True, False]


def parts(
    model: Shape, base: Base, tune: Finetune, tokens: int, checkpointing: Checkpointing, packed: bool = True
) -> dict[str, float]:
    """Bytes by part, for micro-batches of at most `tokens` tokens, padding counted."""
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
    """Bytes of the optimizer's two moments, a trainable parameter."""
    return 2.03 if "8bit" in tune.optim else 8.0


def activations(model: Shape, tokens: int, checkpointing: Checkpointing, packed: bool = True) -> float:
    """What the backward pass needs: every layer's own, or with checkpointing one layer's and the others' inputs."""
    d, i = model.hidden, model.intermediate
    layer = 2 * (4 * d + 2 * model.q + 2 * model.k + 2 * i) + 4 * model.heads + (0 if packed else 2.3 * model.q)
    if not checkpointing:
        return tokens * (model.layers * layer + 7 * d)
    inputs = 2 * d * model.layers if checkpointing is True else 8 * d  # "unsloth" keeps them in the machine's memory
    return tokens * (inputs + layer + 2 * i + 2 * d)


def peak(
    model: Shape, base: Base, tune: Finetune, tokens: int, checkpointing: Checkpointing, packed: bool = True
) -> float:
    """Bytes, as torch.cuda.max_memory_allocated counts them."""
    return sum(parts(model, base, tune, tokens, checkpointing, packed).values())
