"""python -m pipeline.checkpoint_sync.push FOLDER REPO: push the state of the run in FOLDER to its repo on the Hub.

The push is one commit, after which the large files of older states are deleted. It is a process of its own, so that the
training does not wait for it and one that hangs can be ended (background_push.py).
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common import console, hub
from common.errors import UserError
from pipeline.checkpoint_sync import snapshot
from pipeline.checkpoint_sync.background_push import CLIENT_ERROR_CODE
from pipeline.checkpoint_sync.snapshot import STATE_FILE, RunState
from pipeline.run.run_folder import Run

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

README_TEMPLATE = """---
tags:
- ferry
---
# State of the Ferry run {run}

Checkpoints and rows of a training, so that another machine can go on with it:

    make resume CHECKPOINTS={repo}

Private: it holds the rows. When the run has ended, it can be deleted.
"""


class NewerStateError(UserError):
    """The repo holds a later state of the run than this machine."""


def push_state(run: Run, repo: str) -> RunState | None:
    """Push the run's state to its repo, which is created when it does not exist, and delete files of older states.

    Returns:
        The state that was sent, or None when the repo holds it already.

    Raises:
        UserError: the state cannot be sent.
        NewerStateError: another machine has pushed a later state.
    """
    repo = snapshot.fill_repo_name(repo, run.folder.name)
    api, activity = hub.create_client(), f"checkpoints to {repo}"
    hub.retry(activity, lambda: api.create_repo(repo, private=True, exist_ok=True))
    state = snapshot.snapshot_run(run)
    earlier_states: list[RunState] = []
    if not hub.retry(activity, lambda: commit_state(api, repo, run, state, earlier_states), retry_statuses=(409, 412)):
        return None
    try:
        hub.retry(
            activity, lambda: delete_old_files(api, repo, state, earlier_states), retry_seconds=hub.QUICK_RETRY_SECONDS
        )
    except UserError as error:
        hub.print_message(f"note: old checkpoints stay in the history of {repo}: {error.message}")
    return state


def commit_state(api, repo: str, run: Run, state: RunState, earlier_states: list[RunState]) -> bool:
    """Replace the repo's state by a new one in a single commit. Return False when it was there before the first try.

    Args:
        earlier_states: a list to which each try adds the state that it finds in the repo. When the answer to a commit
            is lost, the next try finds the new state there.
    """
    from huggingface_hub import CommitOperationDelete

    repo_info = api.model_info(repo)
    repo_state, repo_names = read_repo_state(repo, repo_info), hub.list_repo_files(repo_info)
    refuse_conflicting_state(repo, repo_state, state)
    operations = list_uploads(run, state, repo_state)
    if repo_state and not operations and repo_state.files.keys() == state.files.keys():
        return bool(earlier_states)
    earlier_states += [repo_state] if repo_state else []
    operations += [
        CommitOperationDelete(name)
        for name in sorted((repo_state.files if repo_state else {}).keys() - state.files.keys())
        if name in repo_names
    ]
    small_files = {STATE_FILE: snapshot.dump_state(state)}
    small_files |= (
        {} if "README.md" in repo_names else {"README.md": README_TEMPLATE.format(run=state.run, repo=repo).encode()}
    )
    operations += [build_upload(name, content) for name, content in small_files.items()]
    api.create_commit(repo, operations, commit_message=f"{state.run}: {state}", parent_commit=repo_info.sha)
    return True


def list_uploads(run: Run, state: RunState, repo_state: RunState | None) -> list:
    """Return an upload operation for each file that is new or has changed since the state in the repo."""
    repo_files = repo_state.files if repo_state else {}
    changed_names = [name for name, item in state.files.items() if repo_files.get(name) != item]
    return [build_upload(name, run.folder / name, state.files[name]["sha256"]) for name in changed_names]


def build_upload(name: str, content: Path | bytes, digest: str | None = None):
    """Return the operation that uploads one file. `digest` is its sha256 in the state, where it is known."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, content)
    if digest:  # the client computes the hash once more, which would be another one if the file has changed since
        operation.upload_info.sha256 = bytes.fromhex(digest)
    return operation


def read_repo_state(repo: str, repo_info: "ModelInfo") -> RunState | None:
    """Return the state in a repo, or None in a new repo.

    Raises:
        UserError: the repo is public, holds something else, or holds a state that cannot be read.
    """
    if not repo_info.private:
        raise UserError(
            f"{repo} is public, but checkpoints hold the training rows",
            "make it private in its settings on the Hub, or choose a different one: CHECKPOINTS=owner/name",
            code="checkpoints.public_repo",
        )
    if other_files := hub.find_foreign_files(repo_info, STATE_FILE):
        raise UserError(
            f"{repo} was not created by Ferry: it holds {', '.join(other_files[:4])} and no {STATE_FILE}",
            "choose a different one: CHECKPOINTS=owner/name",
            code="checkpoints.foreign_repo",
        )
    if STATE_FILE not in hub.list_repo_files(repo_info):
        return None
    return snapshot.parse_state(
        hub.read_small_file(repo, STATE_FILE, repo_info.sha, snapshot.MAX_STATE_BYTES), f"{repo}/{STATE_FILE}"
    )


def refuse_conflicting_state(
    repo: str, repo_state: RunState | None, local_state: RunState, may_be_behind: bool = False
) -> None:
    """Raise UserError when this machine may not push its state to the repo.

    Args:
        repo_state: the state in the repo, None in a new repo.
        local_state: the state on this machine.
        may_be_behind: allow a later state in the repo, because this machine will start from it.

    Raises:
        UserError: the repo holds another run, or the same run with other settings.
        NewerStateError: another machine has pushed a later state.
    """
    if repo_state and not repo_state.is_same_training(local_state):
        is_same_run = repo_state.run == local_state.run
        raise UserError(
            f"{repo} holds the run {repo_state.run}"
            + (" with a different config" if is_same_run else f", this run is {local_state.run}"),
            "choose a different repo: CHECKPOINTS=owner/name, or delete this one on the Hub",
            code="checkpoints.other_config" if is_same_run else "checkpoints.other_run",
        )
    if repo_state and repo_state.progress > local_state.progress and not may_be_behind:
        raise NewerStateError(
            f"{repo} is at {repo_state}, this machine at {local_state}: another machine has resumed {local_state.run}",
            f"to resume from that state: rm -r the run's folder here, then `make resume CHECKPOINTS={repo}`",
            code="checkpoints.newer_state",
        )


def delete_old_files(api, repo: str, state: RunState, earlier_states: list[RunState]) -> None:
    """Delete the large files of earlier states from the repo: without a commit they still count as storage.

    Files that no state names belong to the user and stay. So do files that are still in the repo under another name.
    """
    unused_hashes = {item["sha256"] for old in earlier_states for item in old.files.values()}
    unused_hashes -= {item["sha256"] for item in state.files.values()}
    if not unused_hashes:
        return
    unused_hashes -= {item.lfs.sha256 for item in api.repo_info(repo, files_metadata=True).siblings if item.lfs}
    if old := [item for item in api.list_lfs_files(repo) if item.file_oid in unused_hashes]:
        api.permanently_delete_lfs_files(repo, old)


def main(folder: str, repo: str) -> int:
    """Push the run's state and return the exit code: 0 done, 2 an error that the user can cure, 3 a client error."""
    os.nice(10)  # the training comes first
    console.is_progress_shown = False  # it would appear among the lines of the training
    try:
        state = push_state(Run(Path(folder)), repo)
    except UserError as error:
        console.print_message(str(error))
        return 2
    except Exception as error:  # noqa: BLE001 an error of hf_xet, for example: the next push goes without Xet
        hub.print_message(f"checkpoints: not sent ({type(error).__name__}: {error})")
        return CLIENT_ERROR_CODE
    if state:
        hub.print_message(f"checkpoints: {state}, in {hub.fill_placeholders(repo, Path(folder).name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
