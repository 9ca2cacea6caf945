"""evaluate: the base and the adapter on held-out rows and on your own prompts, in torch through Unsloth."""

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

# Nats by which held-out rows may be worse than training rows before it is called overfitting: absolute, and as a share.
OVERFIT, OVERFIT_SHARE = 0.1, 0.25
TRAINING_ROWS = 64


def stage(config: Config, run: Run) -> dict:
    """Write evaluate/answers.jsonl (prompt, reference, before, after), evaluate/prompts.jsonl and the record.

    Raises UserError when evaluate.prompts or the rule's own file cannot be used: before anything is scored.
    """
    rule, heldout = config.evaluate, run.output("data", "heldout")
    rows, used = held_out(heldout, rule)
    usable(rule)  # before the model is read
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
        "evaluate", ("data", "finetune"), outputs,
        rule=rule.rule, used=used, scores={"base": before, "adapter": after}, training=fit,
    )  # fmt: skip


def usable(rule: Evaluate) -> None:
    """Read the rule's own file and that of the user's prompts: `check` asks before hours are spent on training.

    Raises UserError for one that cannot be used.
    """
    judge(rule)
    if rule.prompts:
        read_prompts(Path(rule.prompts))


def own_prompts(path: str | None, tokenizer: "PreTrainedTokenizerFast", system: str | None) -> list[dict]:
    """The user's own prompts as rows without a reference. Raises UserError for an unusable file."""
    found = []
    for text in read_prompts(Path(path)) if path else []:
        messages = [{"role": "system", "content": system}] if system else []
        prompt = chat_format.render(
            tokenizer.chat_template, [*messages, {"role": "user", "content": text}], tokenizer.bos_token or "", tokenizer.eos_token
        )  # fmt: skip
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
    """One a line; in a .jsonl the "prompt" of each object."""
    try:
        files.refuse_no_file(path)
        # not splitlines(): U+2028 and the like may stand inside a prompt
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
            'write one prompt a line (.txt) or {"prompt": "..."} a line (.jsonl) and run the same command again, or name another file with a new RUN=name',
        ) from error
    return prompts


def overfitting(side: Torch, train: Path, base: float, heldout: float) -> dict:
    """Loss on evenly spaced training rows beside the held-out one, and what that says."""
    table = training_rows.read(train)
    rows = table.take(list(range(0, len(table), max(1, len(table) // TRAINING_ROWS)))).to_pylist()[:TRAINING_ROWS]
    rows = [row | {"prompt_tokens": len(row["input_ids"])} for row in rows]  # not asked
    losses = [reading.loss for reading in side.read(rows, "training rows")]
    refuse_broken_losses(losses, "adapter")
    loss = sum(losses) / sum(len(response_positions(row)) for row in rows)
    says = None
    if heldout >= base:
        says = f"held-out loss did not fall: {base} before, {heldout} after"
    elif heldout - loss > max(OVERFIT, OVERFIT_SHARE * loss):
        says = f"overfitting: loss {loss:.3f} on rows it was trained on, {heldout} on held-out rows; fewer steps or more rows"
    return {"loss": round(loss, 4), "rows": len(rows), "warning": says}


def write_answers(folder: Path, rows: list[dict], before: list[str], after: list[str], own: int) -> dict[str, Path]:
    """Side by side: the held-out rows that were asked, and apart from them the user's own prompts (the last `own`)."""
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
