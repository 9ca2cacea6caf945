"""evaluate: score the base model and the adapter on held-out rows and on your own prompts, in torch through Unsloth."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from common import files
from common.errors import UserError
from contract import chat_format
from pipeline.config.schema import Config, Evaluate
from pipeline.run import training_rows
from pipeline.run.run_folder import Run
from pipeline.scoring.backends import Torch, measure
from pipeline.scoring.heldout_scores import asked, held_out, response_positions
from pipeline.scoring.judges import judge
from pipeline.toolchain import unsloth_loader
from pipeline.toolchain.finite_numbers import refuse_broken_adapter, refuse_broken_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Held-out rows may be worse than training rows by the larger of these two before it is called overfitting: nats, and a
# share of the training rows' loss.
OVERFIT, OVERFIT_SHARE = 0.1, 0.25
TRAINING_ROWS = 64


def stage(config: Config, run: Run) -> dict:
    """Write evaluate/answers.jsonl (prompt, reference, before, after), evaluate/prompts.jsonl and the record.

    Raises:
        UserError: evaluate.prompts or the file of the rule cannot be used. It is raised before anything is scored.
    """
    rule, heldout = config.evaluate, run.output("data", "heldout")
    rows, used = held_out(heldout, rule)
    usable(rule)  # before the model is loaded
    adapter = run.output("finetune", "adapter")
    refuse_broken_adapter(adapter)
    model, tokenizer = unsloth_loader.load(adapter.parent, config.base)
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    side = Torch(model, tokenizer, rule.max_new_tokens, run.read("data")["chat"]["end"])
    own = own_prompts(rule.prompts, tokenizer, run.read("data")["default_system"])
    with model.disable_adapter():
        before, said_before = measure(side, rows, rule, "base", own)
    after, said_after = measure(side, rows, rule, "adapter", own)
    fit = overfitting(side, run.output("data", "train"), before["loss"], after["loss"])
    outputs = write_answers(run.folder / "evaluate", [*asked(rows, rule), *own], said_before, said_after, len(own))
    return run.write(
        "evaluate",
        ("data", "finetune"),
        outputs,
        rule=rule.rule,
        used=used,
        scores={"base": before, "adapter": after},
        training=fit,
    )


def usable(rule: Evaluate) -> None:
    """Read the file of the rule and the file of the user's prompts; `check` does so before hours of training.

    Raises:
        UserError: One of the files cannot be used.
    """
    judge(rule)
    if rule.prompts:
        read_prompts(Path(rule.prompts))


def own_prompts(path: str | None, tokenizer: "PreTrainedTokenizerFast", system: str | None) -> list[dict]:
    """Return the user's own prompts as rows without a reference answer.

    Args:
        path: evaluate.prompts; None gives no rows.
        tokenizer: The trained tokenizer, whose chat template renders the prompts.
        system: The default system prompt, if there is one.

    Raises:
        UserError: The file cannot be used.
    """
    found = []
    for text in read_prompts(Path(path)) if path else []:
        messages = [{"role": "system", "content": system}] if system else []
        prompt = chat_format.render(
            tokenizer.chat_template,
            [*messages, {"role": "user", "content": text}],
            tokenizer.bos_token or "",
            tokenizer.eos_token,
        )
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        question = [{"role": "user", "content": text}]
        found.append(
            {
                "prompt": text,
                "answer": None,
                "input_ids": ids,
                "prompt_tokens": len(ids),
                "labels": [],
                "messages": question,
            }
        )
    return found


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: one per line, or in a .jsonl file the "prompt" of each object.

    Raises:
        UserError: The file cannot be read, or holds no prompts.
    """
    try:
        files.refuse_no_file(path)
        # not splitlines(): a prompt may contain U+2028 and the like
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("it holds no prompts" if not prompts else "a prompt is no text")
        "".join(prompts).encode()  # half a surrogate pair has no tokens
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or (
            "a line without a prompt" if isinstance(error, (KeyError, TypeError)) else error
        )
        raise UserError(
            f"evaluate.prompts {path}: {why}",
            'write one prompt a line (.txt) or {"prompt": "..."} a line (.jsonl) and run the same command again, '
            "or name another file with a new RUN=name",
        ) from error
    return prompts


def overfitting(side: Torch, train: Path, base: float, heldout: float) -> dict:
    """Return {loss, rows, warning}: the loss on evenly spaced training rows, and a warning when the model overfits.

    Args:
        backend: The adapter.
        train_path: The training rows.
        base_loss: The held-out loss of the base model, in nats.
        heldout_loss: The held-out loss of the adapter, in nats.
    """
    table = training_rows.read(train)
    rows = table.take(list(range(0, len(table), max(1, len(table) // TRAINING_ROWS)))).to_pylist()[:TRAINING_ROWS]
    rows = [row | {"prompt_tokens": len(row["input_ids"])} for row in rows]  # these rows are not answered
    losses = [reading.loss for reading in side.read(rows, "training rows")]
    refuse_broken_losses(losses, "adapter")
    loss = sum(losses) / sum(len(response_positions(row)) for row in rows)
    says = None
    if heldout >= base:
        says = f"held-out loss did not fall: {base} before, {heldout} after"
    elif heldout - loss > max(OVERFIT, OVERFIT_SHARE * loss):
        says = (
            f"overfitting: loss {loss:.3f} on rows it was trained on, {heldout} on held-out rows; "
            "fewer steps or more rows"
        )
    return {"loss": round(loss, 4), "rows": len(rows), "warning": says}


def write_answers(folder: Path, rows: list[dict], before: list[str], after: list[str], own: int) -> dict[str, Path]:
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
            "before": b,
            "after": a,
        }
        for row, b, a in zip(rows, before, after, strict=True)
    ]
    files.write_rows(folder / "answers.jsonl", pairs[: len(pairs) - own])
    outputs = {"answers": folder / "answers.jsonl"}
    if own:
        outputs["prompts"] = folder / "prompts.jsonl"
        files.write_rows(outputs["prompts"], [{k: v for k, v in p.items() if k != "reference"} for p in pairs[-own:]])
    return outputs
