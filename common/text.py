"""Text of strangers on a terminal: rows, models, manifests, servers. `console` sends everything through here."""

import re
import unicodedata

JOINERS = "\u200c\u200d"  # not printable by Python's rule, and part of Persian words and of emoji
STYLES = re.compile("(\x1b\\[(?:0|1|32)m)")  # what `console.style` writes: green, bold, and their end
LIKE_OURS = re.compile(r"(?i)\s*(error|next|note|warning)\s*:")


def make_printable(text: str) -> str:
    """Return `text` without what a terminal would obey: escape sequences, carriage returns, marks that turn a line around."""
    return text if text.isprintable() else "".join(map(_make_character_printable, text))


def _make_character_printable(character: str) -> str:
    if character.isprintable() or character in "\n\t" or character in JOINERS:
        return character
    if character.isspace():
        return " "
    return "" if unicodedata.category(character) == "Cf" else "?"  # invisible marks, or what no text needs


def make_printable_but_styles(text: str) -> str:
    """The same, with the colours that Ferry itself puts around words."""
    return "".join(part if STYLES.fullmatch(part) else make_printable(part) for part in STYLES.split(text))


def indent_further_lines(text: str) -> str:
    """Return a message whose further lines are indented, and none of them looks like a line of Ferry's own."""
    first, *rest = make_printable(text).split("\n")
    marked = [f"  | {line.strip()}" if LIKE_OURS.match(line) else line for line in rest]
    return "\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in marked)])
