"""Estimate how long a training takes on this machine's processor, from a short measurement of its speed."""

import os
import time
from dataclasses import dataclass

import numpy as np

from pipeline.plan.choose_batch import BatchChoice, TrainingTask, choose_batch_settings
from pipeline.toolchain import machine

MEASURED_SECONDS = 0.3
# A training reaches this share of the speed of numpy's matrix multiplication: 160 of 260 GFLOP/s with the demo's model
# on two cores.
TRAINING_EFFICIENCY = 0.6


@dataclass(frozen=True)
class ProcessorPlan:
    """The training on this machine's processor; `seconds` are those of the training alone."""

    choice: BatchChoice
    seconds: float
    cores: int
    memory_gb: float


def plan_on_processor(workload) -> ProcessorPlan | str:
    """Return the plan for a `pipeline.plan.estimate.Workload`, or the reason why there is none."""
    if workload.base.load_in_4bit:
        return "QLoRA (base.load_in_4bit) needs an NVIDIA GPU"
    task = TrainingTask(workload.shape, workload.base, workload.lengths, gpu_bytes=None)
    choice, order = choose_batch_settings(task, workload.tune, packed=False)
    flops = order.count_tokens(workload.lengths, len(order)) * workload.shape.flops_per_token()
    seconds = flops / (TRAINING_EFFICIENCY * measure_processor_flops())
    return ProcessorPlan(choice, seconds, os.cpu_count() or 1, machine.total_memory() / 1e9)


def measure_processor_flops() -> float:
    """Measure numpy's 32-bit matrix multiplication on all cores for MEASURED_SECONDS, and return its FLOP/s."""
    matrix = np.ones((1024, 1024), dtype=np.float32)
    matrix @ matrix  # the first multiplication starts the threads
    started_at, count = time.perf_counter(), 0
    while time.perf_counter() - started_at < MEASURED_SECONDS:
        matrix @ matrix
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - started_at)
