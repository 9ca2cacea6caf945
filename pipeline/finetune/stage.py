"""finetune: train LoRA matrices with Unsloth and TRL on the rows that `data` wrote, without changing them."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from common import console, files
from common.errors import UserError
from pipeline.base_model import fetch, model_config, restore_gguf
from pipeline.config.schema import Base, Finetune
from pipeline.finetune import row_checks, training_log
from pipeline.finetune.build_trainer import TrainingInput, build_model, build_trainer
from pipeline.finetune.stop_signals import LAST_LOSS_FILE, OutOfGpuMemory, StopTraining
from pipeline.plan import batches, choose_batch, disk_space, gpu_table, memory_need
from pipeline.plan.estimate import POLICY_NAMES
from pipeline.run import checkpoint_files, training_rows
from pipeline.run.records import DataRecord, FinetuneRecord
from pipeline.run.run_folder import Run
from pipeline.toolchain import unsloth_loader

if TYPE_CHECKING:
    import torch
    from transformers import TrainerState

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
    training = load_training(base, tune, data, run)
    verify_first_step_and_answer_ends(training)
    checkpoint = checkpoint_files.prune_and_find_checkpoint(folder / "checkpoints")
    announce_training(training, checkpoint)
    run_training(training.trainer, checkpoint, folder / "choice.json", training.choice)
    record = write_results(training, run, checkpoint)
    # They are removed after the record is written, because a run that is killed before that resumes from them.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def load_training(base: Base, tune: Finetune, data: DataRecord, run: Run) -> PreparedTraining:
    """Load base model and rows and return the trainer for them. Raise UserError when disk or GPU are too small."""
    weights = restore_gguf.prepare_weights(fetch.fetch_base_model(base.model, data.base.revision))
    config_json = model_config.read_config(weights)
    refuse_full_disk(memory_need.shape_from_config(config_json), tune, run.folder / "finetune")
    source = TrainingInput(base, tune, data, training_rows.read_table(data.output_path("train")))
    with translate_oom_errors(base):
        return prepare_training(weights, config_json, source, run)


def verify_first_step_and_answer_ends(training: PreparedTraining) -> None:
    """Raise RuntimeError unless the first step has the rows that `data` wrote, and all rows end as they should."""
    trainer, table, data = training.trainer, training.source.table, training.source.data
    row_checks.verify_first_step(trainer, table)
    end_ids = row_checks.end_token_ids(trainer.processing_class, data.chat.end)
    row_checks.verify_answer_ends(table, end_ids, data.truncated.get("rows", 0))


def announce_training(training: PreparedTraining, checkpoint: Path | None) -> None:
    """Print what starts or continues on which device, and its batch settings."""
    beginning = f"continuing from {checkpoint.name}" if checkpoint else "starting"
    batch_settings = describe_run(training.trainer, training.choice)
    text = f"  {beginning} on {unsloth_loader.describe_device()}: {batch_settings}"
    console.print_message(console.wrap_text(text, 2))


@contextlib.contextmanager
def translate_oom_errors(base: Base) -> Iterator[None]:
    """Raise UserError for an out-of-memory error before the first step."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory_error(base, error) from error


def out_of_memory_error(base: Base, error: Exception) -> UserError:
    """Return the error that says that before the first step the GPU's memory is full: another process holds it."""
    return UserError(
        f"{base.model} does not fit in the free memory of {unsloth_loader.describe_device()}: "
        f"{str(error).splitlines()[0]}",
        "`make doctor` shows which process uses the GPU's memory; then run the same command again",
        code="gpu.memory_in_use",
    )


def prepare_training(weights: Path, config_json: dict[str, Any], source: TrainingInput, run: Run) -> PreparedTraining:
    """Return the trainer with its batch settings and the order of the rows; write choice.json.

    A resumed training keeps the rows of a step and the learning rate that it started with, on any GPU.

    Args:
        weights: the folder of the base model's weights.
        config_json: the content of its config.json.

    Raises:
        UserError: the GPU cannot train the model, or its memory is too small.
    """
    model_type = config_json.get("model_type", "")
    refuse_unfit_gpu(model_type, source.base)
    choice_path = run.folder / "finetune" / "choice.json"
    saved_choice = files.read_json(choice_path) if choice_path.is_file() else {}
    tune = apply_saved_settings(source.tune, saved_choice)
    task = build_training_task(config_json, source, saved_choice.get("train_batch_size"))
    wants_packing = tune.packing and task.gpu_bytes is not None
    can_pack = wants_packing and choose_batch.can_pack_rows(model_type)
    choice, order = choose_batch.choose_batch_settings(task, tune, saved_choice.get("packing", can_pack))
    model = build_model(weights, source.base, tune, choice)
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


def apply_saved_settings(tune: Finetune, saved_choice: dict[str, Any]) -> Finetune:
    """Return the settings with those that a probe, or a start that ran out of memory, wrote to choice.json."""
    return tune.model_copy(update=saved_choice.get("probed", {}) | saved_choice.get("after_out_of_memory", {}))


def build_training_task(
    config_json: dict[str, Any], source: TrainingInput, resumed_rows_per_step: int | None
) -> choose_batch.TrainingTask:
    """Return what is trained, and on what, for the choice of the batch settings."""
    shape, lengths = memory_need.shape_from_config(config_json), batches.row_lengths(source.table)
    gpu_bytes = unsloth_loader.gpu_memory_bytes()
    return choose_batch.TrainingTask(shape, source.base, lengths, gpu_bytes, resumed_rows_per_step)


def refuse_unfit_gpu(model_type: str, base: Base) -> None:
    """Raise UserError when this GPU cannot train models of this kind (`model_type` of config.json)."""
    if fault := find_gpu_fault(model_type):
        raise UserError(
            f"{base.model} cannot be trained on {unsloth_loader.describe_device()}: {fault}",
            "use a machine with a newer GPU (`make plan` names the cheapest that fits)",
            code="gpu.unsupported",
        )


def find_gpu_fault(model_type: str) -> str | None:
    """Return the reason why this machine's GPU cannot train such models; None when it can, or without a GPU."""
    capability = unsloth_loader.gpu_capability()
    return gpu_table.find_gpu_fault(capability, model_type) if capability else None


def refuse_full_disk(shape: memory_need.ModelShape | None, tune: Finetune, folder: Path) -> None:
    """Raise UserError when the disk is too full for the checkpoints: the first one comes after minutes on the GPU."""
    place = files.nearest_existing_path(folder)
    free = shutil.disk_usage(place).free
    if shape and free < (need := disk_space.checkpoint_bytes(shape, tune)):
        raise UserError(
            f"checkpoints and adapter need {need / 1e9:.2f} GB of disk space, {free / 1e9:.2f} GB are free at {place}",
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
    if trainer.signals.number is not None:
        exit_after_signal(trainer, trainer.signals.number)
    trainer.checkpoint_sync.kill_push()  # the adapter, which is sent after the stage, is newer


def exit_after_signal(trainer: "StepTrainer", number: int) -> NoReturn:
    """Send the last checkpoint to the Hub, and end the process as the signal of this number asks."""
    console.print_message(f"finetune: {signal.Signals(number).name} after step {trainer.state.global_step:,}")
    checkpoint = checkpoint_files.prune_and_find_checkpoint(trainer.checkpoint_folder)
    trainer.checkpoint_sync.send_final_checkpoint(checkpoint)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    console.print_message("stopped; the same command resumes from here")
    raise SystemExit(128 + number)


def train_to_end(trainer: "StepTrainer", checkpoint: Path | None) -> None:
    """Train to the end and load the best weights."""
    state = read_trainer_state(checkpoint) if checkpoint else None
    if checkpoint and state and (state.global_step >= state.max_steps or has_stopped_early(state)):
        restore_ended_training(trainer, checkpoint, state)
    else:
        train_remaining_steps(trainer, checkpoint, state.global_step if state else 0)
    if not trainer.signals:
        load_best_weights(trainer)
    trainer.refuse_broken_weights()


def read_trainer_state(checkpoint: Path) -> "TrainerState":
    """Return the trainer's state in a checkpoint."""
    from transformers import TrainerState

    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def restore_ended_training(trainer: "StepTrainer", checkpoint: Path, state: "TrainerState") -> None:
    """Load the weights of a training's last checkpoint without training: to resume it would train another step."""
    load_adapter_weights(trainer, checkpoint)
    trainer.state = state
    trainer.last_loss = read_last_loss(checkpoint)


def train_remaining_steps(trainer: "StepTrainer", checkpoint: Path | None, done: int) -> None:
    """Train from a checkpoint of `done` steps, or from the start."""
    from pipeline.finetune.callbacks import show_progress

    with show_progress(trainer, done):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.refuse_broken_losses()


def load_best_weights(trainer: "StepTrainer") -> None:
    """Load the weights with the lowest held-out loss, where it was computed."""
    if best := trainer.state.best_model_checkpoint:
        # Only the name is used, because the path may be that of another machine.
        load_adapter_weights(trainer, trainer.checkpoint_folder / Path(best).name)


def has_stopped_early(state: "TrainerState") -> bool:
    """Return whether the training of this trainer state has ended because the held-out loss stopped improving."""
    callbacks: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # the trainer makes it a dict
    callback_state = callbacks.get("EarlyStoppingCallback", {})
    patience = callback_state.get("args", {}).get("early_stopping_patience")
    return patience is not None and callback_state["attributes"]["early_stopping_patience_counter"] >= patience


def load_adapter_weights(trainer: "StepTrainer", checkpoint: Path) -> None:
    """Load the adapter weights of a checkpoint into the trainer's model."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))


def restart_with_checkpointing(choice_path: Path, choice: choose_batch.BatchChoice, reason: str) -> NoReturn:
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
    change = {"after_out_of_memory": {"use_gradient_checkpointing": "unsloth"}}
    files.write_json(choice_path, files.read_json(choice_path) | change)
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


def read_last_loss(checkpoint: Path) -> "torch.Tensor | None":
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
    """Write adapter and tokenizer to a folder. Raise UserError when they cannot be written; the checkpoint is kept."""
    from safetensors import SafetensorError

    try:
        with files.write_atomically(path) as part:
            trainer.model.save_pretrained(str(part))
            trainer.processing_class.save_pretrained(part)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the adapter cannot be written: {error}",
            "free some disk space, then run the same command: it resumes from the last checkpoint",
            code="finetune.adapter_not_written",
        ) from error
