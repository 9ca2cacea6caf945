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
from launch.provider import ConnectionLost, Provider, RemoteFileMissing


def rescue_run(provider: Provider, job_name: str, run_name: str, target: Path) -> str | None:
    """Download the run's folder into `target`, and set aside what was there.

    Return None, or the reason why the folder could not be downloaded though it may exist.
    """
    stream = _BlockStream(_read_tar_blocks(provider, job_name, run_name))
    try:
        with files.write_atomically(target) as part:
            extract_tree(stream, part)
            old_folder = files.set_aside(target)
    except (ConnectionLost, RemoteFileMissing) as error:
        # Without a byte the machine is out of reach or the run made nothing; after the first byte work would be lost.
        return error.message if stream.byte_count else None
    except (UserError, OSError, tarfile.TarError) as error:
        return getattr(error, "message", str(error))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    old_note = f"; the earlier copy is in {old_folder}" if old_folder else ""
    hub.print_message(f"{run_name}: {size / 1e6:.0f} MB downloaded to {target}{old_note}")
    return None


def extract_tree(stream: "_BlockStream", target: Path) -> None:
    """Write the files of a tar into a new folder. Raises what the stream raises, also after the tar's end mark."""
    target.mkdir()
    # hard links between the files of the tar are allowed; nothing is written outside of `target`
    with tarfile.open(fileobj=io.BufferedReader(stream), mode="r|") as tar:
        tar.extractall(target, filter="data")
    stream.drain()
    files.fsync_tree(target)  # before the copy from an earlier machine is renamed


def remove_rescued_copies(target: Path) -> None:
    """Remove what was rescued, and what was set aside for it."""
    for path in (target, *target.parent.glob(f"{target.name}.before*")):
        files.remove(path)


def list_rescued_files(folder: Path, run_name: str) -> dict[str, Path]:
    """Return path in the sent tree -> local file of what was rescued."""
    return {f"runs/{run_name}/{path.relative_to(folder)}": path for path in sorted(folder.rglob("*")) if path.is_file()}


def _read_tar_blocks(provider: Provider, job_name: str, run_name: str) -> Iterator[bytes]:
    """Yield the blocks of the run's tar. As a generator it raises at the first block, whenever the provider raises."""
    yield from provider.pack_run(job_name, run_name)


class _BlockStream(io.RawIOBase):
    """A file that is read from blocks; `byte_count` counts the bytes that have come."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.unread, self.byte_count = blocks, b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.unread = self.unread or self._read_block()
        count = min(len(buffer), len(self.unread))
        buffer[:count], self.unread = self.unread[:count], self.unread[count:]
        return count

    def drain(self) -> None:
        """Read to the end: a tar's reader stops at its end mark, and the exit code of tar is known only after that."""
        while self._read_block():
            pass

    def _read_block(self) -> bytes:
        block = next(self.blocks, b"")
        self.byte_count += len(block)
        return block
