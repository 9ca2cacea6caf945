"""A stranger's chat template is rendered in a process of its own, which has limits and nothing to give away.

Jinja's sandbox keeps a template from Python's internals, but not from taking all time and all memory. And should it
have a hole, then whatever comes through finds no environment variables, cannot write a file, and ends with the clock.
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
MAX_TEMPLATE = 1 << 20  # characters; the longest of the real ones has some 20,000
MAX_REQUEST = 64 << 20  # bytes of JSON
MAX_TEXT = 4 << 20  # characters of all prompts together
MAX_ANSWER = 6 * MAX_TEXT + 4096  # bytes of JSON: \u0000 is the longest that one character becomes
MEMORY = 1 << 30  # bytes of address space; a normal child takes 90 MB, 21 MB of them in memory
FILES = 64  # open at once; imports open one at a time
# Time zone: a template may print today's date. Library paths: some Pythons do not start without them.
KEPT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
HINT = "this repo's template is not one that Ferry publishes: do not use it"
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from contract import template_sandbox; template_sandbox.child()"


def prompts(
    template: str, conversations: Sequence[tuple[Sequence[dict], bool]], bos: str, eos: str, seconds: float = 10
) -> list[str]:
    """Each (messages, add_generation_prompt) as text, the same that contract.chat_format.render gives in this process.

    seconds: wall-clock time for all of them, the start of the child included (0.1 s).
    Raises UserError when the template is refused, fails, or takes more time, memory or text than any honest one.
    """
    if len(template) > MAX_TEMPLATE:
        raise UserError(f"the chat template has {len(template):,} characters, at most {MAX_TEMPLATE:,}", HINT)
    given = {"template": template, "conversations": list(conversations), "bos": bos, "eos": eos}
    request = json.dumps(given).encode()
    if len(request) > MAX_REQUEST:
        raise UserError(f"the conversations to render take {len(request):,} bytes, at most {MAX_REQUEST:,}", HINT)
    return _checked(*_asked(request, seconds), len(given["conversations"]))


def _asked(request: bytes, seconds: float) -> tuple[bytes, int]:
    """What a child answers to `request`, and its exit code; it is dead then. Raises UserError when its time is up."""
    until = time.monotonic() + seconds
    # A file as stdin: a write to a pipe that nobody reads would wait for ever.
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
    """A file without a name, to be read from its beginning. Raises UserError when there is no room for it."""
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
    """A Python that imports what this one does, without its variables, its site hooks (-S) and traces on disk (-B)."""
    path = json.dumps([str(ROOT), *(str(Path(place).resolve()) for place in sys.path)])
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", START, path, str(math.ceil(seconds))],
        cwd=ROOT, env={name: os.environ[name] for name in KEPT if name in os.environ},
        stdin=question, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _heard(pipe: IO[bytes], until: float) -> bytes:
    """What comes out of a pipe, up to one byte more than an answer may have. Raises TimeoutError at `until`."""
    heard = bytearray()
    while len(heard) <= MAX_ANSWER:
        if not select.select([pipe], [], [], max(0, until - time.monotonic()))[0]:
            raise TimeoutError
        if not (block := os.read(pipe.fileno(), files.CHUNK)):
            return bytes(heard)
        heard += block
    raise UserError(f"the chat template is refused: its prompts have more than {MAX_TEXT:,} characters", HINT)


def _killed(process: subprocess.Popen) -> None:
    """Dead, with all that it may have started, whether or not it had ended by itself."""
    kill_with_children(process)
    process.stdout.close()


def _checked(answer: bytes, code: int, wanted: int) -> list[str]:
    """The texts in an answer. The child is believed no more than its template: its answer may be anything."""
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
    """What the child runs: a request on stdin, on stdout a list of texts, or why there is none."""
    _limit(int(sys.argv[2]))
    try:
        answer = _rendered(json.loads(sys.stdin.buffer.read(MAX_REQUEST)))
    except (UserError, ValueError, RecursionError, MemoryError) as error:  # anything else is exit code 1
        answer = chat_format.why(error.__cause__ or error)
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    sys.stdout.buffer.flush()
    os._exit(0)  # nothing of the template's is cleaned up


def _limit(seconds: int) -> None:
    """Less of everything, before a byte is read.

    The processor's time is for a child whose parent was killed, and the clock with it. macOS does not hold a process
    to RLIMIT_AS, or does not let it be set: there the clock and the bound on the answer are what is left.
    RLIMIT_NPROC does not hold for root.
    """
    import resource

    limits = {"CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": FILES, "CPU": seconds + 1, "AS": MEMORY}
    for name, most in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _rendered(request: dict) -> list[str]:
    """The prompts of a request. Raises what its template raises."""
    texts, length = [], 0
    for messages, generate in request["conversations"]:
        texts.append(chat_format.render(request["template"], messages, request["bos"], request["eos"], generate))
        length += len(texts[-1])
        if length > MAX_TEXT:
            raise ValueError(f"its prompts have more than {MAX_TEXT:,} characters")
    return texts
