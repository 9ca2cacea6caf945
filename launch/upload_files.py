"""What a job takes with it: the config, and the files that it names and the commit does not hold.

A file inside the checkout keeps its place there; one from elsewhere goes to job/files/, and the config says so.
"""

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from common import files
from launch import source_archive

NAMING = (
    ("data", "source"), ("data", "validation"), ("data", "template"), ("evaluate", "json_schema"), ("evaluate", "prompts"),
    ("base", "model"),
)  # fmt: skip


def here(section: str, key: str, value: str) -> bool:
    """A path of this machine. (`alpaca` is a template of ours, whatever lies in the folder.)"""
    return (key != "template" or value.endswith(".jinja")) and os.path.exists(Path(value).expanduser())


def moved(config: dict, is_path: Callable[[str, str, str], bool] = here) -> tuple[dict, dict[str, str]]:
    """The config as it is to be there, and {path as it is named here: path there} of all that it names.

    is_path: says of (section, key, value) whether it is one.
    """
    config, moves = copy.deepcopy(config), {}
    for section, key in NAMING:
        value = config.get(section, {}).get(key)
        if isinstance(value, str) and value and is_path(section, key, value):
            moves[value] = config[section][key] = place(value)
    return config, moves


def place(path: str) -> str:
    """Where it is to lie in the tree: there too, or for one from elsewhere in a folder of its own."""
    inside = os.path.normpath(path)
    if inside.startswith(("..", "~")) or os.path.isabs(inside):
        return f"job/files/{files.sha256_bytes(path.encode())[:8]}/{Path(inside).name}"
    return inside


def below(moves: dict[str, str], inputs: Iterable[str]) -> dict[str, Path]:
    """{path there: file here} of the data files that were read, and of all else that was moved."""
    found: dict[str, Path] = {}
    inputs = [os.path.normpath(Path(name).expanduser()) for name in inputs]
    for value, target in moves.items():
        top = Path(value).expanduser()
        read = [name for name in inputs if Path(name).is_relative_to(os.path.normpath(top))]
        every = [Path(name) for name in read] or (
            [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        )
        for path in every:
            beneath = os.path.relpath(path, top)
            found[target if beneath == "." else f"{target}/{beneath}"] = path
    return found


def untold(repository: Path, commit: str, found: dict[str, Path]) -> dict[str, Path]:
    """Those that the commit does not hold as they are."""

    def held(name: str, path: Path) -> bool:
        said = source_archive.content(repository, commit, name)
        return said is not None and files.sha256_bytes(said) == files.sha256(path)

    return {name: path for name, path in found.items() if not held(name, path)}


def dump(config: dict) -> str:
    """The resolved tree as YAML; the same tree is the same text."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
