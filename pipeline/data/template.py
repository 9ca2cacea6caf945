"""The chat template that will be trained: the tokenizer's own or a named one, examined before any row is.

It travels into the GGUF as it leaves this module, so all that would make serving differ from training is settled
here: the date, the thinking mode, the BOS token, the token that ends an answer, the pad token.
"""

import contextlib
import datetime
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contract import chat, sandbox
from contract.errors import UserError
from pipeline import base as bases

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "templates"
RENDER_SECONDS = 30  # for one short conversation: a busy machine's Python takes some to start
OTHERS = "set data.template to another one (alpaca, zephyr and vicuna fit every tokenizer), or choose another base"
# How templates are told not to open a thinking block: rows without reasoning must be served as they were trained.
NO_THINKING = ("", "{%- set enable_thinking = false %}", "{%- set thinking = false %}")

# Texts that llama.cpp makes control tokens wherever a vocabulary holds them (src/llama-vocab.cpp, load).
PROMOTED = (
    "</s>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "<|code_prefix|>",
    "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>",
    "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>",
    "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip
DATES = (("date_string", "%d %b %Y"), ("datetime", "%b %d %Y"))  # llama.cpp's variables and their forms

SYSTEM = {"role": "system", "content": "Sigma rules."}
USER, AGAIN = {"role": "user", "content": "Upsilon asks?"}, {"role": "user", "content": "Omega asks?"}
ANSWER, SECOND = {"role": "assistant", "content": "Alpha says."}, {"role": "assistant", "content": "Beta says."}


@dataclass(frozen=True)
class Chat:
    """How a conversation becomes text, and where the assistant's words end."""

    template: str
    bos: str
    eos: str
    end: str
    """What follows an answer, up to its end token; appended where the template leaves it out (GLM, Apertus)."""
    ends: tuple[str, ...]
    """The texts of the tokens that end an answer; the first one ends the last answer."""
    scaffolds: tuple[str, ...]
    """What may stand between the generation prompt and the answer: the model must write it, so it carries loss."""
    system: bool
    """Whether a system prompt reaches the text."""
    specials: tuple[str, ...]
    """The tokenizer's special tokens: a row's own text must hold none."""
    joined: bool = False
    """A served prompt that no whole conversation holds (Gemma 4, QwQ): a row is prompt + answer + end, last answer only."""

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        return chat.render(self.template, messages, self.bos, self.eos, add_generation_prompt)

    @property
    def raw(self) -> bool:
        """Nothing is put around the words: then white space at their ends is part of them."""
        text = self.render([USER, ANSWER]).removeprefix(self.bos)
        return text.startswith(USER["content"] + ANSWER["content"])


def named() -> list[str]:
    """The templates that come with Ferry."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def load(
    folder: Path, name: str, day: datetime.date, reasoning: bool = False
) -> tuple["PreTrainedTokenizerFast", Chat, list[str]]:
    """The base's tokenizer with the template that will be trained, the template's facts, and what was changed in it.

    name: data.template; day: what the template's clock shows; reasoning: answers hold their own <think> part.
    Raises UserError when no row could be trained faithfully with it.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there is as it should be
    from transformers import AutoTokenizer

    with bases.explain_damaged_model(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        promoted = as_served(tokenizer)
    own = source(name, tokenizer.chat_template)
    refuse_hostile(own, tokenizer)
    text, dated = frozen_date(own, day)
    text, begun = with_bos(text, tokenizer)
    found, unthinking = faithful(text, tokenizer, reasoning)
    tokenizer.chat_template = found.template
    return tokenizer, found, [*promoted, *dated, *begun, *unthinking, *own_pad(tokenizer, found)]


def refuse_hostile(template: str, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raise UserError for a template that takes more time, memory or text than any honest one: it may be a stranger's."""
    try:
        render_in_sandbox(template, tokenizer.bos_token or "", tokenizer.eos_token or "")
    except UserError as error:
        raise UserError(error.message, OTHERS) from error


@functools.cache
def render_in_sandbox(template: str, bos: str, eos: str) -> None:
    """Render a short conversation, once a process: it takes 0.2 s. Raises UserError as the sandbox does."""
    sandbox.prompts(template, [([USER], True)], bos, eos, RENDER_SECONDS)


def source(name: str, own: str | dict | None) -> str:
    """The text of a template. own: the tokenizer's."""
    if name == "tokenizer":
        text = own.get("default") if isinstance(own, dict) else own
        if not text or not isinstance(text, str):
            raise UserError(
                "the base model's tokenizer has no chat template",
                f"set data.template to one of {', '.join(named())}, or to a .jinja file",
            )
        return text
    path = FOLDER / f"{name}.jinja" if name in named() else Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template: {path} cannot be read: {getattr(error, 'strerror', None) or error}",
            f"name a .jinja file, or one of tokenizer, {', '.join(named())}",
        ) from error


def as_served(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Ordinary words of the vocabulary that llama.cpp reads as control tokens become special here too, by the same id.

    Else text such as Qwen's '</s>' would be one thing in training and another in every runtime built on llama.cpp.
    """
    from transformers import AddedToken

    there, added = tokenizer.get_vocab(), {t.content for t in tokenizer.added_tokens_decoder.values()}
    words = [word for word in PROMOTED if word in there and word not in added]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words], special_tokens=True)
    return (
        [f"llama.cpp reads {' and '.join(words)} in a text as control tokens: so does the tokenizer now"]
        if words
        else []
    )


def frozen_date(template: str, day: datetime.date) -> tuple[str, list[str]]:
    """strftime_now("...") becomes that day's text: the same rows every day, and one date in every runtime.

    So do the variables in which llama.cpp's server hands every template today's date (common/chat.cpp): Llama 3.1 to 3.3
    take it from there before they ask any clock.
    """
    text = re.sub(r"strftime_now\s+is\s+(not\s+)?defined", lambda m: "false" if m[1] else "true", template)
    text = re.sub(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)", lambda m: repr(day.strftime(m[2])), text)
    text = "".join(f"{{%- set {name} = {day.strftime(form)!r} %}}" for name, form in DATES if used(name, text)) + text
    if "strftime_now" in text:
        raise UserError("the chat template computes a date in a way that cannot be frozen", OTHERS)
    changed = [f"the chat template shows a date: frozen to {day.isoformat()} (data.date)"] if text != template else []
    return text, changed


def used(name: str, template: str) -> bool:
    """Is it a variable of the template, in one of its tags?"""
    return any(re.search(rf"(?<![.'\"\w]){name}\b", tag) for tag in re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))


def with_bos(template: str, tokenizer: "PreTrainedTokenizerFast") -> tuple[str, list[str]]:
    """The template with exactly the BOS that runtimes will put there: one, if the tokenizer adds one."""
    bos = tokenizer.bos_token or ""
    text = chat.render(template, [USER], bos, tokenizer.eos_token or "")
    if bos and text.startswith(bos * 2):
        raise UserError(f"the chat template begins with {bos} twice", OTHERS)
    adds = bool(bos) and tokenizer.bos_token_id in tokenizer("").input_ids
    if not adds or text.startswith(bos):
        return template, []
    return "{{ bos_token }}" + template, [f"the chat template has no BOS and this tokenizer adds one: {bos} put first"]


def faithful(template: str, tokenizer: "PreTrainedTokenizerFast", reasoning: bool) -> tuple[Chat, list[str]]:
    """The template with which a trained conversation begins with the very prompt that will be served.

    A template that opens a thinking block when served gets its own switch turned off, unless the rows reason.
    """
    faults, found = [], []
    for switch in NO_THINKING[:1] if reasoning else NO_THINKING:
        try:
            seen = examine(switch + template, tokenizer)
            if not reasoning:
                unasked(seen)
            found.append((switch, seen))
        except UserError as error:
            faults.append(error)
    if not found:
        raise faults[0]
    # Best is a prompt that ends exactly where the answer begins, in a text that the template itself writes.
    switch, best = min(found, key=lambda item: (bool(item[1].scaffolds[0].strip()), item[1].joined))
    return best, [
        f"rows hold no reasoning: the template's thinking is off ({switch[2:-2].strip('- ')})"
    ] if switch else []


def unasked(seen: Chat) -> None:
    """Raises UserError where the prompt depends on a switch that llama.cpp's server and Ollama set by themselves."""
    plain, asked = (
        chat.render(seen.template, [USER], seen.bos, seen.eos, True, **switches)
        for switches in ({}, {"enable_thinking": True, "thinking": True})
    )
    if plain != asked:
        raise UserError(
            f"the chat template's prompt ends with {asked[-30:]!r} when a runtime asks it to think, and rows hold no reasoning",
            OTHERS,
        )


def examine(template: str, tokenizer: "PreTrainedTokenizerFast") -> Chat:
    """Render small conversations and read off what stands around an answer. Raises UserError when that is not clear."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    specials = tuple(sorted({t.content for t in tokenizer.added_tokens_decoder.values() if t.special}))

    def render(*messages: dict, prompt: bool = False) -> str:
        return chat.render(template, messages, bos, eos, prompt)

    if missing := chat.lacking(template, [USER, ANSWER], bos, eos):
        raise UserError(f"the chat template needs {', '.join(missing)}, which no row has", OTHERS)
    prompt = render(USER, prompt=True)
    scaffold, rest, joined = around(render(USER, ANSWER), prompt, ANSWER["content"])
    scaffolds, between = [scaffold], rest
    with contextlib.suppress(UserError):  # one exchange is all it can say: rows with more are rejected one by one
        first, tail, _ = around(render(USER, ANSWER, AGAIN, SECOND), prompt, ANSWER["content"])
        scaffolds, between = [scaffold, first, ""], tail.split(AGAIN["content"])[0]
    last, middle = end_of(rest, specials), end_of(between, specials)
    if not middle or not (last or not rest.strip()):
        raise UserError("the chat template ends an answer without a special token: the model would never stop", OTHERS)
    ends = [(last or middle).strip(), middle.strip()]
    return Chat(
        template, bos, eos, middle, tuple(dict.fromkeys(ends)), tuple(dict.fromkeys(scaffolds)), hears(render), specials, joined
    )  # fmt: skip


def around(text: str, prompt: str, answer: str) -> tuple[str, str, bool]:
    """What stands between the prompt and the answer, all that follows the answer, and whether they must be joined by hand.

    Raises UserError when what is served is not what would be trained.
    """
    before, found, rest = text.partition(answer)
    scaffold = before[len(prompt) :]
    # White space on both sides would be one token: the served prompt would not end where it ends here.
    apart = not (prompt[-1:].isspace() and scaffold[:1].isspace())
    # And what closes a thinking block that the prompt has opened would come before the row's own reasoning.
    balanced = scaffold.count("<think>") == scaffold.count("</think>")
    if found and before.startswith(prompt) and apart and balanced:
        return scaffold, rest, False
    extra = prompt.removeprefix(before)
    # An empty, closed thinking block may be put in front by the prompt alone; an open one asks for reasoning.
    if found and prompt.startswith(before) and extra.count("<think>") == extra.count("</think>"):
        return "", rest, True
    raise UserError(
        f"the chat template's prompt ends with {prompt[-30:]!r}, and the conversation it trains on does not go on from there",
        OTHERS,
    )


def end_of(text: str, specials: tuple[str, ...]) -> str:
    """White space and the first special token at the beginning of `text`; '' when there is none."""
    found = re.match(rf"\s*(?:{'|'.join(map(re.escape, specials))})", text) if specials else None
    return found[0] if found else ""


def hears(render) -> bool:
    """Does the text hold the system prompt?"""
    try:
        return SYSTEM["content"] in render(SYSTEM, USER, ANSWER)
    except UserError:
        return False


def own_pad(tokenizer: "PreTrainedTokenizerFast", found: Chat) -> list[str]:
    """Padding with a token that ends an answer would mask it out of the loss: the model would never learn to stop."""
    ends = {found.eos, *found.ends}
    if tokenizer.pad_token and tokenizer.pad_token not in ends:
        return []
    spare = sorted((t for t in found.specials if re.search("pad|reserved|unused", t)), key=lambda t: "pad" not in t)
    spare += [token for token in (tokenizer.unk_token, tokenizer.bos_token) if token]
    free = [token for token in spare if token not in ends]
    if not free:
        raise UserError(
            f"the tokenizer pads with {tokenizer.pad_token or 'nothing'}, which ends an answer, and has no spare token",
            "choose a base model with a pad token of its own",
        )
    before, tokenizer.pad_token = tokenizer.pad_token, free[0]
    return [
        f"the tokenizer pads with {before or 'nothing'}: changed to {free[0]}, so that the end token keeps its loss"
    ]
