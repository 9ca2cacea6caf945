"""Results of the checks that `doctor` makes, on the GPU side and on the Mac.

A check is 'ok', a 'lack' or a 'fault'. A lack stops nothing: the parts that do not need the missing thing still work.
A fault has to be fixed before anything can run. Lacks and faults come with a cure.
"""

import json
import re
from dataclasses import asdict, dataclass

from common.errors import UserError


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    state: str
    """'ok', 'lack' or 'fault'."""
    text: str
    cure: str = ""
    """The next command or edit; empty when nothing has to be done."""
    code: str = ""
    """Code of the UserError that the check reports; empty: `refuse_faults` makes one from the name."""


def format_checks(checks: list[Check]) -> str:
    """Return one line for each check, with its cure on the line below."""
    lines = []
    for check in checks:
        lines.append(f"{check.state:<6}{check.name:<10}{check.text}")
        lines += [f"{'':16}next: {check.cure}"] if check.cure else []
    return "\n".join(lines)


def to_json(checks: list[Check]) -> str:
    """Return the checks as JSON: a list of {name, state, text, cure, code}."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def refuse_faults(checks: list[Check]) -> None:
    """Raise UserError for the first fault, if there is one."""
    for check in checks:
        if check.state == "fault":
            raise UserError(check.text, check.cure, code=check.code or f"environment.{_name_to_reason(check.name)}")


def _name_to_reason(name: str) -> str:
    """Return the name of a check in snake_case, without the number of a GPU: 'GPU 0' -> 'gpu'."""
    return re.sub(r"\W+", "_", re.sub(r" \d+$", "", name).lower())
