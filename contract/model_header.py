"""Checks of a GGUF header's meaning before the model is loaded. `common.gguf_reader` reads the bytes.

llama.cpp trusts the values that it looks up: a token id beyond the vocabulary aborts its process, the number of layers
decides how much memory it takes, and llama-cpp-python compiles every chat template in a file. A file that Ferry made
has one template, only keys that the converter writes, and numbers that agree with its tensors.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from common.errors import UserError, printable_line
from common.gguf_reader import ARCHITECTURE_KEY, SPLIT_COUNT_KEY, Header
from contract import limits

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")  # llama.cpp aborts its process for any other value
MAX_DIMENSION = 1 << 31  # largest dimension of a model; real vocabularies have 262,144 tokens, contexts 10 million
MAX_PER_LAYER = 4096  # items of a list under the architecture's name: one per layer, or factors of RoPE
KEY_PREFIXES = ("general.", "ferry.", "quantize.")
TEMPLATE_KEY, TOKENS_KEY = "tokenizer.chat_template", "tokenizer.ggml.tokens"
# Lists with one item per token.
PER_TOKEN_KEYS = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")
TOKEN_ID_KEY = re.compile(r"tokenizer\.ggml\.\w+_token_ids?|tokenizer\.ggml\.suppress_tokens")
# Key -> type, as in gguf-py's Keys.Tokenizer; a test compares the two. Keys that end in `_token_id` are not listed.
TOKENIZER_KEY_TYPES = {
    "tokenizer.ggml.model": str, "tokenizer.ggml.pre": str, TOKENS_KEY: list, "tokenizer.ggml.token_type": list,
    "tokenizer.ggml.token_type_count": int, "tokenizer.ggml.scores": list, "tokenizer.ggml.merges": list,
    "tokenizer.ggml.add_bos_token": bool, "tokenizer.ggml.add_eos_token": bool, "tokenizer.ggml.add_sep_token": bool,
    "tokenizer.ggml.add_space_prefix": bool, "tokenizer.ggml.remove_extra_whitespaces": bool,
    "tokenizer.ggml.precompiled_charsmap": list, "tokenizer.ggml.normalizer.lowercase": bool,
    "tokenizer.ggml.normalizer.strip_accents": bool, TEMPLATE_KEY: str,
}  # fmt: skip


class Fault(NamedTuple):
    """A fault of a header."""

    code: str
    """As of UserError."""
    text: str
    """One sentence."""


def refuse_impossible_header(header: Header, file: str, made_by_ferry: bool = True) -> None:
    """Raise UserError when a header contradicts itself, or differs from all that Ferry publishes.

    Args:
        header: the header that was read.
        file: the file's name in messages.
        made_by_ferry: false for a base model, which may have keys that Ferry does not write.
    """
    for fault in find_faults(header, made_by_ferry):
        raise UserError(
            f"{file} cannot be loaded: {fault.text}",
            "do not use this repo: its publisher has to fix it",
            code=fault.code,
        )


def find_faults(header: Header, made_by_ferry: bool = True) -> Iterator[Fault]:
    """Yield the faults of a header."""
    metadata, architecture = header.metadata, str(header.metadata[ARCHITECTURE_KEY])
    if not re.fullmatch(r"[a-z0-9_.-]{1,64}", architecture):
        yield Fault("header.bad_architecture", f"{ARCHITECTURE_KEY} is {printable_line(architecture, 40)!r}")
        return
    for key, value in metadata.items():
        if made_by_ferry:
            yield from _find_key_faults(key, value, architecture)
        if key.startswith(f"{architecture}."):
            yield from _find_dimension_faults(printable_line(key, 80), value)
    yield from _find_vocabulary_faults(metadata)
    yield from _find_layer_faults(header, architecture)
    yield from _find_expert_faults(metadata, architecture)


def _find_key_faults(key: str, value: object, architecture: str) -> Iterator[Fault]:
    """Yield the faults of one key: it is unknown, or its value has another type or is too long."""
    name = printable_line(key, 80)
    if key in TOKENIZER_KEY_TYPES:
        if type(value) is not TOKENIZER_KEY_TYPES[key]:
            text = f"{name} is {type(value).__name__}, not {TOKENIZER_KEY_TYPES[key].__name__}"
            yield Fault("header.wrong_value_type", text)
    elif (
        not key.startswith((*KEY_PREFIXES, f"{architecture}."))
        and not TOKEN_ID_KEY.fullmatch(key)
        and key != SPLIT_COUNT_KEY
    ):
        yield Fault("header.unknown_key", f"Ferry does not write the key {name}")
    if isinstance(value, str) and len(value) > limits.MAX_TEMPLATE_CHARS:
        yield Fault(
            "header.text_too_long", f"{name} has {len(value):,} characters, the limit is {limits.MAX_TEMPLATE_CHARS:,}"
        )


def _find_dimension_faults(name: str, value: object) -> Iterator[Fault]:
    """Yield the faults of the numbers under a key of the architecture: not finite, too large, or too many."""
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_PER_LAYER:
        yield Fault("header.list_too_long", f"{name} has {len(values):,} items, the limit is {MAX_PER_LAYER:,}")
        return
    for item in values:
        yield from _find_number_faults(name, item)


def _find_number_faults(name: str, number: object) -> Iterator[Fault]:
    if isinstance(number, float) and not math.isfinite(number):
        yield Fault("header.not_finite", f"{name} is {number}")
    if isinstance(number, int) and abs(number) > MAX_DIMENSION:
        yield Fault("header.number_too_large", f"{name} is {number}, the limit is {MAX_DIMENSION:,}")


def _find_vocabulary_faults(metadata: dict[str, object]) -> Iterator[Fault]:
    """Yield the faults of the vocabulary: tokens that are not unique texts, lists of another length, ids beyond it."""
    tokens = metadata.get(TOKENS_KEY)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        yield Fault("header.no_tokens", f"{TOKENS_KEY} is not a list of texts")
        return
    if len(set(tokens)) < len(tokens):
        yield Fault("header.duplicate_token", f"{TOKENS_KEY} has a text twice")
    for key in PER_TOKEN_KEYS:
        value = metadata.get(key, tokens)
        if not isinstance(value, list) or len(value) != len(tokens):
            text = f"{key} does not have one item for each of {len(tokens):,} tokens"
            yield Fault("header.wrong_list_length", text)
    for key, value in metadata.items():
        if TOKEN_ID_KEY.fullmatch(key) and not _are_token_ids(value, len(tokens)):
            text = f"{key} is {printable_line(str(value), 60)}, and the vocabulary has {len(tokens):,} tokens"
            yield Fault("header.token_id_out_of_range", text)


def _are_token_ids(value: object, vocabulary_size: int) -> bool:
    """Return whether a value is a token id of the vocabulary, or a list of them."""
    token_ids = value if isinstance(value, list) else [value]
    return all(type(token) is int and 0 <= token < vocabulary_size for token in token_ids)


def _find_layer_faults(header: Header, architecture: str) -> Iterator[Fault]:
    """Yield the faults of layers and context. Each claimed layer has tensors, and embeddings have a row per token."""
    layer_count = header.metadata.get(f"{architecture}.block_count")
    if type(layer_count) is not int or not 1 <= layer_count <= MAX_LAYERS:
        text = f"{architecture}.block_count is {printable_line(str(layer_count), 40)}, not 1 to {MAX_LAYERS}"
        yield Fault("header.bad_layer_count", text)
        return
    yield from _find_context_faults(header.metadata, architecture)
    layer_indices = {
        int(match[1]) for tensor in header.tensors if (match := re.match(r"blk\.(\d{1,9})\.", tensor.name))
    }
    if layer_indices != set(range(layer_count)):
        text = f"{architecture}.block_count is {layer_count}, and there are tensors of {len(layer_indices)} layers"
        yield Fault("header.wrong_layers", text)
    yield from _find_embedding_faults(header)


def _find_context_faults(metadata: dict[str, object], architecture: str) -> Iterator[Fault]:
    context = metadata.get(f"{architecture}.context_length")
    if type(context) is not int or not 1 <= context <= limits.MAX_CONTEXT:
        text = f"{architecture}.context_length is {printable_line(str(context), 40)}, not 1 to {limits.MAX_CONTEXT:,}"
        yield Fault("header.bad_context_length", text)


def _find_embedding_faults(header: Header) -> Iterator[Fault]:
    tokens = header.metadata.get(TOKENS_KEY)
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight" and isinstance(tokens, list) and tensor.shape[-1] != len(tokens):
            text = f"{tensor.name} has {tensor.shape[-1]:,} rows for {len(tokens):,} tokens"
            yield Fault("header.wrong_embedding_rows", text)


def _find_expert_faults(metadata: dict[str, object], architecture: str) -> Iterator[Fault]:
    """Yield the faults of expert counts, drafting layers (nextn) and RoPE scaling, all asserted by llama.cpp."""
    keys = ("expert_count", "expert_used_count", "nextn_predict_layers")
    counts = [count for key in keys if type(count := metadata.get(f"{architecture}.{key}", 0)) is int]
    if len(counts) < len(keys):
        text = "expert_count, expert_used_count or nextn_predict_layers is not an integer"
        yield Fault("header.not_an_integer", text)
        return
    expert_count, used_experts, drafting_layers = counts
    if not 0 <= expert_count <= MAX_EXPERTS or not (
        0 < used_experts <= expert_count or expert_count == used_experts == 0
    ):
        text = f"{architecture} has {expert_count} experts, of which {used_experts} are used"
        yield Fault("header.bad_expert_count", text)
    layers = metadata.get(f"{architecture}.block_count")
    if drafting_layers and not (type(layers) is int and 0 <= drafting_layers < layers):
        text = f"{architecture}.nextn_predict_layers is {drafting_layers}"
        yield Fault("header.bad_drafting_layers", text)
    yield from _find_rope_faults(metadata, architecture)


def _find_rope_faults(metadata: dict[str, object], architecture: str) -> Iterator[Fault]:
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ROPE_SCALINGS:
        text = f"{architecture}.rope.scaling.type is {printable_line(str(scaling), 40)}"
        yield Fault("header.unknown_rope_scaling", text)
