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

from common import console, files
from common.errors import UserError
from pipeline.checkpoint_sync import background_push
from pipeline.run.records import (
    DataRecord,
    EvaluateRecord,
    ExportRecord,
    FinetuneRecord,
    RuntimeScores,
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
        traceback.print_exc()
        missing = UserError(
            f"{stage} needs {error.name}, which is not installed in this environment",
            "make env",
            code="environment.missing_package",
        )
        return report_user_error(run, stage, missing)
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
    from pipeline.data import stage as data
    from pipeline.data import statistics

    record = data.run_data(run.read_config(), run, int(processes) if processes else None)
    for warning in record.warnings:
        console.print_note(warning)
    console.print_result(statistics.format_record(record))


def run_and_show_finetune(run: Run) -> None:
    """Run `finetune` and print steps, time, loss and memory."""
    from pipeline.finetune import stage as finetune

    config = run.read_config()
    record = finetune.run_finetune(config.base, config.finetune, run.read_record(DataRecord), run)
    console.print_result(
        f"  {record.steps:,} steps in {console.format_duration(record.seconds)}, "
        f"final loss {record.final_loss:.4f}, peak memory {record.peak_memory_gb} GB\n  on {record.device}"
    )


def run_and_show_evaluate(run: Run) -> None:
    """Run `evaluate` and print the quality ladder and some answers."""
    from pipeline.evaluate import stage
    from pipeline.scoring import quality_ladder

    config, data, finetune = run.read_config(), run.read_record(DataRecord), run.read_record(FinetuneRecord)
    record = stage.run_evaluate(config.evaluate, config.base, data, finetune, run)
    console.print_result(f"{console.wrap_text(record.used, 2)}\n{quality_ladder.format_for_terminal(record.scores)}")
    console.print_result(format_samples(files.read_rows(record.output_path("answers"))))
    if record.training.warning:
        console.print_note(record.training.warning)


def format_samples(answers: list[dict], count: int = 3) -> str:
    """Return the first `count` held-out questions with their full answers before and after training."""
    lines = []
    for row in answers[:count]:
        lines += [
            "",
            *console.indent_under_label("> ", row["question"]),
            *console.indent_under_label("before  ", row["before"]),
        ]
        lines += console.indent_under_label("after   ", row["after"])
        lines += console.indent_under_label("wanted  ", row["reference"]) if row["reference"] != row["after"] else []
    return "\n".join(lines)


def run_and_show_export(run: Run) -> None:
    """Run `export` and print its files with their sizes."""
    from pipeline.export import stage as export

    records = (run.read_record(kind) for kind in (DataRecord, FinetuneRecord, EvaluateRecord))
    outputs = export.run_export(run.read_config().export, *records, run).outputs
    console.print_result("\n".join(f"  {name:<16}{item.bytes / 1e6:>10,.1f} MB" for name, item in outputs.items()))


def run_and_show_verify(run: Run) -> None:
    """Run `verify` and print its notes, the quality ladder and the gates."""
    from pipeline.scoring import quality_ladder
    from pipeline.verify import stage as verify

    data, evaluate, export = (run.read_record(kind) for kind in (DataRecord, EvaluateRecord, ExportRecord))
    record = verify.run_verify(run.read_config(), data, evaluate, export, run)
    for text in record.notes:
        console.print_note(text)
    console.print_result(console.wrap_text(record.used, 2))
    console.print_result(quality_ladder.format_for_terminal(evaluate.scores | record.scores))
    console.print_result("\n".join(console.wrap_text(line) for line in describe_gates(record)))


def describe_gates(record: VerifyRecord) -> list[str]:
    """Return one line for each gate that `verify` has passed, with its measured values."""
    conversion = record.conversion
    template = "derived, equal on all golden conversations"
    if record.template != "derived":
        template = f"the one inside the GGUF; {'; '.join(record.reasons)}"
    parity = "Transformers, llama.cpp's server and every file agree on all golden conversations, text and token ids"
    positions = f"{conversion.positions} positions of the merged weights in torch and {record.sixteen} in llama.cpp"
    return [
        f"prompts     {parity}",
        f"conversion  mean KL {conversion.kl:.2g} nats over {positions}, same top-1 {conversion.top1:.1%}",
        f"TEMPLATE    {template}",
        f"default     {record.default}",
        f"as served   {describe_runtime_answers(record.as_served)}",
    ]


def describe_runtime_answers(scores: RuntimeScores) -> str:
    """Return how well the default file answers with the prompts that runtimes send."""
    if scores.same_prompts == scores.rows:
        return f"runtimes send the prompts that were scored, all {scores.rows}"
    result = describe_interval(scores) if scores.score is not None else f"held-out loss {scores.loss:.3f}"
    other_prompts = scores.rows - scores.same_prompts
    return f"{result}; runtimes send a different prompt than the row's for {other_prompts} of {scores.rows}"


def run_and_show_publish(run: Run) -> None:
    """Run `publish` and print the repo and the command that deploys it."""
    from pipeline.publish import stage as publish

    record = publish.run_publish(run.read_config(), run)
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
