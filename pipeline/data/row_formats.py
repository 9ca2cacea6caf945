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
from pipeline.data.drop_reasons import UnusableRow
from pipeline.data.file_formats import DuplicateKeys, mark_duplicate_keys

DETECTION_ROWS = 200  # rows from which the format is detected

# Other names of these fields in popular data sets.
FIELD_ALIASES = {
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
TOOL_ROLES = {
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
class RowSchema:
    """The format of a data set's rows.

    Attributes:
        format: A key of FORMAT_FIELDS.
        columns: Ferry's name of each field -> its column in the data set.
        evidence: A sentence that says why this is the format.
    """

    format: str
    columns: dict[str, str]
    evidence: str


def detect_format(first_rows: list[dict], data: Data, source: str) -> RowSchema:
    """Return the format that most of the first rows have.

    Args:
        first_rows: The first rows, at most DETECTION_ROWS of them.
        data: The section of the config, which may set the format and its columns.
        source: The name of the file or split, for messages.

    Raises:
        UserError: No row has a known format, or a column that the config names is in no row.
    """
    _refuse_missing_columns(first_rows, data, source)
    matches = ((name, *_match_columns(first_rows, name, data.columns)) for name in _list_candidate_formats(data))
    best_format, columns, count = max(matches, key=lambda match: match[2])
    keys = Counter(key for row in first_rows for key in row)
    if not count:
        is_auto = data.format == "auto"
        fault = "the format of the rows is unknown" if is_auto else f"the rows do not have the format {data.format}"
        raise UserError(
            f"{source}: {fault}: the first {len(first_rows)} rows have the keys {', '.join(map(str, keys)) or 'none'}",
            "set data.format and data.columns, such as {question: THEIR_NAME, answer: THEIR_NAME}; known: "
            + "; ".join(f"{name} ({', '.join(fields)})" for name, fields in FORMAT_FIELDS.items()),
            code="data.unknown_format" if is_auto else "data.wrong_format",
        )
    column_names = ", ".join(column if column == field else f"{column} as {field}" for field, column in columns.items())
    unused_columns = [str(key) for key in keys if key not in columns.values()]
    evidence = f"{count} of the first {len(first_rows)} rows have {column_names}"
    evidence = evidence if data.format == "auto" else "set in the config"
    unused_note = f"; not used: {', '.join(unused_columns[:8])}" if unused_columns else ""
    return RowSchema(best_format, columns, evidence + unused_note)


def _refuse_missing_columns(first_rows: list[dict], data: Data, source: str) -> None:
    """Raise UserError when a column that the config names is in no row."""
    missing = [name for name in data.columns.values() if not any(name in row for row in first_rows)]
    if missing:
        raise UserError(
            f"{source}: data.columns names {', '.join(missing)}, which none of the first {len(first_rows)} rows has; "
            f"they have {', '.join(map(str, first_rows[0])) or 'nothing'}",
            "correct data.columns: Ferry's name first, then the name in the data set",
            code="data.missing_column",
        )


def _list_candidate_formats(data: Data) -> list[str]:
    """Return the formats that the rows may have: the one that is set, or those whose columns are, or all of them."""
    if data.format != "auto":
        return [data.format]
    configured = [name for name, fields in FORMAT_FIELDS.items() if set(fields) <= data.columns.keys()]
    return configured or list(FORMAT_FIELDS)


def _match_columns(
    first_rows: list[dict], format_name: str, configured_columns: dict[str, str]
) -> tuple[dict[str, str], int]:
    """Find the columns that hold a format's fields.

    Returns:
        The column of each field, and the number of rows that have the columns of all required fields.
    """
    fits_field = _TURNS_CHECK.get(format_name, lambda value: True)
    columns = {}
    for field in (
        *FORMAT_FIELDS[format_name],
        *(field for field in OPTIONAL_FIELDS if _has_optional_field(format_name, field)),
    ):
        names = [configured_columns[field]] if field in configured_columns else [field, *FIELD_ALIASES.get(field, ())]
        counts = {
            column: sum(column in row and (field in OPTIONAL_FIELDS or fits_field(row[column])) for row in first_rows)
            for column in names
        }
        best_column = max(names, key=lambda name: counts[name])
        if counts[best_column]:
            columns[field] = best_column
    required_columns = [columns.get(field) for field in FORMAT_FIELDS[format_name]]
    return columns, sum(
        all(key in row and fits_field(row[key]) for key in required_columns) for row in first_rows
    ) if all(required_columns) else 0


def _has_optional_field(format_name: str, field: str) -> bool:
    """Return whether a format has this optional field."""
    return field == "system" or (format_name, field) in {("alpaca", "input"), ("question-answer", "context")}


def _create_turns_check(role_key: str, content_key: str) -> Callable[[object], bool]:
    """Return a predicate that tells whether a value is a list of turns with the key `role_key`."""

    def is_turn_list(value: object) -> bool:
        turns = _parse_json_list(value)
        return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and role_key in turns[0]

    return is_turn_list


_TURNS_CHECK = {"messages": _create_turns_check("role", "content"), "sharegpt": _create_turns_check("from", "value")}


def _parse_json_list(value: object) -> object:
    """Return a list of turns that is JSON text, as in CSV and some Parquet files, as a list; other values unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value, object_pairs_hook=mark_duplicate_keys)
        except (ValueError, RecursionError):
            return value
    return value


# Fields that other trainers use and this one does not: rows are trained on without them.
UNUSED_IN_ROW = ("tools", "functions", "reasoning_content", "reasoning", "thinking", "weight")
UNUSED_IN_TURN = (*UNUSED_IN_ROW, "tool_calls", "function_call", "tool_call_id")


def find_unused_fields(row: object, schema: RowSchema) -> set[str]:
    """Return the names of the row's fields that hold something but are not used for training."""
    if not isinstance(row, dict):
        return set()
    names = {name for name in UNUSED_IN_ROW if _is_filled(row, name) and name not in schema.columns.values()}
    for field in ("messages", "conversations", "prompt", "completion"):
        turns = _parse_json_list(row.get(schema.columns.get(field, field)))
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                names |= {name for name in UNUSED_IN_TURN if _is_filled(turn, name)}
    return names


def _is_filled(fields: dict, name: str) -> bool:
    """Return whether a field is there and holds something."""
    return fields.get(name) not in (None, "", [], {})


def build_conversation(row: object, schema: RowSchema) -> list[dict[str, str]]:
    """Return a row as [{role, content}, ...].

    Raises:
        UnusableRow: The row does not have the format, or one of its values is not text.
    """
    if not isinstance(row, dict):
        raise UnusableRow("wrong_format", f"a row must be a JSON object, not {type(row).__name__}")
    if None in row:
        raise UnusableRow("columns", f"{len(row[None])} columns too many")
    missing = [schema.columns[field] for field in FORMAT_FIELDS[schema.format] if schema.columns[field] not in row]
    if missing:
        raise UnusableRow("wrong_format", f"no {', '.join(missing)}; the keys are {', '.join(map(str, row)) or 'none'}")
    values = {field: row.get(column) for field, column in schema.columns.items()}
    messages = _READER_BY_FORMAT[schema.format](values)
    system = values.get("system")
    if system not in (None, "") and messages[0]["role"] != "system":
        messages = [_build_message("system", system), *messages]
    return messages


def _build_message(role: str, content: object) -> dict[str, str]:
    """Return a message. Raise UnusableRow when its content is no text."""
    return {"role": role, "content": _read_text(content, role)}


def _read_text(content: object, label: str) -> str:
    """Return the text of one turn; the parts of OpenAI's lists of text parts are joined.

    Raises:
        UnusableRow: The content is no text.
    """
    if (
        isinstance(content, list)
        and content
        and all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    ):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None if None in parts else parts
    if not isinstance(content, str):
        kind = "null" if content is None else type(content).__name__
        if content is None or content == []:
            raise UnusableRow("empty", f"{label} is {kind}")
        raise UnusableRow("not_text", f"{label} is {kind}")
    return content


def _read_turns(turns: object, role_key: str, content_key: str) -> list[dict[str, str]]:
    """Return a list of turns as messages. Raise UnusableRow when it is no such list."""
    turns = _parse_json_list(turns)
    if not isinstance(turns, list):
        raise UnusableRow("not_text", f"the conversation is {type(turns).__name__}, not a list of turns")
    if not turns:
        raise UnusableRow("empty", "the conversation has no turns")
    return [_read_turn(turn, role_key, content_key) for turn in turns]


def _read_turn(turn: object, role_key: str, content_key: str) -> dict[str, str]:
    """Return one turn as a message. Raise UnusableRow for unknown roles and for tool calls."""
    if not isinstance(turn, dict) or role_key not in turn:
        raise UnusableRow("wrong_format", f"a turn without {role_key!r}: {str(turn)[:60]}")
    if isinstance(turn, DuplicateKeys):
        raise UnusableRow("duplicate_keys", f"a turn repeats one of its keys {', '.join(map(str, turn))}")
    role = turn[role_key] if isinstance(turn[role_key], str) else repr(turn[role_key])[:60]
    if role in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise UnusableRow("tool_call", f"a turn with the role {role!r} is a tool call or its result")
    if role not in ROLES:
        raise UnusableRow("unknown_role", f"the role {role!r}")
    return _build_message(ROLES[role], turn.get(content_key))


def _build_exchange(question: object, answer: object) -> list[dict[str, str]]:
    return [_build_message("user", question), _build_message("assistant", answer)]


def _read_alpaca(row: dict) -> list[dict[str, str]]:
    """Return the messages of an instruction and its output; an input is appended to the instruction."""
    question, extra_input = _read_text(row["instruction"], "instruction"), row.get("input")
    if extra_input is not None and _read_text(extra_input, "input").strip():
        question += ALPACA_INPUT + extra_input
    return _build_exchange(question, row["output"])


def _read_question_answer(row: dict) -> list[dict[str, str]]:
    """Return the messages of a question and its answer; a context is put before the question."""
    context = row.get("context")
    context_text = _read_text(context, "context") + "\n\n" if context not in (None, "") else ""
    return _build_exchange(context_text + _read_text(row["question"], "question"), row["answer"])


def _read_prompt_completion(row: dict) -> list[dict[str, str]]:
    """Return the messages of a prompt and completion, which are texts, or lists of messages as in TRL."""
    if _TURNS_CHECK["messages"](row["prompt"]):
        return _read_turns(row["prompt"], "role", "content") + _read_turns(row["completion"], "role", "content")
    return _build_exchange(row["prompt"], row["completion"])


_READER_BY_FORMAT: dict[str, Callable[[dict], list[dict[str, str]]]] = {
    "messages": lambda row: _read_turns(row["messages"], "role", "content"),
    "sharegpt": lambda row: _read_turns(row["conversations"], "from", "value"),
    "alpaca": _read_alpaca,
    "prompt-completion": _read_prompt_completion,
    "question-answer": _read_question_answer,
    "text": lambda row: [_build_message("assistant", row["text"])],
}
