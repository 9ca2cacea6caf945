"""Checks of a GGUF header's meaning before the model is loaded. `common.gguf_reader` reads the bytes.

llama.cpp trusts the values that it looks up: a token id beyond the vocabulary aborts its process, the number of layers
decides how much memory it takes, and llama-cpp-python compiles every chat template in a file. A file that Ferry made
has one template, only keys that the converter writes, and numbers that agree with its tensors.
"""

import math
import re
from collections.abc import Iterator

from common.errors import UserError, shown
from common.gguf_reader import ARCHITECTURE, SPLITS, Header
from contract import limits

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")  # llama.cpp aborts its process for any other value
MAX_NUMBER = 1 << 31  # largest dimension of a model; real vocabularies have 262,144 tokens, contexts 10 million
MAX_PER_LAYER = 4096  # items of a list under the architecture's name: one per layer, or factors of RoPE
NAMESPACES = ("general.", "ferry.", "quantize.")
TEMPLATE, TOKENS = "tokenizer.chat_template", "tokenizer.ggml.tokens"
# Lists with one item per token.
PER_TOKEN = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")
IDS = re.compile(r"tokenizer\.ggml\.\w+_token_ids?|tokenizer\.ggml\.suppress_tokens")
# Key -> type, as in gguf-py's Keys.Tokenizer; a test compares the two. Keys that end in `_token_id` are not listed.
TOKENIZER = {
    "tokenizer.ggml.model": str, "tokenizer.ggml.pre": str, TOKENS: list, "tokenizer.ggml.token_type": list,
    "tokenizer.ggml.token_type_count": int, "tokenizer.ggml.scores": list, "tokenizer.ggml.merges": list,
    "tokenizer.ggml.add_bos_token": bool, "tokenizer.ggml.add_eos_token": bool, "tokenizer.ggml.add_sep_token": bool,
    "tokenizer.ggml.add_space_prefix": bool, "tokenizer.ggml.remove_extra_whitespaces": bool,
    "tokenizer.ggml.precompiled_charsmap": list, "tokenizer.ggml.normalizer.lowercase": bool,
    "tokenizer.ggml.normalizer.strip_accents": bool, TEMPLATE: str,
}  # fmt: skip


def refuse_impossible(header: Header, file: str, made_by_ferry: bool = True) -> None:
    """Raise UserError when a header contradicts itself, or differs from all that Ferry publishes.

    Args:
        header: the header that was read.
        file: the file's name in messages.
        made_by_ferry: false for a base model, which may have keys that Ferry does not write.
    """
    for fault in find_faults(header, made_by_ferry):
        raise UserError(
            f"{file} is no model that can be loaded: {fault}", "do not use this repo: its publisher has to mend it"
        )


def find_faults(header: Header, made_by_ferry: bool = True) -> Iterator[str]:
    """Yield the faults of a header, one sentence each."""
    metadata, architecture = header.metadata, str(header.metadata[ARCHITECTURE])
    if not re.fullmatch(r"[a-z0-9_.-]{1,64}", architecture):
        yield f"{ARCHITECTURE} is {shown(architecture, 40)!r}"
        return
    for key, value in metadata.items():
        if made_by_ferry:
            yield from _faults_of_key(key, value, architecture)
        if key.startswith(f"{architecture}."):
            yield from _faults_of_dimension(shown(key, 80), value)
    yield from _faults_of_vocabulary(metadata)
    yield from _faults_of_layers(header, architecture)
    yield from _faults_of_experts(metadata, architecture)


def _faults_of_key(key: str, value: object, architecture: str) -> Iterator[str]:
    """Yield the faults of one key: it is unknown, or its value has another type or is too long."""
    name = shown(key, 80)
    if key in TOKENIZER:
        if type(value) is not TOKENIZER[key]:
            yield f"{name} is {type(value).__name__}, not {TOKENIZER[key].__name__}"
    elif not key.startswith((*NAMESPACES, f"{architecture}.")) and not IDS.fullmatch(key) and key != SPLITS:
        yield f"the key {name} is none that Ferry writes"
    if isinstance(value, str) and len(value) > limits.MAX_TEMPLATE:
        yield f"{name} has {len(value):,} characters, at most {limits.MAX_TEMPLATE:,}"


def _faults_of_dimension(name: str, value: object) -> Iterator[str]:
    """Yield the faults of the numbers under a key of the architecture: not finite, too large, or too many."""
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_PER_LAYER:
        yield f"{name} has {len(values):,} items, at most {MAX_PER_LAYER:,}"
        return
    for item in values:
        if isinstance(item, float) and not math.isfinite(item):
            yield f"{name} is {item}"
        if isinstance(item, int) and abs(item) > MAX_NUMBER:
            yield f"{name} is {item}, at most {MAX_NUMBER:,}"


def _faults_of_vocabulary(metadata: dict[str, object]) -> Iterator[str]:
    """Yield the faults of the vocabulary: tokens that are not unique texts, lists of another length, ids beyond it."""
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        yield f"{TOKENS} is no list of texts"
        return
    if len(set(tokens)) < len(tokens):
        yield f"{TOKENS} has a text twice"
    for key in PER_TOKEN:
        if key in metadata and (not isinstance(metadata[key], list) or len(metadata[key]) != len(tokens)):
            yield f"{key} has not one item for each of {len(tokens):,} tokens"
    for key in filter(IDS.fullmatch, metadata):
        ids = metadata[key] if isinstance(metadata[key], list) else [metadata[key]]
        if any(type(token) is not int or not 0 <= token < len(tokens) for token in ids):
            yield f"{key} is {shown(str(metadata[key]), 60)}, and the vocabulary has {len(tokens):,} tokens"


def _faults_of_layers(header: Header, architecture: str) -> Iterator[str]:
    """Yield the faults of layers and context. Each claimed layer has tensors, and embeddings have a row per token."""
    claimed, context = (header.metadata.get(f"{architecture}.{key}") for key in ("block_count", "context_length"))
    if type(claimed) is not int or not 1 <= claimed <= MAX_LAYERS:
        yield f"{architecture}.block_count is {shown(str(claimed), 40)}, not 1 to {MAX_LAYERS}"
        return
    if type(context) is not int or not 1 <= context <= limits.MAX_CONTEXT:
        yield f"{architecture}.context_length is {shown(str(context), 40)}, not 1 to {limits.MAX_CONTEXT:,}"
    numbers = {int(found[1]) for tensor in header.tensors if (found := re.match(r"blk\.(\d{1,9})\.", tensor.name))}
    if numbers != set(range(claimed)):
        yield f"{architecture}.block_count is {claimed}, and there are tensors of {len(numbers)} layers"
    tokens = header.metadata.get(TOKENS)
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight" and isinstance(tokens, list) and tensor.shape[-1] != len(tokens):
            yield f"{tensor.name} has {tensor.shape[-1]:,} rows for {len(tokens):,} tokens"


def _faults_of_experts(metadata: dict[str, object], architecture: str) -> Iterator[str]:
    """Yield the faults of expert counts, drafting layers (nextn) and RoPE scaling, all asserted by llama.cpp."""
    total, used, drafting = (
        metadata.get(f"{architecture}.{key}", 0)
        for key in ("expert_count", "expert_used_count", "nextn_predict_layers")
    )
    if any(type(number) is not int for number in (total, used, drafting)):
        yield "expert_count, expert_used_count or nextn_predict_layers is no whole number"
        return
    if not 0 <= total <= MAX_EXPERTS or not (0 < used <= total or total == used == 0):
        yield f"{architecture} has {total} experts, of which {used} are used"
    layers = metadata.get(f"{architecture}.block_count")
    if drafting and not (type(layers) is int and 0 <= drafting < layers):
        yield f"{architecture}.nextn_predict_layers is {drafting}"
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ROPE_SCALINGS:
        yield f"{architecture}.rope.scaling.type is {shown(str(scaling), 40)}"
