"""Which code runs: the commit of the checkout, and whether the files were changed since."""

import os
import re
import subprocess
from pathlib import Path

from common import files

ROOT = Path(__file__).resolve().parents[2]
# What `make cloud-to-local` uploads with a committed tree, because the repository itself is not uploaded:
# {url, commit, files: {name: sha256}}.
SENT = ROOT / "revision.json"


def checkout() -> dict:
    """Return {url, commit, dirty} of the code.

    In an image there is no git, and on an instance there is no repository: there it is read from a file.
    """
    if image := os.environ.get("FERRY_IMAGE"):
        return files.read_json(Path(image))["git"]
    if SENT.is_file():
        return sent(files.read_json(SENT), ROOT)
    url = re.sub(r"//[^/@]*@", "//", git("remote", "get-url", "origin") or "")  # a remote's URL may contain a token
    return {"url": url or None, "commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def sent(revision: dict, root: Path) -> dict:
    """Return {url, commit, dirty} of an uploaded tree, which is dirty when one of its files was changed since.

    Args:
        revision: The content of revision.json.
        root: The folder of the tree.
    """
    changed = (name for name, digest in revision["files"].items() if not _same(root / name, digest))
    return {"url": revision["url"], "commit": revision["commit"], "dirty": any(changed)}


def _same(path: Path, digest: str) -> bool:
    return path.is_file() and files.sha256(path) == digest


def git(*arguments: str) -> str | None:
    """Run a read-only git command and return its output; None when it fails, prints nothing or is not installed."""
    try:
        done = subprocess.run(["git", "--no-optional-locks", *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
