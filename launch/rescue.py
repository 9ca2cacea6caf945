"""Rescue what a run made on a machine that is about to be given back, and send it along when the run starts elsewhere.

It is all of the run but the 16-bit weights, which can be made again from the adapter: rows, checkpoints, adapter,
records, and a repo that did not reach the Hub.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from common import files, hub
from common.errors import UserError
from launch.provider import Launcher, Lost, Missing


def bring(launcher: Launcher, name: str, run: str, target: Path) -> str | None:
    """Download the run's folder into `target`, and set aside what was there.

    Return None, or the reason why the folder could not be downloaded though it may exist.
    """
    stream = _Stream(_pack(launcher, name, run))
    try:
        with files.writing(target) as part:
            extract_tree(stream, part)
            older = files.set_aside(target)
    except (Lost, Missing) as error:
        # Without a byte the machine is out of reach or the run made nothing; after the first byte work would be lost.
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
    # hard links between the files of the tar are allowed; nothing is written outside of `target`
    with tarfile.open(fileobj=io.BufferedReader(stream), mode="r|") as tar:
        tar.extractall(target, filter="data")
    stream.drain()
    files.sync(target)  # before the copy from an earlier machine is renamed


def remove_copies(target: Path) -> None:
    """Remove what was rescued, and what was set aside for it."""
    for path in (target, *target.parent.glob(f"{target.name}.before*")):
        files.remove(path)


def along(target: Path, run: str) -> dict[str, Path]:
    """Return path in the sent tree -> local file of what was rescued."""
    return {f"runs/{run}/{path.relative_to(target)}": path for path in sorted(target.rglob("*")) if path.is_file()}


def _pack(launcher: Launcher, name: str, run: str) -> Iterator[bytes]:
    """Yield the blocks of the run's tar. As a generator it raises at the first block, whenever the provider raises."""
    yield from launcher.pack(name, run)


class _Stream(io.RawIOBase):
    """A file that is read from blocks; `byte_count` counts the bytes that have come."""

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
        """Read to the end: a tar's reader stops at its end mark, and the exit code of tar is known only after that."""
        while self._read_block():
            pass

    def _read_block(self) -> bytes:
        block = next(self.blocks, b"")
        self.count += len(block)
        return block
