"""The gate for served answers: the model must answer the prompts of its runtimes as well as the prompts of the rows.

Runtimes put the default system prompt before a conversation that has none. The rows may have been trained with another
one, or with one that nobody will send: such a model passes every other gate and answers nonsense.
"""

from pathlib import Path

from common import llama_runtime
from common.errors import UserError, shown
from contract import chat_format
from pipeline.config.schema import Config
from pipeline.run.training_rows import IGNORED
from pipeline.scoring.backends import Gguf, measure
from pipeline.scoring.heldout_scores import describe_interval, prompt_ids


def score(config: Config, data: dict, rows: list[dict], path: Path, scored: dict) -> dict:
    """Score the default file on the held-out rows as runtimes send them; return {same_prompts, rows, score or loss}.

    Args:
        config: The config of the run.
        data: The record of the stage `data`, which has the system prompt that runtimes send.
        rows: The held-out rows.
        path: The default file.
        ladder_scores: The scores of the file in the quality ladder.

    Raises:
        UserError: The file answers worse than its scores in the ladder.
    """
    asked = as_served(data, rows, path)
    same = sum(prompt_ids(a) == prompt_ids(b) for a, b in zip(asked, rows, strict=True))
    facts = {"same_prompts": same, "rows": len(rows)}
    if same == len(rows):
        return facts | {name: scored[name] for name in ("score", "interval", "loss") if name in scored}
    backend = Gguf(path, max(len(row["input_ids"]) for row in asked) + 64, config.evaluate.max_new_tokens)
    try:
        found, _ = measure(backend, asked, config.evaluate, "as served")
        before = scored if "score" in scored else measure(backend, last_answers(rows), config.evaluate, "as scored")[0]
    finally:
        backend.model.close()
    refuse_worse(config, data["default_system"], before, found)
    return facts | {name: found[name] for name in ("score", "interval", "loss") if name in found}


def as_served(data: dict, rows: list[dict], path: Path) -> list[dict]:
    """Return the rows with the prompts that runtimes make of their questions, rendered by the file's own template.

    Plain text has no question and stays as it is. With `data.system: none` requests have their own system prompts, so
    the rows keep theirs.
    """
    default = [{"role": "system", "content": data["default_system"]}] if data["default_system"] else []
    model = llama_runtime.load(path, vocab_only=True)
    try:
        asked = []
        for row, only_last in zip(rows, last_answers(rows), strict=True):
            if not row["messages"]:
                asked.append(row)
                continue
            turns = [message for message in row["messages"] if message["role"] != "system"]
            messages = row["messages"] if data["rows_keep_their_system"] else [*default, *turns]
            ids = llama_runtime.tokenize(model, chat_format.prompt(model, messages))
            answer = row["input_ids"][row["prompt_tokens"] :]
            labels = [IGNORED] * len(ids) + only_last["labels"][row["prompt_tokens"] :]
            asked.append(row | {"input_ids": [*ids, *answer], "labels": labels, "prompt_tokens": len(ids)})
        return asked
    finally:
        model.close()


def last_answers(rows: list[dict]) -> list[dict]:
    """Return the rows with loss on their last answer only."""
    return [row | {"labels": [IGNORED] * row["prompt_tokens"] + row["labels"][row["prompt_tokens"] :]} for row in rows]


def refuse_worse(config: Config, default_system: str | None, scored: dict, served: dict) -> None:
    """Raise UserError when the scores as served are worse than the scores in the ladder by more than verify allows."""
    system = (
        f"with the default system prompt {shown(default_system, 60)!r}" if default_system else "without a system prompt"
    )
    cure = (
        "set data.system to the prompt that its users will send, with a new RUN=name; or train with rows that have none"
    )
    if "score" in served:
        allowed = max(config.verify.max_score_drop, 1 / served["rows"])
        if scored["score"] - served["score"] > allowed + 1e-9:
            raise UserError(
                f"asked as its runtimes ask it ({system}), "
                f"the model answers {describe_interval(served)} of the held-out rows, "
                f"and {describe_interval(scored)} with the prompts of the rows",
                cure,
            )
    elif served["loss"] - scored["loss"] > config.verify.max_extra_loss:
        raise UserError(
            f"asked as its runtimes ask it ({system}), "
            f"the held-out loss is {served['loss']:.3f} nats a token, "
            f"and {scored['loss']:.3f} with the prompts of the rows",
            cure,
        )
