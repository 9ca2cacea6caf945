"""probe: measure the speed and memory of a training on this GPU, for every setting that the config leaves open.

Each model (4 or 16 bit, with or without gradient checkpointing) is loaded in a process of its own. There a few steps
with the longest rows are trained for each micro-batch size that might fit, the largest first. `finetune` uses the best.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import files
from common.errors import UserError
from pipeline.config.schema import Base, Finetune
from pipeline.finetune.trainer import OutOfMemory
from pipeline.plan import batches
from pipeline.plan.choose_batch import CHECKPOINTED, TOKENS, Choice
from pipeline.plan.estimate import POLICIES
from pipeline.run.run_folder import Run

if TYPE_CHECKING:
    import pyarrow as pa

STEPS = 6  # steps to train: the first ones compile kernels, and the last one is measured
TOLD = "probed: "  # precedes a result in the output of a measuring process


def stage(run: Run) -> str:
    """Measure all candidates and return them as a table.

    The fastest one with the precision of the config is written to finetune/choice.json.

    Raises:
        UserError: there is no GPU, or no candidate fits.
    """
    config = run.config()
    asked = config.finetune.use_gradient_checkpointing
    found = [
        row
        for bits in (config.base.load_in_4bit, not config.base.load_in_4bit)
        for policy in ((False, "unsloth") if asked == "auto" else (asked,))
        for row in alone(run, bits, policy)
    ]
    fitting = [row for row in found if row["tokens_per_second"]]
    own = [row for row in fitting if row["load_in_4bit"] == config.base.load_in_4bit]
    if not own:
        raise UserError(
            f"nothing fits this card: {config.base.model} with its longest rows", "`make plan` names cards that it fits"
        )
    best = max(own, key=lambda row: row["tokens_per_second"])
    keep(run, {name: best[name] for name in ("micro_batch_tokens", "use_gradient_checkpointing")})
    return "\n".join([*table(found, best), *other(best, fitting)])


def alone(run: Run, bits: bool, policy) -> list[dict]:
    """Measure one model in a process of its own and return its results; none when the model does not fit into memory.

    Args:
        load_in_4bit: whether the model is loaded in 4 bit, else in 16 bit.
        policy: the gradient checkpointing policy.

    Raises:
        UserError: the process reports one.
    """
    asked = [sys.executable, "-m", "pipeline.finetune.probe", str(run.folder), json.dumps([bits, policy])]
    done = subprocess.run(asked, capture_output=True, text=True, errors="replace")
    if done.returncode == 2:
        message, _, hint = done.stderr.rpartition("error: ")[2].strip().partition("\n next: ")
        raise UserError(message, hint)
    done.check_returncode()
    return [json.loads(line.removeprefix(TOLD)) for line in done.stdout.splitlines() if line.startswith(TOLD)]


def measure(run: Run, base: Base, tune: Finetune, policy) -> list[dict]:
    """Measure each micro-batch size, print each result and return them all.

    A result has tokens_per_second (padding not counted) and peak_memory_gb, which are None when the size does not fit.
    """
    from pipeline.base_model import fetch as bases
    from pipeline.base_model import restore_gguf
    from pipeline.finetune import build_trainer
    from pipeline.run import training_rows
    from pipeline.toolchain import unsloth_loader

    written = training_rows.read(run.output("data", "train"))
    lengths = batches.lengths(written)
    weights = restore_gguf.prepare_weights(bases.fetch_base_model(base.model, run.read("data")["base"]["revision"]))
    packed = tune.packing and unsloth_loader.gpu_bytes() is not None
    sizes = [tune.micro_batch_tokens] if tune.micro_batch_tokens else CHECKPOINTED if policy else TOKENS
    model, found = None, []
    for tokens in sorted({max(size, int(lengths.max())) for size in sizes}, reverse=True):
        order = longest(lengths, tokens, packed)
        choice = Choice(len(order), tune.learning_rate, tokens, tokens, policy, packed)
        model = model or build_trainer.build_model(weights, base, tune, choice)
        found.append(
            {"load_in_4bit": base.load_in_4bit, "use_gradient_checkpointing": policy, "micro_batch_tokens": tokens}
            | steps(model, base, tune, run, choice, written.take(order))
        )
        print(TOLD + json.dumps(found[-1]), flush=True)
    return found


def longest(lengths: np.ndarray, tokens: int, packed: bool) -> np.ndarray:
    """Return the numbers of the longest rows that fill a micro-batch of at most `tokens`, one row at least."""
    order = np.argsort(-lengths, kind="stable")
    count = next((n for n in range(len(order), 1, -1) if batches.size(lengths[order[:n]], packed) <= tokens), 1)
    return order[:count]


def steps(model, base: Base, tune: Finetune, run: Run, choice: Choice, full: "pa.Table") -> dict:
    """Train some steps of one full micro-batch with the trainer of `finetune`, and return speed and peak memory.

    The training runs in a temporary folder.
    """
    from pipeline.finetune.build_trainer import build_trainer
    from pipeline.toolchain import unsloth_loader

    unsloth_loader.forget_peak()
    with tempfile.TemporaryDirectory() as empty:
        beside = Run(Path(empty))
        for name in ("data", "data.json"):
            (beside.folder / name).symlink_to((run.folder / name).resolve())
        quiet = tune.model_copy(
            update={"logging_steps": 1, "eval_strategy": "no", "report_to": (), "early_stopping_patience": None}
        )
        order = batches.ShuffledRows(len(full), STEPS * len(full), tune.seed)
        trainer = build_trainer(model, base, quiet, beside, choice, full, order)
        trainer.packed = trainer.args.packing  # Unsloth does not pack rows for every model
        # A micro-batch that does not fit is a result here, so it must not be made smaller.
        trainer.smallest = trainer.budget
        try:
            trainer.train()
        except OutOfMemory:
            return {"tokens_per_second": None, "peak_memory_gb": None}
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    return {"tokens_per_second": round(speeds[-1]), "peak_memory_gb": unsloth_loader.peak_memory_gb()}


def keep(run: Run, probed: dict) -> None:
    """Write the settings for `finetune` to its choice.json; the settings of a training in progress stay there."""
    path = run.workspace("finetune", "data") / "choice.json"
    files.write_json(path, (files.read_json(path) if path.is_file() else {}) | {"probed": probed})


def table(found: list[dict], best: dict) -> list[str]:
    """Return the lines of the table of results, with the best one marked."""
    head = f"  {'base':<8}{'checkpointing':<15}{'at once':>9}{'tokens/s':>10}{'peak GB':>9}"
    return [head, *(f"  {line(row)}{'  <- finetune takes this' if row is best else ''}" for row in found)]


def line(row: dict) -> str:
    """Return one result as a line of the table."""
    bits, policy = "4 bit" if row["load_in_4bit"] else "16 bit", POLICIES[row["use_gradient_checkpointing"]]
    start = f"{bits:<8}{policy:<15}{row['micro_batch_tokens']:>9,}"
    if not row["tokens_per_second"]:
        return f"{start}  does not fit"
    return f"{start}{row['tokens_per_second']:>10,}{row['peak_memory_gb']:>9.1f}"


def other(best: dict, fitting: list[dict]) -> list[str]:
    """Return a hint when the other precision is at least 5 % faster.

    The user has to choose it, because it changes which model is trained.
    """
    rivals = [row["tokens_per_second"] for row in fitting if row["load_in_4bit"] != best["load_in_4bit"]]
    faster = max(rivals, default=0) / best["tokens_per_second"] - 1
    if faster < 0.05:
        return []
    word = "false" if best["load_in_4bit"] else "true"
    return [f'  SET="base.load_in_4bit={word}" with a new RUN=name is {faster:.0%} faster here']


def main(folder: str, asked: str) -> None:
    """Measure one model; `model_settings` is JSON: [whether it is loaded in 4 bit, checkpointing policy]."""
    from pipeline.toolchain import unsloth_loader

    run, (bits, policy) = Run(Path(folder)), json.loads(asked)
    config = run.config()
    unsloth_loader.start()
    if unsloth_loader.gpu_bytes() is None:
        raise UserError("PROBE measures a GPU, and torch sees none here", "leave it out: `make plan` needs no GPU")
    import torch

    with contextlib.suppress(torch.OutOfMemoryError):  # the weights alone do not fit
        measure(run, config.base.model_copy(update={"load_in_4bit": bits}), config.finetune, policy)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
