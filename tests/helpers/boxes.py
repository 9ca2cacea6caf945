"""A 'GPU box' on loopback: a real OpenSSH server with a home of its own; and a laptop, which is a clone with this tree as
its commit."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.helpers.commands import ROOT, typed_environment

OPTIONS = ("LogLevel=ERROR", "IdentitiesOnly=yes", "GlobalKnownHostsFile=/dev/null")


class Box:
    """An sshd, started and stopped; what logs in lands in `home`. first: a folder that stands first in its PATH."""

    def __init__(self, folder: Path, only: bool = False, prefix: tuple[str, ...] = ()):
        """only: of the usual programs only those in `first` are there. prefix: what sshd is started by, such as unshare."""
        self.folder, self.home, self.first = folder, folder / "home", folder / "first"
        self.prefix, self.process, self.port = prefix, None, free_port()
        for place in (self.home, self.first):
            place.mkdir(parents=True)
        for name in ("host", "user", "stranger"):
            self.key(name)
        shutil.copy(folder / "user.pub", folder / "authorized")
        self.know()
        path = str(self.first) if only else f"{self.first}:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name.startswith(("FERRY_C", "FERRY_LL", "PIP_"))}
        # OMP_NUM_THREADS: two jobs at once on two cores wait for each other otherwise.
        given = kept | {"HOME": str(self.home), "PATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        given |= {"FERRY_CACHE": os.environ.get("FERRY_CACHE") or str(Path("~/.cache/ferry").expanduser())}
        exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in given.items())
        (folder / "login").write_text(
            f'cd {self.home} && exec /usr/bin/env -i {exports} $(cat {folder}/more) /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n'
        )
        self.more("")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nStrictModes no\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/authorized\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"PermitRootLogin prohibit-password\nForceCommand /bin/sh {folder}/login\n"
        )
        self.ssh = ["ssh", *(word for option in (*OPTIONS, f"IdentityFile={folder}/user", f"UserKnownHostsFile={folder}/known")
                             for word in ("-o", option))]  # fmt: skip

    def key(self, name: str) -> None:
        """A new key pair, in place of an older one."""
        for path in (self.folder / name, self.folder / f"{name}.pub"):
            path.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)

    def know(self) -> None:
        """The client knows the host's key."""
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {(self.folder / 'host.pub').read_text()}")

    @property
    def address(self) -> str:
        return f"ssh://{os.environ.get('USER') or 'root'}@127.0.0.1:{self.port}"

    def more(self, settings: str) -> None:
        """Of its environment, from now on."""
        (self.folder / "more").write_text(settings)

    def program(self, name: str, text: str) -> None:
        """A program that stands before the machine's own."""
        path = self.first / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def lend(self, *names: str) -> None:
        """Programs of this machine, for a box that has no others."""
        for name in names:
            (self.first / name).symlink_to(shutil.which(name))

    def start(self) -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [*self.prefix, "/usr/sbin/sshd", "-D", "-e", "-f", self.folder / "sshd_config"],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, "sshd ended"
            time.sleep(0.05)
        raise AssertionError("sshd does not listen")

    def cut(self) -> int:
        """Every connection that is there now; returns how many."""
        found = [pid for pid in children(self.process.pid) if pid != self.process.pid]
        for pid in found:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        return len(found)

    def stop(self) -> None:
        if self.process:
            self.cut()
            self.process.kill()
            self.process.wait()
            self.process = None

    def end_jobs(self) -> None:
        """Whatever jobs left running."""
        for note in self.home.rglob("job/group"):
            with suppress(ProcessLookupError):
                os.killpg(int(note.read_text()), signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Direct ones, by /proc."""
    said = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in said.split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(folder: Path, **kinds) -> Iterator[Box]:
    box = Box(folder, **kinds)
    try:
        box.start()
        yield box
    finally:
        box.end_jobs()
        box.stop()


def laptop(folder: Path) -> Path:
    """A checkout of its own: this working tree, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["commit", "-q", "-m", "as it is"],
        ["remote", "add", "origin", "https://example.org/ferry.git"],
    ):
        git(folder, *words)
    return folder


def git(folder: Path, *words: str) -> str:
    named = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", folder, *named, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def lend_environment(box: Box, laptop: Path, under: str = "ferry") -> None:
    """The locked environment, as if an earlier job had made it there."""
    from launch import source_archive

    there = box.home / under / f"venv-{source_archive.hash_lock_files(laptop, 'HEAD')}"
    there.parent.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["cp", "-al", sys.prefix, there], capture_output=True).returncode:
        shutil.rmtree(there, ignore_errors=True)
        subprocess.run(["cp", "-a", sys.prefix, there], check=True)


def started_at(place: Path, *words: str, **settings: str) -> subprocess.Popen:
    """`make` in a checkout, as one who is online types it; in a process group of its own."""
    command = ["make", "--no-print-directory", f"VENV={sys.prefix}", f"PYTHON={sys.executable}", *words]
    given = {name: value for name, value in typed_environment().items() if not name.endswith("_OFFLINE")}
    return subprocess.Popen(
        command, cwd=place, env=given | settings, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip


def started(laptop: Path, box: Box, *words: str, **environment: str) -> subprocess.Popen:
    """`make` on the laptop, which reaches the box."""
    settings = {"FERRY_SSH": shlex.join(map(str, box.ssh)), "FERRY_SILENCE_SECONDS": "4"} | environment
    return started_at(laptop, *words, **settings)


class Watch:
    """A `make`, and what it has said so far."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.said = process, ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.said += line

    def until(self, ready, seconds: float = 300) -> None:
        limit = time.monotonic() + seconds
        while not ready() and self.process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert ready(), self.said

    def end(self) -> int:
        code = self.process.wait()
        self.reader.join()
        return code

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.end()


def done(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out = process.communicate()[0]
    return subprocess.CompletedProcess(process.args, process.returncode, out, "")


def make(laptop: Path, box: Box, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return done(started(laptop, box, *words, **environment))
