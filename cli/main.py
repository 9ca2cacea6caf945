"""The `ferry` command: one group of lazily loaded commands, and the one place where errors are printed."""

import json
import os
import re
import sys
from pathlib import Path

import click

from cli.settings import suggest_name
from cli.table import COMMANDS, SECTIONS, load_command
from common import console, files
from common.errors import UserError, printable_line

# The threads of libraries wait by spinning. Next to another busy program that made a training 20 times slower on two
# cores (benchmarks/results/contention.md). With this limit it is 2.4 times slower next to a busy loop on each core, and
# no slower alone.
SPIN_COUNT = "3000"
ROOT = Path(__file__).resolve().parents[1]
# Codes for the errors of click. The first kind that fits wins: a subclass stands before its parent.
CODE_OF_CLICK_ERROR = {
    click.MissingParameter: "command.missing_setting",
    click.BadParameter: "command.bad_value",
    click.NoSuchOption: "command.unknown_setting",
    click.ClickException: "command.bad_usage",
}


class Ferry(click.Group):
    """The commands of `cli/table.py`, each imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return load_command(name) if name in COMMANDS else super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise unknown_command_error(args[0], "ferry")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, names in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name, load_command(name).get_short_help_str(60)) for name in names])


def unknown_command_error(name: str, program: str) -> UserError:
    """Return the error for a command that does not exist, with the closest one. program: 'ferry' or 'make'."""
    suggestion = suggest_name(name, COMMANDS, f"`{program} {{}}`")
    return UserError(
        f"unknown command `{program} {printable_line(name, 60)}`{suggestion}",
        f"`{program} --help` lists them" if program == "ferry" else "`make` alone lists them",
        code="command.unknown",
    )


def read_version() -> str:
    """Return Ferry's version, which is written in pyproject.toml only."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^version = "(.+)"$', text, re.MULTILINE)[0]


def print_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    """Print the version and exit, as the callback of --version."""
    if value and not ctx.resilient_parsing:
        click.echo(f"ferry {read_version()}")
        ctx.exit()


@click.group(
    cls=Ferry,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="ferry COMMAND --help shows an example. Tab completion: ferry completion bash.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the version and exit.",
)
def ferry() -> None:
    """Fine-tune an open LLM on a GPU machine, run it on a Mac, and prove that what was trained is what runs."""


@ferry.command("make", hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("goals")
@click.argument("target")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def forward_from_make(goals: str, target: str, words: tuple[str, ...]) -> None:
    """What `make TARGET NAME=VALUE ...` forwards to. goals: all targets of that call."""
    from cli.settings import bad_value_error, translate_make_settings

    remove_make_variables(words)
    targets = {goal: load_command(goal) for goal in require_known_goals(goals.split() or [target])}
    for goal, command in targets.items():  # the settings of every target are checked before the first one runs
        other_targets = {name: other_command for name, other_command in targets.items() if name != goal}
        arguments = translate_make_settings(command, words, other_targets)
        try:
            command.make_context(goal, [*arguments], parent=click.get_current_context().parent)
        except click.BadParameter as error:
            raise bad_value_error(error) from error
        if goal == target:
            sys.argv = [sys.argv[0], target, *arguments]
    os.environ |= {"FERRY_TYPED": f"make {target}", "FERRY_GOALS": goals}
    ferry.main(sys.argv[1:], prog_name="ferry", standalone_mode=False)


def remove_make_variables(words: tuple[str, ...]) -> None:
    """Remove what make puts into the environment for its children: a `make` that Ferry starts is a separate one."""
    for name in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", *(word.partition("=")[0] for word in words)):
        os.environ.pop(name.removeprefix("env:"), None)


def require_known_goals(goals: list[str]) -> list[str]:
    """Return the make targets. Raise UserError when one of them does not exist."""
    for goal in goals:
        if goal not in COMMANDS:
            raise unknown_command_error(goal, "make")
    return goals


@ferry.command("completion", hidden=True)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def print_completion(shell: str) -> None:
    """Print the script that makes SHELL complete ferry's commands and options.

    \b
    Example:
      ferry completion zsh >> ~/.zshrc
    """
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    assert completion, f"click knows {shell}"
    click.echo(completion(ferry, {}, "ferry", "_FERRY_COMPLETE").source())


def main() -> None:
    """Run the command line and exit.

    A UserError is printed as two lines, with exit code 2, and as JSON where JSON was requested; any other exception is
    a fault of Ferry's, with a traceback.
    """
    prepare_process()
    try:
        code = ferry.main(prog_name="ferry", standalone_mode=False)
    except (UserError, click.ClickException, OSError) as error:
        print_error(translate_error(error))
        code = 2
    except (KeyboardInterrupt, click.Abort):
        console.print_message("stopped; the same command resumes from here")
        code = 130
    sys.exit(code)


def prepare_process() -> None:
    """Set what the libraries read from the environment, and how the streams write a character that cannot be shown."""
    if sys.platform == "darwin":  # Unsloth would look for MLX there; Ferry uses its CPU backend
        os.environ.setdefault("UNSLOTH_FORCE_CPU", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")


def print_error(error: UserError) -> None:
    """Print an error, and as JSON where JSON was requested."""
    console.print_message(str(error))
    # stdout is one JSON document: the doctor has printed its checks, with the fault that it ends with.
    if is_json_requested(sys.argv[1:]) and not console.has_printed_result:
        console.print_result(error_to_json(error))


def translate_error(error: UserError | click.ClickException | OSError) -> UserError:
    """Return the error as a UserError with the next command. Raises an OSError again that a user cannot cure."""
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f"`{context.command_path} --help` lists its options" if context else "ferry --help"
        code = next(code for kind, code in CODE_OF_CLICK_ERROR.items() if isinstance(error, kind))
        return UserError(error.format_message(), hint, code=code)
    return files.translate_unhandled_error(error) if isinstance(error, OSError) else error


def is_json_requested(arguments: list[str]) -> bool:
    """Return whether a command line asks for JSON, by `--json` or, while it is still make's, by JSON=1."""
    from cli.settings import YES_WORDS

    if arguments[:1] == ["make"]:
        return any(word.startswith("JSON=") and word[5:].lower() in YES_WORDS for word in arguments)
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)


def error_to_json(error: UserError) -> str:
    """Return an error as JSON: {"error": {"code", "message", "next"}}."""
    return json.dumps({"error": {"code": error.code, "message": error.message, "next": error.hint}}, indent=2)
