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
from pipeline.run.records import published_name
from pipeline.run.run_folder import Run
from pipeline.scoring.heldout_scores import describe_interval


def main(stage: str, folder: str, *arguments: str) -> int:
    """Run a stage, push the run's state, and return the exit code. Errors are printed, not raised."""
    run = Run(Path(folder))
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    console.send_library_output_to(run.log_file(stage))
    try:
        RUN_STAGE[stage](run, *arguments)
        background_push.after(run)
        return 0
    except ModuleNotFoundError as error:
        traceback.print_exc()
        return report(
            run, stage, UserError(f"{stage} needs {error.name}, which this environment does not have", "make env")
        )
    except UserError as error:
        return report(run, stage, error)
    except OSError as error:
        try:
            return report(run, stage, files.explain_unhandled(error))
        except OSError:
            return report_bug(run, stage)
    except KeyboardInterrupt:
        console.say("stopped; the same command goes on from here")
        return 130
    except Exception:  # noqa: BLE001 everything else is an error in Ferry itself
        return report_bug(run, stage)


def end_with_parent(parent: int) -> None:
    """Send SIGTERM to this process when the command that started it was killed; it saves its state before it exits."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def report(run: Run, stage: str, error: UserError) -> int:
    """Print an error that the user can cure, and return its exit code."""
    console.say(f"{error}\n  log: {run.log_file(stage)}")
    return 2


def report_bug(run: Run, stage: str) -> int:
    """Print one line for an unexpected error, and return its exit code. The traceback goes to the log."""
    traceback.print_exc()
    last = traceback.format_exception_only(*sys.exc_info()[:2])[-1].strip()
    console.say(
        f"error: {stage} failed, and this is a fault of Ferry's: {last[:300]}\n"
        f" next: report it with {run.log_file(stage)}; the same command goes on from the stage's beginning"
    )
    return 1


# Each of these runs a stage and prints its result, in at most 80 columns.


def run_data(run: Run, processes: str | None = None) -> None:
    from pipeline.data import stage as data
    from pipeline.data import statistics

    record = data.stage(run.config(), run, int(processes) if processes else None)
    for warning in record["warnings"]:
        console.note(warning)
    console.show(statistics.table(record))


def run_finetune(run: Run) -> None:
    from pipeline.finetune import stage as finetune

    config = run.config()
    record = finetune.stage(config.base, config.finetune, run)
    console.show(
        f"  {record['steps']:,} steps in {console.format_duration(record['seconds'])}, "
        f"final loss {record['final_loss']:.4f}, peak memory {record['peak_memory_gb']} GB\n  on {record['device']}"
    )


def run_evaluate(run: Run) -> None:
    from pipeline.evaluate import stage
    from pipeline.scoring import quality_ladder

    record = stage.stage(run.config(), run)
    console.show(f"{console.wrap(record['used'], 2)}\n{quality_ladder.format_for_terminal(record['scores'])}")
    console.show(format_samples(files.read_rows(run.output("evaluate", "answers"))))
    if record["training"]["warning"]:
        console.note(record["training"]["warning"])


def format_samples(answers: list[dict], count: int = 3) -> str:
    """Return the first `count` held-out questions with their full answers before and after training."""
    lines = []
    for row in answers[:count]:
        lines += ["", *console.quote("> ", row["question"]), *console.quote("before  ", row["before"])]
        lines += console.quote("after   ", row["after"])
        lines += console.quote("wanted  ", row["reference"]) if row["reference"] != row["after"] else []
    return "\n".join(lines)


def run_export(run: Run) -> None:
    from pipeline.export import stage as export

    outputs = export.stage(run.config(), run)["outputs"]
    console.show("\n".join(f"  {name:<16}{item['bytes'] / 1e6:>10,.1f} MB" for name, item in outputs.items()))


def run_verify(run: Run) -> None:
    from pipeline.scoring import quality_ladder
    from pipeline.verify import stage as verify

    record = verify.stage(run.config(), run)
    for text in record["notes"]:
        console.note(text)
    console.show(console.wrap(record["used"], 2))
    console.show(quality_ladder.format_for_terminal(run.read("evaluate")["scores"] | record["scores"]))
    console.show("\n".join(console.wrap(line) for line in describe_gates(record)))


def describe_gates(record: dict) -> list[str]:
    """Return one line for each gate that `verify` has passed, with its measured values."""
    conversion = record["conversion"]
    template = "derived, equal on all golden conversations"
    if record["template"] != "derived":
        template = f"the one inside the GGUF; {'; '.join(record['reasons'])}"
    parity = "Transformers, llama.cpp's server and every file agree on all golden conversations, text and token ids"
    positions = (
        f"{conversion['positions']} positions of the merged weights in torch and {record['sixteen']} in llama.cpp"
    )
    return [
        f"prompts     {parity}",
        f"conversion  mean KL {conversion['kl']:.2g} nats over {positions}, same top-1 {conversion['top1']:.1%}",
        f"TEMPLATE    {template}",
        f"default     {record['default']}",
        f"as served   {describe_served(record['as_served'])}",
    ]


def describe_served(served: dict) -> str:
    """Return how well the default file answers with the prompts that runtimes send."""
    if served["same_prompts"] == served["rows"]:
        return f"runtimes send the prompts that were scored, all {served['rows']}"
    result = describe_interval(served) if "score" in served else f"held-out loss {served['loss']:.3f}"
    other = served["rows"] - served["same_prompts"]
    return f"{result}; runtimes send another prompt than the row's for {other} of {served['rows']}"


def run_publish(run: Run) -> None:
    from pipeline.publish import stage as publish

    record = publish.stage(run.config(), run)
    console.show(f"  {published_name(record)}\n  on your Mac: make deploy-mac REPO={published_name(record)}")


RUN_STAGE: dict[str, Callable[..., None]] = {
    "data": run_data,
    "finetune": run_finetune,
    "evaluate": run_evaluate,
    "export": run_export,
    "verify": run_verify,
    "publish": run_publish,
}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
