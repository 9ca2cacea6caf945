"""smoke: test that the pulled file answers here as it did on the machine that made it, before anything is installed."""

import io
import platform
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import child_process, console, files, gguf_reader, llama_runtime
from common.errors import UserError, printable_line
from contract import chat_format, template_sandbox
from contract.manifest import Manifest, SmokePrompt
from deploy import store
from deploy.stages import memory_need

if TYPE_CHECKING:
    from llama_cpp import Llama

# The largest mean absolute difference of the log-probabilities of answer tokens, in nats. Measured on a CPU with
# SmolLM2-135M Q4_1, one answer at a time: 0 with other thread counts and batch sizes, at most 0.054 when tokens are
# computed one at a time (other kernels), 0.059 between flash attention on and off, 0.076 with a q8_0 cache in addition.
# A damaged or wrong file is far above 1.
MAX_DIFFERENCE = 0.15
MEASURED_BACKENDS = ("CPU",)  # the backends on which that bound was measured; others use the same bound
# Limits of time. A 135M file (0.1 GB) answers 110 tokens/s on two idle cores and 10 tokens/s on busy ones, which is 1 s
# for each token and GB.
LOAD_SECONDS, SECONDS_PER_TOKEN_BYTE, MAX_SECONDS = 300, 1e-9, 7200
EXTRA_TOKENS = 32  # tokens that an answer may be longer than the recorded one before it counts as endless
SPEED_PROMPT, SPEED_ANSWER, SPEED_SECONDS = 128, 64, 10  # tokens, tokens, and the most seconds


def run_smoke_in_child(version: Path) -> dict[str, Any]:
    """Run `run_smoke` in a child process and return its record: llama.cpp parses a file that may come from anybody."""
    manifest, path = store.load_pulled(version)
    longest = max((len(s.ids) + len(s.answer_ids) + EXTRA_TOKENS for s in manifest.smoke), default=0)
    tokens = sum(len(s.ids) + 2 * len(s.answer_ids) + EXTRA_TOKENS for s in manifest.smoke)
    size = path.stat().st_size
    seconds = min(MAX_SECONDS, LOAD_SECONDS + tokens * size * SECONDS_PER_TOKEN_BYTE)
    limits = memory_need.process_limits(gguf_reader.read_header(path), size, max(1024, longest), seconds)
    with console.show_elapsed_time(f"testing {path.name}"):
        return child_process.call_in_child(
            "deploy.stages.smoke:run_smoke_as_child", [str(version)], limits, f"the smoke test of {path.name}"
        )


def run_smoke_as_child(version: str) -> dict[str, Any]:
    """Run the smoke test in this process, which `run_smoke_in_child` has started. Its arguments are JSON."""
    return run_smoke(Path(version))


def run_smoke(version: Path) -> dict[str, Any]:
    """Load the pulled file, compare prompts and answers with the manifest, write smoke.json and return it.

    Raise UserError when anything differs. When answers differ, smoke.json holds the evidence and no sha256.
    """
    manifest, path = store.load_pulled(version)
    artifact = manifest.find_artifact(path.name)
    files.remove(version / "smoke.json")
    if not manifest.smoke:
        raise UserError(
            f"the manifest of {path.name} has no answers to compare with",
            "publish it again: `make publish`",
            code="smoke.no_answers",
        )
    model, load_facts = load_model(manifest, path)
    try:
        verify_prompts(model, manifest, path)
        if (largest_id := max(max((*s.ids, *s.answer_ids)) for s in manifest.smoke)) >= model.n_vocab():
            raise UserError(
                f"the manifest of {path.name} names the token id {largest_id}, the model has {model.n_vocab()} tokens",
                "do not use this repo",
                code="smoke.unknown_token",
            )
        answers = [compare_answer(model, expected) for expected in manifest.smoke]
        record = {
            "stage": "smoke",
            "file": path.name,
            "machine": f"{platform.system()} {platform.machine()}",
            **load_facts,
            **measure_speed(model, manifest.smoke[0].ids),
            "memory": peak_memory(),
            "answers": answers,
            "difference": round(max(answer["difference"] for answer in answers), 4),
            "bound": MAX_DIFFERENCE,
            "bound_measured": load_facts["backend"] in MEASURED_BACKENDS,
            "judged": artifact.default,  # the recorded answers are those of the default file
        }
    finally:
        model.close()
    record["faults"] = find_faults(record)
    if not record["faults"]:
        record |= {"sha256": artifact.sha256, "stamp": store.file_stamp(path)}
    files.write_json(version / "smoke.json", record)
    if record["faults"]:
        raise UserError(
            f"{path.name} does not answer as on the training machine: {'; '.join(record['faults'])}",
            "pull it again; if it fails again, llama.cpp computes wrong results on this machine: report it with "
            f"{version / 'smoke.json'} (`make rollback` uses the previous version)",
            code="smoke.wrong_answers",
        )
    return record


def load_model(manifest: Manifest, path: Path) -> tuple["Llama", dict[str, Any]]:
    """Load the model and return it with facts that llama.cpp logged.

    Raise UserError when there is a GPU but not all layers are on it.
    """
    log, started = io.StringIO(), time.perf_counter()
    longest = max(len(s.ids) + len(s.answer_ids) + EXTRA_TOKENS for s in manifest.smoke)
    model = llama_runtime.load_model(path, max(1024, longest), log=log)
    facts = {"load_seconds": round(time.perf_counter() - started, 2), "backend": llama_runtime.compute_device()}
    offloaded = re.findall(r"offloaded (\d+)/(\d+) layers to GPU", log.getvalue())
    facts["gpu_layers"], facts["layers"] = map(int, offloaded[-1]) if offloaded else (0, None)
    if facts["backend"] != "CPU" and facts["gpu_layers"] != facts["layers"]:
        model.close()
        raise UserError(
            f"llama.cpp put {facts['gpu_layers']} of {facts['layers']} layers of {path.name} on {facts['backend']}",
            "close programs that use GPU memory, or use a smaller file: `make deploy-mac QUANT=...`",
            code="smoke.not_on_gpu",
        )
    return model, facts


def verify_prompts(model: "Llama", manifest: Manifest, path: Path) -> None:
    """Verify that the file's own template and tokenizer give the golden prompts. Raise UserError when one differs."""
    if chat_format.embedded_template(model) != manifest.chat.template:
        raise UserError(
            f"the chat template of {path.name} differs from the one in its manifest",
            "publish it again: `make publish`",
            code="gguf.wrong_template",
        )
    conversations = [(golden.messages, golden.add_generation_prompt) for golden in manifest.golden]
    texts = template_sandbox.render_prompts(
        manifest.chat.template,
        conversations,
        chat_format.special_token_text(model, "bos"),
        chat_format.special_token_text(model, "eos"),
    )
    for golden, text in zip(manifest.golden, texts, strict=True):
        ids = llama_runtime.tokenize(model, text)
        if text != golden.prompt or ids != list(golden.ids):
            got = repr(text[:400]) if text != golden.prompt else f"token ids {printable_line(str(ids))}"
            raise UserError(
                f"{path.name}: the prompt for {golden.messages[-1]['content'][:200]!r} is not the trained one: {got}",
                "publish it again: `make publish`",
                code="smoke.wrong_prompt",
            )


def compare_answer(model: "Llama", expected: SmokePrompt) -> dict[str, Any]:
    """Answer one smoke prompt, and compare the log-probabilities of the recorded answer with the recorded ones."""
    log_probs = llama_runtime.answer_log_probs(model, expected.ids, expected.answer_ids)
    difference = sum(abs(a - b) for a, b in zip(log_probs, expected.log_probs, strict=True)) / len(log_probs)
    should_end = expected.answer_ids[-1] in llama_runtime.end_tokens(model)
    answer_ids, end_ids = llama_runtime.generate_greedy(
        model, expected.ids, len(expected.answer_ids) + EXTRA_TOKENS * should_end
    )
    return {
        "message": expected.message,
        "answer": llama_runtime.detokenize(model, answer_ids),
        "ended": bool(end_ids),
        "should_end": should_end,
        "loops": has_loop(answer_ids) and not has_loop(expected.answer_ids),
        "tokens": len(answer_ids + end_ids),
        "difference": round(difference, 4),
        "same": answer_ids + end_ids == list(expected.answer_ids),
    }


def has_loop(ids: Sequence[int], repeats: int = 4, min_tokens: int = 16) -> bool:
    """Return whether the end is a repetition: the same tokens `repeats` times, at least `min_tokens` in total."""
    for period in range(1, len(ids) // repeats + 1):
        tail = ids[-max(period * repeats, min_tokens) :]
        if len(tail) >= min_tokens and all(a == b for a, b in zip(tail, tail[period:], strict=False)):
            return True
    return False


def find_faults(record: dict[str, Any]) -> list[str]:
    """Return what is wrong by the record. Other words in a greedy answer are no fault: rounding can decide a tie."""
    faults = []
    if record["judged"] and not record["difference"] <= record["bound"]:
        faults.append(f"log-probabilities differ by {record['difference']} per token, the limit is {record['bound']}")
    for answer in record["answers"] if record["judged"] else ():
        if answer["should_end"] and not answer["ended"]:
            faults.append(f"the answer to {printable_line(answer['message'], 60)!r} does not end")
        if answer["loops"]:
            faults.append(f"the answer to {printable_line(answer['message'], 60)!r} repeats itself")
    return faults


def measure_speed(model: "Llama", ids: Sequence[int]) -> dict[str, Any]:
    """Measure {prompt_tokens_per_second, tokens_per_second} as llama-bench does.

    The prompt is computed in one batch, the answer one token at a time, each from an empty context.
    """
    prompt = [ids[i % len(ids)] for i in range(SPEED_PROMPT)]
    llama_runtime.measure_decode_speed(
        model, prompt[:2], len(prompt)
    )  # a warm-up: the first run sets up kernels and threads
    prompt_speed = llama_runtime.measure_decode_speed(model, prompt, len(prompt))
    answer_speed = llama_runtime.measure_decode_speed(model, prompt[:SPEED_ANSWER], 1, SPEED_SECONDS)
    return {"prompt_tokens_per_second": round(prompt_speed, 1), "tokens_per_second": round(answer_speed, 1)}


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, with the mapped file."""
    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max_rss if sys.platform == "darwin" else max_rss * 1024  # macOS counts bytes, Linux KiB


def render_record(record: dict[str, Any]) -> str:
    """Return smoke.json as a table for the terminal."""
    backend = record["backend"] + (f", {record['gpu_layers']} of {record['layers']} layers" if record["layers"] else "")
    bound = f"at most {record['bound']}" + (
        "" if record["bound_measured"] else f" (not measured on {record['backend']})"
    )
    if not record["judged"]:
        bound = "not judged: the recorded answers are those of the default file"
    equal, ended = (sum(answer[key] for answer in record["answers"]) for key in ("same", "ended"))
    total = len(record["answers"])
    rows = [
        ("computes on", backend),
        ("load", f"{record['load_seconds']} s"),
        ("prompt", f"{record['prompt_tokens_per_second']} tokens/s"),
        ("answer", f"{record['tokens_per_second']} tokens/s"),
        ("memory", f"{record['memory'] / 1e9:.2f} GB at most"),
        ("difference", f"{record['difference']} nats per token, {bound}"),
        ("answers", f"{equal} of {total} word for word, {ended} ended by themselves"),
    ]
    return "\n".join(f"  {name:<12}{text}" for name, text in rows)
