"""evaluate: score the base model and the adapter on held-out rows and on your own prompts, in torch through Unsloth."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from common import files
from common.errors import UserError
from contract import chat_format
from pipeline.config.schema import Base, Evaluate
from pipeline.run import training_rows
from pipeline.run.records import DataRecord, EvaluateRecord, FinetuneRecord, TrainingFit
from pipeline.run.run_folder import Run
from pipeline.scoring.backends import TorchBackend, score_backend
from pipeline.scoring.heldout_scores import response_positions, select_heldout_rows, select_rows_to_answer
from pipeline.scoring.judges import create_judge
from pipeline.toolchain import unsloth_loader
from pipeline.toolchain.finite_numbers import refuse_broken_adapter, refuse_broken_losses

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

# Held-out rows may be worse than training rows by the larger of these two before it is called overfitting: nats, and a
# share of the training rows' loss.
OVERFIT_NATS, OVERFIT_SHARE = 0.1, 0.25
TRAINING_ROWS = 64


def run_evaluate(
    evaluate_config: Evaluate, base_config: Base, data: DataRecord, finetune: FinetuneRecord, run: Run
) -> EvaluateRecord:
    """Write evaluate/answers.jsonl (prompt, reference, before, after), evaluate/prompts.jsonl and the record.

    Raises:
        UserError: evaluate.prompts or the file of the rule cannot be used. It is raised before anything is scored.
    """
    rows, rows_used = select_heldout_rows(data.output_path("heldout"), evaluate_config)
    refuse_unusable_files(evaluate_config)  # before the model is loaded
    model, tokenizer = load_adapter(finetune.output_path("adapter"), base_config)
    backend = TorchBackend(model, tokenizer, evaluate_config.max_new_tokens, data.chat.end)
    prompt_rows = build_prompt_rows(evaluate_config.prompts, tokenizer, data.default_system)
    with model.disable_adapter():
        base_scores, base_answers = score_backend(backend, rows, evaluate_config, "base", prompt_rows)
    adapter_scores, adapter_answers = score_backend(backend, rows, evaluate_config, "adapter", prompt_rows)
    training_fit = measure_overfitting(backend, data.output_path("train"), base_scores.loss, adapter_scores.loss)
    answered_rows = [*select_rows_to_answer(rows, evaluate_config), *prompt_rows]
    pairs = pair_answers(answered_rows, base_answers, adapter_answers)
    return run.write_record(
        EvaluateRecord,
        ("data", "finetune"),
        write_answers(run.folder / "evaluate", pairs, len(prompt_rows)),
        rule=evaluate_config.rule,
        used=rows_used,
        scores={"base": base_scores, "adapter": adapter_scores},
        training=training_fit,
    )


def load_adapter(path: Path, base_config: Base) -> tuple["PeftModel", "PreTrainedTokenizerFast"]:
    """Load an adapter and its base model for inference. Raise UserError when a tensor of the adapter is not finite."""
    refuse_broken_adapter(path)
    model, tokenizer = unsloth_loader.load_model(path.parent, base_config)
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    return cast("PeftModel", model), tokenizer  # because the folder holds an adapter


def refuse_unusable_files(evaluate_config: Evaluate) -> None:
    """Raise UserError when the file of the rule or of the user's prompts cannot be used; also called by preflight."""
    create_judge(evaluate_config)
    if evaluate_config.prompts:
        read_prompts(Path(evaluate_config.prompts))


def build_prompt_rows(path: str | None, tokenizer: "PreTrainedTokenizerFast", system: str | None) -> list[dict]:
    """Return the user's own prompts as rows without a reference answer.

    Args:
        path: evaluate.prompts; None gives no rows.
        tokenizer: The trained tokenizer, whose chat template renders the prompts.
        system: The default system prompt, if there is one.

    Raises:
        UserError: The file cannot be used.
    """
    return [build_prompt_row(text, tokenizer, system) for text in (read_prompts(Path(path)) if path else [])]


def build_prompt_row(text: str, tokenizer: "PreTrainedTokenizerFast", system: str | None) -> dict:
    """Return a prompt as a row without a reference answer."""
    system_messages = [{"role": "system", "content": system}] if system else []
    question = [{"role": "user", "content": text}]
    token_ids = tokenize_messages([*system_messages, *question], tokenizer)
    tokens = {"input_ids": token_ids, "prompt_tokens": len(token_ids), "labels": []}
    return {"prompt": text, "answer": None, "messages": question, **tokens}


def tokenize_messages(messages: list[dict], tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Return the token ids of the prompt that the trained chat template makes of messages."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    prompt = chat_format.render(tokenizer.chat_template, messages, bos, eos)
    return tokenizer.encode(prompt, add_special_tokens=False)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: one per line, or in a .jsonl file the "prompt" of each object.

    Raises:
        UserError: The file cannot be read, or holds no prompts.
    """
    lines = read_prompt_lines(path)
    try:
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
        "".join(prompts).encode()  # half a surrogate pair has no tokens
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = 'a line has no "prompt" with a text' if isinstance(error, (KeyError, TypeError)) else error
        raise prompts_error(path, reason, "evaluate.bad_prompt") from error
    return prompts


def read_prompt_lines(path: Path) -> list[str]:
    """Return the lines that are not blank. Raise UserError when there are none, or the file cannot be read."""
    try:
        files.refuse_special_file(path)
        # not splitlines(): a prompt may contain U+2028 and the like
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise prompts_error(path, reason, "evaluate.unreadable_prompts") from error
    if not lines:
        raise prompts_error(path, "the file has no prompts", "evaluate.no_prompts")
    return lines


def prompts_error(path: Path, reason: object, code: str) -> UserError:
    """Return the error for a file of prompts that cannot be used."""
    return UserError(
        f"evaluate.prompts {path}: {reason}",
        'write one prompt a line (.txt) or {"prompt": "..."} a line (.jsonl) and run the same command again, '
        "or name a different file with a new RUN=name",
        code=code,
    )


def measure_overfitting(backend: TorchBackend, train_path: Path, base_loss: float, heldout_loss: float) -> TrainingFit:
    """Return the adapter's loss on training rows, with a warning when it overfits. The losses are in nats."""
    rows = sample_training_rows(train_path)
    losses = [row_score.loss for row_score in backend.score_rows(rows, "training rows")]
    refuse_broken_losses(losses, "adapter")
    train_loss = sum(losses) / sum(len(response_positions(row)) for row in rows)
    warning = find_overfitting(train_loss, base_loss, heldout_loss)
    return TrainingFit(loss=round(train_loss, 4), rows=len(rows), warning=warning)


def sample_training_rows(path: Path) -> list[dict]:
    """Return at most TRAINING_ROWS evenly spaced training rows, which are scored and not answered."""
    table = training_rows.read_table(path)
    step = max(1, len(table) // TRAINING_ROWS)
    rows = table.take(list(range(0, len(table), step))).to_pylist()[:TRAINING_ROWS]
    return [row | {"prompt_tokens": len(row["input_ids"])} for row in rows]


def find_overfitting(train_loss: float, base_loss: float, heldout_loss: float) -> str | None:
    """Return a warning when the held-out loss did not fall, or is much higher than that on training rows."""
    if heldout_loss >= base_loss:
        return f"held-out loss did not fall: {base_loss} before, {heldout_loss} after"
    if heldout_loss - train_loss <= max(OVERFIT_NATS, OVERFIT_SHARE * train_loss):
        return None
    losses = f"loss {train_loss:.3f} on rows it was trained on, {heldout_loss} on held-out rows"
    return f"overfitting: {losses}; fewer steps or more rows"


def pair_answers(rows: list[dict], answers_before: list[str], answers_after: list[str]) -> list[dict]:
    """Return the answers of the base model and of the adapter side by side, one pair for each row."""
    return [
        {
            "prompt": row["prompt"],
            "question": row["messages"][-1]["content"],
            "reference": row["answer"],
            "before": answer_before,
            "after": answer_after,
        }
        for row, answer_before, answer_after in zip(rows, answers_before, answers_after, strict=True)
    ]


def write_answers(folder: Path, pairs: list[dict], prompt_count: int) -> dict[str, Path]:
    """Write pairs of answers to answers.jsonl and prompts.jsonl, and return the files that were written.

    Args:
        folder: evaluate/ of the run.
        pairs: Those of the held-out rows, then those of the user's own prompts, which have no reference.
        prompt_count: How many pairs are of the user's own prompts.
    """
    outputs = {"answers": folder / "answers.jsonl"}
    files.write_rows(outputs["answers"], pairs[: len(pairs) - prompt_count])
    if prompt_count:
        outputs["prompts"] = folder / "prompts.jsonl"
        prompt_pairs = [{key: pair[key] for key in pair if key != "reference"} for pair in pairs[-prompt_count:]]
        files.write_rows(outputs["prompts"], prompt_pairs)
    return outputs
