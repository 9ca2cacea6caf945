"""A chat template in the form that an Ollama TEMPLATE can express: the texts around the messages of each role.

It is derived from the trained Jinja and proven on the GPU side (pipeline/verify/derive_template.py), carried by the
manifest, and written as a Go template on the Mac side. `render_prompt` does in Python what the template of
`to_go_template` does in Go; the tests prove the two equal with Go's own text/template.
"""

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from contract.chat_format import ChatMessage

WHITE_SPACE = " \t\n\r\v\f"
"""The characters that are trimmed from the ends of a message. Jinja's trim also removes Unicode's white space."""

TextPair = tuple[str, str]  # (the text before, the text after)


class Turns(BaseModel):
    """The texts before and after the messages of each role, without a BOS that a runtime's tokenizer adds by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: str
    """Text before the first message when no system prompt is given; contains the template's default system prompt."""
    system: TextPair | None
    """None: the format has no system prompt."""
    user: TextPair
    assistant: TextPair
    generate: str
    """Text after the last message: opens the answer."""
    place: Literal["own", "first", "last"] = "own"
    """Where the system prompt is: in a turn of its own, inside the first, or inside the last user turn.
    Inside a user turn, `system` replaces the text that otherwise opens it: `start` for "first", `user` for "last"."""
    trimmed: tuple[str, ...] = ()
    """Roles whose messages lose the white space at their ends."""
    marker: TextPair | None = None
    """(text, the opening of a user turn whose message contains that text), such as Alpaca's '### Input:'."""

    def render_prompt(self, messages: Sequence[ChatMessage]) -> str:
        """Return the prompt for an answer to `messages`, which are passed in as Ollama passes them to its templates."""
        messages = merge_consecutive_messages(messages)
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        text = "" if self.place == "first" or (system and self.place == "own") else self.start
        for i, message in enumerate(messages):
            role, content = message["role"], self.trim(message["role"], message["content"])
            if role == "user":
                opening = self._user_opening(message["content"], system, i == users[0], i == len(messages) - 1)
                text += opening + content + self.user[1]
            elif role == "assistant":
                text += self.assistant[0] + content + self.assistant[1]
            elif role == "system" and self.system and self.place == "own":
                text += self.system[0] + content + self.system[1]
        return text + self.generate

    def _user_opening(self, content: str, system: str, is_first: bool, is_last: bool) -> str:
        """Return the text that opens a user turn."""
        is_here = {"own": False, "first": is_first, "last": is_last}[self.place]
        if is_here and system and self.system:
            return self.system[0] + self.trim("system", system) + self.system[1]
        if is_here and self.place == "first":
            return self.start
        return self.marker[1] if self.marker and self.marker[0] in content else self.user[0]

    def trim(self, role: str, content: str) -> str:
        """Return a message's text, without white space at its ends when the role is trimmed."""
        return content.strip(WHITE_SPACE) if role in self.trimmed else content

    def to_go_template(self) -> str:
        """Return the TEMPLATE. It needs Ollama's .System and .Messages, and only functions of text/template."""
        texts = {
            "user": self._go_user_opening() + self._go_content("user") + _literal_action(self.user[1]),
            "assistant": self._go_turn("assistant", self.assistant),
        }
        if self.system and self.place == "own":
            texts = {"system": self._go_turn("system", self.system)} | texts
        conditions = [f'{"else " * (i > 0)}if eq .Role "{role}"' for i, role in enumerate(texts)]
        branches = [f"{{{{- {condition} }}}}{text}" for condition, text in zip(conditions, texts.values(), strict=True)]
        loop = "{{- range $i, $m := .Messages }}" if self.place == "last" else "{{- range .Messages }}"
        lines = [*self._go_prologue(), loop, *branches, "{{- end }}", "{{- end }}" + _literal_action(self.generate)]
        return "\n".join(lines)

    def _go_prologue(self) -> list[str]:
        """Return the Go lines before the loop over the messages."""
        if self.place == "first":
            return ["{{- $first := true }}"]
        start = _literal_action(self.start)
        if start and self.place == "own":
            start = f"{{{{- if not .System }}}}{start}{{{{ end }}}}"
        return [start] if start else []

    def _go_turn(self, role: str, around: TextPair) -> str:
        """Return the Go text of a message of a role, with the texts around it."""
        return _literal_action(around[0]) + self._go_content(role) + _literal_action(around[1])

    def _go_user_opening(self) -> str:
        """Return the Go text that opens a user turn, with `$.System` where the system prompt is inside a user turn."""
        plain_opening = _literal_action(self.user[0])
        if self.marker:
            plain_opening = _contains_action(*self.marker, self.user[0])
        if self.place == "own" or (self.place == "last" and not self.system):
            return plain_opening
        before, after = self.system or ("", "")
        system = f"{_literal_action(before)}{self._go_content('system')}{_literal_action(after)}"
        if self.place == "last":
            return (
                f"{{{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}}}{system}"
                f"{{{{ else }}}}{plain_opening}{{{{ end }}}}"
            )
        start = _literal_action(self.start)
        first_opening = f"{{{{ if $.System }}}}{system}{{{{ else }}}}{start}{{{{ end }}}}" if self.system else start
        return f"{{{{ if $first }}}}{first_opening}{{{{ $first = false }}}}{{{{ else }}}}{plain_opening}{{{{ end }}}}"

    def _go_content(self, role: str) -> str:
        """Return the Go action that prints a message's text, or the system prompt inside a user turn."""
        expression = "$.System" if role == "system" and self.place != "own" else ".Content"
        return _trim_action(expression) if role in self.trimmed else f"{{{{ {expression} }}}}"


def merge_consecutive_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Return `messages` as Ollama passes them to a template: consecutive messages of one role become one."""
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1] = merged[-1] | {"content": merged[-1]["content"] + "\n\n" + message["content"]}
        else:
            merged.append(dict(message))
    return merged


def _literal_action(text: str) -> str:
    """Return a Go action that prints a literal text, so that no trim marker removes its line ends."""
    return f"{{{{ {_quote_go_string(text)} }}}}" if text else ""


GO_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _quote_go_string(text: str) -> str:
    """Return a Go string literal. What is not printable is escaped, because Ollama's Modelfile parser drops it."""
    return '"' + "".join(GO_ESCAPES.get(c) or (c if c.isprintable() else _escape_character(c)) for c in text) + '"'


def _escape_character(character: str) -> str:
    """Return a character as an escape of Go: \\uXXXX or \\UXXXXXXXX."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def _trim_action(expression: str) -> str:
    """Return Go actions that print an expression without white space at its ends.

    Go's templates have no trim: `$s` becomes the index of the first byte that is not white space, `$e` the end of the
    last one.
    """
    spaces = " ".join(str(ord(c)) for c in WHITE_SPACE)
    return (
        f"{{{{ $t := {expression} }}}}{{{{ $s := len $t }}}}{{{{ $e := len $t }}}}"
        f"{{{{ range $at := len $t }}}}{{{{ if not (eq (index $t $at) {spaces}) }}}}"
        "{{ $s = $at }}{{ break }}{{ end }}{{ end }}"
        "{{ range $at := len (slice $t $s) }}{{ if $at }}{{ $cut := len (slice $t $at) }}"  # `$cut` counts down
        f"{{{{ if not (eq (index $t $cut) {spaces}) }}}}{{{{ break }}}}{{{{ end }}}}{{{{ $e = $cut }}}}"
        "{{ end }}{{ end }}{{ slice $t $s $e }}"
    )


def _contains_action(text: str, found_text: str, other_text: str) -> str:
    """Return Go actions that print `found_text` when the message contains `text`, else `other_text`.

    Go's templates have no search in a text either.
    """
    return (
        "{{ $t := .Content }}{{ $there := false }}{{ range $at := len $t }}"
        f"{{{{ if eq (index $t $at) {text.encode()[0]} }}}}"
        f'{{{{ if eq (printf "%.{len(text)}s" (slice $t $at)) {_quote_go_string(text)} }}}}'
        "{{ $there = true }}{{ break }}{{ end }}{{ end }}{{ end }}"
        f"{{{{ if $there }}}}{_literal_action(found_text)}{{{{ else }}}}{_literal_action(other_text)}{{{{ end }}}}"
    )


def find_modelfile_fault(text: str) -> str | None:
    """Return why a Modelfile cannot contain a text; None when it can.

    Its parser (Ollama 0.33, parser/parser.go) has no escapes, drops what is not printable, and ends a value at the
    first line that ends with the closing quotes.
    """
    if dropped_characters := sorted({c for c in text if not c.isprintable() and c not in "\n\r\t"}):
        return f"drops {', '.join(f'U+{ord(c):04X}' for c in dropped_characters)}"
    return 'cannot hold a line that ends with """' if re.search(r'"""[ \t]*[\r\n]', text) else None
