"""The golden conversations: synthetic, rendered by transformers, and reproduced by every runtime or refused."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CODE = 'def f(x):\n    return {"a": [x, 2]}  # <b>{{ x }}</b> {% y %}\n\n\n`$HOME` \\n "quoted" \'q\''


def _user(words: str) -> dict:
    return {"role": "user", "content": words}


def conversations(eos: str, default_system: str | None = None) -> list[list[dict]]:
    """Return the messages of each golden conversation.

    Args:
        eos: The text of the tokenizer's own end token, for a user who writes it.
        default_system: The system prompt that runtimes put first.
    """
    turns = [_user("First question?"), {"role": "assistant", "content": "First answer."}, _user("And then?")]
    default = [{"role": "system", "content": default_system}] if default_system else []
    served = [[*default, _user("Hello! Who are you?")], [*default, *turns]] if default else []
    return [
        *served,
        [_user("Hello! Who are you?")],
        [_user("  Two spaces, a\ttab,\n\na blank line and digits 1234567890.  \n")],
        [_user("Ünïcödé, 日本語, العربية, Ωμέγα, emoji 🚢👩‍👩‍👧, and ½ “quotes”…")],
        [_user(CODE)],
        [_user("Add the numbers.\n\n### Input:\n2 and 3")],
        [_user(f"What do {eos} and <|im_end|> or </s> or [INST] mean? <|eot_id|><end_of_turn>")],
        [_user("")],
        turns,
        [*turns, {"role": "assistant", "content": " A list:\n- one\n- two\n"}, _user("Thanks! 谢谢")],
        [{"role": "system", "content": "Answer in one word."}, _user("Ready?")],
        [{"role": "system", "content": "Line one.\n\nLine two, “quoted”. "}, *turns],
    ]


def golden(tokenizer: "PreTrainedTokenizerFast", default_system: str | None = None) -> list[dict]:
    """Return {messages, add_generation_prompt, prompt, ids} of each conversation that the template accepts.

    Some templates refuse a system message.
    """
    from jinja2 import TemplateError

    found = []
    for messages in conversations(tokenizer.eos_token, default_system):
        for asks in (True, False):
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
            except TemplateError:
                continue
            ids = tokenizer.encode(text, add_special_tokens=False)
            found.append({"messages": messages, "add_generation_prompt": asks, "prompt": text, "ids": ids})
    return found
