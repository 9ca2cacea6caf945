"""Options and arguments that also have a name in make: `--max-dollars 5` is `MAX_DOLLARS=5`.

`make TARGET NAME=VALUE` is translated here into `ferry TARGET --option VALUE`. A name that no command has, or that the
target does not take, is refused before anything runs, with the closest name as a hint.
"""

import difflib
import math
import re
from collections.abc import Iterable

import click

from cli.table import all_commands
from common.errors import UserError, shown

# Settings that every target takes: make and the `ferry` script read them from the environment.
EVERYWHERE = {"VENV": "FERRY_VENV", "DEPLOY_VENV": "FERRY_DEPLOY_VENV", "PYTHON": None}
# Empty, they come from a script whose variable is not set, and the command would take another run or model.
NEVER_EMPTY = ("RUN", "CONFIG", "REPO", "RUNS", "MODELS")
YES, NO = ("1", "yes", "true", "on"), ("", "0", "no", "false", "off")


class Setting(click.Option):
    """An option with a name in make (`make`), or None when it has none."""

    def __init__(self, *names, make: str | None = None, takes_empty: bool = False, **attributes):
        """takes_empty: whether an empty value means something else than no value."""
        super().__init__(*names, **attributes)
        self.make, self.takes_empty = make, takes_empty


class Operand(click.Argument):
    """An argument with a name in make (`make`)."""

    def __init__(self, *names, make: str | None = None, **attributes):
        super().__init__(*names, **attributes)
        self.make = make


class FiniteRange(click.FloatRange):
    """A number in a range, without `nan`, which is no number, and `inf`, which is no limit."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number that limits anything", param, ctx)
        return number


def setting(*names: str, make: str | None = None, **attributes):
    """Return click.option's decorator for an option with a name in make."""
    return click.option(*names, cls=Setting, make=make, **attributes)


def operand(*names: str, make: str | None = None, **attributes):
    """Return click.argument's decorator for an argument with a name in make."""
    return click.argument(*names, cls=Operand, make=make, **attributes)


def settings_of(command: click.Command) -> dict[str, click.Parameter]:
    """Return name in make -> parameter of a command."""
    return {parameter.make: parameter for parameter in command.params if getattr(parameter, "make", None)}


def translate_make_settings(
    command: click.Command, words: Iterable[str], others: dict[str, click.Command]
) -> list[str]:
    """Return NAME=VALUE words as the command's own arguments.

    Args:
        command: The target.
        words: What make was called with. `env:NAME=VALUE` is a word from the shell's environment, which is left out
            when no target takes it.
        other_targets: The other targets of the same `make` call; what only they take is left out.

    Raises:
        UserError: No target takes a name, or a switch is neither yes nor no.
    """
    arguments, operands = [], []
    mine = settings_of(command)
    elsewhere = set().union(*(settings_of(other) for other in others.values())) if others else set()
    for word in words:
        name, _, value = word.removeprefix("env:").partition("=")
        if name in mine:
            if name in NEVER_EMPTY and not value and not word.startswith("env:"):
                raise UserError(f"{name}= is empty", f"write {name}=..., or leave it out")
            target = operands if isinstance(mine[name], click.Argument) else arguments
            target += _arguments_of(mine[name], name, value)
        elif name not in elsewhere and name not in EVERYWHERE and not word.startswith("env:"):
            raise _unknown_setting(name, command, mine)
    return [*arguments, *(["--", *operands] if operands else [])]


def _arguments_of(parameter: click.Parameter, name: str, value: str) -> list[str]:
    """Return NAME=VALUE as the arguments of one parameter. Raises UserError for a switch that is neither yes nor no."""
    if isinstance(parameter, click.Argument):
        return [value] if value else []
    option = parameter.opts[0]
    if parameter.is_flag:
        if value.lower() not in YES + NO:
            raise UserError(
                f"{name}={shown(value)} is neither yes nor no", f"{name}=1 turns it on; leave it out otherwise"
            )
        return [option] if value.lower() in YES else []
    values = split_overrides(value) if parameter.multiple else [value] if value or parameter.takes_empty else []
    return [f"{option}={item}" for item in values]


def explain_bad_value(error: click.BadParameter) -> UserError:
    """Return the error for a value that an option does not take, with the option's name in make."""
    name = getattr(error.param, "make", None) or error.param.name
    return UserError(
        f"{name}: {error.message.replace('float range', 'number').replace('integer range', 'whole number')}",
        f"`make {error.ctx.command.name} {name}=...`; ./ferry {error.ctx.command.name} --help shows what it takes",
    )


def split_overrides(text: str) -> list[str]:
    """Return the overrides in SET: "finetune.seed=1 data.system=You triage" has "data.system=You triage" as its second.

    An override begins where `section.key=` follows white space outside of a value in quotes, so a value may have
    spaces. Raises UserError when such a text names no section of the config.
    """
    from pipeline.config.schema import Config

    starts, quote = [], ""
    for at, character in enumerate(text):
        begins = not quote and (at == 0 or text[at - 1].isspace())
        found = re.match(r"(\w+)\.\w+=", text[at:]) if begins else None
        if found and found[1] not in Config.model_fields:
            raise _unknown_section(found, list(Config.model_fields))
        if found:
            starts.append(at)
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and at and text[at - 1] == "=":
            quote = character
    if not starts or text[: starts[0]].strip():
        return [text.strip()] if text.strip() else []
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _unknown_section(found: re.Match, sections: list[str]) -> UserError:
    """Return the error for an override of a section that the config does not have, with the closest one."""
    close = difflib.get_close_matches(found[1], sections, 1)
    return UserError(
        f"SET: {shown(found[0])} names the section {found[1]}, which the config does not have"
        + (f", did you mean {close[0]}?" if close else ""),
        f"sections: {', '.join(sections)}; a value that holds such text is put in quotes: SET=\"data.system='a.b=c'\"",
    )


def _unknown_setting(name: str, command: click.Command, mine: dict[str, click.Parameter]) -> UserError:
    """Return the error for a setting that the command does not take, with the commands that do or the closest name."""
    users = [target for target, other in all_commands().items() if name in settings_of(other)]
    known = sorted({*mine, *EVERYWHERE})
    shown_ones = sorted(make for make, parameter in mine.items() if not getattr(parameter, "hidden", False))
    listing = f"`make {command.name}` takes {', '.join(shown_ones) or 'no settings'}"
    if users:
        usual = ", ".join(f"`make {target}`" for target in users[:3])
        return UserError(f"{shown(name)} is no setting of `make {command.name}`; it belongs to {usual}", listing)
    close = difflib.get_close_matches(name.upper(), known, 1, 0.5)
    close = close or difflib.get_close_matches(name.upper(), sorted(_all_settings()), 1, 0.5)
    meant = f", did you mean {close[0]}?" if close else ""
    return UserError(f"{shown(name)} is no setting{meant}", listing)


def _all_settings() -> set[str]:
    """Return the names in make of all commands' settings."""
    return set().union(*(settings_of(command) for command in all_commands().values()))
