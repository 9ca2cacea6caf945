"""A download that can be resumed, also by another process, and that is hashed as it grows."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from typing_extensions import Self

from common import files, hub
from common.errors import UserError
from contract.manifest import Artifact
from contract.published_model import ModelSource


class PartialDownload:
    """Downloads `artifact` to `path`. tick: called with the number of bytes that came; it is negative on a restart."""

    def __init__(self, path: Path, artifact: Artifact, tick: Callable[[int], None]):
        self.path, self.artifact, self.tick = path, artifact, tick
        self.size, self.digest = 0, hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():  # never write to the file that a link leads to
            path.unlink()
        self.file = path.open("r+b" if path.is_file() else "w+b", buffering=0)
        while block := self.file.read(files.CHUNK_BYTES):
            self._add_block(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def download(self, source: ModelSource) -> None:
        """Download what is missing.

        Raise UserError when the source ends early or gives other bytes than the manifest says.
        """
        while self.size < self.artifact.bytes:
            size_before = self.size
            hub.retry(f"pull {self.artifact.file}", lambda: self._resume(source), progress=lambda: self.size)
            if self.size <= size_before:
                raise UserError(
                    f"{self.artifact.file} ended after {self.size} of {self.artifact.bytes} bytes",
                    "run the same command again; it resumes the download",
                    code="pull.ended_early",
                )
        if (self.size, self.digest.hexdigest()) != (self.artifact.bytes, self.artifact.sha256):
            files.remove(self.path)
            raise UserError(
                f"the downloaded {self.artifact.file} has {self.size} bytes and sha256 {self.digest.hexdigest()}, "
                f"its manifest says {self.artifact.bytes} bytes and {self.artifact.sha256}",
                "run the same command again; if it fails again, the file was damaged or replaced: "
                "publish it again with `make publish`",
                code="pull.wrong_content",
            )

    def _resume(self, source: ModelSource) -> None:
        with source.open_blocks(self.artifact, self.size) as (start, blocks):
            if start != self.size:  # a server that cannot resume there
                self._restart()
            for block in blocks:
                self.file.write(block)
                self._add_block(block)
                if self.size > self.artifact.bytes:
                    return

    def _add_block(self, block: bytes) -> None:
        self.digest.update(block)
        self.size += len(block)
        self.tick(len(block))

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.tick(-self.size)
        self.size, self.digest = 0, hashlib.sha256()
