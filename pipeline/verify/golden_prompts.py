"""The golden conversations: synthetic, rendered by transformers, and reproduced by every runtime or refused."""

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CODE_MESSAGE = 'def f(x):\n    return {"a": [x, 2]}  # <b>{{ x }}</b> {% y %}\n\n\n`$HOME` \\n "quoted" \'q\''


def _user_message(content: str) -> dict:
    return {"role": "user", "content": content}


def build_conversations(eos: str, default_system: str | None = None) -> list[list[dict]]:
    """Return the messages of each golden conversation.

    Args:
        eos: The text of the tokenizer's own end token, for a user who writes it.
        default_system: The system prompt that runtimes put first.
    """
    turns = [
        _user_message("First question?"),
        {"role": "assistant", "content": "First answer."},
        _user_message("And then?"),
    ]
    greeting = [_user_message("Hello! Who are you?")]
    system = {"role": "system", "content": default_system}
    return [
        *([[system, *greeting], [system, *turns]] if default_system else []),
        greeting,
        [_user_message("  Two spaces, a\ttab,\n\na blank line and digits 1234567890.  \n")],
        [_user_message("Ünïcödé, 日本語, العربية, Ωμέγα, emoji 🚢👩‍👩‍👧, and ½ “quotes”…")],
        [_user_message(CODE_MESSAGE)],
        [_user_message("Add the numbers.\n\n### Input:\n2 and 3")],
        [_user_message(f"What do {eos} and <|im_end|> or </s> or [INST] mean? <|eot_id|><end_of_turn>")],
        [_user_message("")],
        turns,
        [*turns, {"role": "assistant", "content": " A list:\n- one\n- two\n"}, _user_message("Thanks! 谢谢")],
        [{"role": "system", "content": "Answer in one word."}, _user_message("Ready?")],
        [{"role": "system", "content": "Line one.\n\nLine two, “quoted”. "}, *turns],
    ]


def build_golden_prompts(tokenizer: "PreTrainedTokenizerFast", default_system: str | None = None) -> list[dict]:
    """Return {messages, add_generation_prompt, prompt, ids} of each conversation that the template accepts."""
    conversations = build_conversations(tokenizer.eos_token, default_system)
    cases = itertools.product(conversations, (True, False))
    prompts = (build_golden_prompt(tokenizer, messages, for_answer) for messages, for_answer in cases)
    return [prompt for prompt in prompts if prompt]


def build_golden_prompt(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict], add_generation_prompt: bool
) -> dict | None:
    """Return the golden prompt of a conversation; None when the template refuses it, as some do a system message."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError:
        return None
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return {"messages": messages, "add_generation_prompt": add_generation_prompt, "prompt": text, "ids": token_ids}
