"""Clean one conversation: Unicode and white space, empty and too short texts, secrets, special tokens."""

import functools
import re
import unicodedata
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from pipeline.config.schema import Clean
from pipeline.data import personal_data
from pipeline.data.drop_reasons import UnusableRow

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

CODE = re.compile(
    # A fenced block as CommonMark defines it, also in a quotation or a list.
    r"^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[^\n]*$.*?"
    r"(?:^[ \t>]*(?P=fence)[`~]*\s*?$|\Z)"
    # Or code within a line.
    r"|(?<!`)(?P<ticks>`+)(?!`)[^\n]{0,300}?(?<!`)(?P=ticks)(?!`)",
    re.DOTALL | re.MULTILINE,
)
NOT_PLAIN_ASCII = re.compile(r"[^\n\t\x20-\x7e]")
# Without the joiners, which emoji and Arabic and Indic scripts need.
INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
UNUSUAL_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")
TRAILING_SPACES = re.compile(r"(?<![ \t])[ \t]+(?=\n)")


class Cleaner:
    """Clean and check one row at a time, as the section `clean` of the config says."""

    def __init__(self, clean: Clean, special_tokens: tuple[str, ...], is_raw: bool):
        """Prepare the steps; `is_raw`: the template adds nothing around a text, so its outer white space stays."""
        self.clean, self.is_raw = clean, is_raw
        self.special_pattern = re.compile("|".join(map(re.escape, special_tokens))) if special_tokens else None

    def __call__(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], set[str], Counter[str]]:
        """Clean a conversation.

        Returns:
            The cleaned conversation, the kinds of change that were made, and the number of findings by kind.

        Raises:
            UnusableRow: The row must be dropped.
        """
        changes: set[str] = set()
        messages = [message | {"content": self.clean_text(message, changes)} for message in messages]
        self.refuse_bad_structure(messages)
        self.refuse_word_count(messages)
        findings = self.search_private_data(messages, changes)
        self.refuse_special_tokens(messages)
        return messages, changes, findings

    def clean_text(self, message: dict[str, str], changes: set[str]) -> str:
        """Return the cleaned text of one message, and add the kinds of change to `changes`."""
        text = message["content"]
        refuse_broken_text(text)
        if self.clean.normalize:
            text = normalize_text(text, changes)
        if self.is_raw:
            return text
        stripped = strip_turn(text, message["role"])
        if stripped != text:
            changes.add("white space")
        return stripped

    def refuse_bad_structure(self, messages: list[dict[str, str]]) -> None:
        """Raise UnusableRow for empty turns, and for roles that do not alternate and end with the assistant."""
        refuse_empty_turns(messages)
        turns = [message for message in messages if message["role"] != "system"]
        if not turns or turns[-1]["role"] != "assistant":
            raise UnusableRow(
                "no_answer", f"the last turn is the {turns[-1]['role']}'s" if turns else "there is no turn"
            )
        if any(message["role"] == "system" for message in messages[1:]):
            raise UnusableRow("not_alternating", "a system prompt follows the first turn")
        if any(turn["role"] == next_turn["role"] for turn, next_turn in pairwise(turns)) or (
            turns[0]["role"] == "assistant" and len(turns) > 1
        ):
            raise UnusableRow("not_alternating", "roles: " + " ".join(message["role"] for message in messages[:8]))

    def refuse_word_count(self, messages: list[dict[str, str]]) -> None:
        """Raise UnusableRow when the row has too few or too many words."""
        min_words, max_words = self.clean.min_words, self.clean.max_words
        if min_words > 1:
            count = min(len(message["content"].split()) for message in messages if message["role"] == "assistant")
            if count < min_words:
                raise UnusableRow("too_short", f"an answer of {count} words")
        if max_words is not None:
            count = sum(len(message["content"].split()) for message in messages)
            if count > max_words:
                raise UnusableRow("too_wordy", f"{count} words")

    def search_private_data(self, messages: list[dict[str, str]], changes: set[str]) -> Counter[str]:
        """Find secrets and personal data, and mask them in `messages` where the config asks for it.

        Returns:
            The number of findings by kind.

        Raises:
            UnusableRow: The config asks to drop rows with such a finding.
        """
        counts: Counter[str] = Counter()
        searches = (
            ("secret", self.clean.secrets, personal_data.find_secrets),
            ("personal", self.clean.personal, personal_data.find_personal_data),
        )
        for reason, action, search in searches:
            if action == "off":
                continue
            for message in messages:
                if not (findings := search(message["content"])):
                    continue
                counts.update(finding.kind for finding in findings)
                if action == "drop":
                    raise UnusableRow(reason, ", ".join(sorted({finding.kind for finding in findings})))
                if action == "mask":
                    message["content"] = personal_data.mask_findings(message["content"], findings)
                    changes.add(f"{reason} masked")
        return counts

    def refuse_special_tokens(self, messages: list[dict[str, str]]) -> None:
        """Raise UnusableRow when a message's own text holds a special token."""
        if self.special_pattern and self.clean.special_tokens == "drop":
            for message in messages:
                if match := self.special_pattern.search(message["content"]):
                    raise UnusableRow("special_tokens", f"{match[0]} in the {message['role']}'s text")


def strip_turn(text: str, role: str) -> str:
    """Remove the white space around a text, which would merge with the prompt's last token.

    Before a question it may be the indentation of code, so only empty lines are removed there.
    """
    return text.strip() if role == "assistant" else re.sub(r"\A(?:[ \t]*\n)+", "", text).rstrip()


def refuse_empty_turns(messages: list[dict[str, str]]) -> None:
    """Raise UnusableRow when a turn has no text."""
    for message in messages:
        if not message["content"].strip():
            raise UnusableRow("empty", f"the {message['role']}'s turn is empty")


def refuse_broken_text(text: str) -> None:
    """Raise UnusableRow for an unpaired surrogate, and for U+FFFD, which stands for characters lost in a conversion."""
    if not text.isascii():
        if "\ufffd" in text:
            raise UnusableRow("broken_encoding", f"U+FFFD at character {text.index(chr(0xFFFD)) + 1}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnusableRow("broken_encoding", f"an unpaired surrogate at character {error.start + 1}") from None


def normalize_text(text: str, changes: set[str]) -> str:
    """Repair Unicode and white space outside of code, and add the kinds of change to `changes`."""
    if not NOT_PLAIN_ASCII.search(text) and " \n" not in text and "\t\n" not in text:
        return text  # so for nearly every row of an English data set
    pieces, position = [], 0
    for code_match in CODE.finditer(text):
        pieces += [_normalize_prose(text[position : code_match.start()], changes), code_match[0]]
        position = code_match.end()
    return "".join([*pieces, _normalize_prose(text[position:], changes)])


def _normalize_prose(text: str, changes: set[str]) -> str:
    repaired = _repair_unicode(text)
    spaced = TRAILING_SPACES.sub("", UNUSUAL_SPACES.sub(" ", repaired))
    if repaired != text:
        changes.add("Unicode")
    if spaced != repaired:
        changes.add("white space")
    # A soft hyphen or an unusual space beside mojibake hides it from ftfy, so a changed text is looked at again.
    return spaced if spaced == text else _normalize_prose(spaced, changes)


def _repair_unicode(text: str) -> str:
    """Return a text with mojibake repaired, in NFC and without invisible characters."""
    import ftfy

    repaired = ftfy.fix_text(text, _ftfy_config())
    if "\ufffd" in repaired:  # ftfy cannot decode it either: keep the text as it is
        repaired = text
    return unicodedata.normalize("NFC", INVISIBLE.sub("", repaired))


@functools.cache
def _ftfy_config() -> "TextFixerConfig":
    """Return ftfy's settings: repair mojibake, control characters and line ends.

    Quotes, character widths and entities stay as the author wrote them.
    """
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        normalization=None,
        explain=False,
        replace_lossy_sequences=False,
    )
