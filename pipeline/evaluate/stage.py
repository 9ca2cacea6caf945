"""evaluate: score the base model and the adapter on held-out rows and on your own prompts, in torch through Unsloth."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

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
    adapter_path = finetune.output_path("adapter")
    refuse_broken_adapter(adapter_path)
    model, tokenizer = unsloth_loader.load_model(adapter_path.parent, base_config)
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    backend = TorchBackend(model, tokenizer, evaluate_config.max_new_tokens, data.chat.end)
    prompt_rows = build_prompt_rows(evaluate_config.prompts, tokenizer, data.default_system)
    with model.disable_adapter():
        base_scores, base_answers = score_backend(backend, rows, evaluate_config, "base", prompt_rows)
    adapter_scores, adapter_answers = score_backend(backend, rows, evaluate_config, "adapter", prompt_rows)
    training_fit = measure_overfitting(backend, data.output_path("train"), base_scores.loss, adapter_scores.loss)
    outputs = write_answers(
        run.folder / "evaluate",
        [*select_rows_to_answer(rows, evaluate_config), *prompt_rows],
        base_answers,
        adapter_answers,
        len(prompt_rows),
    )
    return run.write_record(
        EvaluateRecord,
        ("data", "finetune"),
        outputs,
        rule=evaluate_config.rule,
        used=rows_used,
        scores={"base": base_scores, "adapter": adapter_scores},
        training=training_fit,
    )


def refuse_unusable_files(evaluate_config: Evaluate) -> None:
    """Read the file of the rule and the file of the user's prompts; `check` does so before hours of training.

    Raises:
        UserError: One of the files cannot be used.
    """
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
    rows = []
    for text in read_prompts(Path(path)) if path else []:
        messages = [{"role": "system", "content": system}] if system else []
        prompt = chat_format.render(
            tokenizer.chat_template,
            [*messages, {"role": "user", "content": text}],
            tokenizer.bos_token or "",
            tokenizer.eos_token,
        )
        token_ids = tokenizer.encode(prompt, add_special_tokens=False)
        question = [{"role": "user", "content": text}]
        rows.append(
            {
                "prompt": text,
                "answer": None,
                "input_ids": token_ids,
                "prompt_tokens": len(token_ids),
                "labels": [],
                "messages": question,
            }
        )
    return rows


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: one per line, or in a .jsonl file the "prompt" of each object.

    Raises:
        UserError: The file cannot be read, or holds no prompts.
    """

    def prompts_error(reason: object, code: str) -> UserError:
        return UserError(
            f"evaluate.prompts {path}: {reason}",
            'write one prompt a line (.txt) or {"prompt": "..."} a line (.jsonl) and run the same command again, '
            "or name a different file with a new RUN=name",
            code=code,
        )

    try:
        files.refuse_special_file(path)
        # not splitlines(): a prompt may contain U+2028 and the like
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise prompts_error(getattr(error, "strerror", None) or error, "evaluate.unreadable_prompts") from error
    if not lines:
        raise prompts_error("the file has no prompts", "evaluate.no_prompts")
    try:
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
        "".join(prompts).encode()  # half a surrogate pair has no tokens
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = 'a line has no "prompt" with a text' if isinstance(error, (KeyError, TypeError)) else error
        raise prompts_error(reason, "evaluate.bad_prompt") from error
    return prompts


def measure_overfitting(backend: TorchBackend, train_path: Path, base_loss: float, heldout_loss: float) -> TrainingFit:
    """Return the loss on evenly spaced training rows, with a warning when the model overfits.

    Args:
        backend: The adapter.
        train_path: The training rows.
        base_loss: The held-out loss of the base model, in nats.
        heldout_loss: The held-out loss of the adapter, in nats.
    """
    table = training_rows.read_table(train_path)
    rows = table.take(list(range(0, len(table), max(1, len(table) // TRAINING_ROWS)))).to_pylist()[:TRAINING_ROWS]
    rows = [row | {"prompt_tokens": len(row["input_ids"])} for row in rows]  # these rows are not answered
    losses = [row_score.loss for row_score in backend.score_rows(rows, "training rows")]
    refuse_broken_losses(losses, "adapter")
    train_loss = sum(losses) / sum(len(response_positions(row)) for row in rows)
    warning = None
    if heldout_loss >= base_loss:
        warning = f"held-out loss did not fall: {base_loss} before, {heldout_loss} after"
    elif heldout_loss - train_loss > max(OVERFIT_NATS, OVERFIT_SHARE * train_loss):
        warning = (
            f"overfitting: loss {train_loss:.3f} on rows it was trained on, {heldout_loss} on held-out rows; "
            "fewer steps or more rows"
        )
    return TrainingFit(loss=round(train_loss, 4), rows=len(rows), warning=warning)


def write_answers(
    folder: Path, rows: list[dict], answers_before: list[str], answers_after: list[str], prompt_count: int
) -> dict[str, Path]:
    """Write the answers before and after training side by side, and return the files that were written.

    Args:
        folder: evaluate/ of the run.
        rows: The held-out rows, then the user's own prompts.
        answers_before: The answers of the base model, one for each row.
        answers_after: The answers of the adapter.
        prompt_count: How many of the last rows are the user's own prompts; they go to a file of their own.
    """
    pairs = [
        {
            "prompt": row["prompt"],
            "question": row["messages"][-1]["content"],
            "reference": row["answer"],
            "before": answer_before,
            "after": answer_after,
        }
        for row, answer_before, answer_after in zip(rows, answers_before, answers_after, strict=True)
    ]
    files.write_rows(folder / "answers.jsonl", pairs[: len(pairs) - prompt_count])
    outputs = {"answers": folder / "answers.jsonl"}
    if prompt_count:
        outputs["prompts"] = folder / "prompts.jsonl"
        files.write_rows(
            outputs["prompts"],
            [{key: value for key, value in pair.items() if key != "reference"} for pair in pairs[-prompt_count:]],
        )
    return outputs
