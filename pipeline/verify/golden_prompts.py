"""The golden conversations: synthetic, rendered by transformers, and reproduced by every runtime or refused."""

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
    system_messages = [{"role": "system", "content": default_system}] if default_system else []
    served_conversations = (
        [[*system_messages, _user_message("Hello! Who are you?")], [*system_messages, *turns]]
        if system_messages
        else []
    )
    return [
        *served_conversations,
        [_user_message("Hello! Who are you?")],
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
    """Return {messages, add_generation_prompt, prompt, ids} of each conversation that the template accepts.

    Some templates refuse a system message.
    """
    from jinja2 import TemplateError

    golden = []
    for messages in build_conversations(tokenizer.eos_token, default_system):
        for add_generation_prompt in (True, False):
            try:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            except TemplateError:
                continue
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            golden.append(
                {"messages": messages, "add_generation_prompt": add_generation_prompt, "prompt": text, "ids": token_ids}
            )
    return golden
