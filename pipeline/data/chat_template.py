"""Load the chat template that will be trained, the tokenizer's own or a named one, and check it before any row is read.

The template goes into the GGUF exactly as it leaves this module. Everything that could make serving differ from
training is therefore settled here: the date, the thinking mode, the BOS token, the token that ends an answer, and the
pad token.
"""

import contextlib
import datetime
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from contract import chat_format, template_sandbox
from pipeline.base_model import model_config
from pipeline.config.references import TEMPLATE_FOLDER, list_template_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RENDER_SECONDS = 30  # timeout for one short conversation; on a busy machine Python itself takes a few to start
OTHERS = "set data.template to another one (alpaca, zephyr and vicuna fit every tokenizer), or choose another base"
# Prefixes that keep a template from opening a thinking block: rows without reasoning must be served as trained.
NO_THINKING = ("", "{%- set enable_thinking = false %}", "{%- set thinking = false %}")

# Texts that llama.cpp turns into control tokens in every vocabulary that holds them (src/llama-vocab.cpp, load).
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
# Variables that llama.cpp's server sets to today's date, and their formats.
DATES = (("date_string", "%d %b %Y"), ("datetime", "%b %d %Y"))

SYSTEM = {"role": "system", "content": "Sigma rules."}
USER, AGAIN = {"role": "user", "content": "Upsilon asks?"}, {"role": "user", "content": "Omega asks?"}
ANSWER, SECOND = {"role": "assistant", "content": "Alpha says."}, {"role": "assistant", "content": "Beta says."}


@dataclass(frozen=True)
class Chat:
    """The format of a conversation as text, and where an answer of the assistant ends in it."""

    template: str
    bos: str
    eos: str
    end: str
    """The text behind an answer, up to and with its end token; added where the template omits it (GLM, Apertus)."""
    ends: tuple[str, ...]
    """The texts of the tokens that can end an answer; the first of them ends the last answer."""
    scaffolds: tuple[str, ...]
    """The texts that may stand between prompt and answer: the model must write them, so they carry loss."""
    system: bool
    """Whether a system prompt appears in the rendered text."""
    specials: tuple[str, ...]
    """The tokenizer's special tokens; a row's own text must hold none of them."""
    joined: bool = False
    """Whether no rendered conversation begins with the prompt that is served (Gemma 4, QwQ). A row is then joined from
    prompt, answer and answer_end, and only its last answer is trained."""

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Return the conversation as text."""
        return chat_format.render(self.template, messages, self.bos, self.eos, add_generation_prompt)

    @property
    def raw(self) -> bool:
        """Whether the template adds nothing around a turn's text, so that white space at its ends belongs to it."""
        text = self.render([USER, ANSWER]).removeprefix(self.bos)
        return text.startswith(USER["content"] + ANSWER["content"])


def load(
    folder: Path, name: str, day: datetime.date, reasoning: bool = False
) -> tuple["PreTrainedTokenizerFast", Chat, list[str]]:
    """Load the base model's tokenizer and give it the chat template that will be trained.

    Args:
        folder: The folder of the base model's tokenizer.
        name: The setting data.template.
        day: The date that the template shows.
        has_reasoning: Whether the answers hold their own <think> part.

    Returns:
        The tokenizer, the format of its template, and a sentence for each change that was made.

    Raises:
        UserError: No row could be trained faithfully with this template.
    """
    # transformers would warn that torch is missing, which `data` does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    with model_config.explain_damaged_model(folder):
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
    """Raise UserError for a template that needs more time, memory or text than any honest one.

    The template may come from a stranger, so it is rendered in a sandbox first.
    """
    try:
        template_sandbox.prompts(
            template, [([USER], True)], tokenizer.bos_token or "", tokenizer.eos_token or "", RENDER_SECONDS
        )
    except UserError as error:
        raise UserError(error.message, OTHERS) from error


def source(name: str, own: str | dict | None) -> str:
    """Return the text of a chat template.

    Args:
        name: The setting data.template: `tokenizer`, a template that comes with Ferry, or a .jinja file.
        own_template: The tokenizer's own template; a dict where it has several.

    Raises:
        UserError: The tokenizer has no template, or the file cannot be read.
    """
    if name == "tokenizer":
        text = own.get("default") if isinstance(own, dict) else own
        if not text or not isinstance(text, str):
            raise UserError(
                "the base model's tokenizer has no chat template",
                f"set data.template to one of {', '.join(list_template_names())}, or to a .jinja file",
            )
        return text
    path = TEMPLATE_FOLDER / f"{name}.jinja" if name in list_template_names() else Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template: {path} cannot be read: {getattr(error, 'strerror', None) or error}",
            f"name a .jinja file, or one of tokenizer, {', '.join(list_template_names())}",
        ) from error


def as_served(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Make the words that llama.cpp reads as control tokens special tokens of the tokenizer too, with the same ids.

    Otherwise a text such as Qwen's '</s>' would have other tokens in training than in every runtime built on llama.cpp.

    Returns:
        A sentence about the change, if there was one.
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
    """Replace today's date in a template by `day`, so that the rows and all runtimes always show the same date.

    This concerns calls of strftime_now("...") and the variables in which llama.cpp's server passes today's date to
    every template (common/chat.cpp): Llama 3.1 to 3.3 prefer the variables to strftime_now.

    Returns:
        The template, and a sentence about the change, if there was one.
    """
    text = re.sub(r"strftime_now\s+is\s+(not\s+)?defined", lambda m: "false" if m[1] else "true", template)
    text = re.sub(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)", lambda m: repr(day.strftime(m[2])), text)
    text = "".join(f"{{%- set {name} = {day.strftime(form)!r} %}}" for name, form in DATES if used(name, text)) + text
    if "strftime_now" in text:
        raise UserError("the chat template computes a date in a way that cannot be frozen", OTHERS)
    changed = [f"the chat template shows a date: frozen to {day.isoformat()} (data.date)"] if text != template else []
    return text, changed


def used(name: str, template: str) -> bool:
    """Return whether a tag of the template uses the variable `name`."""
    return any(re.search(rf"(?<![.'\"\w]){name}\b", tag) for tag in re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))


def with_bos(template: str, tokenizer: "PreTrainedTokenizerFast") -> tuple[str, list[str]]:
    """Make the template begin with one BOS token where the tokenizer adds one, as runtimes will.

    Returns:
        The template, and a sentence about the change, if there was one.
    """
    bos = tokenizer.bos_token or ""
    text = chat_format.render(template, [USER], bos, tokenizer.eos_token or "")
    if bos and text.startswith(bos * 2):
        raise UserError(f"the chat template begins with {bos} twice", OTHERS)
    adds = bool(bos) and tokenizer.bos_token_id in tokenizer("").input_ids
    if not adds or text.startswith(bos):
        return template, []
    return "{{ bos_token }}" + template, [f"the chat template has no BOS and this tokenizer adds one: {bos} put first"]


def faithful(template: str, tokenizer: "PreTrainedTokenizerFast", reasoning: bool) -> tuple[Chat, list[str]]:
    """Choose the variant of the template whose trained conversations begin with exactly the prompt that will be served.

    The variants are the template itself and, unless the rows hold reasoning, the template with its thinking turned off.

    Returns:
        The format of the best variant, and a sentence about the change, if there was one.

    Raises:
        UserError: No variant is faithful.
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
    # The best variant has a prompt that ends where the answer begins, and a text that the template writes by itself.
    switch, best = min(found, key=lambda item: (bool(item[1].scaffolds[0].strip()), item[1].joined))
    return best, [
        f"rows hold no reasoning: the template's thinking is off ({switch[2:-2].strip('- ')})"
    ] if switch else []


def unasked(seen: Chat) -> None:
    """Raise UserError when the prompt depends on a switch that llama.cpp's server and Ollama set by themselves."""
    plain, asked = (
        chat_format.render(seen.template, [USER], seen.bos, seen.eos, True, **switches)
        for switches in ({}, {"enable_thinking": True, "thinking": True})
    )
    if plain != asked:
        raise UserError(
            f"the chat template's prompt ends with {asked[-30:]!r} when a runtime asks it to think, "
            "and rows hold no reasoning",
            OTHERS,
        )


def examine(template: str, tokenizer: "PreTrainedTokenizerFast") -> Chat:
    """Render small conversations, and return the format that the text around their answers shows.

    Raises:
        UserError: The format cannot be told, or a model trained with it would never stop.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    specials = tuple(sorted({t.content for t in tokenizer.added_tokens_decoder.values() if t.special}))

    def render(*messages: dict, prompt: bool = False) -> str:
        return chat_format.render(template, messages, bos, eos, prompt)

    if missing := chat_format.lacking(template, [USER, ANSWER], bos, eos):
        raise UserError(f"the chat template needs {', '.join(missing)}, which no row has", OTHERS)
    prompt = render(USER, prompt=True)
    scaffold, rest, joined = around(render(USER, ANSWER), prompt, ANSWER["content"])
    scaffolds, between = [scaffold], rest
    with contextlib.suppress(UserError):  # it can render one exchange only: longer rows are rejected one by one
        first, tail, _ = around(render(USER, ANSWER, AGAIN, SECOND), prompt, ANSWER["content"])
        scaffolds, between = [scaffold, first, ""], tail.split(AGAIN["content"])[0]
    last, middle = end_of(rest, specials), end_of(between, specials)
    if not middle or not (last or not rest.strip()):
        raise UserError("the chat template ends an answer without a special token: the model would never stop", OTHERS)
    ends = [(last or middle).strip(), middle.strip()]
    return Chat(
        template,
        bos,
        eos,
        middle,
        tuple(dict.fromkeys(ends)),
        tuple(dict.fromkeys(scaffolds)),
        hears(render),
        specials,
        joined,
    )


def around(text: str, prompt: str, answer: str) -> tuple[str, str, bool]:
    """Find what stands around an answer in a rendered conversation.

    Returns:
        The scaffold between the prompt and the answer, all text that follows the answer, and whether prompt and answer
        must be joined without the template.

    Raises:
        UserError: The conversation does not begin with the prompt that is served.
    """
    before, found, rest = text.partition(answer)
    scaffold = before[len(prompt) :]
    # White space on both sides of the border would become one token: the served prompt would not end at it.
    apart = not (prompt[-1:].isspace() and scaffold[:1].isspace())
    # A scaffold that closes a thinking block which the prompt has opened would stand before the row's own reasoning.
    balanced = scaffold.count("<think>") == scaffold.count("</think>")
    if found and before.startswith(prompt) and apart and balanced:
        return scaffold, rest, False
    extra = prompt.removeprefix(before)
    # The prompt alone may end with an empty, closed thinking block; an open one would ask for reasoning.
    if found and prompt.startswith(before) and extra.count("<think>") == extra.count("</think>"):
        return "", rest, True
    raise UserError(
        f"the chat template's prompt ends with {prompt[-30:]!r}, "
        "and the conversation it trains on does not go on from there",
        OTHERS,
    )


def end_of(text: str, specials: tuple[str, ...]) -> str:
    """Return the special token at the beginning of `text` with the white space before it; '' where there is none."""
    found = re.match(rf"\s*(?:{'|'.join(map(re.escape, specials))})", text) if specials else None
    return found[0] if found else ""


def hears(render) -> bool:
    """Return whether a rendered conversation shows its system prompt."""
    try:
        return SYSTEM["content"] in render(SYSTEM, USER, ANSWER)
    except UserError:
        return False


def own_pad(tokenizer: "PreTrainedTokenizerFast", found: Chat) -> list[str]:
    """Give the tokenizer a pad token that ends no answer, where it has none.

    Padding is masked out of the loss. If the pad token also ended an answer, the model would never learn to stop.

    Returns:
        A sentence about the change, if there was one.

    Raises:
        UserError: The tokenizer has no spare token.
    """
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
