"""Measures `finetune` on a GPU: an 8B Llama in QLoRA beside what a user would run instead. Real tokens: padding is not counted.

    .venv/bin/python benchmarks/gpu.py [--shape 8B] [--work FOLDER] [--results FOLDER]

hf-peft: Transformers, PEFT and bitsandbytes with TRL's trainer; unsloth-tutorial: Unsloth with the settings of its notebooks
(2 rows x 4 accumulations, its gradient checkpointing); ferry: the stage itself. Rows of `full` have 2,048 tokens, those of
`alpaca` the lengths of the Alpaca data set. rows_per_step 8: the same eight rows a step for all; packs: rows packed to 2,048,
eight packs a step, as the library does it; free: Ferry's train_batch_size auto. Weights and ids are random (speed and memory
do not depend on them). Each measurement is a process of its own, timed between two steps after the kernels were compiled;
load_s is from its start to the first step. MFU: 4 FLOPs a weight and token (frozen weights have no gradient), nothing for
recomputation, of the card's dense bf16 peak in configs/gpus.csv. Writes benchmarks/results/gpu.{json,md}.
"""

from pathlib import Path

import box

from pipeline.run.records import DataRecord

SETTINGS = {
    "learning_rate": 2e-4, "warmup_steps": 5, "lr_scheduler_type": "linear", "optim": "adamw_8bit", "weight_decay": 0.01,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "logging_steps": 1, "bf16": True, "report_to": "none",
    "max_length": box.LONGEST, "train_sampling_strategy": "sequential", "save_strategy": "no", "seed": 3407,
}  # fmt: skip
"""Of Unsloth's notebooks, for both rivals; in the order of the rows, so that it is known which tokens a step has."""
LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0, "bias": "none"}
# (system, case, rows a step): the steps after which the clock starts and stops
CASES = {
    ("hf-peft", "full", "8"): (2, 8),
    ("hf-peft", "alpaca", "8"): (2, 8),
    ("hf-peft", "alpaca", "packs"): (2, 8),
    ("unsloth-tutorial", "full", "8"): (6, 16),
    ("unsloth-tutorial", "alpaca", "8"): (6, 18),
    ("unsloth-tutorial", "alpaca", "packs"): (6, 14),
    ("ferry", "full", "8"): (8, 20),
    ("ferry", "alpaca", "8"): (12, 60),
    ("ferry", "full", "free"): (8, 20),
    ("ferry", "alpaca", "free"): (8, 24),
}


def one(system: str, case: str, per_step: str, shape: str, work: Path) -> None:
    """Train between the two steps and tell what was measured."""
    first, last = CASES[system, case, per_step]
    if system != "hf-peft":
        box.unsloth()
    seen = box.clock((1, first, last))
    made = box.rows(case, 4000 if case == "alpaca" else 320)
    weights = box.model(shape, work)
    if system == "ferry":
        tokens, more = ferry(weights, made, per_step, first, last, work)
    else:
        tokens, more = library(*RIVALS[system](weights), weights, made, per_step, first, last, work), {}
    import torch

    from pipeline.plan import gpu_table, memory_need

    speed = tokens / (seen[last] - seen[first])
    built = memory_need.shape_from_config(box.SHAPES[shape] | {"vocab_size": 128256})
    box.tell({
        "system": system, "case": case, "rows_per_step": int(per_step) if per_step.isdecimal() else per_step,
        "real_tokens_per_second": round(speed), "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "mfu": round(speed * built.flops_per_token() / gpu_table.find_speed_and_price(torch.cuda.get_device_name())[0], 3),
        "load_s": round(seen["begin"] - box.started(), 1), "first_step_s": round(seen[1] - seen["begin"], 1), **more,
    })  # fmt: skip


def hf_peft(weights: Path) -> tuple:
    """The base, and what the trainer is given besides."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        weights, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0}
    )
    return base, {"peft_config": LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")}


def tutorial(weights: Path, longest: int = box.LONGEST) -> tuple:
    """The same of Unsloth's notebooks."""
    from unsloth import FastLanguageModel

    base, _ = FastLanguageModel.from_pretrained(str(weights), max_seq_length=longest, load_in_4bit=True)
    return FastLanguageModel.get_peft_model(base, **LORA, use_gradient_checkpointing="unsloth"), {}


RIVALS = {"hf-peft": hf_peft, "unsloth-tutorial": tutorial}


def library(base, more: dict, weights: Path, made: list[dict], per_step: str, first: int, last: int, work: Path) -> int:
    """Train by TRL's own trainer; the real tokens between the two steps."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**SETTINGS, max_steps=last, packing=per_step == "packs", output_dir=str(work / "trainer"))
    trainer = SFTTrainer(model=base, args=args, train_dataset=Dataset.from_list(made),
                         processing_class=AutoTokenizer.from_pretrained(weights), **more)  # fmt: skip
    sizes = [len(row["input_ids"]) for row in trainer.train_dataset]
    trainer.train()
    return sum(sizes[first * 8 : last * 8])


def ferry(weights: Path, made: list[dict], per_step: str, first: int, last: int, work: Path) -> tuple[int, dict]:
    from pipeline.config.schema import Base, Finetune
    from pipeline.finetune.stage import run_finetune

    run = box.run(f"gpu-{per_step}", work, made)
    tune = Finetune(train_batch_size="auto" if per_step == "free" else 8, max_steps=last, logging_steps=4)
    record = run_finetune(Base(model=str(weights), max_seq_length=box.LONGEST), tune, run.read_record(DataRecord), run)
    tokens = {entry["step"]: entry["tokens"] for entry in box.log(run) if "tokens" in entry}
    return tokens[last] - tokens[first], {
        "rows": record.train_batch_size,
        "micro_batch_tokens": record.micro_batch_tokens,
    }


def main() -> None:
    parser = box.arguments(__doc__, 3)
    parser.add_argument("--shape", choices=box.SHAPES, default="8B")
    asked = parser.parse_args()
    if asked.one:
        return one(*asked.one, asked.shape, asked.work)
    found = [box.alone(__file__, *case, "--shape", asked.shape, work=asked.work, go_on=asked.go_on) for case in CASES]
    box.write(__file__, found, asked.results, f" --shape {asked.shape}")


if __name__ == "__main__":
    main()
