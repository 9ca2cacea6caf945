"""Choose the default system prompt, which every runtime puts before a conversation that has none.

A model that was trained with a system prompt answers badly without it. The prompt that the rows share therefore becomes
the default; where they share none, the user chooses.
"""

from collections import Counter
from dataclasses import dataclass

from common.errors import UserError, printable_line

FROM_ROWS, NONE = "from-rows", "none"  # values of data.system that are not a prompt
MIN_SHARE = 0.9  # share of rows that must have a prompt, or none, to make it the default
MAX_DIFFERENT = 5  # where every row has a prompt and there are at most so many, the most frequent one is the default
MAX_LISTED = 6  # prompts that a message lists


@dataclass(frozen=True)
class SystemPrompt:
    """The choice of the default system prompt.

    Attributes:
        default: The prompt; None: runtimes send none.
        note: A sentence about it for the user, or None.
    """

    default: str | None
    note: str | None


def choose_default(setting: str, prompts: Counter[str | None]) -> SystemPrompt:
    """Choose the default system prompt of the model.

    Args:
        setting: The setting data.system: a prompt, `none`, or `from-rows`.
        prompts: The number of rows with each system prompt; None stands for rows without one.

    Raises:
        UserError: The prompt is to come from the rows, and they have too many different ones.
    """
    if setting == NONE:
        note = "no system prompt is sent by default: requests must send their own"
        return SystemPrompt(None, note if set(prompts) - {None} else None)
    if setting != FROM_ROWS:
        return SystemPrompt(setting, _note_others(setting, prompts))
    total = sum(prompts.values())
    prompt, count = prompts.most_common(1)[0] if prompts else (None, 0)
    if not prompts or (prompt is None and count >= MIN_SHARE * total):
        return SystemPrompt(None, _note_others(None, prompts))
    every_row_has_one = prompts[None] == 0 and len(prompts) <= MAX_DIFFERENT
    if count >= MIN_SHARE * total or every_row_has_one:
        share = "all rows have" if count == total else f"{count / total:.0%} of the rows have"
        note = f"{share} the system prompt {shorten_prompt(prompt)}: every runtime sends it by default (data.system)"
        return SystemPrompt(prompt, note)
    raise UserError(
        f"the rows have {len(prompts)} different system prompts, and none is in {MIN_SHARE:.0%} of the rows:\n"
        f"{list_prompts(prompts)}",
        "choose the prompt for requests without one: data.system: none, or one of these prompts, "
        "such as SET=\"data.system='You are a helpful assistant.'\"",
        code="data.mixed_system_prompts",
    )


def _note_others(default: str | None, prompts: Counter[str | None]) -> str | None:
    """Return a sentence about rows with a different system prompt than the default; None where there are none."""
    others = Counter({prompt: count for prompt, count in prompts.items() if prompt not in (None, default)})
    if not others:
        return None
    count, most_frequent = sum(others.values()), shorten_prompt(others.most_common(1)[0][0])
    text = f"{count:,} rows have a different system prompt than the default {shorten_prompt(default)}"
    return f"{text}, the most frequent: {most_frequent}"


def list_prompts(prompts: Counter[str | None]) -> str:
    """Return the most frequent prompts with their shares, a line each."""
    total = sum(prompts.values())
    lines = [f"  {count / total:6.1%}  {shorten_prompt(prompt)}" for prompt, count in prompts.most_common(MAX_LISTED)]
    other_count = total - sum(count for _, count in prompts.most_common(MAX_LISTED))
    return "\n".join([*lines, *([f"  {other_count / total:6.1%}  others"] if other_count else [])])


def shorten_prompt(prompt: str | None) -> str:
    """Return the beginning of a prompt in quotes, or (none)."""
    return "(none)" if prompt is None else f'"{printable_line(prompt, 70)}{"..." if len(prompt) > 70 else ""}"'
