"""Roll back, prune and remove versions. The apps follow the version that the store has in use."""

from pathlib import Path

from common.errors import UserError, printable_line
from deploy import store
from deploy.apps import lmstudio, ollama


def roll_back(repo: str, models: Path, start: bool = False) -> tuple[Path, list[str]]:
    """Use another version: the one that `repo` names (REPO@tag), else the one pulled before the current one.

    The current version stays in use until the apps have the other one.

    Returns:
        The version, and a line for each app that was updated.

    Raises:
        UserError: There is no such version, or it has not passed its smoke test.
    """
    version = _find_requested_version(repo, models) or _find_older_version(repo, models)
    store.load_tested(version)
    changes = update_apps(version, start)
    store.set_current_version(version)
    return version, changes


def _find_requested_version(repo: str, models: Path) -> Path | None:
    return store.require_version(models, repo) if store.find_model(models, repo)[1] else None


def _find_older_version(repo: str, models: Path) -> Path:
    """Return the newest tested version that is older than the current one. Raise UserError when there is none."""
    in_use, complete = (
        store.require_version(models, repo),
        store.list_complete_versions(store.model_folder(models, repo)),
    )
    older = [version for version in complete[complete.index(in_use) + 1 :] if store.is_tested(version)]
    if not older:
        raise UserError(
            f"there is no version of {printable_line(repo)} older than {in_use.name} on this machine that passed "
            "its smoke test",
            "`make models` lists the versions; `make deploy-mac REPO=you/model@v1` fetches a specific one",
            code="store.no_older_version",
        )
    return older[0]


def update_apps(version: Path, start: bool = False) -> list[str]:
    """Install a version in each app that has any version of this model, and return a line for each."""
    changes = []
    if store.read_records(version.parent, ollama.RECORD):
        ollama_record = ollama.run_ollama(version, start=start)
        changes.append(f"Ollama: {ollama_record['latest']} is {version.name}")
    if store.read_records(version.parent, lmstudio.RECORD):
        lmstudio_record = lmstudio.run_lmstudio(version)
        changes.append(f"LM Studio: {lmstudio_record['target']}")
    return changes


def prune_versions(repo: str, models: Path, keep: int, start: bool = False) -> list[tuple[Path, int]]:
    """Remove all versions but the `keep` newest and the one in use; return [(version, bytes that became free)].

    Raise UserError when the store has no current version of the model.
    """
    folder = store.model_folder(models, repo)
    in_use, complete = store.current_version(folder), store.list_complete_versions(folder)
    if not in_use:
        raise UserError(
            f"{printable_line(repo)} is not in {models}",
            "`make models` lists the models there",
            code="store.not_found",
        )
    return _remove_versions([version for version in complete[keep:] if version != in_use], start)


def undeploy_model(repo: str, models: Path, start: bool = False) -> list[tuple[Path, int]]:
    """Remove a model, or one version of it (REPO@tag), from Ollama, LM Studio and the store.

    Returns [(version, bytes that became free)]. When an app that has a version cannot be asked, it raises UserError and
    removes nothing of that version.
    """
    removed = store.find_matching_versions(models, repo)
    remaining = [
        v
        for v in store.list_complete_versions(store.model_folder(models, repo))
        if v not in removed and store.is_tested(v)
    ]
    if remaining and store.current_version(removed[0].parent) in removed:
        # LM Studio and NAME:latest then have a version that stays.
        update_apps(remaining[0], start)
        store.set_current_version(remaining[0])
    return _remove_versions(removed, start)


def _remove_versions(versions: list[Path], start: bool) -> list[tuple[Path, int]]:
    """Remove versions, one after the other, and return [(version, bytes that became free)]."""
    removed = []
    for version in versions:
        freed_bytes = _remove_version(version, start)
        removed.append((version, freed_bytes))
    return removed


def _remove_version(version: Path, start: bool) -> int:
    """Remove a version and return the bytes that became free. The apps come first: the records say what they have."""
    ollama_bytes = ollama.remove_version(version, start)
    lmstudio_bytes = lmstudio.remove_version(version)
    store_bytes = store.delete_version(version)
    return ollama_bytes + lmstudio_bytes + store_bytes
