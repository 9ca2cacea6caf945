"""Scores `plan` on a GPU: predicted against measured peak memory, at settings that its constants were not fitted on.

    .venv/bin/python benchmarks/gpu_memory.py [--work FOLDER] [--results FOLDER]

Each trains three steps of random rows on random weights of a Llama's shape (3.2 1B and 3B, 3.1 8B) in a process of its own.
Predicted is what `make plan` says for the same rows in the same order. Writes benchmarks/results/gpu_memory.{json,md}.
"""

from pathlib import Path

import box

from pipeline.run.records import DataRecord

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
    box.unsloth()

    from common import files
    from pipeline.config.schema import Base, Finetune
    from pipeline.finetune.stage import run_finetune
    from pipeline.plan import memory_need

    shape, case, base, tune = CASES[name]
    folder = box.model(shape, work)
    run = box.run(f"memory {name}", work, box.rows(case, 1000))
    base, tune = Base(model=str(folder), **base), Finetune(max_steps=3, train_batch_size="auto", **tune)
    record = run_finetune(base, tune, run.read_record(DataRecord), run)

    built = memory_need.shape_from_config(files.read_json(folder / "config.json"))
    tokens = record.largest_micro_batch
    told = memory_need.peak_bytes(built, base, tune, tokens, record.use_gradient_checkpointing, record.packing) / 1e9
    box.tell({"system": "ferry", "case": name, "tokens": tokens, "predicted_gb": round(told, 2), "measured_gb": record.peak_memory_gb,
              "error": round(told / record.peak_memory_gb - 1, 4)})  # fmt: skip


def main() -> None:
    asked = box.arguments(__doc__, 1).parse_args()
    if asked.one:
        return one(*asked.one, asked.work)
    box.write(
        __file__, [box.alone(__file__, name, work=asked.work, go_on=asked.go_on) for name in CASES], asked.results
    )


if __name__ == "__main__":
    main()
