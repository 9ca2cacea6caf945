"""Refuse the user's files that a config names and that are missing, or that a stage would remove."""

import os
from pathlib import Path

from common import files
from common.errors import UserError
from pipeline.config.references import is_hub_dataset, is_hub_model
from pipeline.config.schema import Config


def refuse_missing_files(config: Config) -> None:
    """Raise UserError when files that the config names are missing; it lists all of them."""
    local_files = [(name, value, files.expand_user_path(value, name)) for name, value in _list_local_files(config)]
    missing = [
        f"{name}: {value} is missing (looked for {path.absolute()}, relative to the current folder)"
        for name, value, path in local_files
        if not os.path.exists(path)
    ]
    if missing:
        raise UserError(
            "\n  ".join(["the config names files that do not exist", *missing]),
            "put them there, or correct the config",
            code="config.missing_file",
        )


def refuse_files_inside(config: Config, run_folder: Path) -> None:
    """Raise UserError for a file of the user's in a folder of the run that a stage empties."""
    run_path = run_folder.resolve()
    for name, value in _list_local_files(config):
        path = files.expand_user_path(value, name).resolve()
        if path.is_relative_to(run_path) and path.parent != run_path:
            text = f"{name}: {value} is in the run's folder {run_folder}, in which stages delete files"
            hint = "move it to a different folder, or choose a different RUN=name"
            raise UserError(text, hint, code="config.file_in_run_folder")


def _list_local_files(config: Config) -> list[tuple[str, str]]:
    """Return (setting, path) of each file or folder of this machine that the config names."""
    data, evaluate, model = config.data, config.evaluate, config.base.model
    is_local = not is_hub_dataset(data.source)
    is_local_model = not is_hub_model(model) and not model.startswith("pypi:")
    is_local_validation = is_local and data.validation and not is_hub_dataset(data.validation)
    paths = {
        "data.source": data.source if is_local else None,
        "data.validation": data.validation if is_local_validation else None,
        "data.template": data.template if data.template.endswith(".jinja") else None,
        "evaluate.json_schema": evaluate.json_schema if evaluate.rule == "json_schema" else None,
        "evaluate.prompts": evaluate.prompts,
        "base.model": model if is_local_model else None,
    }
    return [(setting, path) for setting, path in paths.items() if path]
