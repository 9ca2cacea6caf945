"""Upload a folder in a process of its own, which upload.py starts: `python -m pipeline.publish.upload_process`.

It reads a job as JSON from stdin:

    {"folder": a complete repo, "repo": owner/name, "private": bool, "tag": name or null}

It writes JSON lines to stdout: {"beat": n, "client": last warning} for progress, and at the end {"result": ...},
{"error": [message, hint, code]} or {"lost": reason}. "lost" means that a new process may succeed.
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
from common.errors import UserError, printable_line
from contract import manifest


def main() -> None:
    """Read the job from stdin, upload its folder, and print the outcome as the last line."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # only our own lines reach the parent process; what a library prints goes to stderr
    job = json.load(sys.stdin)
    threading.Thread(target=report_progress, args=(output, os.getppid()), daemon=True).start()
    try:
        message = {"result": publish_folder(Path(job["folder"]), job["repo"], job["private"], job["tag"])}
    except UserError as error:
        message = {"error": [error.message, error.hint, error.code]}
    except Exception as error:  # noqa: BLE001 for example from hf_xet, which a new process does not use
        message = {"lost": hub.redact_secrets(f"{type(error).__name__}: {error}")}
    print(json.dumps(message), file=output, flush=True)
    os._exit(0)  # do not wait for the threads of a library


class LastWarningHandler(logging.Handler):
    """A log handler that keeps the last warning of the Hub client, which says why it waits."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = hub.redact_secrets(record.getMessage())


last_warning = LastWarningHandler(logging.WARNING)


def report_progress(output, parent_pid: int) -> None:
    """Write a progress line whenever a progress bar moved or the Hub was called; exit when the parent process is gone.

    So an upload does not continue without its parent process.

    Args:
        output: The file that the parent process reads.
        parent_pid: The process id of the parent process.
    """
    from tqdm import tqdm

    last_state = None
    while os.getppid() == parent_pid:
        state = [hub.attempts, *((id(bar), bar.n) for bar in list(tqdm._instances))]
        if state != last_state:
            try:
                print(json.dumps({"beat": len(state), "client": last_warning.text}), file=output, flush=True)
            except OSError:
                break
        last_state = state
        time.sleep(1)
    os._exit(1)


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


def commit_folder(api, folder: Path, repo: str, private: bool, new_manifest: manifest.Manifest) -> str:
    """Commit the whole folder at once and return the commit's id, so that no revision has a manifest without its files.

    The same commit deletes the files of the previous version.
    """
    from huggingface_hub import CommitOperationDelete

    repo_info = api.repo_info(repo, files_metadata=True)
    refuse_foreign_repo(repo_info, repo, private)
    remote_names = {sibling.rfilename for sibling in repo_info.siblings}
    new_names = {item.file for item in (*new_manifest.artifacts, *new_manifest.files)} | {manifest.FILE_NAME}
    published_names = (
        list_published_files(repo, repo_info.sha, new_manifest.name) if manifest.FILE_NAME in remote_names else set()
    )
    operations = [
        create_add_operation(folder, name, digest) for name, digest in file_hashes(folder, new_manifest).items()
    ]
    operations += [CommitOperationDelete(name) for name in sorted(published_names & remote_names - new_names)]
    commit = api.create_commit(
        repo, operations, commit_message=f"Ferry: {new_manifest.name}", parent_commit=repo_info.sha
    )
    return commit.oid


def file_hashes(folder: Path, new_manifest: manifest.Manifest) -> dict[str, str]:
    """Return the sha256 of every file by its name, from the manifest; the manifest itself comes last."""
    hashes = {item.file: item.sha256 for item in (*new_manifest.artifacts, *new_manifest.files)}
    return hashes | {manifest.FILE_NAME: files.sha256(folder / manifest.FILE_NAME)}


def create_add_operation(folder: Path, name: str, digest: str):
    """Return the client's operation that adds a file, with the sha256 from the manifest.

    Without that the client would hash the file once more. The Hub compares what arrives with the sha256.
    """
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, folder / name)
    operation.upload_info.sha256 = bytes.fromhex(digest)
    return operation


def refuse_foreign_repo(repo_info, repo: str, private: bool) -> None:
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
    content = hub.read_small_file(repo, manifest.FILE_NAME, revision, manifest.MAX_BYTES)
    try:
        published_manifest = manifest.parse_manifest(content, f"{repo}/{manifest.FILE_NAME}")
    except UserError as error:
        if (manifest.read_schema_version(content) or 0) > manifest.SCHEMA_VERSION:
            raise
        if (older_manifest := parse_older_manifest(content)) is None:
            raise UserError(
                f"{repo}: {manifest.FILE_NAME} was not written by Ferry",
                "choose a different publish.repo",
                code="hub.foreign_manifest",
            ) from error
        refuse_other_model(repo, older_manifest.get("name", name), name)
        return set()  # this Ferry cannot read the manifest of an older one, so its files stay
    refuse_other_model(repo, published_manifest.name, name)
    return {item.file for item in (*published_manifest.artifacts, *published_manifest.files)}


def parse_older_manifest(content: bytes) -> dict | None:
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


def verify_upload(api, folder: Path, repo: str, commit: str, new_manifest: manifest.Manifest) -> None:
    """Raise UserError unless the Hub holds every file with the sha256 that was sent."""
    remote_files = {
        sibling.rfilename: sibling for sibling in api.repo_info(repo, revision=commit, files_metadata=True).siblings
    }
    for name, digest in file_hashes(folder, new_manifest).items():
        lfs_file = remote_files[name].lfs if name in remote_files else None
        if name not in remote_files:
            remote_digest = "nothing"
        elif lfs_file:
            remote_digest = lfs_file.sha256
        else:  # the Hub knows only the SHA-1 of files that are not in LFS
            max_bytes = (folder / name).stat().st_size + 1
            remote_digest = files.sha256_bytes(hub.read_small_file(repo, name, commit, max_bytes))
        if remote_digest != digest:
            raise UserError(
                f"{repo}/{name}: the Hub holds {remote_digest}, {digest} was sent",
                "run the same command again",
                code="hub.upload_mismatch",
            )


def tag_commit(api, repo: str, commit: str, requested_tag: str | None) -> str:
    """Tag the commit and return the tag's name.

    It is the requested one; else the version tag that the commit has already; else the next of v1, v2, ...

    Raises:
        UserError: The requested tag belongs to another commit.
    """
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    version_tags = sorted((int(tag_name[1:]), tag_name) for tag_name in tags if re.fullmatch(r"v\d{1,6}", tag_name))

    def is_ours(name: str) -> bool:  # for an annotated tag the refs may give the id of the tag, not of the commit
        return tags[name] == commit or api.repo_info(repo, revision=name).sha == commit

    if requested_tag and requested_tag in tags and not is_ours(requested_tag):
        raise UserError(
            f"{repo} already has a tag {requested_tag}, of a different version",
            "choose a different publish.tag, or none for the next version tag",
            code="hub.tag_exists",
        )
    commit_tags = [tag_name for _, tag_name in version_tags if tags[tag_name] == commit] or [
        tag_name for _, tag_name in version_tags[-1:] if is_ours(tag_name)
    ]
    tag_name = requested_tag or (
        commit_tags[0] if commit_tags else f"v{version_tags[-1][0] + 1 if version_tags else 1}"
    )
    if tag_name not in tags:
        api.create_tag(repo, tag=tag_name, revision=commit)
    return tag_name


if __name__ == "__main__":
    main()
