"""Both versions of huggingface_hub that Ferry meets: the trainer's environment has 1.x, a Mac may get 2.x."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import files

# huggingface_hub 2 and what it needs that an environment with 1.x lacks; h11, anyio, idna and the rest are there.
PINS = ("huggingface_hub==2.4.0", "httpx2==2.16.2", "httpcore2==2.16.2", "truststore==0.10.5")


@functools.cache
def client(version: str) -> dict[str, str]:
    """Environment variables under which a subprocess imports huggingface_hub 1 or 2."""
    if version == "1":
        return {}
    target = files.cache_dir() / "test" / "-".join(PINS).replace("==", "-")
    if not target.exists():
        install(target)
    return {"PYTHONPATH": str(target)}


def install(target: Path) -> None:
    """The folder gets its name when pip is done; a killed pip leaves only a folder of another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = tempfile.mkdtemp(prefix=".", dir=target.parent)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", part, *PINS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files.fsync_tree(Path(part))
    try:
        os.rename(part, target)
    except OSError:  # another run was faster
        files.remove(Path(part))
