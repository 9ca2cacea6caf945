"""plan: memory, disk, steps, hours and money of a training, before any of it is paid. Needs the rows that `data` made, no torch."""

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

# Measured on an H200 (benchmarks/results/gpu.md), applied to other cards by their dense bf16 peak.
EFFICIENCY = 0.47  # of that peak, where a micro-batch is large: 8B, nf4; a 1B model reaches 0.39
LAUNCH = 7e-3  # seconds a layer and micro-batch at least: the processor starts the kernels
RECOMPUTED = 0.69  # of the speed, with gradient checkpointing
START = 60  # seconds to load the base and compile the kernels
# Merge and its gate, 16-bit GGUF, one quantization, hashes: 75 s for 2.2 GB of weights on two cores (benchmarks/results/export.md).
EXPORT = 75 / 2.2e9  # seconds a byte of 16-bit weights
POLICIES = {False: "none", True: "plain", "unsloth": "Unsloth's"}


@dataclass(frozen=True)
class Work:
    """What is to be trained, as far as it is known before a card is."""

    base: Base
    tune: Finetune
    model: memory_need.Shape
    kind: str
    """model_type of config.json."""
    lengths: np.ndarray
    """Tokens of each row, int [rows]."""


@dataclass(frozen=True)
class Plan:
    """The training on one card."""

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
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        return (self.training + self.export) / 3600

    @property
    def dollars(self) -> float:
        return self.hours * self.card.dollars_per_hour


def stage(config: Config, run: Run, gpu: str | None, here: str | None) -> str:
    """The page. gpu: a card of the table to look at; None: `here`, the card of this machine, else the cheapest that fits.

    Raises UserError where there are no rows yet, or the table has no such card.
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
    """The same for programs: a list of {gpu, fits, ...}, this machine's processor last."""
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
    return {
        "peak_gb": round(plan.peak / 1e9, 2), "train_batch_size": plan.choice.train_batch_size,
        "micro_batch_tokens": plan.choice.micro_batch_tokens, "steps": plan.steps, "tokens": plan.tokens,
        "hours": round(plan.hours, 3), "dollars": round(plan.dollars, 2),
    }  # fmt: skip


def describe_processor(found: Work) -> list[str]:
    """A line for this machine without its GPU."""
    processor = this_machine.plan_on_processor(found)
    if isinstance(processor, str):
        return [f"  this machine's processor: {processor}"]
    time = f"about {duration(processor.seconds)} of training, no cost"
    return [f"  this machine's processor ({processor.cores} cores, {processor.memory_gb:.0f} GB): {time}"]


def work(config: Config, run: Run) -> Work:
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
    """Shape and model type of a folder or a GGUF."""
    if source.is_dir():
        config = model_config.read_config(source)
        return memory_need.shape(config), config.get("model_type", "")
    header = restore_gguf.read_gguf_header(source)
    return memory_need.gguf_shape(header), str(header.metadata.get(gguf_reader.ARCHITECTURE, ""))


def named(name: str) -> Card:
    known = gpu_table.table()
    card = next((card for card in known if card.name.lower() == name.lower()), None) or gpu_table.find(name)
    if not card:
        raise UserError(
            f"{gpu_table.TABLE} has no card {name!r}",
            f"GPU=one of: {', '.join(card.name for card in known)}; or add a line",
        )
    return card


def on(card: Card, found: Work) -> Plan | str:
    """The plan for a card, or why there is none."""
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
        card, choice, parts | {"CUDA itself": memory_need.CONTEXT}, math.ceil(len(order) / choice.train_batch_size), order.count_tokens(found.lengths, len(order)),
        seconds(found, choice, order, card), EXPORT * found.model.sixteen,
    )  # fmt: skip


def seconds(found: Work, choice: Choice, order: batches.ShuffledRows, card: Card) -> float:
    """Of the training: what the card computes, or what the processor takes to start its kernels, whichever is longer.

    The steps of a sample are added up; the rest takes as long for each token.
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
    choice, shown = plan.choice, POLICIES[plan.choice.use_gradient_checkpointing]
    space = space_of(config, found)
    batch = f"{choice.train_batch_size} rows a step, {'packed' if choice.packing else 'padded'}, learning rate {choice.learning_rate:.3g}"
    once = f"{choice.micro_batch_tokens:,} tokens at most, {choice.largest_micro_batch:,} in the largest micro-batch; gradient checkpointing: {shown}"
    lines = [
        ("rows", f"{len(found.lengths):,} with {found.lengths.sum():,} tokens, the longest has {found.lengths.max():,}"),
        ("visits", f"{describe_visits(plan, found)}"),
        ("batch", batch), ("at once", once), ("steps", f"{plan.steps:,}"),
        ("memory", f"{plan.peak / 1e9:.1f} GB at its peak"), *sizes(plan.parts), ("", "    -  logits (the loss is computed without holding them)"),
        ("disk", f"{sum(space.values()) / 1e9:.1f} GB at its end"), *sizes(space),
        ("time", f"{duration(plan.training)} training, {duration(plan.export)} export, downloads not counted: about ${plan.dollars:.2f}"),
    ]  # fmt: skip
    return "\n".join(
        [f"on {plan.card.name} ({plan.card.memory_gb:.0f} GB)", *(f"  {name:8} {text}" for name, text in lines)]
    )


def describe_visits(plan: Plan, found: Work) -> str:
    """How often the rows are seen: a row that is trained on twice is two visits."""
    visits = (
        found.tune.max_steps * plan.choice.train_batch_size
        if found.tune.max_steps
        else found.tune.num_train_epochs * len(found.lengths)
    )
    return f"{visits:,.0f} rows in {visits / len(found.lengths):.2f} epochs: {plan.tokens:,} tokens to train on"


def space_of(config: Config, found: Work) -> dict[str, float]:
    """Disk that the run needs to its end, bytes."""
    return disk_space.parts(config, found.model.sixteen) | {
        "checkpoints": disk_space.checkpoints(found.model, found.tune)
    }


def sizes(parts: dict[str, float]) -> list[tuple[str, str]]:
    return [("", f"{size / 1e9:5.1f}  {name}") for name, size in parts.items()]


def table(made: list[Plan | str], cheapest: Plan | None, here: Card | None = None) -> list[str]:
    """A line a GPU, and the cheapest that fits. here: the GPU of this machine."""
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
    choice, shown = plan.choice, POLICIES[plan.choice.use_gradient_checkpointing]
    return f"{plan.peak / 1e9:>7.1f}{choice.micro_batch_tokens:>9,}{choice.train_batch_size:>6}  {shown:<15}{plan.hours:>7.2f}{plan.dollars:>8.2f}"
