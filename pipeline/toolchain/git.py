"""Which code runs: the commit of the checkout, and whether the files were changed since."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any, TypedDict

from common import files

ROOT = Path(__file__).resolve().parents[2]
# What `make cloud-to-local` uploads with a committed tree, because the repository itself is not uploaded:
# {url, commit, files: {name: sha256}}.
REVISION_FILE = ROOT / "revision.json"


class Checkout(TypedDict):
    """The version of the code; `dirty` is whether files were changed since the commit."""

    url: str | None
    commit: str | None
    dirty: bool


def read_checkout() -> Checkout:
    """Return the version of the code: from a file in an image (no git) and on an instance (no repository)."""
    if image_file := os.environ.get("FERRY_IMAGE"):
        return files.read_json(Path(image_file))["git"]
    if REVISION_FILE.is_file():
        return read_uploaded_checkout(files.read_json(REVISION_FILE), ROOT)
    url = re.sub(r"//[^/@]*@", "//", run_git("remote", "get-url", "origin") or "")  # a remote's URL may contain a token
    return {"url": url or None, "commit": run_git("rev-parse", "HEAD"), "dirty": bool(run_git("status", "--porcelain"))}


def read_uploaded_checkout(revision: dict[str, Any], root: Path) -> Checkout:
    """Return the version of the uploaded tree in `root`, from its revision.json."""
    changed = (name for name, digest in revision["files"].items() if not _has_digest(root / name, digest))
    return {"url": revision["url"], "commit": revision["commit"], "dirty": any(changed)}


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and files.sha256(path) == digest


def run_git(*arguments: str) -> str | None:
    """Run a read-only git command and return its output; None when it fails, prints nothing or is not installed."""
    try:
        result = subprocess.run(["git", "--no-optional-locks", *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
