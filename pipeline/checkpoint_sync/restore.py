"""Restore a run from its repo on the Hub to a machine that has no rows of it: every file by its sha256, or nothing."""

import json
import shutil
from pathlib import Path

from common import console, files, hub
from common.errors import UserError
from pipeline.checkpoint_sync import push
from pipeline.checkpoint_sync import snapshot as states
from pipeline.checkpoint_sync.snapshot import State
from pipeline.config import yaml_tree
from pipeline.config.load import build_config
from pipeline.config.schema import Config
from pipeline.config.stage_settings import settings_of_stage
from pipeline.run.changes import KEPT, describe_differences
from pipeline.run.run_folder import RESTORED, Run, refuse_foreign_folder
from pipeline.run.run_stages import lock_run


def restore(repo: str, run: Run, config: Config) -> State | None:
    """Download the run from its repo, for `make train` on a machine that has no rows of it yet.

    Returns:
        The restored state, or None when the repo holds none or this machine has the rows already.

    Raises:
        UserError: the repo holds another run, or this run with other settings of its rows or training.
    """
    if run.done("data"):
        return None
    found = look(repo, run)
    if not found:
        return None
    name, commit, state = found
    if state.run != run.folder.name:
        raise UserError(
            f"{name} holds the run {state.run}, this one is {run.folder.name}",
            f"RUN={state.run}, or CHECKPOINTS=another repo",
        )
    text = small(name, "config.yaml", commit).decode("utf-8", "replace")
    there = build_config(*yaml_tree.parse(text, f"{name}/config.yaml"), Path(f"{name}/config.yaml"))
    faults = []
    for stage in KEPT:
        both = (settings_of_stage(tree, stage) for tree in (there, config))
        faults += describe_differences(*both, there="there", here="here")
    if faults:
        raise UserError(
            f"{name} holds the run {state.run} of another config:\n  " + "\n  ".join(faults),
            "undo the change, or start a new run: RUN=another-name CHECKPOINTS=another repo",
        )
    return fetched(name, commit, state, run)


def resume(repo: str, runs: Path) -> State:
    """Download the run that a repo holds into the folder `runs`, for `make resume`, and return its state.

    A run that this machine has already is left as it is. Raise UserError when the repo holds no run.
    """
    found = look(repo, None)
    if not found:
        raise UserError(f"{repo} holds no state of a run", "correct CHECKPOINTS; a run is there once its rows are made")
    name, commit, state = found
    run = Run(runs / state.run)
    if run.done("data"):
        hub.say(f"checkpoints: {run.folder} is here already and goes on from what it has")
        return state
    with lock_run(run, f"make resume CHECKPOINTS={repo}"):
        return fetched(name, commit, state, run)


def look(repo: str, run: Run | None) -> tuple[str, str, State] | None:
    """Return (repo, commit, state) of what a repo holds, or None when it holds no state.

    Raises:
        UserError: the run is complete; the message names its result.
    """
    name = states.repository(repo, run.folder.name if run else None)
    api, what = hub.api(), f"checkpoints in {name}"
    head = hub.found(what, lambda: api.repo_info(name))
    state = head and hub.patiently(what, lambda: push.found(name, head))
    if not state:
        return None
    if states.RESULT in state.files:
        said = json.loads(small(name, states.RESULT, head.sha))
        where = f"{said['repo']}@{said['tag']}" if "tag" in said else said["repo"]
        raise UserError(f"the run {state.run} has ended: it is {where}", f"make deploy-mac REPO={where}")
    return name, head.sha, state


def small(repo: str, name: str, commit: str) -> bytes:
    """Return the content of a small file in a repo; a file larger than a state may be is refused."""
    return hub.patiently(f"{name} of {repo}", lambda: hub.read_small(repo, name, commit, states.MOST))


def fetched(repo: str, commit: str, state: State, run: Run) -> State:
    """Download the files of a state into the run's folder, verify them, and return the state.

    The folder appears only when all files are in it. What was there is set aside.

    Raises:
        UserError: a file differs from the one that was sent, or the folder is not Ferry's.
    """
    from huggingface_hub import snapshot_download

    refuse_foreign_folder(run.folder)
    with files.writing(run.folder) as part:
        hub.patiently(
            f"checkpoints from {repo}",
            lambda: snapshot_download(repo, revision=commit, local_dir=part, allow_patterns=list(state.files)),
        )
        shutil.rmtree(part / ".cache", ignore_errors=True)
        for name, item in state.files.items():
            if not (part / name).is_file() or states.describe(part / name) != item:
                raise UserError(f"{name} in {repo} is not the file that was sent", "run the same command again")
        files.write_json(part / RESTORED, {"repo": repo, "commit": commit, "at": str(state)})
        if kept := files.set_aside(run.folder):  # a run that was started here and has no rows yet
            console.note(f"what was in {run.folder} is in {kept} now")
    hub.say(f"checkpoints: {run.folder} from {repo}, {state}")
    return state
