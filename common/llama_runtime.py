"""llama.cpp through llama-cpp-python: the same runtime on the GPU side and on the Mac.

It takes token ids only. The caller renders and tokenizes the prompt once, so that the model never sees a chat format
that a library guessed.
"""

import contextlib
import ctypes
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from llama_cpp import Llama
    from llama_cpp.llama_cpp import llama_batch, llama_context_p


LAYER_SHARES = (0.75, 0.5, 0.25, 0)  # shares of the layers to try, where a GPU cannot hold them all


def load_model(
    gguf: Path,
    context: int = 1024,
    vocab_only: bool = False,
    allow_partial_offload: bool = False,
    log: io.StringIO | None = None,
) -> "Llama":
    """Load a GGUF, with every layer on the GPU where there is one.

    Args:
        gguf: the file.
        context: tokens of the longest text that is given to `next_token_log_probs`.
        vocab_only: load the vocabulary and no weights.
        allow_partial_offload: where the GPU's memory is too small, compute some of the layers on the CPU.
        log: receives the messages of llama.cpp while it loads.

    Raises:
        UserError: the file is missing, or llama.cpp cannot load it.
    """
    import llama_cpp

    if not gguf.is_file():
        raise UserError(f"{gguf} is missing", "run the stage that writes it again", code="file.missing")
    layer_counts = [-1]
    if allow_partial_offload and llama_cpp.llama_supports_gpu_offload():
        total_layers = _count_layers(gguf)
        layer_counts += [int(share * total_layers) for share in LAYER_SHARES]
    messages = log or io.StringIO()  # without a log the messages matter only when loading fails
    for layer_count in layer_counts:
        try:
            with contextlib.redirect_stderr(messages):
                return _open_model(gguf, context, vocab_only, layer_count, log is not None)
        except ValueError as error:
            last_error = error
    reasons = messages.getvalue().strip().splitlines()[-1:] or [str(last_error)]
    raise UserError(
        f"llama.cpp cannot load {gguf}: {reasons[0]}",
        "make or pull it again if it is damaged; close other programs or use a shorter context if memory is too small",
        code="gguf.not_loadable",
    ) from last_error


def _open_model(gguf: Path, context: int, vocab_only: bool, layers: int, verbose: bool) -> "Llama":
    from llama_cpp import Llama, _logger

    with _ignore_chat_templates():
        model = Llama(
            str(gguf),
            n_ctx=context,
            n_batch=context,
            n_gpu_layers=layers,
            n_threads=os.cpu_count(),
            vocab_only=vocab_only,
            flash_attn=True,
            verbose=verbose,
        )
    model.verbose = False
    _logger.set_verbose(False)
    return model


class _NoChatFormatter:
    """Takes the place of llama-cpp-python's formatter, and compiles nothing."""

    def __init__(self, **_: object): ...

    def to_chat_handler(self) -> None: ...


@contextlib.contextmanager
def _ignore_chat_templates() -> Iterator[None]:
    """Keep llama-cpp-python from compiling the chat templates of a file while a model is loaded.

    They are programs in an untrusted file, and Ferry renders prompts itself.
    """
    from llama_cpp import llama_chat_format

    formatter = llama_chat_format.Jinja2ChatFormatter
    llama_chat_format.Jinja2ChatFormatter = _NoChatFormatter  # type: ignore[misc,assignment]  # replaced on purpose
    try:
        yield
    finally:
        llama_chat_format.Jinja2ChatFormatter = formatter  # type: ignore[misc]  # the original again


def compute_device() -> str:
    """Return what llama.cpp computes on here: 'Metal', 'CUDA', another kind of GPU, or 'CPU'."""
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        return "CPU"
    system_info = llama_cpp.llama_print_system_info().decode()
    gpu_names = [name for name in ("Metal", "CUDA", "ROCm", "Vulkan", "SYCL") if name.lower() in system_info.lower()]
    return gpu_names[0] if gpu_names else "GPU"


def _count_layers(gguf: Path) -> int:
    """Return the model's number of layers; llama_model_n_layer knows it only after the weights are loaded."""
    model = load_model(gguf, vocab_only=True)
    try:
        return int(model.metadata[f"{model.metadata['general.architecture']}.block_count"])
    finally:
        model.close()


def tokenize(model: "Llama", text: str) -> list[int]:
    """Return the token ids of rendered text; special tokens in it are recognised, and none are added."""
    return model.tokenize(text.encode(), add_bos=False, special=True)


def next_token_log_probs(
    model: "Llama", token_ids: Sequence[int], positions: Sequence[int] | None = None
) -> "np.ndarray":
    """Return the natural-log probabilities of the next token after token_ids[p], for every p of `positions`.

    Args:
        model: the loaded model.
        token_ids: the text.
        positions: indices into `token_ids`; None: all of them.

    Returns:
        float32 of shape (len(positions), vocabulary), from the logits of one llama_decode over `token_ids` with an
        empty cache.
    """
    import numpy as np

    positions = range(len(token_ids)) if positions is None else positions
    _clear_cache(model)
    with _create_batch(len(token_ids)) as batch:
        wanted_positions = set(positions)
        for position, token in enumerate(token_ids):
            _add_token(batch, token, position, position in wanted_positions)
        _decode_batch(model.ctx, batch)
        # One position at a time, because half a megabyte stays in the processor's cache: 0.18 ms instead of 0.5 to
        # 1.8 ms for a vocabulary of 128k tokens.
        size = model.n_vocab()
        values, scratch = np.empty((len(positions), size), np.float32), np.empty(size, np.float32)
        for row, position in zip(values, positions, strict=True):
            logits = _read_logits(model.ctx, position, size)
            np.subtract(logits, logits.max(), out=row)
            row -= np.log(np.exp(row, out=scratch).sum())
    return values


def token_log_probs(model: "Llama", token_ids: Sequence[int], positions: Sequence[int]) -> list[float]:
    """Return the natural-log probability of token_ids[p], given all before it, for every p of `positions` (>= 1)."""
    rows = next_token_log_probs(model, token_ids, [position - 1 for position in positions])
    return [float(row[token_ids[position]]) for row, position in zip(rows, positions, strict=True)]


def answer_log_probs(model: "Llama", prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Return the natural-log probability of each token of `answer` after `prompt`, rounded to 4 digits."""
    positions = range(len(prompt), len(prompt) + len(answer))
    return [round(value, 4) for value in token_log_probs(model, [*prompt, *answer], positions)]


def generate_greedy(model: "Llama", token_ids: Sequence[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """Return the greedy continuation of `token_ids`, and the end token that the model closed it with: [token] or []."""
    return generate_greedy_answers(model, [token_ids], max_tokens)[0]


def generate_greedy_answers(
    model: "Llama",
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    advance: Callable[[float], object] = lambda count: None,
) -> list[tuple[list[int], list[int]]]:
    """Return the result of `generate_greedy` for each of `prompts`; call `advance(1)` after each of them.

    Answers are generated one at a time, as users ask a runtime. Eight at once are 1.7 times as fast on two cores, but
    they round differently, which changed 2 of 24 answers of a model trained for 30 steps. End tokens are all tokens
    that llama.cpp stops at (EOS, and ends of turns such as <end_of_turn>), as in every runtime built on it.
    """
    longest_prompt = max(map(len, prompts))
    results = []
    with _create_context(model, longest_prompt + max_tokens) as ctx, _create_batch(longest_prompt) as batch:
        for prompt in prompts:
            results.append(_generate_answer(model, ctx, batch, prompt, max_tokens))
            advance(1)
    return results


def _generate_answer(
    model: "Llama", ctx: "llama_context_p", batch: "llama_batch", prompt: Sequence[int], max_tokens: int
) -> tuple[list[int], list[int]]:
    """Return one greedy answer and its end token, in a context and a batch that earlier answers have used."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), True)
    vocabulary, vocabulary_size = llama_cpp.llama_model_get_vocab(model.model), model.n_vocab()
    next_tokens, position = list(prompt), 0
    answer: list[int] = []
    while len(answer) < max_tokens:
        batch.n_tokens = 0
        for token in next_tokens:
            _add_token(batch, token, position, position + 1 == len(prompt) + len(answer))
            position += 1
        _decode_batch(ctx, batch)
        token = int(_read_logits(ctx, batch.n_tokens - 1, vocabulary_size).argmax())
        if llama_cpp.llama_vocab_is_eog(vocabulary, token):
            return answer, [token]
        answer.append(token)
        next_tokens = [token]
    return answer, []


def end_tokens(model: "Llama") -> list[int]:
    """Return the ids of all tokens that llama.cpp stops at."""
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    return [token for token in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)]


@contextlib.contextmanager
def _create_context(model: "Llama", max_tokens: int) -> Iterator["llama_context_p"]:
    """Create a separate llama_context for up to `tokens` tokens; free it at the end."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = -(-max_tokens // 256) * 256
    # Another attention rounds differently, which decides near ties.
    params.flash_attn_type = model.context_params.flash_attn_type
    params.n_threads = params.n_threads_batch = os.cpu_count()
    ctx = llama_cpp.llama_init_from_model(model.model, params)
    if not ctx:
        raise UserError(
            f"not enough memory for a context of {max_tokens} tokens",
            "lower evaluate.max_new_tokens",
            code="memory.context_too_long",
        )
    try:
        yield ctx
    finally:
        llama_cpp.llama_free(ctx)


def measure_decode_speed(model: "Llama", token_ids: Sequence[int], batch_size: int, seconds: float = math.inf) -> float:
    """Decode `token_ids` in batches from an empty context and return the tokens per second; stop after `seconds`."""
    _clear_cache(model)
    with _create_batch(batch_size) as batch:
        start_time, done = time.perf_counter(), 0
        while done < len(token_ids) and time.perf_counter() - start_time < seconds:
            batch.n_tokens = 0
            for position, token in enumerate(token_ids[done : done + batch_size], done):
                _add_token(batch, token, position, position + 1 in (len(token_ids), done + batch_size))
            _decode_batch(model.ctx, batch)
            _read_logits(model.ctx, batch.n_tokens - 1, model.n_vocab())  # waits until a GPU has finished
            done += batch.n_tokens
        rate = done / (time.perf_counter() - start_time)
    _clear_cache(model)
    return rate


@contextlib.contextmanager
def _create_batch(max_tokens: int) -> Iterator["llama_batch"]:
    """Create a llama_batch for up to `tokens` tokens; free it at the end."""
    import llama_cpp

    batch = llama_cpp.llama_batch_init(max_tokens, 0, 1)
    try:
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)


def _add_token(batch: "llama_batch", token: int, position: int, logits: bool) -> None:
    """Append a token at `position` of sequence 0; `logits`: whether its logits are wanted."""
    i = batch.n_tokens
    batch.token[i], batch.n_seq_id[i], batch.logits[i] = token, 1, logits
    batch.pos[i] = position  # type: ignore[call-overload]  # llama-cpp-python says that each item is an array
    batch.seq_id[i][0] = 0
    batch.n_tokens += 1


def _clear_cache(model: "Llama") -> None:
    """Empty the cache, and llama-cpp-python's own record of what is in it."""
    import llama_cpp

    model.reset()  # type: ignore[no-untyped-call]  # llama-cpp-python has no types there
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)


def _decode_batch(ctx: "llama_context_p", batch: "llama_batch") -> None:
    import llama_cpp

    if code := llama_cpp.llama_decode(ctx, batch):
        raise RuntimeError(f"llama_decode returned {code} for {batch.n_tokens} tokens")


def _read_logits(ctx: "llama_context_p", index: int, vocabulary_size: int) -> "np.ndarray":
    """Return the logits after the token at `index`: a float32 view of shape (vocabulary,), until the next decode."""
    import llama_cpp
    import numpy as np

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, index), shape=(vocabulary_size,))


def token_bytes(model: "Llama", token: int, buffer_bytes: int = 256) -> bytes:
    """Return the bytes that a token adds to the text.

    The library's own detokenize has room for 32 bytes, so that Llama 3's long indents are lost.
    """
    import llama_cpp

    vocabulary, buffer = llama_cpp.llama_model_get_vocab(model.model), ctypes.create_string_buffer(buffer_bytes)
    length = llama_cpp.llama_token_to_piece(vocabulary, token, buffer, buffer_bytes, 0, False)
    return buffer.raw[:length] if length >= 0 else token_bytes(model, token, -length)


def detokenize(model: "Llama", token_ids: Sequence[int]) -> str:
    """Return the text of generated ids; an incomplete character at the end becomes U+FFFD."""
    return b"".join(token_bytes(model, token) for token in token_ids).decode("utf-8", errors="replace")
