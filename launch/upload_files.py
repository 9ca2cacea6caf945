"""What a job takes along: the config, and the files that it names and the commit does not contain.

A file inside the checkout keeps its path; one from elsewhere goes to job/files/, and the config names it there.
"""

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from common import files
from launch import source_archive

# A config as JSON: section -> setting -> value.
Config = dict[str, dict[str, Any]]
# The settings that may name a file or a folder.
PATH_SETTINGS = (
    ("data", "source"),
    ("data", "validation"),
    ("data", "template"),
    ("evaluate", "json_schema"),
    ("evaluate", "prompts"),
    ("base", "model"),
)


def is_local_path(section: str, key: str, value: str) -> bool:
    """Return whether the value is a path on this machine.

    A template without .jinja, such as `alpaca`, is one of Ferry's, even when the folder has a file of that name.
    """
    return (key != "template" or value.endswith(".jinja")) and os.path.exists(Path(value).expanduser())


def relocate_paths(
    config: Config, is_path: Callable[[str, str, str], bool] = is_local_path
) -> tuple[Config, dict[str, str]]:
    """Return the config with paths in the sent tree, and {path in the config now: path in the tree}.

    is_path: returns whether (section, key, value) is a path.
    """
    config = copy.deepcopy(config)
    tree_paths: dict[str, str] = {}
    for section, key in PATH_SETTINGS:
        value = config.get(section, {}).get(key)
        if isinstance(value, str) and value and is_path(section, key, value):
            tree_paths[value] = config[section][key] = path_in_tree(value)
    return config, tree_paths


def path_in_tree(path: str) -> str:
    """Return where a file goes in the sent tree: the same path inside the checkout, else a folder of its own."""
    normal_path = os.path.normpath(path)
    if normal_path.startswith(("..", "~")) or os.path.isabs(normal_path):
        return f"job/files/{files.sha256_bytes(path.encode())[:8]}/{Path(normal_path).name}"
    return normal_path


def list_job_files(tree_paths: dict[str, str], inputs: Iterable[str]) -> dict[str, Path]:
    """Return path in the sent tree -> local file of the data files in `inputs` and of all else that the config names.

    Of a folder that holds data files, only those in `inputs` are sent; of another folder, every file.
    """
    job_files: dict[str, Path] = {}
    inputs = [os.path.normpath(Path(name).expanduser()) for name in inputs]
    for local_path, tree_path in tree_paths.items():
        root = Path(local_path).expanduser()
        input_files = [name for name in inputs if Path(name).is_relative_to(os.path.normpath(root))]
        paths = [Path(name) for name in input_files] or (
            [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        )
        for path in paths:
            relative_path = os.path.relpath(path, root)
            job_files[tree_path if relative_path == "." else f"{tree_path}/{relative_path}"] = path
    return job_files


def select_uncommitted_files(repository: Path, commit: str, job_files: dict[str, Path]) -> dict[str, Path]:
    """Return those of the files that the commit does not contain, or contains with other bytes."""

    def is_committed(name: str, path: Path) -> bool:
        content = source_archive.read_committed_file(repository, commit, name)
        return content is not None and files.sha256_bytes(content) == files.sha256(path)

    return {name: path for name, path in job_files.items() if not is_committed(name, path)}


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML; equal configs give equal text."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
