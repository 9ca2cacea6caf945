"""Derive a Go TEMPLATE for Ollama from the trained Jinja template by rendering probes, without a table of model names.

Messages with marks are rendered, and the text around the marks is read from the result. The golden conversations then
prove or refuse it. When a TEMPLATE cannot express something, the reason is returned, and the template inside the GGUF
is used instead.
"""

import itertools
import re
from collections.abc import Callable, Sequence

from common.errors import UserError
from contract import chat_format
from contract.ollama_template import Turns

# (messages, add_generation_prompt) -> the text without a BOS that the runtime adds itself
Render = Callable[[Sequence[dict], bool], str]

SYSTEM_MARK, USER_MARKS, ANSWER_MARKS = (
    "\x02S\x03",
    ("\x02U1\x03", "\x02U2\x03", "\x02U3\x03"),
    ("\x02A1\x03", "\x02A2\x03"),
)
MARK_PATTERN = re.compile("\x02(?:S|U1|U2|U3|A1|A2)\x03")


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
    """Return the features of a chat template that a TEMPLATE of ours does not support.

    With one of them Ollama (0.33, server/images.go: shouldPreferChatTemplate) silently prefers the template inside the
    GGUF, which gives the same prompt for plain conversations. The features are recognized as Ollama does it.
    """
    splits_thinking = any(f"content.split({quote}</think>{quote})" in template for quote in "'\"")
    has_thinking = "<think>" in template and "</think>" in template
    has_thinking |= splits_thinking and "reasoning_content" not in template and "<SPECIAL_12>" not in template
    has_tools = "tools" in template or "tool_call" in template
    return [f"it has {name}" for name, is_present in (("tools", has_tools), ("thinking", has_thinking)) if is_present]


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
    texts = _surrounding_texts(
        render,
        [
            ("user", USER_MARKS[0]),
            ("assistant", ANSWER_MARKS[0]),
            ("user", USER_MARKS[1]),
            ("assistant", ANSWER_MARKS[1]),
            ("user", USER_MARKS[2]),
        ],
    )
    question_texts = _surrounding_texts(render, [("user", USER_MARKS[0])], False)
    answer_texts = _surrounding_texts(render, [("user", USER_MARKS[0]), ("assistant", ANSWER_MARKS[0])], False)
    if texts is None or question_texts is None:
        raise ValueError("it drops or repeats messages")
    first, reply, again, _, _, end = texts
    after_user = question_texts[1] if end.startswith(question_texts[1]) and reply.startswith(question_texts[1]) else ""
    after_answer = answer_texts[2] if answer_texts and again.startswith(answer_texts[2]) else ""
    user, trimmed = again[len(after_answer) :], find_trimmed_roles(render)
    fields = {
        "user": (user, after_user),
        "assistant": (reply[len(after_user) :], after_answer),
        "generate": end[len(after_user) :],
        "trimmed": trimmed,
    }
    marker = find_marker(render, literals, first)
    start = first.removesuffix(user) if first.endswith(user) else None
    return [
        Turns(start=first if place == "first" else start, system=system, place=place, marker=marker, **fields)
        for place, system in list_system_placements(render, user, question_texts[0])
        if start is not None or place == "first"
    ]


def list_system_placements(render: Render, user: str, start: str) -> list[tuple[str, tuple[str, str] | None]]:
    """Return the places where a system prompt may be, each with the texts before and after it.

    Args:
        render: Renders messages with the trained template.
        user: The text before a user's message.
        start: The text at the start of a conversation.
    """
    probe_turns = [
        ("system", SYSTEM_MARK),
        ("user", USER_MARKS[0]),
        ("assistant", ANSWER_MARKS[0]),
        ("user", USER_MARKS[1]),
    ]
    try:
        short_texts, long_texts = _surrounding_texts(render, probe_turns[:2]), _surrounding_texts(render, probe_turns)
    except UserError:
        short_texts = long_texts = None
    if short_texts and long_texts:
        own_turn = (
            [("own", (short_texts[0], short_texts[1].removesuffix(user)))] if short_texts[1].endswith(user) else []
        )
        return [*own_turn, ("first", (short_texts[0], short_texts[1]))]
    if short_texts:  # with more turns it is not at the start: some templates put it before the last question
        pieces = _split_at_marks(render([_build_message(*turn) for turn in probe_turns], True))
        if [mark for mark, _ in pieces[1:]] == [USER_MARKS[0], ANSWER_MARKS[0], SYSTEM_MARK, USER_MARKS[1]]:
            between = pieces[2][1]
            answered_texts = _surrounding_texts(render, probe_turns[1:])
            cut = between[len(answered_texts[2]) - len(user) :] if answered_texts else between
            return [("last", (cut, pieces[3][1]))]
    return [("own", None), ("first", None)]


def _build_message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _surrounding_texts(
    render: Render, turns: Sequence[tuple[str, str]], add_generation_prompt: bool = True
) -> list[str] | None:
    """Return the texts before, between and after the contents of `turns`.

    Return None unless each content is in the prompt once, and in order.
    """
    pieces = _split_at_marks(render([_build_message(*turn) for turn in turns], add_generation_prompt))
    return (
        [text for _, text in pieces] if [mark for mark, _ in pieces[1:]] == [content for _, content in turns] else None
    )


def _split_at_marks(text: str) -> list[tuple[str, str]]:
    """Return [("", the text before the first mark), (mark, the text after it), ...]."""
    return list(zip(["", *MARK_PATTERN.findall(text)], MARK_PATTERN.split(text), strict=True))


def find_trimmed_roles(render: Render) -> tuple[str, ...]:
    """Return the roles whose messages lose the white space at both ends."""
    roles = []
    marks = {"system": SYSTEM_MARK, "user": USER_MARKS[0], "assistant": ANSWER_MARKS[0]}
    for role, mark in marks.items():
        messages = [
            _build_message(other_role, f"\v{other_mark}\v" if other_role == role else other_mark)
            for other_role, other_mark in marks.items()
            if other_role != "system" or role == other_role
        ]
        try:
            text = render([*messages, _build_message("user", USER_MARKS[1])], True)
        except UserError:
            continue
        if f"\v{mark}" not in text and f"{mark}\v" not in text:
            roles.append(role)
    return tuple(roles)


def find_marker(render: Render, literals: list[str], usual_start: str) -> tuple[str, str] | None:
    """Return a text in a user's message that changes how the turn starts, such as Alpaca's '### Input:'.

    Args:
        render: Renders messages with the trained template.
        literals: The texts that the template looks for in a user's message.
        usual_start: The usual text before a user's message.

    Returns:
        The text and the start that it causes; None when there is no such text.
    """
    for literal in literals:
        pieces = _surrounding_texts(render, [("user", USER_MARKS[0])])
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
    operations: dict[str, set[str]] = {"system": set(), "user": set(), "assistant": set()}
    literals: list[str] = []
    turns = [("system", SYSTEM_MARK), ("user", USER_MARKS[0]), ("assistant", ANSWER_MARKS[0]), ("user", USER_MARKS[1])]
    for probe in (turns, turns[1:]):
        try:
            render(
                [_build_message(role, _RecordingStr(content, role, operations, literals)) for role, content in probe],
                True,
            )
        except UserError:
            continue
        break
    # A text that is looked for in the user's message can be expressed in Go (Turns.marker); nothing else can.
    if literals and len(set(literals)) == 1 and operations["user"] == {f"looks for {literals[0]!r}"}:
        operations["user"].clear()
    return [
        f"it {name} in what the {role} said" for role, names in operations.items() for name in sorted(names)
    ], literals


def probe_literals(render: Render, template: str, turns: Turns) -> list[str]:
    """Return the string operations that `record_string_ops` cannot see, such as those on a macro's result.

    Every text constant of the template is put into each message, and the rendered prompts are compared.
    """
    from jinja2 import nodes

    constants = chat_format.compile_template(template).environment.parse(template).find_all(nodes.Const)
    literals = sorted(
        {constant.value for constant in constants if isinstance(constant.value, str) and constant.value.strip()}
    )
    contents = {"system": SYSTEM_MARK} if turns.system else {}
    contents |= {"user": USER_MARKS[0], "assistant": ANSWER_MARKS[0]}
    reasons = []
    for role, literal in itertools.product(contents, literals):
        for content in (literal, f"{literal} x", f"x {literal}", f"x {literal} y"):
            messages = [
                _build_message(other_role, content if other_role == role else usual_content)
                for other_role, usual_content in contents.items()
            ]
            messages.append(_build_message("user", USER_MARKS[1]))
            if not _has_same_prompt(turns, render, messages):
                reasons.append(f"it looks for {literal!r} in what the {role} said")
                break
    return reasons


def _has_same_prompt(turns: Turns, render: Render, messages: Sequence[dict]) -> bool:
    """Return whether Turns and the trained template give the same prompt; False when the template refuses it."""
    try:
        return turns.render_prompt(messages) == render(messages, True)
    except UserError:
        return False


class _RecordingStr(str):
    """A string that records which operations a template uses on it."""

    def __new__(cls, text: str, role: str, operations: dict, literals: list[str]):
        string = super().__new__(cls, text)
        string.role, string.operations, string.literals = role, operations, literals
        return string

    def __contains__(self, text: str) -> bool:
        self.operations[self.role].add(f"looks for {text!r}")
        if self.role == "user":
            self.literals.append(text)
        return super().__contains__(text)

    def __bool__(self) -> bool:
        return super().__len__() > 0

    def strip(self, *chars: str) -> "_RecordingStr":
        return _RecordingStr(super().strip(*chars), self.role, self.operations, self.literals)


def _record_method(name: str):
    """Return a method of str that records its use."""

    def method(self, *arguments):
        self.operations[self.role].add(f"uses {name.strip('_')}")
        return getattr(str, name)(self, *arguments)

    return method


for _method_name in STRING_METHODS:
    setattr(_RecordingStr, _method_name, _record_method(_method_name))
