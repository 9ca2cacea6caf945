"""Cleaning of one conversation: Unicode and white space, empty and too short texts, secrets, special tokens."""

import functools
import re
import unicodedata
from collections import Counter
from itertools import pairwise

from pipeline.config.schema import Clean
from pipeline.data import personal_data
from pipeline.data.drop_reasons import Unfit

CODE = re.compile(
    # a fence, as CommonMark has it, in a quotation or a list too
    r"^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[^\n]*$.*?(?:^[ \t>]*(?P=fence)[`~]*\s*?$|\Z)"
    r"|(?<!`)(?P<ticks>`+)(?!`)[^\n]{0,300}?(?<!`)(?P=ticks)(?!`)",  # or code within a line
    re.DOTALL | re.MULTILINE,
)
UNUSUAL = re.compile(r"[^\n\t\x20-\x7e]")
INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # not the joiners of emoji and of Arabic and Indic scripts
SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")
LINE_ENDS = re.compile(r"(?<![ \t])[ \t]+(?=\n)")


class Cleaner:
    """The steps that look at one row alone, as the config switches them."""

    def __init__(self, clean: Clean, specials: tuple[str, ...], raw: bool):
        """raw: a template that puts nothing around the words; white space at their ends then belongs to them."""
        self.clean, self.raw = clean, raw
        self.special = re.compile("|".join(map(re.escape, specials))) if specials else None

    def __call__(self, messages: list[dict]) -> tuple[list[dict], set[str], Counter]:
        """The cleaned conversation, the kinds of change, and findings by kind. Raises Unfit."""
        changes: set[str] = set()
        messages = [message | {"content": self.text(message, changes)} for message in messages]
        self.structure(messages)
        self.words(messages)
        found = self.findings(messages, changes)
        self.injected(messages)
        return messages, changes, found

    def text(self, message: dict, changes: set[str]) -> str:
        text = message["content"]
        encodable(text)
        if self.clean.normalize:
            text = normalized(text, changes)
        if self.raw:
            return text
        # White space around an answer would merge with the prompt's last token, and no model should learn it.
        # In front of a question it may be the indentation of code: only empty lines go.
        assistant = message["role"] == "assistant"
        bare = text.strip() if assistant else re.sub(r"\A(?:[ \t]*\n)+", "", text).rstrip()
        if bare != text:
            changes.add("white space")
        return bare

    def structure(self, messages: list[dict]) -> None:
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
        """Counts by kind; texts are masked in place where the config asks for it."""
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
        if self.special and self.clean.special_tokens == "drop":
            for message in messages:
                if match := self.special.search(message["content"]):
                    raise Unfit("special_tokens", f"{match[0]} in the {message['role']}'s text")


def encodable(text: str) -> None:
    """Raises Unfit for half a character pair, and for characters that an earlier conversion has lost."""
    if not text.isascii():
        if "\ufffd" in text:
            raise Unfit("broken_encoding", f"U+FFFD at character {text.index(chr(0xFFFD)) + 1}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unfit("broken_encoding", f"half a surrogate pair at character {error.start + 1}") from None


def normalized(text: str, changes: set[str]) -> str:
    """Unicode and white space put right, code left as it is."""
    if not UNUSUAL.search(text) and " \n" not in text and "\t\n" not in text:
        return text  # nearly every row of an English data set
    pieces, at = [], 0
    for code in CODE.finditer(text):
        pieces += [_prose(text[at : code.start()], changes), code[0]]
        at = code.end()
    return "".join([*pieces, _prose(text[at:], changes)])


def _prose(text: str, changes: set[str]) -> str:
    import ftfy

    fixed = ftfy.fix_text(text, _ftfy())
    if "\ufffd" in fixed:  # what ftfy cannot read either stays as it was written
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
    """Mojibake, control characters and line ends; nothing that changes what an author wrote: quotes, widths, entities."""
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False,
        normalization=None, explain=False, replace_lossy_sequences=False,
    )  # fmt: skip
