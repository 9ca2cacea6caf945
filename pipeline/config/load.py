"""Load a config: a YAML file and its overrides become the typed tree.

All faults are reported at once, each with its line.
"""

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.errors import UserError, printable_line
from pipeline.config import yaml_tree
from pipeline.config.schema import Config

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_PRINTED_FAULTS = 30  # further ones are only counted
# Arguments of transformers that have no setting of the same name here, and what to use instead.
OTHER_LIBRARIES_KEYS = {
    "per_device_train_batch_size": (
        "train_batch_size is the global batch size; micro-batches are sized to the GPU's memory"
    ),
    "gradient_accumulation_steps": "train_batch_size is the global batch size; the accumulation follows from it",
    "save_strategy": "checkpoints are written every save_minutes (and save_steps)",
    "save_total_limit": "the newest and the best checkpoint are kept",
}


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Return the config in `path` with the `section.key=value` overrides applied. Raise UserError with all faults."""
    tree, lines = yaml_tree.parse_yaml(yaml_tree.read_config_text(path), str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} has no sections", "start from one of configs/*.yaml", code="config.no_sections")
    for override in overrides:
        _apply_override(tree, lines, override)
    return build_config(tree, lines, path)


def build_config(tree: object, lines: dict[tuple, str], path: Path) -> Config:
    """Validate a plain tree and return it as a Config.

    Args:
        tree: The sections and their settings, as YAML holds them.
        lines: The `file:line` of each key, by its path in the tree.
        path: The config file, which messages name.

    Raises:
        UserError: The tree is faulty; it lists every fault with its line.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        pydantic_errors = error.errors()
        faults = [_describe_fault(item, lines, path) for item in pydantic_errors]
        remainder = [f"  and {len(faults) - MAX_PRINTED_FAULTS:,} more"] if len(faults) > MAX_PRINTED_FAULTS else []
        all_from_overrides = all(fault.startswith("  SET=") for fault in faults)
        all_unknown_keys = all(item["type"] == "extra_forbidden" for item in pydantic_errors)
        raise UserError(
            f"{path}: {len(faults):,} fault{'s' * (len(faults) > 1)}\n"
            + "\n".join([*faults[:MAX_PRINTED_FAULTS], *remainder]),
            "correct SET" if all_from_overrides else f"edit {path}; `ferry config {path}` checks it",
            code="config.unknown_key" if all_unknown_keys else "config.invalid",
        ) from error


def _describe_fault(error: "ErrorDetails", lines: dict[tuple, str], path: Path) -> str:
    """Return one of pydantic's errors as a line: where it is, which setting it concerns, and what is wrong."""
    key_path = tuple(part for part in error["loc"] if part not in ("function-after", "tuple"))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown key{_suggest_key(key_path)}"
    setting = printable_line(".".join(map(str, key_path)), 200) or "config"
    return f"  {_find_line(key_path, lines, path)}: {setting}: {printable_line(message)}"


def _find_line(key_path: tuple, lines: dict[tuple, str], path: Path) -> str:
    """Return the line of a key, or of the nearest key above it that the file has; without any, the path of the file."""
    prefixes = (key_path[:length] for length in range(len(key_path), 0, -1))
    return next((lines[prefix] for prefix in prefixes if prefix in lines), str(path))


def _suggest_key(key_path: tuple) -> str:
    """Return the end of a message about an unknown key: what is close to it, or what is known."""
    if key_path[-1] in OTHER_LIBRARIES_KEYS:
        return f": {OTHER_LIBRARIES_KEYS[key_path[-1]]}"
    names = _list_known_keys(key_path)
    close_matches = difflib.get_close_matches(str(key_path[-1]), names, 1)
    return f", did you mean {close_matches[0]}?" if close_matches else f"; known: {', '.join(names)}" if names else ""


def _list_known_keys(key_path: tuple) -> list[str]:
    """Return the keys that may stand beside the last one of the path; [] where it is not in a section."""
    fields: dict[str, FieldInfo] = Config.model_fields
    for key in key_path[:-1]:
        annotation = fields[key].annotation if key in fields else None
        fields = annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else {}
    return list(fields)


def _apply_override(tree: dict, lines: dict[tuple, str], override: str) -> None:
    """Write one `section.key=value` into `tree`, and into `lines` that it came from SET."""
    match = re.fullmatch(r"([a-z_]+)\.([a-z0-9_]+)=(.*)", override, re.DOTALL)
    if not match:
        raise UserError(
            f"cannot read the override {printable_line(override)!r}",
            'write SET="section.key=value", such as SET="finetune.max_steps=20"',
            code="config.bad_override",
        )
    section, key, value = match.groups()
    settings = tree.setdefault(section, {})
    if not isinstance(settings, dict):
        raise UserError(
            f"{section} is not a section, so {override!r} cannot be set",
            f"write the settings of {section} below it in the config",
            code="config.not_a_section",
        )
    setting = f'SET="{printable_line(override, 200)}"'
    placeholder = value.startswith(("{user}", "{run}"))  # YAML would read these as a mapping
    settings[key], inner_lines = (value, {}) if placeholder else yaml_tree.parse_yaml(value, setting)
    lines.update({(section, key, *key_path): setting for key_path in inner_lines} | {(section, key): setting})


def dump_config(config: Config) -> str:
    """Return the config as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
