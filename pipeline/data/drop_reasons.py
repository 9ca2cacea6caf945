"""The reasons for which a row is not trained on.

rejected.jsonl, the printed table and the limit on rejected rows all use this list.
"""


class UnusableRow(Exception):
    """A row cannot be used.

    Attributes:
        reason: A key of DROP_REASONS.
        detail: What is wrong in this row.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# Reasons why a row is broken: a fault of the file, the format or the template. Too many broken rows stop the stage.
BROKEN_REASONS = {
    "wrong_format": "lacks the fields of the detected format",
    "broken_json": "a line that is not JSON",
    "duplicate_keys": "a JSON object repeats a key",
    "columns": "a CSV row with more columns than its header",
    "not_text": "a field is not text (a number, null, bytes, an image, ...)",
    "broken_encoding": "text that is not valid Unicode, or holds U+FFFD",
    "unknown_characters": "characters that the tokenizer has no tokens for",
    "empty": "a turn without words",
    "unknown_role": "a role other than system, user, assistant",
    "tool_call": "tool calls and their results: not supported",
    "not_alternating": "user and assistant do not take turns",
    "no_answer": "the conversation does not end with the assistant",
    "special_tokens": "the text holds one of the tokenizer's special tokens",
    "template": "the chat template cannot render this conversation faithfully",
    "system_ignored": "the chat template drops the system prompt",
    "too_long": "more tokens than base.max_seq_length",
    "no_loss": "no token is left that carries loss",
}
# Reasons for which the config asks to drop rows.
UNWANTED_REASONS = {
    "too_short": "fewer words than clean.min_words",
    "too_wordy": "more words than clean.max_words",
    "secret": "holds a key, token or password",
    "personal": "holds personal data",
    "duplicate": "the same text as an earlier row",
    "near_duplicate": "nearly the text of an earlier row",
    "leaked": "the question, or nearly the text, of a held-out row",
}
DROP_REASONS = BROKEN_REASONS | UNWANTED_REASONS
