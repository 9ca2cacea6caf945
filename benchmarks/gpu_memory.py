"""Scores `plan` on a GPU: predicted against measured peak memory, at settings that its constants were not fitted on.

    .venv/bin/python benchmarks/gpu_memory.py [--work FOLDER] [--results FOLDER]

Each trains three steps of random rows on random weights of a Llama's shape (3.2 1B and 3B, 3.1 8B) in a process of its own.
Predicted is what `make plan` says for the same rows in the same order. Writes benchmarks/results/gpu_memory.{json,md}.
"""

import argparse
import sys
from pathlib import Path

import box
import table

# name: (shape, rows, base, finetune)
CASES = {
    "1B, nf4, packed": ("1B", "alpaca", {}, {"micro_batch_tokens": 8192}),
    "3B, nf4, packed": ("3B", "alpaca", {}, {"micro_batch_tokens": 12288}),
    "3B, 16 bit, packed": ("3B", "alpaca", {"load_in_4bit": False}, {"micro_batch_tokens": 6144}),
    "3B, nf4, checkpointed, full": ("3B", "full", {}, {"micro_batch_tokens": 16384, "use_gradient_checkpointing": "unsloth"}),
    "3B, nf4, padded": ("3B", "alpaca", {}, {"micro_batch_tokens": 8192, "packing": False}),
    "8B, nf4, r 64, packed": ("8B", "alpaca", {}, {"micro_batch_tokens": 6144, "r": 64}),
    "8B, 16 bit, plain checkpointing": ("8B", "full", {"load_in_4bit": False}, {"micro_batch_tokens": 8192, "use_gradient_checkpointing": True}),
}  # fmt: skip


def one(name: str, work: Path) -> None:
    import varlen  # noqa: F401

    from contract import files
    from pipeline.config import Base, Finetune
    from pipeline.finetune.stage import stage
    from pipeline.plan import memory

    shape, case, base, tune = CASES[name]
    folder = box.model(shape, work)
    run = box.run(f"memory {name}", work, box.rows(case, 1000))
    base, tune = Base(model=str(folder), **base), Finetune(max_steps=3, train_batch_size="auto", **tune)
    record = stage(base, tune, run)

    built = memory.shape(files.read_json(folder / "config.json"))
    tokens = record["largest_micro_batch"]
    told = memory.peak(built, base, tune, tokens, record["use_gradient_checkpointing"], record["packing"]) / 1e9
    box.tell({"system": "ferry", "case": name, "tokens": tokens, "predicted_gb": round(told, 2), "measured_gb": record["peak_memory_gb"],
              "error": round(told / record["peak_memory_gb"] - 1, 4)})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/ferry-gpu"))
    parser.add_argument("--results", type=Path, default=table.RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        return one(asked.one, asked.work)
    asked.results.mkdir(parents=True, exist_ok=True)
    found = [box.alone(__file__, name, "--work", asked.work, out=asked.results) for name in CASES]
    table.write(
        "gpu_memory",
        " ".join(["python", "benchmarks/gpu_memory.py", *sys.argv[1:]]),
        box.PACKAGES,
        [row for row in found if row],
        box.device(),
        asked.results,
    )


if __name__ == "__main__":
    main()
