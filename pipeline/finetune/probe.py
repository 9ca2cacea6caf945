"""What arithmetic cannot know, measured on this card: a few steps at the longest batch, for everything the config leaves open.

Each model (4 or 16 bit, with or without gradient checkpointing) is loaded in a process of its own, where the micro-batches
that might fit are tried from the largest on. The fastest is what `finetune` takes then.
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

STEPS = 6  # the first ones compile; the last is looked at
TOLD = "probed: "


def stage(run: Run) -> str:
    """The table; the fastest candidate with the config's own bits goes into finetune/choice.json. Raises UserError without a GPU."""
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
    """Rows of one model, from a process of its own; none where it does not load."""
    asked = [sys.executable, "-m", "pipeline.finetune.probe", str(run.folder), json.dumps([bits, policy])]
    done = subprocess.run(asked, capture_output=True, text=True, errors="replace")
    if done.returncode == 2:
        message, _, hint = done.stderr.rpartition("error: ")[2].strip().partition("\n next: ")
        raise UserError(message, hint)
    done.check_returncode()
    return [json.loads(line.removeprefix(TOLD)) for line in done.stdout.splitlines() if line.startswith(TOLD)]


def measure(run: Run, base: Base, tune: Finetune, policy) -> list[dict]:
    """Real tokens a second and peak memory (GB) of each micro-batch; None where it does not fit."""
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
    """Row numbers of a micro-batch as full as it may be, of the longest rows."""
    order = np.argsort(-lengths, kind="stable")
    count = next((n for n in range(len(order), 1, -1) if batches.size(lengths[order[:n]], packed) <= tokens), 1)
    return order[:count]


def steps(model, base: Base, tune: Finetune, run: Run, choice: Choice, full: "pa.Table") -> dict:
    """Train a full micro-batch by the stage's own trainer, in a folder that goes again."""
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
        trainer.packed = trainer.args.packing  # Unsloth does not pack every model
        trainer.smallest = trainer.budget  # what does not fit is not made to
        try:
            trainer.train()
        except OutOfMemory:
            return {"tokens_per_second": None, "peak_memory_gb": None}
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    return {"tokens_per_second": round(speeds[-1]), "peak_memory_gb": unsloth_loader.peak_memory_gb()}


def keep(run: Run, probed: dict) -> None:
    """For finetune. What it has begun with stays."""
    path = run.workspace("finetune", "data") / "choice.json"
    files.write_json(path, (files.read_json(path) if path.is_file() else {}) | {"probed": probed})


def table(found: list[dict], best: dict) -> list[str]:
    head = f"  {'base':<8}{'checkpointing':<15}{'at once':>9}{'tokens/s':>10}{'peak GB':>9}"
    return [head, *(f"  {line(row)}{'  <- finetune takes this' if row is best else ''}" for row in found)]


def line(row: dict) -> str:
    bits, policy = "4 bit" if row["load_in_4bit"] else "16 bit", POLICIES[row["use_gradient_checkpointing"]]
    start = f"{bits:<8}{policy:<15}{row['micro_batch_tokens']:>9,}"
    if not row["tokens_per_second"]:
        return f"{start}  does not fit"
    return f"{start}{row['tokens_per_second']:>10,}{row['peak_memory_gb']:>9.1f}"


def other(best: dict, fitting: list[dict]) -> list[str]:
    """The other number of bits is the user's to choose: it is another model that is trained."""
    rivals = [row["tokens_per_second"] for row in fitting if row["load_in_4bit"] != best["load_in_4bit"]]
    faster = max(rivals, default=0) / best["tokens_per_second"] - 1
    if faster < 0.05:
        return []
    word = "false" if best["load_in_4bit"] else "true"
    return [f'  SET="base.load_in_4bit={word}" with a new RUN=name is {faster:.0%} faster here']


def main(folder: str, asked: str) -> None:
    from pipeline.toolchain import unsloth_loader

    run, (bits, policy) = Run(Path(folder)), json.loads(asked)
    config = run.config()
    unsloth_loader.start()
    if unsloth_loader.gpu_bytes() is None:
        raise UserError("PROBE measures a GPU, and torch sees none here", "leave it out: `make plan` needs no GPU")
    import torch

    with contextlib.suppress(torch.OutOfMemoryError):  # of the weights alone
        measure(run, config.base.model_copy(update={"load_in_4bit": bits}), config.finetune, policy)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
