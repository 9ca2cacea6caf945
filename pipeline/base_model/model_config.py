"""A model folder's config.json: read it, and refuse what no model is or what the pinned llama.cpp does not convert."""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path

from common import files
from common.errors import UserError, shown
from pipeline.config.schema import Base

# Of a config.json, or of its text_config: what memory and steps are computed from.
DIMENSIONS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip


def read_config(folder: Path) -> dict:
    """Return a model folder's config.json. Raises UserError where it is damaged, or says what no model is."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        fault = find_config_fault(config)
    except (OSError, ValueError, RecursionError) as error:
        fault = getattr(error, "strerror", None) or str(error)
    if fault:
        raise UserError(
            f"base.model: {path} cannot be used: {shown(fault, 200)}", "fetch the model again, or name another one"
        )
    return config


def find_config_fault(config: object) -> str | None:
    """Return what is wrong with a config.json; None where nothing is."""
    if not isinstance(config, dict):
        return "it holds no object"
    names, text = config.get("architectures"), config.get("text_config", config)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return f"architectures is {str(names)[:60]}, not a list of names"
    if not isinstance(config.get("model_type", ""), str) or not isinstance(text, dict):
        return "model_type is no name, or text_config no object"
    for key in DIMENSIONS:
        for value in (place.get(key) for place in (config, text)):
            if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
                return f"{key} is {str(value)[:60]}"
    return None


def read_architecture(folder: Path) -> str:
    """`architectures[0]` of a model folder's config.json, such as LlamaForCausalLM."""
    return read_config(folder)["architectures"][0]


def refuse_unknown_architecture(name: str, model: str) -> None:
    """Raises UserError when the pinned llama.cpp converter does not know the architecture."""
    from pipeline.toolchain import llama_tools

    if not llama_tools.there():  # a laptop that only makes rows
        return
    known = llama_tools.architectures()
    if name not in known:
        raise UserError(
            f"{model}: the pinned llama.cpp ({llama_tools.version()}) cannot convert the architecture {name}",
            f"choose a base model with one of its {len(known)} architectures, such as LlamaForCausalLM, Gemma2ForCausalLM or Qwen3ForCausalLM",
        )


@contextlib.contextmanager
def explain_damaged_model(folder: Path) -> Iterator[None]:
    """What transformers makes of a damaged tokenizer or config.json, as a UserError: it lets every library's errors through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        last = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"base.model: the tokenizer or config.json in {folder} cannot be read: {shown(last, 200)}",
            "fetch the model again, or name another one",
        ) from error


def refuse_unsupported_base(base: Base) -> None:
    """Raise UserError when the config names an architecture that llama.cpp does not convert: before anything is downloaded."""
    if base.architecture:
        refuse_unknown_architecture(base.architecture, base.model)


def describe_tokenizer_fallback(folder: Path) -> str | None:
    """What to know of a base whose tokenizer llama.cpp's converter reads by a fallback; None where it does not."""
    path = folder / "tokenizer.json"
    if not folder.is_dir() or (folder / "tokenizer.model").is_file() or not path.is_file():
        return None
    model = files.read_json(path).get("model", {})
    if not (model.get("byte_fallback") or model.get("type") == "Unigram"):  # not made by SentencePiece
        return None
    return (
        "the base has no tokenizer.model: llama.cpp's converter falls back to tokenizer.json; verify compares every token id, "
        "and refuses the file if they differ"
    )
