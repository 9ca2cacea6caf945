"""Clean one conversation: Unicode and white space, empty and too short texts, secrets, special tokens."""

import functools
import re
import unicodedata
from collections import Counter
from itertools import pairwise

from pipeline.config.schema import Clean
from pipeline.data import personal_data
from pipeline.data.drop_reasons import Unfit

CODE = re.compile(
    # A fenced block as CommonMark defines it, also in a quotation or a list.
    r"^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[^\n]*$.*?"
    r"(?:^[ \t>]*(?P=fence)[`~]*\s*?$|\Z)"
    # Or code within a line.
    r"|(?<!`)(?P<ticks>`+)(?!`)[^\n]{0,300}?(?<!`)(?P=ticks)(?!`)",
    re.DOTALL | re.MULTILINE,
)
UNUSUAL = re.compile(r"[^\n\t\x20-\x7e]")
# Without the joiners, which emoji and Arabic and Indic scripts need.
INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")
LINE_ENDS = re.compile(r"(?<![ \t])[ \t]+(?=\n)")


class Cleaner:
    """Clean and check one row at a time, as the section `clean` of the config says."""

    def __init__(self, clean: Clean, specials: tuple[str, ...], raw: bool):
        """Prepare the steps.

        Args:
            clean: The section of the config.
            special_tokens: The texts of the tokenizer's special tokens.
            is_raw: Whether the template adds nothing around a turn's text; white space at its ends then belongs to it.
        """
        self.clean, self.raw = clean, raw
        self.special = re.compile("|".join(map(re.escape, specials))) if specials else None

    def __call__(self, messages: list[dict]) -> tuple[list[dict], set[str], Counter]:
        """Clean a conversation.

        Returns:
            The cleaned conversation, the kinds of change that were made, and the number of findings by kind.

        Raises:
            UnusableRow: The row must be dropped.
        """
        changes: set[str] = set()
        messages = [message | {"content": self.text(message, changes)} for message in messages]
        self.structure(messages)
        self.words(messages)
        found = self.findings(messages, changes)
        self.injected(messages)
        return messages, changes, found

    def text(self, message: dict, changes: set[str]) -> str:
        """Return the cleaned text of one message, and add the kinds of change to `changes`."""
        text = message["content"]
        encodable(text)
        if self.clean.normalize:
            text = normalized(text, changes)
        if self.raw:
            return text
        # White space around an answer would merge with the prompt's last token, and no model should learn it.
        # White space before a question may be the indentation of code, so only empty lines are removed there.
        assistant = message["role"] == "assistant"
        bare = text.strip() if assistant else re.sub(r"\A(?:[ \t]*\n)+", "", text).rstrip()
        if bare != text:
            changes.add("white space")
        return bare

    def structure(self, messages: list[dict]) -> None:
        """Raise UnusableRow for empty turns, and for roles that do not alternate and end with the assistant."""
        turns = [message for message in messages if message["role"] != "system"]
        for message in messages:
            if not message["content"].strip():
                raise Unfit("empty", f"the {message['role']}'s turn is empty")
        if not turns or turns[-1]["role"] != "assistant":
            raise Unfit("no_answer", f"the last turn is the {turns[-1]['role']}'s" if turns else "there is no turn")
        if any(message["role"] == "system" for message in messages[1:]):
            raise Unfit("not_alternating", "a system prompt stands behind the first turn")
        if any(a["role"] == b["role"] for a, b in pairwise(turns)) or (
            turns[0]["role"] == "assistant" and len(turns) > 1
        ):
            raise Unfit("not_alternating", "roles: " + " ".join(message["role"] for message in messages[:8]))

    def words(self, messages: list[dict]) -> None:
        """Raise UnusableRow when the row has too few or too many words."""
        least, most = self.clean.min_words, self.clean.max_words
        if least > 1:
            count = min(len(m["content"].split()) for m in messages if m["role"] == "assistant")
            if count < least:
                raise Unfit("too_short", f"an answer of {count} words")
        if most is not None:
            count = sum(len(m["content"].split()) for m in messages)
            if count > most:
                raise Unfit("too_wordy", f"{count} words")

    def findings(self, messages: list[dict], changes: set[str]) -> Counter:
        """Find secrets and personal data, and mask them in `messages` where the config asks for it.

        Returns:
            The number of findings by kind.

        Raises:
            UnusableRow: The config asks to drop rows with such a finding.
        """
        total: Counter = Counter()
        looks = (
            ("secret", self.clean.secrets, personal_data.secrets),
            ("personal", self.clean.personal, personal_data.personal),
        )
        for reason, action, look in looks:
            if action == "off":
                continue
            for message in messages:
                if not (found := look(message["content"])):
                    continue
                total.update(finding.kind for finding in found)
                if action == "drop":
                    raise Unfit(reason, ", ".join(sorted({finding.kind for finding in found})))
                if action == "mask":
                    message["content"] = personal_data.masked(message["content"], found)
                    changes.add(f"{reason} masked")
        return total

    def injected(self, messages: list[dict]) -> None:
        """Raise UnusableRow when a message's own text holds a special token."""
        if self.special and self.clean.special_tokens == "drop":
            for message in messages:
                if match := self.special.search(message["content"]):
                    raise Unfit("special_tokens", f"{match[0]} in the {message['role']}'s text")


def encodable(text: str) -> None:
    """Raise UnusableRow for half a surrogate pair, and for U+FFFD, which stands for characters lost in a conversion."""
    if not text.isascii():
        if "\ufffd" in text:
            raise Unfit("broken_encoding", f"U+FFFD at character {text.index(chr(0xFFFD)) + 1}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unfit("broken_encoding", f"half a surrogate pair at character {error.start + 1}") from None


def normalized(text: str, changes: set[str]) -> str:
    """Repair Unicode and white space outside of code, and add the kinds of change to `changes`."""
    if not UNUSUAL.search(text) and " \n" not in text and "\t\n" not in text:
        return text  # so for nearly every row of an English data set
    pieces, at = [], 0
    for code in CODE.finditer(text):
        pieces += [_prose(text[at : code.start()], changes), code[0]]
        at = code.end()
    return "".join([*pieces, _prose(text[at:], changes)])


def _prose(text: str, changes: set[str]) -> str:
    import ftfy

    fixed = ftfy.fix_text(text, _ftfy())
    if "\ufffd" in fixed:  # ftfy cannot decode it either: keep the text as it is
        fixed = text
    fixed = unicodedata.normalize("NFC", INVISIBLE.sub("", fixed))
    spaced = LINE_ENDS.sub("", SPACES.sub(" ", fixed))
    if fixed != text:
        changes.add("Unicode")
    if spaced != fixed:
        changes.add("white space")
    return spaced


@functools.cache
def _ftfy():
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
