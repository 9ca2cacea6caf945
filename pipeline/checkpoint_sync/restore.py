"""A run from its repo onto a machine that has nothing of it: all of it by sha256, or none."""

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
    """For `make train`: what the repo holds of this run, where this machine has no rows of it yet.

    None: nothing is there, or this machine has the run. Raises UserError when the repo holds another run or config.
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
    """For `make resume`, which knows nothing but the repo. Raises UserError when it holds no run."""
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
    """(repo, commit, state) of what is there. Raises UserError for a run that has ended."""
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
    return hub.patiently(f"{name} of {repo}", lambda: hub.read_small(repo, name, commit, states.MOST))


def fetched(repo: str, commit: str, state: State, run: Run) -> State:
    """The files into the run's folder, compared; they appear there all at once."""
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
        if kept := files.set_aside(run.folder):  # begun here, and without rows yet
            console.note(f"what was in {run.folder} is in {kept} now")
    hub.say(f"checkpoints: {run.folder} from {repo}, {state}")
    return state
