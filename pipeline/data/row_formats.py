"""Detect the format of a data set's rows from their keys, and convert rows to messages.

The detected format is reported with its evidence, and the config can override it.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import UserError
from contract.chat_format import ALPACA_INPUT
from pipeline.config.references import FORMAT_FIELDS, OPTIONAL_FIELDS
from pipeline.config.schema import Data
from pipeline.data.drop_reasons import Unfit
from pipeline.data.file_formats import DuplicateKeys, distinct

HEAD = 200  # rows from which the format is detected

# Other names of these fields in popular data sets.
ALIASES = {
    "messages": ("conversation", "conversations"),
    "conversations": ("conversation",),
    "output": ("response",),
    "input": ("context",),
    "completion": ("response",),
    "system": ("system_prompt",),
}
# The role of a turn, by the names that data sets give it.
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant",
}  # fmt: skip
# Roles of turns with tool calls or their results, which are not supported.
TOOLS = {
    "tool",
    "function",
    "function_call",
    "function-call",
    "function_response",
    "observation",
    "tool_call",
    "tool_response",
    "ipython",
}


@dataclass(frozen=True)
class Schema:
    """The format of a data set's rows.

    Attributes:
        format: A key of FORMAT_FIELDS.
        columns: Ferry's name of each field -> its column in the data set.
        evidence: A sentence that says why this is the format.
    """

    format: str
    columns: dict[str, str]
    evidence: str


def detect(head: list[dict], data: Data, source: str) -> Schema:
    """Return the format that most of the first rows have.

    Args:
        first_rows: The first rows, at most DETECTION_ROWS of them.
        data: The section of the config, which may set the format and its columns.
        source: The name of the file or split, for messages.

    Raises:
        UserError: No row has a known format, or a column that the config names is in no row.
    """
    gone = [name for name in data.columns.values() if not any(name in row for row in head)]
    if gone:
        raise UserError(
            f"{source}: data.columns names {', '.join(gone)}, "
            f"which none of the first {len(head)} rows has; "
            f"they have {', '.join(map(str, head[0])) or 'nothing'}",
            "correct data.columns: our name first, then the data set's",
        )
    formats = [data.format] if data.format != "auto" else list(FORMAT_FIELDS)
    if data.format == "auto" and data.columns:
        formats = [name for name, fields in FORMAT_FIELDS.items() if set(fields) <= data.columns.keys()] or formats
    best, columns, count = max(
        ((name, *_columns(head, name, data.columns)) for name in formats), key=lambda item: item[2]
    )
    keys = Counter(key for row in head for key in row)
    if not count:
        raise UserError(
            f"{source}: no {'known' if data.format == 'auto' else data.format} format: "
            f"the first {len(head)} rows have the keys {', '.join(map(str, keys)) or 'none'}",
            "set data.format and data.columns, such as {question: THEIR_NAME, answer: THEIR_NAME}; known: "
            + "; ".join(f"{name} ({', '.join(fields)})" for name, fields in FORMAT_FIELDS.items()),
        )
    said = ", ".join(column if column == field else f"{column} as {field}" for field, column in columns.items())
    others = [str(key) for key in keys if key not in columns.values()]
    why = "set in the config" if data.format != "auto" else f"{count} of the first {len(head)} rows have {said}"
    return Schema(best, columns, why + (f"; not used: {', '.join(others[:8])}" if others else ""))


def _columns(head: list[dict], name: str, given: dict[str, str]) -> tuple[dict[str, str], int]:
    """Find the columns that hold a format's fields.

    Returns:
        The column of each field, and the number of rows that have the columns of all required fields.
    """
    fits = _TURNS.get(name, lambda value: True)
    columns = {}
    for field in (*FORMAT_FIELDS[name], *(field for field in OPTIONAL_FIELDS if _takes(name, field))):
        names = [given[field]] if field in given else [field, *ALIASES.get(field, ())]
        seen = {n: sum(n in row and (field in OPTIONAL_FIELDS or fits(row[n])) for row in head) for n in names}
        found = max(names, key=seen.get)
        if seen[found]:
            columns[field] = found
    needed = [columns.get(field) for field in FORMAT_FIELDS[name]]
    return columns, sum(all(key in row and fits(row[key]) for key in needed) for row in head) if all(needed) else 0


def _takes(name: str, field: str) -> bool:
    """Return whether a format has this optional field."""
    return field == "system" or (name, field) in {("alpaca", "input"), ("question-answer", "context")}


def _turns(role: str, content: str) -> Callable[[object], bool]:
    """Return a predicate that tells whether a value is a list of turns with the key `role_key`."""

    def fits(value: object) -> bool:
        turns = _listed(value)
        return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and role in turns[0]

    return fits


_TURNS = {"messages": _turns("role", "content"), "sharegpt": _turns("from", "value")}


def _listed(value: object) -> object:
    """Return a list of turns that is JSON text, as in CSV and some Parquet files, as a list; other values unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value, object_pairs_hook=distinct)
        except (ValueError, RecursionError):
            return value
    return value


# Fields that other trainers use and this one does not: rows are trained on without them.
UNUSED_IN_ROW = ("tools", "functions", "reasoning_content", "reasoning", "thinking", "weight")
UNUSED_IN_TURN = (*UNUSED_IN_ROW, "tool_calls", "function_call", "tool_call_id")


def unused_fields(row: object, schema: Schema) -> set[str]:
    """Return the names of the row's fields that hold something but are not used for training."""
    if not isinstance(row, dict):
        return set()
    found = {
        name
        for name in UNUSED_IN_ROW
        if row.get(name) not in (None, "", [], {}) and name not in schema.columns.values()
    }
    for field in ("messages", "conversations", "prompt", "completion"):
        turns = _listed(row.get(schema.columns.get(field, field)))
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                found |= {name for name in UNUSED_IN_TURN if turn.get(name) not in (None, "", [], {})}
    return found


def conversation(row: dict, schema: Schema) -> list[dict]:
    """Return a row as [{role, content}, ...].

    Raises:
        UnusableRow: The row does not have the format, or one of its values is not text.
    """
    if not isinstance(row, dict):
        raise Unfit("wrong_format", f"a row must be a JSON object, this is {type(row).__name__}")
    if None in row:
        raise Unfit("columns", f"{len(row[None])} columns too many")
    missing = [schema.columns[field] for field in FORMAT_FIELDS[schema.format] if schema.columns[field] not in row]
    if missing:
        raise Unfit("wrong_format", f"no {', '.join(missing)}; its keys are {', '.join(map(str, row)) or 'none'}")
    values = {field: row.get(column) for field, column in schema.columns.items()}
    messages = _READERS[schema.format](values)
    system = values.get("system")
    if system not in (None, "") and messages[0]["role"] != "system":
        messages = [_said("system", system), *messages]
    return messages


def _said(role: str, content: object) -> dict:
    """Return a message. Raises UnusableRow when its content is no text."""
    return {"role": role, "content": _text(content, role)}


def _text(content: object, what: str) -> str:
    """Return the text of one turn; the parts of OpenAI's lists of text parts are joined.

    Raises:
        UnusableRow: The content is no text.
    """
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None if None in parts else parts
    if not isinstance(content, str):
        kind = "null" if content is None else type(content).__name__
        if content is None or content == []:
            raise Unfit("empty", f"{what} is {kind}")
        raise Unfit("not_text", f"{what} is {kind}")
    return content


def _read_turns(turns: object, role_key: str, content_key: str) -> list[dict]:
    """Return a list of turns as messages. Raises UnusableRow when it is no such list."""
    turns = _listed(turns)
    if not isinstance(turns, list):
        raise Unfit("not_text", f"the conversation is {type(turns).__name__}, not a list of turns")
    if not turns:
        raise Unfit("empty", "the conversation has no turn")
    return [_turn(turn, role_key, content_key) for turn in turns]


def _turn(turn: object, role_key: str, content_key: str) -> dict:
    """Return one turn as a message. Raises UnusableRow for unknown roles and for tool calls."""
    if not isinstance(turn, dict) or role_key not in turn:
        raise Unfit("wrong_format", f"a turn without {role_key!r}: {str(turn)[:60]}")
    if isinstance(turn, DuplicateKeys):
        raise Unfit("duplicate_keys", f"a turn's keys are {', '.join(map(str, turn))}, and one stands there twice")
    role = turn[role_key] if isinstance(turn[role_key], str) else repr(turn[role_key])[:60]
    if role in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise Unfit("tool_call", f"a turn of the role {role!r} with a tool call or its result")
    if role not in ROLES:
        raise Unfit("unknown_role", f"the role {role!r}")
    return _said(ROLES[role], turn.get(content_key))


def _pair(question: object, answer: object) -> list[dict]:
    return [_said("user", question), _said("assistant", answer)]


def _alpaca(row: dict) -> list[dict]:
    """Return the messages of an instruction and its output; an input is appended to the instruction."""
    question, more = _text(row["instruction"], "instruction"), row.get("input")
    if more is not None and _text(more, "input").strip():
        question += ALPACA_INPUT + more
    return _pair(question, row["output"])


def _question_answer(row: dict) -> list[dict]:
    """Return the messages of a question and its answer; a context is put before the question."""
    context = row.get("context")
    before = _text(context, "context") + "\n\n" if context not in (None, "") else ""
    return _pair(before + _text(row["question"], "question"), row["answer"])


def _prompt_completion(row: dict) -> list[dict]:
    """Return the messages of a prompt and completion, which are texts, or lists of messages as in TRL."""
    if _TURNS["messages"](row["prompt"]):
        return _read_turns(row["prompt"], "role", "content") + _read_turns(row["completion"], "role", "content")
    return _pair(row["prompt"], row["completion"])


_READERS: dict[str, Callable[[dict], list[dict]]] = {
    "messages": lambda row: _read_turns(row["messages"], "role", "content"),
    "sharegpt": lambda row: _read_turns(row["conversations"], "from", "value"),
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "question-answer": _question_answer,
    "text": lambda row: [_said("assistant", row["text"])],
}
