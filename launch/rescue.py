"""What a run made on a machine that is about to go: brought home, and sent along when the same command starts it elsewhere.

All of the run but the 16-bit weights, which its adapter makes again: rows, checkpoints, adapter, records, and a repo that
did not get to the Hub.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from common import files, hub
from common.errors import UserError
from launch.provider import Launcher, Lost, Missing


def bring(launcher: Launcher, name: str, run: str, target: Path) -> str | None:
    """The run's folder there into `target`; None, or why it cannot be had though it may be there."""
    stream = _Stream(_pack(launcher, name, run))
    try:
        with files.writing(target) as part:
            extract_tree(stream, part)
            older = files.set_aside(target)
    except (Lost, Missing) as error:  # out of reach, or it made nothing; unless some of it came
        return error.message if stream.count else None
    except (UserError, OSError, tarfile.TarError) as error:
        return getattr(error, "message", str(error))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    before = f"; what was there is in {older}" if older else ""
    hub.say(f"{run}: {size / 1e6:.0f} MB of it brought home to {target}{before}")
    return None


def extract_tree(stream: "_Stream", target: Path) -> None:
    """Write the files of a tar into a new folder. Raises what the stream raises, also after the tar's end mark."""
    target.mkdir()
    # hard links of one file stay inside; nothing lands outside of `target`
    with tarfile.open(fileobj=io.BufferedReader(stream), mode="r|") as tar:
        tar.extractall(target, filter="data")
    stream.drain()
    files.sync(target)  # before the copy from an earlier machine gives up its name


def remove_copies(target: Path) -> None:
    """Remove what was brought home, and what was set aside for it."""
    for path in (target, *target.parent.glob(f"{target.name}.before*")):
        files.remove(path)


def along(target: Path, run: str) -> dict[str, Path]:
    """{place in the tree: file} of what was brought home."""
    return {f"runs/{run}/{path.relative_to(target)}": path for path in sorted(target.rglob("*")) if path.is_file()}


def _pack(launcher: Launcher, name: str, run: str) -> Iterator[bytes]:
    """The blocks of the run's tar. Raises when the first one is asked for, whatever the launcher does."""
    yield from launcher.pack(name, run)


class _Stream(io.RawIOBase):
    """Blocks as a file. count: bytes that came."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.rest, self.count = blocks, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.rest = self.rest or self._read_block()
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

    def drain(self) -> None:
        """Read what is left: a tar's reader stops at its end mark, and its exit code is known after it only."""
        while self._read_block():
            pass

    def _read_block(self) -> bytes:
        block = next(self.blocks, b"")
        self.count += len(block)
        return block
