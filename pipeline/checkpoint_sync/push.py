"""python -m pipeline.checkpoint_sync.push: the run's state, as it is now, to its repo on the Hub: one commit, then what is old goes.

A process of its own, so that the training waits for nothing of it, and one that hangs can be ended (background_push.py).
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
    """The repo holds a later state than this machine."""


def push(run: Run, repo: str) -> State | None:
    """The state that was sent; None when it was there already.

    Raises UserError when it cannot be done, Overtaken when another machine is further.
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
    """The commit, in which a new state takes the place of the old one. False: it was there already.

    before: gets the state that is there at each try; a commit whose answer was lost is there at the next.
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
    """What the repo does not hold as it is here."""
    before = there.files if there else {}
    changed = [name for name, item in state.files.items() if before.get(name) != item]
    return [addition(name, run.folder / name, state.files[name]["sha256"]) for name in changed]


def addition(name: str, content: Path | bytes, digest: str | None = None):
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, content)
    if digest:  # the client's own, computed once more, would be that of another file if it changed since
        operation.upload_info.sha256 = bytes.fromhex(digest)
    return operation


def found(repo: str, head) -> State | None:
    """The state in a repo; None in a new one. Raises UserError for a public repo, and for one of something else."""
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
    """Raises UserError when the repo is another run's, Overtaken when another machine went on from it.

    behind: this one may be behind it, for it will begin with what is there.
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
    """Large files of the states before: a file that no commit names any more still counts as storage.

    What no state names is somebody's own, and so is what still stands in the repo under another name.
    """
    named = {item["sha256"] for old in before for item in old.files.values()}
    named -= {item["sha256"] for item in state.files.values()}
    if not named:
        return
    named -= {item.lfs.sha256 for item in api.repo_info(repo, files_metadata=True).siblings if item.lfs}
    if old := [item for item in api.list_lfs_files(repo) if item.file_oid in named]:
        api.permanently_delete_lfs_files(repo, old)


def main(folder: str, repo: str) -> int:
    """Send the state of the run to the Hub; returns the exit code."""
    os.nice(10)  # the training comes first
    console.is_progress_shown = False  # among the lines of the training
    try:
        state = push(Run(Path(folder)), repo)
    except UserError as error:
        console.say(str(error))
        return 2
    except Exception as error:  # noqa: BLE001 of hf_xet, say: the next one does without
        hub.say(f"checkpoints: not sent ({type(error).__name__}: {error})")
        return BROKEN
    if state:
        hub.say(f"checkpoints: {state}, in {hub.named(repo, Path(folder).name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
