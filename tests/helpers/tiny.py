"""Tiny base models of every family that Ferry meets: random weights, the family's own class and kinds of files.

Training, export and llama.cpp meet in them what the real ones hold: rope scaling, sliding windows, soft caps, q/k norms,
biases, fused projections, tied and untied embeddings, and each kind of tokenizer. Only what they say means nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.toolchain import llama_tools
from tests.helpers import vocabularies

if TYPE_CHECKING:
    import torch

# Rows of 256 weights: a k-quant's block. What the real ones begin far out (windows, Llama's rope scaling) begins within a
# short text here, so that a runtime that ignores it gives itself away.
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PHI_3 = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
    "short_factor": [1 + i / 40 for i in range(32)], "long_factor": [1 + 2 * i for i in range(32)],
}  # fmt: skip
NEAR, FAR = ({"rope_type": "default", "rope_theta": theta} for theta in (10000.0, 1000000.0))
WINDOW = {"query_pre_attn_scalar": 64, "sliding_window": 32}

# Piece types. To Gemma's SentencePiece the turns are words: only tokenizer_config.json calls them special.
GEMMA = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 2, "<mask>": 4, "<start_of_turn>": 4, "<end_of_turn>": 4}
QWEN = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)
QWEN_WORDS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
)
QWEN_3_WORDS = QWEN_WORDS + " <tool_response> </tool_response> <think> </think>"

# The templates of Mistral 7B Instruct v0.2 and (its part for text) of Gemma 3: llama.cpp carries neither.
TURNS = (
    "{% for message in said %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set said = messages %}" + TURNS + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% set said = messages %}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set said = messages[1:] %}{% endif %}" + TURNS + "{{ "
    "'<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ system if loop.first else '' }}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What the files on the Hub say."""

    model: str
    tokenizer: str  # tokenizer_class, which transformers 5 overrules for some
    template: str  # a file of llama.cpp's models/templates, or the text
    ends: tuple[str, ...]  # where generation stops; the first one is the tokenizer's EOS
    config: dict
    bos: str | None = None
    pad: str | None = None
    add_bos: bool = True


FAMILIES = {
    "llama-3": Family(
        "LlamaForCausalLM", "PreTrainedTokenizerFast", "meta-llama-Llama-3.2-3B-Instruct.jinja", ("<|eot_id|>", "<|end_of_text|>"),
        {"rope_parameters": LLAMA_3, "tie_word_embeddings": True}, "<|begin_of_text|>",
    ),
    "mistral": Family(
        "MistralForCausalLM", "LlamaTokenizer", MISTRAL, ("</s>",), {"rope_parameters": FAR, "sliding_window": None}, "<s>"
    ),
    "gemma-2": Family(
        "Gemma2ForCausalLM", "GemmaTokenizer", "google-gemma-2-2b-it.jinja", ("<eos>", "<end_of_turn>"), WINDOW, "<bos>", "<pad>"
    ),
    "gemma-3": Family(  # every sixth layer is global, with a rope of its own
        "Gemma3ForCausalLM", "GemmaTokenizer", GEMMA_3, ("<eos>", "<end_of_turn>"),
        WINDOW | {"num_hidden_layers": 6, "rope_parameters": {"sliding_attention": NEAR, "full_attention": FAR}}, "<bos>", "<pad>",
    ),
    "qwen-2": Family(  # more rows than tokens, as in the real one
        "Qwen2ForCausalLM", "Qwen2Tokenizer", "Qwen-Qwen2.5-7B-Instruct.jinja", ("<|im_end|>", "<|endoftext|>"),
        {"rope_parameters": FAR, "tie_word_embeddings": True, "vocab_size": 151936}, None, "<|endoftext|>", False,
    ),
    "qwen-3": Family(
        "Qwen3ForCausalLM", "Qwen2Tokenizer", "Qwen-Qwen3-0.6B.jinja", ("<|im_end|>", "<|endoftext|>"),
        {"rope_parameters": FAR, "tie_word_embeddings": True, "vocab_size": 151936}, None, "<|endoftext|>", False,
    ),
    "phi-3": Family(
        "Phi3ForCausalLM", "LlamaTokenizer", "microsoft-Phi-3.5-mini-instruct.jinja", ("<|endoftext|>", "<|end|>", "<|assistant|>"),
        {"rope_parameters": PHI_3, "original_max_position_embeddings": 4096, "max_position_embeddings": 131072},
        "<s>", "<|endoftext|>", False,
    ),
}  # fmt: skip


def base(name: str, folder: Path) -> Path:
    """Write the model and its tokenizer into `folder`, as they lie on the Hub."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    write_model(family, write_tokenizer(family, vocabulary(name, folder), folder), folder)
    return folder


def vocabulary(name: str, folder: Path) -> Tokenizer:
    """Llama's and Qwen's are the real ones: the converter knows them by the ids that they give to a text.

    The others are Llama 2's words, and a tokenizer.model, which the converter reads instead of tokenizer.json.
    """
    if name == "llama-3":
        return vocabularies.core("llama-bpe")
    if name.startswith("qwen"):
        return qwen(QWEN_3_WORDS if name == "qwen-3" else QWEN_WORDS)
    if name.startswith("gemma"):
        return gemma(folder)
    write_pieces(vocabularies.header("llama-spm"), folder, prefix=True)
    return vocabularies.core("phi-3" if name == "phi-3" else "llama-spm")


def qwen(words: str) -> Tokenizer:
    meta = vocabularies.header("qwen2")
    tokens = meta["tokenizer.ggml.tokens"]
    # Behind its special tokens the file holds only padding.
    made = vocabularies.byte_level("qwen2", meta | {"tokenizer.ggml.tokens": tokens[: tokens.index("<|endoftext|>")]})
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN.split()])
    made.add_tokens([AddedToken(word, special=False, normalized=False) for word in words.split()])
    return made


def gemma(folder: Path) -> Tokenizer:
    """Gemma's special tokens, Llama 2's words."""
    meta = vocabularies.header("llama-spm") | {"tokenizer.ggml.unknown_token_id": list(GEMMA).index("<unk>")}
    for key, new in {"tokens": list(GEMMA), "token_type": list(GEMMA.values()), "scores": [0.0] * len(GEMMA)}.items():
        meta[f"tokenizer.ggml.{key}"] = new + meta[f"tokenizer.ggml.{key}"][3:]
    write_pieces(meta, folder, prefix=False)
    made = vocabularies.sentencepiece("gemma", meta)
    made.normalizer = normalizers.Replace(" ", "▁")  # no space is put before a text
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in GEMMA])
    return made


def write_pieces(meta: dict, folder: Path, prefix: bool) -> None:
    """tokenizer.model. prefix: a space is put before a text."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    made = ModelProto()
    made.trainer_spec.model_type, made.trainer_spec.byte_fallback = 2, True  # BPE
    made.normalizer_spec.name, made.normalizer_spec.add_dummy_prefix = "identity", prefix
    made.normalizer_spec.remove_extra_whitespaces = False
    for piece in zip(*(meta[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")), strict=True):
        made.pieces.add(**dict(zip(("piece", "score", "type"), piece, strict=True)))
    (folder / "tokenizer.model").write_bytes(made.SerializeToString())


def write_tokenizer(family: Family, core: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=family.bos, eos_token=family.ends[0], pad_token=family.pad,
        unk_token="<unk>" if "▁" in core.get_vocab() else None, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if family.add_bos:
        pair, bos = f"{family.bos} $A {family.bos}:1 $B:1", (family.bos, made.bos_token_id)
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{family.bos} $A", pair, [bos])
    file = llama_tools.require_folder() / "models" / "templates" / family.template
    made.chat_template = file.read_text(encoding="utf-8") if family.template.endswith(".jinja") else family.template
    made.save_pretrained(folder)
    # What transformers 4 wrote into the files on the Hub, and transformers 5 leaves out: the converter reads it.
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {i: {flag: getattr(token, flag) for flag in flags} for i, token in made.added_tokens_decoder.items()}
    hub = {"tokenizer_class": family.tokenizer, "add_bos_token": family.add_bos, "added_tokens_decoder": added}
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | hub, indent=2), encoding="utf-8")
    return made


def write_model(family: Family, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    import torch
    import transformers

    kind, ends = getattr(transformers, family.model), tokenizer.convert_tokens_to_ids(list(family.ends))
    roles = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    model = kind(kind.config_class(**{"vocab_size": len(tokenizer), **SHAPE, **roles, **family.config}))
    torch.manual_seed(3407)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            randomize(name, weight, gemma=family.model.startswith("Gemma"))
    model.generation_config.eos_token_id = ends
    model.to(torch.bfloat16).save_pretrained(folder)


def randomize(name: str, weight: "torch.Tensor", gemma: bool) -> None:
    """Not as a fresh model: its norms of 1, biases of 0 and near-uniform answers would hide what gets lost."""
    if weight.dim() == 2:
        weight.normal_(std=0.12 if "embed" in name or "head" in name else 1.2 / weight.shape[1] ** 0.5)
    else:
        # Gemma's embedding enters 16-fold: beside small additions to it, every token would predict itself.
        weight += 0.1 * weight.new_empty(weight.shape).normal_() + (2 if gemma and ".post_" in name else 0)
