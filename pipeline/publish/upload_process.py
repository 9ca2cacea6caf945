"""Upload a folder in a process of its own, which upload.py starts: `python -m pipeline.publish.upload_process`.

It reads a job as JSON from stdin:

    {"folder": a complete repo, "repo": owner/name, "private": bool, "tag": name or null}

It writes JSON lines to stdout: {"beat": n, "client": last warning} for progress, and at the end {"result": ...},
{"error": [message, hint]} or {"lost": reason}. "lost" means that a new process may succeed.
"""

import json
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path

from common import files, hub
from common.errors import UserError, shown
from contract import manifest


def main() -> None:
    """Read the job from stdin, upload its folder, and print the outcome as the last line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # only our own lines reach the parent process; what a library prints goes to stderr
    job = json.load(sys.stdin)
    threading.Thread(target=beat, args=(out, os.getppid()), daemon=True).start()
    try:
        word = {"result": send(Path(job["folder"]), job["repo"], job["private"], job["tag"])}
    except UserError as error:
        word = {"error": [error.message, error.hint]}
    except Exception as error:  # noqa: BLE001 for example from hf_xet, which a new process does not use
        word = {"lost": hub.hidden(f"{type(error).__name__}: {error}")}
    print(json.dumps(word), file=out, flush=True)
    os._exit(0)  # do not wait for the threads of a library


class Heard(logging.Handler):
    """A log handler that keeps the last warning of the Hub client, which says why it waits."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = hub.hidden(record.getMessage())


heard = Heard(logging.WARNING)


def beat(out, courier: int) -> None:
    """Write a progress line whenever a progress bar moved or the Hub was called; exit when the parent process is gone.

    So an upload does not continue without its parent process.

    Args:
        output: The file that the parent process reads.
        parent_pid: The process id of the parent process.
    """
    from tqdm import tqdm

    last = None
    while os.getppid() == courier:
        now = [hub.attempts, *((id(bar), bar.n) for bar in list(tqdm._instances))]
        if now != last:
            try:
                print(json.dumps({"beat": len(now), "client": heard.text}), file=out, flush=True)
            except OSError:
                break
        last = now
        time.sleep(1)
    os._exit(1)


def send(folder: Path, repo: str, private: bool, tag: str | None) -> dict:
    """Create the repo, commit the folder, compare the hashes and tag the commit; skip what is done already.

    Returns:
        {repo, commit, tag}.

    Raises:
        UserError: The repo holds something else, the Hub refuses, or what arrived differs from what was sent.
    """
    api, what = hub.api(), f"publish to {repo}"
    listen()
    made = manifest.read(folder / manifest.NAME)
    hub.patiently(what, lambda: api.create_repo(repo, private=private, exist_ok=True))
    # A lost answer looks like a failure, so each attempt reads the repo again and does not repeat what succeeded.
    commit = hub.patiently(what, lambda: committed(api, folder, repo, private, made), again=(409, 412))
    hub.patiently(what, lambda: compare(api, folder, repo, commit, made))
    name = hub.patiently(what, lambda: tagged(api, repo, commit, tag), again=(409,))
    return {"repo": repo, "commit": commit, "tag": name}


def listen() -> None:
    """Send the client's warnings to the parent process instead of the terminal, because they quote signed URLs."""
    logger = logging.getLogger("huggingface_hub")
    logger.handlers, logger.propagate = [heard], False
    logger.setLevel(logging.WARNING)


def committed(api, folder: Path, repo: str, private: bool, made: manifest.Manifest) -> str:
    """Commit the whole folder at once and return the commit's id, so that no revision has a manifest without its files.

    The same commit deletes the files of the previous version.
    """
    from huggingface_hub import CommitOperationDelete

    head = api.repo_info(repo, files_metadata=True)
    refuse_strange(head, repo, private)
    there = {sibling.rfilename for sibling in head.siblings}
    names = {item.file for item in (*made.artifacts, *made.files)} | {manifest.NAME}
    old = outdated(repo, head.sha, made.name) if manifest.NAME in there else set()
    operations = [addition(folder, name, digest) for name, digest in digests(folder, made).items()]
    operations += [CommitOperationDelete(name) for name in sorted(old & there - names)]
    done = api.create_commit(repo, operations, commit_message=f"Ferry: {made.name}", parent_commit=head.sha)
    return done.oid


def digests(folder: Path, made: manifest.Manifest) -> dict[str, str]:
    """Return the sha256 of every file by its name, from the manifest; the manifest itself comes last."""
    named = {item.file: item.sha256 for item in (*made.artifacts, *made.files)}
    return named | {manifest.NAME: files.sha256(folder / manifest.NAME)}


def addition(folder: Path, name: str, digest: str):
    """Return the client's operation that adds a file, with the sha256 from the manifest.

    Without that the client would hash the file once more. The Hub compares what arrives with the sha256.
    """
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, folder / name)
    operation.upload_info.sha256 = bytes.fromhex(digest)
    return operation


def refuse_strange(head, repo: str, private: bool) -> None:
    """Raise UserError for a repo that holds something else, or that is public when the config says private."""
    if private and not head.private:
        raise UserError(
            f"{repo} is public, and publish.private is true",
            "make it private in its settings on the Hub, or choose another publish.repo, "
            "or set publish.private to false",
        )
    if strange := hub.strange(head, manifest.NAME):
        raise UserError(
            f"{repo} is a repo of something else: it holds {', '.join(strange[:4])} and no {manifest.NAME}",
            "choose another publish.repo",
        )


def outdated(repo: str, revision: str, name: str) -> set[str]:
    """Return the files that the manifest on the Hub names.

    Those that the new manifest does not name are deleted from the main branch; tags keep them.

    Args:
        name: The name of the model that is published now.

    Raises:
        UserError: The manifest on the Hub is of another program, another model or a newer Ferry.
    """
    content = hub.read_small(repo, manifest.NAME, revision, manifest.MAX_BYTES)
    try:
        made = manifest.parse(content, f"{repo}/{manifest.NAME}")
    except UserError as error:
        if (manifest.schema(content) or 0) > manifest.SCHEMA:
            raise
        if (older := read_older_manifest(content)) is None:
            raise UserError(f"{repo} holds another program's {manifest.NAME}", "choose another publish.repo") from error
        refuse_other_model(repo, older.get("name", name), name)
        return set()  # this Ferry cannot read the manifest of an older one, so its files stay
    refuse_other_model(repo, made.name, name)
    return {item.file for item in (*made.artifacts, *made.files)}


def read_older_manifest(content: bytes) -> dict | None:
    """Return the JSON of a manifest that an older Ferry wrote; None when it is not one of Ferry's."""
    if manifest.schema(content) is None:
        return None
    value = json.loads(content)
    return value if {"artifacts", "golden"} <= value.keys() else None


def refuse_other_model(repo: str, published: object, name: str) -> None:
    """Raise UserError when the repo holds a model of another name, whose files this one would delete."""
    if published != name:
        raise UserError(
            f"{repo} holds the model {shown(str(published))}, and this one is {name}", "choose another publish.repo"
        )


def compare(api, folder: Path, repo: str, commit: str, made: manifest.Manifest) -> None:
    """Raise UserError unless the Hub holds every file with the sha256 that was sent."""
    there = {s.rfilename: s for s in api.repo_info(repo, revision=commit, files_metadata=True).siblings}
    for name, digest in digests(folder, made).items():
        large = there[name].lfs if name in there else None
        if name not in there:
            found = "nothing"
        elif large:
            found = large.sha256
        else:  # the Hub knows only the SHA-1 of files that are not in LFS
            limit = (folder / name).stat().st_size + 1
            found = files.sha256_bytes(hub.read_small(repo, name, commit, limit))
        if found != digest:
            raise UserError(f"{repo}/{name} on the Hub is {found}, sent was {digest}", "run the same command again")


def tagged(api, repo: str, commit: str, wanted: str | None) -> str:
    """Tag the commit and return the tag's name.

    It is the requested one; else the version tag that the commit has already; else the next of v1, v2, ...

    Raises:
        UserError: The requested tag belongs to another commit.
    """
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    numbered = sorted((int(name[1:]), name) for name in tags if re.fullmatch(r"v\d{1,6}", name))

    def is_ours(name: str) -> bool:  # for an annotated tag the refs may give the id of the tag, not of the commit
        return tags[name] == commit or api.repo_info(repo, revision=name).sha == commit

    if wanted and wanted in tags and not is_ours(wanted):
        raise UserError(
            f"{repo} has a tag {wanted} already, of another version", "choose another publish.tag, or none for the next"
        )
    mine = [name for _, name in numbered if tags[name] == commit] or [
        name for _, name in numbered[-1:] if is_ours(name)
    ]
    name = wanted or (mine[0] if mine else f"v{numbered[-1][0] + 1 if numbered else 1}")
    if name not in tags:
        api.create_tag(repo, tag=name, revision=commit)
    return name


if __name__ == "__main__":
    main()
