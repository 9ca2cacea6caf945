"""plan: estimate memory, disk, steps, hours and costs of a training before it starts.

It needs the rows that `data` made, and no torch.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import gguf_reader
from common.console import format_duration
from common.errors import UserError
from pipeline.base_model import fetch, model_config, restore_gguf
from pipeline.config.schema import Base, Config, Finetune
from pipeline.plan import batches, disk_space, gpu_table, memory_need, this_machine
from pipeline.plan.choose_batch import (
    BatchChoice,
    TrainingTask,
    can_pack_rows,
    choose_batch_settings,
    select_first_rows,
)
from pipeline.plan.gpu_table import GpuType
from pipeline.run import training_rows
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run

# Measured on an H200 (benchmarks/results/gpu.md), and scaled to other GPUs by their dense bf16 peak.
# The share of that peak with a large micro-batch: 8B model in nf4; a 1B model reaches 0.39.
COMPUTE_EFFICIENCY = 0.47
LAUNCH_SECONDS = 7e-3  # the least seconds for each layer and micro-batch, in which the CPU starts the kernels
CHECKPOINTING_SPEED = 0.69  # speed with gradient checkpointing, relative to that without
START_SECONDS = 60  # seconds to load the base model and compile the kernels
# Merge and its gate, 16-bit GGUF, one quantization, hashes: 75 s for 2.2 GB of weights on two cores
# (benchmarks/results/export.md).
EXPORT_SECONDS_PER_BYTE = 75 / 2.2e9  # seconds for each byte of 16-bit weights
POLICY_NAMES = {False: "none", True: "plain", "unsloth": "Unsloth's"}


@dataclass(frozen=True)
class Workload:
    """What is to be trained, independent of the GPU."""

    base: Base
    tune: Finetune
    shape: memory_need.ModelShape
    model_type: str
    """`model_type` of config.json."""
    lengths: np.ndarray
    """Tokens of each row, int [rows]."""


@dataclass(frozen=True)
class TrainingPlan:
    """The training on one type of GPU."""

    gpu_type: GpuType
    choice: BatchChoice
    memory_parts: dict[str, float]
    """Peak GPU memory, bytes."""
    steps: int
    tokens: int
    training_seconds: float
    """Seconds."""
    export_seconds: float
    """Seconds."""

    @property
    def peak_bytes(self) -> float:
        """Return the peak GPU memory in bytes."""
        return sum(self.memory_parts.values())

    @property
    def hours(self) -> float:
        """Return the hours of training and export."""
        return (self.training_seconds + self.export_seconds) / 3600

    @property
    def dollars(self) -> float:
        """Return the price of these hours."""
        return self.hours * self.gpu_type.dollars_per_hour


def run_plan(config: Config, run: Run, gpu: str | None, local_gpu: str | None) -> str:
    """Return the plan as text: details for one GPU, a line for each GPU of the table, and one for this processor.

    Args:
        gpu: the GPU to show in detail. None selects that of this machine, or the cheapest that fits.
        local_gpu: the name of this machine's GPU, None without one.

    Raises:
        UserError: there are no rows yet, or `gpu` is not in the table or does not fit.
    """
    workload = load_workload(config, run)
    plans = [plan_on_gpu(gpu_type, workload) for gpu_type in gpu_table.read_gpu_table()]
    fitting_plans = [plan for plan in plans if isinstance(plan, TrainingPlan)]
    cheapest = min(fitting_plans, key=lambda plan: plan.dollars, default=None)
    local_type, shown_plan = gpu_table.find_gpu(local_gpu or ""), cheapest
    if gpu:
        shown_plan = plan_on_named_gpu(gpu, workload)
    elif local_type and isinstance(local_plan := plan_on_gpu(local_type, workload), TrainingPlan):
        shown_plan = local_plan
    details = [format_plan(shown_plan, config, workload)] if shown_plan else []
    return "\n".join([*details, *format_gpu_table(plans, cheapest, local_type), *describe_processor(workload)])


def plan_on_named_gpu(gpu: str, workload: Workload) -> TrainingPlan:
    """Return the plan for the GPU of that name. Raise UserError when it is unknown or cannot train the model."""
    gpu_type = select_gpu(gpu)
    try:
        return estimate_on_gpu(gpu_type, workload)
    except UserError as error:
        message = f"{gpu}: {shorten_reason(error, workload)}"
        raise UserError(message, "`make plan` without GPU= lists the GPUs that fit", code=error.code) from error


def plan_to_json(config: Config, run: Run, gpu: str | None, local_gpu: str | None) -> str:
    """Return the plan as JSON: a list of {gpu, fits, ...} for each GPU, and this machine's processor at the end."""
    workload = load_workload(config, run)
    local_type = gpu_table.find_gpu(local_gpu or "")
    rows = [gpu_facts(gpu_type, workload, gpu_type == local_type) for gpu_type in gpu_table.read_gpu_table()]
    selected_rows = [row for row in rows if gpu is None or row["gpu"] == select_gpu(gpu).name]
    return json.dumps([*selected_rows, processor_facts(workload)], indent=2)


def gpu_facts(gpu_type: GpuType, workload: Workload, is_here: bool) -> dict[str, object]:
    """Return a GPU and the plan for it, as the JSON has them."""
    plan = plan_on_gpu(gpu_type, workload)
    facts = {"fits": False, "why": plan} if isinstance(plan, str) else {"fits": True} | plan_facts(plan)
    return {"gpu": gpu_type.name, "memory_gb": gpu_type.memory_gb, "is_here": is_here} | facts


def processor_facts(workload: Workload) -> dict[str, object]:
    """Return the plan for this machine's processor, as the JSON has it."""
    plan = this_machine.plan_on_processor(workload)
    if isinstance(plan, str):
        return {"gpu": None, "fits": False, "why": plan}
    return {"gpu": None, "fits": True, "hours": round(plan.seconds / 3600, 3), "dollars": 0.0}


def plan_facts(plan: TrainingPlan) -> dict:
    """Return the values of a plan that its JSON has."""
    return {
        "peak_gb": round(plan.peak_bytes / 1e9, 2),
        "train_batch_size": plan.choice.train_batch_size,
        "micro_batch_tokens": plan.choice.micro_batch_tokens,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "hours": round(plan.hours, 3),
        "dollars": round(plan.dollars, 2),
    }


def describe_processor(workload: Workload) -> list[str]:
    """Return the line for a training on this machine's processor."""
    processor = this_machine.plan_on_processor(workload)
    if isinstance(processor, str):
        return [f"  this machine's processor: {processor}"]
    time = f"about {format_duration(processor.seconds)} of training, no cost"
    return [f"  this machine's processor ({processor.cores} cores, {processor.memory_gb:.0f} GB): {time}"]


def load_workload(config: Config, run: Run) -> Workload:
    """Return what is to be trained; the config of the base model is downloaded when it is not in the cache.

    Raises:
        UserError: there are no rows yet, or the base model's memory and speed cannot be estimated.
    """
    refuse_missing_rows(run)
    data = run.read_record(DataRecord)
    source = fetch.fetch_base_model(config.base.model, data.base.revision, weights=False)
    shape, model_type = read_model_shape(source)
    if shape is None:
        raise UserError(
            f"{config.base.model} is not a plain decoder ({model_type}): its memory and speed cannot be estimated",
            "`make finetune` finds what fits: it halves the micro-batch when GPU memory runs out",
            code="plan.unknown_model_shape",
        )
    lengths = batches.row_lengths(training_rows.read_table(data.output_path("train")))
    return Workload(config.base, config.finetune, shape, model_type, lengths)


def refuse_missing_rows(run: Run) -> None:
    """Raise UserError when the run has no rows yet."""
    if not run.is_done("data"):
        raise UserError(
            f"there is no prepared data in {run.folder} yet, and the plan depends on the lengths of the rows",
            "run `make data CONFIG=...` first",
            code="plan.no_prepared_data",
        )


def read_model_shape(source: Path) -> tuple[memory_need.ModelShape | None, str]:
    """Return shape and model type of a base model, from its folder or its GGUF. An unknown shape is None."""
    if source.is_dir():
        config = model_config.read_config(source)
        return memory_need.shape_from_config(config), config.get("model_type", "")
    header = restore_gguf.read_gguf_header(source)
    return memory_need.shape_from_gguf(header), str(header.metadata.get(gguf_reader.ARCHITECTURE_KEY, ""))


def select_gpu(name: str) -> GpuType:
    """Return the GPU type with this name in the table or in torch. Raise UserError when the table has none."""
    gpu_types = gpu_table.read_gpu_table()
    same_name = (gpu_type for gpu_type in gpu_types if gpu_type.name.lower() == name.lower())
    if gpu_type := next(same_name, None) or gpu_table.find_gpu(name):
        return gpu_type
    hint = f"GPU=one of: {', '.join(gpu_type.name for gpu_type in gpu_types)}; or add a line"
    raise UserError(f"{gpu_table.TABLE_PATH} has no GPU {name!r}", hint, code="gpu.unknown")


def plan_on_gpu(gpu_type: GpuType, workload: Workload) -> TrainingPlan | str:
    """Return the plan for a GPU, or the reason why it cannot train the model."""
    try:
        return estimate_on_gpu(gpu_type, workload)
    except UserError as error:
        return shorten_reason(error, workload)


def shorten_reason(error: UserError, workload: Workload) -> str:
    """Return why a GPU cannot train the model, without the name of the model and the limits of the GPU."""
    return error.message.removeprefix(f"{workload.base.model} ").partition(";")[0]


def estimate_on_gpu(gpu_type: GpuType, workload: Workload) -> TrainingPlan:
    """Return the plan for a GPU. Raise UserError when it cannot train the model."""
    if fault := gpu_table.find_gpu_fault(gpu_type.capability, workload.model_type):
        raise UserError(fault, "choose a newer GPU", code="gpu.unsupported")
    packed = workload.tune.packing and can_pack_rows(workload.model_type)
    task = TrainingTask(workload.shape, workload.base, workload.lengths, gpu_type.memory_gb * 1e9)
    choice, order = choose_batch_settings(task, workload.tune, packed)
    return TrainingPlan(
        gpu_type,
        choice,
        estimate_memory_parts(workload, choice),
        math.ceil(len(order) / choice.train_batch_size),
        order.count_tokens(workload.lengths, len(order)),
        estimate_training_seconds(workload, choice, order, gpu_type),
        EXPORT_SECONDS_PER_BYTE * workload.shape.weight_bytes,
    )


def estimate_memory_parts(workload: Workload, choice: BatchChoice) -> dict[str, float]:
    """Return the peak GPU memory, bytes by part, with what CUDA itself takes."""
    tokens, policy = choice.largest_micro_batch, choice.use_gradient_checkpointing
    parts = memory_need.memory_parts(workload.shape, workload.base, workload.tune, tokens, policy, choice.packing)
    return parts | {"CUDA itself": memory_need.CUDA_CONTEXT_BYTES}


def estimate_training_seconds(
    workload: Workload, choice: BatchChoice, order: batches.ShuffledRows, gpu_type: GpuType
) -> float:
    """Return the seconds of the training, export not included.

    The first steps are added up, and the others are assumed to take as long for each token.
    """
    sample_lengths = workload.lengths[select_first_rows(order, choice.train_batch_size)]
    sample_seconds = 0.0
    for start in range(0, len(sample_lengths), choice.train_batch_size):
        step_lengths = sample_lengths[start : start + choice.train_batch_size]
        for group in batches.split_into_micro_batches(step_lengths.tolist(), choice.micro_batch_tokens, choice.packing):
            sample_seconds += estimate_batch_seconds(step_lengths[group], workload.shape, choice, gpu_type)
    return START_SECONDS + sample_seconds * order.count_tokens(workload.lengths, len(order)) / int(sample_lengths.sum())


def estimate_batch_seconds(
    lengths: np.ndarray, shape: memory_need.ModelShape, choice: BatchChoice, gpu_type: GpuType
) -> float:
    """Return the seconds of a micro-batch: that the GPU computes, or that the CPU starts kernels if that is longer."""
    speed = CHECKPOINTING_SPEED if choice.use_gradient_checkpointing else 1
    tokens_per_second = COMPUTE_EFFICIENCY * gpu_type.tflops * 1e12 / shape.flops_per_token() * speed
    tokens = batches.count_batch_tokens(lengths, choice.packing)
    return max(tokens / tokens_per_second, LAUNCH_SECONDS * shape.layers)


def format_plan(plan: TrainingPlan, config: Config, workload: Workload) -> str:
    """Return the details of a plan: rows, batches, memory and disk by part, time and costs."""
    lengths, disk_parts = workload.lengths, estimate_disk_parts(config, workload)
    lines = [
        ("rows", f"{len(lengths):,} with {lengths.sum():,} tokens, the longest has {lengths.max():,}"),
        ("visits", describe_visits(plan, workload)),
        *describe_batches(plan.choice),
        ("steps", f"{plan.steps:,}"),
        ("memory", f"{plan.peak_bytes / 1e9:.1f} GB at the peak"),
        *format_parts(plan.memory_parts),
        ("", "    -  logits (the loss is computed without holding them)"),
        ("disk", f"{sum(disk_parts.values()) / 1e9:.1f} GB at the end"),
        *format_parts(disk_parts),
        ("time", describe_time(plan)),
    ]
    return "\n".join(
        [f"on {plan.gpu_type.name} ({plan.gpu_type.memory_gb:.0f} GB)", *(f"  {name:8} {text}" for name, text in lines)]
    )


def describe_batches(choice: BatchChoice) -> list[tuple[str, str]]:
    """Return the lines about the batch of a step and about its micro-batches, as (heading, text)."""
    layout, policy = "packed" if choice.packing else "padded", POLICY_NAMES[choice.use_gradient_checkpointing]
    batch = f"{choice.train_batch_size} rows a step, {layout}, learning rate {choice.learning_rate:.3g}"
    sizes = f"{choice.micro_batch_tokens:,} tokens at most, {choice.largest_micro_batch:,} in the largest micro-batch"
    return [("batch", batch), ("at once", f"{sizes}; gradient checkpointing: {policy}")]


def describe_time(plan: TrainingPlan) -> str:
    """Return the time of training and export, and what they cost."""
    times = f"{format_duration(plan.training_seconds)} training, {format_duration(plan.export_seconds)} export"
    return f"{times}, downloads not counted: about ${plan.dollars:.2f}"


def describe_visits(plan: TrainingPlan, workload: Workload) -> str:
    """Return how many rows are trained on, in how many epochs; a row that is trained on twice counts twice."""
    visits = (
        workload.tune.max_steps * plan.choice.train_batch_size
        if workload.tune.max_steps
        else workload.tune.num_train_epochs * len(workload.lengths)
    )
    return f"{visits:,.0f} rows in {visits / len(workload.lengths):.2f} epochs: {plan.tokens:,} tokens to train on"


def estimate_disk_parts(config: Config, workload: Workload) -> dict[str, float]:
    """Return the disk space that the run needs until it is complete, bytes by part."""
    return disk_space.artifact_bytes(config, workload.shape.weight_bytes) | {
        "checkpoints": disk_space.checkpoint_bytes(workload.shape, workload.tune)
    }


def format_parts(parts: dict[str, float]) -> list[tuple[str, str]]:
    """Return a line for each part with its GB, as (empty heading, text)."""
    return [("", f"{size / 1e9:5.1f}  {name}") for name, size in parts.items()]


def format_gpu_table(
    plans: list[TrainingPlan | str], cheapest: TrainingPlan | None, local_gpu: GpuType | None = None
) -> list[str]:
    """Return a line for each GPU of the table, and one with the cheapest that fits.

    Args:
        plans: the plan, or the reason why there is none, for each GPU in the order of the table.
        local_gpu: the GPU of this machine.
    """
    header = f"  {'GPU':<13}{'GB':>5}{'peak':>7}{'at once':>9}{'rows':>6}  {'checkpointing':<15}{'hours':>7}{'$':>8}"
    lines = [
        format_gpu_line(gpu_type, plan) + ("  <- here" if gpu_type == local_gpu else "")
        for gpu_type, plan in zip(gpu_table.read_gpu_table(), plans, strict=True)
    ]
    cheapest_text = "none; a smaller base.model or base.max_seq_length may fit"
    if cheapest:
        cheapest_text = f"{cheapest.gpu_type.name}, about ${cheapest.dollars:.2f}"
    footer = f"  cheapest that fits: {cheapest_text} (prices: {gpu_table.TABLE_PATH}, yours to edit)"
    return ["", header, *lines, footer]


def format_gpu_line(gpu_type: GpuType, plan: TrainingPlan | str) -> str:
    """Return the line of a GPU: its plan, or the reason why there is none."""
    columns = f"  {plan}" if isinstance(plan, str) else format_plan_columns(plan)
    return f"  {gpu_type.name:<13}{gpu_type.memory_gb:>5.0f}{columns}"


def format_plan_columns(plan: TrainingPlan) -> str:
    """Return the numbers of a plan as columns of the table."""
    choice, checkpointing = plan.choice, POLICY_NAMES[plan.choice.use_gradient_checkpointing]
    return (
        f"{plan.peak_bytes / 1e9:>7.1f}{choice.micro_batch_tokens:>9,}{choice.train_batch_size:>6}  {checkpointing:<15}"
        f"{plan.hours:>7.2f}{plan.dollars:>8.2f}"
    )
