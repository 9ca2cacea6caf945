"""python -m pipeline.checkpoint_sync.push FOLDER REPO: push the state of the run in FOLDER to its repo on the Hub.

The push is one commit, after which the large files of older states are deleted. It is a process of its own, so that the
training does not wait for it and one that hangs can be ended (background_push.py).
"""

import os
import sys
from pathlib import Path

from common import console, hub
from common.errors import UserError
from pipeline.checkpoint_sync import snapshot as states
from pipeline.checkpoint_sync.background_push import BROKEN
from pipeline.checkpoint_sync.snapshot import INDEX, State
from pipeline.run.run_folder import Run

CARD = """---
tags:
- ferry
---
# State of the Ferry run {run}

Checkpoints and rows of a training, so that another machine can go on with it:

    make resume CHECKPOINTS={repo}

Private: it holds the rows. When the run has ended, it can be deleted.
"""


class Overtaken(UserError):
    """The repo holds a later state of the run than this machine."""


def push(run: Run, repo: str) -> State | None:
    """Push the run's state to its repo, which is created when it does not exist, and delete files of older states.

    Returns:
        The state that was sent, or None when the repo holds it already.

    Raises:
        UserError: the state cannot be sent.
        NewerStateError: another machine has pushed a later state.
    """
    repo = states.repository(repo, run.folder.name)
    api, what = hub.api(), f"checkpoints to {repo}"
    hub.patiently(what, lambda: api.create_repo(repo, private=True, exist_ok=True))
    state, before = states.of(run), []
    if not hub.patiently(what, lambda: committed(api, repo, run, state, before), again=(409, 412)):
        return None
    try:
        hub.patiently(what, lambda: forget(api, repo, state, before), seconds=hub.QUICK)
    except UserError as error:
        hub.say(f"note: old checkpoints stay in the history of {repo}: {error.message}")
    return state


def committed(api, repo: str, run: Run, state: State, before: list[State]) -> bool:
    """Replace the repo's state by a new one in a single commit. Return False when it was there before the first try.

    Args:
        earlier_states: a list to which each try adds the state that it finds in the repo. When the answer to a commit
            is lost, the next try finds the new state there.
    """
    from huggingface_hub import CommitOperationDelete

    head = api.repo_info(repo)
    there, names = found(repo, head), {sibling.rfilename for sibling in head.siblings}
    refuse(repo, there, state)
    operations = additions(run, state, there)
    if there and not operations and there.files.keys() == state.files.keys():
        return bool(before)
    before += [there] if there else []
    operations += [
        CommitOperationDelete(name)
        for name in sorted((there.files if there else {}).keys() - state.files.keys())
        if name in names
    ]
    written = {INDEX: states.dump(state)}
    written |= {} if "README.md" in names else {"README.md": CARD.format(run=state.run, repo=repo).encode()}
    operations += [addition(name, content) for name, content in written.items()]
    api.create_commit(repo, operations, commit_message=f"{state.run}: {state}", parent_commit=head.sha)
    return True


def additions(run: Run, state: State, there: State | None) -> list:
    """Return an upload operation for each file that is new or has changed since the state in the repo."""
    before = there.files if there else {}
    changed = [name for name, item in state.files.items() if before.get(name) != item]
    return [addition(name, run.folder / name, state.files[name]["sha256"]) for name in changed]


def addition(name: str, content: Path | bytes, digest: str | None = None):
    """Return the operation that uploads one file. `digest` is its sha256 in the state, where it is known."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, content)
    if digest:  # the client computes the hash once more, which would be another one if the file has changed since
        operation.upload_info.sha256 = bytes.fromhex(digest)
    return operation


def found(repo: str, head) -> State | None:
    """Return the state in a repo, or None in a new repo.

    Raises:
        UserError: the repo is public, holds something else, or holds a state that cannot be read.
    """
    if not head.private:
        raise UserError(
            f"{repo} is public, and checkpoints hold the rows they were trained on",
            "make it private in its settings on the Hub, or choose another: CHECKPOINTS=you/name",
        )
    if strange := hub.strange(head, INDEX):
        raise UserError(
            f"{repo} is a repo of something else: it holds {', '.join(strange[:4])} and no {INDEX}",
            "choose another: CHECKPOINTS=you/name",
        )
    if INDEX not in {sibling.rfilename for sibling in head.siblings}:
        return None
    return states.parse(hub.read_small(repo, INDEX, head.sha, states.MOST), f"{repo}/{INDEX}")


def refuse(repo: str, there: State | None, here: State, behind: bool = False) -> None:
    """Raise UserError when this machine may not push its state to the repo.

    Args:
        repo_state: the state in the repo, None in a new repo.
        local_state: the state on this machine.
        may_be_behind: allow a later state in the repo, because this machine will start from it.

    Raises:
        UserError: the repo holds another run, or the same run with other settings.
        NewerStateError: another machine has pushed a later state.
    """
    if there and not there.is_same_training(here):
        raise UserError(
            f"{repo} holds the run {there.run}" + (" of another config" if there.run == here.run else ""),
            "CHECKPOINTS=another repo, or delete that one on the Hub",
        )
    if there and there.reached > here.reached and not behind:
        raise Overtaken(
            f"{repo} is at {there}, this machine at {here}: another one went on with {here.run}",
            f"to go on from there: rm -r the run's folder here, then `make resume CHECKPOINTS={repo}`",
        )


def forget(api, repo: str, state: State, before: list[State]) -> None:
    """Delete the large files of earlier states from the repo: without a commit they still count as storage.

    Files that no state names belong to the user and stay. So do files that are still in the repo under another name.
    """
    named = {item["sha256"] for old in before for item in old.files.values()}
    named -= {item["sha256"] for item in state.files.values()}
    if not named:
        return
    named -= {item.lfs.sha256 for item in api.repo_info(repo, files_metadata=True).siblings if item.lfs}
    if old := [item for item in api.list_lfs_files(repo) if item.file_oid in named]:
        api.permanently_delete_lfs_files(repo, old)


def main(folder: str, repo: str) -> int:
    """Push the run's state and return the exit code: 0 done, 2 an error that the user can cure, 3 a client error."""
    os.nice(10)  # the training comes first
    console.is_progress_shown = False  # it would appear among the lines of the training
    try:
        state = push(Run(Path(folder)), repo)
    except UserError as error:
        console.say(str(error))
        return 2
    except Exception as error:  # noqa: BLE001 an error of hf_xet, for example: the next push goes without Xet
        hub.say(f"checkpoints: not sent ({type(error).__name__}: {error})")
        return BROKEN
    if state:
        hub.say(f"checkpoints: {state}, in {hub.named(repo, Path(folder).name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
