"""Going back, tidying up and leaving: what is installed follows the version that the store has in use."""

from pathlib import Path

from common.errors import UserError, shown
from deploy import store
from deploy.apps import lmstudio, ollama


def rollback(repo: str, models: Path, start: bool = False) -> tuple[Path, list[str]]:
    """Use another version: the one named (REPO@tag), else the one pulled before that in use; returns it and what was done.

    Raises UserError when there is none; what was in use stays so until the other one is installed.
    """
    version = _named(repo, models) or _older(repo, models)
    store.passed(version)
    done = install(version, start)
    store.use(version)
    return version, done


def _named(repo: str, models: Path) -> Path | None:
    return store.current(models, repo) if store.find_model(models, repo)[1] else None


def _older(repo: str, models: Path) -> Path:
    using, every = store.current(models, repo), store.versions(store.place(models, repo))
    older = [version for version in every[every.index(using) + 1 :] if store.proven(version)]
    if not older:
        raise UserError(
            f"there is no version of {shown(repo)} older than {using.name} on this machine that passed its smoke test",
            "`make models` lists what is; `make deploy-mac REPO=you/model@v1` fetches a certain one",
        )
    return older[0]


def install(version: Path, start: bool = False) -> list[str]:
    """Into each app that has this model in any version, and no other."""
    done = []
    if store.records(version.parent, ollama.RECORD):
        done.append(f"Ollama: {ollama.stage(version, start=start)['latest']} is {version.name}")
    if store.records(version.parent, lmstudio.RECORD):
        done.append(f"LM Studio: {lmstudio.stage(version)['target']}")
    return done


def prune(repo: str, models: Path, keep: int, start: bool = False) -> list[tuple[Path, int]]:
    """Remove all but the `keep` newest versions and the one in use; returns [(version, bytes that came back)]."""
    folder = store.place(models, repo)
    using, every = store.in_use(folder), store.versions(folder)
    if not using:
        raise UserError(f"{shown(repo)} is not in {models}", "`make models` lists what is")
    return [(version, _gone(version, start)) for version in every[keep:] if version != using]


def undeploy(repo: str, models: Path, start: bool = False) -> list[tuple[Path, int]]:
    """Remove a model, or one version of it (REPO@tag), from Ollama, LM Studio and the store.

    Returns [(version, bytes that came back)]. Raises UserError, with nothing removed of a version, when an app that has it
    cannot be asked.
    """
    going = store.matching(models, repo)
    staying = [v for v in store.versions(store.place(models, repo)) if v not in going and store.proven(v)]
    if staying and store.in_use(going[0].parent) in going:  # LM Studio and latest then show one that stays
        install(staying[0], start)
        store.use(staying[0])
    return [(version, _gone(version, start)) for version in going]


def _gone(version: Path, start: bool) -> int:
    """One version, from the apps first: the store's records say what they have."""
    back = ollama.gone(version, start) + lmstudio.gone(version)
    return back + store.forget(version)
