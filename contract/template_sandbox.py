"""Render an untrusted chat template in a child process that has limits and no secrets.

Jinja's sandbox keeps a template from Python's internals, but not from using unlimited time and memory. And if the
sandbox has a hole, code that escapes finds no environment variables, cannot write a file, and is killed after the time
limit.
"""

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from common import files
from common.child_process import kill_with_children
from common.errors import UserError, shown
from contract import chat_format

ROOT = Path(__file__).resolve().parent.parent
MAX_TEMPLATE = 1 << 20  # the longest of real templates has about 20,000
MAX_REQUEST = 64 << 20  # of JSON
MAX_TEXT = 4 << 20  # of all prompts together
MAX_ANSWER = 6 * MAX_TEXT + 4096  # of JSON, in which a character takes at most six bytes, as in \u0000
MEMORY = 1 << 30  # of address space; a normal child uses 90 MB, of which 21 MB are resident
FILES = 64  # imports open one at a time
# Environment variables that the child keeps. TZ: a template may print today's date. Library paths: some Pythons do not
# start without them.
KEPT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
HINT = "this repo's template is not one that Ferry publishes: do not use it"
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from contract import template_sandbox; template_sandbox.child()"
)


def prompts(
    template: str, conversations: Sequence[tuple[Sequence[dict], bool]], bos: str, eos: str, seconds: float = 10
) -> list[str]:
    """Return the text of each of `conversations`, the same that contract.chat_format.render returns in this process.

    Args:
        template: the chat template, as Jinja text.
        conversations: pairs of (messages, add_generation_prompt).
        bos: text of the BOS token.
        eos: text of the EOS token.
        seconds: wall-clock time for all of them, including the start of the child (0.1 s).

    Raises:
        UserError: the template is not valid, fails, or exceeds the limits of time, memory or text.
    """
    if len(template) > MAX_TEMPLATE:
        raise UserError(f"the chat template has {len(template):,} characters, at most {MAX_TEMPLATE:,}", HINT)
    given = {"template": template, "conversations": list(conversations), "bos": bos, "eos": eos}
    request = json.dumps(given).encode()
    if len(request) > MAX_REQUEST:
        raise UserError(f"the conversations to render take {len(request):,} bytes, at most {MAX_REQUEST:,}", HINT)
    return _checked(*_asked(request, seconds), len(given["conversations"]))


def _asked(request: bytes, seconds: float) -> tuple[bytes, int]:
    """Run a child for `request`; return its answer and its exit code. Raise UserError when the time is over."""
    until = time.monotonic() + seconds
    # stdin is a file, because a write to a pipe that is not read would block for ever.
    with _written(request) as question:
        process = _started(question, seconds)
        try:
            answer = _heard(process.stdout, until)
            return answer, process.wait(max(0, until - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise UserError(f"the chat template took more than {seconds:g} s", HINT) from None
        finally:
            _killed(process)


def _written(content: bytes) -> IO[bytes]:
    """Return an open temporary file with `content`, at its beginning. Raise UserError when it cannot be written."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
        file.write(content)
        file.seek(0)
    except OSError as error:
        raise UserError(
            f"no temporary file can be written: {error.strerror}",
            "free some disk in /tmp, or set TMPDIR to another folder",
        ) from error
    return file


def _started(question: IO[bytes], seconds: float) -> subprocess.Popen:
    """Start a Python with the same import paths, without this one's environment, site hooks (-S) or .pyc files (-B)."""
    path = json.dumps([str(ROOT), *(str(Path(place).resolve()) for place in sys.path)])
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", START, path, str(math.ceil(seconds))],
        cwd=ROOT,
        env={name: os.environ[name] for name in KEPT if name in os.environ},
        stdin=question,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _heard(pipe: IO[bytes], until: float) -> bytes:
    """Return all bytes from a pipe.

    Raises:
        TimeoutError: the pipe is still open at the deadline, as time.monotonic() counts.
        UserError: the answer is longer than an answer may be.
    """
    heard = bytearray()
    while len(heard) <= MAX_ANSWER:
        if not select.select([pipe], [], [], max(0, until - time.monotonic()))[0]:
            raise TimeoutError
        if not (block := os.read(pipe.fileno(), files.CHUNK)):
            return bytes(heard)
        heard += block
    raise UserError(f"the chat template is refused: its prompts have more than {MAX_TEXT:,} characters", HINT)


def _killed(process: subprocess.Popen) -> None:
    """Kill the child with all that it may have started, whether or not it has ended by itself."""
    kill_with_children(process)
    process.stdout.close()


def _checked(answer: bytes, code: int, wanted: int) -> list[str]:
    """Return the texts in an answer. Raise UserError for the child's own message, or when the answer is anything else.

    The child is trusted no more than its template, so its answer may be anything.
    """
    try:
        said = json.loads(answer.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, str):
        raise UserError(f"the chat template is refused: {shown(said, 300)}", HINT)
    if not isinstance(said, list) or len(said) != wanted or not all(isinstance(text, str) for text in said):
        raise UserError(f"the chat template broke what renders it (exit code {code})", HINT)
    return said


def child() -> None:
    """Run the child: read a request from stdin, write a list of texts, or a message about a failure, to stdout."""
    _limit(int(sys.argv[2]))
    try:
        answer = _rendered(json.loads(sys.stdin.buffer.read(MAX_REQUEST)))
    except (UserError, ValueError, RecursionError, MemoryError) as error:  # anything else is exit code 1
        answer = chat_format.why(error.__cause__ or error)
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    sys.stdout.buffer.flush()
    os._exit(0)  # run no clean-up code of the template


def _limit(seconds: int) -> None:
    """Lower the resource limits of this process, before it reads a byte of the request.

    CPU time is limited in case the parent, which watches the wall-clock time, was killed. macOS ignores RLIMIT_AS or
    does not let it be set: there only the time limit and the limit on the answer remain. RLIMIT_NPROC has no effect for
    root.
    """
    import resource

    limits = {"CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": FILES, "CPU": seconds + 1, "AS": MEMORY}
    for name, most in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _rendered(request: dict) -> list[str]:
    """Return the prompts of a request. Errors of its template are passed on.

    Raises:
        ValueError: all prompts together are longer than MAX_PROMPT_CHARS.
    """
    texts, length = [], 0
    for messages, generate in request["conversations"]:
        texts.append(chat_format.render(request["template"], messages, request["bos"], request["eos"], generate))
        length += len(texts[-1])
        if length > MAX_TEXT:
            raise ValueError(f"its prompts have more than {MAX_TEXT:,} characters")
    return texts
