"""A Hub on loopback: the protocol of huggingface.co with storage on disk, for the real client libraries (HF_ENDPOINT).

    python -m tests.helpers.hub FOLDER [--port N] [--token hf_writer]

Left out: Xet (so HF_HUB_DISABLE_XET=1), pull requests, renamed repositories, pages of more than one answer, quotas.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.helpers.hub_card import card, many, validate
from tests.helpers.hub_jobs import JOB_ROUTES, JobAnswers, Jobs

PIECE = 1 << 20


@dataclass
class Fault:
    """What goes wrong with the requests that `match` finds ("METHOD /path", a regex)."""

    match: str
    status: int | None = None  # this answer instead of the real one
    code: str = ""  # its X-Error-Code
    headers: dict[str, str] = field(default_factory=dict)  # for example Retry-After
    cut: int | None = None  # hang up after so many bytes: of an upload, or of the answer to a GET
    lose: bool = False  # do what was asked, then hang up without an answer
    stall: float | None = None  # seconds of silence first
    flip: int | None = None  # the byte of the answer whose lowest bit is flipped
    rate: float | None = None  # bytes a second
    times: int = 1  # -1: for ever
    skip: int = 0  # so many matching requests pass first
    struck: int = 0  # how often it did


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None, **extra):
        self.status, self.message, self.code = status, message, code
        self.headers, self.extra = headers or {}, extra


class HangUp(ConnectionError):
    """A fault ends the connection."""


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def sha256_of(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def save(path: Path, content: bytes) -> None:
    """Whole or not at all, so that a killed server finds its storage in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}")
    part.write_bytes(content)
    os.replace(part, path)


class Storage:
    """objects/ by sha256 (LFS) or git id; repos/KIND/USER/NAME/ with refs.json and one file a commit.

    Nothing is kept in memory: another Storage on the same folder goes on where this one stopped.
    """

    lfs_from = 1 << 20  # huggingface.co draws the line for text at 10 MB; a lower one keeps tests small

    def __init__(self, folder: Path):
        self.folder, self.lock = Path(folder), threading.RLock()
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)
        (self.folder / "uploads").mkdir(exist_ok=True)

    def object(self, entry: dict) -> Path:
        return self.folder / "objects" / (entry.get("sha256") or entry["oid"])

    def refs(self, name: str) -> dict | None:
        """{"private", "branches", "tags"}, None without such a repository."""
        path = self.folder / "repos" / name / "refs.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def write_refs(self, name: str, refs: dict) -> None:
        save(self.folder / "repos" / name / "refs.json", json.dumps(refs).encode())

    def revision(self, name: str, revision: str) -> dict:
        """The commit that a branch, a tag or an id names."""
        refs = self.refs(name)
        commit = refs["branches"].get(revision) or refs["tags"].get(revision) or revision
        path = self.folder / "repos" / name / f"{commit}.json"
        if not re.fullmatch("[0-9a-f]{40}", commit) or not path.exists():
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return json.loads(path.read_bytes())

    def create(self, name: str, private: bool, files: dict, title: str) -> str:
        self.write_refs(name, {"private": private, "branches": {}, "tags": {}, "created": now()})
        return self.commit(name, "main", files, title)

    def commit(self, name: str, branch: str, files: dict, title: str, message: str = "", user: str = "you") -> str:
        """A new commit whose tree is `files`; the branch is moved last."""
        refs = self.refs(name)
        made = {"title": title, "message": message, "date": now(), "user": user, "files": dict(sorted(files.items()))}
        made |= {"parent": refs["branches"].get(branch)}
        made["id"] = hashlib.sha1(json.dumps([name, time.time_ns(), made]).encode()).hexdigest()
        save(self.folder / "repos" / name / f"{made['id']}.json", json.dumps(made).encode())
        refs["branches"][branch] = made["id"]
        self.write_refs(name, refs)
        return made["id"]

    def is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        return size > 0 and (size > self.lfs_from or path.endswith((".gguf", ".safetensors")) or b"\0" in sample)

    def store(self, content: bytes) -> dict:
        """A regular file's bytes; returns its entry in a tree."""
        entry = {"size": len(content), "oid": git_id(content)}
        save(self.object(entry), content)
        return entry

    def store_file(self, path: Path) -> dict:
        with path.open("rb") as source:
            size, sample = path.stat().st_size, source.read(512)
            source.seek(0)
            if not self.is_lfs(path.name, size, sample):
                return self.store(source.read())
            entry = lfs_entry(sha256_of(path), size)
        part = self.folder / "uploads" / uuid.uuid4().hex
        shutil.copyfile(path, part)
        os.replace(part, self.object(entry))
        return entry

    def add(self, name: str, folder: Path, private: bool = False) -> str:
        """The files of `folder` as one commit of "models/you/base", past the protocol; returns its id."""
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): self.store_file(path) for path in paths}
        with self.lock:
            if self.refs(name) is None:
                return self.create(name, private, files, "add")
            return self.commit(name, "main", files, "add")

    def files(self, name: str, revision: str = "main") -> dict[str, dict]:
        """path: {"size", "oid"}, for LFS files "sha256" too."""
        return self.revision(name, revision)["files"]

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        return self.object(self.files(name, revision)[path]).read_bytes()

    def commits(self, name: str, revision: str = "main") -> list[dict]:
        """The newest first."""
        found = [self.revision(name, revision)]
        while parent := found[-1]["parent"]:
            found.append(self.revision(name, parent))
        return found

    def tags(self, name: str) -> dict[str, str]:
        return self.refs(name)["tags"]

    def large(self, name: str) -> dict[str, tuple[str, int]]:
        """{sha256: (path, size)} of the LFS files of every commit."""
        found: dict[str, tuple[str, int]] = {}
        for commit in self.commits(name):
            for path, entry in commit["files"].items():
                if "sha256" in entry and self.object(entry).exists():
                    found.setdefault(entry["sha256"], (path, entry["size"]))
        return found

    def forget(self, name: str, sha256: str) -> None:
        """An LFS file out of history and storage. (The real Hub rewrites the commits; here they keep their ids.)"""
        for commit in self.commits(name):
            commit["files"] = {path: e for path, e in commit["files"].items() if e.get("sha256") != sha256}
            save(self.folder / "repos" / name / f"{commit['id']}.json", json.dumps(commit).encode())
        (self.folder / "objects" / sha256).unlink(missing_ok=True)

    def tamper(self, name: str, path: str, content: bytes) -> None:
        """Other bytes under the announced sha256: what a broken disk or a bad mirror sends."""
        save(self.object(self.files(name)[path]), content)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def lfs_entry(sha256: str, size: int) -> dict:
    return {"size": size, "sha256": sha256, "oid": git_id(pointer(sha256, size))}


class Hub(Storage, ThreadingHTTPServer):
    """See the attributes: a test sets them, or reads what was recorded."""

    daemon_threads = True
    multipart_from, part_size = 5 << 20, 2 << 20
    resolve_cache = False  # as huggingface.co does of late: small files by a relative redirect on the same host

    def __init__(self, folder: Path, port: int = 0):
        Storage.__init__(self, folder)
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", port), Answer)
        self.users = {
            "hf_writer": {"name": "you", "role": "write", "orgs": []},
            "hf_reader": {"name": "you", "role": "read"},
            "hf_other": {"name": "other", "role": "write"},
        }
        self.gated: set[str] = set()  # "models/you/base"
        self.accepted: set[tuple[str, str]] = set()  # ("other", "models/you/base")
        self.faults: list[Fault] = []
        self.asked: list[str] = []  # "METHOD /path"
        self.leaks: list[str] = []  # what came to the CDN's name with a token
        self.sent = {"uploads": 0, "downloads": 0}  # bytes of files, broken transfers included
        self.connections: set[socket.socket] = set()
        self.jobs = Jobs(self.folder / "jobs")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def cdn(self) -> str:
        """The same server under another host name: no client may send its token there."""
        return f"http://localhost:{self.server_port}"

    def count(self, direction: str, size: int) -> None:
        with self.lock:
            self.sent[direction] += size

    def strike(self, asked: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.match, asked):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= fault.times > 0
                    fault.struck += 1
                    return fault
        return None

    def may(self, user: dict | None, name: str, write: bool) -> bool:
        """Whether a token reaches the private side of `name`, or may write to it."""
        if user is None:
            return False
        kind, owner, _ = name.split("/")
        if user["role"] == "fineGrained":
            wanted = {"repo.write"} if write else {"repo.write", "repo.content.read"}
            scopes = user["fineGrained"].get("scoped", [])
            names = (owner, name.removeprefix(f"{kind}/"))
            return any(wanted & set(scope["permissions"]) for scope in scopes if scope["entity"]["name"] in names)
        return owner in [user["name"], *user.get("orgs", [])] and (not write or user["role"] == "write")

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Kept-alive connections end too: a stopped server answers nobody."""
        super().server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hung up is no news
            super().handle_error(request, client_address)


ROUTES: list[tuple[str, re.Pattern, str]] = [*JOB_ROUTES]
PLACES = {
    "{api}": r"/api/(?P<kind>models|datasets)/(?P<repo>[\w.-]+/[\w.-]+)",
    "{git}": r"/(?:(?P<kind>datasets)/)?(?P<repo>(?!api/)[\w.-]+/[\w.-]+)",
    "{cache}": r"/api/resolve-cache/(?P<kind>models|datasets)/(?P<repo>[\w.-]+/[\w.-]+)",
    "{rev}": r"(?P<rev>[^/]+)",  # a slash in a revision comes as %2F
    "{path}": r"(?P<path>.+)",
    "{oid}": r"(?P<oid>[0-9a-f]{64})",
}


def route(method: str, pattern: str):
    """The handler of these requests; "{api}" and "{git}" become the repository's name."""
    for place, expression in PLACES.items():
        pattern = pattern.replace(place, expression)

    def register(handler):
        ROUTES.append((method, re.compile(pattern), handler.__name__))
        return handler

    return register


class Answer(JobAnswers, BaseHTTPRequestHandler):
    """One request after another of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def dispatch(self) -> None:
        url = urlsplit(self.path)
        self.queries = parse_qs(url.query)
        self.query = {key: values[-1] for key, values in self.queries.items()}
        asked = f"{self.command} {unquote(url.path)}"
        self.server.asked.append(asked)
        if self.headers.get("Authorization") and self.headers["Host"].startswith("localhost"):
            self.server.leaks.append(asked)
        self.fault, self.body = self.server.strike(asked) or Fault(""), self.receive()
        try:
            try:
                self.suffer()
                self.find(url.path)
            except Refused as refusal:
                self.refuse(refusal)
        except HangUp:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def suffer(self) -> None:
        if self.fault.stall:
            time.sleep(self.fault.stall)
        if self.fault.status:
            message = HTTPStatus(self.fault.status).phrase
            raise Refused(self.fault.status, message, self.fault.code, self.fault.headers)

    def find(self, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, handler in ROUTES:
            if wanted == method and (found := pattern.fullmatch(path)):
                words = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                if "repo" in words:
                    words["name"] = f"{words.pop('kind', 'models')}/{words.pop('repo')}"
                return getattr(self, handler)(**words)
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    # The two directions.

    def receive(self) -> Iterator[bytes]:
        """The request's body in pieces: 2 GB never lie in memory."""
        fault, got = self.fault, 0
        step = max(1, int(min(PIECE, fault.cut or PIECE, (fault.rate or 10 * PIECE) / 10)))
        for size in self.chunks():
            while size:
                if fault.cut is not None and got >= fault.cut:
                    raise HangUp
                if not (piece := self.rfile.read(min(size, step))):
                    raise HangUp
                size, got = size - len(piece), got + len(piece)
                if fault.rate:
                    time.sleep(len(piece) / fault.rate)
                yield piece

    def chunks(self) -> Iterator[int]:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            yield int(self.headers.get("Content-Length", 0))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def begin(self, status: int, headers: dict) -> None:
        for _ in self.body:  # an unread body would be taken for the next request
            pass
        if self.fault.lose:
            raise HangUp
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def answer(self, value: object, status: int = 200, headers: dict | None = None) -> None:
        content = json.dumps(value).encode()
        standard = {"Content-Type": "application/json; charset=utf-8", "Content-Length": len(content)}
        self.begin(status, standard | (headers or {}))
        if self.command != "HEAD":
            self.slowly(io.BytesIO(content), len(content))

    def deny(self, status: int, message: str) -> None:
        raise Refused(status, message)

    def refuse(self, refusal: Refused) -> None:
        headers = {"X-Error-Message": refusal.message} | refusal.headers
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self.answer({"error": refusal.message} | refusal.extra, refusal.status, headers)

    def file(self, path: Path, etag: str, headers: dict) -> None:
        """A file or, with Range, a part of it."""
        size = path.stat().st_size
        start, end, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").replace(" ", ""))
        if asked and any(asked.groups()) and self.headers.get("If-Range", f'"{etag}"') == f'"{etag}"':
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            if start >= end:
                raise Refused(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        standard = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Length": end - start}
        self.begin(status, headers | standard)
        if self.command == "HEAD":
            return
        with path.open("rb") as source:
            source.seek(start)
            if self.fault.cut is not None or self.fault.flip is not None or self.fault.rate:
                return self.slowly(source, end - start, "downloads")
            try:
                if end > start:  # socket.sendfile takes a count of 0 for a mistake
                    self.connection.sendfile(source, start, end - start)
            finally:
                self.server.count("downloads", source.tell() - start)

    def slowly(self, source, size: int, direction: str = "") -> None:
        """The answer's body, with what a fault does to it."""
        fault, done = self.fault, 0
        cut = fault.cut if self.command == "GET" and fault.cut is not None else size
        while done < min(size, cut):
            step = max(1, int(fault.rate / 10)) if fault.rate else PIECE
            piece = bytearray(source.read(min(step, min(size, cut) - done)))
            if not piece:
                break
            if fault.flip is not None and done <= fault.flip < done + len(piece):
                piece[fault.flip - done] ^= 1
            self.wfile.write(piece)
            done += len(piece)
            if direction:
                self.server.count(direction, len(piece))
            if fault.rate:
                time.sleep(len(piece) / fault.rate)
        if cut < size:
            raise HangUp

    # Who asks, and for what.

    def user(self) -> dict | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.server.users.get(token)

    def allow(self, name: str, write: bool = False) -> dict:
        """The refs of a repository that this token may see, or write to."""
        user, refs = self.user(), self.server.refs(name)
        if refs is None or refs["private"] and not self.server.may(user, name, write=False):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not user:
            raise Refused(401, "Invalid username or password.")
        if write and not self.server.may(user, name, write=True):
            raise Refused(403, f"Authorization error: this token may not write to {name.split('/', 1)[1]}")
        return refs

    def allow_files(self, name: str) -> None:
        """The same for what a gate keeps back: a gated repository's description is public, its files are not."""
        self.allow(name)
        user = self.user()
        accepted = user and (self.server.may(user, name, write=False) or (user["name"], name) in self.server.accepted)
        if name in self.server.gated and not accepted:
            message = f"Access to {name.split('/', 1)[1]} is restricted and you are not in the authorized list."
            raise Refused(403 if user else 401, message, "GatedRepo")

    def json(self) -> dict:
        return json.loads(b"".join(self.body) or b"{}")

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if not (user := self.user()):
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "test", "role": user["role"], "createdAt": now()}
        if "fineGrained" in user:
            token["fineGrained"] = user["fineGrained"]
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in user.get("orgs", [])]
        self.answer(
            {"type": "user", "name": user["name"], "fullname": user["name"], "isPro": False, "orgs": orgs,
             "auth": {"type": "access_token", "accessToken": token}}
        )  # fmt: skip

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked, user = self.json(), self.user()
        if not user:
            raise Refused(401, "Invalid username or password.")
        kind, owner = asked.get("type") or "model", asked.get("organization") or user["name"]
        name, repo = f"{kind}s/{owner}/{asked['name']}", f"{owner}/{asked['name']}"
        if not re.fullmatch(r"(models|datasets)/[\w.-]+/[\w.-]+", name) or ".." in name:
            raise Refused(400, f"Invalid repo name: {repo}")
        if not self.server.may(user, name, write=True):
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{repo}"
        with self.server.lock:
            if self.server.refs(name):
                raise Refused(409, f"You already created this {kind} repo", url=url)
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            attributes = self.server.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            self.server.create(name, private, {".gitattributes": attributes}, "initial commit")
        self.answer({"url": url, "name": repo, "id": repo})

    @route("POST", "/api/validate-yaml")
    def validate(self) -> None:
        found = validate(self.json()["content"])
        self.answer(found, 400 if found["errors"] else 200)

    # Uploads.

    @route("POST", "{api}/preupload/{rev}")
    def preupload(self, name: str, rev: str) -> None:
        self.allow(name, write=True)
        stored, answers = self.server.revision(name, rev)["files"], []
        for item in self.json()["files"]:
            lfs = self.server.is_lfs(item["path"], item["size"], base64.b64decode(item["sample"]))
            entry = stored.get(item["path"], {})
            answers.append(
                {"path": item["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False,
                 "oid": entry.get("sha256") or entry.get("oid")}
            )  # fmt: skip
        self.answer({"files": answers})

    @route("POST", r"{git}\.git/info/lfs/objects/batch")
    def batch(self, name: str) -> None:
        self.allow(name, write=True)
        objects = [self.transfer(name, item["oid"], item["size"]) for item in self.json()["objects"]]
        self.answer({"transfer": "multipart", "objects": objects})

    def transfer(self, name: str, oid: str, size: int) -> dict:
        """How to send an object; an object that is stored needs no actions."""
        item, hub = {"oid": oid, "size": size}, self.server
        if hub.object({"sha256": oid}).exists():
            return item
        git = name.removeprefix("models/")
        verify = {"href": f"{hub.url}/{git}.git/info/lfs/objects/verify"}
        if size <= hub.multipart_from:
            return item | {
                "actions": {"upload": {"href": f"{hub.cdn}/lfs/objects/{oid}?size={size}"}, "verify": verify}
            }
        upload = uuid.uuid4().hex
        parts = {
            str(number + 1): f"{hub.cdn}/lfs/parts/{upload}/{number + 1}?offset={offset}"
            for number, offset in enumerate(range(0, size, hub.part_size))
        }
        href = f"{hub.url}/api/complete_multipart?upload={upload}&size={size}"
        header = {"chunk_size": str(hub.part_size)} | parts
        return item | {"actions": {"upload": {"href": href, "header": header}, "verify": verify}}

    def write_body(self, path: Path, offset: int = 0) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            for piece in self.body:
                os.pwrite(handle, piece, offset)
                offset += len(piece)
                self.server.count("uploads", len(piece))
        finally:
            os.close(handle)

    def keep(self, path: Path, oid: str, size: int) -> None:
        """An upload becomes an object when it is what was announced."""
        found = sha256_of(path), path.stat().st_size
        if found != (oid, size):
            path.unlink()
            raise Refused(400, f"The upload has the sha256 and size {found}, not {(oid, size)}")
        os.replace(path, self.server.object({"sha256": oid}))

    @route("PUT", "/lfs/objects/{oid}")
    def put(self, oid: str) -> None:
        path = self.server.folder / "uploads" / uuid.uuid4().hex
        self.write_body(path)
        self.keep(path, oid, int(self.query.get("size", path.stat().st_size)))
        self.answer({}, headers={"ETag": f'"{oid}"'})

    @route("PUT", "/lfs/parts/(?P<upload>[0-9a-f]{32})/(?P<number>[0-9]+)")
    def put_part(self, upload: str, number: str) -> None:
        """All parts go to their places in one file, so that completing a big object copies nothing."""
        self.write_body(self.server.folder / "uploads" / upload, int(self.query["offset"]))
        self.answer({}, headers={"ETag": f'"{upload}-{number}"'})

    @route("POST", "/api/complete_multipart")
    def complete(self) -> None:
        asked, path = self.json(), self.server.folder / "uploads" / Path(self.query["upload"]).name
        oid, size = asked["oid"], int(self.query["size"])
        if self.server.object({"sha256": oid}).exists():  # the answer got lost and the client asks again
            return self.answer({"success": True})
        count = -(-size // self.server.part_size)
        if not path.exists() or [part["partNumber"] for part in asked["parts"]] != list(range(1, count + 1)):
            raise Refused(400, "Parts are missing")
        self.keep(path, oid, size)
        self.answer({"success": True})

    @route("POST", r"{git}\.git/info/lfs/objects/verify")
    def verify(self, name: str) -> None:
        self.allow(name, write=True)
        asked = self.json()
        path = self.server.object({"sha256": asked["oid"]})
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise Refused(404, f"The object {asked['oid']} was not uploaded")
        self.answer({})

    @route("POST", "{api}/commit/{rev}")
    def commit(self, name: str, rev: str) -> None:
        lines = [json.loads(line) for line in b"".join(self.body).splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.server.lock:
            head = self.allow(name, write=True)["branches"].get(rev)
            if not head:
                raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            if not head.startswith(header.get("parentCommit") or ""):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = self.server.files(name, head)
            for line in lines:
                self.apply(files, line["key"], line["value"])
            title, message = header["summary"], header.get("description", "")
            made = self.server.commit(name, rev, files, title, message, self.user()["name"])
        url = f"{self.server.url}/{name.removeprefix('models/')}/commit/{made}"
        self.answer({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    def apply(self, files: dict, key: str, value: dict) -> None:
        """One line of a commit."""
        path = value.get("path", "")
        if key == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md" and (errors := validate(content.decode())["errors"]):
                raise Refused(400, "Invalid metadata in README.md", errors=errors)
            files[path] = self.server.store(content)
        elif key == "lfsFile":
            stored = self.server.object({"sha256": value["oid"]})
            # A copy of a file in the repository comes without a size.
            if not stored.exists() or value.get("size", stored.stat().st_size) != stored.stat().st_size:
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = lfs_entry(value["oid"], stored.stat().st_size)
        elif key in ("deletedFile", "deletedFolder"):
            under = f"{path.rstrip('/')}/" if key == "deletedFolder" else "//"
            if not (gone := [name for name in files if name == path or name.startswith(under)]):
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        elif key != "header":
            raise Refused(400, f"unknown operation {key}")

    @route("GET", "{api}/lfs-files")
    def list_lfs(self, name: str) -> None:
        self.allow(name, write=True)
        self.answer(
            [{"fileOid": sha256, "filename": path, "oid": git_id(sha256.encode()), "pushedAt": now(), "ref": "main", "size": size}
             for sha256, (path, size) in self.server.large(name).items()]
        )  # fmt: skip

    @route("POST", "{api}/lfs-files/batch")
    def forget_lfs(self, name: str) -> None:
        """Gone from the storage, and from every commit but those whose tree is a branch's or a tag's."""
        self.allow(name, write=True)
        asked = self.json()["deletions"]
        with self.server.lock:
            for sha256 in asked["sha"]:
                self.server.forget(name, sha256)
        self.answer({})

    @route("POST", "{api}/tag/{rev}")
    def tag(self, name: str, rev: str) -> None:
        tag = self.json()["tag"]
        with self.server.lock:
            refs = self.allow(name, write=True)
            if tag in refs["tags"]:
                raise Refused(409, "Tag reference exists already")
            refs["tags"][tag] = self.server.revision(name, rev)["id"]
            self.server.write_refs(name, refs)
        self.answer({})

    @route("DELETE", "{api}/tag/{rev}")
    def untag(self, name: str, rev: str) -> None:
        with self.server.lock:
            refs = self.allow(name, write=True)
            if not refs["tags"].pop(rev, None):
                raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            self.server.write_refs(name, refs)
        self.answer({})

    # Reading.

    @route("GET", "{api}")
    @route("GET", "{api}/revision/{rev}")
    def info(self, name: str, rev: str = "main") -> None:
        refs = self.allow(name)
        commit, repo = self.server.revision(name, rev), name.split("/", 1)[1]
        siblings = [{"rfilename": path} for path in commit["files"]]
        if "blobs" in self.query:
            siblings = [{"rfilename": path} | blob(entry) for path, entry in commit["files"].items()]
        readme = commit["files"].get("README.md")
        data = card(self.server.object(readme).read_text()) if readme else {}
        self.answer(
            {"_id": git_id(name.encode())[:24], "id": repo, "modelId": repo, "author": repo.split("/")[0],
             "sha": commit["id"], "lastModified": commit["date"], "createdAt": refs["created"],
             "private": refs["private"], "gated": "manual" if name in self.server.gated else False, "disabled": False,
             "downloads": 0, "likes": 0, "tags": tags_of(data), "siblings": siblings, "spaces": []}
            | ({"cardData": data} if data else {})
            | {key: data[key] for key in ("pipeline_tag", "library_name") if key in data}
        )  # fmt: skip

    @route("GET", "{api}/auth-check(?P<write>/write)?")
    def auth_check(self, name: str, write: str = "") -> None:
        self.allow(name, write=bool(write))
        self.allow_files(name)
        self.answer({})

    @route("GET", "{api}/refs")
    def list_refs(self, name: str) -> None:
        refs = self.allow(name)

        def listed(kind: str, place: str) -> list[dict]:
            return [{"name": key, "ref": f"refs/{place}/{key}", "targetCommit": id} for key, id in refs[kind].items()]

        self.answer({"branches": listed("branches", "heads"), "tags": listed("tags", "tags"), "converts": []})

    @route("GET", "{api}/commits/{rev}")
    def list_commits(self, name: str, rev: str) -> None:
        self.allow(name)
        self.answer(
            [{"id": made["id"], "title": made["title"], "message": made["message"], "date": made["date"],
              "authors": [{"user": made["user"]}]} for made in self.server.commits(name, rev)]
        )  # fmt: skip

    @route("GET", "{api}/tree/{rev}(?:/{path})?")
    def tree(self, name: str, rev: str, path: str = "") -> None:
        self.allow(name)
        commit, under = self.server.revision(name, rev), f"{path.strip('/')}/".lstrip("/")
        found = [item for item in entries(commit["files"]) if item["path"].startswith(under)]
        if under and not found:
            raise Refused(404, f"{path} does not exist on {rev}", "EntryNotFound", {"X-Repo-Commit": commit["id"]})
        if self.query.get("recursive", "false").lower() != "true":
            found = [item for item in found if "/" not in item["path"].removeprefix(under)]
        self.answer(found)

    @route("POST", "{api}/paths-info/{rev}")
    def paths_info(self, name: str, rev: str) -> None:
        self.allow(name)
        wanted = parse_qs(b"".join(self.body).decode()).get("paths", [])
        files = self.server.revision(name, rev)["files"]
        self.answer([item for item in entries(files) if item["path"] in [path.strip("/") for path in wanted]])

    @route("GET", "{git}/resolve/{rev}/{path}")
    @route("GET", "{cache}/{rev}/{path}")
    def resolve(self, name: str, rev: str, path: str) -> None:
        self.allow_files(name)
        commit = self.server.revision(name, rev)
        headers = {"X-Repo-Commit": commit["id"]}
        if not (entry := commit["files"].get(path)):
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        if "sha256" in entry:
            place = f"{self.server.cdn}/blobs/{entry['sha256']}/{quote(path)}"
            linked = {"X-Linked-Etag": f'"{entry["sha256"]}"', "X-Linked-Size": entry["size"]}
            return self.begin(302, headers | linked | {"Location": place, "Content-Length": 0})
        if self.server.resolve_cache and not self.path.startswith("/api/"):
            place = f"/api/resolve-cache/{name}/{commit['id']}/{quote(path)}"
            return self.begin(307, headers | {"Location": place, "Content-Length": 0})
        self.file(self.server.object(entry), entry["oid"], headers)

    @route("GET", "/blobs/{oid}/{path}")
    def blob(self, oid: str, path: str) -> None:
        """A signed address on the real CDN: whoever has it may read it."""
        if not (stored := self.server.object({"sha256": oid})).exists():
            raise Refused(404, "NoSuchKey")
        self.file(stored, oid, {"Content-Type": "application/octet-stream"})

    def log_message(self, *_) -> None:
        pass


def blob(entry: dict) -> dict:
    """A file as the repository's description lists it."""
    described = {"size": entry["size"], "blobId": entry["oid"]}
    if sha256 := entry.get("sha256"):
        described["lfs"] = {"sha256": sha256, "size": entry["size"], "pointerSize": len(pointer(sha256, entry["size"]))}
    return described


def entries(files: dict) -> list[dict]:
    """Files and folders as a tree lists them."""
    folders = {str(parent) for path in files for parent in list(Path(path).parents)[:-1]}
    listed = [{"type": "directory", "oid": git_id(path.encode()), "size": 0, "path": path} for path in folders]
    for path, entry in files.items():
        item = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
        if sha256 := entry.get("sha256"):
            size = len(pointer(sha256, entry["size"]))
            item["lfs"] = {"oid": sha256, "size": entry["size"], "pointerSize": size}
        listed.append(item)
    return sorted(listed, key=lambda item: item["path"])


def tags_of(data: dict) -> list[str]:
    """The Hub's tags of a card."""
    tags = [data[key] for key in ("library_name", "pipeline_tag") if key in data] + many(data.get("tags"))
    tags += many(data.get("language")) + [f"license:{value}" for value in many(data.get("license"))]
    tags += [f"dataset:{value}" for value in many(data.get("datasets"))]
    for value in many(data.get("base_model")):
        tags.append(f"base_model:{value}")
        if relation := data.get("base_model_relation"):
            tags.append(f"base_model:{relation}:{value}")
    return tags


@contextmanager
def serving(folder: Path, port: int = 0, **attributes) -> Iterator[Hub]:
    """A Hub on `folder` while the block runs."""
    hub = Hub(folder, port)
    for key, value in attributes.items():
        setattr(hub, key, value)
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.jobs.close()
        hub.shutdown()
        hub.server_close()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--port", type=int, default=0)
    options.add_argument("--token", default="hf_writer", help="the token that may write")
    chosen = options.parse_args()
    hub = Hub(chosen.folder, chosen.port)
    hub.users[chosen.token] = {"name": "you", "role": "write", "orgs": []}
    print(hub.url, flush=True)
    with suppress(KeyboardInterrupt):
        hub.serve_forever()


if __name__ == "__main__":
    main()
