"""The default system prompt: what every runtime puts in front of a conversation that brings none.

A model that was trained behind a system prompt answers badly without it, so what the rows share becomes the default; where
they share none, the user chooses.
"""

from collections import Counter
from dataclasses import dataclass

from common.errors import UserError, shown

FROM_ROWS, NONE = "from-rows", "none"  # values of data.system that are no prompt
SHARED = 0.9  # share of rows from which one prompt, or none, is the rows' own
FEW = 5  # different prompts among which the most frequent one is the default, where every row has one
SHOWN = 6  # prompts that a message lists


@dataclass(frozen=True)
class SystemPrompt:
    """default: None: runtimes send none. note: a sentence for the user, None where there is nothing to say."""

    default: str | None
    note: str | None


def choose_default(setting: str, prompts: Counter) -> SystemPrompt:
    """The default system prompt of the model.

    Args:
        setting: data.system: a prompt, `none`, or `from-rows`.
        prompts: rows by their own system prompt; None stands for rows without one.

    Raises UserError where it shall come from the rows and they have too many different ones.
    """
    if setting == NONE:
        return SystemPrompt(
            None, "no system prompt is sent by default: requests bring their own" if set(prompts) - {None} else None
        )
    if setting != FROM_ROWS:
        return SystemPrompt(setting, _note_others(setting, prompts))
    total = sum(prompts.values())
    prompt, count = prompts.most_common(1)[0] if prompts else (None, 0)
    if not prompts or (prompt is None and count >= SHARED * total):
        return SystemPrompt(None, _note_others(None, prompts))
    every_row_has_one = prompts[None] == 0 and len(prompts) <= FEW
    if count >= SHARED * total or every_row_has_one:
        share = "all rows have" if count == total else f"{count / total:.0%} of the rows have"
        return SystemPrompt(
            prompt, f"{share} the system prompt {quote(prompt)}: every runtime sends it by default (data.system)"
        )
    raise UserError(
        f"the rows have {len(prompts)} different system prompts, and none is most rows':\n{list_prompts(prompts)}",
        "choose what is sent to the model when a request brings none: data.system: none, or one of them, "
        "such as SET=\"data.system='You are a helpful assistant.'\"",
    )


def _note_others(default: str | None, prompts: Counter) -> str | None:
    others = Counter({prompt: count for prompt, count in prompts.items() if prompt not in (None, default)})
    if not others:
        return None
    return (
        f"{sum(others.values()):,} rows have another system prompt than the default {quote(default)}, the most frequent: "
        f"{quote(others.most_common(1)[0][0])}"
    )


def list_prompts(prompts: Counter) -> str:
    """The most frequent ones with their shares, a line each."""
    total = sum(prompts.values())
    lines = [f"  {count / total:6.1%}  {quote(prompt)}" for prompt, count in prompts.most_common(SHOWN)]
    rest = total - sum(count for _, count in prompts.most_common(SHOWN))
    return "\n".join([*lines, *([f"  {rest / total:6.1%}  others"] if rest else [])])


def quote(prompt: str | None) -> str:
    return "(none)" if prompt is None else f'"{shown(prompt, 70)}{"..." if len(prompt) > 70 else ""}"'
