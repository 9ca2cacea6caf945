"""probe: measure the speed and memory of a training on this GPU, for every setting that the config leaves open.

Each model (4 or 16 bit, with or without gradient checkpointing) is loaded in a process of its own. There a few steps
with the longest rows are trained for each micro-batch size that might fit, the largest first. `finetune` uses the best.
"""

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import files
from common.errors import UserError
from pipeline.config.schema import Base, Config, Finetune
from pipeline.finetune.build_trainer import TrainingInput, build_model, build_trainer
from pipeline.finetune.stop_signals import OutOfGpuMemory
from pipeline.plan import batches
from pipeline.plan.choose_batch import CHECKPOINTED_TOKEN_LIMITS, TOKEN_LIMITS, BatchChoice, list_policies
from pipeline.plan.estimate import POLICY_NAMES
from pipeline.plan.memory_need import CheckpointingPolicy
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run
from pipeline.toolchain import unsloth_loader

if TYPE_CHECKING:
    from peft import PeftModel

    from pipeline.finetune.trainer import StepTrainer

PROBE_STEPS = 6  # steps to train: the first ones compile kernels, and the last one is measured
QUIET_SETTINGS = {"logging_steps": 1, "eval_strategy": "no", "report_to": (), "early_stopping_patience": None}
RESULT_PREFIX = "probed: "  # precedes a result in the output of a measuring process
ERROR_PREFIX = "probe error: "  # precedes the UserError of a measuring process: [message, hint, code]


def run_probe(run: Run) -> str:
    """Measure all candidates and return them as a table.

    The fastest one with the precision of the config is written to finetune/choice.json.

    Raises:
        UserError: there is no GPU, or no candidate fits.
    """
    config = run.read_config()
    results = measure_models(run, config)
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


def measure_models(run: Run, config: Config) -> list[dict]:
    """Measure the base model in both precisions, with each policy that the config leaves open; return all results."""
    precisions = (config.base.load_in_4bit, not config.base.load_in_4bit)
    models = itertools.product(precisions, list_policies(config.finetune))
    return [row for load_in_4bit, policy in models for row in measure_in_process(run, load_in_4bit, policy)]


def measure_in_process(run: Run, load_in_4bit: bool, policy: CheckpointingPolicy) -> list[dict]:
    """Return what a process of its own measures of one model, [] when it does not fit; or raise its UserError."""
    command = [sys.executable, "-m", "pipeline.finetune.probe", str(run.folder), json.dumps([load_in_4bit, policy])]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    for message, hint, code in read_reports(process.stdout, ERROR_PREFIX):
        raise UserError(message, hint, code=code)
    process.check_returncode()
    return read_reports(process.stdout, RESULT_PREFIX)


def read_reports(output: str, prefix: str) -> list:
    """Return the JSON values in the lines of a measuring process that begin with `prefix`."""
    return [json.loads(line.removeprefix(prefix)) for line in output.splitlines() if line.startswith(prefix)]


def measure_micro_batches(run: Run, base: Base, tune: Finetune, policy: CheckpointingPolicy) -> list[dict]:
    """Measure each micro-batch size, print each result and return them all.

    A result has tokens_per_second (padding not counted) and peak_memory_gb, which are None when the size does not fit.
    """
    from pipeline.base_model import fetch, restore_gguf
    from pipeline.run import training_rows

    data = run.read_record(DataRecord)
    source = TrainingInput(base, tune, data, training_rows.read_table(data.output_path("train")))
    lengths = batches.row_lengths(source.table)
    weights = restore_gguf.prepare_weights(fetch.fetch_base_model(base.model, data.base.revision))
    packed = tune.packing and unsloth_loader.gpu_memory_bytes() is not None
    model, results = None, []
    for tokens in list_micro_batch_sizes(tune, policy, int(lengths.max())):
        row_numbers = select_longest_rows(lengths, tokens, packed)
        choice = BatchChoice(len(row_numbers), tune.learning_rate, tokens, tokens, policy, packed)
        model = model or build_model(weights, base, tune, choice)
        candidate = {
            "load_in_4bit": base.load_in_4bit,
            "use_gradient_checkpointing": policy,
            "micro_batch_tokens": tokens,
        }
        measured = measure_steps(model, replace(source, table=source.table.take(row_numbers)), run, choice)
        results.append(candidate | measured)
        print(RESULT_PREFIX + json.dumps(results[-1]), flush=True)
    return results


def list_micro_batch_sizes(tune: Finetune, policy: CheckpointingPolicy, longest: int) -> list[int]:
    """Return the sizes to measure in tokens, the largest first. Each is at least that of the longest row."""
    limits = CHECKPOINTED_TOKEN_LIMITS if policy else TOKEN_LIMITS
    sizes = [tune.micro_batch_tokens] if tune.micro_batch_tokens else limits
    return sorted({max(size, longest) for size in sizes}, reverse=True)


def select_longest_rows(lengths: np.ndarray, tokens: int, packed: bool) -> np.ndarray:
    """Return the numbers of the longest rows that fill a micro-batch of at most `tokens`, one row at least."""
    row_numbers = np.argsort(-lengths, kind="stable")
    counts = range(len(row_numbers), 1, -1)
    fitting_counts = (n for n in counts if batches.count_batch_tokens(lengths[row_numbers[:n]], packed) <= tokens)
    return row_numbers[: next(fitting_counts, 1)]


def measure_steps(model: "PeftModel", source: TrainingInput, run: Run, choice: BatchChoice) -> dict:
    """Train some steps of one full micro-batch with the trainer of `finetune`, and return speed and peak memory.

    The training runs in a temporary folder.
    """
    unsloth_loader.reset_peak_memory()
    with tempfile.TemporaryDirectory() as temporary_folder:
        trainer = build_probe_trainer(model, source, link_rows(run, Path(temporary_folder)), choice)
        try:
            trainer.train()
        except OutOfGpuMemory:
            return {"tokens_per_second": None, "peak_memory_gb": None}
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    return {"tokens_per_second": round(speeds[-1]), "peak_memory_gb": unsloth_loader.peak_memory_gb()}


def link_rows(run: Run, folder: Path) -> Run:
    """Return a run in `folder` that has the rows of another one by symbolic links."""
    for name in ("data", "data.json"):
        (folder / name).symlink_to((run.folder / name).resolve())
    return Run(folder)


def build_probe_trainer(model: "PeftModel", source: TrainingInput, run: Run, choice: BatchChoice) -> "StepTrainer":
    """Return a trainer for PROBE_STEPS steps, which never makes a micro-batch smaller: not to fit is a result here."""
    source = replace(source, tune=source.tune.model_copy(update=QUIET_SETTINGS))
    order = batches.ShuffledRows(len(source.table), PROBE_STEPS * len(source.table), source.tune.seed)
    trainer = build_trainer(model, source, run, choice, order)
    trainer.packed = trainer.args.packing  # Unsloth does not pack rows for every model
    trainer.min_micro_batch_tokens = trainer.micro_batch_tokens
    return trainer


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
    """Return a hint when the other precision is at least 5 % faster. The user chooses which model is trained."""
    other_speeds = [row["tokens_per_second"] for row in fitting if row["load_in_4bit"] != best["load_in_4bit"]]
    speedup = max(other_speeds, default=0) / best["tokens_per_second"] - 1
    if speedup < 0.05:
        return []
    value = "false" if best["load_in_4bit"] else "true"
    return [f'  SET="base.load_in_4bit={value}" with a new RUN=name is {speedup:.0%} faster here']


def main(folder: str, model_settings: str) -> None:
    """Measure one model; `model_settings` is JSON: [whether it is loaded in 4 bit, checkpointing policy]."""
    run, (load_in_4bit, policy) = Run(Path(folder)), json.loads(model_settings)
    config = run.read_config()
    unsloth_loader.import_unsloth()
    refuse_missing_gpu()
    import torch

    base = config.base.model_copy(update={"load_in_4bit": load_in_4bit})
    with contextlib.suppress(torch.OutOfMemoryError):  # the weights alone do not fit
        measure_micro_batches(run, base, config.finetune, policy)


def refuse_missing_gpu() -> None:
    """Raise UserError when torch finds no GPU."""
    if unsloth_loader.gpu_memory_bytes() is None:
        raise UserError(
            "PROBE measures a GPU, but torch finds none on this machine",
            "leave out PROBE: `make plan` needs no GPU",
            code="probe.no_gpu",
        )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(ERROR_PREFIX + json.dumps([error.message, error.hint, error.code]), flush=True)
        sys.exit(2)
