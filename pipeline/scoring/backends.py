"""The backends that score and generate: a torch model, and a GGUF in llama.cpp. Both get the same token ids.

Both classes have these methods:

    score_rows(rows, label)           the RowScore of each row
    iter_row_scores(rows, label)      the same one by one, each with the log-probabilities at its response positions
    generate(prompts, label)          the greedy token ids for each prompt (token ids), without the end token
    decode(token_ids)                 the text of token ids
    log_probs(token_ids, positions)   the log-probabilities of the token after each position: float32, shape
                                      (len(positions), vocabulary)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import console, llama_runtime
from pipeline.config.schema import Evaluate
from pipeline.scoring.heldout_scores import answer_positions, asked, prompt_ids, response_positions, score
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
TIMED = 3  # prompts that are answered one at a time, to measure the speed that a user sees


@dataclass(frozen=True)
class Reading:
    """How a model scores one row with its reference answer in place."""

    loss: float
    """The sum over the response positions, in nats."""
    says_reference: bool
    """Whether the likeliest token is the reference's at every position of the last answer, its end token included. The
    greedy answer to the prompt is then the reference and need not be generated."""


def measure(
    side: "Torch | Gguf", rows: list[dict], rule: Evaluate, label: str, own: Sequence[dict] = ()
) -> tuple[dict, list[str]]:
    """Return the scores of one backend, and its greedy answers to the selected rows and to the user's own prompts."""
    readings = side.read(rows, label)
    return finish(side, rows, readings, rule, label, own)


def finish(
    side: "Torch | Gguf",
    rows: list[dict],
    readings: list[Reading],
    rule: Evaluate,
    label: str,
    own: Sequence[dict] = (),
) -> tuple[dict, list[str]]:
    """Return what `score_backend` returns, from row scores that exist already.

    Raises:
        UserError: A loss is NaN or infinite.
    """
    refuse_broken_losses((reading.loss for reading in readings), label)
    questions = [*asked(rows, rule), *own]
    known = [reading.says_reference for reading in readings][: len(questions) - len(own)] + [False] * len(own)
    open_ = [prompt_ids(row) for row, there in zip(questions, known, strict=True) if not there]
    said = iter(side.generate(open_, f"{label}: answers") if open_ else [])
    ids = [
        [row["input_ids"][p] for p in answer_positions(row)[:-1]] if there else next(said)
        for row, there in zip(questions, known, strict=True)
    ]
    answers = [side.text(some[: rule.max_new_tokens]) for some in ids]
    result = score(rows, rule, [reading.loss for reading in readings], answers[: len(questions) - len(own)])
    return result | {"tokens_per_second": speed(side, [prompt_ids(row) for row in rows[:TIMED]])}, answers


def speed(side: "Torch | Gguf", prompts: list[list[int]]) -> float:
    """Return the generated tokens per second, one prompt at a time; the time to read the prompt is included."""
    started, tokens = time.perf_counter(), 0
    for prompt in prompts:
        tokens += len(side.generate([prompt])[0]) + 1
    return round(tokens / (time.perf_counter() - started), 1)


class Torch:
    """A model in torch: the base model, the adapter or the merged model."""

    def __init__(
        self,
        model: "PeftModel | PreTrainedModel",
        tokenizer: "PreTrainedTokenizerFast",
        max_new_tokens: int,
        ends: list[str],
    ):
        """Wrap a loaded model.

        Args:
            model: The model in torch.
            tokenizer: Its tokenizer.
            max_new_tokens: The limit for one answer.
            end_tokens: The tokens besides EOS that end an answer (a chat template may end turns with another token).
        """
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.ends = sorted({tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ends)})
        # generate() passes the last position as a strided view, and torch then copies the head's weights once per row:
        # 9.6 s instead of 4.8 to 5.9 s, and 2.2 GB more, measured for 40 rows of the demo on a CPU.
        model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))

    def close(self) -> None:
        """Free the GPU memory: torch keeps what it once allocated, and llama.cpp needs it next."""
        import gc

        import torch

        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def read(self, rows: list[dict], label: str) -> list[Reading]:
        """Return the score of each row."""
        return self._batched([row["input_ids"] for row in rows], rows, self._read, label)

    def generate(self, prompts: list[list[int]], label: str = "") -> list[list[int]]:
        """Return the greedy answer to each prompt, without its end token; `label` titles the progress bar."""
        most = ANSWER_TOKENS if self.model.device.type == "cuda" else BATCH_TOKENS
        return self._batched(prompts, prompts, self._generate, label, most)

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(ids)

    def _batched(
        self, ids: list[list[int]], items: list, work: Callable[[list], list], label: str, most: int = BATCH_TOKENS
    ) -> list:
        """Run a function on batches of items and return all results.

        Args:
            token_ids: The token ids of each item, from which the batch size follows.
            items: What the function gets.
            process_batch: A function from a batch of items to their results.
            label: The title of the progress bar; "" shows none.
            max_tokens: The largest batch in tokens, padding and answers included.
        """
        size = max(1, most // (max(map(len, ids)) + self.max_new_tokens))
        done: list = []
        with console.progress(len(items), label, show=bool(label)) as tick:
            for start in range(0, len(items), size):
                done += work(items[start : start + size])
                tick(len(items[start : start + size]))
        return done

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        import torch

        ids, mask, longest = self._padded(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.ends,
            )
        return [self._until_end(row[longest:].tolist()) for row in out]

    def _read(self, rows: list[dict]) -> list[Reading]:
        import torch

        ids, mask, longest = self._padded([row["input_ids"] for row in rows])
        with torch.inference_mode():
            # position_ids are set because padding on the left must not shift a row's positions
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
            ).logits
        return [self._reading(logits[i, longest - len(row["input_ids"]) :], row) for i, row in enumerate(rows)]

    def _reading(self, logits: "torch.Tensor", row: dict) -> Reading:
        """Return the score of a row from its logits, which have the shape (tokens of the row, vocabulary)."""
        import torch

        positions = response_positions(row)
        wanted = torch.tensor([row["input_ids"][p] for p in positions], device=logits.device)
        values = logits[[p - 1 for p in positions]].float().log_softmax(-1)
        loss = -values.gather(1, wanted[:, None]).sum().item()
        return Reading(loss, says_reference(row, positions, values.argmax(-1).tolist(), self.ends))

    def distributions(self, rows: list[dict], label: str) -> "Iterator[tuple[Reading, np.ndarray]]":
        """Yield the score of each row, and the log-probabilities at its response positions."""
        return distributions(self, rows, label, self.ends)

    def log_probs(self, ids: list[int], positions: Sequence[int]) -> "np.ndarray":
        """Return the log-probabilities of the token after each position, shape (len(positions), vocabulary)."""
        import torch

        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits[0, list(positions)]
            return logits.float().log_softmax(-1).cpu().numpy()

    def _padded(self, rows: list[list[int]]) -> tuple["torch.Tensor", "torch.Tensor", int]:
        """Return token ids and attention mask, padded on the left, each of shape (rows, longest); and longest."""
        import torch

        longest = max(map(len, rows))
        ids = [[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device), longest

    def _until_end(self, ids: list[int]) -> list[int]:
        """Return the token ids before the first end token."""
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids))]


class Gguf:
    """A GGUF in llama.cpp; one file is open at a time."""

    def __init__(self, path: Path, context: int, max_new_tokens: int):
        """Load a GGUF.

        Args:
            path: The GGUF.
            context: The context length in tokens, at least that of the longest row.
            max_new_tokens: The limit for one answer.
        """
        self.model: Llama = llama_runtime.load(path, context, spill=True)
        self.max_new_tokens = max_new_tokens

    def read(self, rows: list[dict], label: str) -> list[Reading]:
        """Return the score of each row."""
        return [reading for reading, _ in self.distributions(rows, label)]

    def distributions(self, rows: list[dict], label: str) -> "Iterator[tuple[Reading, np.ndarray]]":
        """Yield the score of each row, and the log-probabilities at its response positions."""
        return distributions(self, rows, label, llama_runtime.ends(self.model))

    def generate(self, prompts: list[list[int]], label: str = "") -> list[list[int]]:
        """Return the greedy answer to each prompt, without its end token; `label` titles the progress bar."""
        with console.progress(len(prompts), label, show=bool(label)) as tick:
            return [ids for ids, _ in llama_runtime.answers(self.model, prompts, self.max_new_tokens, tick=tick)]

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return llama_runtime.text(self.model, ids)

    def log_probs(self, ids: list[int], positions: Sequence[int]) -> "np.ndarray":
        """Return the log-probabilities of the token after each position, shape (len(positions), vocabulary)."""
        return llama_runtime.log_probs(self.model, ids, positions)


def distributions(
    side: "Torch | Gguf", rows: list[dict], label: str, ends: Sequence[int]
) -> "Iterator[tuple[Reading, np.ndarray]]":
    """Yield the score of each row, and the log-probabilities at its response positions: shape (positions, vocabulary).

    `end_ids` are the tokens that end an answer.
    """
    with console.progress(len(rows), label) as tick:
        for row in rows:
            positions = response_positions(row)
            values = side.log_probs(row["input_ids"], [p - 1 for p in positions])
            loss = -sum(float(values[i, row["input_ids"][p]]) for i, p in enumerate(positions))
            yield Reading(loss, says_reference(row, positions, values.argmax(-1).tolist(), ends)), values
            tick(1)


def says_reference(row: dict, positions: list[int], likeliest: list[int], ends: Sequence[int]) -> bool:
    """Return whether the last answer of a row is what the model would generate greedily.

    Args:
        row: The row with its reference answer.
        positions: Its response positions.
        likeliest: The likeliest token at each of `positions`, given all tokens before it.
        end_ids: The tokens that end an answer.
    """
    last = answer_positions(row)
    if not last or last[0] != row["prompt_tokens"] or row["input_ids"][last[-1]] not in ends:
        return False
    return all(
        token == row["input_ids"][p]
        for p, token in zip(positions, likeliest, strict=True)
        if p <= last[-1] and p >= last[0]
    )
