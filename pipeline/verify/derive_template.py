"""Derive a Go TEMPLATE for Ollama from the trained Jinja template by rendering probes, without a table of model names.

Messages with marks are rendered, and the text around the marks is read from the result. The golden conversations then
prove or refuse it. When a TEMPLATE cannot express something, the reason is returned, and the template inside the GGUF
is used instead.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from common.errors import UserError
from contract import chat_format
from contract.ollama_template import TextPair, Turns

# (messages, add_generation_prompt) -> the text without a BOS that the runtime adds itself
Render = Callable[[Sequence[dict], bool], str]
# The place of a system prompt, and the texts before and after it, as Turns have them.
Placement = tuple[Literal["own", "first", "last"], TextPair | None]
SYSTEM_MARK, USER_MARKS, ANSWER_MARKS = (
    "\x02S\x03",
    ("\x02U1\x03", "\x02U2\x03", "\x02U3\x03"),
    ("\x02A1\x03", "\x02A2\x03"),
)
MARK_PATTERN = re.compile("\x02(?:S|U1|U2|U3|A1|A2)\x03")
ROLE_MARKS = {"system": SYSTEM_MARK, "user": USER_MARKS[0], "assistant": ANSWER_MARKS[0]}
LONG_PROBE = (
    ("user", USER_MARKS[0]),
    ("assistant", ANSWER_MARKS[0]),
    ("user", USER_MARKS[1]),
    ("assistant", ANSWER_MARKS[1]),
    ("user", USER_MARKS[2]),
)
SYSTEM_PROBE = (("system", SYSTEM_MARK), *LONG_PROBE[:3])


def derive_turns(render: Render, template: str, golden: Sequence[dict]) -> tuple[Turns | None, list[str]]:
    """Return the template as Turns that are proven on every golden conversation, and what Turns leave out.

    Args:
        render: Renders messages with the trained template.
        template: The trained Jinja template.
        golden: The golden conversations that ask for an answer, {"messages", "prompt" (as `render` gives it)} each.

    Returns:
        The Turns, or None when no Turns reproduce all prompts; and the reasons to use the template inside the GGUF.
    """
    reasons = unsupported_features(template)
    string_ops, literals = record_string_ops(render)
    # With a string operation there is no TEMPLATE at all: the golden conversations cannot contain every such text.
    reasons += string_ops
    try:
        derived_turns = next(
            (turns for turns in list_candidates(render, literals) if can_reproduce(turns, golden)), None
        )
        string_ops = string_ops or (probe_literals(render, template, derived_turns) if derived_turns else [])
        if string_ops:
            return None, [*reasons, *(string_op for string_op in string_ops if string_op not in reasons)]
    except (UserError, ValueError) as error:
        return None, [*reasons, str(error).splitlines()[0]]
    if derived_turns is None:
        reasons.append("the text around a message depends on more than its role")
    return derived_turns, reasons


def unsupported_features(template: str) -> list[str]:
    """Return the features of a chat template that a TEMPLATE of ours does not support, as Ollama recognizes them.

    With one of them Ollama (0.33, server/images.go: shouldPreferChatTemplate) silently prefers the template inside the
    GGUF, which gives the same prompt for plain conversations.
    """
    features = {"tools": "tools" in template or "tool_call" in template, "thinking": _has_thinking(template)}
    return [f"it has {name}" for name, is_present in features.items() if is_present]


def _has_thinking(template: str) -> bool:
    """Return whether Ollama takes a chat template for one that separates thinking from the answer."""
    if "<think>" in template and "</think>" in template:
        return True
    splits_thinking = any(f"content.split({quote}</think>{quote})" in template for quote in "'\"")
    return splits_thinking and "reasoning_content" not in template and "<SPECIAL_12>" not in template


def can_reproduce(turns: Turns, golden: Sequence[dict]) -> bool:
    """Return whether Turns reproduce every golden prompt."""
    return all(turns.render_prompt(item["messages"]) == item["prompt"] for item in golden)


def list_candidates(render: Render, literals: list[str]) -> list[Turns]:
    """Return every interpretation of the probes, the usual ones first.

    Args:
        render: Renders messages with the trained template.
        literals: The texts that the template looks for in a user's message.

    Raises:
        ValueError: The template drops or repeats messages.
    """
    texts = _surrounding_texts(render, LONG_PROBE)
    question_texts = _surrounding_texts(render, LONG_PROBE[:1], False)
    answer_texts = _surrounding_texts(render, LONG_PROBE[:2], False)
    if texts is None or question_texts is None:
        raise ValueError("it drops or repeats messages")
    first, reply, again, _, _, end = texts
    after_user = _keep_if_shared(question_texts[1], end, reply)
    after_answer = _keep_if_shared(answer_texts[2], again) if answer_texts else ""
    turns = Turns(
        start=first,
        system=None,
        user=(again[len(after_answer) :], after_user),
        assistant=(reply[len(after_user) :], after_answer),
        generate=end[len(after_user) :],
        trimmed=find_trimmed_roles(render),
        marker=find_marker(render, literals, first),
    )
    return place_system_prompt(turns, list_system_placements(render, turns.user[0]))


def _keep_if_shared(text: str, *others: str) -> str:
    """Return `text` when all others begin with it, else the empty text."""
    return text if all(other.startswith(text) for other in others) else ""


def place_system_prompt(turns: Turns, placements: Sequence[Placement]) -> list[Turns]:
    """Return the Turns with the system prompt at each place. The start is the text before the first user's message."""
    opening = turns.user[0]
    starts = {"first": turns.start}
    if turns.start.endswith(opening):
        starts["own"] = starts["last"] = turns.start.removesuffix(opening)
    return [
        turns.model_copy(update={"start": starts[place], "system": system, "place": place})
        for place, system in placements
        if place in starts
    ]


def list_system_placements(render: Render, user: str) -> list[Placement]:
    """Return the places where a system prompt may be, each with the texts before and after it.

    Args:
        render: Renders messages with the trained template.
        user: The text before a user's message.
    """
    try:
        short_texts = _surrounding_texts(render, SYSTEM_PROBE[:2])
        long_texts = _surrounding_texts(render, SYSTEM_PROBE)
    except UserError:
        return [("own", None), ("first", None)]
    if short_texts and long_texts:
        before, after = short_texts[:2]
        first_turn: Placement = ("first", (before, after))
        return [("own", (before, after.removesuffix(user))), first_turn] if after.endswith(user) else [first_turn]
    if short_texts and (last_turn := _find_late_placement(render, user)):
        return [last_turn]
    return [("own", None), ("first", None)]


def _find_late_placement(render: Render, user: str) -> Placement | None:
    """Return the place before the last question, where some templates put a system prompt; None if it is elsewhere."""
    pieces = _split_at_marks(render([_build_message(*turn) for turn in SYSTEM_PROBE], True))
    if [mark for mark, _ in pieces[1:]] != [USER_MARKS[0], ANSWER_MARKS[0], SYSTEM_MARK, USER_MARKS[1]]:
        return None
    before, after = pieces[2][1], pieces[3][1]
    if answered_texts := _surrounding_texts(render, SYSTEM_PROBE[1:]):
        before = before[len(answered_texts[2]) - len(user) :]
    return "last", (before, after)


def _build_message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _surrounding_texts(
    render: Render, turns: Sequence[tuple[str, str]], add_generation_prompt: bool = True
) -> list[str] | None:
    """Return the texts before, between and after the contents; None unless each is in the prompt once, and in order."""
    pieces = _split_at_marks(render([_build_message(*turn) for turn in turns], add_generation_prompt))
    contents = [content for _, content in turns]
    return [text for _, text in pieces] if [mark for mark, _ in pieces[1:]] == contents else None


def _split_at_marks(text: str) -> list[tuple[str, str]]:
    """Return [("", the text before the first mark), (mark, the text after it), ...]."""
    return list(zip(["", *MARK_PATTERN.findall(text)], MARK_PATTERN.split(text), strict=True))


def find_trimmed_roles(render: Render) -> tuple[str, ...]:
    """Return the roles whose messages lose the white space at both ends."""
    return tuple(role for role in ROLE_MARKS if _is_trimmed(render, role))


def _is_trimmed(render: Render, role: str) -> bool:
    """Return whether messages of a role lose the white space at both ends; False when the template refuses them."""
    mark = ROLE_MARKS[role]
    contents = ROLE_MARKS | {role: f"\v{mark}\v"}
    messages = [_build_message(name, contents[name]) for name in contents if name != "system" or role == "system"]
    try:
        text = render([*messages, _build_message("user", USER_MARKS[1])], True)
    except UserError:
        return False
    return f"\v{mark}" not in text and f"{mark}\v" not in text


def find_marker(render: Render, literals: list[str], usual_start: str) -> tuple[str, str] | None:
    """Return the text in a user's message that changes how the turn starts, such as '### Input:', and that start."""
    for literal in literals:
        pieces = _surrounding_texts(render, LONG_PROBE[:1])
        text = render([_build_message("user", USER_MARKS[0] + literal)], True)
        if pieces and not text.startswith(usual_start + USER_MARKS[0]):
            return literal, text.split(USER_MARKS[0])[0]
    return None


# What the template does with the contents of a message

STRING_METHODS = [
    "split", "rsplit", "partition", "rpartition", "splitlines", "startswith", "endswith", "find", "rfind", "index",
    "count", "replace", "lower", "upper", "title", "capitalize", "lstrip", "rstrip", "removeprefix", "removesuffix",
    "__getitem__", "__iter__", "__len__",
]  # fmt: skip


def record_string_ops(render: Render) -> tuple[list[str], list[str]]:
    """Return the string operations that the template uses on messages, and the texts it looks for in the user's."""
    recorder = _Recorder()
    if not _render_and_record(render, SYSTEM_PROBE, recorder):
        _render_and_record(render, SYSTEM_PROBE[1:], recorder)
    operations, literals = recorder.operations, recorder.literals
    # A text that is looked for in the user's message can be expressed in Go (Turns.marker); nothing else can.
    if literals and len(set(literals)) == 1 and operations["user"] == {f"looks for {literals[0]!r}"}:
        operations["user"].clear()
    return [
        f"it {name} in what the {role} said" for role, names in operations.items() for name in sorted(names)
    ], literals


def _render_and_record(render: Render, turns: Sequence[tuple[str, str]], recorder: "_Recorder") -> bool:
    """Render a conversation whose contents record what is done with them; return False when the template refuses it."""
    try:
        render([_build_message(role, _RecordingStr(content, role, recorder)) for role, content in turns], True)
    except UserError:
        return False
    return True


def probe_literals(render: Render, template: str, turns: Turns) -> list[str]:
    """Return the string operations that `record_string_ops` cannot see, such as those on a macro's result.

    Every text constant of the template is put into each message, and the rendered prompts are compared.
    """
    roles = ROLE_MARKS if turns.system else [role for role in ROLE_MARKS if role != "system"]
    contents = {role: ROLE_MARKS[role] for role in roles}
    return [
        f"it looks for {literal!r} in what the {role} said"
        for role, literal in itertools.product(contents, _list_text_constants(template))
        if _changes_prompt(render, turns, contents, role, literal)
    ]


def _list_text_constants(template: str) -> list[str]:
    """Return the texts in the expressions of a template, without those of white space."""
    from jinja2 import nodes

    constants = chat_format.compile_template(template).environment.parse(template).find_all(nodes.Const)
    texts = {constant.value for constant in constants if isinstance(constant.value, str)}
    return sorted(text for text in texts if text.strip())


def _changes_prompt(render: Render, turns: Turns, contents: dict[str, str], role: str, literal: str) -> bool:
    """Return whether a text in the message of a role gives another prompt than the Turns, in one of its positions."""
    for content in (literal, f"{literal} x", f"x {literal}", f"x {literal} y"):
        messages = [_build_message(*turn) for turn in (contents | {role: content}).items()]
        messages.append(_build_message("user", USER_MARKS[1]))
        if not _has_same_prompt(turns, render, messages):
            return True
    return False


def _has_same_prompt(turns: Turns, render: Render, messages: Sequence[dict]) -> bool:
    """Return whether Turns and the trained template give the same prompt; False when the template refuses it."""
    try:
        return turns.render_prompt(messages) == render(messages, True)
    except UserError:
        return False


@dataclass(frozen=True)
class _Recorder:
    """The string operations that a template uses, by role, and the texts that it looks for in a user's message."""

    operations: dict[str, set[str]] = field(default_factory=lambda: {role: set() for role in ROLE_MARKS})
    literals: list[str] = field(default_factory=list)


class _RecordingStr(str):
    """A string that records which operations a template uses on it."""

    role: str
    recorder: _Recorder

    def __new__(cls, text: str, role: str, recorder: _Recorder) -> Self:
        string = super().__new__(cls, text)
        string.role, string.recorder = role, recorder
        return string

    def __contains__(self, text: str) -> bool:  # type: ignore[override]  # str itself declares it so
        self.recorder.operations[self.role].add(f"looks for {text!r}")
        if self.role == "user":
            self.recorder.literals.append(text)
        return super().__contains__(text)

    def __bool__(self) -> bool:
        return super().__len__() > 0

    def strip(self, chars: str | None = None, /) -> "_RecordingStr":
        return _RecordingStr(super().strip(chars), self.role, self.recorder)


def _record_method(name: str) -> Callable[..., Any]:
    """Return a method of str that records its use."""

    def method(self: _RecordingStr, *arguments: Any) -> Any:
        self.recorder.operations[self.role].add(f"uses {name.strip('_')}")
        return getattr(str, name)(self, *arguments)

    return method


for _method_name in STRING_METHODS:
    setattr(_RecordingStr, _method_name, _record_method(_method_name))
