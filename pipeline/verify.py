"""verify: the GGUFs themselves, in llama.cpp: same tokens, same template, same answers, or nothing is published."""

import hashlib
from typing import TYPE_CHECKING

from contract import chat, files, runtime
from contract.errors import UserError
from pipeline.config import Config, Evaluate, Generation
from pipeline.record import Run
from pipeline.score import prompt_ids, response_positions, score

if TYPE_CHECKING:
    from llama_cpp import Llama
    from transformers import PreTrainedTokenizerFast

# Synthetic conversations whose prompts both sides must agree on: never a user's rows.
GOLDEN = [
    [{"role": "user", "content": "Hello! Who are you?"}],
    [{"role": "user", "content": "  Two spaces, a\ttab,\n\na blank line and digits 1234567890.  "}],
    [{"role": "user", "content": 'Ünïcödé, 日本語, emoji 🚢 and code: `x = {"a": [1, 2]}`'}],
    [{"role": "user", "content": "Add the numbers.\n\n### Input:\n2 and 3"}],
    [
        {"role": "user", "content": "First question?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "And then?"},
    ],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Ready?"}],
]


def stage(config: Config, run: Run) -> dict:
    """Check and score f16 and every quantization; write verify/contract.json (golden and smoke prompts) and the record.

    Raises UserError when a gate does not hold.
    """
    from transformers import AutoTokenizer

    export, adapter = run.read("export"), run.read("evaluate")["scores"]["adapter"]
    rows = files.read_rows(run.output("data", "heldout"))[: config.evaluate.max_rows]
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer")
    golden = golden_prompts(tokenizer)
    scores, smoke = {}, []
    for name in export["outputs"]:
        model = runtime.load(run.output("export", name), context(config, rows), all_logits=True)
        same_format(model, name, tokenizer, golden, rows)
        # Answering takes longest, so only the file that will be used answers; the others are judged by their loss.
        rule = config.evaluate if name == export["default"] else config.evaluate.model_copy(update={"rule": "loss"})
        scores[name] = measure(model, rule, rows, name)
        if name == export["default"]:
            smoke = [
                smoke_prompt(model, message, config.data.system, config.generation)
                for message in config.generation.smoke_prompts
            ]
        model.close()
    refuse(config, scores, export["default"], adapter["loss"])
    path = run.folder / "verify" / "contract.json"
    files.write_json(
        path, {"chat": chat_format(tokenizer, golden, config.data.system, run.read("data")["chat"]["end"]), "golden": golden, "smoke": smoke}
    )  # fmt: skip
    return run.write("verify", ("data", "evaluate", "export"), {"contract": path}, scores=scores)


def context(config: Config, rows: list[dict]) -> int:
    """Tokens that the longest held-out row, or its prompt and a full answer, needs."""
    longest = max(len(row["input_ids"]) for row in rows)
    return longest + max(config.evaluate.max_new_tokens, config.generation.max_tokens) + 64


def golden_prompts(tokenizer: "PreTrainedTokenizerFast") -> list[dict]:
    """Those of GOLDEN that the template takes (some refuse a system message), rendered by transformers."""
    from jinja2 import TemplateError

    golden = []
    for messages in GOLDEN:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            continue
        golden.append({"messages": messages, "prompt": text, "ids": tokenizer.encode(text, add_special_tokens=False)})
    return golden


def chat_format(tokenizer: "PreTrainedTokenizerFast", golden: list[dict], system: str | None, ends: list[str]) -> dict:
    """The manifest's ChatFormat, as trained. ends: the tokens that end an answer."""
    bos = tokenizer.bos_token
    return {
        "template": tokenizer.chat_template,
        "sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "stop": list(dict.fromkeys([tokenizer.eos_token, *ends])),
        "bos": bos,
        "bos_in_template": bool(bos) and golden[0]["prompt"].startswith(bos),
        "system": system,
    }


def same_format(
    model: "Llama", name: str, tokenizer: "PreTrainedTokenizerFast", golden: list[dict], rows: list[dict]
) -> None:
    """The file's template, end token and token ids are the trained ones."""
    if chat.embedded(model) != tokenizer.chat_template:
        raise _different(name, "its embedded chat template is not the one that was trained")
    if model.token_eos() != tokenizer.eos_token_id:
        raise _different(name, f"its end token is {model.token_eos()}, trained was {tokenizer.eos_token_id}")
    for item in golden:
        prompt = chat.prompt(model, item["messages"])
        if prompt != item["prompt"]:
            raise _different(name, f"it renders {prompt!r}, trained was {item['prompt']!r}")
    texts = [(item["prompt"], item["ids"]) for item in golden] + [(row["prompt"], prompt_ids(row)) for row in rows]
    for text, ids in texts:
        if runtime.tokenize(model, text) != list(ids):
            raise _different(name, f"llama.cpp tokenizes {text[-60:]!r} differently")


def _different(name: str, why: str) -> UserError:
    return UserError(
        f"the {name} GGUF is not what was trained: {why}", "do not use this file; report it with the run's records"
    )


def measure(model: "Llama", rule: Evaluate, rows: list[dict], name: str) -> dict:
    """Held-out loss and task score of one file."""

    def answer(prompts) -> list[str]:
        return [runtime.text(model, runtime.greedy(model, ids, rule.max_new_tokens)[0]) for ids in prompts]

    def loss(batch) -> list[float]:
        return [-sum(runtime.token_log_probs(model, row["input_ids"], response_positions(row))) for row in batch]

    # One row at a time: the answer starts from the prompt that the loss has left in the key-value cache.
    result = score(rows, rule, answer, loss, name, batch_tokens=0)
    result.pop("answers", None)
    return result


def smoke_prompt(model: "Llama", message: str, system: str | None, generation: Generation) -> dict:
    """What this file answers to a synthetic message, with the log-probability of each token."""
    before = [{"role": "system", "content": system}] if system else []
    ids = runtime.tokenize(model, chat.prompt(model, [*before, {"role": "user", "content": message}]))
    said, ended = runtime.greedy(model, ids, generation.max_tokens)
    answer = said + ended
    return {
        "message": message,
        "ids": ids,
        "answer": runtime.text(model, said),
        "answer_ids": answer,
        "log_probs": runtime.answer_log_probs(model, ids, answer),
    }


def refuse(config: Config, scores: dict, default: str, adapter_loss: float) -> None:
    """The gates: f16 behaves like the adapter, the default artifact reaches its score."""
    if scores["f16"]["loss"] > adapter_loss * config.verify.max_loss_ratio + 0.01:
        raise UserError(
            f"the f16 GGUF has a held-out loss of {scores['f16']['loss']}, the adapter {adapter_loss}: the merge or the conversion is wrong",
            "do not use this file; report it with the run's records",
        )
    wanted = config.verify.min_score
    if wanted is not None and scores[default]["score"] < wanted:
        raise UserError(
            f"{default} answers {scores[default]['score']:.0%} of the held-out rows, verify.min_score is {wanted:.0%}",
            "train longer or on more rows (a new RUN=name), or lower verify.min_score",
        )
