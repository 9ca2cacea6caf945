"""What a job takes along: the config, and the files that it names and the commit does not contain.

A file inside the checkout keeps its path; one from elsewhere goes to job/files/, and the config names it there.
"""

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from common import files
from launch import source_archive

# The settings that may name a file or a folder.
NAMING = (
    ("data", "source"),
    ("data", "validation"),
    ("data", "template"),
    ("evaluate", "json_schema"),
    ("evaluate", "prompts"),
    ("base", "model"),
)


def here(section: str, key: str, value: str) -> bool:
    """Return whether the value is a path on this machine.

    A template without .jinja, such as `alpaca`, is one of Ferry's, even when the folder has a file of that name.
    """
    return (key != "template" or value.endswith(".jinja")) and os.path.exists(Path(value).expanduser())


def moved(config: dict, is_path: Callable[[str, str, str], bool] = here) -> tuple[dict, dict[str, str]]:
    """Return the config with paths in the sent tree, and {path in the config now: path in the tree}.

    is_path: returns whether (section, key, value) is a path.
    """
    config, moves = copy.deepcopy(config), {}
    for section, key in NAMING:
        value = config.get(section, {}).get(key)
        if isinstance(value, str) and value and is_path(section, key, value):
            moves[value] = config[section][key] = place(value)
    return config, moves


def place(path: str) -> str:
    """Return where a file goes in the sent tree: the same path inside the checkout, else a folder of its own."""
    inside = os.path.normpath(path)
    if inside.startswith(("..", "~")) or os.path.isabs(inside):
        return f"job/files/{files.sha256_bytes(path.encode())[:8]}/{Path(inside).name}"
    return inside


def below(moves: dict[str, str], inputs: Iterable[str]) -> dict[str, Path]:
    """Return path in the sent tree -> local file of the data files in `inputs` and of all else that the config names.

    Of a folder that holds data files, only those in `inputs` are sent; of another folder, every file.
    """
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
    """Return those of the files that the commit does not contain, or contains with other bytes."""

    def held(name: str, path: Path) -> bool:
        said = source_archive.content(repository, commit, name)
        return said is not None and files.sha256_bytes(said) == files.sha256(path)

    return {name: path for name, path in found.items() if not held(name, path)}


def dump(config: dict) -> str:
    """Return the resolved config as YAML; equal configs give equal text."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
