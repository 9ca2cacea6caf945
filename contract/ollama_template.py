"""A chat template as the texts around each role's words: what an Ollama TEMPLATE can say.

Derived from the trained Jinja and proven on the cloud side (pipeline/verify/derive_template.py), carried by the manifest, written as a
Go template on the Mac side. `prompt` says in Python what `go` says in Go: the tests prove the two equal with Go's own
text/template.
"""

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

SPACE = " \t\n\r\v\f"
"""What a trimmed message loses at its ends. Jinja's trim also takes Unicode's white space."""

Pair = tuple[str, str]


class Turns(BaseModel):
    """What stands before and after each role's words; no BOS that a runtime's tokenizer adds by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: str
    """Before the first message when no system prompt is given: holds the template's own default one."""
    system: Pair | None
    """None: the format has no system prompt."""
    user: Pair
    assistant: Pair
    generate: str
    """After the last message: opens the answer."""
    place: Literal["own", "first", "last"] = "own"
    """Where the system prompt stands: in a turn of its own, inside the first or inside the last user turn.
    Inside a turn, `system` replaces what else opens it: for "first" that is `start`, for "last" `user`."""
    trimmed: tuple[str, ...] = ()
    """Roles whose words lose the white space at their ends."""
    marker: Pair | None = None
    """(text, what opens a user turn instead when the user's words hold that text), as Alpaca's '### Input:'."""

    def prompt(self, messages: Sequence[dict]) -> str:
        """The prompt for an answer to `messages`, fed as Ollama feeds its templates."""
        messages = collated(messages)
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        text = "" if self.place == "first" or (system and self.place == "own") else self.start
        for i, message in enumerate(messages):
            role, words = message["role"], self.trim(message["role"], message["content"])
            if role == "user":
                opening = self._opening(message["content"], system, i == users[0], i == len(messages) - 1)
                text += opening + words + self.user[1]
            elif role == "assistant":
                text += self.assistant[0] + words + self.assistant[1]
            elif role == "system" and self.system and self.place == "own":
                text += self.system[0] + words + self.system[1]
        return text + self.generate

    def _opening(self, words: str, system: str, first: bool, last: bool) -> str:
        """What opens a user turn."""
        here = {"own": False, "first": first, "last": last}[self.place]
        if here and system and self.system:
            return self.system[0] + self.trim("system", system) + self.system[1]
        if here and self.place == "first":
            return self.start
        return self.marker[1] if self.marker and self.marker[0] in words else self.user[0]

    def trim(self, role: str, words: str) -> str:
        return words.strip(SPACE) if role in self.trimmed else words

    def go(self) -> str:
        """The TEMPLATE. Needs Ollama's .System and .Messages, and no function beyond Go's own."""
        roles = [("user", self._go_opening() + self._go_words("user") + _say(self.user[1]))]
        roles += [("assistant", _say(self.assistant[0]) + self._go_words("assistant") + _say(self.assistant[1]))]
        if self.system and self.place == "own":
            roles.insert(0, ("system", _say(self.system[0]) + self._go_words("system") + _say(self.system[1])))
        branches = [f'{{{{- {"else " * (i > 0)}if eq .Role "{role}" }}}}{text}' for i, (role, text) in enumerate(roles)]
        loop = "{{- range $i, $m := .Messages }}" if self.place == "last" else "{{- range .Messages }}"
        lines = [*self._go_start(), loop, *branches, "{{- end }}", "{{- end }}" + _say(self.generate)]
        return "\n".join(lines)

    def _go_start(self) -> list[str]:
        if self.place == "first":
            return ["{{- $first := true }}"]
        if not self.start:
            return []
        return [
            f"{{{{- if not .System }}}}{_say(self.start)}{{{{ end }}}}" if self.place == "own" else _say(self.start)
        ]

    def _go_opening(self) -> str:
        """What opens a user turn: `$.System` inside it where the format has it there."""
        usual = _say(self.user[0])
        if self.marker:
            usual = _holds(*self.marker, self.user[0])
        if self.place == "own" or (self.place == "last" and not self.system):
            return usual
        before, after = self.system or ("", "")
        system = f"{_say(before)}{self._go_words('system')}{_say(after)}"
        if self.place == "last":
            return f"{{{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}}}{system}{{{{ else }}}}{usual}{{{{ end }}}}"
        start = _say(self.start)
        first = f"{{{{ if $.System }}}}{system}{{{{ else }}}}{start}{{{{ end }}}}" if self.system else start
        return f"{{{{ if $first }}}}{first}{{{{ $first = false }}}}{{{{ else }}}}{usual}{{{{ end }}}}"

    def _go_words(self, role: str) -> str:
        words = "$.System" if role == "system" and self.place != "own" else ".Content"
        return _trimmed(words) if role in self.trimmed else f"{{{{ {words} }}}}"


def collated(messages: Sequence[dict]) -> list[dict]:
    """As Ollama feeds a template: neighbours of one role become one message."""
    joined: list[dict] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = joined[-1] | {"content": joined[-1]["content"] + "\n\n" + message["content"]}
        else:
            joined.append(dict(message))
    return joined


def _say(text: str) -> str:
    """Literal text as an action, so that no trimming rule touches its line ends."""
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


ESCAPED = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _quoted(text: str) -> str:
    """As a Go string. Ollama's Modelfile parser drops what does not print, so that is escaped."""
    return '"' + "".join(ESCAPED.get(c) or (c if c.isprintable() else _escaped(c)) for c in text) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def _trimmed(words: str) -> str:
    """Go has no trim: `$s` becomes the first byte that is no white space, `$e` the end of the last one."""
    spaces = " ".join(str(ord(c)) for c in SPACE)
    return (
        f"{{{{ $t := {words} }}}}{{{{ $s := len $t }}}}{{{{ $e := len $t }}}}"
        f"{{{{ range $at := len $t }}}}{{{{ if not (eq (index $t $at) {spaces}) }}}}"
        "{{ $s = $at }}{{ break }}{{ end }}{{ end }}"
        "{{ range $at := len (slice $t $s) }}{{ if $at }}{{ $cut := len (slice $t $at) }}"  # counts down
        f"{{{{ if not (eq (index $t $cut) {spaces}) }}}}{{{{ break }}}}{{{{ end }}}}{{{{ $e = $cut }}}}"
        "{{ end }}{{ end }}{{ slice $t $s $e }}"
    )


def _holds(text: str, then: str, otherwise: str) -> str:
    """`then` where the message's words hold `text`, else `otherwise`: Go has no search in a text either."""
    return (
        "{{ $t := .Content }}{{ $there := false }}{{ range $at := len $t }}"
        f"{{{{ if eq (index $t $at) {text.encode()[0]} }}}}"
        f'{{{{ if eq (printf "%.{len(text)}s" (slice $t $at)) {_quoted(text)} }}}}'
        "{{ $there = true }}{{ break }}{{ end }}{{ end }}{{ end }}"
        f"{{{{ if $there }}}}{_say(then)}{{{{ else }}}}{_say(otherwise)}{{{{ end }}}}"
    )


def unsayable(text: str) -> str | None:
    """Why a Modelfile cannot hold a text. Its parser (Ollama 0.33, parser/parser.go) knows no escapes, drops what does not
    print, and ends a value with the first line that ends like its closing quotes."""
    if lost := sorted({c for c in text if not c.isprintable() and c not in "\n\r\t"}):
        return f"drops {', '.join(f'U+{ord(c):04X}' for c in lost)}"
    return 'cannot hold a line that ends with """' if re.search(r'"""[ \t]*[\r\n]', text) else None
