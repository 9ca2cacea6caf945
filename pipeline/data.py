"""data: rows in; token ids, labels and held-out questions out. The one owner of rendering and masking."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from contract import files
from contract.errors import UserError
from pipeline import base as bases
from pipeline.config import Base, Config, Data, warnings
from pipeline.record import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # the label of a token that carries no loss (torch's and transformers' convention)
ALPACA_INPUT = "\n\n### Input:\n"  # where an Alpaca row's `input` follows its instruction in one user message

# The Stanford Alpaca prompts, with and without input, as a chat template: so the same text travels into the GGUF.
ALPACA = (
    "{{ BOS }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{% if '\n\n### Input:\n' in message['content'] %}"
    "{{ 'Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n' }}{% else %}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n' }}{% endif %}{{ message['content'] + '\n\n### Response:\n' }}"
    "{% else %}{{ message['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
)


def stage(config: Config, run: Run) -> dict:
    """Freeze the config, write data/{train,heldout}.jsonl, data/tokenizer/ and the record."""
    run.freeze(config)
    source = bases.fetch(config.base.model, config.base.revision)
    if source.is_dir():
        bases.refuse_unknown(bases.architecture(source), config.base.model)
    tokenizer = load_tokenizer(bases.tokenizer(source), config.data)
    train, heldout, inputs = read(config.data)
    rows, dropped = tokenized(train, tokenizer, config.base.max_seq_length)
    held, held_dropped = tokenized(heldout, tokenizer, config.base.max_seq_length)
    if not rows or not held:
        raise UserError(
            f"{len(rows)} training and {len(held)} held-out rows are left of {len(train)} and {len(heldout)}",
            "raise base.max_seq_length, or correct data.source",
        )
    outputs = write(run.folder / "data", rows, held, tokenizer)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    facts = {
        "base": describe_base(config.base, source),
        "rows": {"train": len(rows), "heldout": len(held), "dropped_too_long": dropped + held_dropped},
        "tokens": {"train": sum(lengths), "median": lengths[len(lengths) // 2], "max": lengths[-1]},
        "max_seq_length": config.base.max_seq_length,
        "warnings": warnings(config, len(rows), lengths[-1]),
    }
    return run.write("data", (), outputs, inputs=inputs, **facts)


def describe_base(base: Base, source: Path) -> dict:
    """What the manifest says of the base model."""
    if source.is_file():
        meta = bases.metadata(source)
        return {
            "model": base.model, "revision": bases.digest(source), "architecture": meta["general.architecture"],
            "license": meta.get("general.license") or base.license, "name": meta.get("general.basename") or source.stem, "path": str(source),
        }  # fmt: skip
    revision = source.name if "snapshots" in source.parts else None
    return {
        "model": base.model, "revision": revision or base.revision, "architecture": bases.architecture(source),
        "license": base.license, "name": base.model.rstrip("/").split("/")[-1], "path": str(source),
    }  # fmt: skip


def load_tokenizer(folder: Path, data: Data) -> "PreTrainedTokenizerFast":
    """The base's tokenizer with the chat template that will be trained, and a pad token of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if data.template == "alpaca":
        adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("").input_ids
        tokenizer.chat_template = ALPACA.replace("{{ BOS }}", "{{ bos_token }}" if adds_bos else "")
    if not tokenizer.chat_template:
        raise UserError(
            "the base model's tokenizer has no chat template", "set data.template to a named one, such as alpaca"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # Padding with EOS would mask EOS out of the loss: the model would never learn to stop.
        spare = next((t for t in (tokenizer.unk_token, tokenizer.bos_token) if t and t != tokenizer.eos_token), None)
        if spare is None:
            raise UserError(
                "the tokenizer pads with its end token and has no spare one",
                "choose a base model with a pad token of its own",
            )
        tokenizer.pad_token = spare
    return tokenizer


def read(data: Data) -> tuple[list[list[dict]], list[list[dict]], dict[str, str]]:
    """Training and held-out conversations, and the sha256 of every local file they came from."""
    rows, inputs = _conversations(data.source, data)
    if data.validation:
        heldout, more = _conversations(data.validation, data)
        return rows, heldout, inputs | more
    held = [row for row in rows if _share(row) < data.validation_share]
    return [row for row in rows if _share(row) >= data.validation_share], held, inputs


def _share(row: list[dict]) -> float:
    """A number in [0, 1) from the row's content alone, so that adding rows never moves an old one across the split."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _conversations(source: str, data: Data) -> tuple[list[list[dict]], dict[str, str]]:
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise UserError(f"data file {source} is missing", "correct data.source, or put the file there")
        raw, inputs = list(_lines(path)), {source: files.sha256(path)}
    else:
        raw, inputs = [(f"{source} row {i}", row) for i, row in enumerate(_from_hub(source, data))], {}
    return [_messages(row, data, where) for where, row in raw], inputs


def _lines(path: Path):
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            yield from ((f"{path} row {i}", row) for i, row in enumerate(json.loads(text)))
            return
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"{path} is no UTF-8 JSON: {error}", "write one JSON object a line (.jsonl) or one array (.json)"
        ) from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: no JSON: {error}", f"correct line {number} of {path}") from error


def _from_hub(source: str, data: Data):
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return load_dataset(source, revision=data.revision, split=data.split)
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"the data set {source} cannot be loaded: {error}",
            "check its name, the network and HF_TOKEN; a local file ends in .jsonl or .json",
        ) from error


def _messages(row: dict, data: Data, where: str) -> list[dict]:
    """One row of any known format as [{role, content}, ...]. Raises UserError naming the row."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, this is {type(row).__name__}", "correct the row")
    kind = data.format if data.format != "auto" else next((k for k, key in _KEYS.items() if key in row), "unknown")
    try:
        messages = _READERS[kind](row)
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{where}: no {kind} row; its keys are {', '.join(map(str, row))}",
            "set data.format, or use the keys: messages | conversations | instruction, output",
        ) from None
    for message in messages:
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise UserError(f"{where}: empty or non-text content of the {message['role']}", "correct or remove the row")
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the conversation does not end with the assistant", "correct or remove the row")
    # White space around an answer would merge with the prompt's last token, and a model must not learn it.
    messages = [m | {"content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages]
    if data.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system}, *messages]
    return messages


def _alpaca(row: dict) -> list[dict]:
    user = row["instruction"] + (ALPACA_INPUT + row["input"] if row.get("input") else "")
    return [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_KEYS = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction"}
_READERS = {
    "messages": lambda row: [{"role": _ROLES[m["role"]], "content": m["content"]} for m in row["messages"]],
    "sharegpt": lambda row: [{"role": _ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]],
    "alpaca": _alpaca,
    "unknown": lambda row: row["messages"],
}


def tokenized(
    conversations: list[list[dict]], tokenizer: "PreTrainedTokenizerFast", limit: int
) -> tuple[list[dict], int]:
    """Rows {input_ids, labels, prompt, prompt_tokens, answer} no longer than `limit` tokens, and how many were longer and dropped."""
    rows = []
    with files.bar(len(conversations), "render and mask", len(conversations) > 5000, "rows") as tick:
        for conversation in conversations:
            rows.append(mask(conversation, tokenizer))
            tick(1)
    kept = [row for row in rows if len(row["input_ids"]) <= limit]
    return kept, len(rows) - len(kept)


def mask(messages: list[dict], tokenizer: "PreTrainedTokenizerFast") -> dict:
    """One conversation as token ids, with labels on the assistant's words and their end token only.

    Returns input_ids and labels (same length; IGNORED where no loss is), and, of the last turn, prompt
    (rendered text), prompt_tokens (how many of input_ids it is) and answer (reference text). Raises UserError
    when the template or the tokenizer does not keep prompt and answer apart.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            start, end = _answer_span(text, prompt, message["content"], tokenizer.eos_token)
            first, last = _token_span(offsets, start, end, message["content"])
            labels[first:last] = ids[first:last]
    return {"input_ids": ids, "labels": labels, "prompt": prompt, "prompt_tokens": first, "answer": message["content"]}


def _answer_span(text: str, prompt: str, answer: str, end_token: str) -> tuple[int, int]:
    """Characters of `text` that hold one answer and its end token; only white space may stand between."""
    start = len(prompt)
    at = text.find(answer, start)
    stop = text.find(end_token, at + len(answer))
    between = text[start:at] + text[at + len(answer) : stop]
    if not text.startswith(prompt) or at < 0 or stop < 0 or between.strip():
        raise UserError(
            f"the chat template does not render the answer {answer[:40]!r} behind its own generation prompt and before {end_token!r}",
            "choose data.template: alpaca, or a base model whose template ends every answer with its end token",
        )
    return start, stop + len(end_token)


def _token_span(offsets: list[tuple[int, int]], start: int, end: int, answer: str) -> tuple[int, int]:
    """The tokens that are exactly the characters from start to end. offsets: (first, last + 1) of every token."""
    first = next((i for i, (a, _) in enumerate(offsets) if a >= start), len(offsets))
    last = next((i for i, (_, b) in enumerate(offsets) if b >= end), len(offsets) - 1) + 1
    if first >= last or offsets[first][0] != start or offsets[last - 1][1] != end:
        raise UserError(
            f"a token reaches across the border between the prompt and the answer {answer[:40]!r}",
            "correct or remove the row",
        )
    return first, last


def write(folder: Path, rows: list[dict], held: list[dict], tokenizer: "PreTrainedTokenizerFast") -> dict[str, Path]:
    files.write_rows(folder / "train.jsonl", [{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    files.write_rows(folder / "heldout.jsonl", held)
    with files.writing(folder / "tokenizer") as part:
        tokenizer.save_pretrained(part)
    return {
        "train": folder / "train.jsonl",
        "heldout": folder / "heldout.jsonl",
        **{f"tokenizer/{item.name}": item for item in sorted((folder / "tokenizer").iterdir())},
    }
