"""The one error that users see."""

from common.text import format_untrusted_message, make_printable

MAX_MESSAGE_CHARS = 20_000  # a config may have many faults, and foreign text may be endless


class UserError(Exception):
    """An error that the user can fix. It is printed without a traceback, and the exit code is 2.

    Args:
        message: what is wrong, with the value.
        hint: the next command or edit that fixes it.
        code: "area.reason", such as "config.unknown_key": for programs and tests, shown in no message. It stays the
            same when the message is reworded.
    """

    def __init__(self, message: str, hint: str, code: str):
        super().__init__(message, hint, code)  # all three, so that it can be pickled
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        message, hint = (format_untrusted_message(text[:MAX_MESSAGE_CHARS]) for text in (self.message, self.hint))
        return f"error: {message}\n next: {hint}"


def printable_line(text: str, max_chars: int = 400) -> str:
    """Return untrusted text as one printable line of at most `max_chars` characters, without escape sequences."""
    return make_printable(" ".join(text[: 4 * max_chars].split())[:max_chars])
