"""TRL's trainer with optimizer steps that handle full GPU memory, NaN and infinity, and a full disk.

One item of its data set is a whole optimizer step (batches.StepRows). `training_step` splits it into micro-batches and
adds up their gradients, each weighted by its share of the step's tokens. Therefore the loss of a step is the mean over
its tokens for any split, and gradient_accumulation_steps is always 1 for the library.
"""

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from common import console, files
from common.errors import UserError
from pipeline.finetune.checkpoints import Stop
from pipeline.plan import batches
from pipeline.run.checkpoint_files import find_last_complete
from pipeline.toolchain.finite_numbers import find_broken_tensor

if TYPE_CHECKING:
    from trl import SFTTrainer


LAST_LOSS = "last-loss.json"  # in a checkpoint: the loss of its last step
CHECKED_EVERY = 100  # the most steps whose losses stay unchecked on the GPU; a check waits for the GPU


class OutOfMemory(Stop):
    """Not even the smallest micro-batch fits into GPU memory."""


def trainer_class() -> type["SFTTrainer"]:
    """Return the trainer class. It is defined in a function because importing its base class takes seconds."""
    import torch
    from safetensors import SafetensorError
    from trl import SFTTrainer

    class StepTrainer(SFTTrainer):
        """SFTTrainer that trains an item of its data set as one optimizer step, split into micro-batches.

        `prepare` must be called before it trains.
        """

        def prepare(self, **given) -> "StepTrainer":
            """Set the attributes that SFTTrainer does not have, and return the trainer.

            Args:
                packed: whether the rows of a micro-batch are packed or padded.
                micro_batch_tokens: the most tokens of a micro-batch, padding included.
                min_micro_batch_tokens: the least value of it that every row fits into.
                signals: the signals that end the training early.
                meter: measures the speed.
                read_peak_memory: returns the peak GPU memory in GB.
                checkpoint_sync: sends checkpoints to the Hub.
            """
            self.__dict__.update(given)
            self.losses: list[tuple[list[int], torch.Tensor]] = []
            self.last_loss: torch.Tensor | None = None
            self.collate, self.data_collator = self.data_collator, lambda items: items[0]
            return self

        def training_step(self, model, inputs, num_items_in_batch=None):
            """Train one optimizer step and return its loss; out of memory, repeat it with smaller micro-batches."""
            rows = inputs["rows"]
            while True:
                try:
                    loss = self._step(model, rows)
                    self.losses.append((rows.numbers, loss))
                    self.last_loss = loss
                    return loss
                except torch.OutOfMemoryError as error:
                    said = str(error).splitlines()[0]
                # This is outside of the handler, because the traceback holds what the step has allocated.
                self._shrink(rows, said)

        def _step(self, model, rows):
            """Add up the gradients of the step's micro-batches and return the loss of the step."""
            total = 0
            for inputs in self.dealt(rows):
                if self.signals.urgent:
                    raise Stop
                total = total + super().training_step(model, inputs, max(1, rows.targets))
            return total

        def dealt(self, rows):
            """Yield the micro-batches of the step as the model takes them."""
            for group in batches.micro_batches(rows.lengths, self.budget, self.packed):
                yield self.collate(batches.examples(rows, group, self.packed))

        def _shrink(self, rows, said: str) -> None:
            """Halve the micro-batch tokens. Raise OutOfGpuMemory when they are as small as the longest row already."""
            self.model.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            used = min(self.budget, rows.tokens)
            if used <= self.smallest:
                raise OutOfMemory(said)
            self.budget = max(self.smallest, used // 2)
            console.note(
                f"out of GPU memory with {used:,} tokens at once ({said}); the same step again with {self.budget:,}"
            )

        def _maybe_log_save_evaluate(self, *args, **kwargs):
            """Check the losses before the library logs, saves or evaluates, and every LOSS_CHECK_STEPS steps."""
            control = self.control
            if (
                control.should_log
                or control.should_save
                or control.should_evaluate
                or len(self.losses) >= CHECKED_EVERY
            ):
                self.refuse_broken_losses()
            super()._maybe_log_save_evaluate(*args, **kwargs)

        def refuse_broken_losses(self) -> None:
            """Raise UserError for the first step since the last check whose loss is NaN or infinity."""
            losses, self.losses = self.losses, []
            if not losses:
                return
            finite = torch.isfinite(torch.stack([loss for _, loss in losses]))
            if not finite.all():
                at = int((~finite).nonzero()[0])
                numbers, loss = losses[at]
                rows = ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
                step = self.state.global_step - len(losses) + 1 + at
                self._stop_broken(
                    f"the loss of step {step:,} is {loss.item()}: rows {rows} of data/train.parquet, or the step before"
                )

        def refuse_broken_weights(self) -> None:
            """Raise UserError when a trained tensor holds NaN or infinity.

            After the last step no later loss would show it.
            """
            trained = ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
            if broken := find_broken_tensor(trained):
                self._stop_broken(f"after step {self.state.global_step:,} {broken} holds NaN or infinity")

        def _stop_broken(self, what: str) -> NoReturn:
            """Raise UserError that names the last good checkpoint and a lower learning rate."""
            good, rate = find_last_complete(Path(self.args.output_dir)), min(self.args.learning_rate / 4, 2e-4)
            raise UserError(
                f"{what}; the last good checkpoint is {good.name if good else 'none yet'}",
                f'a new RUN=name and SET="finetune.learning_rate={rate:.1e}", or without these rows',
            )

        def log(self, logs, start_time=None):
            """Log the entry, to which speed, memory and costs are added when it has a loss."""
            if "loss" in logs:
                logs |= self.meter.read(self.state.global_step, self.memory())
            super().log(logs, start_time)

        def _save_checkpoint(self, model, trial):
            """Write a checkpoint with the loss of its last step. On a full disk, remove it again and continue."""
            began, path = time.monotonic(), Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            self.refuse_broken_weights()
            try:
                super()._save_checkpoint(model, trial)
                if self.last_loss is not None:
                    files.write_json(path / LAST_LOSS, {"loss": self.last_loss.item()})
            except (OSError, RuntimeError, SafetensorError) as error:  # what torch and safetensors raise on a full disk
                if shutil.disk_usage(self.args.output_dir).free > 100e6 and not isinstance(error, OSError):
                    raise
                shutil.rmtree(path, ignore_errors=True)
                console.note(
                    f"no checkpoint at step {self.state.global_step} ({error}); the one before is kept, "
                    "and the training goes on: free some disk"
                )
            self.meter.pause(time.monotonic() - began)

        def save(self) -> None:
            """Write a checkpoint of the last complete step now, outside of the training loop."""
            self.model.zero_grad()
            self._save_checkpoint(self.model, None)
            self.callback_handler.on_save(self.args, self.state, self.control)

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            """Return the mean loss over the tokens of the held-out rows.

            The library's own value is a mean of the means of the batches.
            """
            began, total, count = time.monotonic(), 0.0, 0
            self.model.eval()
            with torch.no_grad():
                for item in self.get_eval_dataloader():
                    rows = item["rows"]
                    count += rows.targets
                    for inputs in self.dealt(rows):
                        if self.signals.urgent:
                            raise Stop
                        total = total + self._loss(inputs, max(1, rows.targets)) * rows.targets
            metrics = {"eval_loss": float(total) / max(1, count)}
            if not math.isfinite(metrics["eval_loss"]):
                self._stop_broken(f"the held-out loss after step {self.state.global_step:,} is {metrics['eval_loss']}")
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            self.model.train()
            self.meter.pause(time.monotonic() - began)
            return metrics

        def _loss(self, inputs, targets: int):
            """Return the loss of a micro-batch, summed over its tokens and divided by `targets`."""
            with self.compute_loss_context_manager():
                return self.compute_loss(self.model, self._prepare_inputs(inputs), num_items_in_batch=targets).detach()

    return StepTrainer
