"""How right one answer is: the rules of evaluate.rule, each a number from 0 to 1."""

import json
import re
from pathlib import Path

from contract.errors import UserError
from contract.rules import BY_NAME, Judge
from pipeline.config import Evaluate


def judge(rule: Evaluate) -> Judge | None:
    """None for `loss`: free text is judged by its held-out loss only. Raises UserError for an unusable rule."""
    made = {"loss": lambda: None, "regex": lambda: regex(rule.pattern)}
    made |= {"json_schema": lambda: json_schema(Path(rule.json_schema))}
    return BY_NAME.get(rule.rule) or made[rule.rule]()


def regex(pattern: str) -> Judge:
    """The pattern is found in the answer."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda said, reference: float(compiled.search(said) is not None)


def json_schema(path: Path) -> Judge:
    """The answer is JSON and fits the schema in the file."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable

    def unusable(why: object) -> UserError:
        return UserError(
            f"evaluate.json_schema {path}: {why}",
            "write one JSON schema there and run the same command again, or name another file with a new RUN=name",
        )

    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
        draft = schema.get("$schema", "") if isinstance(schema, dict) else ""
        if not isinstance(schema, dict | bool) or not isinstance(draft, str):
            raise SchemaError("it holds no JSON schema")
        validator = validator_for(schema)
        validator.check_schema(schema)
    except (OSError, ValueError, RecursionError, SchemaError) as error:
        why = getattr(error, "message", None) or getattr(error, "strerror", None) or error
        raise unusable(why) from error
    fits = validator(schema, registry=REGISTRY).is_valid  # its own registry would fetch a $ref from anywhere

    def judged(said: str, reference: str) -> float:
        try:
            return float(fits(json.loads(said)))
        except Unresolvable as error:
            raise unusable(f"a $ref leads nowhere in it: {error}") from error
        except (ValueError, ArithmeticError, RecursionError):
            return 0.0

    return judged
