"""Models in a store, ready to be installed: pulled, smoke tested, with their Modelfile."""

import os
import shutil
from pathlib import Path

from deploy.stages import modelfile, pull, smoke
from tests.helpers import repos


def ready(repo: Path, models: Path) -> Path:
    """The version's folder."""
    version = Path(pull.run_pull(str(repo), models)["folder"])
    smoke.run_smoke(version)
    modelfile.run_modelfile(version)
    return version


def another(repo: Path, folder: Path, seed: int) -> Path:
    """The repo's next version: the same weights, other sampling."""
    copy = shutil.copytree(repo, folder / str(seed) / repo.name, copy_function=os.link)
    (copy / "manifest.json").unlink()
    shutil.copy(repo / "manifest.json", copy)
    return repos.rewrite(copy, lambda value: value["generation"].update(top_p=0.9 - seed / 100))


def two(repo: Path, folder: Path) -> list[Path]:
    """Two versions in folder/models, the older one first; the newer one is in use."""
    return [ready(another(repo, folder, seed), folder / "models") for seed in (1, 2)]


def copied(version: Path, models: Path) -> Path:
    """A store with this version and those beside it. (The file is linked: its smoke test still counts.)"""
    folder = models / version.parent.name
    shutil.copytree(version.parent, folder, symlinks=True, copy_function=os.link)
    return folder / version.name
