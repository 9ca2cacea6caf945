"""finetune: LoRA by Unsloth and TRL on the rows that `data` wrote, passed through untouched."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from contract import files
from contract.errors import UserError
from pipeline import base as bases
from pipeline import rows, unsloth
from pipeline.config import SEVEN, Base, Finetune
from pipeline.record import Run

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTTrainer

COMPLETE = "ferry-complete"  # marks a checkpoint that was written to its end


def stage(base: Base, tune: Finetune, run: Run) -> dict:
    """Train, or go on from the last complete checkpoint; write finetune/adapter/ and the record."""
    data = run.read("data")
    folder = run.workspace("finetune", "data")
    weights = bases.weights(bases.fetch(base.model, data["base"]["revision"]))
    trainer = build_trainer(weights, base, tune, run, folder)
    written = rows.read(run.output("data", "train"))
    check_first_batch(trainer, written)
    check_ends(written, ends(trainer.processing_class, data["chat"]["end"]), data["truncated"].get("rows", 0))
    checkpoint = last_complete(folder / "checkpoints")
    print(
        f"finetune: {'continuing from ' + checkpoint.name if checkpoint else 'starting'} on {unsloth.device()}",
        file=sys.stderr,
    )
    train(trainer, checkpoint)
    with files.writing(folder / "adapter") as part:
        trainer.model.save_pretrained(part)
        trainer.processing_class.save_pretrained(part)
    write_log(folder / "log.jsonl", trainer.state.log_history)
    record = run.write(
        "finetune", ("data",),
        {"adapter": folder / "adapter" / "adapter_model.safetensors", "adapter_config": folder / "adapter" / "adapter_config.json", "log": folder / "log.jsonl"},
        steps=trainer.state.global_step, epochs=round(trainer.state.epoch, 2), final_loss=next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry),
        resumed_from=checkpoint.name if checkpoint else None, device=unsloth.device(), peak_memory_gb=unsloth.peak_memory_gb(),
        tokens=trainer.state.num_input_tokens_seen, trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        seed=tune.seed, weights=str(weights),
    )  # fmt: skip
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only after the record: a kill before it resumes here
    return record


def build_trainer(weights: Path, base: Base, tune: Finetune, run: Run, folder: Path) -> "SFTTrainer":
    """The model with its LoRA matrices, and TRL's trainer around it. torch's and Unsloth's seeds are `tune.seed`."""
    model, _ = unsloth.load(weights, base)
    refuse_unknown_targets(model, tune.target_modules)
    from transformers import AutoTokenizer
    from trl import SFTTrainer
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(model, **lora_arguments(tune))
    return SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer"),
        args=trainer_arguments(tune, base, folder / "checkpoints"),
        train_dataset=dataset(run.output("data", "train")),
        eval_dataset=heldout(run.output("data", "heldout")) if tune.eval_strategy != "no" else None,
        callbacks=[marker()],
    )


def refuse_unknown_targets(model, names: tuple[str, ...]) -> None:
    """The usual seven fit every model (Unsloth finds fused ones); of others, one that matches nothing is a mistake."""
    there = {name.split(".")[-1] for name, _ in model.named_modules()}
    if unknown := sorted(set(names) - there - set(SEVEN)):
        raise UserError(
            f"finetune.target_modules: the model has no {', '.join(unknown)}",
            f"choose among {', '.join(sorted(n for n in there if n.endswith(('proj', 'fc1', 'fc2', 'dense'))))}, with a new RUN=name",
        )


def train(trainer: "SFTTrainer", checkpoint: Path | None) -> None:
    """Train to the end, or, from a checkpoint of the last step, only take its weights: resuming would add a step."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if state and state.global_step >= state.max_steps:
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def lora_arguments(tune: Finetune) -> dict:
    """Arguments of FastLanguageModel.get_peft_model."""
    arguments = {
        "r": tune.r, "lora_alpha": tune.lora_alpha, "lora_dropout": tune.lora_dropout, "bias": tune.bias,
        "target_modules": list(tune.target_modules), "use_rslora": tune.use_rslora, "random_state": tune.seed,
        "use_gradient_checkpointing": tune.use_gradient_checkpointing,
    }  # fmt: skip
    if tune.loftq_bits:
        from peft import LoftQConfig

        arguments |= {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=tune.loftq_bits)}
    return arguments


def trainer_arguments(tune: Finetune, base: Base, checkpoints: Path):
    """SFTConfig for rows that are tokenized and masked already."""
    from trl import SFTConfig
    from unsloth import is_bfloat16_supported

    bf16 = is_bfloat16_supported()
    passed = tune.model_dump(include={
        "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
        "warmup_steps", "weight_decay", "max_grad_norm", "optim", "packing", "eval_strategy", "eval_steps", "save_strategy",
        "save_steps", "save_total_limit", "logging_steps", "seed",
    })  # fmt: skip
    try:
        return SFTConfig(
            **passed, max_steps=tune.max_steps or -1, report_to=list(tune.report_to) or "none", output_dir=str(checkpoints),
            max_length=base.max_seq_length, bf16=bf16, fp16=not bf16, include_num_input_tokens_seen="non_padding",
            gradient_checkpointing=bool(tune.use_gradient_checkpointing), logging_first_step=True,
            disable_tqdm=False,  # else no bar: its default follows TRANSFORMERS_VERBOSITY
        )  # fmt: skip
    except ValueError as error:
        raise UserError(
            f"the trainer refuses the settings of finetune: {error}",
            "correct the finetune section, then start with a new RUN=name",
        ) from error


def dataset(path: Path) -> "Dataset":
    """The training rows as they are: input_ids and labels."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(rows.read(path)))


def heldout(path: Path) -> "Dataset":
    """The held-out rows, input_ids and labels only."""
    from datasets import Dataset

    return Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in files.read_rows(path)])


def check_first_batch(trainer: "SFTTrainer", written: "pa.Table") -> None:
    """What the model is about to see is what `data` wrote: every row of the first batch, ids and labels, unpadded.

    Raises RuntimeError otherwise: some library tokenized, masked, cut or dropped again.
    """
    if not trainer.args.packing and len(trainer.train_dataset) != len(written):
        raise RuntimeError(f"the trainer kept {len(trainer.train_dataset)} of {len(written)} rows")
    known = {
        _fingerprint(row["input_ids"], row["labels"]) for batch in written.to_batches() for row in batch.to_pylist()
    }
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels in zip(*_unpadded(batch), strict=True):
        if _fingerprint(ids, labels) not in known:
            raise RuntimeError(
                f"the trainer's first batch holds a row that data did not write: {ids[:20]}... labels {labels[:20]}..."
            )


def ends(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> set[int]:
    return {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(texts)}


def check_ends(written: "pa.Table", wanted: set[int], cut: int = 0) -> None:
    """In every row but the `cut` ones a token that ends an answer carries loss, or the model never learns to stop.

    Raises RuntimeError otherwise: `data` writes no such row.
    """
    import numpy as np

    labels = written["labels"].combine_chunks()
    seen = np.concatenate([[0], np.cumsum(np.isin(labels.values.to_numpy(), list(wanted)))])
    offsets = labels.offsets.to_numpy()
    endless = np.flatnonzero(seen[offsets[1:]] == seen[offsets[:-1]])
    if len(endless) > cut:  # cut at max_seq_length, as clean.too_long asks
        raise RuntimeError(
            f"training row {endless[0]} teaches no end: none of its labels is one of the tokens {sorted(wanted)}"
        )


def _fingerprint(ids: list[int], labels: list[int]) -> int:
    """Of one row; a million rows are 60 MB of them."""
    return hash((tuple(ids), tuple(labels)))


def _unpadded(batch: dict) -> tuple[list[list[int]], list[list[int]]]:
    """The rows of a padded batch, or of TRL's packed one: a long row whose position_ids restart where a row starts."""
    ids, labels = [], []
    for i, row in enumerate(batch["input_ids"].tolist()):
        marks = batch["labels"][i].tolist()
        if "attention_mask" in batch:
            length = int(batch["attention_mask"][i].sum())
            starts = [0, length]
        else:
            positions = batch["position_ids"][i].tolist()
            starts = [k for k, p in enumerate(positions) if p == 0] + [len(row)]
        ids += [row[a:b] for a, b in pairwise(starts)]
        labels += [marks[a:b] for a, b in pairwise(starts)]
    return ids, labels


def marker():
    """A callback that marks a checkpoint once all of it is on disk: a kill in between leaves it unmarked."""
    from transformers import TrainerCallback

    class Marker(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files.sync(folder)
            files.write_json(folder / COMPLETE, {"step": state.global_step})

    return Marker()


def last_complete(folder: Path) -> Path | None:
    """The newest marked checkpoint; unmarked ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in found:
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.is_dir()), None)


def write_log(path: Path, history: list[dict]) -> None:
    with files.writing(path) as part:
        part.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
