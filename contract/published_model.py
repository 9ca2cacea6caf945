"""Read a published model from a folder hub, or from the Hub at one commit.

Both sources return the manifest as a whole and artifacts in blocks.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol
from urllib.parse import urljoin

from common import files, hub
from common.errors import UserError, printable_line
from contract import limits, manifest
from contract.manifest import Artifact

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

MAX_REDIRECTS = 5  # within the Hub's own host, such as after a repo was renamed


class ModelSource(Protocol):
    """A published model: what a folder hub and a repo on the Hub have in common."""

    @property
    def name(self) -> str:
        """The name of the model's folder in the store."""

    @property
    def commit(self) -> str | None:
        """The commit on the Hub; None for a folder."""

    def read_manifest(self) -> bytes:
        """Return the bytes of the manifest."""

    def refuse_changed(self, artifact: Artifact) -> None:
        """Raise UserError, before it is read, when an artifact is not the one that the manifest describes."""

    def open_blocks(
        self, artifact: Artifact, start: int
    ) -> contextlib.AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """Yield (the offset of the first byte, the blocks of an artifact from there on)."""


def find_source(repo: str) -> ModelSource:
    """Return the source that `repo` names. Raise UserError when there is no such repo, or it has no manifest."""
    return FolderSource.from_folder(repo) if hub.is_folder(repo) else HubSource.from_repo(*hub.parse_repo_id(repo))


@dataclass(frozen=True)
class FolderSource:
    """A published model in a folder."""

    path: Path
    name: str
    commit: str | None = None
    """Always None: a folder has no commits."""

    @classmethod
    def from_folder(cls, folder: str) -> "FolderSource":
        """Return the source in a folder. Raise UserError when it does not exist or has no manifest."""
        path = hub.folder_path(folder)
        if not path.is_dir():
            raise UserError(
                f"REPO {printable_line(folder)}: no such folder",
                "name the folder that `make publish` printed",
                code="hub.folder_not_found",
            )
        if not (path / manifest.FILE_NAME).is_file():
            raise _no_manifest_error(str(path), "nothing was published there")
        return cls(path, path.resolve().name)

    def read_manifest(self) -> bytes:
        """Return the bytes of the manifest: one more than a manifest may have, when it is larger."""
        with self._open_file(manifest.FILE_NAME) as file:
            return file.read(limits.MAX_MANIFEST_BYTES + 1)

    def refuse_changed(self, artifact: Artifact) -> None:
        """Raise UserError, before a long copy, when an artifact has another size than the manifest says."""
        path = self._plain_path(artifact.file)
        size = path.stat().st_size if path.is_file() else None
        if size != artifact.bytes:
            raise UserError(
                f"{path} {'is missing' if size is None else f'has {size} bytes'}, "
                f"its manifest says {artifact.bytes} bytes",
                "publish it again: `make publish`",
                code="hub.file_missing" if size is None else "hub.file_changed",
            )

    @contextlib.contextmanager
    def open_blocks(self, artifact: Artifact, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Yield (the offset of the first byte, the blocks of an artifact from there on)."""
        with self._open_file(artifact.file) as file:
            file.seek(start)
            yield start, iter(lambda: file.read(files.CHUNK_BYTES), b"")

    def _open_file(self, name: str) -> IO[bytes]:
        """Open a file of the folder. Raise UserError when it cannot be read or is a symbolic link."""
        path = self._plain_path(name)
        try:
            return path.open("rb")
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}", "correct its owner or permissions", code="file.unreadable"
            ) from error

    def _plain_path(self, name: str) -> Path:
        """Return the path of a file. Raise UserError when it, or its parent folder, is a symbolic link."""
        path = self.path / name
        if path.is_symlink() or path.parent.is_symlink():
            raise UserError(
                f"{path} is a symbolic link; a hub has only regular files",
                "publish it again: `make publish`",
                code="hub.symbolic_link",
            )
        return path


def _no_manifest_error(place: str, reason: str) -> UserError:
    return UserError(
        f"{place} has no {manifest.FILE_NAME}: {reason}, or the publishing was interrupted",
        "run `make publish` again where the model was trained",
        code="hub.no_manifest",
    )


@dataclass(frozen=True)
class HubSource:
    """A published model in a repo on the Hub, at the commit that its revision had when the source was opened."""

    repo: str
    name: str
    commit: str

    @classmethod
    def from_repo(cls, repo: str, revision: str | None) -> "HubSource":
        """Return the source in a repo, at the commit of `revision` or at its newest one.

        Raises:
            UserError: The repo cannot be read, or has no manifest.
        """
        action = f"read {repo}{f'@{revision}' if revision else ''}"
        repo_info = _fetch_model_info(action, repo, revision)
        if manifest.FILE_NAME not in hub.list_repo_files(repo_info):
            raise _no_manifest_error(f"{action}: the repo", "it was not published by Ferry")
        assert repo_info.sha, "the Hub names the commit of a repo that it describes"
        return cls(repo, repo.replace("/", "--"), repo_info.sha)

    def read_manifest(self) -> bytes:
        """Download the manifest and return its bytes. Raise UserError when it is larger than a manifest may be."""

        def download() -> bytes:
            return hub.read_small_file(self.repo, manifest.FILE_NAME, self.commit, limits.MAX_MANIFEST_BYTES)

        return hub.retry(f"read {self.repo}", download)

    def refuse_changed(self, artifact: Artifact) -> None:
        """Raise UserError, before a long download, when an artifact has another size or hash than the manifest says."""
        hub_file = hub.retry(f"read {self.repo}/{artifact.file}", lambda: self._fetch_file_info(artifact.file))
        # The etag of a large file is its sha256, that of a small one git's SHA-1.
        has_other_hash = len(hub_file.etag) == 64 and hub_file.etag != artifact.sha256
        if hub_file.size != artifact.bytes or has_other_hash:
            raise UserError(
                f"{self.repo}/{artifact.file} on the Hub has {hub_file.size} bytes "
                f"and the hash {printable_line(hub_file.etag)}, "
                f"its manifest says {artifact.bytes} bytes and {artifact.sha256}",
                "the file was replaced after it was published: ask who published it, "
                "or publish it again with `make publish`",
                code="hub.file_changed",
            )

    @contextlib.contextmanager
    def open_blocks(self, artifact: Artifact, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Yield (the offset of the first byte, the blocks of an artifact from there on).

        A server without range requests sends the whole file, from offset 0. The token is sent to the Hub only, never to
        a host that it redirects to.
        """
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status

        location = self._fetch_file_info(artifact.file).location
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"} | (
            hub.request_headers() if hub.is_hub_url(location) else {}
        )
        with get_session().stream("GET", location, headers=headers) as response:
            if response.status_code == 403 and not hub.is_hub_url(location):
                raise hub.TransientError("the download address has expired")
            hf_raise_for_status(response)
            is_part = response.status_code == 206
            if is_part and not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise hub.TransientError("the server sent a different part than requested")
            yield (start if is_part else 0), response.iter_raw()

    def _fetch_file_info(self, name: str) -> "HubFile":
        """Return size, etag and address of a file. It is requested every time, because signed addresses expire.

        The client's own get_hf_file_metadata is not used: it follows redirects with the token to any port of the host,
        and to huggingface.co whatever HF_ENDPOINT is.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.commit)
        for _ in range(MAX_REDIRECTS):
            headers = hub.request_headers() | {"Accept-Encoding": "identity"}
            response = get_session().request("HEAD", url, headers=headers, follow_redirects=False)
            hf_raise_for_status(response)
            location = urljoin(url, response.headers.get("location", url))
            if location == url or not hub.is_hub_url(location):
                break
            url = location
        if url.startswith("https:") and not location.startswith("https:"):
            raise UserError(
                f"{self.repo}/{name} is at an address without TLS", "do not use this repo", code="hub.no_tls"
            )
        return HubFile.from_headers(response.headers, location)


def _fetch_model_info(action: str, repo: str, revision: str | None) -> "ModelInfo":
    api = hub.create_client()
    if hub.read_token():  # a wrong token must not look like a missing repo
        hub.retry(action, api.whoami, retry_seconds=hub.QUICK_RETRY_SECONDS)
    return hub.retry(action, lambda: api.model_info(repo, revision=revision), retry_seconds=hub.QUICK_RETRY_SECONDS)


@dataclass(frozen=True)
class HubFile:
    """What the Hub says of a file."""

    size: int | None
    """Bytes; None: the Hub does not say."""
    etag: str
    """sha256 of a large file, git's SHA-1 of a small one."""
    location: str
    """The address to download it from, which may be another host."""

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], location: str) -> "HubFile":
        """Return the description that is in the headers of an answer."""
        size = headers.get("x-linked-size") or headers.get("content-length") or ""
        etag = headers.get("x-linked-etag") or headers.get("etag") or ""
        byte_count = int(size) if size.isascii() and size.isdecimal() else None
        return cls(byte_count, etag.removeprefix("W/").strip('"'), location)
