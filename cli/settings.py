"""Options and arguments that also have a name in make: `--max-dollars 5` is `MAX_DOLLARS=5`.

`make TARGET NAME=VALUE` is translated here into `ferry TARGET --option VALUE`. A name that no command has, or that the
target does not take, is refused before anything runs, with the closest name as a hint.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import click

from cli.table import load_all_commands
from common.errors import UserError, printable_line

# Settings that every target takes: make and the `ferry` script read them from the environment.
GLOBAL_SETTINGS = {"VENV": "FERRY_VENV", "DEPLOY_VENV": "FERRY_DEPLOY_VENV", "PYTHON": None}
# Empty, they come from a script whose variable is not set, and the command would take another run or model.
NEVER_EMPTY = ("RUN", "CONFIG", "REPO", "RUNS", "MODELS")
# What click.option returns: it adds an option to the function of a command.
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
YES_WORDS, NO_WORDS = ("1", "yes", "true", "on"), ("", "0", "no", "false", "off")


class Setting(click.Option):
    """An option with a name in make (`make`), or None when it has none."""

    def __init__(self, *names: Any, make: str | None = None, takes_empty: bool = False, **attributes: Any):
        """takes_empty: whether an empty value means something else than no value."""
        super().__init__(*names, **attributes)
        self.make, self.takes_empty = make, takes_empty


class Operand(click.Argument):
    """An argument with a name in make (`make`)."""

    def __init__(self, *names: Any, make: str | None = None, **attributes: Any):
        super().__init__(*names, **attributes)
        self.make = make


class FiniteRange(click.FloatRange):
    """A number in a range, without `nan`, which is no number, and `inf`, which is no limit."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def setting(*names: str, make: str | None = None, **attributes: Any) -> Decorator:
    """Return click.option's decorator for an option with a name in make."""
    return click.option(*names, cls=Setting, make=make, **attributes)


def operand(*names: str, make: str | None = None, **attributes: Any) -> Decorator:
    """Return click.argument's decorator for an argument with a name in make."""
    return click.argument(*names, cls=Operand, make=make, **attributes)


def missing_setting_error(name: str, hint: str) -> UserError:
    """Return the error for a setting that the command cannot do without."""
    return UserError(f"{name} is missing", hint, code="command.missing_setting")


def list_make_settings(command: click.Command) -> dict[str, Setting | Operand]:
    """Return name in make -> parameter of a command."""
    parameters = (parameter for parameter in command.params if isinstance(parameter, Setting | Operand))
    return {parameter.make: parameter for parameter in parameters if parameter.make}


def translate_make_settings(
    command: click.Command, words: Iterable[str], other_targets: dict[str, click.Command]
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
    arguments: list[str] = []
    operands: list[str] = []
    own_settings, other_settings = list_make_settings(command), _list_setting_names(other_targets.values())
    for word in words:
        name, _, value = word.removeprefix("env:").partition("=")
        if name in own_settings:
            _refuse_empty_value(name, value, word)
            target = operands if isinstance(own_settings[name], Operand) else arguments
            target += _format_arguments(own_settings[name], name, value)
        elif name not in other_settings and name not in GLOBAL_SETTINGS and not word.startswith("env:"):
            raise _unknown_setting_error(name, command, own_settings)
    return [*arguments, *(["--", *operands] if operands else [])]


def _refuse_empty_value(name: str, value: str, word: str) -> None:
    if name in NEVER_EMPTY and not value and not word.startswith("env:"):
        raise UserError(f"{name}= is empty", f"write {name}=..., or leave it out", code="command.empty_setting")


def _format_arguments(parameter: Setting | Operand, name: str, value: str) -> list[str]:
    """Return NAME=VALUE as the arguments of one parameter. Raise UserError for a switch that is neither yes nor no."""
    if isinstance(parameter, Operand):
        return [value] if value else []
    option = parameter.opts[0]
    if parameter.is_flag:
        return [option] if _is_switched_on(name, value) else []
    values = split_overrides(value) if parameter.multiple else [value] if value or parameter.takes_empty else []
    return [f"{option}={item}" for item in values]


def _is_switched_on(name: str, value: str) -> bool:
    if value.lower() not in YES_WORDS + NO_WORDS:
        raise UserError(
            f"{name}={printable_line(value)} is neither yes nor no",
            f"{name}=1 turns it on; leave it out otherwise",
            code="command.bad_switch",
        )
    return value.lower() in YES_WORDS


def bad_value_error(error: click.BadParameter) -> UserError:
    """Return the error for a value that an option does not take or that is missing, with the option's name in make."""
    assert error.param and error.ctx, "click sets both when it parses a command line"
    name, command_name = getattr(error.param, "make", None) or error.param.name, error.ctx.command.name
    hint = f"`make {command_name} {name}=...`; `./ferry {command_name} --help` lists the settings"
    if isinstance(error, click.MissingParameter):
        return missing_setting_error(str(name), hint)
    message = error.message.replace("float range", "number").replace("integer range", "whole number")
    return UserError(f"{name}: {message}", hint, code="command.bad_value")


def split_overrides(text: str) -> list[str]:
    """Return the overrides in SET: "finetune.seed=1 data.system=You triage" has "data.system=You triage" as its second.

    An override begins where `section.key=` follows white space outside of a value in quotes, so a value may have
    spaces. Raise UserError when such a text names no section of the config.
    """
    from pipeline.config.schema import Config

    starts: list[int] = []
    quote = ""
    for index, character in enumerate(text):
        can_start = not quote and (index == 0 or text[index - 1].isspace())
        match = re.match(r"(\w+)\.\w+=", text[index:]) if can_start else None
        if match and match[1] not in Config.model_fields:
            raise _unknown_section_error(match, list(Config.model_fields))
        if match:
            starts.append(index)
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and index and text[index - 1] == "=":
            quote = character
    if not starts or text[: starts[0]].strip():
        return [text.strip()] if text.strip() else []
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _unknown_section_error(match: re.Match[str], sections: list[str]) -> UserError:
    """Return the error for an override of a section that the config does not have, with the closest one."""
    suggestion = suggest_name(match[1], sections, "{}")
    return UserError(
        f"SET: unknown section {match[1]} in {printable_line(match[0])}{suggestion}",
        f"sections: {', '.join(sections)}; put a value that contains such text in quotes: SET=\"data.system='a.b=c'\"",
        code="config.unknown_section",
    )


def suggest_name(name: str, known_names: Iterable[str], form: str) -> str:
    """Return the end of a message with the closest name, in which `form` has it for {}; '' when none is close."""
    matches = difflib.get_close_matches(name, known_names, 1)
    return f", did you mean {form.format(matches[0])}?" if matches else ""


def _unknown_setting_error(name: str, command: click.Command, own_settings: dict[str, Setting | Operand]) -> UserError:
    """Return the error for a setting that the command does not take, with the commands that do or the closest name."""
    commands = load_all_commands()
    target_names = [target for target, other_command in commands.items() if name in list_make_settings(other_command)]
    known_names = sorted({*own_settings, *GLOBAL_SETTINGS})
    visible_names = sorted(make for make, parameter in own_settings.items() if not getattr(parameter, "hidden", False))
    listing = f"`make {command.name}` takes {', '.join(visible_names) or 'no settings'}"
    if target_names:
        examples = ", ".join(f"`make {target}`" for target in target_names[:3])
        return UserError(
            f"`make {command.name}` does not take {printable_line(name)}, which is a setting of {examples}",
            listing,
            code="command.setting_of_other_command",
        )
    matches = difflib.get_close_matches(name.upper(), known_names, 1, 0.5)
    matches = matches or difflib.get_close_matches(name.upper(), sorted(_list_setting_names(commands.values())), 1, 0.5)
    suggestion = f", did you mean {matches[0]}?" if matches else ""
    return UserError(f"unknown setting {printable_line(name)}{suggestion}", listing, code="command.unknown_setting")


def _list_setting_names(commands: Iterable[click.Command]) -> set[str]:
    """Return the names in make of these commands' settings."""
    return {name for command in commands for name in list_make_settings(command)}
