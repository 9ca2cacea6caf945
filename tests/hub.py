"""A read-only Hub on loopback: folders as repositories with one commit, for the real client libraries (HF_ENDPOINT)."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """repos: {"models/you/base": folder, "datasets/you/rows": folder}; asked: every path that was requested."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.asked = repos, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """The few questions that huggingface_hub and datasets ask when they read."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        for name, folder in self.server.repos.items():
            kind, repo = name.split("/", 1)
            if path.startswith(f"api/{name}"):
                return self.describe(repo, folder, path.removeprefix(f"api/{name}").strip("/"))
            files = (name if kind == "datasets" else repo) + "/resolve/"
            if path.startswith(files):
                return self.send_file(folder, path.removeprefix(files))
        return self.refuse("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        name = next(name for name in self.server.repos if f"api/{name}/paths-info" in self.path)
        self.answer([item for item in entries(self.server.repos[name]) if item["path"] in wanted])

    def describe(self, repo: str, folder: Path, rest: str) -> None:
        verb, _, revision = rest.partition("/")
        if verb == "revision" and revision not in ("main", COMMIT):
            return self.refuse("RevisionNotFound")
        if verb == "tree":
            return self.answer(entries(folder))
        siblings = [{"rfilename": item["path"]} for item in entries(folder)]
        self.answer({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False, "tags": []})

    def send_file(self, folder: Path, rest: str) -> None:
        revision, _, name = rest.partition("/")
        if revision not in ("main", COMMIT) or not (folder / name).is_file():
            return self.refuse("EntryNotFound" if revision in ("main", COMMIT) else "RevisionNotFound")
        content = (folder / name).read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def entries(folder: Path) -> list[dict]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": hashlib.sha1(f.read_bytes()).hexdigest()}
        for f in files
    ]  # fmt: skip


@contextmanager
def serving(repos: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(repos)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
