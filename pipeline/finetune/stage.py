"""finetune: LoRA by Unsloth and TRL on the rows that `data` wrote, passed through untouched."""

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
    """Train, or go on from the last complete checkpoint; write finetune/adapter/ and the record.

    A signal ends it with a checkpoint: KeyboardInterrupt for Ctrl-C, SystemExit(143) for SIGTERM.
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
    console.say(console.wrap(
        f"  {'continuing from ' + checkpoint.name if checkpoint else 'starting'} on {unsloth_loader.device()}: {said(trainer, choice)}", 2
    ))  # fmt: skip
    train(trainer, checkpoint, folder / "choice.json", choice)
    record = write(trainer, run, choice, order, len(written), weights, tune.seed, checkpoint)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only after the record: a kill before it resumes here
    return record


@contextlib.contextmanager
def room(base: Base):
    """What has no room on the card before the first step has none because something else holds it."""
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
    """The trainer, what it was chosen to run with, and the rows in the order of training. described: config.json.

    What was begun goes on with the rows a step and the learning rate that it began with, whatever the card is now.
    """
    refuse_card(described.get("model_type", ""), base)
    path = run.folder / "finetune" / "choice.json"
    begun = files.read_json(path) if path.is_file() else {}
    tune = tune.model_copy(update=begun.get("probed", {}) | begun.get("after_out_of_memory", {}))
    wanted = tune.packing and unsloth_loader.gpu_bytes() is not None
    fitting = functools.partial(
        choose_batch.choose, memory_need.shape(described), base, lengths=batches.lengths(written), card=unsloth_loader.gpu_bytes(),
        begun=begun.get("train_batch_size"),
    )  # fmt: skip
    choice, order = fitting(
        tune, packed=begun.get("packing", wanted and choose_batch.packs(described.get("model_type", "")))
    )
    model = build_model(weights, base, tune, choice)
    trainer = build_trainer(model, base, tune, run, choice, written, order)
    if choice.packing and not trainer.args.packing:  # Unsloth looks at more than the model's type
        tune = tune.model_copy(update={"use_gradient_checkpointing": choice.use_gradient_checkpointing})
        choice, order = fitting(tune, packed=False)
        trainer = build_trainer(model, base, tune, run, choice, written, order)
    if wanted and not choice.packing:
        console.note(f"Unsloth does not pack {model.config.model_type}: rows of similar length are padded instead")
    files.write_json(path, begun | asdict(choice))
    return trainer, choice, order


def refuse_card(kind: str, base: Base) -> None:
    """kind: model_type of config.json."""
    capability = unsloth_loader.capability()
    if capability and (why := gpu_table.unfit(capability, kind)):
        raise UserError(
            f"{base.model} on this {unsloth_loader.device()}: {why}",
            "take a machine with a newer card (`make plan` names the cheapest that fits)",
        )


def refuse_disk(shape: memory_need.Shape | None, tune: Finetune, folder: Path) -> None:
    """A disk that holds no checkpoint would be noticed at the first one, minutes of a paid GPU later."""
    free = shutil.disk_usage(files.nearest(folder)).free
    if shape and free < (need := disk_space.checkpoints(shape, tune)):
        raise UserError(
            f"checkpoints and adapter take {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free at {files.nearest(folder)}",
            "free some, then run the same command again",
        )


def said(trainer: "SFTTrainer", choice: choose_batch.Choice) -> str:
    dealt = "packed" if choice.packing else "padded"
    return (
        f"{trainer.args.max_steps:,} steps of {choice.train_batch_size} rows, {dealt}, at most {choice.micro_batch_tokens:,} tokens at once, "
        f"learning rate {choice.learning_rate:.3g}, gradient checkpointing: {POLICIES[choice.use_gradient_checkpointing]}"
    )


def train(trainer: "SFTTrainer", checkpoint: Path | None, path: Path, choice: choose_batch.Choice) -> None:
    """Train to the end; a signal or too small a card ends it with a checkpoint that the next start goes on from."""
    try:
        with trainer.signals.heard():
            finish(trainer, checkpoint)
    except OutOfMemory as error:
        trainer.save()
        start_again(path, choice, str(error))
    except checkpoints.Stop:
        trainer.save()
    if not trainer.signals:
        trainer.pusher.close()  # the adapter is newer
    else:
        console.say(f"finetune: {signal.Signals(trainer.signals.number).name} after step {trainer.state.global_step:,}")
        trainer.pusher.last(checkpoint_files.find_last_complete(Path(trainer.args.output_dir)))
        if trainer.signals.number == signal.SIGINT:
            raise KeyboardInterrupt
        console.say("stopped; the same command goes on from here")
        raise SystemExit(128 + trainer.signals.number)


def finish(trainer: "SFTTrainer", checkpoint: Path | None) -> None:
    """Train, or, from a checkpoint of the last step, only take its weights: resuming would add a step."""
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
        take(trainer, Path(trainer.args.output_dir) / Path(best).name)  # its folder may be another machine's
    trainer.refuse_broken_weights()


def stopped_early(state) -> bool:
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    patience = stopping.get("args", {}).get("early_stopping_patience")
    return patience is not None and stopping["attributes"]["early_stopping_patience_counter"] >= patience


def take(trainer: "SFTTrainer", checkpoint: Path) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device="cpu"))


def start_again(path: Path, choice: choose_batch.Choice, said: str) -> None:
    """The smallest micro-batch does not fit: once more in a fresh process, with gradient checkpointing.

    Raises UserError when that was on already.
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
    """The adapter, the log, the record."""
    folder = run.folder / "finetune"
    save_adapter(trainer, folder / "adapter")
    history, step = trainer.state.log_history, trainer.state.global_step
    training_log.write(folder / "log.jsonl", history)
    trained = min(len(order), step * choice.train_batch_size)
    return run.write(
        "finetune", ("data",),
        {"adapter": folder / "adapter" / "adapter_model.safetensors", "adapter_config": folder / "adapter" / "adapter_config.json", "log": folder / "log.jsonl"},
        steps=step, epochs=round(trained / there, 2), rows=trained,
        final_loss=final_loss(trainer),
        best_step=trainer.state.best_global_step, best_loss=trainer.state.best_metric,
        resumed_from=checkpoint.name if checkpoint else None, device=unsloth_loader.device(), peak_memory_gb=unsloth_loader.peak_memory_gb(),
        tokens=trainer.meter.count_tokens(step), trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        seed=seed, weights=str(weights), **asdict(choice),
    )  # fmt: skip


def read_last_loss(checkpoint: Path):
    import torch

    path = checkpoint / LAST_LOSS
    return torch.tensor(files.read_json(path)["loss"]) if path.is_file() else None


def final_loss(trainer: "SFTTrainer") -> float:
    """Of the last step; in a checkpoint that does not say it, the mean of the last steps that were logged."""
    if trainer.last_loss is not None:
        return round(trainer.last_loss.item(), 5)
    return next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)


def save_adapter(trainer: "SFTTrainer", path: Path) -> None:
    """With the tokenizer. Raises UserError on a full disk: the training's last checkpoint is kept then."""
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
