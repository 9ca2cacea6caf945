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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from common import files
from common.child_process import kill_with_children, require_pipe
from common.errors import UserError, printable_line
from contract import chat_format
from contract.chat_format import ChatMessage

ROOT = Path(__file__).resolve().parent.parent
MAX_TEMPLATE_CHARS = 1 << 20  # that of limits.py, whose import would take the child longer than the rendering
MAX_REQUEST_BYTES = 64 << 20  # of JSON
MAX_PROMPT_CHARS = 4 << 20  # of all prompts together
MAX_ANSWER_BYTES = 6 * MAX_PROMPT_CHARS + 4096  # of JSON, in which a character takes at most six bytes, as in \u0000
MAX_MEMORY_BYTES = 1 << 30  # of address space; a normal child uses 90 MB, of which 21 MB are resident
MAX_OPEN_FILES = 64  # imports open one at a time
# Environment variables that the child keeps. TZ: a template may print today's date. Library paths: some Pythons do not
# start without them.
KEPT_VARIABLES = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
TEMPLATE_HINT = "do not use this repo: Ferry does not publish such a template"
CHILD_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from contract import template_sandbox; template_sandbox.answer_parent()"
)


def render_prompts(
    template: str, conversations: Sequence[tuple[Sequence[ChatMessage], bool]], bos: str, eos: str, seconds: float = 10
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
    if len(template) > MAX_TEMPLATE_CHARS:
        raise UserError(
            f"the chat template has {len(template):,} characters, the limit is {MAX_TEMPLATE_CHARS:,}",
            TEMPLATE_HINT,
            code="template.too_long",
        )
    fields = {"template": template, "conversations": list(conversations), "bos": bos, "eos": eos}
    return _parse_answer(*_run_child(_encode_request(fields), seconds), len(conversations))


def _encode_request(fields: Mapping[str, object]) -> bytes:
    request = json.dumps(fields).encode()
    if len(request) > MAX_REQUEST_BYTES:
        raise UserError(
            f"the conversations to render have {len(request):,} bytes, the limit is {MAX_REQUEST_BYTES:,}",
            TEMPLATE_HINT,
            code="template.conversations_too_long",
        )
    return request


def _run_child(request: bytes, seconds: float) -> tuple[bytes, int]:
    """Run a child for `request`; return its answer and its exit code. Raise UserError when the time is over."""
    deadline = time.monotonic() + seconds
    # stdin is a file, because a write to a pipe that is not read would block for ever.
    with _write_temporary_file(request) as request_file:
        process = _start_child(request_file, seconds)
        try:
            answer = _read_answer(require_pipe(process.stdout), deadline)
            return answer, process.wait(max(0, deadline - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise UserError(
                f"the chat template took more than {seconds:g} s", TEMPLATE_HINT, code="template.timeout"
            ) from None
        finally:
            _kill_child(process)


def _write_temporary_file(content: bytes) -> IO[bytes]:
    """Return an open temporary file with `content`, at its beginning. Raise UserError when it cannot be written."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
        file.write(content)
        file.seek(0)
    except OSError as error:
        raise UserError(
            f"cannot write a temporary file: {error.strerror}",
            "free disk space in /tmp, or set TMPDIR to a different folder",
            code="disk.no_temporary_file",
        ) from error
    return file


def _start_child(request_file: IO[bytes], seconds: float) -> subprocess.Popen[bytes]:
    """Start a Python with the same import paths, without this one's environment, site hooks (-S) or .pyc files (-B)."""
    import_paths = json.dumps([str(ROOT), *(str(Path(folder).resolve()) for folder in sys.path)])
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", CHILD_CODE, import_paths, str(math.ceil(seconds))],
        cwd=ROOT,
        env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
        stdin=request_file,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _read_answer(pipe: IO[bytes], deadline: float) -> bytes:
    """Return all bytes from a pipe. Raise TimeoutError at the deadline, and UserError when the answer is too long."""
    answer = bytearray()
    while len(answer) <= MAX_ANSWER_BYTES:
        if not (block := _read_block(pipe, deadline)):
            return bytes(answer)
        answer += block
    raise UserError(
        f"the chat template is refused: its prompts have more than {MAX_PROMPT_CHARS:,} characters",
        TEMPLATE_HINT,
        code="template.refused",
    )


def _read_block(pipe: IO[bytes], deadline: float) -> bytes:
    """Return what can be read; nothing at the end. Raise TimeoutError at the deadline, a time of time.monotonic()."""
    if not select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
        raise TimeoutError
    return os.read(pipe.fileno(), files.CHUNK_BYTES)


def _kill_child(process: subprocess.Popen[bytes]) -> None:
    """Kill the child with all that it may have started, whether or not it has ended by itself."""
    kill_with_children(process)
    require_pipe(process.stdout).close()


def _parse_answer(answer: bytes, exit_code: int, count: int) -> list[str]:
    """Return the texts in an answer. Raise UserError for the child's own message, or when the answer is anything else.

    The child is trusted no more than its template, so its answer may be anything.
    """
    try:
        value = json.loads(answer.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, str):
        raise UserError(
            f"the chat template is refused: {printable_line(value, 300)}", TEMPLATE_HINT, code="template.refused"
        )
    if not isinstance(value, list) or len(value) != count or not all(isinstance(text, str) for text in value):
        raise UserError(
            f"the chat template ended the process that renders it (exit code {exit_code})",
            TEMPLATE_HINT,
            code="template.process_failed",
        )
    return value


def answer_parent() -> None:
    """Run the child: read a request from stdin, write a list of texts, or a message about a failure, to stdout."""
    _limit_resources(int(sys.argv[2]))
    answer = _answer_request(sys.stdin.buffer.read(MAX_REQUEST_BYTES))
    sys.stdout.buffer.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    sys.stdout.buffer.flush()
    os._exit(0)  # run no clean-up code of the template


def _answer_request(request: bytes) -> list[str] | str:
    try:
        return _render_request(json.loads(request))
    except (UserError, ValueError, RecursionError, MemoryError) as error:  # anything else is exit code 1
        return chat_format.describe_template_error(error.__cause__ or error)


def _limit_resources(seconds: int) -> None:
    """Lower the resource limits of this process, before it reads a byte of the request.

    CPU time is limited in case the parent, which watches the wall-clock time, was killed. macOS ignores RLIMIT_AS or
    does not let it be set: there only the time limit and the limit on the answer remain. RLIMIT_NPROC has no effect for
    root.
    """
    import resource

    limits = {"CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": MAX_OPEN_FILES, "CPU": seconds + 1, "AS": MAX_MEMORY_BYTES}
    for name, limit in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _render_request(request: dict[str, Any]) -> list[str]:
    """Return the prompts. Raise what the template raises, and ValueError for more than MAX_PROMPT_CHARS together."""
    texts: list[str] = []
    length = 0
    for messages, add_generation_prompt in request["conversations"]:
        texts.append(
            chat_format.render(request["template"], messages, request["bos"], request["eos"], add_generation_prompt)
        )
        length += len(texts[-1])
        if length > MAX_PROMPT_CHARS:
            raise ValueError(f"its prompts have more than {MAX_PROMPT_CHARS:,} characters")
    return texts
