"""llama.cpp through llama-cpp-python: the same runtime on the cloud side and on the Mac.

Only token ids go in: the prompt is rendered and tokenized once, by whoever calls, and what the model sees
is never a chat format guessed by a library.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contract.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from llama_cpp import Llama


def load(gguf: Path, context: int = 1024, vocab_only: bool = False) -> "Llama":
    """Open a GGUF, every layer on the GPU where there is one.

    context: tokens of the longest text given to log_probs.
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


def log_probs(model: "Llama", ids: Sequence[int], positions: Sequence[int] | None = None) -> "np.ndarray":
    """Natural-log probabilities of the next token after ids[p], for every p of `positions` (None: all of them).

    float32, shape (len(positions), vocabulary). Source: logits of one llama_decode over `ids` with an empty cache.
    """
    import numpy as np

    positions = range(len(ids)) if positions is None else positions
    model.reset()  # its own idea of what is in the cache
    with _batch(len(ids)) as batch:
        wanted = set(positions)
        for place, token in enumerate(ids):
            _add(batch, token, place, 0, place in wanted)
        _decode(model.ctx, batch, fresh=True)
        size = _vocabulary_size(model)
        logits = np.stack([_logits(model.ctx, place, size) for place in positions])
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def token_log_probs(model: "Llama", ids: Sequence[int], positions: Sequence[int]) -> list[float]:
    """Natural-log probability of ids[p], given all before it, for every p of `positions` (1 or greater)."""
    rows = log_probs(model, ids, [p - 1 for p in positions])
    return [float(row[ids[p]]) for row, p in zip(rows, positions, strict=True)]


def answer_log_probs(model: "Llama", prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Natural-log probability of each token of `answer` behind `prompt`, rounded to 4 digits."""
    positions = range(len(prompt), len(prompt) + len(answer))
    return [round(value, 4) for value in token_log_probs(model, [*prompt, *answer], positions)]


def greedy(model: "Llama", ids: Sequence[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """The greedy continuation of `ids`, and the end token with which the model ended it itself: [token] or []."""
    return answers(model, [ids], max_tokens, parallel=1)[0]


def answers(
    model: "Llama", prompts: Sequence[Sequence[int]], max_tokens: int, parallel: int = 8, tick=lambda count: None
) -> list[tuple[list[int], list[int]]]:
    """`greedy` for many prompts, `parallel` at a time; tick is told of every finished one.

    End tokens are all that llama.cpp stops at (EOS, and turn ends such as <end_of_turn>), as in every runtime built on it.
    """
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    size, said = _vocabulary_size(model), [[] for _ in prompts]
    ended: list[list[int]] = [[] for _ in prompts]
    waiting, slots = list(enumerate(prompts))[::-1], {}
    longest = max(map(len, prompts))
    with _context(model, parallel, longest + max_tokens) as ctx, _batch(parallel * longest) as batch:
        while waiting or slots:
            batch.n_tokens = 0
            for slot in range(parallel):
                if slot in slots:
                    row = slots[slot]
                    _add(batch, said[row][-1], len(prompts[row]) + len(said[row]) - 1, slot, True)
                elif waiting:
                    row, ids = waiting.pop()
                    slots[slot] = row
                    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(ctx), slot, -1, -1)
                    for place, token in enumerate(ids):
                        _add(batch, token, place, slot, place == len(ids) - 1)
            _decode(ctx, batch)
            for place in range(batch.n_tokens):
                if not batch.logits[place]:
                    continue
                slot, token = batch.seq_id[place][0], int(_logits(ctx, place, size).argmax())
                row = slots[slot]
                if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                    ended[row] = [token]
                else:
                    said[row].append(token)
                if ended[row] or len(said[row]) == max_tokens:
                    del slots[slot]
                    tick(1)
    return list(zip(said, ended, strict=True))


def ends(model: "Llama") -> list[int]:
    """Every token that llama.cpp stops at."""
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    return [token for token in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)]


def _vocabulary_size(model: "Llama") -> int:
    return model.n_vocab()


@contextlib.contextmanager
def _context(model: "Llama", sequences: int, tokens: int) -> Iterator:
    """A llama_context of its own for several sequences of up to `tokens` tokens each."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_seq_max, params.n_ctx = sequences, sequences * (-(-tokens // 256) * 256)
    params.n_batch = params.n_ctx
    params.n_threads = params.n_threads_batch = os.cpu_count()
    ctx = llama_cpp.llama_init_from_model(model.model, params)
    if not ctx:
        raise UserError(
            f"no memory for {sequences} answers of {tokens} tokens at a time", "lower evaluate.max_new_tokens"
        )
    try:
        yield ctx
    finally:
        llama_cpp.llama_free(ctx)


@contextlib.contextmanager
def _batch(tokens: int) -> Iterator:
    import llama_cpp

    batch = llama_cpp.llama_batch_init(tokens, 0, 1)
    try:
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)


def _add(batch, token: int, place: int, sequence: int, logits: bool) -> None:
    i = batch.n_tokens
    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, 1, logits
    batch.seq_id[i][0] = sequence
    batch.n_tokens += 1


def _decode(ctx, batch, fresh: bool = False) -> None:
    import llama_cpp

    if fresh:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    if code := llama_cpp.llama_decode(ctx, batch):
        raise RuntimeError(f"llama_decode says {code} for {batch.n_tokens} tokens")


def _logits(ctx, place: int, size: int) -> "np.ndarray":
    """Logits after the batch's token at `place`: float32, shape (vocabulary,). A copy."""
    import llama_cpp
    import numpy as np

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, place), shape=(size,)).copy()


def text(model: "Llama", ids: Sequence[int]) -> str:
    """Decoded text of generated ids; a broken character at the cut becomes U+FFFD."""
    return model.detokenize(list(ids)).decode("utf-8", errors="replace")
