"""probe: measure the speed and memory of a training on this GPU, for every setting that the config leaves open.

Each model (4 or 16 bit, with or without gradient checkpointing) is loaded in a process of its own. There a few steps
with the longest rows are trained for each micro-batch size that might fit, the largest first. `finetune` uses the best.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import files
from common.errors import UserError
from pipeline.config.schema import Base, Finetune
from pipeline.finetune.build_trainer import TrainingInput, build_model, build_trainer
from pipeline.finetune.early_stop import OutOfGpuMemory
from pipeline.plan import batches
from pipeline.plan.choose_batch import CHECKPOINTED_TOKEN_LIMITS, TOKEN_LIMITS, BatchChoice
from pipeline.plan.estimate import POLICY_NAMES
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run

PROBE_STEPS = 6  # steps to train: the first ones compile kernels, and the last one is measured
RESULT_PREFIX = "probed: "  # precedes a result in the output of a measuring process
ERROR_PREFIX = "probe error: "  # precedes the UserError of a measuring process: [message, hint, code]


def run_probe(run: Run) -> str:
    """Measure all candidates and return them as a table.

    The fastest one with the precision of the config is written to finetune/choice.json.

    Raises:
        UserError: there is no GPU, or no candidate fits.
    """
    config = run.read_config()
    configured_policy = config.finetune.use_gradient_checkpointing
    results = [
        row
        for load_in_4bit in (config.base.load_in_4bit, not config.base.load_in_4bit)
        for policy in ((False, "unsloth") if configured_policy == "auto" else (configured_policy,))
        for row in measure_in_process(run, load_in_4bit, policy)
    ]
    fitting_results = [row for row in results if row["tokens_per_second"]]
    own_results = [row for row in fitting_results if row["load_in_4bit"] == config.base.load_in_4bit]
    if not own_results:
        raise UserError(
            f"{config.base.model} does not fit in the memory of this GPU with its longest rows",
            "`make plan` lists the GPUs that fit",
            code="probe.nothing_fits",
        )
    best = max(own_results, key=lambda row: row["tokens_per_second"])
    save_choice(run, {name: best[name] for name in ("micro_batch_tokens", "use_gradient_checkpointing")})
    return "\n".join([*format_results(results, best), *describe_other_precision(best, fitting_results)])


def measure_in_process(run: Run, load_in_4bit: bool, policy) -> list[dict]:
    """Measure one model in a process of its own and return its results; none when the model does not fit into memory.

    Args:
        load_in_4bit: whether the model is loaded in 4 bit, else in 16 bit.
        policy: the gradient checkpointing policy.

    Raises:
        UserError: the process reports one.
    """
    command = [sys.executable, "-m", "pipeline.finetune.probe", str(run.folder), json.dumps([load_in_4bit, policy])]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    for line in process.stdout.splitlines():
        if line.startswith(ERROR_PREFIX):
            message, hint, code = json.loads(line.removeprefix(ERROR_PREFIX))
            raise UserError(message, hint, code=code)
    process.check_returncode()
    return [
        json.loads(line.removeprefix(RESULT_PREFIX))
        for line in process.stdout.splitlines()
        if line.startswith(RESULT_PREFIX)
    ]


def measure_micro_batches(run: Run, base: Base, tune: Finetune, policy) -> list[dict]:
    """Measure each micro-batch size, print each result and return them all.

    A result has tokens_per_second (padding not counted) and peak_memory_gb, which are None when the size does not fit.
    """
    from pipeline.base_model import fetch as bases
    from pipeline.base_model import restore_gguf
    from pipeline.run import training_rows
    from pipeline.toolchain import unsloth_loader

    data = run.read_record(DataRecord)
    training_table = training_rows.read_table(data.output_path("train"))
    lengths = batches.row_lengths(training_table)
    weights = restore_gguf.prepare_weights(bases.fetch_base_model(base.model, data.base.revision))
    packed = tune.packing and unsloth_loader.gpu_memory_bytes() is not None
    limits = (
        [tune.micro_batch_tokens] if tune.micro_batch_tokens else CHECKPOINTED_TOKEN_LIMITS if policy else TOKEN_LIMITS
    )
    model, results = None, []
    for tokens in sorted({max(size, int(lengths.max())) for size in limits}, reverse=True):
        row_numbers = select_longest_rows(lengths, tokens, packed)
        choice = BatchChoice(len(row_numbers), tune.learning_rate, tokens, tokens, policy, packed)
        model = model or build_model(weights, base, tune, choice)
        results.append(
            {"load_in_4bit": base.load_in_4bit, "use_gradient_checkpointing": policy, "micro_batch_tokens": tokens}
            | measure_steps(model, TrainingInput(base, tune, data, training_table.take(row_numbers)), run, choice)
        )
        print(RESULT_PREFIX + json.dumps(results[-1]), flush=True)
    return results


def select_longest_rows(lengths: np.ndarray, tokens: int, packed: bool) -> np.ndarray:
    """Return the numbers of the longest rows that fill a micro-batch of at most `tokens`, one row at least."""
    row_numbers = np.argsort(-lengths, kind="stable")
    count = next(
        (
            n
            for n in range(len(row_numbers), 1, -1)
            if batches.count_batch_tokens(lengths[row_numbers[:n]], packed) <= tokens
        ),
        1,
    )
    return row_numbers[:count]


def measure_steps(model, source: TrainingInput, run: Run, choice: BatchChoice) -> dict:
    """Train some steps of one full micro-batch with the trainer of `finetune`, and return speed and peak memory.

    The training runs in a temporary folder.
    """
    from pipeline.toolchain import unsloth_loader

    unsloth_loader.reset_peak_memory()
    with tempfile.TemporaryDirectory() as temporary_folder:
        temporary_run = Run(Path(temporary_folder))
        for name in ("data", "data.json"):
            (temporary_run.folder / name).symlink_to((run.folder / name).resolve())
        quiet_settings = source.tune.model_copy(
            update={"logging_steps": 1, "eval_strategy": "no", "report_to": (), "early_stopping_patience": None}
        )
        rows = len(source.table)
        order = batches.ShuffledRows(rows, PROBE_STEPS * rows, source.tune.seed)
        trainer = build_trainer(model, replace(source, tune=quiet_settings), temporary_run, choice, order)
        trainer.packed = trainer.args.packing  # Unsloth does not pack rows for every model
        # A micro-batch that does not fit is a result here, so it must not be made smaller.
        trainer.min_micro_batch_tokens = trainer.micro_batch_tokens
        try:
            trainer.train()
        except OutOfGpuMemory:
            return {"tokens_per_second": None, "peak_memory_gb": None}
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    return {"tokens_per_second": round(speeds[-1]), "peak_memory_gb": unsloth_loader.peak_memory_gb()}


def save_choice(run: Run, settings: dict) -> None:
    """Write the settings for `finetune` to its choice.json; the settings of a training in progress stay there."""
    path = run.prepare_stage_folder("finetune", "data") / "choice.json"
    files.write_json(path, (files.read_json(path) if path.is_file() else {}) | {"probed": settings})


def format_results(results: list[dict], best: dict) -> list[str]:
    """Return the lines of the table of results, with the best one marked."""
    header = f"  {'base':<8}{'checkpointing':<15}{'at once':>9}{'tokens/s':>10}{'peak GB':>9}"
    return [header, *(f"  {format_result(row)}{'  <- finetune uses this' if row is best else ''}" for row in results)]


def format_result(row: dict) -> str:
    """Return one result as a line of the table."""
    precision, policy = "4 bit" if row["load_in_4bit"] else "16 bit", POLICY_NAMES[row["use_gradient_checkpointing"]]
    columns = f"{precision:<8}{policy:<15}{row['micro_batch_tokens']:>9,}"
    if not row["tokens_per_second"]:
        return f"{columns}  does not fit"
    return f"{columns}{row['tokens_per_second']:>10,}{row['peak_memory_gb']:>9.1f}"


def describe_other_precision(best: dict, fitting: list[dict]) -> list[str]:
    """Return a hint when the other precision is at least 5 % faster.

    The user has to choose it, because it changes which model is trained.
    """
    other_speeds = [row["tokens_per_second"] for row in fitting if row["load_in_4bit"] != best["load_in_4bit"]]
    speedup = max(other_speeds, default=0) / best["tokens_per_second"] - 1
    if speedup < 0.05:
        return []
    value = "false" if best["load_in_4bit"] else "true"
    return [f'  SET="base.load_in_4bit={value}" with a new RUN=name is {speedup:.0%} faster here']


def main(folder: str, model_settings: str) -> None:
    """Measure one model; `model_settings` is JSON: [whether it is loaded in 4 bit, checkpointing policy]."""
    from pipeline.toolchain import unsloth_loader

    run, (load_in_4bit, policy) = Run(Path(folder)), json.loads(model_settings)
    config = run.read_config()
    unsloth_loader.import_unsloth()
    if unsloth_loader.gpu_memory_bytes() is None:
        raise UserError(
            "PROBE measures a GPU, but torch finds none on this machine",
            "leave out PROBE: `make plan` needs no GPU",
            code="probe.no_gpu",
        )
    import torch

    with contextlib.suppress(torch.OutOfMemoryError):  # the weights alone do not fit
        measure_micro_batches(
            run, config.base.model_copy(update={"load_in_4bit": load_in_4bit}), config.finetune, policy
        )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(ERROR_PREFIX + json.dumps([error.message, error.hint, error.code]), flush=True)
        sys.exit(2)
