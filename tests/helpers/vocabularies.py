"""Real tokenizers without a network: rebuilt from the vocabularies that llama.cpp carries for its own tests.

Each comes with texts and the ids that the model's own tokenizer gave them (.inp, .out): tests/pipeline/data/test_chat_template.py proves
every one of NAMES.
"""

import functools
import struct
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.toolchain import llama_tools

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# How a text is cut before it is merged, one cut after the other: llama.cpp's src/llama-vocab.cpp.
CUTS = {
    "llama-bpe": [LLAMA],
    "qwen2": [QWEN],
    "qwen35": [QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")],
    "gpt-2": [GPT2],
    "mpt": [GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "refact": [r"\p{N}", GPT2],
    "command-r": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "deepseek-llm": [
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}+",
    ],
}
NAMES = [*CUTS, "llama-spm", "phi-3", "gemma-4"]
EXACT = ("<unk>", "<s>", "<|endoftext|>")  # Phi 3's other special tokens take the white space that follows them
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF's types


def path(name: str, suffix: str = "") -> Path:
    return llama_tools.require_folder() / "models" / f"ggml-vocab-{name}.gguf{suffix}"


def vectors(name: str) -> list[tuple[str, list[int]]]:
    """(text, the ids it must become)."""
    texts = path(name, ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in path(name, ".out").read_text().splitlines()]
    return list(zip(texts[: len(ids)], ids, strict=True))


def tokenizer(
    name: str, bos: str = "", eos: str = "", specials: Sequence[str] = (), words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A vocabulary as the tokenizer of a model.

    bos: put before a text, instead of the file's own; specials, words: tokens that a template needs, special and not.
    """
    meta = header(name)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core(name), bos_token=bos or named(meta, "bos"), eos_token=eos or named(meta, "eos"),
        pad_token=named(meta, "padding"), unk_token=named(meta, "unknown"), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    there = fast.get_vocab()  # what is there keeps its own rules for white space
    for special, tokens in ((True, specials), (False, words)):
        new = [AddedToken(token, special=special, normalized=False) for token in tokens if token not in there]
        fast.add_tokens(new, special_tokens=special)
    # What a file does not say is as llama.cpp would do.
    if bos or meta.get("tokenizer.ggml.add_bos_token", name == "llama-bpe"):
        first = {"id": "BOS", "ids": [fast.bos_token_id], "tokens": [fast.bos_token]}
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="BOS $A", pair="BOS $A $B", special_tokens=[first]
        )
    return fast


def named(meta: dict, role: str) -> str | None:
    number = meta.get(f"tokenizer.ggml.{role}_token_id")
    return None if number is None else meta["tokenizer.ggml.tokens"][number]


@functools.cache
def core(name: str) -> Tokenizer:
    """The vocabulary with its own special tokens."""
    meta = header(name)
    kind, tokens, types = (meta[f"tokenizer.ggml.{key}"] for key in ("model", "tokens", "token_type"))
    made = {"gpt2": byte_level, "llama": sentencepiece, "gemma4": gemma}[kind](name, meta)
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (CONTROL, USER_DEFINED):
            greedy = name == "phi-3" and token not in EXACT
            made.add_tokens([AddedToken(token, special=type_ == CONTROL, normalized=False, rstrip=greedy)])
    return made


def byte_level(name: str, meta: dict) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in CUTS[name]]
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    if name == "qwen2":  # as the model does; the vectors hold nothing that tells
        made.normalizer = normalizers.NFC()
    return made


def sentencepiece(name: str, meta: dict) -> Tokenizer:
    """Llama 2 and Phi 3: a space is put before the text, and what joins first is what scores best."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    score = {t: s for t, s, k in zip(tokens, meta["tokenizer.ggml.scores"], types, strict=True) if k == NORMAL}
    merges = [
        (score[whole], score[whole[:at]], score[whole[at:]], whole[:at], whole[at:])
        for whole in score for at in range(1, len(whole)) if whole[:at] in score and whole[at:] in score
    ]  # fmt: skip
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    made = fallback(meta, [merge[3:] for merge in merges])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([made.decoder, decoders.Strip(" ", 1, 0)])
    return made


def gemma(name: str, meta: dict) -> Tokenizer:
    made = fallback(meta, [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]])
    made.normalizer = normalizers.Replace(" ", "▁")
    return made


def fallback(meta: dict, merges: list[tuple[str, str]]) -> Tokenizer:
    """Merges over characters; one without a token of its own becomes its bytes."""
    vocabulary = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    unknown = named(meta, "unknown")
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


@functools.cache
def header(name: str) -> dict:
    """The file's key-values. gguf's own reader takes 17 s for Gemma's vocabulary, this 0.4 s."""
    data, at = path(name).read_bytes(), 0

    def take(form: str) -> tuple:
        nonlocal at
        at += struct.calcsize("<" + form)
        return struct.unpack_from("<" + form, data, at - struct.calcsize("<" + form))

    def value(kind: int):
        if kind == 8:  # text
            return take(f"{take('Q')[0]}s")[0].decode()
        if kind == 9:  # array
            of, count = take("IQ")
            return list(take(f"{count}{SCALARS[of]}")) if of in SCALARS else [value(of) for _ in range(count)]
        return take(SCALARS[kind])[0]

    fields = take("4sIQQ")[3]
    return {value(8): value(take("I")[0]) for _ in range(fields)}
