"""Read the config.json of a model folder, and refuse a damaged one and what the pinned llama.cpp cannot convert."""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError, printable_line
from pipeline.config.schema import Base

# The keys of a config.json, or of its text_config, from which memory and steps are computed.
DIMENSION_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder.

    Raises:
        UserError: The file is damaged, or has values that no model has.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        fault = find_config_fault(config)
    except (OSError, ValueError, RecursionError) as error:
        fault = getattr(error, "strerror", None) or str(error)
    if fault:
        raise UserError(
            f"base.model: {path} cannot be used: {printable_line(fault, 200)}",
            "download the model again, or set a different base.model",
            code="base_model.bad_config",
        )
    return config


def find_config_fault(config: object) -> str | None:
    """Return what is wrong with a config.json; None if nothing is."""
    if not isinstance(config, dict):
        return "it is not a JSON object"
    names, text_config = config.get("architectures"), config.get("text_config", config)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return f"architectures is {str(names)[:60]}, not a list of names"
    if not isinstance(config.get("model_type", ""), str) or not isinstance(text_config, dict):
        return "model_type is not a name, or text_config is not an object"
    for key in DIMENSION_KEYS:
        for value in (section.get(key) for section in (config, text_config)):
            if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
                return f"{key} is {str(value)[:60]}"
    return None


def read_architecture(folder: Path) -> str:
    """Return `architectures[0]` of the config.json of a model folder, such as LlamaForCausalLM."""
    return read_config(folder)["architectures"][0]


def refuse_unknown_architecture(name: str, model: str) -> None:
    """Raise UserError when the converter of the pinned llama.cpp does not know the architecture."""
    from pipeline.toolchain import llama_tools

    if not llama_tools.is_set_up():  # a laptop that only makes rows
        return
    architectures = llama_tools.list_architectures()
    if name not in architectures:
        raise UserError(
            f"{model}: the pinned llama.cpp ({llama_tools.describe_version()}) cannot convert the architecture {name}",
            f"choose a base model with one of its {len(architectures)} architectures, "
            "such as LlamaForCausalLM, Gemma2ForCausalLM or Qwen3ForCausalLM",
            code="base_model.unknown_architecture",
        )


@contextlib.contextmanager
def explain_damaged_model(folder: Path) -> Iterator[None]:
    """Translate what transformers raises for a damaged tokenizer or config.json to UserError.

    transformers lets the errors of every library through, so all of them are caught, except a full disk.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"base.model: the tokenizer or config.json in {folder} cannot be read: {printable_line(first_line, 200)}",
            "download the model again, or set a different base.model",
            code="base_model.unreadable",
        ) from error


def refuse_unsupported_base(base: Base) -> None:
    """Raise UserError when the config names an architecture that llama.cpp cannot convert, before any download."""
    if base.architecture:
        refuse_unknown_architecture(base.architecture, base.model)


def describe_tokenizer_fallback(folder: Path) -> str | None:
    """Return a note if llama.cpp's converter reads the tokenizer of a base model by its fallback, else None."""
    path = folder / "tokenizer.json"
    if not folder.is_dir() or (folder / "tokenizer.model").is_file() or not path.is_file():
        return None
    model = files.read_json(path).get("model", {})
    if not (model.get("byte_fallback") or model.get("type") == "Unigram"):  # it was not made by SentencePiece
        return None
    return (
        "the base model has no tokenizer.model: llama.cpp's converter falls back to tokenizer.json; "
        "verify compares every token id, and refuses the file if they differ"
    )
