"""Convert a GGUF back to 16-bit weights and a tokenizer, and prove both against llama.cpp on the same file.

transformers' own conversion of a GGUF's tokenizer is silently wrong for some models (SmolLM2 becomes
SentencePiece-like), so the tokenizer is rebuilt here from the GGUF's own vocabulary and merges. It must give the same
token ids as llama.cpp, and the weights must give the same next-token distribution; otherwise the file is refused.
"""

import functools
from itertools import zip_longest
from pathlib import Path
from typing import Any

from common import files, gguf_reader
from common.errors import UserError
from contract import model_header

# The GGUF pre-tokenizers that can be rebuilt here; every other one is refused, because a guess could be wrong.
KNOWN_PRE_TOKENIZERS = {"smollm"}
# Scripts, digits, code, emoji, special tokens and spaces in every place: texts for which tokenizers differ.
PROBES = [
    "Hello, world!  Two spaces, a\ttab and\n\n\nnewlines ",
    " leading space, trailing space ",
    "On 2026-11-23 at 07:45 we paid 1234567.89 EUR (or 100%).",
    "naïve café — “quotes” … ½ ² № €, Straße, Привет, 日本語のテキスト, العربية, हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🚢, zero\u200bwidth, combining e\u0301",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment\n",
    "don't I'll we've THEY'RE o'clock CamelCase snake_case kebab-case",
    "<|im_start|>user\nWhat is 17*23?<|im_end|>\n<|im_start|>assistant\n",
    '{"desk":"lost property","booking":"K4821"}',
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file.txt",
]
# From a measurement on SmolLM2-135M (Q4_1 in llama.cpp, 8-bit activations, against bf16 weights in torch): see
# tests/pipeline/base_model/test_restore_gguf.py.
MAX_MEAN_KL = 0.05
# The key-values from which a tokenizer is rebuilt.
NEEDED_KEYS = (
    *(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown")),
)


def prepare_tokenizer(source: Path) -> Path:
    """Return a folder that AutoTokenizer loads.

    For a GGUF the tokenizer is rebuilt in the cache and proven against llama.cpp, unless it exists. No torch is needed.
    """
    if source.is_dir():
        return source
    return files.write_if_missing(_restored_folder(source) / "tokenizer", functools.partial(_write_tokenizer, source))


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    """Rebuild the tokenizer of a GGUF in `folder`, and prove it."""
    rebuild_tokenizer(gguf, folder)
    prove_tokenizer(folder, gguf)


def prepare_weights(source: Path) -> Path:
    """Return a folder that AutoModelForCausalLM loads.

    A GGUF is dequantized to bf16 in the cache and proven against llama.cpp, unless that exists.
    """
    if source.is_dir():
        return source
    return files.write_if_missing(_restored_folder(source) / "model", functools.partial(_write_model, source))


def _write_model(gguf: Path, folder: Path) -> None:
    """Restore the weights and the tokenizer of a GGUF in `folder`, and prove the weights."""
    restore_weights(gguf, folder)
    for file in prepare_tokenizer(gguf).iterdir():
        files.copy_and_hash(file, folder / file.name)
    prove_weights(folder, gguf)


def _restored_folder(gguf: Path) -> Path:
    """Return the cache folder of a GGUF; its name has the GGUF's hash."""
    return files.cache_dir() / "base" / f"{gguf.stem}-{hash_gguf(gguf)[:12]}"


def read_all_metadata(gguf: Path) -> dict[str, Any]:
    """Return the key-values of a GGUF as plain Python. Raise UserError when the file is not a GGUF."""
    from gguf import GGUFReader

    try:
        return {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    except (ValueError, OSError, IndexError) as error:
        raise UserError(
            f"{gguf} cannot be read as a GGUF: {error}", "set base.model to a different file", code="gguf.unreadable"
        ) from error


def read_metadata(gguf: Path) -> dict[str, str]:
    """Return the scalar key-values of a GGUF, without the arrays that `read_all_metadata` takes seconds for."""
    from common import llama_runtime

    read_gguf_header(gguf)
    return llama_runtime.load_model(gguf, vocab_only=True).metadata


def read_gguf_header(path: Path) -> gguf_reader.Header:
    """Return the header of a base model, someone else's file. Raise UserError when llama.cpp could not load it."""
    header = gguf_reader.read_header(path)
    model_header.refuse_impossible_header(header, path.name, made_by_ferry=False)
    return header


@functools.cache
def hash_gguf(gguf: Path) -> str:
    """Return the sha256 of a GGUF; it is computed once per process."""
    return files.sha256(gguf)


def rebuild_tokenizer(gguf: Path, folder: Path) -> None:
    """Write a fast tokenizer with the GGUF's vocabulary, merges, special tokens and chat template into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    metadata = read_all_metadata(gguf)
    refuse_unknown_tokenizer(gguf.name, metadata)
    tokens, token_types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, token_types, strict=True)
            if kind == 3
        ]
    )

    def special_token(role: str) -> str:
        return tokens[metadata[f"tokenizer.ggml.{role}_token_id"]]

    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special_token("bos"),
        eos_token=special_token("eos"),
        unk_token=special_token("unknown"),
        pad_token=special_token("unknown"),  # the GGUF pads with EOS, which would mask EOS out of the loss
        clean_up_tokenization_spaces=False,
        model_max_length=metadata[f"{metadata['general.architecture']}.context_length"],
    )
    fast_tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    folder.mkdir(parents=True, exist_ok=True)
    fast_tokenizer.save_pretrained(folder)


def refuse_unknown_tokenizer(name: str, metadata: dict[str, Any]) -> None:
    """Raise UserError for a GGUF whose tokenizer cannot be rebuilt faithfully; `metadata` has its key-values."""
    kind = metadata.get("tokenizer.ggml.model")
    kind = metadata.get("tokenizer.ggml.pre") if kind == "gpt2" else kind
    if kind not in KNOWN_PRE_TOKENIZERS:
        raise UserError(
            f"{name}: its tokenizer ({kind}) cannot be rebuilt faithfully; "
            f"known: {', '.join(sorted(KNOWN_PRE_TOKENIZERS))}",
            "set base.model to the model's 16-bit Hugging Face id",
            code="base_model.unknown_tokenizer",
        )
    if missing := [key for key in NEEDED_KEYS if key not in metadata]:
        raise UserError(
            f"{name}: its header has no {missing[0]}", "set base.model to a different file", code="gguf.missing_key"
        )


def refuse_unusable_gguf(model: str) -> None:
    """Raise UserError for a base model that is a GGUF with an unknown tokenizer.

    Only its header is read, without a library, so this takes less than a second.
    """
    path = Path(model).expanduser()
    if model.endswith(".gguf") and path.is_file():
        refuse_unknown_tokenizer(path.name, read_gguf_header(path).metadata)


def prove_tokenizer(folder: Path, gguf: Path) -> None:
    """Raise UserError unless the tokenizer in `folder` gives llama.cpp's token ids for every probe."""
    from transformers import AutoTokenizer

    from common import llama_runtime

    tokenizer, llama_model = AutoTokenizer.from_pretrained(folder), llama_runtime.load_model(gguf, vocab_only=True)
    for text in PROBES:
        rebuilt_ids, llama_ids = (
            tokenizer.encode(text, add_special_tokens=False),
            llama_runtime.tokenize(llama_model, text),
        )
        if rebuilt_ids != llama_ids:
            index = _find_first_difference(rebuilt_ids, llama_ids)
            raise UserError(
                f"{gguf.name}: the rebuilt tokenizer differs from llama.cpp's on {text!r} "
                f"at token {index} ({rebuilt_ids[index : index + 3]}, llama.cpp {llama_ids[index : index + 3]})",
                "set base.model to the model's 16-bit Hugging Face id",
                code="base_model.tokenizer_mismatch",
            )


def _find_first_difference(token_ids: list[int], other_ids: list[int]) -> int:
    """Return the index of the first token that differs between two sequences, or that only one of them has."""
    pairs = enumerate(zip_longest(token_ids, other_ids))
    return next(index for index, (token, other_token) in pairs if token != other_token)


def restore_weights(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF into bf16 safetensors with transformers' reader."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are plain bf16 now; save_pretrained refuses when these attributes say otherwise.
    model.hf_quantizer = None  # type: ignore[assignment]  # torch's Module takes every attribute for a tensor
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    metadata = read_all_metadata(gguf)
    eos, pad = metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.unknown_token_id"]
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    model.save_pretrained(folder)


def prove_weights(folder: Path, gguf: Path) -> float:
    """Return the mean KL divergence of the weights in `folder` from the GGUF.

    Raises:
        UserError: It is above MAX_MEAN_KL.
    """
    mean = measure_divergence(folder, gguf)
    if not mean <= MAX_MEAN_KL:
        raise UserError(
            f"{gguf.name}: the restored weights differ from llama.cpp's (mean KL {mean:.3f}, at most {MAX_MEAN_KL})",
            "set base.model to the model's 16-bit Hugging Face id",
            code="base_model.weights_mismatch",
        )
    return mean


def measure_divergence(folder: Path, gguf: Path) -> float:
    """Return the mean KL divergence over PROBES of torch on the folder from llama.cpp on the GGUF, in nats."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from common import llama_runtime

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = llama_runtime.load_model(gguf)
    divergences = []
    for text in PROBES:
        token_ids = llama_runtime.tokenize(reference, text)
        expected = llama_runtime.next_token_log_probs(reference, token_ids)
        with torch.inference_mode():
            actual = model(torch.tensor([token_ids])).logits[0].log_softmax(-1).numpy()
        divergences.append((np.exp(expected) * (expected - actual)).sum(-1).mean())
    return float(np.mean(divergences))
