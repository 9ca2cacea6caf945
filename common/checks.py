"""What a doctor finds, on either side: each thing is ok, a lack or a fault, and for both of those there is a cure.

A lack stops nothing: the parts that do not need it go on. A fault does: without its cure nothing would run.
"""

import json
from dataclasses import asdict, dataclass

from common.errors import UserError


@dataclass(frozen=True)
class Check:
    name: str
    state: str
    """'ok', 'lack' or 'fault'."""
    text: str
    cure: str = ""


def page(checks: list[Check]) -> str:
    """A line for each, and its cure below it."""
    lines = []
    for check in checks:
        lines.append(f"{check.state:<6}{check.name:<10}{check.text}")
        lines += [f"{'':16}next: {check.cure}"] if check.cure else []
    return "\n".join(lines)


def to_json(checks: list[Check]) -> str:
    """The same for programs: a list of {name, state, text, cure}."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def refuse(checks: list[Check]) -> None:
    """Raises UserError for the first fault, if there is one."""
    for check in checks:
        if check.state == "fault":
            raise UserError(check.text, check.cure)
