"""Run a function on an untrusted file in a child process, so that a crash, a hang or high memory use becomes one error.

llama.cpp parses a model in C++ and aborts its process when the input is not what it expects. The parent watches the
time and the memory of the child, kills it when it exceeds its limits, and reports in one line what happened.
"""

import contextlib
import importlib
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from common import console
from common.errors import UserError, printable_line

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1  # seconds between two checks of a child
SERVER_POLL_SECONDS = 2.0  # seconds, once the child is ready; on macOS each check starts `ps`
EXTRA_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}  # otherwise llama.cpp starts a debugger when it aborts
MAX_ANSWER_BYTES = 64 << 20  # of JSON
MAX_FILE_BYTES = 128 << 20  # of any file that a child of `call_in_child` writes
# The key that clients of `ferry serve` must send. The child gets it, because the child is the server.
SERVER_KEY_VARIABLE = "FERRY_API_KEY"
SECRET_VARIABLES = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY", re.IGNORECASE)
CHILD_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from common import child_process; child_process.main(*sys.argv[2:])"
)
SIGNAL_MEANINGS: dict[int, str] = {
    signal.SIGABRT: "llama.cpp aborted",
    signal.SIGSEGV: "llama.cpp crashed",
    signal.SIGBUS: "llama.cpp crashed, most often because the file became shorter or the disk is full",
    signal.SIGFPE: "llama.cpp crashed",
    signal.SIGILL: "llama.cpp was built for a different processor",
    signal.SIGKILL: "the system killed it, most often because it ran out of memory",
}
CRASH_HINT = "pull the model again; if the error stays, do not use the model, and report it"


@dataclass(frozen=True)
class Limits:
    """What a child process may use."""

    seconds: float
    """Wall-clock time."""
    memory: int
    """Resident memory in bytes."""


def call_in_child(function: str, arguments: Sequence[object], limits: Limits, subject: str) -> Any:
    """Call `function` in a child process and return its result; arguments and result must be JSON values.

    Args:
        function: the function's name as "module:name".
        subject: what the function works on, for messages.

    Raises:
        UserError: the function raised it, or the child crashed or exceeded its limits.
    """
    with (
        tempfile.TemporaryFile() as request_file,
        tempfile.TemporaryFile() as log_file,
        _open_pipe() as (reader, writer),
    ):
        request_file.write(json.dumps([function, arguments]).encode())
        request_file.seek(0)
        process = _start_child(["call", str(writer.fileno())], (writer.fileno(),), request_file, log_file)
        writer.close()
        try:
            answer = _read_answer(process, reader, limits, subject)
            exit_code = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            raise _timeout_error(limits.seconds, subject) from None
        finally:
            kill_with_children(process)
        return _parse_answer(answer, exit_code, log_file, subject)


def run_attached(function: str, arguments: Sequence[object], limits: Limits, subject: str) -> int:
    """Run `function` in a child process that shares this terminal, wait for its end, and return its exit code.

    Ctrl-C reaches the child, SIGTERM is passed on, and the child ends when this process does.

    Args:
        function: the function's name as "module:name".
        limits: `seconds` counts only until the child calls `report_ready`.
        subject: what the function works on, for messages.

    Raises:
        UserError: the child crashed or exceeded its limits.
    """
    with _open_pipe() as (ready_pipe, writer), _open_pipe() as (alive_pipe, _):
        child_arguments = [
            "attached",
            str(writer.fileno()),
            str(alive_pipe.fileno()),
            json.dumps([function, arguments]),
        ]
        process = _start_child(child_arguments, (writer.fileno(), alive_pipe.fileno()))
        writer.close()
        try:
            with _forward_signals(process):
                return _wait_for_child(process, ready_pipe, limits, subject)
        finally:
            process.kill()
            process.wait()


def report_ready() -> None:
    """Tell the parent that the start is complete, so that its time limit ends; do nothing outside of a child."""
    with contextlib.suppress(KeyError, OSError):
        os.close(int(os.environ.pop("FERRY_READY")))


# The parent's side


def _start_child(
    arguments: list[str],
    inherited_descriptors: tuple[int, ...],
    request: IO[bytes] | None = None,
    log: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a Python that imports from the same places as this one, without secrets in its environment.

    With a `request` the child has a session of its own and no terminal. Without one it shares this terminal.
    """
    import_paths = json.dumps([str(ROOT), *(str(Path(folder).resolve()) for folder in sys.path)])
    environment = {
        name: value
        for name, value in os.environ.items()
        if not SECRET_VARIABLES.search(name) or name == SERVER_KEY_VARIABLE
    }
    return subprocess.Popen(
        [sys.executable, "-B", "-c", CHILD_CODE, import_paths, *arguments],
        pass_fds=inherited_descriptors,
        env=environment | EXTRA_ENVIRONMENT,
        stdin=request,
        stdout=log,
        stderr=log,
        start_new_session=request is not None,
    )


@contextlib.contextmanager
def _open_pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a pipe; yield (the end to read from, the end to write to), and close both afterwards."""
    reader, writer = (os.fdopen(end, mode, 0) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with reader, writer:
        yield reader, writer


def _read_answer(process: subprocess.Popen[bytes], reader: IO[bytes], limits: Limits, subject: str) -> bytes:
    """Return what the child writes to the pipe until it closes it. Raise UserError when it exceeds its limits."""
    answer, deadline = bytearray(), time.monotonic() + limits.seconds
    while True:
        if select.select([reader], [], [], POLL_SECONDS)[0]:
            block = reader.read(1 << 20)
            if not block:
                return bytes(answer)
            answer += block
        if len(answer) > MAX_ANSWER_BYTES:
            raise UserError(
                f"{subject}: the answer is larger than {MAX_ANSWER_BYTES:,} bytes",
                CRASH_HINT,
                code="process.answer_too_large",
            )
        _refuse_over_limits(process, limits.memory, deadline, limits.seconds, subject)


def _refuse_over_limits(
    process: subprocess.Popen[bytes], max_memory: int, deadline: float, seconds: float, subject: str
) -> None:
    """Raise UserError when the deadline has passed or the child uses more than `max_memory` bytes.

    Args:
        max_memory: largest resident memory in bytes.
        deadline: the end of the time limit, as time.monotonic() counts.
        seconds: the time limit that the deadline was made from, for the message.
    """
    if time.monotonic() > deadline:
        raise _timeout_error(seconds, subject)
    if (used_bytes := resident_bytes(process.pid)) > max_memory:
        raise UserError(
            f"{subject} used {used_bytes / 1e9:.1f} GB of memory, the limit is {max_memory / 1e9:.1f} GB",
            CRASH_HINT,
            code="process.memory_exceeded",
        )


def _timeout_error(seconds: float, subject: str) -> UserError:
    return UserError(
        f"{subject} took more than {seconds:.0f} s",
        "close other programs and run the same command again; if the error stays, do not use this model",
        code="process.timeout",
    )


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 where the system does not report it."""
    try:
        if sys.platform == "linux":
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")
        result = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
        return int(result.stdout.strip() or 0) * 1024
    except (OSError, ValueError, IndexError):
        return 0


def _parse_answer(answer: bytes, exit_code: int, log: IO[bytes], subject: str) -> Any:
    """Return the value in the child's answer. Raise UserError for the error in it, or when there is no answer."""
    try:
        reply = json.loads(answer)
    except ValueError:
        raise _crash_error(exit_code, subject, _read_last_line(log) if exit_code > 0 else "") from None
    if "error" in reply:
        message, hint, code = reply["error"]
        raise UserError(message, hint, code=code)
    return reply["value"]


def _read_last_line(log: IO[bytes]) -> str:
    """Return the last line of a log, of at most 64 KiB."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - 65_536))
    return log.read().decode("utf-8", "replace").strip().rpartition("\n")[2]


def _crash_error(exit_code: int, subject: str, last_line: str = "") -> UserError:
    """Return the error for a child that ended without an answer.

    Args:
        exit_code: its exit code; negative: the signal that ended it.
        last_line: the last line that it printed.
    """
    reason = (
        SIGNAL_MEANINGS.get(-exit_code, f"signal {-exit_code}")
        if exit_code < 0
        else f"exit code {exit_code}{': ' * bool(last_line)}{printable_line(last_line, 200)}"
    )
    return UserError(f"{subject} ended without a result: {reason}", CRASH_HINT, code="process.crashed")


def kill_with_children(process: subprocess.Popen[bytes]) -> None:
    """Kill a session's leader and all processes of its group, even when the leader has ended by itself."""
    with contextlib.suppress(OSError):  # no process is left; macOS reports that as forbidden
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def require_pipe(stream: IO[bytes] | None) -> IO[bytes]:
    """Return the stdin, stdout or stderr of a process that was started with PIPE for it."""
    assert stream is not None, "Popen makes a stream for each PIPE"
    return stream


@contextlib.contextmanager
def _forward_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM on to the child; SIGINT too, where no terminal sends it to the child by itself."""

    def forward_signal(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    previous_handlers = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, forward_signal),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN if is_in_foreground() else forward_signal),
    }
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def is_in_foreground() -> bool:
    """Return whether a terminal's Ctrl-C reaches this process."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            return os.tcgetpgrp(descriptor) == os.getpgrp()
    return False


def _wait_for_child(process: subprocess.Popen[bytes], ready_pipe: IO[bytes], limits: Limits, subject: str) -> int:
    """Wait until the child ends and return its exit code: 128 + number for a signal that a user sends.

    The time limit ends when `ready_pipe` becomes readable, which is when the child closes its end of it.
    """
    deadline, pause = time.monotonic() + limits.seconds, POLL_SECONDS
    while process.poll() is None:
        if deadline < math.inf and select.select([ready_pipe], [], [], 0)[0]:
            deadline, pause = math.inf, SERVER_POLL_SECONDS
        _refuse_over_limits(process, limits.memory, deadline, limits.seconds, subject)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause)
    exit_code = process.returncode
    if exit_code < 0 and -exit_code not in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGHUP):
        raise _crash_error(exit_code, subject)
    return exit_code if exit_code >= 0 else 128 - exit_code


# The child's side


def main(kind: str, *arguments: str) -> None:
    """Run a child: `kind` is "call" (one function, its answer to a pipe) or "attached" (with this terminal)."""
    _limit_file_sizes(kind)
    if kind == "call":
        _answer_call(int(arguments[0]))
    else:
        ready_descriptor, alive_descriptor, request = arguments
        os.environ["FERRY_READY"] = ready_descriptor
        threading.Thread(target=_exit_with_parent, args=(int(alive_descriptor),), daemon=True).start()
        _run_function(*json.loads(request))


def _answer_call(answer_descriptor: int) -> None:
    """Call the function that stdin names and write its result, or its UserError, to the pipe; then exit."""
    answer = _call_function(*json.load(sys.stdin))
    with os.fdopen(answer_descriptor, "wb") as stream:
        stream.write(json.dumps(answer).encode())
    sys.stdout.flush()
    os._exit(0)  # do not wait for any library's clean-up


def _call_function(function: str, arguments: list[Any]) -> dict[str, object]:
    """Call the function; return {"value": its result}, or {"error": message, hint and code of its UserError}."""
    try:
        return {"value": _import_function(function)(*arguments)}
    except UserError as error:
        return {"error": [error.message, error.hint, error.code]}


def _run_function(function: str, arguments: list[Any]) -> None:
    """Call the function; print a UserError and exit with code 2, or exit with 130 after Ctrl-C."""
    try:
        _import_function(function)(*arguments)
    except UserError as error:
        console.print_message(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        console.print_message("stopped")
        sys.exit(130)


def _import_function(function: str) -> Callable[..., object]:
    """Return the function that "module:name" names."""
    module, name = function.split(":")
    imported: Callable[..., object] = getattr(importlib.import_module(module), name)
    return imported


def _exit_with_parent(alive_descriptor: int) -> None:
    """Exit when the parent has ended: it alone has the other end of the pipe, which closes with it, however it ends."""
    os.read(alive_descriptor, 1)
    os._exit(1)


def _limit_file_sizes(kind: str) -> None:
    """Forbid core files, and large files to a child of `call_in_child`."""
    import resource

    for name, limit in ({"CORE": 0} | ({"FSIZE": MAX_FILE_BYTES} if kind == "call" else {})).items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
