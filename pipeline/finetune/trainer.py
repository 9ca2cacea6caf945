"""TRL's trainer with optimizer steps that handle full GPU memory, NaN and infinity, and a full disk.

One item of its data set is a whole optimizer step (batches.StepRows). `training_step` splits it into micro-batches and
adds up their gradients, each weighted by its share of the step's tokens. Therefore the loss of a step is the mean over
its tokens for any split, and gradient_accumulation_steps is always 1 for the library.

Import this module after Unsloth, which patches TRL, and inside of a function: TRL takes seconds to import.
"""

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError
from trl import SFTTrainer

from common import console, files
from common.errors import UserError
from pipeline.checkpoint_sync.background_push import CheckpointSync
from pipeline.finetune.stop_signals import LAST_LOSS_FILE, OutOfGpuMemory, StopSignals, StopTraining
from pipeline.finetune.training_log import SpeedMeter
from pipeline.plan import batches
from pipeline.run.checkpoint_files import prune_and_find_checkpoint
from pipeline.toolchain import unsloth_loader
from pipeline.toolchain.finite_numbers import find_broken_tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig
LOSS_CHECK_STEPS = 100  # the most steps whose losses stay unchecked on the GPU; a check waits for the GPU


@dataclass(frozen=True)
class StepSettings:
    """How the trainer makes its steps, and what it works with."""

    packed: bool
    """Whether the rows of a micro-batch are packed, else padded."""
    micro_batch_tokens: int
    """The most tokens of a micro-batch, padding included."""
    min_micro_batch_tokens: int
    """The least value of it that every row fits into."""
    checkpoint_folder: Path
    signals: StopSignals
    meter: SpeedMeter
    checkpoint_sync: CheckpointSync


class StepTrainer(SFTTrainer):
    """SFTTrainer that trains an item of its data set as one optimizer step, split into micro-batches."""

    args: "SFTConfig"
    model: "PeftModel"
    processing_class: "PreTrainedTokenizerFast"

    def __init__(self, settings: StepSettings, **library_arguments: Any):
        """Create the trainer: `settings` is what SFTTrainer does not have, `library_arguments` are its own."""
        super().__init__(**library_arguments)
        self.packed, self.checkpoint_folder = settings.packed, settings.checkpoint_folder
        self.micro_batch_tokens = settings.micro_batch_tokens
        self.min_micro_batch_tokens = settings.min_micro_batch_tokens
        self.signals, self.meter, self.checkpoint_sync = settings.signals, settings.meter, settings.checkpoint_sync
        self.losses: list[tuple[list[int], torch.Tensor]] = []
        """Row numbers and loss of each step that was not checked yet."""
        self.last_loss: torch.Tensor | None = None
        # The library collates an item of the data set, which is a whole step here.
        self.collate_micro_batch, self.data_collator = self.data_collator, lambda items: items[0]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Train one optimizer step and return its loss; out of memory, repeat it with smaller micro-batches."""
        rows = inputs["rows"]
        while True:
            try:
                loss = self._train_micro_batches(model, rows)
                self.losses.append((rows.numbers, loss))
                self.last_loss = loss
                return loss
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            # This is outside of the handler, because the traceback holds what the step has allocated.
            self._halve_micro_batches(rows, reason)

    def _train_micro_batches(self, model, rows: batches.StepRows):
        """Add up the gradients of the step's micro-batches and return the loss of the step."""
        loss = 0
        for inputs in self.iter_micro_batches(rows):
            if self.signals.is_urgent:
                raise StopTraining
            loss = loss + super().training_step(model, inputs, max(1, rows.targets))
        return loss

    def iter_micro_batches(self, rows: batches.StepRows) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the micro-batches of the step as the model takes them."""
        for group in batches.split_into_micro_batches(rows.lengths, self.micro_batch_tokens, self.packed):
            yield self.collate_micro_batch(batches.build_examples(rows, group, self.packed))

    def _halve_micro_batches(self, rows: batches.StepRows, reason: str) -> None:
        """Halve the micro-batch tokens. Raise OutOfGpuMemory when they are as small as the longest row already."""
        self._free_step_memory()
        current_tokens = min(self.micro_batch_tokens, rows.tokens)
        if current_tokens <= self.min_micro_batch_tokens:
            raise OutOfGpuMemory(reason)
        self.micro_batch_tokens = max(self.min_micro_batch_tokens, current_tokens // 2)
        console.print_note(
            f"out of GPU memory with {current_tokens:,} tokens at once ({reason}); the step is repeated with "
            f"{self.micro_batch_tokens:,}"
        )

    def _free_step_memory(self) -> None:
        """Free the gradients of a step that was abandoned, and what torch keeps for later."""
        self.model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Check the losses before the library logs, saves or evaluates, and every LOSS_CHECK_STEPS steps."""
        control = self.control
        if control.should_log or control.should_save or control.should_evaluate or len(self.losses) >= LOSS_CHECK_STEPS:
            self.refuse_broken_losses()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def refuse_broken_losses(self) -> None:
        """Raise UserError for the first step since the last check whose loss is NaN or infinity."""
        losses, self.losses = self.losses, []
        if losses:
            is_broken = ~torch.isfinite(torch.stack([loss for _, loss in losses]))
            if is_broken.any():
                index = int(is_broken.nonzero()[0])
                self._refuse_broken_step(*losses[index], self.state.global_step - len(losses) + 1 + index)

    def _refuse_broken_step(self, row_numbers: list[int], loss: torch.Tensor, step: int) -> NoReturn:
        """Raise UserError for a step whose loss is NaN or infinity."""
        rows = ", ".join(map(str, row_numbers[:16])) + (", ..." if len(row_numbers) > 16 else "")
        self._refuse_broken_numbers(
            f"the loss of step {step:,} is {loss.item()}, caused by rows {rows} of data/train.parquet or by the "
            "step before",
            code="finetune.loss_not_finite",
        )

    def refuse_broken_weights(self) -> None:
        """Raise UserError when a trained tensor holds NaN or infinity: of the last step no later loss would show it."""
        trainable = ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
        if tensor_name := find_broken_tensor(trainable):
            self._refuse_broken_numbers(
                f"after step {self.state.global_step:,} {tensor_name} holds NaN or infinity",
                code="finetune.weights_not_finite",
            )

    def _refuse_broken_numbers(self, problem: str, code: str) -> NoReturn:
        """Raise UserError that names the last good checkpoint and a lower learning rate."""
        lower_rate = min(self.args.learning_rate / 4, 2e-4)
        raise UserError(
            f"{problem}; {self._describe_last_checkpoint()}",
            f'start a new run with RUN=name SET="finetune.learning_rate={lower_rate:.1e}", or without these rows',
            code=code,
        )

    def _describe_last_checkpoint(self) -> str:
        """Return which checkpoint a broken training leaves."""
        last_good = prune_and_find_checkpoint(self.checkpoint_folder)
        return f"the last good checkpoint is {last_good.name}" if last_good else "there is no good checkpoint yet"

    def log(self, logs, start_time=None):
        """Log the entry, to which speed, memory and costs are added when it has a loss."""
        if "loss" in logs:
            logs |= self.meter.read_entry(self.state.global_step, unsloth_loader.peak_memory_gb())
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint with the loss of its last step. On a full disk, remove it again and continue."""
        started_at, path = time.monotonic(), self.checkpoint_folder / f"checkpoint-{self.state.global_step}"
        self.refuse_broken_weights()
        try:
            super()._save_checkpoint(model, trial)
            if self.last_loss is not None:
                files.write_json(path / LAST_LOSS_FILE, {"loss": self.last_loss.item()})
        except (OSError, RuntimeError, SafetensorError) as error:  # what torch and safetensors raise on a full disk
            self._discard_checkpoint(path, error)
        self.meter.leave_out(time.monotonic() - started_at)

    def _discard_checkpoint(self, path: Path, error: Exception) -> None:
        """Remove a checkpoint that was written in part. Raise the error again when the disk is not full."""
        if shutil.disk_usage(self.checkpoint_folder).free > 100e6 and not isinstance(error, OSError):
            raise error
        shutil.rmtree(path, ignore_errors=True)
        console.print_note(
            f"no checkpoint was written at step {self.state.global_step} ({error}); the previous one is kept and "
            "the training continues: free some disk space"
        )

    def save_checkpoint_now(self) -> None:
        """Write a checkpoint of the last complete step now, outside of the training loop."""
        self.model.zero_grad()
        self._save_checkpoint(self.model, None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Return the mean loss over the tokens of the held-out rows.

        The library's own value is a mean of the means of the batches.
        """
        started_at = time.monotonic()
        self.model.eval()
        metrics = {"eval_loss": self._measure_heldout_loss()}
        if not math.isfinite(metrics["eval_loss"]):
            self._refuse_broken_numbers(
                f"the held-out loss after step {self.state.global_step:,} is {metrics['eval_loss']}",
                code="finetune.heldout_loss_not_finite",
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train()
        self.meter.leave_out(time.monotonic() - started_at)
        return metrics

    @torch.no_grad()
    def _measure_heldout_loss(self) -> float:
        """Return the mean loss over the tokens of the held-out rows. Raise StopTraining after a signal."""
        loss_sum, target_count = 0.0, 0
        for item in self.get_eval_dataloader():
            rows = item["rows"]
            target_count += rows.targets
            for inputs in self.iter_micro_batches(rows):
                if self.signals.is_urgent:
                    raise StopTraining
                loss_sum = loss_sum + self._micro_batch_loss(inputs, max(1, rows.targets)) * rows.targets
        return float(loss_sum) / max(1, target_count)

    def _micro_batch_loss(self, inputs: dict[str, torch.Tensor], targets: int) -> torch.Tensor:
        """Return the loss of a micro-batch, summed over its tokens and divided by `targets`."""
        with self.compute_loss_context_manager():
            return self.compute_loss(self.model, self._prepare_inputs(inputs), num_items_in_batch=targets).detach()
