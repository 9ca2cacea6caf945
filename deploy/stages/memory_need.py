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

PYTHON = 2 << 30  # bytes: the interpreter, numpy, llama.cpp's threads; 0.3 GB measured
STEP = 256  # tokens: llama.cpp rounds a context up to this
BATCH = 512  # tokens that are computed at once: llama.cpp's default n_ubatch
# Every n-th layer attends to the whole context, the others to a sliding window. For architectures whose header does not
# say it (llama.cpp, src/models).
PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "gemma3n": 5, "olmo2": 4}


def need(header: Header, file_bytes: int, context: int) -> int:
    """Return the bytes that a model needs with `context` tokens, all weights in memory. file_bytes: the GGUF's size."""
    return file_bytes + cache(header, context) + state(header) + compute(header, context)


def limits(header: Header, file_bytes: int, context: int, seconds: float) -> Limits:
    """Return the limits of a process that runs the model.

    Its memory limit is 1.5 times the need of the model, plus the logits of a whole context, plus Python.
    """
    logits = 4 * _rounded(context) * _Facts(header).vocabulary()
    return Limits(seconds, int(1.5 * need(header, file_bytes, context)) + logits + PYTHON)


def context(header: Header, file_bytes: int, budget: int, wanted: int) -> int:
    """Return how many tokens of context fit into `memory_budget` bytes.

    That is `wanted_tokens`, at most the context length in the header, or the largest multiple of 256 below it that
    fits. 0 means that the weights and the smallest context do not fit.
    """
    most = min(wanted, _Facts(header).number("context_length") or wanted)
    if need(header, file_bytes, most) <= budget:
        return most
    steps = range(STEP, most, STEP)
    return STEP * bisect.bisect_right(steps, budget, key=lambda tokens: need(header, file_bytes, tokens))


def cache(header: Header, context: int) -> int:
    """Return the bytes of the keys and values of `context` tokens, at two bytes for each number."""
    facts, cells = _Facts(header), _rounded(context)
    seen = min(cells, _rounded(facts.number("attention.sliding_window") + BATCH))
    return 2 * sum(facts.kept(layer, False) * cells + facts.kept(layer, True) * seen for layer in facts.layers())


def state(header: Header) -> int:
    """Return the bytes of recurrent state, which do not depend on the context, at four bytes for each number.

    Every layer counts as recurrent, since few headers say which ones are.
    """
    facts = _Facts(header)
    width, wkv = facts.number("embedding_length"), facts.number("wkv.head_size")
    inner, held = facts.number("ssm.inner_size"), facts.number("ssm.state_size")
    mamba = max(0, facts.number("ssm.conv_kernel") - 1) * (inner + 2 * facts.number("ssm.group_count") * held)
    rwkv = width * (wkv + facts.number("token_shift_count", 2)) if wkv else 0
    lfm = width * max(0, facts.number("shortconv.l_cache") - 1)
    return 4 * len(facts.layers()) * (mamba + inner * held + rwkv + lfm)


def compute(header: Header, context: int) -> int:
    """Return an upper estimate of the compute buffer in bytes: logits, layer outputs and attention mask of a batch."""
    facts = _Facts(header)
    wide = max((facts.at("feed_forward_length", layer) for layer in facts.layers()), default=0)
    floats = facts.vocabulary() + 4 * facts.number("embedding_length") + 2 * wide
    return BATCH * (4 * floats + 2 * _rounded(context))


def _rounded(tokens: int) -> int:
    """Round up to a multiple of 256 tokens."""
    return -(-tokens // STEP) * STEP


def _positive(value: object) -> int:
    """Return the value when it is a positive integer, else 0."""
    return value if isinstance(value, int) and value > 0 else 0


class _Facts:
    """Reads the numbers that a header has under the name of its architecture.

    A missing or invalid number counts as 0: llama.cpp refuses a header that lacks what it needs, this class does not.
    """

    def __init__(self, header: Header):
        self.metadata, self.name = header.metadata, str(header.metadata.get("general.architecture"))

    def number(self, key: str, default: int = 0) -> int:
        return _positive(self.metadata.get(f"{self.name}.{key}", default))

    def at(self, key: str, layer: int) -> int:
        """Return the value of one layer: a header has one value for all layers, or a list."""
        value = self.metadata.get(f"{self.name}.{key}")
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else 0
        return _positive(value)

    def vocabulary(self) -> int:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return len(tokens) if isinstance(tokens, list) else self.number("vocab_size")

    def layers(self) -> range:
        """Return the layers with keys and values of their own, without draft layers and layers that share another's."""
        extra = self.number("nextn_predict_layers") + self.number("attention.shared_kv_layers")
        return range(max(0, min(self.number("block_count"), MAX_LAYERS) - extra))

    def kept(self, layer: int, window: bool) -> int:
        """Return how many numbers a layer caches for each token.

        in_window: whether to count a layer with a sliding window, or one that attends to the whole context. A layer of
        the other kind has 0.
        """
        every = self.number("full_attention_interval")
        if self.windowed(layer) != window or (every and (layer + 1) % every):
            return 0
        has_kv = f"{self.name}.attention.head_count_kv" in self.metadata
        heads = self.at(f"attention.head_count{'_kv' if has_kv else ''}", layer)
        sparse = self.number("attention.indexer.key_length")
        return heads * (self.size("key", window) + self.size("value", window)) + sparse

    def size(self, what: str, window: bool) -> int:
        """Return the size of one head's 'key' or 'value'. With latent attention (MLA) values are part of the keys."""
        if what == "value" and self.number("attention.value_length_mla"):
            return 0
        equal = self.number("embedding_length") // (self.at("attention.head_count", 0) or 1)
        whole = self.number(f"attention.{what}_length", equal)
        return self.number(f"attention.{what}_length_swa", whole) if window else whole

    def windowed(self, layer: int) -> bool:
        if not self.number("attention.sliding_window"):
            return False
        said = self.metadata.get(f"{self.name}.attention.sliding_window_pattern")
        if isinstance(said, list):
            return bool(self.at("attention.sliding_window_pattern", layer))
        period = self.number("attention.sliding_window_pattern", PERIODS.get(self.name, 1))
        return layer % period < period - 1 if period else False
