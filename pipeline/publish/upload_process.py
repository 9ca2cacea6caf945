"""Upload a folder in a process of its own, which upload.py starts: `python -m pipeline.publish.upload_process`.

It reads a job as JSON from stdin:

    {"folder": a complete repo, "repo": owner/name, "private": bool, "tag": name or null}

It writes JSON lines to stdout: {"beat": n, "client": last warning} for progress, and at the end {"result": ...},
{"error": [message, hint, code]} or {"lost": reason}. "lost" means that a new process may succeed.
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common import files, hub
from common.errors import UserError, printable_line
from contract import limits, manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling


def main() -> None:
    """Read the job from stdin, upload its folder, and print the outcome as the last line."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # only our own lines reach the parent process; what a library prints goes to stderr
    job = json.load(sys.stdin)
    threading.Thread(target=report_progress, args=(output, os.getppid()), daemon=True).start()
    print(json.dumps(run_job(job)), file=output, flush=True)
    os._exit(0)  # do not wait for the threads of a library


def run_job(job: dict[str, Any]) -> dict[str, object]:
    """Upload the folder of a job, and return the outcome as the last message has it."""
    try:
        return {"result": publish_folder(Path(job["folder"]), job["repo"], job["private"], job["tag"])}
    except UserError as error:
        return {"error": [error.message, error.hint, error.code]}
    except Exception as error:  # noqa: BLE001 for example from hf_xet, which a new process does not use
        return {"lost": hub.redact_secrets(f"{type(error).__name__}: {error}")}


class LastWarningHandler(logging.Handler):
    """A log handler that keeps the last warning of the Hub client, which says why it waits."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = hub.redact_secrets(record.getMessage())


last_warning = LastWarningHandler(logging.WARNING)


def report_progress(output: IO[str], parent_pid: int) -> None:
    """Write a progress line whenever a progress bar moved or the Hub was called; exit when the parent process is gone.

    So an upload does not continue without its parent process.

    Args:
        output: The file that the parent process reads.
        parent_pid: The process id of the parent process.
    """
    last_state = None
    with contextlib.suppress(OSError):  # the parent process reads no more
        while os.getppid() == parent_pid:
            state = snapshot_progress()
            if state != last_state:
                print(json.dumps({"beat": len(state), "client": last_warning.text}), file=output, flush=True)
            last_state = state
            time.sleep(1)
    os._exit(1)


def snapshot_progress() -> list[object]:
    """Return a value that changes whenever a progress bar moved or the Hub was called."""
    from tqdm import tqdm

    return [hub.attempts, *((id(bar), bar.n) for bar in list(tqdm._instances))]


def publish_folder(folder: Path, repo: str, private: bool, tag: str | None) -> dict:
    """Create the repo, commit the folder, compare the hashes and tag the commit; skip what is done already.

    Returns:
        {repo, commit, tag}.

    Raises:
        UserError: The repo holds something else, the Hub refuses, or what arrived differs from what was sent.
    """
    api, action = hub.create_client(), f"publish to {repo}"
    capture_client_warnings()
    new_manifest = manifest.read_manifest(folder / manifest.FILE_NAME)
    hub.retry(action, lambda: api.create_repo(repo, private=private, exist_ok=True))
    # A lost answer looks like a failure, so each attempt reads the repo again and does not repeat what succeeded.
    commit = hub.retry(
        action, lambda: commit_folder(api, folder, repo, private, new_manifest), retry_statuses=(409, 412)
    )
    hub.retry(action, lambda: verify_upload(api, folder, repo, commit, new_manifest))
    tag_name = hub.retry(action, lambda: tag_commit(api, repo, commit, tag), retry_statuses=(409,))
    return {"repo": repo, "commit": commit, "tag": tag_name}


def capture_client_warnings() -> None:
    """Send the client's warnings to the parent process instead of the terminal, because they quote signed URLs."""
    logger = logging.getLogger("huggingface_hub")
    logger.handlers, logger.propagate = [last_warning], False
    logger.setLevel(logging.WARNING)


def commit_folder(api: "HfApi", folder: Path, repo: str, private: bool, new_manifest: manifest.Manifest) -> str:
    """Commit the whole folder at once and return the commit's id, so that no revision has a manifest without its files.

    The same commit deletes the files of the previous version.
    """
    from huggingface_hub import CommitOperationDelete

    repo_info = api.model_info(repo, files_metadata=True)
    refuse_foreign_repo(repo_info, repo, private)
    hashes = file_hashes(folder, new_manifest)
    additions = [create_add_operation(folder, name, digest) for name, digest in hashes.items()]
    deletions = [CommitOperationDelete(name) for name in find_old_files(repo_info, repo, new_manifest)]
    commit = api.create_commit(
        repo,
        [*additions, *deletions],
        commit_message=f"Ferry: {new_manifest.name}",
        parent_commit=repo_info.sha,
    )
    return commit.oid


def find_old_files(repo_info: "ModelInfo", repo: str, new_manifest: manifest.Manifest) -> list[str]:
    """Return the files that the manifest on the Hub names, and the new one does not."""
    remote_names = hub.list_repo_files(repo_info)
    if manifest.FILE_NAME not in remote_names:
        return []
    assert repo_info.sha, "the Hub names the commit of a repo that it describes"
    new_names = {item.file for item in (*new_manifest.artifacts, *new_manifest.files)} | {manifest.FILE_NAME}
    published_names = list_published_files(repo, repo_info.sha, new_manifest.name)
    return sorted(published_names & remote_names - new_names)


def file_hashes(folder: Path, new_manifest: manifest.Manifest) -> dict[str, str]:
    """Return the sha256 of every file by its name, from the manifest; the manifest itself comes last."""
    hashes = {item.file: item.sha256 for item in (*new_manifest.artifacts, *new_manifest.files)}
    return hashes | {manifest.FILE_NAME: files.sha256(folder / manifest.FILE_NAME)}


def create_add_operation(folder: Path, name: str, digest: str) -> "CommitOperationAdd":
    """Return the operation that adds a file. Its sha256 is known, so that the client does not hash it once more."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, folder / name)
    operation.upload_info.sha256 = bytes.fromhex(digest)  # with which the Hub compares what arrives
    return operation


def refuse_foreign_repo(repo_info: "ModelInfo", repo: str, private: bool) -> None:
    """Raise UserError for a repo that holds something else, or that is public when the config says private."""
    if private and not repo_info.private:
        raise UserError(
            f"{repo} is public, and publish.private is true",
            "make it private in its settings on the Hub, or choose a different publish.repo, "
            "or set publish.private to false",
            code="hub.public_repo",
        )
    if foreign_files := hub.find_foreign_files(repo_info, manifest.FILE_NAME):
        raise UserError(
            f"{repo} was not created by Ferry: it holds {', '.join(foreign_files[:4])} and no {manifest.FILE_NAME}",
            "choose a different publish.repo",
            code="hub.foreign_repo",
        )


def list_published_files(repo: str, revision: str, name: str) -> set[str]:
    """Return the files that the manifest on the Hub names.

    Those that the new manifest does not name are deleted from the main branch; tags keep them.

    Args:
        name: The name of the model that is published now.

    Raises:
        UserError: The manifest on the Hub is of another program, another model or a newer Ferry.
    """
    content = hub.read_small_file(repo, manifest.FILE_NAME, revision, limits.MAX_MANIFEST_BYTES)
    try:
        published_manifest = manifest.parse_manifest(content, f"{repo}/{manifest.FILE_NAME}")
    except UserError as error:
        if (manifest.read_schema_version(content) or 0) > manifest.SCHEMA_VERSION:
            raise
        older_manifest = parse_older_manifest(content)
        if older_manifest is None:
            raise foreign_manifest_error(repo) from error
        refuse_other_model(repo, older_manifest.get("name", name), name)
        return set()  # this Ferry cannot read the manifest of an older one, so its files stay
    refuse_other_model(repo, published_manifest.name, name)
    return {item.file for item in (*published_manifest.artifacts, *published_manifest.files)}


def foreign_manifest_error(repo: str) -> UserError:
    """Return the error for a manifest that another program wrote."""
    return UserError(
        f"{repo}: {manifest.FILE_NAME} was not written by Ferry",
        "choose a different publish.repo",
        code="hub.foreign_manifest",
    )


def parse_older_manifest(content: bytes) -> dict[str, Any] | None:
    """Return the JSON of a manifest that an older Ferry wrote; None when it is not one of Ferry's."""
    if manifest.read_schema_version(content) is None:
        return None
    value = json.loads(content)
    return value if {"artifacts", "golden"} <= value.keys() else None


def refuse_other_model(repo: str, published: object, name: str) -> None:
    """Raise UserError when the repo holds a model of another name, whose files this one would delete."""
    if published != name:
        raise UserError(
            f"{repo} holds the model {printable_line(str(published))}, and this one is {name}",
            "choose a different publish.repo",
            code="hub.other_model",
        )


def verify_upload(api: "HfApi", folder: Path, repo: str, commit: str, new_manifest: manifest.Manifest) -> None:
    """Raise UserError unless the Hub holds every file with the sha256 that was sent."""
    repo_info = api.model_info(repo, revision=commit, files_metadata=True)
    remote_files = {sibling.rfilename: sibling for sibling in repo_info.siblings or ()}
    for name, digest in file_hashes(folder, new_manifest).items():
        max_bytes = (folder / name).stat().st_size + 1
        remote_digest = (
            hash_remote_file(repo, commit, remote_files[name], max_bytes) if name in remote_files else "nothing"
        )
        if remote_digest != digest:
            raise UserError(
                f"{repo}/{name}: the Hub holds {remote_digest}, {digest} was sent",
                "run the same command again",
                code="hub.upload_mismatch",
            )


def hash_remote_file(repo: str, commit: str, file: "RepoSibling", max_bytes: int) -> str:
    """Return the sha256 of a file on the Hub, which knows only the SHA-1 of files that are not in LFS."""
    if file.lfs:
        return file.lfs.sha256
    return files.sha256_bytes(hub.read_small_file(repo, file.rfilename, commit, max_bytes))


def tag_commit(api: "HfApi", repo: str, commit: str, requested_tag: str | None) -> str:
    """Tag the commit and return the tag's name.

    It is the requested one; else the version tag that the commit has already; else the next of v1, v2, ...

    Raises:
        UserError: The requested tag belongs to another commit.
    """
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}

    def is_ours(name: str) -> bool:  # for an annotated tag the refs may give the id of the tag, not of the commit
        return tags[name] == commit or api.model_info(repo, revision=name).sha == commit

    if requested_tag and requested_tag in tags and not is_ours(requested_tag):
        raise UserError(
            f"{repo} already has a tag {requested_tag}, of a different version",
            "choose a different publish.tag, or none for the next version tag",
            code="hub.tag_exists",
        )
    versions = list_version_tags(tags)
    own_tags = [name for name in versions if tags[name] == commit] or [name for name in versions[-1:] if is_ours(name)]
    tag_name = requested_tag or (own_tags[0] if own_tags else next_version_tag(versions))
    if tag_name not in tags:
        api.create_tag(repo, tag=tag_name, revision=commit)
    return tag_name


def list_version_tags(tags: Iterable[str]) -> list[str]:
    """Return those of the tags that are v1, v2, ..., by their numbers."""
    return sorted((tag for tag in tags if re.fullmatch(r"v\d{1,6}", tag)), key=lambda tag: (int(tag[1:]), tag))


def next_version_tag(versions: list[str]) -> str:
    """Return the version tag that follows all of them."""
    return f"v{int(versions[-1][1:]) + 1}" if versions else "v1"


if __name__ == "__main__":
    main()
