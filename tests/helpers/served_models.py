"""A pulled model that is chatted with, in this process and behind make serve."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.serving import conversation
from tests.helpers import repos
from tests.helpers.commands import ROOT
from tests.helpers.installed import another, ready

HI = [{"role": "user", "content": repos.SMOKE[0]}]


@pytest.fixture(scope="session")
def version(real, tmp_path_factory) -> Path:
    """The demo's base model, pulled and tested as `make deploy-mac` leaves it."""
    return ready(real, tmp_path_factory.mktemp("chat") / "models")


@pytest.fixture(scope="module")
def engine(version) -> Iterator[conversation.ChatModel]:
    with conversation.open_model(version) as opened:
        yield opened


def answer(engine: conversation.ChatModel, ids: list[int], **how) -> conversation.Answer:
    """One that was read to its end; its text is in `.text`."""
    stopped = how.pop("stopped", lambda: False)
    found = conversation.Answer(engine, ids, replace(engine.sampling, **how), stopped)
    found.text = "".join(found)
    return found


@pytest.fixture(scope="session")
def talkative(real, tmp_path_factory) -> Path:
    """The same with answers of up to 700 tokens: time enough to stop one."""
    folder = tmp_path_factory.mktemp("talkative")
    hub = repos.rewrite(another(real, folder, 9), lambda value: value["generation"].update(max_tokens=700))
    return ready(hub, folder / "models")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


def command(model: Path, *arguments: str) -> list[str]:
    """`ferry serve`, of a version in a store."""
    name, models = model.parent.name, model.parent.parent
    return [sys.executable, "-m", "cli", "serve", f"./{name}", "--models", str(models), *arguments]


class Served:
    """`ferry serve`, from its first line to Ctrl-C."""

    def __init__(self, model: Path, *arguments: str, **settings: str):
        self.port = free_port()
        self.process = subprocess.Popen(
            command(model, "--port", str(self.port), *arguments),
            cwd=ROOT,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.greeting = [self.process.stdout.readline() for _ in range(3)]

    def call(self, method: str, path: str, content: object = None, **headers: str) -> tuple[int, dict]:
        """(status, JSON)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        payload = content if content is None or isinstance(content, bytes) else json.dumps(content)
        connection.request(method, path, payload, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        self.headers = dict(reply.getheaders())
        return reply.status, json.loads(reply.read())

    def knock(self, method: str, path: str, **headers: str) -> int:
        """The status of an answer that is no JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, None, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse().status

    def chat(self, messages: object = HI, **more) -> tuple[int, dict]:
        return self.call("POST", "/v1/chat/completions", {"messages": messages, **more})

    def end(self) -> tuple[int, str, str]:
        """Exit code, and what it printed since its greeting."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
