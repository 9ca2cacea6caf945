"""Estimate the memory that a GGUF takes when it runs: weights, KV cache, recurrent state and compute buffer.

The header is enough, so the need is known before a large download. The KV cache (16 bit) equals what llama.cpp logs, as
a test confirms; it is overestimated only when the header does not say which layers use a sliding window or keep a
recurrent state. The compute buffer is an upper estimate. Both hold for flash attention, which Ollama and LM Studio turn
on by themselves: without it every head needs 2 kB more for each token of context.
"""

import bisect

from common.child_process import Limits
from common.gguf_reader import Header
from contract.model_header import MAX_LAYERS

PYTHON_BYTES = 2 << 30  # bytes: the interpreter, numpy, llama.cpp's threads; 0.3 GB measured
CONTEXT_STEP = 256  # tokens: llama.cpp rounds a context up to this
BATCH_TOKENS = 512  # tokens that are computed at once: llama.cpp's default n_ubatch
# Every n-th layer attends to the whole context, the others to a sliding window. For architectures whose header does not
# say it (llama.cpp, src/models).
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "gemma3n": 5, "olmo2": 4}


def total_bytes(header: Header, file_bytes: int, context: int) -> int:
    """Return the bytes that a model needs with `context` tokens, all weights in memory. file_bytes: the GGUF's size."""
    return (
        file_bytes
        + kv_cache_bytes(header, context)
        + recurrent_state_bytes(header)
        + compute_buffer_bytes(header, context)
    )


def process_limits(header: Header, file_bytes: int, context: int, seconds: float) -> Limits:
    """Return the limits of a process that runs the model.

    Its memory limit is 1.5 times the need of the model, plus the logits of a whole context, plus Python.
    """
    logits = 4 * _round_context(context) * _HeaderFacts(header).vocabulary_size()
    return Limits(seconds, int(1.5 * total_bytes(header, file_bytes, context)) + logits + PYTHON_BYTES)


def largest_context(header: Header, file_bytes: int, memory_budget: int, wanted_tokens: int) -> int:
    """Return how many tokens of context fit into `memory_budget` bytes.

    That is `wanted_tokens`, at most the context length in the header, or the largest multiple of 256 below it that
    fits. 0 means that the weights and the smallest context do not fit.
    """
    max_tokens = min(wanted_tokens, _HeaderFacts(header).number("context_length") or wanted_tokens)
    if total_bytes(header, file_bytes, max_tokens) <= memory_budget:
        return max_tokens
    steps = range(CONTEXT_STEP, max_tokens, CONTEXT_STEP)
    return CONTEXT_STEP * bisect.bisect_right(
        steps, memory_budget, key=lambda tokens: total_bytes(header, file_bytes, tokens)
    )


def kv_cache_bytes(header: Header, context: int) -> int:
    """Return the bytes of the keys and values of `context` tokens, at two bytes for each number."""
    facts, cells = _HeaderFacts(header), _round_context(context)
    window_cells = min(cells, _round_context(facts.number("attention.sliding_window") + BATCH_TOKENS))
    return 2 * sum(
        facts.numbers_per_token(layer, False) * cells + facts.numbers_per_token(layer, True) * window_cells
        for layer in facts.layers()
    )


def recurrent_state_bytes(header: Header) -> int:
    """Return the bytes of recurrent state, which do not depend on the context, at four bytes for each number.

    Every layer counts as recurrent, since few headers say which ones are.
    """
    facts = _HeaderFacts(header)
    width, wkv = facts.number("embedding_length"), facts.number("wkv.head_size")
    inner_size, state_size = facts.number("ssm.inner_size"), facts.number("ssm.state_size")
    mamba = max(0, facts.number("ssm.conv_kernel") - 1) * (
        inner_size + 2 * facts.number("ssm.group_count") * state_size
    )
    rwkv = width * (wkv + facts.number("token_shift_count", 2)) if wkv else 0
    lfm = width * max(0, facts.number("shortconv.l_cache") - 1)
    return 4 * len(facts.layers()) * (mamba + inner_size * state_size + rwkv + lfm)


def compute_buffer_bytes(header: Header, context: int) -> int:
    """Return an upper estimate of the compute buffer in bytes: logits, layer outputs and attention mask of a batch."""
    facts = _HeaderFacts(header)
    feed_forward_width = max((facts.layer_number("feed_forward_length", layer) for layer in facts.layers()), default=0)
    floats = facts.vocabulary_size() + 4 * facts.number("embedding_length") + 2 * feed_forward_width
    return BATCH_TOKENS * (4 * floats + 2 * _round_context(context))


def _round_context(tokens: int) -> int:
    """Round up to a multiple of 256 tokens."""
    return -(-tokens // CONTEXT_STEP) * CONTEXT_STEP


def _positive_int(value: object) -> int:
    """Return the value when it is a positive integer, else 0."""
    return value if isinstance(value, int) and value > 0 else 0


class _HeaderFacts:
    """Reads the numbers that a header has under the name of its architecture.

    A missing or invalid number counts as 0: llama.cpp refuses a header that lacks what it needs, this class does not.
    """

    def __init__(self, header: Header):
        self.metadata, self.architecture = header.metadata, str(header.metadata.get("general.architecture"))

    def number(self, key: str, default: int = 0) -> int:
        return _positive_int(self.metadata.get(f"{self.architecture}.{key}", default))

    def layer_number(self, key: str, layer: int) -> int:
        """Return the value of one layer: a header has one value for all layers, or a list."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else 0
        return _positive_int(value)

    def vocabulary_size(self) -> int:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return len(tokens) if isinstance(tokens, list) else self.number("vocab_size")

    def layers(self) -> range:
        """Return the layers with keys and values of their own, without draft layers and layers that share another's."""
        extra = self.number("nextn_predict_layers") + self.number("attention.shared_kv_layers")
        return range(max(0, min(self.number("block_count"), MAX_LAYERS) - extra))

    def numbers_per_token(self, layer: int, in_window: bool) -> int:
        """Return how many numbers a layer caches for each token.

        in_window: whether to count a layer with a sliding window, or one that attends to the whole context. A layer of
        the other kind has 0.
        """
        attention_interval = self.number("full_attention_interval")
        if self.has_window(layer) != in_window or (attention_interval and (layer + 1) % attention_interval):
            return 0
        has_kv = f"{self.architecture}.attention.head_count_kv" in self.metadata
        heads = self.layer_number(f"attention.head_count{'_kv' if has_kv else ''}", layer)
        indexer_numbers = self.number("attention.indexer.key_length")
        return heads * (self.head_size("key", in_window) + self.head_size("value", in_window)) + indexer_numbers

    def head_size(self, part: str, in_window: bool) -> int:
        """Return the size of one head's 'key' or 'value'. With latent attention (MLA) values are part of the keys."""
        if part == "value" and self.number("attention.value_length_mla"):
            return 0
        default_size = self.number("embedding_length") // (self.layer_number("attention.head_count", 0) or 1)
        full_size = self.number(f"attention.{part}_length", default_size)
        return self.number(f"attention.{part}_length_swa", full_size) if in_window else full_size

    def has_window(self, layer: int) -> bool:
        if not self.number("attention.sliding_window"):
            return False
        pattern = self.metadata.get(f"{self.architecture}.attention.sliding_window_pattern")
        if isinstance(pattern, list):
            return bool(self.layer_number("attention.sliding_window_pattern", layer))
        period = self.number("attention.sliding_window_pattern", WINDOW_PERIODS.get(self.architecture, 1))
        return layer % period < period - 1 if period else False
