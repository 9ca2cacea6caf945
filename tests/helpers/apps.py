"""Ollama and LM Studio on this machine: stand-ins (tests/helpers/standins) on a PATH folder, that behave as their sources say.

    with apps.ollama(tmp_path) as ollama, apps.lms(tmp_path) as lms:
        subprocess.run(["ollama", "list"], env=os.environ | ollama.env | lms.env)

Both use FOLDER/bin (first on PATH) and FOLDER/home (HOME) and nothing else of this machine, so that with one folder the two
environments fit together. OLLAMA_PROGRAM or LMS_PROGRAM name real programs to take instead; those have no faults, no
requests and no app to switch off.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

STANDINS = Path(__file__).parent / "standins"


@dataclass
class Ollama:
    """An `ollama` on PATH, and its server when it runs."""

    folder: Path
    url: str  # http://127.0.0.1:PORT, also when nothing listens there
    env: dict[str, str]  # PATH, HOME, OLLAMA_HOST, OLLAMA_MODELS: lay it over os.environ
    models: Path  # blobs/ and manifests/
    process: subprocess.Popen | None = field(default=None, repr=False)

    def start(self, **settings: str) -> None:
        """`ollama serve` with more environment, such as OLLAMA_GO_TEMPLATE="1"; returns when it answers."""
        with (self.control / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.folder / "bin" / "ollama", "serve"], env=os.environ | self.env | settings, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + 60
        while not self.running:
            assert self.process.poll() is None and time.monotonic() < until, (self.control / "server.log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server, also one that the CLI or Ferry started."""
        pid = self.control / "pid"
        started = [int(pid.read_text())] if pid.exists() else []
        for number in {*started, *([self.process.pid] if self.process else [])}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGTERM)
        if self.process:
            self.process.wait()
        until = time.monotonic() + 10
        while self.running and time.monotonic() < until:
            time.sleep(0.05)
        pid.unlink(missing_ok=True)
        self.process = None

    @property
    def running(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.url, timeout=5).status == 200
        return False

    def faults(self, **faults: object) -> None:
        """What goes wrong from now on, until the next call (`faults()`: nothing). The server reads it at each request.

        A request is named by the last word of its path ("create", "copy", "delete", "chat", "tags", a blob's digest, ...).
        die="create": the server ends in the middle of that request; broken=["delete", ...]: status 500;
        full=True: no space left on the device, seen by an upload, else by `create`; slow=2: so many seconds before each answer;
        ignore_template=True: the other template renders (the GGUF's Jinja where TEMPLATE would, and the other way round);
        wrong="text": chat and generate say this; version="0.11.0": it is that one (before 0.12: no _debug_render_only).
        """
        (self.control / "faults.json").write_text(json.dumps(faults))

    @property
    def requests(self) -> list[str]:
        """'METHOD /path' of every request so far, in order."""
        log = self.control / "requests.log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def woken(self) -> bool:
        """Did the CLI start the app by itself? On a Mac every command but --version does, when no server answers."""
        return (self.control / "woken").exists()

    def disk(self) -> int:
        """Bytes of all blobs, those that no model names included."""
        return sum(path.stat().st_size for path in (self.models / "blobs").glob("*"))

    @property
    def control(self) -> Path:
        return self.folder / "control"


@dataclass
class Lms:
    """An `lms` on PATH."""

    folder: Path
    env: dict[str, str]  # PATH, HOME
    home: Path  # LM Studio's home, ~/.lmstudio
    models: Path  # its models folder

    def app(self, state: str | bool) -> None:
        """It is "running" (True); "asleep": installed, and `lms ls` wakes it; "absent" (False). `lms import` needs none of it."""
        state = {True: "running", False: "absent"}.get(state, state)
        (self.folder / "control" / "lms.json").write_text(json.dumps({"app": state}))

    @property
    def woken(self) -> bool:
        """Did a command of `lms` start the app?"""
        return (self.folder / "control" / "lms-woken").exists()


@contextlib.contextmanager
def ollama(folder: Path, running: bool = True, mac: bool = False, **settings: str) -> Iterator[Ollama]:
    """Put `ollama` into FOLDER/bin and, where `running`, start its server with `settings` as further environment."""
    env, port = _installed(folder, "ollama"), _free()
    models = folder / "home" / ".ollama" / "models"
    env |= {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(models), "OLLAMA_STANDIN": str(folder / "control")}
    env |= {"OLLAMA_STANDIN_MAC": "1"} if mac else {}
    made = Ollama(folder, f"http://127.0.0.1:{port}", env, models)
    try:
        if running:
            made.start(**settings)
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def lms(folder: Path, app: str | bool = True) -> Iterator[Lms]:
    """Put `lms` into FOLDER/bin."""
    env, home = _installed(folder, "lms"), folder / "home" / ".lmstudio"
    made = Lms(folder, env | {"LMS_STANDIN": str(folder / "control")}, home, home / "models")
    made.app(app)
    yield made


def without(folder: Path) -> dict[str, str]:
    """An environment in which there is neither: PATH without any `ollama` or `lms`, HOME in FOLDER, no server to reach."""
    (folder / "home").mkdir(parents=True, exist_ok=True)
    return {"PATH": _path(), "HOME": str(folder / "home"), "OLLAMA_HOST": f"127.0.0.1:{_free()}"}


def _installed(folder: Path, name: str) -> dict[str, str]:
    for each in ("bin", "home", "control"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    real, place = os.environ.get(f"{name.upper()}_PROGRAM"), folder / "bin" / name
    command = f'"{real}"' if real else f'"{sys.executable}" "{STANDINS / name}.py"'
    place.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    place.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{_path()}", "HOME": str(folder / "home")}


def _path() -> str:
    """PATH without folders that hold one of them."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(f for f in folders if not any(shutil.which(name, path=f) for name in ("ollama", "lms")))


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
