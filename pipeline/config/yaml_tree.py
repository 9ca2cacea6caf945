"""Read YAML as a config needs it: a tree of mappings, lists and plain values, and the line of each key.

YAML 1.1 reads `yes` as true, `off` as false, `1:30` as 90, `010` as 8, and `2e-4` as text. Here numbers are what JSON
takes for numbers, and only true and false are booleans, as in YAML 1.2. Tags, anchors and aliases are refused: a config
needs none of them, and a few lines of them can use all memory.
"""

import re
import unicodedata
from pathlib import Path
from typing import ClassVar

import yaml

from common.errors import UserError, printable_line

MAX_CHARACTERS = 1 << 20  # in a config; real ones have about 2,000
MAX_DIGITS = 30  # in an integer; Python refuses to parse more than 4,300
CORE_TAG = "tag:yaml.org,2002:"
# Type of a plain value: the pattern that the whole value must match, and the characters that it can begin with.
PLAIN_TYPES = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        (
            r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
}


ALLOWED_TAGS = {CORE_TAG + name for name in ("str", "map", "seq", *PLAIN_TYPES)}


class _AnchorError(yaml.composer.ComposerError):
    """An anchor or an alias, which is valid YAML but not allowed in a config."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with the plain values of YAML 1.2 and without anchors and aliases."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            problem = "anchors and aliases (&name, *name) are not allowed"
            raise _AnchorError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


for _name, (_pattern, _first_characters) in PLAIN_TYPES.items():
    _Loader.add_implicit_resolver(CORE_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first_characters)


def read_config_text(path: Path) -> str:
    """Return the text of a config file.

    Raises:
        UserError: It cannot be read, is not UTF-8 text, or has more than MAX_CHARACTERS characters.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(
                f"the config {printable_line(str(path))} is not a file",
                "name a YAML file, such as one of configs/",
                code="config.not_a_file",
            )
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        config_files = ", ".join(str(p) for p in sorted(Path("configs").glob("*.yaml"))) or "none"
        is_text = not isinstance(error, UnicodeError)
        reason = (getattr(error, "strerror", None) or str(error)) if is_text else "it is not UTF-8 text"
        code = "config.not_found" if isinstance(error, FileNotFoundError) else "config.unreadable"
        raise UserError(
            f"cannot read the config {printable_line(str(path))}: {reason}",
            f"CONFIG=one of: {config_files}",
            code=code if is_text else "config.not_utf8",
        ) from error
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"the config {path} has more than {MAX_CHARACTERS:,} characters",
            "is it the right file? Name a config",
            code="config.too_large",
        )
    return text


def parse_yaml(text: str, origin: str) -> tuple[object, dict[tuple, str]]:
    """Parse a config's YAML.

    Args:
        text: The YAML.
        origin: What messages call the text: the path of its file, or the override that holds it.

    Returns:
        The tree, and `origin:line` of each key by its path in the tree.

    Raises:
        UserError: The text is not valid YAML, or not what a config may hold: a key that occurs twice or is not a word,
            a tag, an anchor, a control character, half a surrogate pair.
    """
    lines: dict[tuple, str] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        return _read_node(node, (), lines, origin) if node else None, lines
    except _AnchorError as error:
        place = f"{origin}:{error.problem_mark.line + 1}"
        cure = "write the value out; put text that begins with & or * in quotes"
        raise _line_error(place, error.problem, cure, code="config.yaml_anchor") from error
    # PyYAML raises ValueError and OverflowError for an escape or a %YAML version that is out of range.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _syntax_error(error, origin) from error
    except RecursionError as error:
        raise UserError(
            f"{origin}: lists and mappings are nested too deeply", f"correct {origin}", code="config.nested_too_deeply"
        ) from error


def _syntax_error(error: Exception, origin: str) -> UserError:
    """Return the error of a text that is not YAML, with its line where PyYAML has it."""
    mark = getattr(error, "problem_mark", None)
    place = f"{origin}:{mark.line + 1}" if mark else origin
    problem = printable_line(getattr(error, "problem", None) or str(error))
    hint = f"correct {place}; put text that begins with {{, [, <, *, &, !, % or @ in quotes"
    return UserError(f"{place}: not valid YAML: {problem}", hint, code="config.invalid_yaml")


def _read_node(node: yaml.Node, key_path: tuple, lines: dict[tuple, str], origin: str) -> object:
    """Return a node and all below it as plain values, and write the line of each key into `lines`."""
    line = f"{origin}:{node.start_mark.line + 1}"
    lines.setdefault(key_path, line)
    if node.tag not in ALLOWED_TAGS:
        raise _line_error(
            line,
            f"the tag {node.tag.replace(CORE_TAG, '!!')} is not allowed",
            "write the value without it",
            code="config.yaml_tag",
        )
    if isinstance(node, yaml.MappingNode):
        return _read_mapping(node, key_path, lines, origin)
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(item, (*key_path, index), lines, origin) for index, item in enumerate(node.value)]
    return _read_scalar(node, line)


def _read_mapping(node: yaml.MappingNode, key_path: tuple, lines: dict[tuple, str], origin: str) -> dict[str, object]:
    tree: dict[str, object] = {}
    for key, value in node.value:
        line = f"{origin}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise _line_error(
                line,
                "a key is a list or a mapping",
                "a key is a word; put quotes around text that contains [ or {",
                code="config.bad_key",
            )
        if key.value in tree:
            raise _line_error(
                line,
                f"the key {key.value} occurs twice (first {lines[(*key_path, key.value)]})",
                "delete one of them",
                code="config.duplicate_key",
            )
        _refuse_characters(key.value, line)
        lines[(*key_path, key.value)] = line
        tree[key.value] = _read_node(value, (*key_path, key.value), lines, origin)
    return tree


def _read_scalar(node: yaml.ScalarNode, line: str) -> object:
    kind, text = node.tag.removeprefix(CORE_TAG), node.value
    if kind == "str":
        _refuse_characters(text, line)
        return text
    if not re.fullmatch(PLAIN_TYPES[kind][0], text):
        raise _line_error(
            line,
            f"{printable_line(text, 40)} is not a value of type {kind}",
            "write the value without a tag",
            code="config.yaml_tag_mismatch",
        )
    if kind == "int" and len(text) > MAX_DIGITS:
        raise _line_error(
            line,
            f"a number has {len(text):,} digits (limit {MAX_DIGITS})",
            "write a smaller one, or put text in quotes",
            code="config.number_too_long",
        )
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return {"null": lambda: None, "bool": lambda: text.lower() == "true", "int": lambda: int(text)}[kind]()


def _refuse_characters(text: str, line: str) -> None:
    """Raise UserError for characters that a config may not hold.

    No file can hold half a surrogate pair, and terminals obey control characters.
    """
    character = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t\r"), None)
    if character is not None:
        raise _line_error(
            line,
            f"the character U+{ord(character):04X} is not allowed in a config",
            "remove it",
            code="config.bad_character",
        )


def _line_error(line: str, problem: str, cure: str, code: str) -> UserError:
    """Return the error to raise: what is wrong in that line, and how to correct it."""
    return UserError(f"{line}: {printable_line(problem)}", f"correct {line}: {cure}", code=code)
