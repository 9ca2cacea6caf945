"""The gate for served answers: the model must answer the prompts of its runtimes as well as the prompts of the rows.

Runtimes put the default system prompt before a conversation that has none. The rows may have been trained with another
one, or with one that nobody will send: such a model passes every other gate and answers nonsense.
"""

from pathlib import Path

from common import llama_runtime
from common.errors import UserError, printable_line
from contract import chat_format
from pipeline.config.schema import Config
from pipeline.run.records import DataRecord, RuntimeScores, Scores
from pipeline.run.training_rows import IGNORED_LABEL
from pipeline.scoring.backends import LlamaCppBackend, score_backend
from pipeline.scoring.heldout_scores import describe_interval, prompt_ids


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
    same_prompts = sum(
        prompt_ids(served) == prompt_ids(original) for served, original in zip(served_rows, rows, strict=True)
    )
    if same_prompts == len(rows):
        return select_runtime_scores(same_prompts, ladder_scores)
    backend = LlamaCppBackend(
        path, max(len(served_row["input_ids"]) for served_row in served_rows) + 64, config.evaluate.max_new_tokens
    )
    try:
        served_scores, _ = score_backend(backend, served_rows, config.evaluate, "as served")
        baseline_scores = (
            ladder_scores
            if ladder_scores.score is not None
            else score_backend(backend, mask_earlier_answers(rows), config.evaluate, "as scored")[0]
        )
    finally:
        backend.model.close()
    refuse_worse_answers(config, data.default_system, baseline_scores, served_scores)
    return select_runtime_scores(same_prompts, served_scores)


def select_runtime_scores(same_prompts: int, scores: Scores) -> RuntimeScores:
    """Return what the record says of the answers to runtimes: loss and score."""
    fields = scores.model_dump(include={"rows", "score", "interval", "loss"}, exclude_none=True)
    return RuntimeScores(same_prompts=same_prompts, **fields)


def render_as_served(data: DataRecord, rows: list[dict], path: Path) -> list[dict]:
    """Return the rows with the prompts that runtimes make of their questions, rendered by the file's own template.

    Plain text has no question and stays as it is. With `data.system: none` requests have their own system prompts, so
    the rows keep theirs.
    """
    system_messages = [{"role": "system", "content": data.default_system}] if data.default_system else []
    model = llama_runtime.load_model(path, vocab_only=True)
    try:
        served_rows = []
        for row, masked_row in zip(rows, mask_earlier_answers(rows), strict=True):
            if not row["messages"]:
                served_rows.append(row)
                continue
            turns = [message for message in row["messages"] if message["role"] != "system"]
            messages = row["messages"] if data.rows_keep_their_system else [*system_messages, *turns]
            token_ids = llama_runtime.tokenize(model, chat_format.render_model_prompt(model, messages))
            answer_ids = row["input_ids"][row["prompt_tokens"] :]
            labels = [IGNORED_LABEL] * len(token_ids) + masked_row["labels"][row["prompt_tokens"] :]
            served_rows.append(
                row | {"input_ids": [*token_ids, *answer_ids], "labels": labels, "prompt_tokens": len(token_ids)}
            )
        return served_rows
    finally:
        model.close()


def mask_earlier_answers(rows: list[dict]) -> list[dict]:
    """Return the rows with loss on their last answer only."""
    return [
        row | {"labels": [IGNORED_LABEL] * row["prompt_tokens"] + row["labels"][row["prompt_tokens"] :]} for row in rows
    ]


def refuse_worse_answers(
    config: Config, default_system: str | None, ladder_scores: Scores, served_scores: Scores
) -> None:
    """Raise UserError when the scores as served are worse than the scores in the ladder by more than verify allows."""
    system_note = (
        f"with the default system prompt {printable_line(default_system, 60)!r}"
        if default_system
        else "without a system prompt"
    )
    hint = "set data.system to the prompt that its users will send, with a new RUN=name; or train on rows without one"
    if served_scores.score is not None:
        allowed = max(config.verify.max_score_drop, 1 / served_scores.rows)
        if ladder_scores.score - served_scores.score > allowed + 1e-9:
            raise UserError(
                f"with the prompts that runtimes send ({system_note}), "
                f"the model answers {describe_interval(served_scores)} of the held-out rows correctly, "
                f"and {describe_interval(ladder_scores)} with the prompts of the rows",
                hint,
                code="verify.worse_as_served",
            )
    elif served_scores.loss - ladder_scores.loss > config.verify.max_extra_loss:
        raise UserError(
            f"with the prompts that runtimes send ({system_note}), "
            f"the held-out loss is {served_scores.loss:.3f} nats a token, "
            f"and {ladder_scores.loss:.3f} with the prompts of the rows",
            hint,
            code="verify.worse_as_served",
        )
