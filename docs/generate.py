"""Write what the pages take from the code: docs/config.md, docs/cli.md, and the benchmarks' tables in all pages.

    python docs/generate.py

A table stands between `<!-- table: NAME -->` and `<!-- /table -->` and is that of benchmarks/results/NAME.md. With
`<!-- table: NAME, TEXT -->` it holds the rows whose case begins with TEXT, without the columns that are empty then.
"""

import ast
import datetime
import inspect
import itertools
import re
import sys
import types
import typing
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import click
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cli.main import ferry
from cli.settings import list_make_settings
from cli.table import SECTIONS, load_command
from pipeline.config.schema import Config

RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"<!-- table: (\w+)(?:, ([^>]*?))? -->\n.*?<!-- /table -->", re.DOTALL)
NOTE = "<!-- Written by `python docs/generate.py`: do not edit. -->"
BOUNDS = {Ge: "at least {}", Gt: "more than {}", Le: "at most {}", Lt: "less than {}"}
WORDS = {
    str: "text", int: "whole number", float: "number", bool: "true or false", types.NoneType: "none", datetime.date: "date",
}  # fmt: skip


def write_pages() -> list[Path]:
    """Write every page that has changed; returns their paths."""
    changed = [path for path, text in make_pages().items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in changed:
        path.write_text(make_pages()[path], encoding="utf-8")
    return changed


def make_pages() -> dict[Path, str]:
    """{path: text} of all pages that hold something generated."""
    pages = {ROOT / "docs" / "config.md": make_config_page(), ROOT / "docs" / "cli.md": make_cli_page()}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if TABLE.search(text):
            pages[path] = TABLE.sub(fill_table, text)
    return pages


# --- the config ---


def make_config_page() -> str:
    lines = [NOTE, "", CONFIG_HEAD]
    for name, field in Config.model_fields.items():
        lines += [f"## {name}", "", clean_text(field.annotation.__doc__), "", *make_field_table(field.annotation), ""]
    return "\n".join(lines)


CONFIG_HEAD = """# Every setting of a config

A config is one YAML file with a section for each stage. Only `base.model` and `data.source` must be there; everything
else has the default below. `./ferry config configs/yours.yaml` checks one and prints it with all defaults, and
`SET="section.key=value"` overrides a value for one command. A key that is not below is refused with the closest one
that is.

Paths are relative to the folder in which the command is run. Write `2.0e-4`, not `2e-4`: YAML reads the latter as text.
[training.md](training.md) says which settings may still change when a run has begun.
"""


def make_field_table(section: type[BaseModel]) -> list[str]:
    meanings = read_meanings(section)
    rows = [
        f"| `{name}` | {cell(describe_type(field))} | {describe_default(field)} | {cell(meanings[name])} |"
        for name, field in section.model_fields.items()
    ]
    return ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]


def read_meanings(section: type[BaseModel]) -> dict[str, str]:
    """{field: the text under it in the source}. A field without one raises KeyError where it is looked up."""
    [body] = (node.body for node in ast.parse(inspect.getsource(section)).body)
    return {
        field.target.id: clean_text(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def describe_type(field: FieldInfo) -> str:
    kind = describe_annotation(field.annotation)
    return kind + "".join(f", {bound}" for bound in bounds(field.metadata))


def describe_annotation(annotation) -> str:
    """A type in words, such as "whole number, at least 1, or none"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is typing.Literal:
        return " or ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in arguments)
    if origin is typing.Annotated:
        return ", ".join([describe_annotation(arguments[0]), *bounds(arguments[1:])])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe_annotation, arguments))
    if origin is tuple:
        return f"list of {describe_annotation(arguments[0])}"
    if origin is dict:
        return "mapping of text to text"
    return annotation.__name__


def bounds(metadata: typing.Iterable) -> list[str]:
    """The limits that a field's metadata states, in words."""
    limits = [limit for item in metadata for limit in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return [
        BOUNDS[type(limit)].format(getattr(limit, type(limit).__name__.lower()))
        for limit in limits
        if type(limit) in BOUNDS
    ]


def describe_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"


# --- the commands ---


def make_cli_page() -> str:
    lines = [NOTE, "", CLI_HEAD, *fenced(help_of(ferry, "ferry")), ""]
    for section, names in SECTIONS.items():
        lines += [f"## {section}", ""]
        for name in names:
            command = load_command(name)
            lines += [f"### {name}", "", *fenced(help_of(command, f"ferry {name}")), "", *make_settings_line(command)]
    return "\n".join(lines)


CLI_HEAD = """# Every command

`make TARGET NAME=VALUE` and `ferry TARGET --option VALUE` are the same command: each target of the Makefile forwards to
`./ferry`, and each option has a name in make, which stands under the command here. A name that no command knows is
refused with the closest one before anything is done. `ferry` is `./ferry` in a checkout.

`eval "$(./ferry completion bash)"` (or `zsh`, `fish`) completes commands and options with the Tab key.
"""


def help_of(command: click.Command, name: str) -> str:
    """What --help prints on a terminal of 80 columns."""
    context = click.Context(command, info_name=name, terminal_width=80)
    context.help_option_names = ["-h", "--help"]
    return command.get_help(context)


def make_settings_line(command: click.Command) -> list[str]:
    pairs = [
        f"`{name}`" + (f" (`{parameter.opts[0]}`)" if parameter.opts[0].startswith("-") else "")
        for name, parameter in list_make_settings(command).items()
        if not getattr(parameter, "hidden", False)
    ]
    return [f"In make: {', '.join(pairs)}.", ""] if pairs else []


def fenced(text: str) -> list[str]:
    return ["```", *text.rstrip().splitlines(), "```"]


# --- the tables ---


def fill_table(place: re.Match) -> str:
    name, case = place.groups()
    head, rows = read_table(RESULTS / f"{name}.md")
    if case:
        at = head.index("case")
        rows = [
            [*row[:at], row[at].removeprefix(case).lstrip(": ,"), *row[at + 1 :]]
            for row in rows
            if row[at].startswith(case)
        ]
        assert rows, f"{name} has no row whose case begins with {case}"
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = ["| " + " | ".join(row[i] for i in used) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join([place[0].splitlines()[0], *lines, "<!-- /table -->"])


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the first Markdown table in a file."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    return head, rows


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def clean_text(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    for page in write_pages():
        print(page.relative_to(ROOT))
