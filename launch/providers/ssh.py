"""The provider ssh: a machine that OpenSSH reaches, or this machine. Only `make` and the lines of ssh_box.sh run there.

Keys, agents, jump hosts and host keys are up to ssh and the user's ~/.ssh/config; FERRY_SSH names another command, such
as `ssh -F file` or `ssh -i key`.
"""

import contextlib
import re
import shlex
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from common import console, files, hub
from common.errors import UserError, shown
from launch import source_archive
from launch.provider import Job, Lost, Machine, Missing, State, program
from launch.providers.ssh_address import Address

SCRIPT = Path(__file__).with_name("ssh_box.sh")
REACHING = 20  # seconds to make a connection
GONE = 255  # ssh's own exit code, when the connection failed
WATCHED = (143, -15)  # exit codes of follow in ssh_box.sh when the job has ended
# Pattern of ssh's own message, our message, our hint. An error that is not listed may be gone at the next try.
FINAL = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one that was known: another machine, or somebody between",
        (
            "if the box was made anew, `ssh-keygen -R {known}` forgets the old key; "
            "then `{ssh}` once, and compare the new one"
        ),
    ),
    (
        "Host key verification failed",
        "its host key is not known here",
        "`{ssh}` once, and compare the key with the provider's",
    ),
    (
        "No .* host key is known",
        "its host key is not known here",
        "`{ssh}` once, and compare the key with the provider's",
    ),
    (
        "Permission denied|Too many authentication failures",
        "it does not accept this machine's key",
        "add the key there (ssh-copy-id), or name it in ~/.ssh/config or FERRY_SSH='ssh -i key'; `{ssh}` must work",
    ),
    (
        "Bad configuration option|terminating, .* bad configuration|Can't open user config",
        "ssh's configuration cannot be read",
        "`{ssh}` says more",
    ),
    (
        "Could not resolve hostname",
        "there is no host of that name",
        "correct CLOUD, or check the network; `{ssh}` must work",
    ),
)


class Box:
    """Runs jobs on a machine that ssh reaches, or on this machine."""

    def __init__(self, address: Address | None, root: str | None = None):
        """Set the machine.

        Args:
            address: None for this machine.
            root: The folder of all jobs there; None for the address's folder.
        """
        self.address, self.root = address, root or (address.folder if address else "")
        self.ours, self.rented = address is None, False
        self.where = address.destination if address else "this machine"

    @property
    def command(self) -> str:
        """Return the command that a user types to reach the machine."""
        return shlex.join(["ssh", *self.address.words])

    def folder(self, name: str) -> str:
        """Return the job's folder on the machine."""
        return f"{self.root}/{name}"

    def look(self) -> Machine:
        said = [line.partition(" ")[::2] for line in self._run("look", self.root).splitlines()]
        facts = dict(said)
        return Machine(
            system=facts.get("system", ""),
            free=1024 * int(facts.get("free") or 0),
            unwritable=facts.get("unwritable", ""),
            cards=tuple(value for key, value in said if key == "card"),
            lacks=tuple(value for key, value in said if key == "lacks"),
        )

    def state(self, name: str) -> State:
        facts = dict(line.partition(" ")[::2] for line in self._run("state", self.folder(name)).splitlines())
        word = next((word for word in ("running", "ended", "died") if word in facts), "absent")
        return State(
            word,
            int(facts["ended"]) if word == "ended" else None,
            facts.get("goal", ""),
            facts.get("config", ""),
            facts.get("commit", ""),
            int(facts.get("log") or 0),
        )

    def send(self, job: Job) -> None:
        folder = self.folder(job.name)
        self._claim(folder)
        unpack = f"mkdir -p {shlex.quote(folder)} && tar -xof - -C {shlex.quote(folder)}"
        self._feed(unpack, lambda out: out.write(source_archive.packed(job)))
        wanted = {name: files.sha256(path) for name, path in job.files.items()}
        missing = self._missing(folder, wanted)
        if missing:
            size = sum(job.files[name].stat().st_size for name in missing)
            hub.say(f"data: {len(missing)} file{'s' * (len(missing) > 1)}, {size / 1e6:.1f} MB, to {self.where}")
            self._feed(unpack, lambda out: _tar({name: job.files[name] for name in missing}, size, out))
        if lost := self._missing(folder, wanted):
            raise UserError(f"{lost[0]} did not arrive whole on {self.where}", "run the same command again")

    def _claim(self, folder: str) -> None:
        """Make the folder a job's and remove the tree that was sent before.

        Raises UserError when the folder has files that Ferry did not send.
        """
        answer = self._run("claim", folder)
        if strange := answer.splitlines():
            raise UserError(
                f"{self.where}: {folder} holds {shown(', '.join(strange[:4]))}, which Ferry did not send",
                "RUN=another-name, or another folder: CLOUD=ssh://user@box/folder",
            )

    def start(self, job: Job, goal: str, secrets: dict[str, str]) -> None:
        settings = [
            f"VENV={self._environment(job)}",
            "CONFIG=job/config.yaml",
            f"RUN={job.run}",
            "RUNS=runs",
            *job.settings,
        ]
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in secrets.items()) + self._caches()
        self._run("start", self.folder(job.name), goal, *settings, before=exports)

    def _environment(self, job: Job) -> str:
        """Return the path of the job's Python environment.

        Jobs with the same lock files share one. On this machine they share the environment that starts them, when its
        lock files are the same.
        """
        if (
            self.ours
            and source_archive.same_locks(job.repository, job.commit)
            and Path(sys.prefix, "llama.cpp").exists()
        ):
            return sys.prefix
        name = f"venv-{source_archive.locks(job.repository, job.commit)}"
        return f"{self.root}/{name}" if self.root.startswith("/") else f"../{name}"

    def _caches(self) -> str:
        """Return shell lines that put caches below the root if it is an absolute path: a pod's own disk is small."""
        if self.address is None or not self.root.startswith("/"):
            return ""
        places = {"FERRY_CACHE": f"{self.root}/cache", "HF_HOME": f"{self.root}/cache/huggingface"}
        return "".join(f'export {name}="${{{name}:-{place}}}"\n' for name, place in places.items())

    def follow(self, name: str, seen: int, out: Callable[[bytes], object]) -> None:
        process = self._open("follow", self.folder(name), str(seen))
        try:
            while block := process.stdout.read1(1 << 16):
                out(block)
            self._closed(process, (0, *WATCHED))
        finally:
            _ended(process)

    def rest(self, name: str, path: str, start: int = 0) -> Iterator[bytes]:
        return self._blocks("rest", self.folder(name), path, str(start))

    def pack(self, name: str, run: str) -> Iterator[bytes]:
        return self._blocks("pack", self.folder(name), run)

    def _blocks(self, *words: str) -> Iterator[bytes]:
        """Run ssh_box.sh with these words and yield its output."""
        process = self._open(*words)
        try:
            while block := process.stdout.read(files.CHUNK):
                yield block
            self._closed(process)
        finally:
            _ended(process)

    def stop(self, name: str) -> None:
        self._run("stop", self.folder(name))

    def teardown(self, name: str) -> str | None:
        return None  # only the user knows how to end what bills

    def bill(self, name: str, running: bool) -> str:
        if self.ours:
            return f"What there is of it is in {self.folder(name)}"
        return (
            f"{self.where} bills until you end it where you rented it (TEARDOWN='command' does); "
            f"what there is of the run is in {self.folder(name)} there"
        )

    def _missing(self, folder: str, wanted: dict[str, str]) -> list[str]:
        """Return the names of the files that are missing on the machine or have another sha256."""
        said = dict(line.split() for line in self._run("have", folder, *wanted).splitlines()) if wanted else {}
        return [name for number, (name, digest) in enumerate(wanted.items()) if said.get(str(number)) != digest]

    def _words(self, remote: list[str]) -> list[str]:
        """Return the whole command to run `remote_words` on the machine, quoted for the shell that ssh starts there."""
        if self.address is None:
            return remote
        silence = max(1, round(hub.silence() / 4))
        options = {"ConnectTimeout": REACHING, "ServerAliveInterval": silence, "ServerAliveCountMax": 4}
        # without a terminal ssh cannot ask for a passphrase
        options |= {} if sys.stdin.isatty() else {"BatchMode": "yes"}
        given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return [*program("FERRY_SSH", "ssh"), "-T", *given, *self.address.words, shlex.join(remote)]

    def _open(self, *words: str, before: str = "") -> subprocess.Popen:
        """Start ssh_box.sh with these words.

        exports: shell lines that run before it. They go through stdin, so they stand in no argument and in no file.
        """
        process = self._popen(["sh", "-s", "--", *words])
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write((before + SCRIPT.read_text(encoding="utf-8")).encode())
            process.stdin.close()
        return process

    def _popen(self, remote: list[str]) -> subprocess.Popen:
        """Start a command on the machine; a thread collects its stderr in `process.stderr_lines`."""
        words = self._words(remote)
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=self.ours,  # Ctrl-C is handled by Ferry
            )
        except OSError as error:
            raise UserError(f"{words[0]} cannot be started: {error.strerror}", "install OpenSSH's client") from None
        process.said = []
        process.reader = threading.Thread(target=lambda: process.said.extend(process.stderr), daemon=True)
        process.reader.start()
        return process

    def _run(self, *words: str, before: str = "") -> str:
        """Run ssh_box.sh with these words and return its output. Raises UserError when it fails."""
        process = self._open(*words, before=before)
        try:
            out = process.stdout.read().decode(errors="replace")
            self._closed(process)
            return out
        finally:
            _ended(process)

    def _feed(self, remote: str, write: Callable) -> None:
        """Run a command on the machine, with what `write_input` writes to its stdin."""
        process = self._popen(["sh", "-c", remote])
        try:
            with contextlib.suppress(BrokenPipeError):  # the command has ended; its stderr says why
                write(process.stdin)
                process.stdin.close()
            process.stdout.read()
            self._closed(process)
        finally:
            _ended(process)

    def _closed(self, process: subprocess.Popen, well: tuple[int, ...] = (0,)) -> None:
        """Wait for a process to end. Raises the error for its exit code and stderr unless it is one of `good_codes`."""
        code = process.wait()
        process.reader.join()
        said = b"".join(process.said).decode(errors="replace")
        if code == GONE and not self.ours:
            raise self._translated(said)
        if code not in well:
            raise self._refused(said, code)

    def _translated(self, said: str) -> UserError:
        """Return the error for what ssh could not do."""
        known = f"'[{self.address.host}]:{self.address.port}'" if self.address.port else self.address.host
        for pattern, why, cure in FINAL:
            if re.search(pattern, said):
                return UserError(f"{self.where}: {why}", cure.format(ssh=self.command, known=known))
        lines = [line for line in said.splitlines() if line.strip() and not line.startswith(("Warning:", "**"))]
        why = re.sub(r"^ssh: |\r", "", lines[-1]) if lines else "the connection was closed"
        return Lost(
            f"{self.where} is not reached: {shown(why)}",
            f"see that it runs and that `{self.command}` works, then the same command",
        )

    def _refused(self, said: str, code: int) -> UserError:
        """Return the error for what a command on the machine could not do."""
        lines = [line for line in said.splitlines() if line.strip()]
        full = [line for line in lines if re.search("No space left|Disk quota exceeded|File too large", line)]
        why = shown([*full, *lines[-1:], f"exit code {code}"][0])
        if re.search("No such file|can't cd to", why):
            return Missing(f"{self.where}: {why}", "the same command makes it")
        cure = "free some disk there" if full else "see to it there" + ("" if self.ours else f" (`{self.command}`)")
        return UserError(f"{self.where}: {why}", f"{cure}, then the same command goes on")


def _ended(process: subprocess.Popen) -> None:
    """End a process here and close its pipes. What it started on the machine goes on."""
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def _tar(chosen: dict[str, Path], size: int, out) -> None:
    """Write files (name in the tar -> local file) as a tar to `pipe`; size: their bytes, for the progress bar."""
    with console.progress(size, "sending data", "B") as tick, tarfile.open(fileobj=out, mode="w|") as tar:
        for name, path in chosen.items():
            tar.add(path.resolve(), name)
            tick(path.stat().st_size)
