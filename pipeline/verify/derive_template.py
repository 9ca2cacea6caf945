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

SYSTEM, USERS, ANSWERS = "\x02S\x03", ("\x02U1\x03", "\x02U2\x03", "\x02U3\x03"), ("\x02A1\x03", "\x02A2\x03")
MARK = re.compile("\x02(?:S|U1|U2|U3|A1|A2)\x03")


def derive(render: Render, template: str, golden: Sequence[dict]) -> tuple[Turns | None, list[str]]:
    """Return the template as Turns that are proven on every golden conversation, and what Turns leave out.

    Args:
        render: Renders messages with the trained template.
        template: The trained Jinja template.
        golden: The golden conversations that ask for an answer, {"messages", "prompt" (as `render` gives it)} each.

    Returns:
        The Turns, or None when no Turns reproduce all prompts; and the reasons to use the template inside the GGUF.
    """
    reasons = has(template)
    looks, needles = watched(render)
    # With a string operation there is no TEMPLATE at all: the golden conversations cannot contain every such text.
    reasons += looks
    try:
        found = next((turns for turns in shapes(render, needles) if proven(turns, golden)), None)
        looks = looks or (listens(render, template, found) if found else [])
        if looks:
            return None, [*reasons, *(look for look in looks if look not in reasons)]
    except (UserError, ValueError) as error:
        return None, [*reasons, str(error).splitlines()[0]]
    if found is None:
        reasons.append("what stands around a message depends on more than its role")
    return found, reasons


def has(template: str) -> list[str]:
    """Return the features of a chat template that a TEMPLATE of ours does not support.

    With one of them Ollama (0.33, server/images.go: shouldPreferChatTemplate) silently prefers the template inside the
    GGUF, which gives the same prompt for plain conversations. The features are recognized as Ollama does it.
    """
    splits = any(f"content.split({q}</think>{q})" in template for q in "'\"")
    thinks = "<think>" in template and "</think>" in template
    thinks |= splits and "reasoning_content" not in template and "<SPECIAL_12>" not in template
    tools = "tools" in template or "tool_call" in template
    return [f"it has {name}" for name, there in (("tools", tools), ("thinking", thinks)) if there]


def proven(turns: Turns, golden: Sequence[dict]) -> bool:
    """Return whether Turns reproduce every golden prompt."""
    return all(turns.prompt(item["messages"]) == item["prompt"] for item in golden)


def shapes(render: Render, needles: list[str]) -> list[Turns]:
    """Return every interpretation of the probes, the usual ones first.

    Args:
        render: Renders messages with the trained template.
        literals: The texts that the template looks for in a user's message.

    Raises:
        ValueError: The template drops or repeats messages.
    """
    plain = _around(
        render,
        [
            ("user", USERS[0]),
            ("assistant", ANSWERS[0]),
            ("user", USERS[1]),
            ("assistant", ANSWERS[1]),
            ("user", USERS[2]),
        ],
    )
    asked = _around(render, [("user", USERS[0])], False)
    told = _around(render, [("user", USERS[0]), ("assistant", ANSWERS[0])], False)
    if plain is None or asked is None:
        raise ValueError("it drops or repeats messages")
    first, reply, again, _, _, end = plain
    after_user = asked[1] if end.startswith(asked[1]) and reply.startswith(asked[1]) else ""
    after_answer = told[2] if told and again.startswith(told[2]) else ""
    user, trimmed = again[len(after_answer) :], trims(render)
    common = {
        "user": (user, after_user),
        "assistant": (reply[len(after_user) :], after_answer),
        "generate": end[len(after_user) :],
        "trimmed": trimmed,
    }
    marker = marked(render, needles, first)
    start = first.removesuffix(user) if first.endswith(user) else None
    return [
        Turns(start=first if place == "first" else start, system=system, place=place, marker=marker, **common)
        for place, system in systems(render, user, asked[0])
        if start is not None or place == "first"
    ]


def systems(render: Render, user: str, start: str) -> list[tuple[str, tuple[str, str] | None]]:
    """Return the places where a system prompt may be, each with the texts before and after it.

    Args:
        render: Renders messages with the trained template.
        user: The text before a user's message.
        start: The text at the start of a conversation.
    """
    turns = [("system", SYSTEM), ("user", USERS[0]), ("assistant", ANSWERS[0]), ("user", USERS[1])]
    try:
        short, long = _around(render, turns[:2]), _around(render, turns)
    except UserError:
        short = long = None
    if short and long:
        own = [("own", (short[0], short[1].removesuffix(user)))] if short[1].endswith(user) else []
        return [*own, ("first", (short[0], short[1]))]
    if short:  # with more turns it is not at the start: some templates put it before the last question
        moved = _split(render([_message(*turn) for turn in turns], True))
        if [mark for mark, _ in moved[1:]] == [USERS[0], ANSWERS[0], SYSTEM, USERS[1]]:
            between = moved[2][1]
            answered = _around(render, turns[1:])
            cut = between[len(answered[2]) - len(user) :] if answered else between
            return [("last", (cut, moved[3][1]))]
    return [("own", None), ("first", None)]


def _message(role: str, words: str) -> dict:
    return {"role": role, "content": words}


def _around(render: Render, turns: Sequence[tuple[str, str]], prompt: bool = True) -> list[str] | None:
    """Return the texts before, between and after the contents of `turns`.

    Return None unless each content is in the prompt once, and in order.
    """
    pieces = _split(render([_message(*turn) for turn in turns], prompt))
    return [text for _, text in pieces] if [mark for mark, _ in pieces[1:]] == [words for _, words in turns] else None


def _split(text: str) -> list[tuple[str, str]]:
    """Return [("", the text before the first mark), (mark, the text after it), ...]."""
    return list(zip(["", *MARK.findall(text)], MARK.split(text), strict=True))


def trims(render: Render) -> tuple[str, ...]:
    """Return the roles whose messages lose the white space at both ends."""
    found = []
    turns = {"system": SYSTEM, "user": USERS[0], "assistant": ANSWERS[0]}
    for role, mark in turns.items():
        messages = [_message(r, f"\v{m}\v" if r == role else m) for r, m in turns.items() if r != "system" or role == r]
        try:
            text = render([*messages, _message("user", USERS[1])], True)
        except UserError:
            continue
        if f"\v{mark}" not in text and f"{mark}\v" not in text:
            found.append(role)
    return tuple(found)


def marked(render: Render, needles: list[str], usual: str) -> tuple[str, str] | None:
    """Return a text in a user's message that changes how the turn starts, such as Alpaca's '### Input:'.

    Args:
        render: Renders messages with the trained template.
        literals: The texts that the template looks for in a user's message.
        usual_start: The usual text before a user's message.

    Returns:
        The text and the start that it causes; None when there is no such text.
    """
    for needle in needles:
        pieces = _around(render, [("user", USERS[0])])
        text = render([_message("user", USERS[0] + needle)], True)
        if pieces and not text.startswith(usual + USERS[0]):
            return needle, text.split(USERS[0])[0]
    return None


# What the template does with the contents of a message

LOOKS = [
    "split", "rsplit", "partition", "rpartition", "splitlines", "startswith", "endswith", "find", "rfind", "index",
    "count", "replace", "lower", "upper", "title", "capitalize", "lstrip", "rstrip", "removeprefix", "removesuffix",
    "__getitem__", "__iter__", "__len__",
]  # fmt: skip


def watched(render: Render) -> tuple[list[str], list[str]]:
    """Return the string operations that the template uses on messages, and the texts it looks for in the user's."""
    seen: dict[str, set[str]] = {"system": set(), "user": set(), "assistant": set()}
    needles: list[str] = []
    turns = [("system", SYSTEM), ("user", USERS[0]), ("assistant", ANSWERS[0]), ("user", USERS[1])]
    for some in (turns, turns[1:]):
        try:
            render([_message(role, _Words(words, role, seen, needles)) for role, words in some], True)
        except UserError:
            continue
        break
    # A text that is looked for in the user's message can be expressed in Go (Turns.marker); nothing else can.
    if needles and len(set(needles)) == 1 and seen["user"] == {f"looks for {needles[0]!r}"}:
        seen["user"].clear()
    return [f"it {look} in what the {role} said" for role, looks in seen.items() for look in sorted(looks)], needles


def listens(render: Render, template: str, turns: Turns) -> list[str]:
    """Return the string operations that `record_string_ops` cannot see, such as those on a macro's result.

    Every text constant of the template is put into each message, and the rendered prompts are compared.
    """
    from jinja2 import nodes

    constants = chat_format.compiled(template).environment.parse(template).find_all(nodes.Const)
    texts = sorted({c.value for c in constants if isinstance(c.value, str) and c.value.strip()})
    said = {"system": SYSTEM} if turns.system else {}
    said |= {"user": USERS[0], "assistant": ANSWERS[0]}
    found = []
    for role, text in itertools.product(said, texts):
        for words in (text, f"{text} x", f"x {text}", f"x {text} y"):
            messages = [_message(r, words if r == role else usual) for r, usual in said.items()]
            messages.append(_message("user", USERS[1]))
            if not _gives(turns, render, messages):
                found.append(f"it looks for {text!r} in what the {role} said")
                break
    return found


def _gives(turns: Turns, render: Render, messages: Sequence[dict]) -> bool:
    """Return whether Turns and the trained template give the same prompt; False when the template refuses it."""
    try:
        return turns.prompt(messages) == render(messages, True)
    except UserError:
        return False


class _Words(str):
    """A string that records which operations a template uses on it."""

    def __new__(cls, text: str, role: str, seen: dict, needles: list[str]):
        words = super().__new__(cls, text)
        words.role, words.seen, words.needles = role, seen, needles
        return words

    def __contains__(self, text: str) -> bool:
        self.seen[self.role].add(f"looks for {text!r}")
        if self.role == "user":
            self.needles.append(text)
        return super().__contains__(text)

    def __bool__(self) -> bool:
        return super().__len__() > 0

    def strip(self, *chars: str) -> "_Words":
        return _Words(super().strip(*chars), self.role, self.seen, self.needles)


def _noting(name: str):
    """Return a method of str that records its use."""

    def method(self, *arguments):
        self.seen[self.role].add(f"uses {name.strip('_')}")
        return getattr(str, name)(self, *arguments)

    return method


for _name in LOOKS:
    setattr(_Words, _name, _noting(_name))
