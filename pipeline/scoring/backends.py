"""The backends that score and generate: a torch model, and a GGUF in llama.cpp. Both get the same token ids.

Both classes have these methods:

    score_rows(rows, label)           the RowScore of each row
    iter_row_scores(rows, label)      the same one by one, each with the log-probabilities at its response positions
    generate(prompts, label)          the greedy token ids for each prompt (token ids), without the end token
    decode(token_ids)                 the text of token ids
    log_probs(token_ids, positions)   the log-probabilities of the token after each position: float32, shape
                                      (len(positions), vocabulary)
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import console, llama_runtime
from pipeline.config.schema import Evaluate
from pipeline.run.records import Scores
from pipeline.run.training_rows import decode_tokens
from pipeline.scoring.heldout_scores import (
    compute_scores,
    last_answer_positions,
    prompt_ids,
    response_positions,
    select_rows_to_answer,
)
from pipeline.toolchain.finite_numbers import refuse_broken_losses

if TYPE_CHECKING:
    import numpy as np
    import torch
    from llama_cpp import Llama
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BATCH_TOKENS = 4096  # 1 GB for the demo on a CPU; larger batches were no faster there
# The limit when a GPU generates answers. A step there is bound by its kernel launches (57 ms for 11 answers of an 8B
# model on an H100) and keeps only the last logits.
ANSWER_TOKENS = 4 * BATCH_TOKENS
TIMED_PROMPTS = 3  # prompts that are answered one at a time, to measure the speed that a user sees


@dataclass(frozen=True)
class RowScore:
    """How a model scores one row with its reference answer in place."""

    loss: float
    """The sum over the response positions, in nats."""
    is_greedy_reference: bool
    """Whether the likeliest token is the reference's at every position of the last answer, its end token included. The
    greedy answer to the prompt is then the reference and need not be generated."""


def score_backend(
    backend: "Backend",
    rows: list[dict[str, Any]],
    evaluate_config: Evaluate,
    label: str,
    prompt_rows: Sequence[dict[str, Any]] = (),
) -> tuple[Scores, list[str]]:
    """Return the scores of one backend, and its greedy answers to the selected rows and to the user's own prompts."""
    row_scores = backend.score_rows(rows, label)
    return answer_and_score(backend, rows, row_scores, evaluate_config, label, prompt_rows)


def answer_and_score(
    backend: "Backend",
    rows: list[dict[str, Any]],
    row_scores: list[RowScore],
    evaluate_config: Evaluate,
    label: str,
    prompt_rows: Sequence[dict[str, Any]] = (),
) -> tuple[Scores, list[str]]:
    """Return what `score_backend` returns, from row scores that exist already.

    Raises:
        UserError: A loss is NaN or infinite.
    """
    refuse_broken_losses((row_score.loss for row_score in row_scores), label)
    judged_rows = select_rows_to_answer(rows, evaluate_config)
    is_greedy = [row_score.is_greedy_reference for row_score in row_scores[: len(judged_rows)]]
    questions = [*zip(judged_rows, is_greedy, strict=True), *((row, False) for row in prompt_rows)]
    answer_ids = generate_missing_answers(backend, questions, f"{label}: answers")
    answers = [backend.decode(token_ids[: evaluate_config.max_new_tokens]) for token_ids in answer_ids]
    losses = [row_score.loss for row_score in row_scores]
    scores = compute_scores(rows, evaluate_config, losses, answers[: len(judged_rows)])
    speed = measure_speed(backend, [prompt_ids(row) for row in rows[:TIMED_PROMPTS]])
    return scores.model_copy(update={"tokens_per_second": speed}), answers


def generate_missing_answers(
    backend: "Backend", questions: Sequence[tuple[dict[str, Any], bool]], label: str
) -> list[list[int]]:
    """Return the greedy answer to each (row, whether it is the row's reference): only the others are generated."""
    prompts = [prompt_ids(row) for row, is_greedy in questions if not is_greedy]
    generated = iter(backend.generate(prompts, label) if prompts else [])
    return [reference_ids(row) if is_greedy else next(generated) for row, is_greedy in questions]


def reference_ids(row: dict[str, Any]) -> list[int]:
    """Return the token ids of the row's last answer, without its end token."""
    return [row["input_ids"][position] for position in last_answer_positions(row)[:-1]]


def measure_speed(backend: "Backend", prompts: list[list[int]]) -> float:
    """Return the generated tokens per second, one prompt at a time; the time to read the prompt is included."""
    start_time, token_count = time.perf_counter(), 0
    for prompt in prompts:
        token_count += len(backend.generate([prompt])[0]) + 1
    return round(token_count / (time.perf_counter() - start_time), 1)


class TorchBackend:
    """A model in torch: the base model, the adapter or the merged model."""

    def __init__(
        self,
        model: "PeftModel | PreTrainedModel",
        tokenizer: "PreTrainedTokenizerFast",
        max_new_tokens: int,
        end_tokens: list[str],
    ):
        """Wrap a loaded model.

        Args:
            model: The model in torch.
            tokenizer: Its tokenizer.
            max_new_tokens: The limit for one answer.
            end_tokens: The tokens besides EOS that end an answer (a chat template may end turns with another token).
        """
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        end_ids = tokenizer.convert_tokens_to_ids(end_tokens)
        self.end_ids = sorted({tokenizer.eos_token_id, *end_ids})  # type: ignore[misc]  # a list of tokens gives a list
        # generate() passes the last position as a strided view, and torch then copies the head's weights once per row:
        # 9.6 s instead of 4.8 to 5.9 s, and 2.2 GB more, measured for 40 rows of the demo on a CPU.
        model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))

    def close(self) -> None:
        """Free the GPU memory: torch keeps what it once allocated, and llama.cpp needs it next."""
        import torch

        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def score_rows(self, rows: list[dict[str, Any]], label: str) -> list[RowScore]:
        """Return the score of each row."""
        return self._run_in_batches([row["input_ids"] for row in rows], rows, self._score_batch, label)

    def generate(self, prompts: list[list[int]], label: str = "") -> list[list[int]]:
        """Return the greedy answer to each prompt, without its end token; `label` titles the progress bar."""
        max_tokens = ANSWER_TOKENS if self.model.device.type == "cuda" else BATCH_TOKENS
        return self._run_in_batches(prompts, prompts, self._generate_batch, label, max_tokens)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids."""
        return decode_tokens(self.tokenizer, token_ids)

    def _run_in_batches(
        self,
        token_ids: list[list[int]],
        items: list,
        process_batch: Callable[[list], list],
        label: str,
        max_tokens: int = BATCH_TOKENS,
    ) -> list:
        """Run a function on batches of items and return all results.

        Args:
            token_ids: The token ids of each item, from which the batch size follows.
            items: What the function gets.
            process_batch: A function from a batch of items to their results.
            label: The title of the progress bar; "" shows none.
            max_tokens: The largest batch in tokens, padding and answers included.
        """
        batch_size = max(1, max_tokens // (max(map(len, token_ids)) + self.max_new_tokens))
        results: list = []
        with console.show_progress(len(items), label, show=bool(label)) as advance:
            for start in range(0, len(items), batch_size):
                results += process_batch(items[start : start + batch_size])
                advance(len(items[start : start + batch_size]))
        return results

    def _generate_batch(self, prompts: list[list[int]]) -> list[list[int]]:
        import torch

        token_ids, mask, longest = self._pad_left(prompts)
        with torch.inference_mode():
            generated = self.model.generate(  # type: ignore[operator]  # torch's Module takes it for a submodule
                input_ids=token_ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.end_ids,
            )
        return [self._cut_at_end(row[longest:].tolist()) for row in generated]

    def _score_batch(self, rows: list[dict[str, Any]]) -> list[RowScore]:
        import torch

        token_ids, mask, longest = self._pad_left([row["input_ids"] for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # padding on the left must not shift a row's positions
        with torch.inference_mode():
            logits = self.model(input_ids=token_ids, attention_mask=mask, position_ids=positions).logits
        return [self._score_row(logits[i, longest - len(row["input_ids"]) :], row) for i, row in enumerate(rows)]

    def _score_row(self, logits: "torch.Tensor", row: dict[str, Any]) -> RowScore:
        """Return the score of a row from its logits, which have the shape (tokens of the row, vocabulary)."""
        import torch

        positions = response_positions(row)
        reference_ids = torch.tensor([row["input_ids"][position] for position in positions], device=logits.device)
        log_probs = logits[[position - 1 for position in positions]].float().log_softmax(-1)
        loss = -log_probs.gather(1, reference_ids[:, None]).sum().item()
        return RowScore(loss, is_greedy_reference(row, positions, log_probs.argmax(-1).tolist(), self.end_ids))

    def iter_row_scores(self, rows: list[dict[str, Any]], label: str) -> "Iterator[tuple[RowScore, np.ndarray]]":
        """Yield the score of each row, and the log-probabilities at its response positions."""
        return iter_row_scores(self, rows, label, self.end_ids)

    def log_probs(self, token_ids: list[int], positions: Sequence[int]) -> "np.ndarray":
        """Return the log-probabilities of the token after each position, shape (len(positions), vocabulary)."""
        import torch

        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([token_ids], device=self.model.device)).logits[0]
            return logits[list(positions)].float().log_softmax(-1).cpu().numpy()

    def _pad_left(self, rows: list[list[int]]) -> tuple["torch.Tensor", "torch.Tensor", int]:
        """Return token ids and attention mask, padded on the left, each of shape (rows, longest); and longest."""
        import torch

        longest = max(map(len, rows))
        token_ids = [[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(token_ids, device=self.model.device), torch.tensor(mask, device=self.model.device), longest

    def _cut_at_end(self, token_ids: list[int]) -> list[int]:
        """Return the token ids before the first end token."""
        return token_ids[: next((i for i, token in enumerate(token_ids) if token in self.end_ids), len(token_ids))]


class LlamaCppBackend:
    """A GGUF in llama.cpp; one file is open at a time."""

    def __init__(self, path: Path, context: int, max_new_tokens: int):
        """Load a GGUF; `context` has at least the tokens of the longest row, an answer at most `max_new_tokens`."""
        self.model: Llama = llama_runtime.load_model(path, context, allow_partial_offload=True)
        self.max_new_tokens = max_new_tokens

    def score_rows(self, rows: list[dict[str, Any]], label: str) -> list[RowScore]:
        """Return the score of each row."""
        return [row_score for row_score, _ in self.iter_row_scores(rows, label)]

    def iter_row_scores(self, rows: list[dict[str, Any]], label: str) -> "Iterator[tuple[RowScore, np.ndarray]]":
        """Yield the score of each row, and the log-probabilities at its response positions."""
        return iter_row_scores(self, rows, label, llama_runtime.end_tokens(self.model))

    def generate(self, prompts: list[list[int]], label: str = "") -> list[list[int]]:
        """Return the greedy answer to each prompt, without its end token; `label` titles the progress bar."""
        with console.show_progress(len(prompts), label, show=bool(label)) as advance:
            answers = llama_runtime.generate_greedy_answers(self.model, prompts, self.max_new_tokens, advance=advance)
            return [token_ids for token_ids, _ in answers]

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids."""
        return llama_runtime.detokenize(self.model, token_ids)

    def log_probs(self, token_ids: list[int], positions: Sequence[int]) -> "np.ndarray":
        """Return the log-probabilities of the token after each position, shape (len(positions), vocabulary)."""
        return llama_runtime.next_token_log_probs(self.model, token_ids, positions)


Backend = TorchBackend | LlamaCppBackend


def iter_row_scores(
    backend: "Backend", rows: list[dict[str, Any]], label: str, end_ids: Sequence[int]
) -> "Iterator[tuple[RowScore, np.ndarray]]":
    """Yield the score of each row, and the log-probabilities at its response positions: shape (positions, vocabulary).

    `end_ids` are the tokens that end an answer.
    """
    with console.show_progress(len(rows), label) as advance:
        for row in rows:
            positions = response_positions(row)
            log_probs = backend.log_probs(row["input_ids"], [position - 1 for position in positions])
            loss = -sum(float(log_probs[i, row["input_ids"][position]]) for i, position in enumerate(positions))
            yield RowScore(loss, is_greedy_reference(row, positions, log_probs.argmax(-1).tolist(), end_ids)), log_probs
            advance(1)


def is_greedy_reference(
    row: dict[str, Any], positions: list[int], likeliest: list[int], end_ids: Sequence[int]
) -> bool:
    """Return whether the last answer of a row is what the model would generate greedily.

    Args:
        row: The row with its reference answer.
        positions: Its response positions.
        likeliest: The likeliest token at each of `positions`, given all tokens before it.
        end_ids: The tokens that end an answer.
    """
    last_answer = last_answer_positions(row)
    if not last_answer or last_answer[0] != row["prompt_tokens"] or row["input_ids"][last_answer[-1]] not in end_ids:
        return False
    return all(
        token == row["input_ids"][position]
        for position, token in zip(positions, likeliest, strict=True)
        if position <= last_answer[-1] and position >= last_answer[0]
    )
