"""llama.cpp through llama-cpp-python: the same runtime on the cloud side and on the Mac.

Only token ids go in: the prompt is rendered and tokenized once, by whoever calls, and what the model sees
is never a chat format guessed by a library.
"""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contract.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from llama_cpp import Llama


def load(gguf: Path, context: int = 1024, vocab_only: bool = False, all_logits: bool = False) -> "Llama":
    """Open a GGUF, every layer on the GPU where there is one.

    context: tokens. all_logits: keep the logits of every position (for log_probs), not only the last.
    Raises UserError when the file is missing or llama.cpp refuses it.
    """
    from llama_cpp import Llama

    if not gguf.is_file():
        raise UserError(f"{gguf} is missing", "run the stage that writes it again")
    said = io.StringIO()  # what llama.cpp prints while it loads matters only when it fails
    try:
        with contextlib.redirect_stderr(said):
            return Llama(
                str(gguf),
                n_ctx=context,
                n_batch=context,
                n_gpu_layers=-1,
                n_threads=os.cpu_count(),
                vocab_only=vocab_only,
                logits_all=all_logits,
                verbose=False,
            )
    except ValueError as error:
        why = said.getvalue().strip().splitlines()[-1:] or [str(error)]
        raise UserError(
            f"llama.cpp cannot load {gguf}: {why[0]}",
            "the file is damaged or its architecture is not supported: make or pull it again",
        ) from error


def tokenize(model: "Llama", text: str) -> list[int]:
    """Token ids of rendered text: special tokens recognised, none added."""
    return model.tokenize(text.encode(), add_bos=False, special=True)


def log_probs(model: "Llama", ids: Sequence[int]) -> "np.ndarray":
    """Natural-log probabilities of the next token after each id: float32, shape (len(ids), vocabulary).

    `model` was loaded with all_logits=True.
    """
    return _log_softmax(_logits(model, ids))


def token_log_probs(model: "Llama", ids: Sequence[int], positions: Sequence[int]) -> list[float]:
    """Natural-log probability of ids[p], given all before it, for every p of `positions` (1 or greater).

    `model` was loaded with all_logits=True.
    """
    rows = _log_softmax(_logits(model, ids)[[p - 1 for p in positions]])
    return [float(row[ids[p]]) for row, p in zip(rows, positions, strict=True)]


def answer_log_probs(model: "Llama", prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Natural-log probability of each token of `answer` behind `prompt`, rounded to 4 digits."""
    positions = range(len(prompt), len(prompt) + len(answer))
    return [round(value, 4) for value in token_log_probs(model, [*prompt, *answer], positions)]


def _logits(model: "Llama", ids: Sequence[int]) -> "np.ndarray":
    import numpy as np

    model.reset()
    model.eval(list(ids))
    return np.asarray(model.scores[: len(ids)], dtype=np.float32)


def _log_softmax(logits: "np.ndarray") -> "np.ndarray":
    import numpy as np

    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def greedy(model: "Llama", ids: Sequence[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """The greedy continuation of `ids`, and the end token with which the model ended it itself: [token] or [].

    End tokens are all that llama.cpp stops at (EOS, and turn ends such as <end_of_turn>), as in every runtime built on it.
    """
    import llama_cpp

    answer: list[int] = []
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    for token in model.generate(list(ids), temp=0.0, repeat_penalty=1.0):
        if llama_cpp.llama_vocab_is_eog(vocabulary, token):
            return answer, [token]
        answer.append(token)
        if len(answer) == max_tokens:
            break
    return answer, []


def text(model: "Llama", ids: Sequence[int]) -> str:
    """Decoded text of generated ids; a broken character at the cut becomes U+FFFD."""
    return model.detokenize(list(ids)).decode("utf-8", errors="replace")
