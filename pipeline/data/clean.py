"""Clean one conversation: Unicode and white space, empty and too short texts, secrets, special tokens."""

import functools
import re
import unicodedata
from collections import Counter
from itertools import pairwise

from pipeline.config.schema import Clean
from pipeline.data import personal_data
from pipeline.data.drop_reasons import UnusableRow

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
        """Prepare the steps.

        Args:
            clean: The section of the config.
            special_tokens: The texts of the tokenizer's special tokens.
            is_raw: Whether the template adds nothing around a turn's text; white space at its ends then belongs to it.
        """
        self.clean, self.is_raw = clean, is_raw
        self.special_pattern = re.compile("|".join(map(re.escape, special_tokens))) if special_tokens else None

    def __call__(self, messages: list[dict]) -> tuple[list[dict], set[str], Counter]:
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

    def clean_text(self, message: dict, changes: set[str]) -> str:
        """Return the cleaned text of one message, and add the kinds of change to `changes`."""
        text = message["content"]
        refuse_broken_text(text)
        if self.clean.normalize:
            text = normalize_text(text, changes)
        if self.is_raw:
            return text
        # White space around an answer would merge with the prompt's last token, and no model should learn it.
        # White space before a question may be the indentation of code, so only empty lines are removed there.
        is_answer = message["role"] == "assistant"
        stripped = text.strip() if is_answer else re.sub(r"\A(?:[ \t]*\n)+", "", text).rstrip()
        if stripped != text:
            changes.add("white space")
        return stripped

    def refuse_bad_structure(self, messages: list[dict]) -> None:
        """Raise UnusableRow for empty turns, and for roles that do not alternate and end with the assistant."""
        turns = [message for message in messages if message["role"] != "system"]
        for message in messages:
            if not message["content"].strip():
                raise UnusableRow("empty", f"the {message['role']}'s turn is empty")
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

    def refuse_word_count(self, messages: list[dict]) -> None:
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

    def search_private_data(self, messages: list[dict], changes: set[str]) -> Counter:
        """Find secrets and personal data, and mask them in `messages` where the config asks for it.

        Returns:
            The number of findings by kind.

        Raises:
            UnusableRow: The config asks to drop rows with such a finding.
        """
        counts: Counter = Counter()
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

    def refuse_special_tokens(self, messages: list[dict]) -> None:
        """Raise UnusableRow when a message's own text holds a special token."""
        if self.special_pattern and self.clean.special_tokens == "drop":
            for message in messages:
                if match := self.special_pattern.search(message["content"]):
                    raise UnusableRow("special_tokens", f"{match[0]} in the {message['role']}'s text")


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
    import ftfy

    repaired = ftfy.fix_text(text, _ftfy_config())
    if "\ufffd" in repaired:  # ftfy cannot decode it either: keep the text as it is
        repaired = text
    repaired = unicodedata.normalize("NFC", INVISIBLE.sub("", repaired))
    spaced = TRAILING_SPACES.sub("", UNUSUAL_SPACES.sub(" ", repaired))
    if repaired != text:
        changes.add("Unicode")
    if spaced != repaired:
        changes.add("white space")
    return spaced


@functools.cache
def _ftfy_config():
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
