"""Build the model with its LoRA matrices, and the trainer for it."""

import functools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import files
from common.errors import UserError
from pipeline.checkpoint_sync.background_push import CheckpointSync, checkpoint_repo
from pipeline.config.schema import LINEAR_LAYERS, Base, Finetune
from pipeline.finetune import training_log
from pipeline.finetune.stop_signals import StopSignals
from pipeline.plan import batches, gpu_table, memory_need
from pipeline.plan.choose_batch import BatchChoice
from pipeline.run import training_rows
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run
from pipeline.toolchain import unsloth_loader

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback
    from trl import SFTConfig

    from pipeline.finetune.trainer import StepSettings, StepTrainer


def build_model(weights: Path, base: Base, tune: Finetune, choice: BatchChoice) -> "PeftModel":
    """Load the base model and return it with its LoRA matrices, ready to train. Torch and Unsloth use `tune.seed`."""
    model, _ = unsloth_loader.load_model(weights, base)
    refuse_unknown_targets(model, tune.target_modules)
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(model, **lora_arguments(tune, choice))


@dataclass(frozen=True)
class TrainingInput:
    """What a training is made from: the config's sections, the rows that `data` wrote, and their order."""

    base: Base
    tune: Finetune
    data: DataRecord
    table: "pa.Table"
    """The training rows."""


def build_trainer(
    model: "PeftModel", training: TrainingInput, run: Run, choice: BatchChoice, order: batches.ShuffledRows
) -> "StepTrainer":
    """Return the trainer for these rows, which writes its checkpoints and its log to finetune/.

    Args:
        order: the rows in the order of training.
    """
    from transformers import AutoTokenizer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from pipeline.finetune.trainer import StepTrainer

    tune = training.tune
    settings = create_step_settings(model, training, run, choice, order)
    step_dataset = batches.build_step_dataset(training.table, order, choice.train_batch_size)
    trainer = StepTrainer(
        settings,
        model=model,
        processing_class=AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer"),
        args=trainer_arguments(
            tune, training.base, choice, len(step_dataset), len(training.table), settings.checkpoint_folder
        ),
        train_dataset=step_dataset,
        eval_dataset=None if tune.eval_strategy == "no" else load_heldout_steps(training.data.output_path("heldout")),
        callbacks=create_callbacks(tune, run.folder / "finetune", settings),
    )
    for callback_class in (ProgressCallback, PrinterCallback):  # LogCallback replaces them
        trainer.remove_callback(callback_class)
    return trainer


def create_step_settings(
    model: "PeftModel", training: TrainingInput, run: Run, choice: BatchChoice, order: batches.ShuffledRows
) -> "StepSettings":
    """Return what the trainer needs besides the library's own arguments."""
    from pipeline.finetune.trainer import StepSettings

    lengths = batches.row_lengths(training.table)
    return StepSettings(
        packed=choice.packing,
        micro_batch_tokens=choice.micro_batch_tokens,
        min_micro_batch_tokens=int(lengths.max()),
        checkpoint_folder=run.folder / "finetune" / "checkpoints",
        signals=StopSignals(),
        meter=create_meter(model, order, lengths, choice.train_batch_size),
        checkpoint_sync=CheckpointSync(run, checkpoint_repo(), training.tune.save_minutes),
    )


def create_meter(
    model: "PeftModel", order: batches.ShuffledRows, lengths: np.ndarray, rows_per_step: int
) -> training_log.SpeedMeter:
    """Return the meter for a training on this machine's GPU."""
    count_tokens = functools.partial(count_tokens_until, order, lengths, rows_per_step)
    speed_and_price = gpu_table.find_speed_and_price(unsloth_loader.describe_device())
    steps = math.ceil(len(order) / rows_per_step)
    return training_log.SpeedMeter(count_tokens, steps, model_flops(model), *speed_and_price)


def create_callbacks(tune: Finetune, folder: Path, settings: "StepSettings") -> list["TrainerCallback"]:
    """Return the trainer's callbacks. `folder` is finetune/ of the run."""
    from transformers import EarlyStoppingCallback

    from pipeline.finetune.callbacks import CheckpointCallback, LogCallback

    # By default it is a folder among the checkpoints, which are removed.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    return [
        CheckpointCallback(
            settings.checkpoint_folder, tune.save_minutes, tune.save_steps, settings.signals, settings.checkpoint_sync
        ),
        LogCallback(folder / "log.jsonl", settings.meter),
        *([EarlyStoppingCallback(tune.early_stopping_patience)] if tune.early_stopping_patience else []),
        *create_reporters(tune.report_to),
    ]


def count_tokens_until(order: batches.ShuffledRows, lengths: np.ndarray, per_step: int, step: int) -> int:
    """Return the number of tokens in the first `step` optimizer steps."""
    return order.count_tokens(lengths, step * per_step)


def create_reporters(names: tuple[str, ...]) -> list["TrainerCallback"]:
    """Return the library's callbacks for `report_to`. Raise UserError for an unknown name or a missing package."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        return [callback() for callback in get_reporting_integration_callbacks(list(names))]
    except (ValueError, ImportError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"finetune.report_to: {' '.join(str(error).split())}",
            f"correct it, or install what it needs: .venv/bin/python -m pip install {' '.join(names)}",
            code="finetune.unknown_reporter" if isinstance(error, ValueError) else "finetune.reporter_not_installed",
        ) from error


def model_flops(model: "PeftModel") -> float:
    """Return the FLOPs to train on one token, or 0 when the shape of the model is unknown."""
    shape = memory_need.shape_from_config(model.config.to_dict())
    return shape.flops_per_token() if shape else 0.0


def refuse_unknown_targets(model: "PreTrainedModel | PeftModel", names: tuple[str, ...]) -> None:
    """Raise UserError for a target module that the model does not have.

    The usual seven fit every model, because Unsloth also finds fused ones. Any other unknown name is a mistake.
    """
    modules = {name.split(".")[-1] for name, _ in model.named_modules()}
    if unknown := sorted(set(names) - modules - set(LINEAR_LAYERS)):
        choices = sorted(name for name in modules if name.endswith(("proj", "fc1", "fc2", "dense")))
        raise UserError(
            f"finetune.target_modules: the model has no {', '.join(unknown)}",
            f"choose among {', '.join(choices)}, with a new RUN=name",
            code="finetune.unknown_target_module",
        )


def lora_arguments(tune: Finetune, choice: BatchChoice) -> dict[str, Any]:
    """Return the arguments of FastLanguageModel.get_peft_model."""
    arguments = tune.model_dump(include={"r", "lora_alpha", "lora_dropout", "bias", "use_rslora"})
    arguments["target_modules"] = list(tune.target_modules)
    arguments["random_state"] = tune.seed
    arguments["use_gradient_checkpointing"] = choice.use_gradient_checkpointing
    return arguments | loftq_arguments(tune.loftq_bits)


def loftq_arguments(bits: int | None) -> dict[str, Any]:
    """Return the arguments that initialize the matrices by LoftQ; {} without it."""
    if not bits:
        return {}
    from peft import LoftQConfig

    return {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=bits)}


# The arguments of SFTConfig by which one item of the data set is one optimizer step, trained as it is.
WHOLE_STEP_ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "train_sampling_strategy": "sequential",
    "padding_free": False,
    "remove_unused_columns": False,
}
LOG_ARGUMENTS: dict[str, Any] = {
    "report_to": "none",
    "logging_first_step": True,
    # Each of these two would wait for the GPU at every step.
    "include_num_input_tokens_seen": "no",
    "logging_nan_inf_filter": False,
}


def trainer_arguments(
    tune: Finetune, base: Base, choice: BatchChoice, steps: int, row_count: int, checkpoint_folder: Path
) -> "SFTConfig":
    """Return the SFTConfig for a data set of whole optimizer steps, whose rows are tokenized and masked already.

    Args:
        steps: optimizer steps of the training.
        row_count: number of training rows.
        checkpoint_folder: the folder that checkpoints are written to.

    Raises:
        UserError: the library refuses the settings.
    """
    from trl import SFTConfig

    settings = tune.model_dump(
        include={"lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "logging_steps", "seed"}
    )
    try:
        return SFTConfig(
            **WHOLE_STEP_ARGUMENTS,
            **LOG_ARGUMENTS,
            **settings,
            **precision_arguments(),
            **evaluation_arguments(tune, -(-row_count // choice.train_batch_size)),
            learning_rate=choice.learning_rate,
            optim=choose_optimizer(tune.optim),
            max_steps=steps,
            dataset_kwargs={"skip_prepare_dataset": True},
            packing=choice.packing,
            max_length=base.max_seq_length,
            pad_to_multiple_of=batches.PACKED_MULTIPLE if choice.packing else batches.PADDED_MULTIPLE,
            gradient_checkpointing=bool(choice.use_gradient_checkpointing),
            output_dir=str(checkpoint_folder),
        )
    except ValueError as error:
        raise UserError(
            f"the trainer does not accept the finetune settings: {error}",
            "correct the finetune section, then start a new run with RUN=name",
            code="finetune.invalid_settings",
        ) from error


def precision_arguments() -> dict[str, Any]:
    """Return the arguments of SFTConfig that train in bf16, or in fp16 where the GPU has no bf16."""
    from unsloth import is_bfloat16_supported

    bf16 = is_bfloat16_supported()
    return {"bf16": bf16, "fp16": not bf16}


def evaluation_arguments(tune: Finetune, steps_per_epoch: int) -> dict[str, Any]:
    """Return the arguments of SFTConfig that compute the held-out loss and keep the checkpoint with the lowest one."""
    eval_steps = tune.eval_steps if tune.eval_strategy == "steps" else steps_per_epoch
    if tune.eval_strategy == "no":
        none = {"save_strategy": "no", "metric_for_best_model": None, "greater_is_better": None}
        return {"eval_strategy": "no", "eval_steps": eval_steps, **none}
    best = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return {"eval_strategy": "steps", "eval_steps": eval_steps, **best}


def choose_optimizer(name: str) -> str:
    """Return the optimizer to use: on a CPU, adamw_torch_fused for 8-bit and paged ones, which need a GPU."""
    return "adamw_torch_fused" if unsloth_loader.gpu_memory_bytes() is None and re.search("8bit|paged", name) else name


def load_heldout_steps(path: Path) -> "Dataset":
    """Return a data set of the held-out rows, sixteen in an item."""
    import pyarrow as pa

    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in files.read_rows(path)]
    table = pa.Table.from_pylist(rows, schema=training_rows.row_schema())
    return batches.build_step_dataset(table, np.arange(len(table)), 16)
