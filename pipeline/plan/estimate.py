"""plan: estimate memory, disk, steps, hours and costs of a training before it starts.

It needs the rows that `data` made, and no torch.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import gguf_reader
from common.console import format_duration as duration
from common.errors import UserError
from pipeline.base_model import fetch as bases
from pipeline.base_model import model_config, restore_gguf
from pipeline.config.schema import Base, Config, Finetune
from pipeline.plan import batches, disk_space, gpu_table, memory_need, this_machine
from pipeline.plan.choose_batch import Choice, choose, packs, sample
from pipeline.plan.gpu_table import Card
from pipeline.run import training_rows
from pipeline.run.run_folder import Run

# Measured on an H200 (benchmarks/results/gpu.md), and scaled to other GPUs by their dense bf16 peak.
# The share of that peak with a large micro-batch: 8B model in nf4; a 1B model reaches 0.39.
EFFICIENCY = 0.47
LAUNCH = 7e-3  # the least seconds for each layer and micro-batch, in which the CPU starts the kernels
RECOMPUTED = 0.69  # speed with gradient checkpointing, relative to that without
START = 60  # seconds to load the base model and compile the kernels
# Merge and its gate, 16-bit GGUF, one quantization, hashes: 75 s for 2.2 GB of weights on two cores
# (benchmarks/results/export.md).
EXPORT = 75 / 2.2e9  # seconds for each byte of 16-bit weights
POLICIES = {False: "none", True: "plain", "unsloth": "Unsloth's"}


@dataclass(frozen=True)
class Work:
    """What is to be trained, independent of the GPU."""

    base: Base
    tune: Finetune
    model: memory_need.Shape
    kind: str
    """`model_type` of config.json."""
    lengths: np.ndarray
    """Tokens of each row, int [rows]."""


@dataclass(frozen=True)
class Plan:
    """The training on one type of GPU."""

    card: Card
    choice: Choice
    parts: dict[str, float]
    """Peak GPU memory, bytes."""
    steps: int
    tokens: int
    training: float
    """Seconds."""
    export: float
    """Seconds."""

    @property
    def peak(self) -> float:
        """Return the peak GPU memory in bytes."""
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        """Return the hours of training and export."""
        return (self.training + self.export) / 3600

    @property
    def dollars(self) -> float:
        """Return the price of these hours."""
        return self.hours * self.card.dollars_per_hour


def stage(config: Config, run: Run, gpu: str | None, here: str | None) -> str:
    """Return the plan as text: details for one GPU, a line for each GPU of the table, and one for this processor.

    Args:
        gpu: the GPU to show in detail. None selects that of this machine, or the cheapest that fits.
        local_gpu: the name of this machine's GPU, None without one.

    Raises:
        UserError: there are no rows yet, or `gpu` is not in the table or does not fit.
    """
    found = work(config, run)
    made = [on(card, found) for card in gpu_table.table()]
    fitting = [plan for plan in made if isinstance(plan, Plan)]
    cheapest = min(fitting, key=lambda plan: plan.dollars, default=None)
    card = named(gpu) if gpu else gpu_table.find(here or "")
    shown = on(card, found) if card else cheapest
    if isinstance(shown, str) and gpu:
        raise UserError(f"{gpu}: {shown}", "`make plan` without GPU= names the cards that fit")
    shown = cheapest if isinstance(shown, str) else shown
    pages = [detail(shown, config, found)] if shown else []
    return "\n".join([*pages, *table(made, cheapest, gpu_table.find(here or "")), *describe_processor(found)])


def to_json(config: Config, run: Run, gpu: str | None, here: str | None) -> str:
    """Return the plan as JSON: a list of {gpu, fits, ...} for each GPU, and this machine's processor at the end."""
    found = work(config, run)
    rows = []
    for card in gpu_table.table():
        plan = on(card, found)
        facts = {"fits": False, "why": plan} if isinstance(plan, str) else {"fits": True} | facts_of(plan)
        rows.append(
            {"gpu": card.name, "memory_gb": card.memory_gb, "is_here": card == gpu_table.find(here or "")} | facts
        )
    wanted = [row for row in rows if gpu is None or row["gpu"] == named(gpu).name]
    processor = this_machine.plan_on_processor(found)
    if isinstance(processor, str):
        wanted.append({"gpu": None, "fits": False, "why": processor})
    else:
        wanted.append({"gpu": None, "fits": True, "hours": round(processor.seconds / 3600, 3), "dollars": 0.0})
    return json.dumps(wanted, indent=2)


def facts_of(plan: Plan) -> dict:
    """Return the values of a plan that its JSON has."""
    return {
        "peak_gb": round(plan.peak / 1e9, 2),
        "train_batch_size": plan.choice.train_batch_size,
        "micro_batch_tokens": plan.choice.micro_batch_tokens,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "hours": round(plan.hours, 3),
        "dollars": round(plan.dollars, 2),
    }


def describe_processor(found: Work) -> list[str]:
    """Return the line for a training on this machine's processor."""
    processor = this_machine.plan_on_processor(found)
    if isinstance(processor, str):
        return [f"  this machine's processor: {processor}"]
    time = f"about {duration(processor.seconds)} of training, no cost"
    return [f"  this machine's processor ({processor.cores} cores, {processor.memory_gb:.0f} GB): {time}"]


def work(config: Config, run: Run) -> Work:
    """Return what is to be trained; the config of the base model is downloaded when it is not in the cache.

    Raises:
        UserError: there are no rows yet, or the base model's memory and speed cannot be estimated.
    """
    if not run.done("data"):
        raise UserError(
            f"there is no prepared data in {run.folder} yet, and the plan depends on the rows' lengths",
            "run `make data CONFIG=...` first",
        )
    model, kind = described(
        bases.fetch_base_model(config.base.model, run.read("data")["base"]["revision"], weights=False)
    )
    if model is None:
        raise UserError(
            f"{config.base.model} is no plain decoder ({kind}): its memory and speed are not known before it runs",
            "`make finetune` finds what fits: it takes less at once where memory ends",
        )
    return Work(
        config.base, config.finetune, model, kind, batches.lengths(training_rows.read(run.output("data", "train")))
    )


def described(source: Path) -> tuple[memory_need.Shape | None, str]:
    """Return shape and model type of a base model, from its folder or its GGUF. An unknown shape is None."""
    if source.is_dir():
        config = model_config.read_config(source)
        return memory_need.shape(config), config.get("model_type", "")
    header = restore_gguf.read_gguf_header(source)
    return memory_need.gguf_shape(header), str(header.metadata.get(gguf_reader.ARCHITECTURE, ""))


def named(name: str) -> Card:
    """Return the GPU type with this name in the table or in torch. Raise UserError when the table has none."""
    known = gpu_table.table()
    card = next((card for card in known if card.name.lower() == name.lower()), None) or gpu_table.find(name)
    if not card:
        raise UserError(
            f"{gpu_table.TABLE} has no card {name!r}",
            f"GPU=one of: {', '.join(card.name for card in known)}; or add a line",
        )
    return card


def on(card: Card, found: Work) -> Plan | str:
    """Return the plan for a GPU, or the reason why it cannot train the model."""
    if why := gpu_table.unfit(card.capability, found.kind):
        return why
    packed = found.tune.packing and packs(found.kind)
    try:
        choice, order = choose(found.model, found.base, found.tune, found.lengths, card.memory_gb * 1e9, packed)
    except UserError as error:
        return error.message.removeprefix(f"{found.base.model} ").partition(",")[0]
    parts = memory_need.parts(
        found.model, found.base, found.tune, choice.largest_micro_batch, choice.use_gradient_checkpointing, packed
    )
    return Plan(
        card,
        choice,
        parts | {"CUDA itself": memory_need.CONTEXT},
        math.ceil(len(order) / choice.train_batch_size),
        order.count_tokens(found.lengths, len(order)),
        seconds(found, choice, order, card),
        EXPORT * found.model.sixteen,
    )


def seconds(found: Work, choice: Choice, order: batches.ShuffledRows, card: Card) -> float:
    """Return the seconds of the training, export not included.

    A micro-batch takes as long as the GPU computes, or as long as the CPU needs to start the kernels, whichever is
    longer. The first steps are added up, and the others are assumed to take as long for each token.
    """
    model, lengths = found.model, found.lengths[sample(order, choice.train_batch_size)]
    speed = EFFICIENCY * card.tflops * 1e12 / model.flops() * (RECOMPUTED if choice.use_gradient_checkpointing else 1)
    total = 0.0
    for start in range(0, len(lengths), choice.train_batch_size):
        step = lengths[start : start + choice.train_batch_size]
        for group in batches.micro_batches(step.tolist(), choice.micro_batch_tokens, choice.packing):
            total += max(batches.size(step[group], choice.packing) / speed, LAUNCH * model.layers)
    return START + total * order.count_tokens(found.lengths, len(order)) / int(lengths.sum())


def detail(plan: Plan, config: Config, found: Work) -> str:
    """Return the details of a plan: rows, batches, memory and disk by part, time and costs."""
    choice, shown = plan.choice, POLICIES[plan.choice.use_gradient_checkpointing]
    space = space_of(config, found)
    batch = (
        f"{choice.train_batch_size} rows a step, {'packed' if choice.packing else 'padded'}, "
        f"learning rate {choice.learning_rate:.3g}"
    )
    once = (
        f"{choice.micro_batch_tokens:,} tokens at most, {choice.largest_micro_batch:,} in the largest micro-batch; "
        f"gradient checkpointing: {shown}"
    )
    lines = [
        (
            "rows",
            (f"{len(found.lengths):,} with {found.lengths.sum():,} tokens, the longest has {found.lengths.max():,}"),
        ),
        ("visits", f"{describe_visits(plan, found)}"),
        ("batch", batch),
        ("at once", once),
        ("steps", f"{plan.steps:,}"),
        ("memory", f"{plan.peak / 1e9:.1f} GB at its peak"),
        *sizes(plan.parts),
        ("", "    -  logits (the loss is computed without holding them)"),
        ("disk", f"{sum(space.values()) / 1e9:.1f} GB at its end"),
        *sizes(space),
        (
            "time",
            (
                f"{duration(plan.training)} training, {duration(plan.export)} export, "
                f"downloads not counted: about ${plan.dollars:.2f}"
            ),
        ),
    ]
    return "\n".join(
        [f"on {plan.card.name} ({plan.card.memory_gb:.0f} GB)", *(f"  {name:8} {text}" for name, text in lines)]
    )


def describe_visits(plan: Plan, found: Work) -> str:
    """Return how many rows are trained on, in how many epochs; a row that is trained on twice counts twice."""
    visits = (
        found.tune.max_steps * plan.choice.train_batch_size
        if found.tune.max_steps
        else found.tune.num_train_epochs * len(found.lengths)
    )
    return f"{visits:,.0f} rows in {visits / len(found.lengths):.2f} epochs: {plan.tokens:,} tokens to train on"


def space_of(config: Config, found: Work) -> dict[str, float]:
    """Return the disk space that the run needs until it is complete, bytes by part."""
    return disk_space.parts(config, found.model.sixteen) | {
        "checkpoints": disk_space.checkpoints(found.model, found.tune)
    }


def sizes(parts: dict[str, float]) -> list[tuple[str, str]]:
    """Return a line for each part with its GB, as (empty heading, text)."""
    return [("", f"{size / 1e9:5.1f}  {name}") for name, size in parts.items()]


def table(made: list[Plan | str], cheapest: Plan | None, here: Card | None = None) -> list[str]:
    """Return a line for each GPU of the table, and one with the cheapest that fits.

    Args:
        plans: the plan, or the reason why there is none, for each GPU in the order of the table.
        local_gpu: the GPU of this machine.
    """
    lines = [
        "",
        f"  {'GPU':<13}{'GB':>5}{'peak':>7}{'at once':>9}{'rows':>6}  {'checkpointing':<15}{'hours':>7}{'$':>8}",
    ]
    lines += [
        f"  {card.name:<13}{card.memory_gb:>5.0f}"
        + (f"  {plan}" if isinstance(plan, str) else figures(plan))
        + ("  <- here" if card == here else "")
        for card, plan in zip(gpu_table.table(), made, strict=True)
    ]
    said = (
        f"{cheapest.card.name}, about ${cheapest.dollars:.2f}"
        if cheapest
        else "none; a smaller base.model or base.max_seq_length might"
    )
    return [*lines, f"  cheapest that fits: {said} (prices: {gpu_table.TABLE}, yours to edit)"]


def figures(plan: Plan) -> str:
    """Return the numbers of a plan as columns of the table."""
    choice, shown = plan.choice, POLICIES[plan.choice.use_gradient_checkpointing]
    return (
        f"{plan.peak / 1e9:>7.1f}{choice.micro_batch_tokens:>9,}{choice.train_batch_size:>6}  {shown:<15}"
        f"{plan.hours:>7.2f}{plan.dollars:>8.2f}"
    )
