"""Turn a conversation into token ids and a loss mask.

Only this module renders and masks rows; `finetune` passes them on unchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, processors

from common.errors import UserError
from pipeline.data.chat_template import ChatFormat
from pipeline.data.clean import NOT_PLAIN_ASCII
from pipeline.data.drop_reasons import UnusableRow

# Rows that are tokenized at once: freeing the memory of single rows takes a third of the time (measured with glibc).
BATCH_ROWS = 100


@dataclass
class TokenizedRow:
    """A tokenized row.

    Attributes:
        ids: int32 of shape (tokens,).
        loss: bool of the same shape, true where a token carries loss.
        prompt: The rendered prompt of the last answer.
        prompt_tokens: How many of the ids are the prompt.
        answer: The last answer, as the row holds it.
    """

    ids: np.ndarray
    loss: np.ndarray
    prompt: str
    prompt_tokens: int
    answer: str


class RenderedConversation(NamedTuple):
    """A conversation as text.

    Attributes:
        text: The whole conversation.
        spans: The characters that carry loss, as (start, end).
        prompt: The prompt of the last answer.
        answer: The last answer.
    """

    text: str
    spans: list[tuple[int, int]]
    prompt: str
    answer: str


class Masker:
    """Render, tokenize and label conversations with the tokenizer in `folder`."""

    def __init__(self, folder: Path, chat: ChatFormat, every_turn: bool = True):
        self.chat = chat
        self.every_turn = every_turn and not chat.is_joined
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # The template writes BOS itself, and a ByteLevel post-processor would exclude white space from the offsets.
        self.tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        # Only then does decoding give back the text, if the vocabulary has all bytes (SmolLM2's has not).
        self.is_reversible = (
            isinstance(self.tokenizer.decoder, decoders.ByteLevel) and self.tokenizer.normalizer is None
        )
        self.longest_token = max(map(len, self.tokenizer.get_vocab()))

    def __call__(self, messages: list[dict[str, str]]) -> TokenizedRow:
        """Return a conversation with loss on its answers and their end tokens only, or raise UnusableRow."""
        row = next(self.tokenize_rows([self.render(messages)]))
        if isinstance(row, UnusableRow):
            raise row
        return row

    def render(self, messages: list[dict[str, str]], limit: int | None = None) -> RenderedConversation:
        """Return the conversation as text, with the spans that carry loss.

        Args:
            messages: [{role, content}, ...], of which the last one is the assistant's.
            limit: Most tokens of a row. A text that is certainly longer is not worth tokenizing.

        Raises:
            UnusableRow: The template cannot render the conversation, or the text is longer than `limit` tokens.
        """
        try:
            text, spans, prompt = self.render_with_spans(messages)
        except UserError as error:
            raise UnusableRow("template", error.message) from error
        if limit and len(text) > limit * self.longest_token:
            raise UnusableRow("too_long", f"{len(text)} characters, more than {limit} tokens can hold")
        return RenderedConversation(text, spans, prompt, messages[-1]["content"])

    def tokenize_rows(self, rendered: list[RenderedConversation]) -> Iterator[TokenizedRow | UnusableRow]:
        """Yield the tokenized row of each conversation, or the reason why there is none."""
        for start in range(0, len(rendered), BATCH_ROWS):
            batch = rendered[start : start + BATCH_ROWS]
            encodings = self.tokenizer.encode_batch([item.text for item in batch], add_special_tokens=False)
            yield from map(self.label_row, batch, encodings)

    def label_row(self, conversation: RenderedConversation, encoding: Encoding) -> TokenizedRow | UnusableRow:
        """Return the row with its loss mask, or the reason why it cannot be labelled."""
        if (
            self.is_reversible
            and NOT_PLAIN_ASCII.search(conversation.text)
            and self.tokenizer.decode(encoding.ids, False) != conversation.text
        ):
            return UnusableRow("unknown_characters", "decoding the tokens does not give back the text")
        ids = np.array(encoding.ids, dtype=np.int32)
        loss = np.zeros(len(ids), dtype=bool)
        try:
            for start, end in conversation.spans:
                first, last = self.find_token_range(encoding, conversation.text, start, end)
                loss[first:last] = True
        except UnusableRow as error:
            return error
        loss[:1] = False  # the first token has nothing before it to be predicted from
        return TokenizedRow(ids, loss, conversation.prompt, first, conversation.answer)

    def refuse_other_prompt_tokens(self, row: TokenizedRow) -> None:
        """Raise UnusableRow when the prompt alone, as it is served, has other tokens than the row begins with."""
        prompt_ids = self.tokenizer.encode(row.prompt, add_special_tokens=False).ids
        if prompt_ids != row.ids[: row.prompt_tokens].tolist():
            raise UnusableRow("template", f"the prompt {row.prompt[-40:]!r} has different tokens alone than in the row")

    def render_with_spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]], str]:
        """Return the rendered text, the characters (start, end) that carry loss, and the last answer's prompt."""
        answer_indexes = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.chat.is_joined:
            prompt = self.chat.render(messages[:-1], add_generation_prompt=True)
            text = prompt + messages[-1]["content"] + self.chat.answer_end
            return text, [(len(prompt), len(text))], prompt
        text, spans = self.chat.render(messages), []
        for index in answer_indexes if self.every_turn else answer_indexes[-1:]:
            prompt = self.chat.render(messages[:index], add_generation_prompt=True)
            text, end = self.find_answer_end(text, prompt, messages[index]["content"])
            spans.append((len(prompt), end))
        return text, spans, prompt

    def find_answer_end(self, text: str, prompt: str, answer: str) -> tuple[str, int]:
        """Find where the end token of an answer ends.

        Returns:
            The text, to which an end token is added where the template omits the last one, and the position behind the
            end token.

        Raises:
            UnusableRow: The text does not go on from the prompt with this answer and an end token.
        """
        if not text.startswith(prompt):
            raise UnusableRow(
                "template",
                "the template renders an earlier turn differently than its prompt; data.labels: last leaves it out",
            )
        for scaffold in self.chat.scaffolds:
            if text.startswith(scaffold + answer, len(prompt)):
                answer_end = len(prompt) + len(scaffold) + len(answer)
                rest = text[answer_end:]
                white_space = len(rest) - len(rest.lstrip())
                for end_token in self.chat.end_tokens:
                    if rest.startswith(end_token, white_space):
                        return text, answer_end + white_space + len(end_token)
                if white_space == len(rest):
                    return text[:answer_end] + self.chat.answer_end, answer_end + len(self.chat.answer_end)
        raise UnusableRow(
            "template",
            f"the template changes the answer {answer[:40]!r}, or does not end it with {self.chat.end_tokens[0]}",
        )

    def find_token_range(self, encoding: Encoding, text: str, start: int, end: int) -> tuple[int, int]:
        """Return the tokens (first, last + 1) that hold exactly the characters from `start` to `end`.

        Raises:
            UnusableRow: A token holds characters of both sides of a border.
        """
        first, last = find_token(encoding, start), find_token(encoding, end - 1)
        # A character of several tokens (an emoji) belongs to the first of them. An end token may include the white
        # space behind it (Phi 3's do).
        if not first or not last or first.start != start or text[end : last.end].strip():
            raise UnusableRow("template", f"a token crosses the border of the answer {text[start : start + 40]!r}")
        return first.number, last.number + 1


class TokenPlace(NamedTuple):
    """The number of a token in its row, and its characters from `start` to `end`."""

    number: int
    start: int
    end: int


def find_token(encoding: Encoding, character: int) -> TokenPlace | None:
    """Return the token that holds a character; None where none does."""
    number = encoding.char_to_token(character)
    characters = encoding.token_to_chars(number) if number is not None else None
    return TokenPlace(number, *characters) if number is not None and characters else None
