"""finetune: train LoRA matrices with Unsloth and TRL on the rows that `data` wrote, without changing them."""

import contextlib
import os
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import console, files
from common.errors import UserError
from pipeline.base_model import fetch as bases
from pipeline.base_model import model_config, restore_gguf
from pipeline.config.schema import Base, Finetune
from pipeline.finetune import row_checks, training_log
from pipeline.finetune.build_trainer import TrainingInput, build_model, build_trainer
from pipeline.finetune.early_stop import LAST_LOSS_FILE, OutOfGpuMemory, StopTraining
from pipeline.plan import batches, choose_batch, disk_space, gpu_table, memory_need
from pipeline.plan.estimate import POLICY_NAMES
from pipeline.run import checkpoint_files, training_rows
from pipeline.run.records import DataRecord, FinetuneRecord
from pipeline.run.run_folder import Run
from pipeline.toolchain import unsloth_loader

if TYPE_CHECKING:
    from pipeline.finetune.trainer import StepTrainer


@dataclass(frozen=True)
class PreparedTraining:
    """A trainer that is ready, and what it was made from."""

    trainer: "StepTrainer"
    choice: choose_batch.BatchChoice
    order: batches.ShuffledRows
    """The rows in the order of training."""
    source: TrainingInput
    weights: Path
    """The folder of the base model's weights."""


def run_finetune(base: Base, tune: Finetune, data: DataRecord, run: Run) -> FinetuneRecord:
    """Train or resume from the last complete checkpoint, write finetune/adapter/ and the record, and return the record.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the training with a checkpoint.
        SystemExit: SIGTERM ended the training with a checkpoint; the exit code is 143.
    """
    folder = run.prepare_stage_folder("finetune", "data")
    weights = restore_gguf.prepare_weights(bases.fetch_base_model(base.model, data.base.revision))
    config_json = model_config.read_config(weights)
    refuse_full_disk(memory_need.shape_from_config(config_json), tune, folder)
    training_table = training_rows.read_table(data.output_path("train"))
    with translate_oom_errors(base):
        training = prepare_training(weights, config_json, TrainingInput(base, tune, data, training_table), run)
    trainer = training.trainer
    row_checks.verify_first_step(trainer, training_table)
    end_ids = row_checks.end_token_ids(trainer.processing_class, data.chat.end)
    row_checks.verify_answer_ends(training_table, end_ids, data.truncated.get("rows", 0))
    checkpoint = checkpoint_files.prune_and_find_checkpoint(folder / "checkpoints")
    beginning = f"continuing from {checkpoint.name}" if checkpoint else "starting"
    description = f"  {beginning} on {unsloth_loader.describe_device()}: {describe_run(trainer, training.choice)}"
    console.print_message(console.wrap_text(description, 2))
    run_training(trainer, checkpoint, folder / "choice.json", training.choice)
    record = write_results(training, run, checkpoint)
    # They are removed after the record is written, because a run that is killed before that resumes from them.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


@contextlib.contextmanager
def translate_oom_errors(base: Base):
    """Raise UserError for an out-of-memory error before the first step.

    At that point the GPU is full because another process holds its memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{base.model} does not fit in the free memory of {unsloth_loader.describe_device()}: "
            f"{str(error).splitlines()[0]}",
            "`make doctor` shows which process uses the GPU's memory; then run the same command again",
            code="gpu.memory_in_use",
        ) from error


def prepare_training(weights: Path, config_json: dict, source: TrainingInput, run: Run) -> PreparedTraining:
    """Return the trainer with its batch settings and the order of the rows; write choice.json.

    A resumed training keeps the rows of a step and the learning rate that it started with, on any GPU.

    Args:
        weights: the folder of the base model's weights.
        config_json: the content of its config.json.

    Raises:
        UserError: the GPU cannot train the model, or its memory is too small.
    """
    base, tune = source.base, source.tune
    refuse_unfit_gpu(config_json.get("model_type", ""), base)
    choice_path = run.folder / "finetune" / "choice.json"
    saved_choice = files.read_json(choice_path) if choice_path.is_file() else {}
    tune = tune.model_copy(update=saved_choice.get("probed", {}) | saved_choice.get("after_out_of_memory", {}))
    wants_packing = tune.packing and unsloth_loader.gpu_memory_bytes() is not None
    task = choose_batch.TrainingTask(
        memory_need.shape_from_config(config_json),
        base,
        batches.row_lengths(source.table),
        unsloth_loader.gpu_memory_bytes(),
        saved_choice.get("train_batch_size"),
    )
    can_pack = wants_packing and choose_batch.can_pack_rows(config_json.get("model_type", ""))
    choice, order = choose_batch.choose_batch_settings(task, tune, saved_choice.get("packing", can_pack))
    model = build_model(weights, base, tune, choice)
    trainer = build_trainer(model, replace(source, tune=tune), run, choice, order)
    if choice.packing and not trainer.args.packing:  # Unsloth does not decide by the model's type alone
        tune = tune.model_copy(update={"use_gradient_checkpointing": choice.use_gradient_checkpointing})
        choice, order = choose_batch.choose_batch_settings(task, tune, packed=False)
        trainer = build_trainer(model, replace(source, tune=tune), run, choice, order)
    if wants_packing and not choice.packing:
        console.print_note(
            f"Unsloth does not pack {model.config.model_type}: rows of similar length are padded instead"
        )
    files.write_json(choice_path, saved_choice | asdict(choice))
    return PreparedTraining(trainer, choice, order, source, weights)


def refuse_unfit_gpu(model_type: str, base: Base) -> None:
    """Raise UserError when this GPU cannot train models of this kind (`model_type` of config.json)."""
    capability = unsloth_loader.gpu_capability()
    if capability and (fault := gpu_table.find_gpu_fault(capability, model_type)):
        raise UserError(
            f"{base.model} cannot be trained on {unsloth_loader.describe_device()}: {fault}",
            "use a machine with a newer GPU (`make plan` names the cheapest that fits)",
            code="gpu.unsupported",
        )


def refuse_full_disk(shape: memory_need.ModelShape | None, tune: Finetune, folder: Path) -> None:
    """Raise UserError when the disk is too full for the checkpoints.

    Otherwise the error would only appear at the first checkpoint, after minutes of paid GPU time.
    """
    free = shutil.disk_usage(files.nearest_existing_path(folder)).free
    if shape and free < (need := disk_space.checkpoint_bytes(shape, tune)):
        raise UserError(
            f"checkpoints and adapter need {need / 1e9:.2f} GB of disk space, {free / 1e9:.2f} GB are free at "
            f"{files.nearest_existing_path(folder)}",
            "free some disk space, then run the same command again",
            code="disk.too_little_for_checkpoints",
        )


def describe_run(trainer: "StepTrainer", choice: choose_batch.BatchChoice) -> str:
    """Return the number of steps and the batch settings of the training, for the user."""
    layout = "packed" if choice.packing else "padded"
    return (
        f"{trainer.args.max_steps:,} steps of {choice.train_batch_size} rows, {layout}, "
        f"at most {choice.micro_batch_tokens:,} tokens at once, learning rate {choice.learning_rate:.3g}, "
        f"gradient checkpointing: {POLICY_NAMES[choice.use_gradient_checkpointing]}"
    )


def run_training(
    trainer: "StepTrainer", checkpoint: Path | None, choice_path: Path, choice: choose_batch.BatchChoice
) -> None:
    """Train to the end, or until a signal or too little GPU memory ends the training with a checkpoint.

    Out of memory, the process restarts itself and resumes from the checkpoint with gradient checkpointing. After a
    signal, the checkpoint is also sent to the Hub, and the next start resumes from it.

    Args:
        checkpoint: the checkpoint to resume from.
        choice_path: the choice.json of the training.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the training.
        SystemExit: SIGTERM ended the training.
        UserError: memory is too small even with gradient checkpointing, or the training gave NaN or infinity.
    """
    try:
        with trainer.signals.capture_signals():
            train_to_end(trainer, checkpoint)
    except OutOfGpuMemory as error:
        trainer.save_checkpoint_now()
        restart_with_checkpointing(choice_path, choice, str(error))
    except StopTraining:
        trainer.save_checkpoint_now()
    if not trainer.signals:
        trainer.checkpoint_sync.kill_push()  # the adapter, which is sent after the stage, is newer
    else:
        console.print_message(
            f"finetune: {signal.Signals(trainer.signals.number).name} after step {trainer.state.global_step:,}"
        )
        trainer.checkpoint_sync.send_final_checkpoint(
            checkpoint_files.prune_and_find_checkpoint(Path(trainer.args.output_dir))
        )
        if trainer.signals.number == signal.SIGINT:
            raise KeyboardInterrupt
        console.print_message("stopped; the same command resumes from here")
        raise SystemExit(128 + trainer.signals.number)


def train_to_end(trainer: "StepTrainer", checkpoint: Path | None) -> None:
    """Train to the end and load the best weights.

    From a checkpoint of the last step only the weights are loaded, because resuming would train another step.
    """
    from transformers import TrainerState

    from pipeline.finetune.callbacks import show_progress

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if state and (state.global_step >= state.max_steps or has_stopped_early(state)):
        load_adapter_weights(trainer, checkpoint)
        trainer.state = state
        trainer.last_loss = read_last_loss(checkpoint)
    else:
        with show_progress(trainer, state.global_step if state else 0):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.refuse_broken_losses()
    if not trainer.signals and (best := trainer.state.best_model_checkpoint):
        # Only the name is used, because the path may be that of another machine.
        load_adapter_weights(trainer, Path(trainer.args.output_dir) / Path(best).name)
    trainer.refuse_broken_weights()


def has_stopped_early(state) -> bool:
    """Return whether the training of this trainer state has ended because the held-out loss stopped improving."""
    callback_state = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    patience = callback_state.get("args", {}).get("early_stopping_patience")
    return patience is not None and callback_state["attributes"]["early_stopping_patience_counter"] >= patience


def load_adapter_weights(trainer: "StepTrainer", checkpoint: Path) -> None:
    """Load the adapter weights of a checkpoint into the trainer's model."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))


def restart_with_checkpointing(choice_path: Path, choice: choose_batch.BatchChoice, reason: str) -> None:
    """Replace this process by a new one that resumes with gradient checkpointing, when no micro-batch fits.

    Raises:
        UserError: gradient checkpointing was on already.
    """
    if choice.use_gradient_checkpointing:
        raise UserError(
            f"out of GPU memory with the smallest micro-batch and gradient checkpointing: {reason}",
            "run the same command on a larger GPU: it resumes from the last checkpoint; or set a smaller "
            "base.max_seq_length with a new RUN=name",
            code="gpu.out_of_memory",
        )
    files.write_json(
        choice_path, files.read_json(choice_path) | {"after_out_of_memory": {"use_gradient_checkpointing": "unsloth"}}
    )
    console.print_note("the stage restarts with Unsloth's gradient checkpointing")
    os.execv(sys.executable, sys.orig_argv)


def write_results(training: PreparedTraining, run: Run, checkpoint: Path | None) -> FinetuneRecord:
    """Write the adapter, the log and the record, and return the record.

    Args:
        checkpoint: the checkpoint that the training was resumed from.
    """
    trainer, choice, folder = training.trainer, training.choice, run.folder / "finetune"
    save_adapter(trainer, folder / "adapter")
    history, step = trainer.state.log_history, trainer.state.global_step
    training_log.write_log(folder / "log.jsonl", history)
    rows_trained = min(len(training.order), step * choice.train_batch_size)
    return run.write_record(
        FinetuneRecord,
        ("data",),
        {
            "adapter": folder / "adapter" / "adapter_model.safetensors",
            "adapter_config": folder / "adapter" / "adapter_config.json",
            "log": folder / "log.jsonl",
        },
        steps=step,
        epochs=round(rows_trained / len(training.source.table), 2),
        rows=rows_trained,
        final_loss=final_loss(trainer),
        best_step=trainer.state.best_global_step,
        best_loss=trainer.state.best_metric,
        resumed_from=checkpoint.name if checkpoint else None,
        device=unsloth_loader.describe_device(),
        peak_memory_gb=unsloth_loader.peak_memory_gb(),
        tokens=trainer.meter.count_tokens(step),
        trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        seed=training.source.tune.seed,
        weights=str(training.weights),
        **asdict(choice),
    )


def read_last_loss(checkpoint: Path):
    """Return the loss of a checkpoint's last step as a tensor, or None when an older Ferry wrote the checkpoint."""
    import torch

    path = checkpoint / LAST_LOSS_FILE
    return torch.tensor(files.read_json(path)["loss"]) if path.is_file() else None


def final_loss(trainer: "StepTrainer") -> float:
    """Return the loss of the last step, or the last logged mean when the loss of that step is unknown."""
    if trainer.last_loss is not None:
        return round(trainer.last_loss.item(), 5)
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


def save_adapter(trainer: "StepTrainer", path: Path) -> None:
    """Write the adapter and the tokenizer to a folder.

    Raises:
        UserError: they cannot be written, for example on a full disk. The training's last checkpoint is kept.
    """
    from safetensors import SafetensorError

    try:
        with files.write_atomically(path) as part:
            trainer.model.save_pretrained(part)
            trainer.processing_class.save_pretrained(part)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the adapter cannot be written: {error}",
            "free some disk space, then run the same command: it resumes from the last checkpoint",
            code="finetune.adapter_not_written",
        ) from error
