"""Weights and losses must be finite: NaN and infinity end a run where they are first seen.

An earlier stage may have written them and still ended with exit code 0.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    import torch

RETRAIN_HINT = 'train again with a lower learning rate: a new RUN=name and SET="finetune.learning_rate=1e-4"'
# The hint for each source of a loss; the other names in the quality ladder are those of GGUFs.
HINTS_BY_LABEL = {
    "base": (
        'the base model gives no finite numbers here: SET="base.load_in_4bit=false", or a different base.model, '
        "with a new RUN=name"
    ),
    "adapter": RETRAIN_HINT,
}
BFLOAT16_HINT = 'its values are too large for float16: a new RUN=name and SET="export.dtype=bfloat16"'


def find_broken_tensor(named_tensors: Iterable[tuple[str, "torch.Tensor"]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; None where all are finite."""
    return next((name for name, tensor in named_tensors if not bool(tensor.isfinite().all())), None)


def refuse_broken_adapter(path: Path) -> None:
    """Raise UserError when a tensor of the adapter's safetensors file is not finite."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        broken_name = find_broken_tensor((name, file.get_tensor(name)) for name in list(file.keys()))
    if broken_name:
        text = f"{path} holds NaN or infinity in {broken_name}: the training diverged"
        raise UserError(text, RETRAIN_HINT, code="adapter.not_finite")


def refuse_broken_losses(losses: Iterable[float], label: str) -> None:
    """Raise UserError for the first row's loss that is not finite; `label` names its source in the quality ladder."""
    for row, loss in enumerate(losses):
        if not math.isfinite(loss):
            hint = HINTS_BY_LABEL.get(label, BFLOAT16_HINT)
            raise UserError(f"{label}: the loss of row {row} is {loss}", hint, code="loss.not_finite")
