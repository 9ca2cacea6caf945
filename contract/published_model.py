"""Where a repo is read from: a folder hub, or the Hub at one commit. Both give small files whole and large ones in blocks."""

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

REDIRECTS = 5  # on the Hub itself, such as after a repo was renamed


def find(repo: str) -> "Folder | Remote":
    """Raises UserError when there is no such repo."""
    return Folder.at(repo) if hub.is_folder(repo) else Remote.at(*hub.split(repo))


@dataclass(frozen=True)
class Folder:
    """A folder hub. commit: it has none."""

    path: Path
    name: str
    commit: str | None = None

    @classmethod
    def at(cls, repo: str) -> "Folder":
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
        with self._read(manifest.NAME) as file:
            return file.read(manifest.MAX_BYTES + 1)

    def refuse(self, artifact: Artifact) -> None:
        """What can be known before a long copy."""
        path = self._plain(artifact.file)
        size = path.stat().st_size if path.is_file() else None
        if size != artifact.bytes:
            raise UserError(
                f"{path} is {'missing' if size is None else f'{size} bytes'}, the manifest says {artifact.bytes} bytes",
                "publish it again: `make publish`",
            )

    @contextlib.contextmanager
    def opened(self, artifact: Artifact, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """(where it really starts, the bytes from there on)"""
        with self._read(artifact.file) as file:
            file.seek(start)
            yield start, iter(lambda: file.read(files.CHUNK), b"")

    def _read(self, name: str) -> IO[bytes]:
        path = self._plain(name)
        try:
            return path.open("rb")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", "see to its owner and rights") from error

    def _plain(self, name: str) -> Path:
        path = self.path / name
        if path.is_symlink() or path.parent.is_symlink():
            raise UserError(f"{path} is a symbolic link; a hub holds plain files", "publish it again: `make publish`")
        return path


@dataclass(frozen=True)
class Remote:
    """A repo on the Hub, at the commit that its revision was when it was asked for."""

    repo: str
    name: str
    commit: str

    @classmethod
    def at(cls, repo: str, revision: str | None) -> "Remote":
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
        def read() -> bytes:
            return hub.read_small(self.repo, manifest.NAME, self.commit, manifest.MAX_BYTES)

        return hub.patiently(f"read {self.repo}", read)

    def refuse(self, artifact: Artifact) -> None:
        """What can be known before a long download."""
        there = hub.patiently(f"read {self.repo}/{artifact.file}", lambda: self._described(artifact.file))
        other = len(there.etag) == 64 and there.etag != artifact.sha256  # a small file has git's SHA-1
        if there.size != artifact.bytes or other:
            raise UserError(
                f"{self.repo}/{artifact.file} on the Hub has {there.size} bytes and the hash {shown(there.etag)}, "
                f"its manifest says {artifact.bytes} bytes and {artifact.sha256}",
                "the file was replaced after it was published: ask who published it, or publish it again with `make publish`",
            )

    @contextlib.contextmanager
    def opened(self, artifact: Artifact, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """(where it really starts, the bytes from there on). The token goes to the Hub only, never where it sends us."""
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
        """Asked anew each time: signed addresses grow old. (The client's own get_hf_file_metadata follows redirects with
        the token to any port of the host, and to huggingface.co whatever HF_ENDPOINT is.)"""
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
    """A file on the Hub. etag: sha256 of a large one, git's SHA-1 of a small one."""

    size: int | None
    etag: str
    location: str

    @classmethod
    def of(cls, headers, location: str) -> "Described":
        size = headers.get("x-linked-size") or headers.get("content-length") or ""
        etag = headers.get("x-linked-etag") or headers.get("etag") or ""
        return cls(
            int(size) if size.isascii() and size.isdecimal() else None, etag.removeprefix("W/").strip('"'), location
        )
