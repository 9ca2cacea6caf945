"""The gate for served answers: the model must answer the prompts of its runtimes as well as the prompts of the rows.

Runtimes put the default system prompt before a conversation that has none. The rows may have been trained with another
one, or with one that nobody will send: such a model passes every other gate and answers nonsense.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from common import llama_runtime
from common.errors import UserError, printable_line
from contract import chat_format
from pipeline.config.schema import Config
from pipeline.run.records import DataRecord, RuntimeScores, Scores
from pipeline.run.training_rows import IGNORED_LABEL
from pipeline.scoring.backends import LlamaCppBackend, score_backend
from pipeline.scoring.heldout_scores import describe_interval, prompt_ids

if TYPE_CHECKING:
    from llama_cpp import Llama


def score_as_served(
    config: Config, data: DataRecord, rows: list[dict], path: Path, ladder_scores: Scores
) -> RuntimeScores:
    """Score the default file on the held-out rows as runtimes send them.

    Args:
        config: The config of the run.
        data: The record of the stage `data`, which has the system prompt that runtimes send.
        rows: The held-out rows.
        path: The default file.
        ladder_scores: The scores of the file in the quality ladder.

    Raises:
        UserError: The file answers worse than its scores in the ladder.
    """
    served_rows = render_as_served(data, rows, path)
    pairs = zip(served_rows, rows, strict=True)
    same_prompts = sum(prompt_ids(served) == prompt_ids(original) for served, original in pairs)
    if same_prompts == len(rows):
        return select_runtime_scores(same_prompts, ladder_scores)
    baseline_scores, served_scores = score_both_prompts(config, rows, served_rows, path, ladder_scores)
    refuse_worse_answers(config, data.default_system, baseline_scores, served_scores)
    return select_runtime_scores(same_prompts, served_scores)


def score_both_prompts(
    config: Config, rows: list[dict], served_rows: list[dict], path: Path, ladder_scores: Scores
) -> tuple[Scores, Scores]:
    """Return the scores with the prompts of the rows, and those with the prompts that runtimes send.

    The first ones are those of the ladder, unless answers are judged by loss: then only the last answers count.
    """
    longest = max(len(row["input_ids"]) for row in served_rows)
    backend = LlamaCppBackend(path, longest + 64, config.evaluate.max_new_tokens)
    try:
        served_scores, _ = score_backend(backend, served_rows, config.evaluate, "as served")
        if ladder_scores.score is not None:
            return ladder_scores, served_scores
        row_scores, _ = score_backend(backend, mask_earlier_answers(rows), config.evaluate, "as scored")
        return row_scores, served_scores
    finally:
        backend.model.close()


def select_runtime_scores(same_prompts: int, scores: Scores) -> RuntimeScores:
    """Return what the record says of the answers to runtimes: loss and score."""
    fields = scores.model_dump(include={"rows", "score", "interval", "loss"}, exclude_none=True)
    return RuntimeScores(same_prompts=same_prompts, **fields)


def render_as_served(data: DataRecord, rows: list[dict], path: Path) -> list[dict]:
    """Return the rows with the prompts that runtimes make of their questions, rendered by the file's own template."""
    model = llama_runtime.load_model(path, vocab_only=True)
    try:
        return [render_row_as_served(data, row, model) for row in rows]
    finally:
        model.close()


def render_row_as_served(data: DataRecord, row: dict, model: "Llama") -> dict:
    """Return a row with the prompt of a runtime, and loss on its last answer only. Plain text stays as it is."""
    if not row["messages"]:
        return row
    prompt = chat_format.render_model_prompt(model, messages_as_served(data, row["messages"]))
    token_ids = llama_runtime.tokenize(model, prompt)
    answer_ids, answer_labels = (row[column][row["prompt_tokens"] :] for column in ("input_ids", "labels"))
    labels = [IGNORED_LABEL] * len(token_ids) + answer_labels
    return row | {"input_ids": [*token_ids, *answer_ids], "labels": labels, "prompt_tokens": len(token_ids)}


def messages_as_served(data: DataRecord, messages: list[dict]) -> list[dict]:
    """Return a row's messages with the default system prompt in place of its own.

    With `data.system: none` requests have their own system prompts, so the rows keep theirs.
    """
    if data.rows_keep_their_system:
        return messages
    system_messages = [{"role": "system", "content": data.default_system}] if data.default_system else []
    return [*system_messages, *(message for message in messages if message["role"] != "system")]


def mask_earlier_answers(rows: list[dict]) -> list[dict]:
    """Return the rows with loss on their last answer only."""
    return [
        row | {"labels": [IGNORED_LABEL] * row["prompt_tokens"] + row["labels"][row["prompt_tokens"] :]} for row in rows
    ]


def refuse_worse_answers(
    config: Config, default_system: str | None, ladder_scores: Scores, served_scores: Scores
) -> None:
    """Raise UserError when the scores as served are worse than the scores in the ladder by more than verify allows."""
    if fault := find_worse_answers(config, ladder_scores, served_scores):
        raise UserError(
            f"with the prompts that runtimes send ({describe_system(default_system)}), {fault} "
            "with the prompts of the rows",
            "set data.system to the prompt that its users will send, with a new RUN=name; or train on rows without one",
            code="verify.worse_as_served",
        )


def find_worse_answers(config: Config, ladder_scores: Scores, served_scores: Scores) -> str | None:
    """Return how the scores as served are worse by more than verify allows; None when they are not."""
    if ladder_scores.score is not None and served_scores.score is not None:
        allowed = max(config.verify.max_score_drop, 1 / served_scores.rows)
        if ladder_scores.score - served_scores.score <= allowed + 1e-9:
            return None
        shares = describe_interval(served_scores), describe_interval(ladder_scores)
        return "the model answers {} of the held-out rows correctly, and {}".format(*shares)
    if served_scores.loss - ladder_scores.loss > config.verify.max_extra_loss:
        return f"the held-out loss is {served_scores.loss:.3f} nats a token, and {ladder_scores.loss:.3f}"
    return None


def describe_system(default_system: str | None) -> str:
    """Return which system prompt runtimes send, for messages."""
    if not default_system:
        return "without a system prompt"
    return f"with the default system prompt {printable_line(default_system, 60)!r}"
