"""A folder that holds a published model: prove that Ferry made it, claim it, keep what the user edited in it."""

import contextlib
from pathlib import Path

from common import console, files, hub
from common.errors import UserError, printable_line
from contract import manifest

MODEL_CARD_FILE = "README.md"
HUB_MARKER = ".ferry-hub.json"  # holds {"model": name}


def hub_folder(repo: str, model: str) -> Path:
    """Return the folder hub of a model.

    Its manifest proves that Ferry made the folder, or the marker that `claim_hub_folder` writes before anything else.

    Raises:
        UserError: Ferry did not make the folder, or made it for another model, or it holds a symbolic link.
    """
    folder = hub.folder_path(repo)
    if folder.exists():
        refuse_foreign_folder(folder)
        refuse_other_model(folder, model)
        refuse_links(folder)
    return folder


def list_names(folder: Path) -> list[str]:
    """Return the names in a folder; the name of the path itself where it is a file."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]


def refuse_foreign_folder(folder: Path) -> None:
    """Raise UserError when the folder holds something and Ferry did not make it."""
    if (names := list_names(folder)) and hub_model_name(folder) is None:
        raise UserError(
            f"publish.repo {folder} was not created by Ferry: it holds {', '.join(map(printable_line, names[:3]))}",
            "set publish.repo to an empty or new folder",
            code="hub.foreign_folder",
        )


def refuse_other_model(folder: Path, model: str) -> None:
    """Raise UserError when the folder belongs to another model."""
    if (hub_model := hub_model_name(folder)) not in (None, model):
        raise UserError(
            f"publish.repo {folder} holds the model {printable_line(str(hub_model))}, and this one is {model}",
            "set publish.repo to a different folder, such as ./hub/{run}",
            code="hub.other_model",
        )


def refuse_links(folder: Path) -> None:
    """Raise UserError when the folder holds a symbolic link."""
    if links := [name for name in list_names(folder) if (folder / name).is_symlink()]:
        raise UserError(
            f"publish.repo {folder}: {links[0]} is a symbolic link; a hub has only regular files",
            "remove the link",
            code="hub.symbolic_link",
        )


def hub_model_name(folder: Path) -> str | None:
    """Return the name of the model that a folder hub belongs to; None when Ferry did not make the folder."""
    with contextlib.suppress(UserError):
        return manifest.read_manifest(folder / manifest.FILE_NAME).name
    with contextlib.suppress(UserError):
        return str(files.read_json(folder / HUB_MARKER).get("model"))
    return None


def claim_hub_folder(folder: Path, model: str) -> None:
    """Write the marker of a Ferry hub: while files are replaced, the folder has no manifest that could prove it."""
    if not (folder / HUB_MARKER).is_file():
        files.write_json(folder / HUB_MARKER, {"model": model})


def back_up_edited_card(folder: Path) -> None:
    """Rename a model card that the user edited after it was published, because the new model card takes its name."""
    card_path = folder / MODEL_CARD_FILE
    if is_card_edited(card_path) and (kept_path := files.set_aside(card_path)):
        console.print_note(f"{card_path} was edited: the edited version is kept as {kept_path.name}")


def is_card_edited(card_path: Path) -> bool:
    """Return whether a model card is another one than the manifest beside it names; False without a manifest."""
    try:
        published_files = manifest.read_manifest(card_path.with_name(manifest.FILE_NAME)).files
    except UserError:
        return False
    published_hashes = {item.file: item.sha256 for item in published_files}
    return card_path.is_file() and files.sha256(card_path) != published_hashes.get(MODEL_CARD_FILE)
