"""Build the model with its LoRA matrices, and the trainer for it."""

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import files
from common.errors import UserError
from pipeline.checkpoint_sync import background_push as offsite
from pipeline.config.schema import SEVEN, Base, Finetune
from pipeline.finetune import checkpoints, training_log
from pipeline.finetune.trainer import trainer_class
from pipeline.plan import batches, gpu_table, memory_need
from pipeline.plan.choose_batch import Choice
from pipeline.run import training_rows
from pipeline.run.run_folder import Run
from pipeline.toolchain import unsloth_loader

if TYPE_CHECKING:
    import pyarrow as pa
    from trl import SFTTrainer


def build_model(weights: Path, base: Base, tune: Finetune, choice: Choice):
    """Load the base model and return it with its LoRA matrices, ready to train. Torch and Unsloth use `tune.seed`."""
    model, _ = unsloth_loader.load(weights, base)
    refuse_unknown_targets(model, tune.target_modules)
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(model, **lora_arguments(tune, choice))


def build_trainer(
    model, base: Base, tune: Finetune, run: Run, choice: Choice, written: "pa.Table", order: batches.ShuffledRows
) -> "SFTTrainer":
    """Return TRL's trainer for these rows, which writes its checkpoints and its log to finetune/.

    Args:
        training_table: the rows that `data` wrote.
        order: the rows in the order of training.
    """
    from transformers import AutoTokenizer, EarlyStoppingCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    folder, signals, lengths = run.folder / "finetune", checkpoints.Signals(), batches.lengths(written)
    pusher = offsite.Pusher(run, offsite.repo(), tune.save_minutes)
    steps = batches.dataset(written, order, choice.train_batch_size)
    count_tokens = functools.partial(count_tokens_until, order, lengths, choice.train_batch_size)
    meter = training_log.Meter(count_tokens, len(steps), flops(model), *gpu_table.of(unsloth_loader.device()))
    callbacks = [
        checkpoints.keeper(folder / "checkpoints", tune.save_minutes, tune.save_steps, signals, pusher),
        training_log.watcher(folder / "log.jsonl", meter),
    ]
    callbacks += [EarlyStoppingCallback(tune.early_stopping_patience)] if tune.early_stopping_patience else []
    # By default it is a folder among the checkpoints, which are removed.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    callbacks += reporters(tune.report_to)
    trainer = trainer_class()(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer"),
        args=trainer_arguments(tune, base, choice, len(steps), len(written), folder / "checkpoints"),
        train_dataset=steps,
        eval_dataset=heldout(run.output("data", "heldout")) if tune.eval_strategy != "no" else None,
        callbacks=callbacks,
    )
    for shown in (ProgressCallback, PrinterCallback):  # the callback of training_log replaces them
        trainer.remove_callback(shown)
    return trainer.prepare(
        packed=choice.packing,
        budget=choice.micro_batch_tokens,
        smallest=int(lengths.max()),
        signals=signals,
        meter=meter,
        memory=unsloth_loader.peak_memory_gb,
        pusher=pusher,
    )


def count_tokens_until(order: batches.ShuffledRows, lengths: np.ndarray, per_step: int, step: int) -> int:
    """Return the number of tokens in the first `step` optimizer steps."""
    return order.count_tokens(lengths, step * per_step)


def reporters(names: tuple[str, ...]) -> list:
    """Return the library's callbacks for `report_to`.

    Raises:
        UserError: the library does not know a name, or its package is not installed.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        return [callback() for callback in get_reporting_integration_callbacks(list(names))]
    except (ValueError, ImportError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"finetune.report_to: {' '.join(str(error).split())}",
            f"correct it, or install what it needs: .venv/bin/python -m pip install {' '.join(names)}",
        ) from error


def flops(model) -> float:
    """Return the FLOPs to train on one token, or 0 when the shape of the model is unknown."""
    shape = memory_need.shape(model.config.to_dict())
    return shape.flops() if shape else 0.0


def refuse_unknown_targets(model, names: tuple[str, ...]) -> None:
    """Raise UserError for a target module that the model does not have.

    The usual seven fit every model, because Unsloth also finds fused ones. Any other unknown name is a mistake.
    """
    there = {name.split(".")[-1] for name, _ in model.named_modules()}
    if unknown := sorted(set(names) - there - set(SEVEN)):
        raise UserError(
            f"finetune.target_modules: the model has no {', '.join(unknown)}",
            f"choose among {', '.join(sorted(n for n in there if n.endswith(('proj', 'fc1', 'fc2', 'dense'))))}, "
            "with a new RUN=name",
        )


def lora_arguments(tune: Finetune, choice: Choice) -> dict:
    """Return the arguments of FastLanguageModel.get_peft_model."""
    arguments = {
        "r": tune.r,
        "lora_alpha": tune.lora_alpha,
        "lora_dropout": tune.lora_dropout,
        "bias": tune.bias,
        "target_modules": list(tune.target_modules),
        "use_rslora": tune.use_rslora,
        "random_state": tune.seed,
        "use_gradient_checkpointing": choice.use_gradient_checkpointing,
    }
    if tune.loftq_bits:
        from peft import LoftQConfig

        arguments |= {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=tune.loftq_bits)}
    return arguments


def trainer_arguments(tune: Finetune, base: Base, choice: Choice, steps: int, rows_there: int, checkpoints: Path):
    """Return the SFTConfig for a data set of whole optimizer steps, whose rows are tokenized and masked already.

    Args:
        steps: optimizer steps of the training.
        row_count: number of training rows.
        checkpoint_folder: the folder that checkpoints are written to.

    Raises:
        UserError: the library refuses the settings.
    """
    from trl import SFTConfig
    from unsloth import is_bfloat16_supported

    bf16 = is_bfloat16_supported()
    passed = tune.model_dump(
        include={"lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "logging_steps", "seed"}
    )
    watched = tune.eval_strategy != "no"
    every = tune.eval_steps if tune.eval_strategy == "steps" else -(-rows_there // choice.train_batch_size)
    try:
        return SFTConfig(
            **passed,
            learning_rate=choice.learning_rate,
            optim=optimizer(tune.optim),
            max_steps=steps,
            num_train_epochs=1,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=1,
            train_sampling_strategy="sequential",
            eval_strategy="steps" if watched else "no",
            eval_steps=every,
            save_strategy="best" if watched else "no",
            metric_for_best_model="eval_loss" if watched else None,
            greater_is_better=False if watched else None,
            packing=choice.packing,
            padding_free=False,
            max_length=base.max_seq_length,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            pad_to_multiple_of=batches.PACKED if choice.packing else batches.PADDED,
            bf16=bf16,
            fp16=not bf16,
            gradient_checkpointing=bool(choice.use_gradient_checkpointing),
            report_to="none",
            output_dir=str(checkpoints),
            logging_first_step=True,
            # Each of these two would wait for the GPU at every step.
            include_num_input_tokens_seen="no",
            logging_nan_inf_filter=False,
        )
    except ValueError as error:
        raise UserError(
            f"the trainer refuses the settings of finetune: {error}",
            "correct the finetune section, then start with a new RUN=name",
        ) from error


def optimizer(name: str) -> str:
    """Return the optimizer to use: on a CPU, adamw_torch_fused for 8-bit and paged ones, which need a GPU."""
    return "adamw_torch_fused" if unsloth_loader.gpu_bytes() is None and re.search("8bit|paged", name) else name


def heldout(path: Path):
    """Return a data set of the held-out rows, sixteen in an item."""
    import pyarrow as pa

    read = [{key: row[key] for key in ("input_ids", "labels")} for row in files.read_rows(path)]
    table = pa.Table.from_pylist(read, schema=training_rows.schema())
    return batches.dataset(table, np.arange(len(table)), 16)
