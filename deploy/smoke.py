"""smoke: the pulled file answers here as it did where it was made, or nothing is installed."""

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

from contract import chat, files, runtime
from contract.errors import UserError
from contract.manifest import Manifest, Smoke
from deploy import sandbox
from deploy.store import pulled

if TYPE_CHECKING:
    from llama_cpp import Llama

# Mean absolute difference of log-probability per answer token, nats. Another backend, thread count or batch size
# rounds differently: 0 on the machine that made the file; a damaged or wrong file is far above 1.
MAX_DIFFERENCE = 0.15


def stage(folder: Path) -> dict:
    """Load the pulled file, compare prompts and answers with the manifest, write smoke.json.

    Raises UserError when anything differs.
    """
    made, path = pulled(folder)
    artifact = made.artifact(path.name)
    if not made.smoke:
        raise UserError(
            f"the manifest of {path.name} holds no answers to compare with", "publish it again: `make publish`"
        )
    started = time.perf_counter()
    model = runtime.load(path, max(1024, *(len(s.ids) + len(s.answer_ids) + 64 for s in made.smoke)))
    load_seconds = time.perf_counter() - started
    same_prompts(model, made, path)
    if max(max((*s.ids, *s.answer_ids)) for s in made.smoke) >= model.n_vocab():
        raise UserError(f"the manifest of {path.name} names tokens that it does not have", "do not use this repo")
    answers = [compare(model, expected) for expected in made.smoke]
    tokens, seconds = (sum(answer[key] for answer in answers) for key in ("tokens", "seconds"))
    record = {
        "stage": "smoke", "file": path.name, "sha256": artifact.sha256, "machine": f"{platform.system()} {platform.machine()}",
        "load_seconds": round(load_seconds, 2), "tokens_per_second": round(tokens / seconds, 1), "answers": answers,
        "difference": round(max(answer["difference"] for answer in answers), 4), "bound": MAX_DIFFERENCE,
        "judged": artifact.default,  # the recorded answers are the default file's
    }  # fmt: skip
    model.close()
    if artifact.default and not record["difference"] <= MAX_DIFFERENCE:
        raise UserError(
            f"{path.name} does not answer as it did where it was made: log-probabilities differ by {record['difference']} per token, at most {MAX_DIFFERENCE}",
            "pull it again; if it stays, the runtime here computes wrongly: report it",
        )
    files.write_json(folder / "smoke.json", record)
    return record


def same_prompts(model: "Llama", made: Manifest, path: Path) -> None:
    """The golden prompts, rendered with the file's own template and tokenized here, are the manifest's."""
    if chat.embedded(model) != made.chat.template:
        raise UserError(
            f"{path.name} holds another chat template than its manifest", "publish it again: `make publish`"
        )
    asked = [(golden.messages, golden.add_generation_prompt) for golden in made.golden]
    texts = sandbox.prompts(made.chat.template, asked, chat.special(model, "bos"), chat.special(model, "eos"))
    for golden, text in zip(made.golden, texts, strict=True):
        if text != golden.prompt or runtime.tokenize(model, text) != list(golden.ids):
            raise UserError(
                f"{path.name}: the prompt for {golden.messages[-1]['content'][:200]!r} is not the trained one: {text[:400]!r}",
                "publish it again: `make publish`",
            )


def compare(model: "Llama", expected: Smoke) -> dict:
    """One smoke prompt: a real answer given here, and how far the expected answer's log-probabilities are off."""
    here = runtime.answer_log_probs(model, expected.ids, expected.answer_ids)
    difference = sum(abs(a - b) for a, b in zip(here, expected.log_probs, strict=True)) / len(here)
    model.reset()
    started = time.perf_counter()
    said, ended = runtime.greedy(model, expected.ids, max(len(expected.answer_ids), 1))
    return {
        "message": expected.message, "answer": runtime.text(model, said), "ended": bool(ended), "tokens": len(said + ended),
        "seconds": round(time.perf_counter() - started, 3), "difference": round(difference, 4),
    }  # fmt: skip
