"""The provider ssh: a machine that OpenSSH reaches, or this machine. Only `make` and the lines of ssh_box.sh run there.

Keys, agents, jump hosts and host keys are up to ssh and the user's ~/.ssh/config; FERRY_SSH names another command, such
as `ssh -F file` or `ssh -i key`.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from common import console, files, hub
from common.child_process import require_pipe
from common.errors import UserError, printable_line
from launch import source_archive
from launch.provider import ConnectionLost, Job, JobState, Machine, RemoteFileMissing, command_words
from launch.providers.ssh_address import SshAddress

REMOTE_SCRIPT = Path(__file__).with_name("ssh_box.sh")
CONNECT_SECONDS = 20  # seconds to make a connection
SSH_ERROR_CODE = 255  # ssh's own exit code, when the connection failed
FOLLOW_EXIT_CODES = (143, -15)  # exit codes of follow in ssh_box.sh when the job has ended


class SshFault(NamedTuple):
    """An error of ssh that a retry does not cure."""

    pattern: str
    """A regular expression that finds ssh's own message."""
    code: str
    reason: str
    hint: str
    """Text with the fields {ssh}, the command that reaches the machine, and {known}, its name in known_hosts."""


# An error that is not listed may be gone at the next try.
SSH_FAULTS = (
    SshFault(
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "ssh.host_key_changed",
        "its host key differs from the known one: a different machine, or somebody intercepts the connection",
        "if the machine was reinstalled, `ssh-keygen -R {known}` removes the old key; "
        "then run `{ssh}` once and compare the new key",
    ),
    SshFault(
        "Host key verification failed|No .* host key is known",
        "ssh.unknown_host_key",
        "its host key is not known here",
        "run `{ssh}` once and compare the key with the provider's",
    ),
    SshFault(
        "Permission denied|Too many authentication failures",
        "ssh.key_refused",
        "it does not accept this machine's key",
        "add the key there (ssh-copy-id), or name it in ~/.ssh/config or FERRY_SSH='ssh -i key'; `{ssh}` must work",
    ),
    SshFault(
        "Bad configuration option|terminating, .* bad configuration|Can't open user config",
        "ssh.invalid_config",
        "ssh's configuration is not readable",
        "`{ssh}` shows more",
    ),
    SshFault(
        "Could not resolve hostname",
        "ssh.unknown_host",
        "no host has that name",
        "correct CLOUD, or check the network; `{ssh}` must work",
    ),
)


class MachineProcess:
    """A command on the machine, with a thread that collects its stderr."""

    def __init__(self, words: list[str], own_session: bool):
        """Start the command.

        Args:
            words: The whole command, with ssh where the machine is not this one.
            own_session: Whether Ctrl-C on this terminal does not reach it.

        Raises:
            OSError: The program cannot be started.
        """
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=own_session,
        )
        self.stdin, self.stdout = require_pipe(self._process.stdin), require_pipe(self._process.stdout)
        self._stderr_lines: list[bytes] = []
        self._stderr_reader = threading.Thread(target=self._collect_stderr, daemon=True)
        self._stderr_reader.start()

    def _collect_stderr(self) -> None:
        """Read stderr until it ends."""
        self._stderr_lines.extend(require_pipe(self._process.stderr))

    def wait(self) -> tuple[int, str]:
        """Wait until the process ends and return its exit code and stderr."""
        exit_code = self._process.wait()
        self._stderr_reader.join()
        return exit_code, b"".join(self._stderr_lines).decode(errors="replace")

    def kill(self) -> None:
        """End the process here and close its pipes. What it started on the machine goes on."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class SshProvider:
    """Runs jobs on a machine that ssh reaches, or on this machine."""

    is_rented: bool = False
    checkpoints: str | None = None

    def __init__(self, address: SshAddress | None, root: str | None = None):
        """Set the machine (None: this one), and the folder of all jobs there (None: that of the address)."""
        self.address, self.root = address, root or (address.folder if address else "")
        self.is_local = address is None
        self.label = address.destination if address else "this machine"

    @property
    def ssh_command(self) -> str:
        """Return the command that a user types to reach a machine that is not this one."""
        assert self.address, "this machine is reached without ssh"
        return shlex.join(["ssh", *self.address.ssh_arguments])

    def job_folder(self, job_name: str) -> str:
        """Return the job's folder on the machine."""
        return f"{self.root}/{job_name}"

    def inspect_machine(self) -> Machine:
        pairs = [line.partition(" ")[::2] for line in self._run_script("look", self.root).splitlines()]
        facts = dict(pairs)
        return Machine(
            system=facts.get("system", ""),
            free_bytes=1024 * int(facts.get("free") or 0),
            unwritable_folder=facts.get("unwritable", ""),
            gpu_names=tuple(value for key, value in pairs if key == "gpu"),
            missing_programs=tuple(value for key, value in pairs if key == "missing"),
        )

    def read_job_state(self, job_name: str) -> JobState:
        lines = self._run_script("state", self.job_folder(job_name)).splitlines()
        facts = dict(line.partition(" ")[::2] for line in lines)
        status = next((status for status in ("running", "ended", "died") if status in facts), "absent")
        return JobState(
            status,
            int(facts["ended"]) if status == "ended" else None,
            facts.get("goal", ""),
            facts.get("config", ""),
            facts.get("commit", ""),
            int(facts.get("log") or 0),
        )

    def send_job(self, job: Job) -> None:
        folder = self.job_folder(job.name)
        self._claim_folder(folder)
        unpack = f"mkdir -p {shlex.quote(folder)} && tar -xof - -C {shlex.quote(folder)}"
        self._run_with_input(unpack, lambda pipe: pipe.write(source_archive.build_archive(job)))
        sha256s = {name: files.sha256(path) for name, path in job.files.items()}
        missing = self._list_missing_files(folder, sha256s)
        if missing:
            paths = {name: job.files[name] for name in missing}
            size = sum(path.stat().st_size for path in paths.values())
            hub.print_message(f"data: {len(paths)} file{'s' * (len(paths) > 1)}, {size / 1e6:.1f} MB, to {self.label}")
            self._run_with_input(unpack, lambda pipe: _write_tar(paths, size, pipe))
        if still_missing := self._list_missing_files(folder, sha256s):
            raise UserError(
                f"{still_missing[0]} did not arrive complete on {self.label}",
                "run the same command again",
                code="job.incomplete_file",
            )

    def _claim_folder(self, folder: str) -> None:
        """Make the folder a job's, without the tree sent before. Raise UserError for files that Ferry did not send."""
        if foreign_names := self._run_script("claim", folder).splitlines():
            listing = printable_line(", ".join(foreign_names[:4]))
            raise UserError(
                f"{self.label}: {folder} contains {listing}, which Ferry did not send",
                "RUN=another-name, or a different folder: CLOUD=ssh://user@host/folder",
                code="job.foreign_folder",
            )

    def start_job(self, job: Job, goal: str, environment: dict[str, str]) -> None:
        settings = ["CONFIG=job/config.yaml", f"RUN={job.run_name}", "RUNS=runs", *job.settings]
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        words = ("start", self.job_folder(job.name), goal, f"VENV={self._environment_path(job)}", *settings)
        self._run_script(*words, exports=exports + self._cache_exports())

    def _environment_path(self, job: Job) -> str:
        """Return the path of the job's Python environment.

        Jobs with the same lock files share one. On this machine they share the environment that starts them, when its
        lock files are the same.
        """
        if (
            self.is_local
            and source_archive.has_same_locks(job.repository, job.commit)
            and Path(sys.prefix, "llama.cpp").exists()
        ):
            return sys.prefix
        name = f"venv-{source_archive.hash_lock_files(job.repository, job.commit)}"
        return f"{self.root}/{name}" if self.root.startswith("/") else f"../{name}"

    def _cache_exports(self) -> str:
        """Return shell lines that put caches below the root if it is an absolute path: a pod's own disk is small."""
        if self.address is None or not self.root.startswith("/"):
            return ""
        cache_folders = {"FERRY_CACHE": f"{self.root}/cache", "HF_HOME": f"{self.root}/cache/huggingface"}
        return "".join(f'export {name}="${{{name}:-{folder}}}"\n' for name, folder in cache_folders.items())

    def follow_log(self, job_name: str, offset: int, write: Callable[[bytes], object]) -> None:
        process = self._start_script("follow", self.job_folder(job_name), str(offset))
        try:
            while block := os.read(process.stdout.fileno(), 1 << 16):  # as it comes, not when a buffer is full
                write(block)
            self._raise_on_failure(process, (0, *FOLLOW_EXIT_CODES))
        finally:
            process.kill()

    def read_file(self, job_name: str, path: str, offset: int = 0) -> Iterator[bytes]:
        return self._stream_script("rest", self.job_folder(job_name), path, str(offset))

    def pack_run(self, job_name: str, run_name: str) -> Iterator[bytes]:
        return self._stream_script("pack", self.job_folder(job_name), run_name)

    def _stream_script(self, *words: str) -> Iterator[bytes]:
        """Run ssh_box.sh with these words and yield its output."""
        process = self._start_script(*words)
        try:
            while block := process.stdout.read(files.CHUNK_BYTES):
                yield block
            self._raise_on_failure(process)
        finally:
            process.kill()

    def stop_job(self, job_name: str) -> None:
        self._run_script("stop", self.job_folder(job_name))

    def teardown_command(self, job_name: str) -> str | None:
        return None  # only the user knows how to end what bills

    def describe_costs(self, job_name: str, is_running: bool) -> str:
        if self.is_local:
            return f"Its files are in {self.job_folder(job_name)}"
        return (
            f"{self.label} bills until you end it where you rented it (or with TEARDOWN='command'); "
            f"the run's files are in {self.job_folder(job_name)} there"
        )

    def _list_missing_files(self, folder: str, sha256s: dict[str, str]) -> list[str]:
        """Return the names of the files that are missing on the machine or have another sha256."""
        remote_sha256s = (
            dict(line.split() for line in self._run_script("have", folder, *sha256s).splitlines()) if sha256s else {}
        )
        return [
            name for number, (name, sha256) in enumerate(sha256s.items()) if remote_sha256s.get(str(number)) != sha256
        ]

    def _wrap_in_ssh(self, remote_words: list[str]) -> list[str]:
        """Return the whole command to run `remote_words` on the machine, quoted for the shell that ssh starts there."""
        if self.address is None:
            return remote_words
        alive_seconds = max(1, round(hub.timeout_seconds() / 4))
        options = [f"ConnectTimeout={CONNECT_SECONDS}", f"ServerAliveInterval={alive_seconds}", "ServerAliveCountMax=4"]
        # without a terminal ssh cannot ask for a passphrase
        options += [] if sys.stdin.isatty() else ["BatchMode=yes"]
        option_words = [word for option in options for word in ("-o", option)]
        ssh_words = [*command_words("FERRY_SSH", "ssh"), "-T", *option_words, *self.address.ssh_arguments]
        return [*ssh_words, shlex.join(remote_words)]

    def _start_script(self, *words: str, exports: str = "") -> MachineProcess:
        """Start ssh_box.sh with these words.

        exports: shell lines that run before it. They go through stdin, so they stand in no argument and in no file.
        """
        process = self._start_process(["sh", "-s", "--", *words])
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write((exports + REMOTE_SCRIPT.read_text(encoding="utf-8")).encode())
            process.stdin.close()
        return process

    def _start_process(self, remote_words: list[str]) -> MachineProcess:
        """Start a command on the machine."""
        words = self._wrap_in_ssh(remote_words)
        try:
            return MachineProcess(words, own_session=self.is_local)  # Ctrl-C is handled by Ferry
        except OSError as error:
            raise UserError(
                f"cannot start {words[0]}: {error.strerror}",
                "install the OpenSSH client, or fix FERRY_SSH",
                code="ssh.not_installed",
            ) from None

    def _run_script(self, *words: str, exports: str = "") -> str:
        """Run ssh_box.sh with these words and return its output. Raise UserError when it fails."""
        process = self._start_script(*words, exports=exports)
        try:
            output = process.stdout.read().decode(errors="replace")
            self._raise_on_failure(process)
            return output
        finally:
            process.kill()

    def _run_with_input(self, remote_command: str, write_input: Callable[[IO[bytes]], object]) -> None:
        """Run a command on the machine, with what `write_input` writes to its stdin."""
        process = self._start_process(["sh", "-c", remote_command])
        try:
            with contextlib.suppress(BrokenPipeError):  # the command has ended; its stderr says why
                write_input(process.stdin)
                process.stdin.close()
            process.stdout.read()
            self._raise_on_failure(process)
        finally:
            process.kill()

    def _raise_on_failure(self, process: MachineProcess, good_codes: tuple[int, ...] = (0,)) -> None:
        """Wait for a process to end. Raises the error for its exit code and stderr unless it is one of `good_codes`."""
        exit_code, stderr = process.wait()
        if exit_code == SSH_ERROR_CODE and not self.is_local:
            raise self._ssh_error(stderr)
        if exit_code not in good_codes:
            raise self._command_error(stderr, exit_code)

    def _ssh_error(self, stderr: str) -> UserError:
        """Return the error for what ssh could not do."""
        for fault in SSH_FAULTS:
            if self.address and re.search(fault.pattern, stderr):
                hint = fault.hint.format(ssh=self.ssh_command, known=self.address.known_hosts_name)
                return UserError(f"{self.label}: {fault.reason}", hint, code=fault.code)
        lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith(("Warning:", "**"))]
        reason = re.sub(r"^ssh: |\r", "", lines[-1]) if lines else "the connection was closed"
        return ConnectionLost(
            f"{self.label} cannot be reached: {printable_line(reason)}",
            f"check that it runs and that `{self.ssh_command}` works, then run the same command again",
            code="ssh.unreachable",
        )

    def _command_error(self, stderr: str, exit_code: int) -> UserError:
        """Return the error for what a command on the machine could not do."""
        lines = [line for line in stderr.splitlines() if line.strip()]
        disk_full_lines = [
            line for line in lines if re.search("No space left|Disk quota exceeded|File too large", line)
        ]
        reason = printable_line([*disk_full_lines, *lines[-1:], f"exit code {exit_code}"][0])
        if re.search("No such file|can't cd to", reason):
            return RemoteFileMissing(
                f"{self.label}: {reason}",
                "run the same command again: it creates what is missing",
                code="job.file_missing",
            )
        hint, code = (
            ("free some disk there", "disk.full")
            if disk_full_lines
            else ("fix it there" + ("" if self.is_local else f" (`{self.ssh_command}`)"), "job.command_failed")
        )
        return UserError(f"{self.label}: {reason}", f"{hint}, then run the same command again: it resumes", code=code)


def _write_tar(paths: dict[str, Path], size: int, pipe: IO[bytes]) -> None:
    """Write files (name in the tar -> local file) as a tar to `pipe`; size: their bytes, for the progress bar."""
    with console.show_progress(size, "sending data", "B") as tick, tarfile.open(fileobj=pipe, mode="w|") as tar:
        for name, path in paths.items():
            tar.add(path.resolve(), name)
            tick(path.stat().st_size)
