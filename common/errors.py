"""The one error a user is meant to see."""

from common.text import indent_further_lines, make_printable

LONGEST = 20_000  # characters of a message: a config may have many faults, a stranger's text no end


class UserError(Exception):
    """Something the user can mend. Printed without traceback, exit code 2.

    message: what is wrong and what is there.
    hint: the next command or edit that mends it.
    """

    def __init__(self, message: str, hint: str):
        super().__init__(message, hint)  # both, so that it survives the way between processes
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        message, hint = (indent_further_lines(text[:LONGEST]) for text in (self.message, self.hint))
        return f"error: {message}\n next: {hint}"


def shown(text: str, most: int = 400) -> str:
    """Text of a stranger for a message: one printable line of at most `most` characters, no escape sequences, no novel."""
    return make_printable(" ".join(text[: 4 * most].split())[:most])
