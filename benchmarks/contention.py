"""How much slower is a short demo beside another busy program, on the same cores?

    python benchmarks/contention.py

The other program is one loop for each core. Both runs are new ones with warm caches; the second has the loops beside it.
Writes benchmarks/results/contention.{json,md}.
"""

import multiprocessing
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import table

SHORT = "finetune.max_steps=30 evaluate.max_rows=24 verify.min_score=0 export.imatrix_tokens=2048"
CASE = "make demo, 30 steps"


def main() -> None:
    alone = run_demo()
    loops = [multiprocessing.Process(target=loop_forever, daemon=True) for _ in range(multiprocessing.cpu_count())]
    for process in loops:
        process.start()
    try:
        beside = run_demo()
    finally:
        for process in loops:
            process.kill()
    rows = [
        {"system": "ferry", "case": f"{CASE}: alone", "wall_s": round(alone, 1)},
        {"system": "ferry", "case": f"{CASE}: beside a busy loop on each core", "wall_s": round(beside, 1), "of_alone": round(beside / alone, 2)},
    ]  # fmt: skip
    device = f"{multiprocessing.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    table.write("contention", "benchmarks/contention.py", ("torch", "llama-cpp-python"), rows, device)


def run_demo() -> float:
    """Seconds of `make demo` in a new run, from nothing but the environments and caches."""
    folder = Path(tempfile.mkdtemp(prefix="ferry-contention-"))
    settings = [
        f"RUNS={folder}/runs",
        f"MODELS={folder}/models",
        f"REPO={folder}/hub/demo",
        f"SET={SHORT} publish.repo={folder}/hub/{{run}}",
    ]
    started = time.monotonic()
    try:
        subprocess.run(["make", "--no-print-directory", "demo", *settings], check=True, stdout=sys.stderr)
    finally:
        shutil.rmtree(folder)
    return time.monotonic() - started


def loop_forever() -> None:
    while True:
        pass


if __name__ == "__main__":
    main()
