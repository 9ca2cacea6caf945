"""The committed tree as it is sent: a tar that git makes, with files that name the commit."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

from common import files
from common.errors import UserError
from launch.provider import Job

ROOT = Path(__file__).resolve().parents[1]


def run_git(repository: Path, *arguments: str) -> bytes:
    """Run git and return its output. Raise UserError with git's own message when it fails or is not installed."""
    try:
        result = subprocess.run(["git", "--no-optional-locks", "-C", str(repository), *arguments], capture_output=True)
    except OSError:
        raise UserError(
            "git is not installed, and Ferry sends what git has committed", "install git", code="git.not_installed"
        ) from None
    if result.returncode:
        stderr_lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(
            f"git {arguments[0]}: {(stderr_lines or [f'exit code {result.returncode}'])[-1]}",
            "fix the checkout, then run the same command again",
            code="git.failed",
        )
    return result.stdout


def head_commit(repository: Path) -> str:
    """Return the id of the commit that is checked out."""
    return run_git(repository, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()


def has_commit(repository: Path, commit: str) -> bool:
    """Return whether the repository has the commit."""
    try:
        run_git(repository, "cat-file", "-e", f"{commit}^{{commit}}")
    except UserError:
        return False
    return True


def list_unsent_files(repository: Path, sent_names: set[str]) -> list[str]:
    """Return the files that are not sent because they differ from the commit or are not in it, without `sent_names`."""
    lines = run_git(repository, "status", "--porcelain", "-z", "--no-renames").decode(errors="replace").split("\0")
    return [line[3:] for line in lines if line and line[3:] not in sent_names]


def read_committed_file(repository: Path, commit: str, name: str) -> bytes | None:
    """Return a file of the commit; None when the commit has no file of that name."""
    try:
        return run_git(repository, "cat-file", "blob", f"{commit}:{name}")
    except UserError:
        return None


def hash_lock_files(repository: Path, commit: str) -> str:
    """Return twelve hex digits of a hash of the commit's lock files: jobs with the same ones share an environment."""
    return hashlib.sha256(run_git(repository, "ls-tree", "-r", commit, "setup/locks")).hexdigest()[:12]


def has_same_locks(repository: Path, commit: str) -> bool:
    """Return whether the checkout's lock files are unchanged since its own commit, and equal to those of `commit`."""
    changes = run_git(repository, "status", "--porcelain", "setup/locks")
    return not changes and hash_lock_files(repository, commit) == hash_lock_files(repository, head_commit(repository))


def build_archive(job: Job, extra_files: dict[str, str] | None = None) -> bytes:
    """Return the tar of a job: the tree, revision.json and job/{config.yaml,commit,listing}.

    revision.json is what pipeline/toolchain/git.py reads. `extra_files` (name -> text) are added to them.
    """
    archive = run_git(job.repository, "archive", "--format=tar", job.commit)
    sha256s = hash_archive_files(archive)
    revision = {"url": job.url, "commit": job.commit, "files": {n: h for n, h in sha256s.items() if n not in job.files}}
    added_files = {
        "revision.json": json.dumps(revision, indent=1),
        "job/config.yaml": job.config,
        "job/commit": job.commit,
        "job/listing": "".join(f"{name}\n" for name in sha256s),
    } | (extra_files or {})
    buffer = io.BytesIO(archive)
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for name, text in added_files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def hash_archive_files(archive: bytes) -> dict[str, str]:
    """Return name -> sha256 of the files in a tar."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        contents = {item.name: tar.extractfile(item) for item in tar if item.isfile()}
        return {name: files.sha256_bytes(content.read()) for name, content in contents.items() if content}
