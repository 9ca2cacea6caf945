"""Load a tokenizer of the kind that rows are tokenized with."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_fast_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Load the tokenizer in a folder. Raise UserError when it has no tokenizer.json, from which rows are tokenized."""
    # transformers would warn that torch is missing, which `data` does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"base.model: the tokenizer in {folder} cannot be converted to a tokenizer.json",
            "set a different base.model",
            code="tokenizer.not_fast",
        )
    return tokenizer
