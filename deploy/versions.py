"""Roll back, prune and remove versions. The apps follow the version that the store has in use."""

from pathlib import Path

from common.errors import UserError, shown
from deploy import store
from deploy.apps import lmstudio, ollama


def rollback(repo: str, models: Path, start: bool = False) -> tuple[Path, list[str]]:
    """Use another version: the one that `repo` names (REPO@tag), else the one pulled before the current one.

    The current version stays in use until the apps have the other one.

    Returns:
        The version, and a line for each app that was updated.

    Raises:
        UserError: There is no such version, or it has not passed its smoke test.
    """
    version = _named(repo, models) or _older(repo, models)
    store.passed(version)
    done = install(version, start)
    store.use(version)
    return version, done


def _named(repo: str, models: Path) -> Path | None:
    return store.current(models, repo) if store.find_model(models, repo)[1] else None


def _older(repo: str, models: Path) -> Path:
    """Return the newest tested version that is older than the current one. Raises UserError when there is none."""
    using, every = store.current(models, repo), store.versions(store.place(models, repo))
    older = [version for version in every[every.index(using) + 1 :] if store.proven(version)]
    if not older:
        raise UserError(
            f"there is no version of {shown(repo)} older than {using.name} on this machine that passed its smoke test",
            "`make models` lists what is; `make deploy-mac REPO=you/model@v1` fetches a certain one",
        )
    return older[0]


def install(version: Path, start: bool = False) -> list[str]:
    """Install a version in each app that has any version of this model, and return a line for each."""
    done = []
    if store.records(version.parent, ollama.RECORD):
        done.append(f"Ollama: {ollama.stage(version, start=start)['latest']} is {version.name}")
    if store.records(version.parent, lmstudio.RECORD):
        done.append(f"LM Studio: {lmstudio.stage(version)['target']}")
    return done


def prune(repo: str, models: Path, keep: int, start: bool = False) -> list[tuple[Path, int]]:
    """Remove all versions but the `keep` newest and the one in use; return [(version, bytes that became free)].

    Raises UserError when the store has no current version of the model.
    """
    folder = store.place(models, repo)
    using, every = store.in_use(folder), store.versions(folder)
    if not using:
        raise UserError(f"{shown(repo)} is not in {models}", "`make models` lists what is")
    return [(version, _gone(version, start)) for version in every[keep:] if version != using]


def undeploy(repo: str, models: Path, start: bool = False) -> list[tuple[Path, int]]:
    """Remove a model, or one version of it (REPO@tag), from Ollama, LM Studio and the store.

    Returns [(version, bytes that became free)]. When an app that has a version cannot be asked, it raises UserError and
    removes nothing of that version.
    """
    going = store.matching(models, repo)
    staying = [v for v in store.versions(store.place(models, repo)) if v not in going and store.proven(v)]
    if staying and store.in_use(going[0].parent) in going:  # LM Studio and NAME:latest then have a version that stays
        install(staying[0], start)
        store.use(staying[0])
    return [(version, _gone(version, start)) for version in going]


def _gone(version: Path, start: bool) -> int:
    """Remove a version and return the bytes that became free. The apps come first: the records say what they have."""
    back = ollama.gone(version, start) + lmstudio.gone(version)
    return back + store.forget(version)
