"""Which code runs: the checkout's commit, and whether it was changed since."""

import os
import re
import subprocess
from pathlib import Path

from common import files

ROOT = Path(__file__).resolve().parents[2]
# What `make cloud-to-local` sends beside a committed tree, for git does not travel: {url, commit, files: {name: sha256}}.
SENT = ROOT / "revision.json"


def checkout() -> dict:
    """{url, commit, dirty}. In an image git is not there to be asked, and on a box there is no repository: both know it."""
    if image := os.environ.get("FERRY_IMAGE"):
        return files.read_json(Path(image))["git"]
    if SENT.is_file():
        return sent(files.read_json(SENT), ROOT)
    url = re.sub(r"//[^/@]*@", "//", git("remote", "get-url", "origin") or "")  # no token of a remote
    return {"url": url or None, "commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def sent(revision: dict, root: Path) -> dict:
    """The same of a tree that was sent: dirty when one of its files is no longer what was sent."""
    changed = (name for name, digest in revision["files"].items() if not _same(root / name, digest))
    return {"url": revision["url"], "commit": revision["commit"], "dirty": any(changed)}


def _same(path: Path, digest: str) -> bool:
    return path.is_file() and files.sha256(path) == digest


def git(*arguments: str) -> str | None:
    """What git says in the current folder, which it does not change; None when it fails, says nothing or is not there."""
    try:
        done = subprocess.run(["git", "--no-optional-locks", *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
