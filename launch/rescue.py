"""What a run made on a machine that is about to go: brought home, and sent along when the same command starts it elsewhere.

All of the run but the 16-bit weights, which its adapter makes again: rows, checkpoints, adapter, records, and a repo that
did not get to the Hub.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from contract import files, hub
from contract.errors import UserError
from launch.launcher import Launcher, Lost, Missing


def bring(launcher: Launcher, name: str, run: str, target: Path) -> str | None:
    """The run's folder there into `target`; None, or why it cannot be had though it may be there."""
    try:
        with files.writing(target) as part:
            part.mkdir()
            # hard links of one file stay inside; nothing lands outside of `part`
            with tarfile.open(fileobj=io.BufferedReader(_Stream(launcher.pack(name, run))), mode="r|") as tar:
                tar.extractall(part, filter="data")
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        hub.say(f"{run}: {size / 1e6:.0f} MB of it brought home to {target}")
    except (Lost, Missing):  # out of reach, or it made nothing
        return None
    except (UserError, OSError, tarfile.TarError) as error:
        return getattr(error, "message", str(error))
    return None


def along(target: Path, run: str) -> dict[str, Path]:
    """{place in the tree: file} of what was brought home."""
    return {f"runs/{run}/{path.relative_to(target)}": path for path in sorted(target.rglob("*")) if path.is_file()}


class _Stream(io.RawIOBase):
    """Blocks as a file."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.rest = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.rest = self.rest or next(self.blocks, b"")
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count
