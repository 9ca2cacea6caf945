"""python -m pipeline STAGE FOLDER: run one stage of the run in FOLDER. The `ferry` command starts this process.

What libraries print goes to FOLDER/logs/STAGE.log. Exit codes: 0 the stage is complete, 2 an error that the user can
cure, 1 an error in Ferry itself (its traceback is in the log), 130 and 143 stopped by a signal.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import console, files
from common.errors import UserError
from pipeline.checkpoint_sync import background_push
from pipeline.run.records import (
    DataRecord,
    EvaluateRecord,
    ExportRecord,
    FinetuneRecord,
    RuntimeScores,
    Scores,
    VerifyRecord,
)
from pipeline.run.run_folder import Run
from pipeline.scoring.heldout_scores import describe_interval


def main(stage: str, folder: str, *arguments: str) -> int:
    """Run a stage, push the run's state, and return the exit code. Errors are printed, not raised."""
    run = Run(Path(folder))
    threading.Thread(target=terminate_with_parent, args=(os.getppid(),), daemon=True).start()
    console.send_library_output_to(run.log_file(stage))
    try:
        RUN_STAGE[stage](run, *arguments)
        background_push.push_after_stage(run)
        return 0
    except ModuleNotFoundError as error:
        return report_missing_package(run, stage, error)
    except UserError as error:
        return report_user_error(run, stage, error)
    except OSError as error:
        try:
            return report_user_error(run, stage, files.translate_unhandled_error(error))
        except OSError:
            return report_internal_error(run, stage)
    except KeyboardInterrupt:
        console.print_message("stopped; the same command resumes from here")
        return 130
    except Exception:  # noqa: BLE001 everything else is an error in Ferry itself
        return report_internal_error(run, stage)


def terminate_with_parent(parent_pid: int) -> None:
    """Send SIGTERM to this process when the command that started it was killed; it saves its state before it exits."""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def report_missing_package(run: Run, stage: str, error: ModuleNotFoundError) -> int:
    """Print which package the stage needs, and return the exit code. The traceback goes to the log."""
    traceback.print_exc()
    text = f"{stage} needs {error.name}, which is not installed in this environment"
    return report_user_error(run, stage, UserError(text, "make env", code="environment.missing_package"))


def report_user_error(run: Run, stage: str, error: UserError) -> int:
    """Print an error that the user can cure, and return its exit code."""
    console.print_message(f"{error}\n  log: {run.log_file(stage)}")
    return 2


def report_internal_error(run: Run, stage: str) -> int:
    """Print one line for an unexpected error, and return its exit code. The traceback goes to the log."""
    traceback.print_exc()
    summary = traceback.format_exception_only(*sys.exc_info()[:2])[-1].strip()
    console.print_message(
        f"error: {stage} failed because of a bug in Ferry: {summary[:300]}\n"
        f" next: report it with {run.log_file(stage)}; the same command restarts the stage"
    )
    return 1


# Each of these runs a stage and prints its result, in at most 80 columns.


def run_and_show_data(run: Run, processes: str | None = None) -> None:
    """Run `data` and print its warnings and the numbers of the rows."""
    from pipeline.data import stage, statistics

    record = stage.run_data(run.read_config(), run, int(processes) if processes else None)
    for warning in record.warnings:
        console.print_note(warning)
    console.print_result(statistics.format_record(record))


def run_and_show_finetune(run: Run) -> None:
    """Run `finetune` and print steps, time, loss and memory."""
    from pipeline.finetune import stage

    config = run.read_config()
    record = stage.run_finetune(config.base, config.finetune, run.read_record(DataRecord), run)
    console.print_result(describe_training(record))


def describe_training(record: FinetuneRecord) -> str:
    """Return steps, time, loss and memory of a training, and the device that it ran on."""
    return (
        f"  {record.steps:,} steps in {console.format_duration(record.seconds)}, "
        f"final loss {record.final_loss:.4f}, peak memory {record.peak_memory_gb} GB\n  on {record.device}"
    )


def run_and_show_evaluate(run: Run) -> None:
    """Run `evaluate` and print the quality ladder and some answers."""
    from pipeline.evaluate import stage

    config, data, finetune = run.read_config(), run.read_record(DataRecord), run.read_record(FinetuneRecord)
    record = stage.run_evaluate(config.evaluate, config.base, data, finetune, run)
    print_ladder(record.used, record.scores)
    console.print_result(format_samples(files.read_rows(record.output_path("answers"))))
    if record.training.warning:
        console.print_note(record.training.warning)


def print_ladder(used_rows: str, scores: dict[str, Scores]) -> None:
    """Print which held-out rows were scored, and the quality ladder."""
    from pipeline.scoring import quality_ladder

    console.print_result(console.wrap_text(used_rows, 2))
    console.print_result(quality_ladder.format_for_terminal(scores))


def format_samples(answers: list[dict[str, Any]], count: int = 3) -> str:
    """Return the first `count` held-out questions with their full answers before and after training."""
    return "\n".join(line for row in answers[:count] for line in format_sample(row))


def format_sample(row: dict[str, Any]) -> list[str]:
    """Return the lines of one question and its answers; the wanted answer is shown where the trained one differs."""
    parts = [("> ", row["question"]), ("before  ", row["before"]), ("after   ", row["after"])]
    if row["reference"] != row["after"]:
        parts.append(("wanted  ", row["reference"]))
    return ["", *(line for label, text in parts for line in console.indent_under_label(label, text))]


def run_and_show_export(run: Run) -> None:
    """Run `export` and print its files with their sizes."""
    from pipeline.export import stage

    config, data = run.read_config(), run.read_record(DataRecord)
    finetune, evaluate = run.read_record(FinetuneRecord), run.read_record(EvaluateRecord)
    outputs = stage.run_export(config.export, data, finetune, evaluate, run).outputs
    console.print_result("\n".join(f"  {name:<16}{item.bytes / 1e6:>10,.1f} MB" for name, item in outputs.items()))


def run_and_show_verify(run: Run) -> None:
    """Run `verify` and print its notes, the quality ladder and the gates."""
    from pipeline.verify import stage

    data, evaluate = run.read_record(DataRecord), run.read_record(EvaluateRecord)
    record = stage.run_verify(run.read_config(), data, evaluate, run.read_record(ExportRecord), run)
    for text in record.notes:
        console.print_note(text)
    print_ladder(record.used, evaluate.scores | record.scores)
    console.print_result("\n".join(console.wrap_text(line) for line in describe_gates(record)))


def describe_gates(record: VerifyRecord) -> list[str]:
    """Return one line for each gate that `verify` has passed, with its measured values."""
    conversion = record.conversion
    parity = "Transformers, llama.cpp's server and every file agree on all golden conversations, text and token ids"
    positions = f"{conversion.positions} positions of the merged weights in torch and {record.sixteen} in llama.cpp"
    return [
        f"prompts     {parity}",
        f"conversion  mean KL {conversion.kl:.2g} nats over {positions}, same top-1 {conversion.top1:.1%}",
        f"TEMPLATE    {describe_template(record)}",
        f"default     {record.default}",
        f"as served   {describe_runtime_answers(record.as_served)}",
    ]


def describe_template(record: VerifyRecord) -> str:
    """Return which template Ollama gets, and why it is not a derived one."""
    if record.template == "derived":
        return "derived, equal on all golden conversations"
    return f"the one inside the GGUF; {'; '.join(record.reasons)}"


def describe_runtime_answers(scores: RuntimeScores) -> str:
    """Return how well the default file answers with the prompts that runtimes send."""
    if scores.same_prompts == scores.rows:
        return f"runtimes send the prompts that were scored, all {scores.rows}"
    result = describe_interval(scores) if scores.score is not None else f"held-out loss {scores.loss:.3f}"
    other_prompts = scores.rows - scores.same_prompts
    return f"{result}; runtimes send a different prompt than the row's for {other_prompts} of {scores.rows}"


def run_and_show_publish(run: Run) -> None:
    """Run `publish` and print the repo and the command that deploys it."""
    from pipeline.publish import stage

    record = stage.run_publish(run.read_config(), run)
    console.print_result(f"  {record.repo_with_tag}\n  on your Mac: make deploy-mac REPO={record.repo_with_tag}")


RUN_STAGE: dict[str, Callable[..., None]] = {
    "data": run_and_show_data,
    "finetune": run_and_show_finetune,
    "evaluate": run_and_show_evaluate,
    "export": run_and_show_export,
    "verify": run_and_show_verify,
    "publish": run_and_show_publish,
}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
