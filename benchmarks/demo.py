"""Measures `make demo`; see demo.sh. Standard library only: it runs before there is an environment."""

import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path("benchmarks/results")
STAGES = ["env", "data", "finetune", "evaluate", "export", "verify", "publish", "deploy-mac"]


def main(case: str) -> None:
    """fresh: the demo as it is, with empty caches. warm: new runs with warm caches and other seeds, one after the other."""
    for seed in {"fresh": [3407], "warm": [1, 2]}[case]:
        demo(case, seed)


def demo(case: str, seed: int) -> None:
    label = f"{case}, seed {seed}"
    work = Path(tempfile.mkdtemp(prefix="ferry-bench-"))
    environment = dict(os.environ)
    settings = {
        "train": ["CONFIG=configs/demo.yaml", f"RUNS={work / 'runs'}", f"SET=finetune.seed={seed} publish.repo={work}/hub/{{run}}"],
        "deploy-mac": [f"MODELS={work / 'models'}", f"REPO={work / 'hub' / 'demo'}"],
        "env": [],
    }  # fmt: skip
    if case == "fresh":
        environment |= {"FERRY_CACHE": str(work / "cache"), "FERRY_VENV": str(work / "venv")}
    try:
        rows = [measure(label, stage, settings, environment) for stage in STAGES]
        rows.append(total(label, rows))
        manifest = json.loads((work / "hub" / "demo" / "manifest.json").read_text())
        rows += scores(label, manifest)
        again = measure(label, "make demo again", settings, environment, ["train", "deploy-mac"])
        today = {"date": datetime.date.today().isoformat()}  # the cases may be measured on different days
        write(label, [row | today for row in [*rows, again]], manifest)
    finally:
        shutil.rmtree(work)


def measure(
    case: str, stage: str, settings: dict[str, list[str]], environment: dict, targets: list[str] | None = None
) -> dict:
    """One make target: wall and CPU seconds, peak memory of its largest process (Linux: kilobytes, macOS: bytes).

    settings: what is typed after a target; a stage takes those of `train`.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    peak = 0.0
    for target in targets or [stage]:
        typed = settings.get(target, settings["train"])
        peak = max(peak, peak_gb(["make", "--no-print-directory", *typed, target], environment))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {
        "system": "ferry", "case": f"{case}: {stage}", "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1), "peak_memory_gb": round(peak, 2),
    }  # fmt: skip
    print(f"--- {row['case']}: {row['wall_s']} s, {row['peak_memory_gb']} GB", flush=True)
    return row


def peak_gb(command: list[str], environment: dict) -> float:
    """Run in a child of its own, so that its largest descendant's memory is not mixed with another stage's."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = subprocess.run(command, env=environment).returncode
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        os.write(write, json.dumps(used).encode())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as answer:
        used = answer.read()
    status = os.waitpid(child, 0)[1]
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return int(used) * (1 if platform.system() == "Darwin" else 1024) / 1e9


def total(case: str, rows: list[dict]) -> dict:
    return {
        "system": "ferry", "case": f"{case}: make demo, all", "wall_s": round(sum(row["wall_s"] for row in rows), 1),
        "cpu_s": round(sum(row["cpu_s"] for row in rows), 1), "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
    }  # fmt: skip


def scores(case: str, manifest: dict) -> list[dict]:
    return [
        {"system": "base model" if name == "base" else "ferry", "case": f"{case}: held-out rows, {name}", **found}
        for name, found in manifest["scores"]["heldout"].items()
    ]


def write(case: str, rows: list[dict], manifest: dict) -> None:
    """Replace the rows of this case, keep the other's; the table beside it is made from the same rows."""
    path = RESULTS / "demo.json"
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for row in old if not row["case"].startswith(case + ":")] + rows
    result = {
        "device": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": manifest["provenance"]["packages"] | {"llama_cpp": manifest["provenance"]["llama_cpp"], "python": manifest["provenance"]["python"]},
        "command": "bash benchmarks/demo.sh fresh; bash benchmarks/demo.sh warm", "date": datetime.date.today().isoformat(), "rows": rows,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    columns = [
        "date",
        "wall_s",
        "cpu_s",
        "peak_memory_gb",
        "loss",
        "kl",
        "top1",
        "score",
        "megabytes",
        "tokens_per_second",
    ]
    lines = [
        f"{result['device']}, {result['date']}: `{result['command']}`",
        "",
        "| system | case | " + " | ".join(columns) + " |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    lines += [
        f"| {row['system']} | {row['case']} | " + " | ".join(str(row.get(column, "")) for column in columns) + " |"
        for row in rows
    ]
    (RESULTS / "demo.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
