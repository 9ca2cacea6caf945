"""The rules of evaluate.rule: each one judges an answer with a number from 0 (wrong) to 1 (right)."""

import json
from pathlib import Path

from common import files
from common.errors import UserError
from contract.answer_rules import BY_NAME, Judge
from pipeline.config.schema import Evaluate

SECONDS = 2  # for one pattern on one answer; a sensible pattern takes microseconds


def judge(rule: Evaluate) -> Judge | None:
    """Return the judge of evaluate.rule; None for `loss`, where free text is judged by its held-out loss only.

    Raises:
        UserError: The rule cannot be used.
    """
    made = {"loss": lambda: None, "regex": lambda: regex(rule.pattern)}
    made |= {"json_schema": lambda: json_schema(Path(rule.json_schema))}
    return BY_NAME.get(rule.rule) or made[rule.rule]()


def regex(pattern: str) -> Judge:
    """Return a judge that gives 1 when the pattern occurs in the answer."""
    return lambda said, reference: float(is_found(pattern, said, "evaluate.pattern"))


def is_found(pattern: str, text: str, setting: str) -> bool:
    """Return whether the pattern occurs in the text.

    Raises:
        UserError: The search takes longer than any sensible pattern does, or the pattern is no regular expression.
    """
    import regex as library  # the same as Python's own module, with a timeout

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
    """Return a judge that gives 1 when the answer is JSON and fits the schema in the file.

    Raises:
        UserError: The file cannot be read, or holds no schema that can be used.
    """
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
        # the validator's own registry would fetch a $ref from anywhere
        fits = limited(validator)(schema, registry=REGISTRY).is_valid
        fits({})  # some faults of a schema show only when a value is judged
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
    """Return a subclass of a validator class whose patterns have a timeout."""
    from jsonschema import ValidationError
    from jsonschema.validators import extend

    def pattern(self, wanted: str, value: object, schema: dict):
        if self.is_type(value, "string") and not is_found(wanted, value, "evaluate.json_schema"):
            yield ValidationError(f"{value!r} does not match {wanted!r}")

    return extend(validator, {"pattern": pattern})
