"""The rules of evaluate.rule: each one judges an answer with a number from 0 (wrong) to 1 (right)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import files
from common.errors import UserError
from contract.answer_rules import RULES_BY_NAME, Judge
from pipeline.config.schema import Evaluate

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator

MATCH_TIMEOUT = 2  # for one pattern on one answer; a sensible pattern takes microseconds


def create_judge(evaluate_config: Evaluate) -> Judge | None:
    """Return the judge of evaluate.rule; None for `loss`, where free text is judged by its held-out loss only."""
    if evaluate_config.rule == "regex" and evaluate_config.pattern:
        return create_regex_judge(evaluate_config.pattern)
    if evaluate_config.rule == "json_schema" and evaluate_config.json_schema:
        return create_schema_judge(Path(evaluate_config.json_schema))
    return RULES_BY_NAME.get(evaluate_config.rule)


def create_regex_judge(pattern: str) -> Judge:
    """Return a judge that gives 1 when the pattern occurs in the answer."""
    return lambda answer, reference: float(has_match(pattern, answer, "evaluate.pattern"))


def has_match(pattern: str, text: str, setting: str) -> bool:
    """Return whether the pattern occurs in the text.

    Raises:
        UserError: The search takes longer than any sensible pattern does, or the pattern is not a regular expression.
    """
    import regex as library  # the same as Python's own module, with a timeout

    try:
        return library.search(pattern, text, library.DOTALL, timeout=MATCH_TIMEOUT) is not None
    except TimeoutError:
        raise UserError(
            f"{setting}: {pattern[:60]!r} takes more than {MATCH_TIMEOUT} s on an answer of {len(text):,} characters",
            "write a pattern without nested repetitions such as (a+)+, then run the same command again",
            code="evaluate.pattern_timeout",
        ) from None
    except library.error as error:
        raise UserError(
            f"{setting}: {pattern[:60]!r} is not a regular expression: {error}",
            f"correct the pattern in {setting}",
            code="evaluate.bad_pattern",
        ) from error


def create_schema_judge(path: Path) -> Judge:
    """Return a judge that gives 1 when the answer is JSON and fits the schema in the file.

    Raises:
        UserError: The file cannot be read, or holds no schema that can be used.
    """
    from jsonschema.exceptions import UnknownType
    from referencing.exceptions import Unresolvable

    is_valid = compile_schema(path)

    def judge_answer(answer: str, reference: str) -> float:
        try:
            return float(is_valid(json.loads(answer)))
        except (Unresolvable, UnknownType) as error:
            raise translate_schema_error(path, error) from error
        except (ValueError, ArithmeticError, RecursionError):
            return 0.0

    return judge_answer


def compile_schema(path: Path) -> Callable[[object], bool]:
    """Return a function that tells whether a value fits the schema in the file. Raise UserError for a bad schema."""
    from jsonschema.exceptions import SchemaError, UnknownType
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable

    schema = read_schema(path)
    try:
        draft = schema.get("$schema", "") if isinstance(schema, dict) else ""
        if not isinstance(schema, dict | bool) or not isinstance(draft, str):
            raise SchemaError("it is not a JSON schema")
        validator_class = validator_for(schema)
        validator_class.check_schema(schema)
        # the validator's own registry would fetch a $ref from anywhere
        is_valid = add_pattern_timeout(validator_class)(schema, registry=REGISTRY).is_valid
        is_valid({})  # some faults of a schema show only when a value is judged
    except (ValueError, ArithmeticError, RecursionError, SchemaError, Unresolvable, UnknownType) as error:
        raise translate_schema_error(path, error) from error
    return is_valid


def read_schema(path: Path) -> object:
    """Return the JSON value in the file of evaluate.json_schema. Raise UserError when it is not JSON."""
    text = _read_schema_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise schema_error(path, error, "evaluate.schema_not_json") from error


def _read_schema_text(path: Path) -> str:
    """Return the text of the file. Raise UserError when it cannot be read."""
    try:
        files.refuse_special_file(path)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise schema_error(path, getattr(error, "strerror", None) or error, "evaluate.unreadable_schema") from error


def translate_schema_error(path: Path, error: Exception) -> UserError:
    """Return an error of the schema's own, not of an answer, as a UserError."""
    from jsonschema.exceptions import UnknownType
    from referencing.exceptions import Unresolvable

    if isinstance(error, Unresolvable):
        return schema_error(path, f"a $ref cannot be resolved: {error}", "evaluate.unresolved_ref")
    if isinstance(error, UnknownType):
        return schema_error(path, f"{error.type!r} is not a JSON type", "evaluate.unknown_schema_type")
    return schema_error(path, getattr(error, "message", None) or error, "evaluate.bad_schema")


def schema_error(path: Path, reason: object, code: str) -> UserError:
    """Return the error that the file of evaluate.json_schema cannot be used."""
    return UserError(
        f"evaluate.json_schema {path}: {reason}",
        "write one JSON schema to it and run the same command again, or name a different file with a new RUN=name",
        code=code,
    )


def add_pattern_timeout(validator_class: "type[Validator]") -> "type[Validator]":
    """Return a subclass of a validator class whose patterns have a timeout."""
    from jsonschema.validators import extend

    return extend(validator_class, {"pattern": _validate_pattern})


def _validate_pattern(
    validator: "Validator", pattern: str, value: object, schema: dict[str, Any]
) -> "Iterator[ValidationError]":
    """Yield an error when a text does not match a pattern, as the rules of jsonschema do."""
    from jsonschema import ValidationError

    if isinstance(value, str) and not has_match(pattern, value, "evaluate.json_schema"):
        yield ValidationError(f"{value!r} does not match {pattern!r}")
