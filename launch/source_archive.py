"""The committed tree as it is sent: a tar that git makes, with files that name the commit."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

from common.errors import UserError
from launch.provider import Job

ROOT = Path(__file__).resolve().parents[1]


def git(repository: Path, *arguments: str) -> bytes:
    """Run git and return its output. Raises UserError with git's own message when it fails or is not installed."""
    try:
        done = subprocess.run(["git", "--no-optional-locks", "-C", str(repository), *arguments], capture_output=True)
    except OSError:
        raise UserError("git is not here, and what travels is what it has committed", "install git") from None
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(
            f"git {arguments[0]}: {(why or ['it fails'])[-1]}", "see to the checkout, then the same command"
        )
    return done.stdout


def head(repository: Path) -> str:
    """Return the id of the commit that is checked out."""
    return git(repository, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()


def has(repository: Path, commit: str) -> bool:
    """Return whether the repository has the commit."""
    try:
        git(repository, "cat-file", "-e", f"{commit}^{{commit}}")
    except UserError:
        return False
    return True


def left_behind(repository: Path, but: set[str]) -> list[str]:
    """Return the files that are not sent because they differ from the commit or are not in it, without `sent_names`."""
    lines = git(repository, "status", "--porcelain", "-z", "--no-renames").decode(errors="replace").split("\0")
    return [line[3:] for line in lines if line and line[3:] not in but]


def content(repository: Path, commit: str, name: str) -> bytes | None:
    """Return a file of the commit; None when the commit has no file of that name."""
    try:
        return git(repository, "cat-file", "blob", f"{commit}:{name}")
    except UserError:
        return None


def locks(repository: Path, commit: str) -> str:
    """Return twelve hex digits of a hash of the commit's lock files: jobs with the same ones share an environment."""
    return hashlib.sha256(git(repository, "ls-tree", "-r", commit, "setup/locks")).hexdigest()[:12]


def same_locks(repository: Path, commit: str) -> bool:
    """Return whether the checkout's lock files are unchanged since its own commit, and equal to those of `commit`."""
    changed = git(repository, "status", "--porcelain", "setup/locks")
    return not changed and locks(repository, commit) == locks(repository, head(repository))


def packed(job: Job, more: dict[str, str] | None = None) -> bytes:
    """Return the tar of a job: the tree, revision.json and job/{config.yaml,commit,listing}.

    revision.json is what pipeline/toolchain/git.py reads. `extra_files` (name -> text) are added to them.
    """
    archive = git(job.repository, "archive", "--format=tar", job.commit)
    hashes = hashed(archive)
    sent = {"url": job.url, "commit": job.commit, "files": {n: h for n, h in hashes.items() if n not in job.files}}
    beside = {
        "revision.json": json.dumps(sent, indent=1),
        "job/config.yaml": job.config,
        "job/commit": job.commit,
        "job/listing": "".join(f"{name}\n" for name in hashes),
    } | (more or {})
    whole = io.BytesIO(archive)
    with tarfile.open(fileobj=whole, mode="a") as tar:
        for name, text in beside.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return whole.getvalue()


def hashed(archive: bytes) -> dict[str, str]:
    """Return name -> sha256 of the files in a tar."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {item.name: hashlib.sha256(tar.extractfile(item).read()).hexdigest() for item in tar if item.isfile()}
