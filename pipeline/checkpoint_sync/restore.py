"""Restore a run from its repo on the Hub to a machine that has no rows of it: every file by its sha256, or nothing."""

import json
import shutil
from pathlib import Path

from common import console, files, hub
from common.errors import UserError
from pipeline.checkpoint_sync import push, snapshot
from pipeline.checkpoint_sync.snapshot import RunState
from pipeline.config import yaml_tree
from pipeline.config.load import build_config
from pipeline.config.schema import Config
from pipeline.config.stage_settings import settings_of_stage
from pipeline.run.changes import ONE_TIME_STAGES, describe_differences
from pipeline.run.run_folder import RESTORED_FILE, Run, refuse_foreign_folder
from pipeline.run.run_stages import lock_run


def restore_run(repo: str, run: Run, config: Config) -> RunState | None:
    """Download the run from its repo, for `make train` on a machine that has no rows of it yet.

    Returns:
        The restored state, or None when the repo holds none or this machine has the rows already.

    Raises:
        UserError: the repo holds another run, or this run with other settings of its rows or training.
    """
    if run.is_done("data"):
        return None
    remote = find_repo_state(repo, run)
    if not remote:
        return None
    repo_name, commit, state = remote
    if state.run != run.folder.name:
        raise UserError(
            f"{repo_name} holds the run {state.run}, this run is {run.folder.name}",
            f"RUN={state.run}, or a different repo: CHECKPOINTS=owner/name",
            code="checkpoints.other_run",
        )
    if faults := find_config_differences(repo_name, commit, config):
        raise UserError(
            f"{repo_name} holds the run {state.run} with a different config:\n  " + "\n  ".join(faults),
            "undo the change, or start a new run in a different repo: RUN=another-name CHECKPOINTS=owner/name",
            code="checkpoints.other_config",
        )
    return download_run(repo_name, commit, state, run)


def find_config_differences(repo: str, commit: str, config: Config) -> list[str]:
    """Return the settings of the rows and the training that differ between the repo's config and `config`."""
    repo_config = read_repo_config(repo, commit)
    differences = []
    for stage in ONE_TIME_STAGES:
        old, new = settings_of_stage(repo_config, stage), settings_of_stage(config, stage)
        differences += describe_differences(old, new, "in the repo", "here")
    return differences


def read_repo_config(repo: str, commit: str) -> Config:
    """Return the config of the run in a repo."""
    name = f"{repo}/config.yaml"
    text = read_repo_file(repo, "config.yaml", commit).decode("utf-8", "replace")
    tree, lines = yaml_tree.parse_yaml(text, name)
    return build_config(tree, lines, Path(name))


def resume_run(repo: str, runs: Path) -> RunState:
    """Download the run that a repo holds into the folder `runs`, for `make resume`, and return its state.

    A run that this machine has already is left as it is. Raise UserError when the repo holds no run.
    """
    remote = find_repo_state(repo, None)
    if not remote:
        raise UserError(
            f"{repo} holds no run",
            "correct CHECKPOINTS; a run is sent once its rows are prepared",
            code="checkpoints.no_run",
        )
    repo_name, commit, state = remote
    run = Run(runs / state.run)
    if run.is_done("data"):
        hub.print_message(f"checkpoints: {run.folder} exists already and resumes from what it holds")
        return state
    with lock_run(run, f"make resume CHECKPOINTS={repo}"):
        return download_run(repo_name, commit, state, run)


def find_repo_state(repo: str, run: Run | None) -> tuple[str, str, RunState] | None:
    """Return (repo, commit, state) of what a repo holds, or None when it holds no state.

    Raises:
        UserError: the run is complete; the message names its result.
    """
    repo_name = snapshot.fill_repo_name(repo, run.folder.name if run else None)
    api, activity = hub.create_client(), f"checkpoints in {repo_name}"
    repo_info = hub.fetch_or_none(activity, lambda: api.model_info(repo_name))
    if not repo_info:
        return None
    state = hub.retry(activity, lambda: push.read_repo_state(repo_name, repo_info))
    if not state or not repo_info.sha:
        return None
    if snapshot.RESULT_FILE in state.files:
        record = json.loads(read_repo_file(repo_name, snapshot.RESULT_FILE, repo_info.sha))
        address = f"{record['repo']}@{record['tag']}" if "tag" in record else record["repo"]
        text = f"the run {state.run} is complete: it is published as {address}"
        raise UserError(text, f"make deploy-mac REPO={address}", code="checkpoints.run_complete")
    return repo_name, repo_info.sha, state


def read_repo_file(repo: str, file_name: str, commit: str) -> bytes:
    """Return the content of a small file in a repo; a file larger than a state may be is refused."""
    max_bytes = snapshot.MAX_STATE_BYTES
    return hub.retry(f"{file_name} of {repo}", lambda: hub.read_small_file(repo, file_name, commit, max_bytes))


def download_run(repo: str, commit: str, state: RunState, run: Run) -> RunState:
    """Download the files of a state into the run's folder, verify them, and return the state.

    The folder appears only when all files are in it. What was there is set aside.

    Raises:
        UserError: a file differs from the one that was sent, or the folder is not Ferry's.
    """
    from huggingface_hub import snapshot_download

    refuse_foreign_folder(run.folder)
    with files.write_atomically(run.folder) as part:
        hub.retry(
            f"checkpoints from {repo}",
            lambda: snapshot_download(repo, revision=commit, local_dir=part, allow_patterns=list(state.files)),
        )
        shutil.rmtree(part / ".cache", ignore_errors=True)
        refuse_damaged_files(part, repo, state)
        files.write_json(part / RESTORED_FILE, {"repo": repo, "commit": commit, "at": str(state)})
        if backup := files.set_aside(run.folder):  # a run that was started here and has no rows yet
            console.print_note(f"{run.folder} was renamed to {backup}")
    hub.print_message(f"checkpoints: {run.folder} from {repo}, {state}")
    return state


def refuse_damaged_files(folder: Path, repo: str, state: RunState) -> None:
    """Raise UserError when a downloaded file is missing or differs from the one that was sent."""
    for name, item in state.files.items():
        if not (folder / name).is_file() or snapshot.describe_file(folder / name) != item:
            text = f"{name} in {repo} differs from the file that was sent"
            raise UserError(text, "run the same command again", code="checkpoints.damaged_file")
