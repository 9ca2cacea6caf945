"""The committed tree, as it travels: a tar of git's own making, with what says which commit it is."""

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
    """What git says. Raises UserError with its own words when it fails or is not there."""
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
    """The commit that is checked out."""
    return git(repository, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()


def has(repository: Path, commit: str) -> bool:
    try:
        git(repository, "cat-file", "-e", f"{commit}^{{commit}}")
    except UserError:
        return False
    return True


def left_behind(repository: Path, but: set[str]) -> list[str]:
    """Files that differ from the commit, or are not in it: they do not travel. but: those that do, by name."""
    lines = git(repository, "status", "--porcelain", "-z", "--no-renames").decode(errors="replace").split("\0")
    return [line[3:] for line in lines if line and line[3:] not in but]


def content(repository: Path, commit: str, name: str) -> bytes | None:
    """A file of the commit; None where it has none of that name."""
    try:
        return git(repository, "cat-file", "blob", f"{commit}:{name}")
    except UserError:
        return None


def locks(repository: Path, commit: str) -> str:
    """Twelve hex digits of the locked environment: jobs with the same ones share it."""
    return hashlib.sha256(git(repository, "ls-tree", "-r", commit, "setup/locks")).hexdigest()[:12]


def same_locks(repository: Path, commit: str) -> bool:
    """Is the locked environment of the checkout, as it lies there, that of the commit?"""
    changed = git(repository, "status", "--porcelain", "setup/locks")
    return not changed and locks(repository, commit) == locks(repository, head(repository))


def packed(job: Job, more: dict[str, str] | None = None) -> bytes:
    """The tar: the tree, revision.json (pipeline/toolchain/git.py), job/{config.yaml,commit,listing}. more: {name: text} beside them."""
    archive = git(job.repository, "archive", "--format=tar", job.commit)
    hashes = hashed(archive)
    sent = {"url": job.url, "commit": job.commit, "files": {n: h for n, h in hashes.items() if n not in job.files}}
    beside = {
        "revision.json": json.dumps(sent, indent=1), "job/config.yaml": job.config, "job/commit": job.commit,
        "job/listing": "".join(f"{name}\n" for name in hashes),
    } | (more or {})  # fmt: skip
    whole = io.BytesIO(archive)
    with tarfile.open(fileobj=whole, mode="a") as tar:
        for name, text in beside.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return whole.getvalue()


def hashed(archive: bytes) -> dict[str, str]:
    """{name: sha256} of the files of a tar."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {item.name: hashlib.sha256(tar.extractfile(item).read()).hexdigest() for item in tar if item.isfile()}
