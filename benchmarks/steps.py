"""What do a plan and the start of a training cost for a hundred steps, and for a million?

    python benchmarks/steps.py

The demo's rows and base model on this machine's CPU. `plan` runs to its end; `finetune` is ended after its first step. Each
is a process of its own; peak memory is the kernel's (VmHWM). Figures are ratios to a hundred steps.
Writes benchmarks/results/steps.{json,md}.
"""

import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import table

ROOT = Path(__file__).resolve().parents[1]
STEPS = (100, 1_000, 10_000, 100_000, 1_000_000)
DEMO = ROOT / "configs" / "demo.yaml"


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="ferry-steps-"))
    try:
        rows = [
            row for system in (measure_plan, measure_finetune) for row in relate([system(folder, s) for s in STEPS])
        ]
    finally:
        shutil.rmtree(folder)
    device = f"{multiprocessing.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    table.write("steps", "benchmarks/steps.py", ("torch", "transformers", "trl"), rows, device)


def relate(rows: list[dict]) -> list[dict]:
    """The rows with their time and memory as a multiple of the first one's."""
    first = rows[0]
    return [
        row | {"of_100_steps_time": round(row["wall_s"] / first["wall_s"], 2), "of_100_steps_memory": round(row["peak_mb"] / first["peak_mb"], 2)}
        for row in rows
    ]  # fmt: skip


def measure_plan(folder: Path, steps: int) -> dict:
    run = prepare(folder, steps)
    command = [sys.executable, "-m", "cli", "plan", "--run", run.name, "--runs", str(run.parent)]
    return {"system": "ferry", "case": f"plan, {steps:,} steps"} | measure(command, lambda: False)


def measure_finetune(folder: Path, steps: int) -> dict:
    run = prepare(folder, steps)
    log = run / "finetune" / "log.jsonl"
    command = [sys.executable, "-m", "pipeline", "finetune", str(run)]
    found = measure(command, lambda: log.is_file() and log.stat().st_size > 0)
    return {"system": "ferry", "case": f"finetune to its first step, {steps:,} steps"} | found


def prepare(folder: Path, steps: int) -> Path:
    """A run of so many steps whose rows are made."""
    run = folder / f"steps-{steps}"
    if not run.exists():
        settings = ["--set", f"finetune.max_steps={steps}", "--set", "finetune.logging_steps=1"]
        data = [sys.executable, "-m", "cli", "data", str(DEMO), *settings, "--run", run.name, "--runs", str(folder)]
        subprocess.run(data, cwd=ROOT, check=True, stdout=sys.stderr)
    return run


def measure(command: list[str], is_enough) -> dict:
    """Seconds and peak memory (MB) of a command, until it ends or `is_enough()`."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not is_enough():
        peak = max(peak, peak_memory(process.pid))
        time.sleep(0.05)
    seconds = time.monotonic() - started
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    elif process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    process.wait()
    return {"wall_s": round(seconds, 1), "peak_mb": round(peak / 1e6)}


def peak_memory(pid: int) -> int:
    """Bytes; 0 when the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    main()
