"""finetune: train LoRA matrices with Unsloth and TRL on the rows that `data` wrote, without changing them."""

import contextlib
import functools
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from common import console, files
from common.errors import UserError
from pipeline.base_model import fetch as bases
from pipeline.base_model import model_config, restore_gguf
from pipeline.config.schema import Base, Finetune
from pipeline.finetune import checkpoints, row_checks, training_log
from pipeline.finetune.build_trainer import build_model, build_trainer
from pipeline.finetune.trainer import LAST_LOSS, OutOfMemory
from pipeline.plan import batches, choose_batch, disk_space, gpu_table, memory_need
from pipeline.plan.estimate import POLICIES
from pipeline.run import checkpoint_files, training_rows
from pipeline.run.run_folder import Run
from pipeline.toolchain import unsloth_loader

if TYPE_CHECKING:
    import pyarrow as pa
    from trl import SFTTrainer


def stage(base: Base, tune: Finetune, run: Run) -> dict:
    """Train or resume from the last complete checkpoint, write finetune/adapter/ and the record, and return the record.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the training with a checkpoint.
        SystemExit: SIGTERM ended the training with a checkpoint; the exit code is 143.
    """
    data = run.read("data")
    folder = run.workspace("finetune", "data")
    weights = restore_gguf.prepare_weights(bases.fetch_base_model(base.model, data["base"]["revision"]))
    described = model_config.read_config(weights)
    refuse_disk(memory_need.shape(described), tune, folder)
    written = training_rows.read(run.output("data", "train"))
    with room(base):
        trainer, choice, order = prepared(weights, described, base, tune, run, written)
    row_checks.first_batch(trainer, written)
    row_checks.ends(
        written, row_checks.end_ids(trainer.processing_class, data["chat"]["end"]), data["truncated"].get("rows", 0)
    )
    checkpoint = checkpoint_files.find_last_complete(folder / "checkpoints")
    console.say(
        console.wrap(
            f"  {'continuing from ' + checkpoint.name if checkpoint else 'starting'} on {unsloth_loader.device()}: "
            f"{said(trainer, choice)}",
            2,
        )
    )
    train(trainer, checkpoint, folder / "choice.json", choice)
    record = write(trainer, run, choice, order, len(written), weights, tune.seed, checkpoint)
    # They are removed after the record is written, because a run that is killed before that resumes from them.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


@contextlib.contextmanager
def room(base: Base):
    """Raise UserError for an out-of-memory error before the first step.

    At that point the GPU is full because another process holds its memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{base.model} finds no room on {unsloth_loader.device()}: {str(error).splitlines()[0]}",
            "`make doctor` says who holds the card's memory; then run the same command again",
        ) from error


def prepared(
    weights: Path, described: dict, base: Base, tune: Finetune, run: Run, written: "pa.Table"
) -> tuple["SFTTrainer", choose_batch.Choice, batches.ShuffledRows]:
    """Return the trainer, its batch settings, and the rows in the order of training; write choice.json.

    A resumed training keeps the rows of a step and the learning rate that it started with, on any GPU.

    Args:
        config_json: the content of config.json.
        training_table: the rows that `data` wrote.

    Raises:
        UserError: the GPU cannot train the model, or its memory is too small.
    """
    refuse_card(described.get("model_type", ""), base)
    path = run.folder / "finetune" / "choice.json"
    begun = files.read_json(path) if path.is_file() else {}
    tune = tune.model_copy(update=begun.get("probed", {}) | begun.get("after_out_of_memory", {}))
    wanted = tune.packing and unsloth_loader.gpu_bytes() is not None
    fitting = functools.partial(
        choose_batch.choose,
        memory_need.shape(described),
        base,
        lengths=batches.lengths(written),
        card=unsloth_loader.gpu_bytes(),
        begun=begun.get("train_batch_size"),
    )
    choice, order = fitting(
        tune, packed=begun.get("packing", wanted and choose_batch.packs(described.get("model_type", "")))
    )
    model = build_model(weights, base, tune, choice)
    trainer = build_trainer(model, base, tune, run, choice, written, order)
    if choice.packing and not trainer.args.packing:  # Unsloth does not decide by the model's type alone
        tune = tune.model_copy(update={"use_gradient_checkpointing": choice.use_gradient_checkpointing})
        choice, order = fitting(tune, packed=False)
        trainer = build_trainer(model, base, tune, run, choice, written, order)
    if wanted and not choice.packing:
        console.note(f"Unsloth does not pack {model.config.model_type}: rows of similar length are padded instead")
    files.write_json(path, begun | asdict(choice))
    return trainer, choice, order


def refuse_card(kind: str, base: Base) -> None:
    """Raise UserError when this GPU cannot train models of this kind (`model_type` of config.json)."""
    capability = unsloth_loader.capability()
    if capability and (why := gpu_table.unfit(capability, kind)):
        raise UserError(
            f"{base.model} on this {unsloth_loader.device()}: {why}",
            "take a machine with a newer card (`make plan` names the cheapest that fits)",
        )


def refuse_disk(shape: memory_need.Shape | None, tune: Finetune, folder: Path) -> None:
    """Raise UserError when the disk is too full for the checkpoints.

    Otherwise the error would only appear at the first checkpoint, after minutes of paid GPU time.
    """
    free = shutil.disk_usage(files.nearest(folder)).free
    if shape and free < (need := disk_space.checkpoints(shape, tune)):
        raise UserError(
            f"checkpoints and adapter take {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free at "
            f"{files.nearest(folder)}",
            "free some, then run the same command again",
        )


def said(trainer: "SFTTrainer", choice: choose_batch.Choice) -> str:
    """Return the number of steps and the batch settings of the training, for the user."""
    dealt = "packed" if choice.packing else "padded"
    return (
        f"{trainer.args.max_steps:,} steps of {choice.train_batch_size} rows, {dealt}, "
        f"at most {choice.micro_batch_tokens:,} tokens at once, learning rate {choice.learning_rate:.3g}, "
        f"gradient checkpointing: {POLICIES[choice.use_gradient_checkpointing]}"
    )


def train(trainer: "SFTTrainer", checkpoint: Path | None, path: Path, choice: choose_batch.Choice) -> None:
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
        with trainer.signals.heard():
            finish(trainer, checkpoint)
    except OutOfMemory as error:
        trainer.save()
        start_again(path, choice, str(error))
    except checkpoints.Stop:
        trainer.save()
    if not trainer.signals:
        trainer.pusher.close()  # the adapter, which is sent after the stage, is newer
    else:
        console.say(f"finetune: {signal.Signals(trainer.signals.number).name} after step {trainer.state.global_step:,}")
        trainer.pusher.last(checkpoint_files.find_last_complete(Path(trainer.args.output_dir)))
        if trainer.signals.number == signal.SIGINT:
            raise KeyboardInterrupt
        console.say("stopped; the same command goes on from here")
        raise SystemExit(128 + trainer.signals.number)


def finish(trainer: "SFTTrainer", checkpoint: Path | None) -> None:
    """Train to the end and load the best weights.

    From a checkpoint of the last step only the weights are loaded, because resuming would train another step.
    """
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if state and (state.global_step >= state.max_steps or stopped_early(state)):
        take(trainer, checkpoint)
        trainer.state = state
        trainer.last_loss = read_last_loss(checkpoint)
    else:
        with training_log.showing_steps(trainer, state.global_step if state else 0):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.refuse_broken_losses()
    if not trainer.signals and (best := trainer.state.best_model_checkpoint):
        # Only the name is used, because the path may be that of another machine.
        take(trainer, Path(trainer.args.output_dir) / Path(best).name)
    trainer.refuse_broken_weights()


def stopped_early(state) -> bool:
    """Return whether the training of this trainer state has ended because the held-out loss stopped improving."""
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    patience = stopping.get("args", {}).get("early_stopping_patience")
    return patience is not None and stopping["attributes"]["early_stopping_patience_counter"] >= patience


def take(trainer: "SFTTrainer", checkpoint: Path) -> None:
    """Load the adapter weights of a checkpoint into the trainer's model."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))


def start_again(path: Path, choice: choose_batch.Choice, said: str) -> None:
    """Replace this process by a new one that resumes with gradient checkpointing, when no micro-batch fits.

    Raises:
        UserError: gradient checkpointing was on already.
    """
    if choice.use_gradient_checkpointing:
        raise UserError(
            f"out of GPU memory with the smallest micro-batch and gradient checkpointing: {said}",
            "a larger card goes on from the last checkpoint; or a smaller base.max_seq_length with a new RUN=name",
        )
    files.write_json(path, files.read_json(path) | {"after_out_of_memory": {"use_gradient_checkpointing": "unsloth"}})
    console.note("the stage starts once more, with Unsloth's gradient checkpointing")
    os.execv(sys.executable, sys.orig_argv)


def write(
    trainer,
    run: Run,
    choice: choose_batch.Choice,
    order: batches.ShuffledRows,
    there: int,
    weights: Path,
    seed: int,
    checkpoint: Path | None,
) -> dict:
    """Write the adapter, the log and the record, and return the record.

    Args:
        row_count: number of training rows.
        weights: the folder of the base model's weights.
        checkpoint: the checkpoint that the training was resumed from.
    """
    folder = run.folder / "finetune"
    save_adapter(trainer, folder / "adapter")
    history, step = trainer.state.log_history, trainer.state.global_step
    training_log.write(folder / "log.jsonl", history)
    trained = min(len(order), step * choice.train_batch_size)
    return run.write(
        "finetune",
        ("data",),
        {
            "adapter": folder / "adapter" / "adapter_model.safetensors",
            "adapter_config": folder / "adapter" / "adapter_config.json",
            "log": folder / "log.jsonl",
        },
        steps=step,
        epochs=round(trained / there, 2),
        rows=trained,
        final_loss=final_loss(trainer),
        best_step=trainer.state.best_global_step,
        best_loss=trainer.state.best_metric,
        resumed_from=checkpoint.name if checkpoint else None,
        device=unsloth_loader.device(),
        peak_memory_gb=unsloth_loader.peak_memory_gb(),
        tokens=trainer.meter.count_tokens(step),
        trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        seed=seed,
        weights=str(weights),
        **asdict(choice),
    )


def read_last_loss(checkpoint: Path):
    """Return the loss of a checkpoint's last step as a tensor, or None when an older Ferry wrote the checkpoint."""
    import torch

    path = checkpoint / LAST_LOSS
    return torch.tensor(files.read_json(path)["loss"]) if path.is_file() else None


def final_loss(trainer: "SFTTrainer") -> float:
    """Return the loss of the last step, or the last logged mean when the loss of that step is unknown."""
    if trainer.last_loss is not None:
        return round(trainer.last_loss.item(), 5)
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


def save_adapter(trainer: "SFTTrainer", path: Path) -> None:
    """Write the adapter and the tokenizer to a folder.

    Raises:
        UserError: they cannot be written, for example on a full disk. The training's last checkpoint is kept.
    """
    from safetensors import SafetensorError

    try:
        with files.writing(path) as part:
            trainer.model.save_pretrained(part)
            trainer.processing_class.save_pretrained(part)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the adapter cannot be written: {error}",
            "free some disk, then the same command goes on from the last checkpoint",
        ) from error
