"""Load the chat template that will be trained, the tokenizer's own or a named one, and check it before any row is read.

The template goes into the GGUF exactly as it leaves this module. Everything that could make serving differ from
training is therefore settled here: the date, the thinking mode, the BOS token, the token that ends an answer, and the
pad token.
"""

import contextlib
import datetime
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from contract import chat_format, template_sandbox
from pipeline.base_model import model_config
from pipeline.base_model.tokenizer import load_fast_tokenizer
from pipeline.config.references import TEMPLATE_FOLDER, list_template_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RENDER_TIMEOUT_SECONDS = 30  # timeout for one short conversation; on a busy machine Python itself takes a few to start
OTHER_TEMPLATE_HINT = (
    "set data.template to a different one (alpaca, zephyr and vicuna fit every tokenizer), "
    "or choose a different base model"
)
# Prefixes that keep a template from opening a thinking block: rows without reasoning must be served as trained.
THINKING_SWITCHES = ("", "{%- set enable_thinking = false %}", "{%- set thinking = false %}")

# Texts that llama.cpp turns into control tokens in every vocabulary that holds them (src/llama-vocab.cpp, load).
LLAMA_CPP_CONTROL_TOKENS = (
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
DATE_VARIABLES = (("date_string", "%d %b %Y"), ("datetime", "%b %d %Y"))

SYSTEM_MESSAGE = {"role": "system", "content": "Sigma rules."}
FIRST_QUESTION, SECOND_QUESTION = (
    {"role": "user", "content": "Upsilon asks?"},
    {"role": "user", "content": "Omega asks?"},
)
FIRST_ANSWER, SECOND_ANSWER = (
    {"role": "assistant", "content": "Alpha says."},
    {"role": "assistant", "content": "Beta says."},
)


@dataclass(frozen=True)
class ChatFormat:
    """The format of a conversation as text, and where an answer of the assistant ends in it."""

    template: str
    bos: str
    eos: str
    answer_end: str
    """The text behind an answer, up to and with its end token; added where the template omits it (GLM, Apertus)."""
    end_tokens: tuple[str, ...]
    """The texts of the tokens that can end an answer; the first of them ends the last answer."""
    scaffolds: tuple[str, ...]
    """The texts that may stand between prompt and answer: the model must write them, so they carry loss."""
    supports_system: bool
    """Whether a system prompt appears in the rendered text."""
    special_tokens: tuple[str, ...]
    """The tokenizer's special tokens; a row's own text must hold none of them."""
    is_joined: bool = False
    """Whether no rendered conversation begins with the prompt that is served (Gemma 4, QwQ). A row is then joined from
    prompt, answer and answer_end, and only its last answer is trained."""

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Return the conversation as text."""
        return chat_format.render(self.template, messages, self.bos, self.eos, add_generation_prompt)

    @property
    def is_raw(self) -> bool:
        """Whether the template adds nothing around a turn's text, so that white space at its ends belongs to it."""
        text = self.render([FIRST_QUESTION, FIRST_ANSWER]).removeprefix(self.bos)
        return text.startswith(FIRST_QUESTION["content"] + FIRST_ANSWER["content"])


def load_chat_tokenizer(
    folder: Path, name: str, day: datetime.date, has_reasoning: bool = False
) -> tuple["PreTrainedTokenizerFast", ChatFormat, list[str]]:
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
    with model_config.explain_damaged_model(folder):
        tokenizer = load_fast_tokenizer(folder)
        token_changes = promote_control_tokens(tokenizer)
    own_template = read_template_text(name, tokenizer.chat_template)
    refuse_hostile_template(own_template, tokenizer)
    template, date_changes = freeze_date(own_template, day)
    template, bos_changes = add_missing_bos(template, tokenizer)
    chat, thinking_changes = choose_faithful_format(template, tokenizer, has_reasoning)
    tokenizer.chat_template = chat.template
    pad_changes = set_own_pad_token(tokenizer, chat)
    return tokenizer, chat, [*token_changes, *date_changes, *bos_changes, *thinking_changes, *pad_changes]


def refuse_hostile_template(template: str, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raise UserError for a template, perhaps a stranger's, that takes more time, memory or text than honest ones."""
    try:
        render_in_sandbox(template, tokenizer.bos_token or "", tokenizer.eos_token or "")
    except UserError as error:
        hint = OTHER_TEMPLATE_HINT if error.code.startswith("template.") else error.hint
        raise UserError(error.message, hint, code=error.code) from error


@functools.cache
def render_in_sandbox(template: str, bos_token: str, eos_token: str) -> None:
    """Render a short conversation in the sandbox, once a process: it takes 0.2 s."""
    template_sandbox.render_prompts(template, [([FIRST_QUESTION], True)], bos_token, eos_token, RENDER_TIMEOUT_SECONDS)


def read_template_text(name: str, own_template: str | dict[str, str] | None) -> str:
    """Return the text of a chat template.

    Args:
        name: The setting data.template: `tokenizer`, a template that comes with Ferry, or a .jinja file.
        own_template: The tokenizer's own template; a dict where it has several.

    Raises:
        UserError: The tokenizer has no template, or the file cannot be read.
    """
    if name == "tokenizer":
        return _choose_own_template(own_template)
    path = TEMPLATE_FOLDER / f"{name}.jinja" if name in list_template_names() else Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template: {path} cannot be read: {getattr(error, 'strerror', None) or error}",
            f"name a .jinja file, or one of tokenizer, {', '.join(list_template_names())}",
            code="template.unreadable",
        ) from error


def _choose_own_template(own_template: str | dict[str, str] | None) -> str:
    """Return the tokenizer's own template, the default one of several. Raise UserError when it has none."""
    text = own_template.get("default") if isinstance(own_template, dict) else own_template
    if not text or not isinstance(text, str):
        hint = f"set data.template to one of {', '.join(list_template_names())}, or to a .jinja file"
        raise UserError("the base model's tokenizer has no chat template", hint, code="tokenizer.no_chat_template")
    return text


def promote_control_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Make the words that llama.cpp reads as control tokens special tokens of the tokenizer too, with the same ids.

    Otherwise a text such as Qwen's '</s>' would have other tokens in training than in every runtime built on llama.cpp.

    Returns:
        A sentence about the change, if there was one.
    """
    from transformers import AddedToken

    added_texts = {token.content for token in tokenizer.added_tokens_decoder.values()}
    candidates = tokenizer.get_vocab().keys() - added_texts
    words = [word for word in LLAMA_CPP_CONTROL_TOKENS if word in candidates]
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words], special_tokens=True)
    if not words:
        return []
    return [f"llama.cpp reads {' and '.join(words)} as control tokens: made special tokens of the tokenizer too"]


def freeze_date(template: str, day: datetime.date) -> tuple[str, list[str]]:
    """Replace today's date in a template by `day`, so that the rows and all runtimes always show the same date.

    This concerns calls of strftime_now("...") and the variables in which llama.cpp's server passes today's date to
    every template (common/chat.cpp): Llama 3.1 to 3.3 prefer the variables to strftime_now.

    Returns:
        The template, and a sentence about the change, if there was one.
    """
    text = re.sub(r"strftime_now\s+is\s+(not\s+)?defined", lambda m: "false" if m[1] else "true", template)
    text = re.sub(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)", lambda m: repr(day.strftime(m[2])), text)
    used_variables = [item for item in DATE_VARIABLES if is_variable_used(item[0], text)]
    assignments = (f"{{%- set {name} = {day.strftime(form)!r} %}}" for name, form in used_variables)
    text = "".join(assignments) + text
    if "strftime_now" in text:
        raise UserError(
            "the chat template computes a date in a way that cannot be frozen",
            OTHER_TEMPLATE_HINT,
            code="template.computed_date",
        )
    changes = [f"the chat template shows a date: frozen to {day.isoformat()} (data.date)"] if text != template else []
    return text, changes


def is_variable_used(name: str, template: str) -> bool:
    """Return whether a tag of the template uses the variable `name`."""
    return any(re.search(rf"(?<![.'\"\w]){name}\b", tag) for tag in re.findall(r"\{[{%].*?[%}]\}", template, re.DOTALL))


def add_missing_bos(template: str, tokenizer: "PreTrainedTokenizerFast") -> tuple[str, list[str]]:
    """Make the template begin with one BOS token where the tokenizer adds one, as runtimes will; note the change."""
    bos = tokenizer.bos_token or ""
    text = chat_format.render(template, [FIRST_QUESTION], bos, tokenizer.eos_token or "")
    if bos and text.startswith(bos * 2):
        raise UserError(f"the chat template begins with {bos} twice", OTHER_TEMPLATE_HINT, code="template.double_bos")
    adds_bos = bool(bos) and tokenizer.bos_token_id in tokenizer("").input_ids
    if not adds_bos or text.startswith(bos):
        return template, []
    return "{{ bos_token }}" + template, [f"the chat template has no BOS and this tokenizer adds one: {bos} is added"]


def choose_faithful_format(
    template: str, tokenizer: "PreTrainedTokenizerFast", has_reasoning: bool
) -> tuple[ChatFormat, list[str]]:
    """Choose the variant of the template whose trained conversations begin with exactly the prompt that will be served.

    The variants are the template itself and, unless the rows hold reasoning, the template with its thinking turned off.

    Returns:
        The format of the best variant, and a sentence about the change, if there was one.

    Raises:
        UserError: No variant is faithful.
    """
    faults, candidates = [], []
    for switch in THINKING_SWITCHES[:1] if has_reasoning else THINKING_SWITCHES:
        try:
            candidate = probe_template(switch + template, tokenizer)
            if not has_reasoning:
                refuse_thinking_prompt(candidate)
            candidates.append((switch, candidate))
        except UserError as error:
            faults.append(error)
    if not candidates:
        raise faults[0]
    # The best variant has a prompt that ends where the answer begins, and a text that the template writes by itself.
    switch, best = min(candidates, key=lambda item: (bool(item[1].scaffolds[0].strip()), item[1].is_joined))
    if not switch:
        return best, []
    return best, [f"the rows hold no reasoning: the template's thinking is turned off ({switch[2:-2].strip('- ')})"]


def refuse_thinking_prompt(chat: ChatFormat) -> None:
    """Raise UserError when the prompt depends on a switch that llama.cpp's server and Ollama set by themselves."""
    usual_prompt, thinking_prompt = (
        chat_format.render(chat.template, [FIRST_QUESTION], chat.bos, chat.eos, True, **switches)
        for switches in ({}, {"enable_thinking": True, "thinking": True})
    )
    if usual_prompt != thinking_prompt:
        raise UserError(
            f"the chat template's prompt ends with {thinking_prompt[-30:]!r} when a runtime turns thinking on, "
            "but the rows hold no reasoning",
            OTHER_TEMPLATE_HINT,
            code="template.thinking_prompt",
        )


def probe_template(template: str, tokenizer: "PreTrainedTokenizerFast") -> ChatFormat:
    """Render small conversations, and return the format that the text around their answers shows.

    Raises:
        UserError: The format cannot be told, or a model trained with it would never stop.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    special_tokens = list_special_tokens(tokenizer)

    def render(*messages: dict, prompt: bool = False) -> str:
        return chat_format.render(template, messages, bos, eos, prompt)

    refuse_undefined_variables(template, bos, eos)
    prompt = render(FIRST_QUESTION, prompt=True)
    scaffold, after_answer, is_joined = split_at_answer(
        render(FIRST_QUESTION, FIRST_ANSWER), prompt, FIRST_ANSWER["content"]
    )
    scaffolds, between_turns = [scaffold], after_answer
    with contextlib.suppress(UserError):  # it can render one exchange only: longer rows are rejected one by one
        first_scaffold, after_first_answer, _ = split_at_answer(
            render(FIRST_QUESTION, FIRST_ANSWER, SECOND_QUESTION, SECOND_ANSWER), prompt, FIRST_ANSWER["content"]
        )
        scaffolds = [scaffold, first_scaffold, ""]
        between_turns = after_first_answer.split(SECOND_QUESTION["content"])[0]
    last_end = find_leading_token(after_answer, special_tokens)
    middle_end = find_leading_token(between_turns, special_tokens)
    if not middle_end or not (last_end or not after_answer.strip()):
        raise UserError(
            "the chat template ends an answer without a special token: the model would never stop",
            OTHER_TEMPLATE_HINT,
            code="template.no_end_token",
        )
    ends = [(last_end or middle_end).strip(), middle_end.strip()]
    return ChatFormat(
        template,
        bos,
        eos,
        middle_end,
        tuple(dict.fromkeys(ends)),
        tuple(dict.fromkeys(scaffolds)),
        supports_system_prompt(render),
        special_tokens,
        is_joined,
    )


def list_special_tokens(tokenizer: "PreTrainedTokenizerFast") -> tuple[str, ...]:
    """Return the texts of the tokenizer's special tokens."""
    return tuple(sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special}))


def refuse_undefined_variables(template: str, bos: str, eos: str) -> None:
    """Raise UserError when the template prints a variable that no runtime sets and no row has."""
    if names := chat_format.find_undefined_names(template, [FIRST_QUESTION, FIRST_ANSWER], bos, eos):
        text = f"the chat template needs {', '.join(names)}, which no row has"
        raise UserError(text, OTHER_TEMPLATE_HINT, code="template.undefined_variable")


def split_at_answer(text: str, prompt: str, answer: str) -> tuple[str, str, bool]:
    """Find what stands around an answer in a rendered conversation.

    Returns:
        The scaffold between the prompt and the answer, all text that follows the answer, and whether prompt and answer
        must be joined without the template.

    Raises:
        UserError: The conversation does not begin with the prompt that is served.
    """
    before_answer, separator, after_answer = text.partition(answer)
    scaffold = before_answer[len(prompt) :]
    # White space on both sides of the border would become one token: the served prompt would not end at it.
    has_clean_border = not (prompt[-1:].isspace() and scaffold[:1].isspace())
    # A scaffold that closes a thinking block which the prompt has opened would stand before the row's own reasoning.
    is_balanced = scaffold.count("<think>") == scaffold.count("</think>")
    if separator and before_answer.startswith(prompt) and has_clean_border and is_balanced:
        return scaffold, after_answer, False
    rest_of_prompt = prompt.removeprefix(before_answer)
    # The prompt alone may end with an empty, closed thinking block; an open one would ask for reasoning.
    if (
        separator
        and prompt.startswith(before_answer)
        and rest_of_prompt.count("<think>") == rest_of_prompt.count("</think>")
    ):
        return "", after_answer, True
    raise UserError(
        f"the chat template's prompt ends with {prompt[-30:]!r}, but the training text does not continue from there",
        OTHER_TEMPLATE_HINT,
        code="template.prompt_mismatch",
    )


def find_leading_token(text: str, special_tokens: tuple[str, ...]) -> str:
    """Return the special token at the beginning of `text` with the white space before it; '' where there is none."""
    match = re.match(rf"\s*(?:{'|'.join(map(re.escape, special_tokens))})", text) if special_tokens else None
    return match[0] if match else ""


def supports_system_prompt(render: Callable[..., str]) -> bool:
    """Return whether a rendered conversation shows its system prompt."""
    try:
        return SYSTEM_MESSAGE["content"] in render(SYSTEM_MESSAGE, FIRST_QUESTION, FIRST_ANSWER)
    except UserError:
        return False


def set_own_pad_token(tokenizer: "PreTrainedTokenizerFast", chat: ChatFormat) -> list[str]:
    """Give the tokenizer a pad token that ends no answer, where it has none.

    Padding is masked out of the loss. If the pad token also ended an answer, the model would never learn to stop.

    Returns:
        A sentence about the change, if there was one.

    Raises:
        UserError: The tokenizer has no spare token.
    """
    end_tokens = {chat.eos, *chat.end_tokens}
    if tokenizer.pad_token and tokenizer.pad_token not in end_tokens:
        return []
    usable = [token for token in list_spare_tokens(tokenizer, chat) if token not in end_tokens]
    if not usable:
        old_pad = (
            f"its pad token {tokenizer.pad_token} ends an answer" if tokenizer.pad_token else "it has no pad token"
        )
        raise UserError(
            f"the tokenizer has no spare token to pad with, and {old_pad}",
            "choose a base model with a pad token of its own",
            code="tokenizer.no_pad_token",
        )
    old_pad, tokenizer.pad_token = tokenizer.pad_token, usable[0]
    return [f"the pad token is changed from {old_pad or 'none'} to {usable[0]}, so that the end token keeps its loss"]


def list_spare_tokens(tokenizer: "PreTrainedTokenizerFast", chat: ChatFormat) -> list[str]:
    """Return the tokens that may become the pad token, the best one first."""
    unused_tokens = [token for token in chat.special_tokens if re.search("pad|reserved|unused", token)]
    unused_tokens.sort(key=lambda token: "pad" not in token)
    return [*unused_tokens, *(token for token in (tokenizer.unk_token, tokenizer.bos_token) if token)]
