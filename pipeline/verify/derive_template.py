"""A Go TEMPLATE for Ollama, read off the trained Jinja by rendering probes: no table of model names.

Marked messages are rendered and what stands around the marks is read off; the golden conversations then prove or
refuse the result. What a TEMPLATE cannot say is said as a reason, and the template inside the GGUF is used instead.
"""

import itertools
import re
from collections.abc import Callable, Sequence

from common.errors import UserError
from contract import chat_format
from contract.ollama_template import Turns

# (messages, add_generation_prompt) -> text without the BOS that the runtime puts there itself
Render = Callable[[Sequence[dict], bool], str]

SYSTEM, USERS, ANSWERS = "\x02S\x03", ("\x02U1\x03", "\x02U2\x03", "\x02U3\x03"), ("\x02A1\x03", "\x02A2\x03")
MARK = re.compile("\x02(?:S|U1|U2|U3|A1|A2)\x03")


def derive(render: Render, template: str, golden: Sequence[dict]) -> tuple[Turns | None, list[str]]:
    """The template as Turns, proven on every golden conversation that asks for an answer, and what it leaves out.

    golden: {"messages", "prompt" (as `render` gives it)}. None: no Turns give them all.
    """
    reasons = has(template)
    looks, needles = watched(render)
    reasons += looks  # then it is not for a TEMPLATE at all: the golden conversations cannot hold every such text
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
    """What a TEMPLATE of ours cannot do. Ollama (0.33, server/images.go: shouldPreferChatTemplate) then silently prefers the
    template inside the GGUF, which for plain conversations gives the same prompt. The signs are Ollama's own."""
    splits = any(f"content.split({q}</think>{q})" in template for q in "'\"")
    thinks = "<think>" in template and "</think>" in template
    thinks |= splits and "reasoning_content" not in template and "<SPECIAL_12>" not in template
    tools = "tools" in template or "tool_call" in template
    return [f"it has {name}" for name, there in (("tools", tools), ("thinking", thinks)) if there]


def proven(turns: Turns, golden: Sequence[dict]) -> bool:
    return all(turns.prompt(item["messages"]) == item["prompt"] for item in golden)


def shapes(render: Render, needles: list[str]) -> list[Turns]:
    """Every reading of the probes, the usual ones first."""
    plain = _around(render, [("user", USERS[0]), ("assistant", ANSWERS[0]), ("user", USERS[1]), ("assistant", ANSWERS[1]), ("user", USERS[2])])  # fmt: skip
    asked = _around(render, [("user", USERS[0])], False)
    told = _around(render, [("user", USERS[0]), ("assistant", ANSWERS[0])], False)
    if plain is None or asked is None:
        raise ValueError("it drops or repeats messages")
    first, reply, again, _, _, end = plain
    after_user = asked[1] if end.startswith(asked[1]) and reply.startswith(asked[1]) else ""
    after_answer = told[2] if told and again.startswith(told[2]) else ""
    user, trimmed = again[len(after_answer) :], trims(render)
    common = {
        "user": (user, after_user), "assistant": (reply[len(after_user) :], after_answer),
        "generate": end[len(after_user) :], "trimmed": trimmed,
    }  # fmt: skip
    marker = marked(render, needles, first)
    start = first.removesuffix(user) if first.endswith(user) else None
    return [
        Turns(start=first if place == "first" else start, system=system, place=place, marker=marker, **common)
        for place, system in systems(render, user, asked[0])
        if start is not None or place == "first"
    ]


def systems(render: Render, user: str, start: str) -> list[tuple[str, tuple[str, str] | None]]:
    """Where a system prompt may stand, and what stands around it."""
    turns = [("system", SYSTEM), ("user", USERS[0]), ("assistant", ANSWERS[0]), ("user", USERS[1])]
    try:
        short, long = _around(render, turns[:2]), _around(render, turns)
    except UserError:
        short = long = None
    if short and long:
        own = [("own", (short[0], short[1].removesuffix(user)))] if short[1].endswith(user) else []
        return [*own, ("first", (short[0], short[1]))]
    if short:  # with more turns it is no longer in front: some put it before the last question
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
    """The texts before, between and after the words of `turns`; None when they do not come in order, each once."""
    pieces = _split(render([_message(*turn) for turn in turns], prompt))
    return [text for _, text in pieces] if [mark for mark, _ in pieces[1:]] == [words for _, words in turns] else None


def _split(text: str) -> list[tuple[str, str]]:
    """[("", before the first mark), (mark, what follows it), ...]"""
    return list(zip(["", *MARK.findall(text)], MARK.split(text), strict=True))


def trims(render: Render) -> tuple[str, ...]:
    """Roles whose words lose the white space at their ends."""
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
    """The text that makes a user turn open otherwise, as Alpaca's '### Input:'."""
    for needle in needles:
        pieces = _around(render, [("user", USERS[0])])
        text = render([_message("user", USERS[0] + needle)], True)
        if pieces and not text.startswith(usual + USERS[0]):
            return needle, text.split(USERS[0])[0]
    return None


# --- what the template does with the words themselves

LOOKS = ["split", "rsplit", "partition", "rpartition", "splitlines", "startswith", "endswith", "find", "rfind", "index", "count", "replace", "lower", "upper", "title", "capitalize", "lstrip", "rstrip", "removeprefix", "removesuffix", "__getitem__", "__iter__", "__len__"]  # fmt: skip


def watched(render: Render) -> tuple[list[str], list[str]]:
    """What the template asks of a message's own words, and the texts it looks for in a user's."""
    seen: dict[str, set[str]] = {"system": set(), "user": set(), "assistant": set()}
    needles: list[str] = []
    turns = [("system", SYSTEM), ("user", USERS[0]), ("assistant", ANSWERS[0]), ("user", USERS[1])]
    for some in (turns, turns[1:]):
        try:
            render([_message(role, _Words(words, role, seen, needles)) for role, words in some], True)
        except UserError:
            continue
        break
    # A text looked for in what the user said can be said in Go (Turns.marker); everything else cannot.
    if needles and len(set(needles)) == 1 and seen["user"] == {f"looks for {needles[0]!r}"}:
        seen["user"].clear()
    return [f"it {look} in what the {role} said" for role, looks in seen.items() for look in sorted(looks)], needles


def listens(render: Render, template: str, turns: Turns) -> list[str]:
    """What `watched` cannot see, as where words pass a macro first: every text that the template holds is put into them."""
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
    try:
        return turns.prompt(messages) == render(messages, True)
    except UserError:
        return False


class _Words(str):
    """Words that note what a template asks of them."""

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
    def method(self, *arguments):
        self.seen[self.role].add(f"uses {name.strip('_')}")
        return getattr(str, name)(self, *arguments)

    return method


for _name in LOOKS:
    setattr(_Words, _name, _noting(_name))
