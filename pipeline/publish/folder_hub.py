"""A folder that holds a published model: prove that Ferry made it, claim it, keep what the user edited in it."""

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
    if not folder.exists():
        return folder
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    hub_model = hub_model_name(folder)
    if hub_model is None and (names or not folder.is_dir()):
        raise UserError(
            f"publish.repo {folder} was not created by Ferry: it holds {', '.join(map(printable_line, names[:3]))}",
            "set publish.repo to an empty or new folder",
            code="hub.foreign_folder",
        )
    if hub_model not in (None, model):
        raise UserError(
            f"publish.repo {folder} holds the model {printable_line(hub_model)}, and this one is {model}",
            "set publish.repo to a different folder, such as ./hub/{run}",
            code="hub.other_model",
        )
    if links := [name for name in names if (folder / name).is_symlink()]:
        raise UserError(
            f"publish.repo {folder}: {links[0]} is a symbolic link; a hub has only regular files",
            "remove the link",
            code="hub.symbolic_link",
        )
    return folder


def hub_model_name(folder: Path) -> str | None:
    """Return the name of the model that a folder hub belongs to; None when Ferry did not make the folder."""
    try:
        return manifest.read_manifest(folder / manifest.FILE_NAME).name
    except UserError:
        pass
    try:
        return str(files.read_json(folder / HUB_MARKER).get("model"))
    except UserError:
        return None


def claim_hub_folder(folder: Path, model: str) -> None:
    """Write the marker of a Ferry hub: while files are replaced, the folder has no manifest that could prove it."""
    if not (folder / HUB_MARKER).is_file():
        files.write_json(folder / HUB_MARKER, {"model": model})


def back_up_edited_card(folder: Path) -> None:
    """Rename a model card that the user edited after it was published, because the new model card takes its name."""
    try:
        published_hashes = {
            item.file: item.sha256 for item in manifest.read_manifest(folder / manifest.FILE_NAME).files
        }
    except UserError:
        return
    card_path = folder / MODEL_CARD_FILE
    if card_path.is_file() and files.sha256(card_path) != published_hashes.get(MODEL_CARD_FILE):
        console.print_note(f"{card_path} was edited: the edited version is kept as {files.set_aside(card_path).name}")
