"""Estimate how long a training takes on this machine's processor, from a short measurement of its speed."""

import os
import time
from dataclasses import dataclass

from pipeline.plan.choose_batch import Choice, choose
from pipeline.toolchain import machine

MEASURED_SECONDS = 0.3
# A training reaches this share of the speed of numpy's matrix multiplication: 160 of 260 GFLOP/s with the demo's model
# on two cores.
EFFICIENCY = 0.6


@dataclass(frozen=True)
class ProcessorPlan:
    """The training on this machine's processor; `seconds` are those of the training alone."""

    choice: Choice
    seconds: float
    cores: int
    memory_gb: float


def plan_on_processor(work) -> ProcessorPlan | str:
    """Return the plan for a `pipeline.plan.estimate.Workload`, or the reason why there is none."""
    if work.base.load_in_4bit:
        return "QLoRA (base.load_in_4bit) needs an NVIDIA GPU"
    choice, order = choose(work.model, work.base, work.tune, work.lengths, None, packed=False)
    seconds = order.count_tokens(work.lengths, len(order)) * work.model.flops() / (EFFICIENCY * measure_processor())
    return ProcessorPlan(choice, seconds, os.cpu_count() or 1, machine.memory() / 1e9)


def measure_processor() -> float:
    """Measure numpy's 32-bit matrix multiplication on all cores for MEASURED_SECONDS, and return its FLOP/s."""
    import numpy as np

    matrix = np.ones((1024, 1024), dtype=np.float32)
    matrix @ matrix  # the first multiplication starts the threads
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < MEASURED_SECONDS:
        matrix @ matrix
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - started)
