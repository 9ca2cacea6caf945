"""Read a published model from a folder hub, or from the Hub at one commit.

Both sources return the manifest as a whole and artifacts in blocks.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urljoin

from common import files, hub
from common.errors import UserError, shown
from contract import manifest
from contract.manifest import Artifact

REDIRECTS = 5  # within the Hub's own host, such as after a repo was renamed


def find(repo: str) -> "Folder | Remote":
    """Return the source that `repo` names. Raise UserError when there is no such repo, or it has no manifest."""
    return Folder.at(repo) if hub.is_folder(repo) else Remote.at(*hub.split(repo))


@dataclass(frozen=True)
class Folder:
    """A published model in a folder."""

    path: Path
    name: str
    commit: str | None = None
    """Always None: a folder has no commits."""

    @classmethod
    def at(cls, repo: str) -> "Folder":
        """Return the folder that `repo` names. Raise UserError when it does not exist or has no manifest."""
        path = hub.folder(repo)
        if not path.is_dir():
            raise UserError(f"REPO {shown(repo)}: no such folder", "name the folder that `make publish` printed")
        if not (path / manifest.NAME).is_file():
            raise UserError(
                f"{path} holds no {manifest.NAME}: nothing was published there, or not to its end",
                "run `make publish` again where the model was trained",
            )
        return cls(path, path.resolve().name)

    def manifest(self) -> bytes:
        """Return the bytes of the manifest: one more than a manifest may have, when it is larger."""
        with self._read(manifest.NAME) as file:
            return file.read(manifest.MAX_BYTES + 1)

    def refuse(self, artifact: Artifact) -> None:
        """Raise UserError, before a long copy, when an artifact has another size than the manifest says."""
        path = self._plain(artifact.file)
        size = path.stat().st_size if path.is_file() else None
        if size != artifact.bytes:
            raise UserError(
                f"{path} is {'missing' if size is None else f'{size} bytes'}, the manifest says {artifact.bytes} bytes",
                "publish it again: `make publish`",
            )

    @contextlib.contextmanager
    def opened(self, artifact: Artifact, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Yield (the offset of the first byte, the blocks of an artifact from there on)."""
        with self._read(artifact.file) as file:
            file.seek(start)
            yield start, iter(lambda: file.read(files.CHUNK), b"")

    def _read(self, name: str) -> IO[bytes]:
        """Open a file of the folder. Raise UserError when it cannot be read or is a symbolic link."""
        path = self._plain(name)
        try:
            return path.open("rb")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", "see to its owner and rights") from error

    def _plain(self, name: str) -> Path:
        """Return the path of a file. Raise UserError when it, or its parent folder, is a symbolic link."""
        path = self.path / name
        if path.is_symlink() or path.parent.is_symlink():
            raise UserError(f"{path} is a symbolic link; a hub holds plain files", "publish it again: `make publish`")
        return path


@dataclass(frozen=True)
class Remote:
    """A published model in a repo on the Hub, at the commit that its revision had when the source was opened."""

    repo: str
    name: str
    commit: str

    @classmethod
    def at(cls, repo: str, revision: str | None) -> "Remote":
        """Return the repo at its present commit. Raise UserError when it cannot be read or has no manifest."""
        api, what = hub.api(), f"read {repo}{f'@{revision}' if revision else ''}"
        if hub.token():  # a wrong token must not look like a missing repo
            hub.patiently(what, api.whoami, seconds=hub.QUICK)
        info = hub.patiently(what, lambda: api.model_info(repo, revision=revision), seconds=hub.QUICK)
        if manifest.NAME not in {sibling.rfilename for sibling in info.siblings or ()}:
            raise UserError(
                f"{what}: it holds no {manifest.NAME}, so Ferry did not publish it, or not to its end",
                "run `make publish` again where the model was trained",
            )
        return cls(repo, repo.replace("/", "--"), info.sha)

    def manifest(self) -> bytes:
        """Download the manifest and return its bytes. Raise UserError when it is larger than a manifest may be."""

        def read() -> bytes:
            return hub.read_small(self.repo, manifest.NAME, self.commit, manifest.MAX_BYTES)

        return hub.patiently(f"read {self.repo}", read)

    def refuse(self, artifact: Artifact) -> None:
        """Raise UserError, before a long download, when an artifact has another size or hash than the manifest says."""
        there = hub.patiently(f"read {self.repo}/{artifact.file}", lambda: self._described(artifact.file))
        # The etag of a large file is its sha256, that of a small one git's SHA-1.
        other = len(there.etag) == 64 and there.etag != artifact.sha256
        if there.size != artifact.bytes or other:
            raise UserError(
                f"{self.repo}/{artifact.file} on the Hub has {there.size} bytes "
                f"and the hash {shown(there.etag)}, "
                f"its manifest says {artifact.bytes} bytes and {artifact.sha256}",
                "the file was replaced after it was published: ask who published it, "
                "or publish it again with `make publish`",
            )

    @contextlib.contextmanager
    def opened(self, artifact: Artifact, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Yield (the offset of the first byte, the blocks of an artifact from there on).

        A server without range requests sends the whole file, from offset 0. The token is sent to the Hub only, never to
        a host that it redirects to.
        """
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status

        place = self._described(artifact.file).location
        ask = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"} | (
            hub.headers() if hub.same_host(place) else {}
        )
        with get_session().stream("GET", place, headers=ask) as answer:
            if answer.status_code == 403 and not hub.same_host(place):
                raise hub.Passing("its address has expired")
            hf_raise_for_status(answer)
            if answer.status_code == 206 and not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise hub.Passing("it sends another part than was asked for")
            yield (start if answer.status_code == 206 else 0), answer.iter_raw()

    def _described(self, name: str) -> "Described":
        """Return size, etag and address of a file. It is requested every time, because signed addresses expire.

        The client's own get_hf_file_metadata is not used: it follows redirects with the token to any port of the host,
        and to huggingface.co whatever HF_ENDPOINT is.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.commit)
        for _ in range(REDIRECTS):
            ask = hub.headers() | {"Accept-Encoding": "identity"}
            answer = get_session().request("HEAD", url, headers=ask, follow_redirects=False)
            hf_raise_for_status(answer)
            place = urljoin(url, answer.headers.get("location", url))
            if place == url or not hub.same_host(place):
                break
            url = place
        if url.startswith("https:") and not place.startswith("https:"):
            raise UserError(f"{self.repo}/{name} lies behind an address without TLS", "do not use this repo")
        return Described.of(answer.headers, place)


@dataclass(frozen=True)
class Described:
    """What the Hub says of a file."""

    size: int | None
    """Bytes; None: the Hub does not say."""
    etag: str
    """sha256 of a large file, git's SHA-1 of a small one."""
    location: str
    """The address to download it from, which may be another host."""

    @classmethod
    def of(cls, headers, location: str) -> "Described":
        """Return the description that is in the headers of an answer."""
        size = headers.get("x-linked-size") or headers.get("content-length") or ""
        etag = headers.get("x-linked-etag") or headers.get("etag") or ""
        return cls(
            int(size) if size.isascii() and size.isdecimal() else None, etag.removeprefix("W/").strip('"'), location
        )
