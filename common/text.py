"""Make untrusted text (rows, models, manifests, servers) safe for a terminal. `console` applies it to all output."""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # not printable in Python's definition, but part of Persian words and of emoji
STYLE_CODES = re.compile("(\x1b\\[(?:0|1|32)m)")  # what `console.style` writes: green, bold, and reset
OWN_PREFIX = re.compile(r"(?i)\s*(error|next|note|warning)\s*:")


def make_printable(text: str) -> str:
    """Return `text` without what changes a terminal: escape sequences, carriage returns, marks that reverse a line.

    Such a character becomes "?" or a space, or is dropped when it is invisible.
    """
    return text if text.isprintable() else "".join(map(_make_character_printable, text))


def _make_character_printable(character: str) -> str:
    if character.isprintable() or character in "\n\t" or character in JOINERS:
        return character
    if character.isspace():
        return " "
    # Cf: invisible formatting marks.
    return "" if unicodedata.category(character) == "Cf" else "?"


def make_printable_except_styles(text: str) -> str:
    """Return `text` as `make_printable` does, but keep the colours that Ferry itself writes."""
    return "".join(part if STYLE_CODES.fullmatch(part) else make_printable(part) for part in STYLE_CODES.split(text))


def format_untrusted_message(text: str) -> str:
    """Return a stranger's message for the terminal: without control codes, and with no line like Ferry's own.

    All lines but the first are indented; one that begins like `error:` or `next:` is marked.
    """
    first, *rest = make_printable(text).split("\n")
    marked_lines = [f"  | {line.strip()}" if OWN_PREFIX.match(line) else line for line in rest]
    return "\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in marked_lines)])
