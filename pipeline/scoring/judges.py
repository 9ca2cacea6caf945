"""How right one answer is: the rules of evaluate.rule, each a number from 0 to 1."""

import json
from pathlib import Path

from common import files
from common.errors import UserError
from contract.answer_rules import BY_NAME, Judge
from pipeline.config.schema import Evaluate

SECONDS = 2  # for a pattern and an answer: a sensible one takes microseconds


def judge(rule: Evaluate) -> Judge | None:
    """None for `loss`: free text is judged by its held-out loss only. Raises UserError for an unusable rule."""
    made = {"loss": lambda: None, "regex": lambda: regex(rule.pattern)}
    made |= {"json_schema": lambda: json_schema(Path(rule.json_schema))}
    return BY_NAME.get(rule.rule) or made[rule.rule]()


def regex(pattern: str) -> Judge:
    """The pattern is found in the answer."""
    return lambda said, reference: float(is_found(pattern, said, "evaluate.pattern"))


def is_found(pattern: str, text: str, setting: str) -> bool:
    """Whether the pattern is somewhere in the text. Raises UserError where that takes longer than any sensible one."""
    import regex as library  # as Python's own, with a time limit

    try:
        return library.search(pattern, text, library.DOTALL, timeout=SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"{setting}: {pattern[:60]!r} takes more than {SECONDS} s on an answer of {len(text):,} characters",
            "write a pattern without repetitions inside of repetitions, such as (a+)+; the same command goes on",
        ) from None
    except library.error as error:
        raise UserError(f"{setting}: {pattern[:60]!r} is no regular expression: {error}", "correct it") from error


def json_schema(path: Path) -> Judge:
    """The answer is JSON and fits the schema in the file."""
    from jsonschema.exceptions import SchemaError, UnknownType
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable

    def unusable(why: object) -> UserError:
        return UserError(
            f"evaluate.json_schema {path}: {why}",
            "write one JSON schema there and run the same command again, or name another file with a new RUN=name",
        )

    try:
        files.refuse_no_file(path)
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
        draft = schema.get("$schema", "") if isinstance(schema, dict) else ""
        if not isinstance(schema, dict | bool) or not isinstance(draft, str):
            raise SchemaError("it holds no JSON schema")
        validator = validator_for(schema)
        validator.check_schema(schema)
        fits = limited(validator)(
            schema, registry=REGISTRY
        ).is_valid  # its own registry would fetch a $ref from anywhere
        fits({})  # some faults show only when a value is judged
    except Unresolvable as error:
        raise unusable(f"a $ref leads nowhere in it: {error}") from error
    except (OSError, ValueError, ArithmeticError, RecursionError, SchemaError, UnknownType) as error:
        why = getattr(error, "message", None) or getattr(error, "strerror", None) or error
        raise unusable(why) from error

    def judged(said: str, reference: str) -> float:
        try:
            return float(fits(json.loads(said)))
        except Unresolvable as error:
            raise unusable(f"a $ref leads nowhere in it: {error}") from error
        except UnknownType as error:
            raise unusable(f"it names the type {error.type!r}, which JSON does not have") from error
        except (ValueError, ArithmeticError, RecursionError):
            return 0.0

    return judged


def limited(validator: type) -> type:
    """The same validator, whose patterns have a time limit."""
    from jsonschema import ValidationError
    from jsonschema.validators import extend

    def pattern(self, wanted: str, value: object, schema: dict):
        if self.is_type(value, "string") and not is_found(wanted, value, "evaluate.json_schema"):
            yield ValidationError(f"{value!r} does not match {wanted!r}")

    return extend(validator, {"pattern": pattern})
