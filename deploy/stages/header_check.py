"""Check before a large download that this machine's llama.cpp can load the file. Only the header is needed.

llama.cpp itself is asked: it loads a sparse file of the right size, which holds the header alone and takes no disk,
without allocating weights. It runs in a child process, because it aborts its process over a header that it does not
expect.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import gguf_reader, hub
from common.errors import UserError, shown
from contract import model_header
from contract.manifest import Artifact

ROOT = Path(__file__).resolve().parents[2]
LARGE = 256 << 20  # bytes: a smaller file is downloaded as fast as its header is read
FIRST = 1 << 20  # bytes: a vocabulary of 32,000 tokens takes 0.7 MB
PATIENCE = 60  # seconds; a vocabulary of 262,144 tokens takes 1.7 s on two busy cores, 0.5 s of it to start Python
# The variables that the child inherits: library paths, without which some Pythons do not start.
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# Its further variables: llama.cpp starts no debugger when it aborts, and no GPU is initialized.
SET = {"GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": ""}
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from deploy.stages import header_check; header_check.child()"
)
ERROR = 4  # enum ggml_log_level
WHY = "error loading model: "
NEW = "update Ferry: `git pull && make deploy-env` (another QUANT of the repo has the same)"
STRANGE = "do not use this repo: its publisher has to mend it"
# What llama.cpp says about a model that is too new for it, and how Ferry puts it.
NEWER = {
    r"unknown model architecture: '([^']*)'": "the architecture {} is",
    r"unknown pre-tokenizer type: '([^']*)'": "the pre-tokenizer {} is",
    r"unknown tokenizer: '([^']*)'": "the tokenizer {} is",
}


def probe(found, artifact: Artifact) -> None:
    """Raise UserError when this machine's llama.cpp cannot load a large artifact of a source.

    Only the header is downloaded. source: one of contract/published_model.py.
    """
    if artifact.bytes >= LARGE:
        check(header(found, artifact)[0], artifact.bytes, artifact.file)


def check(header_bytes: bytes, size: int, name: str) -> None:
    """Raise UserError when the llama.cpp of this environment cannot load a file of `size` bytes with this header.

    Where no llama.cpp is installed, nothing is refused.
    """
    if not importlib.util.find_spec("llama_cpp"):
        return
    with sparse(header_bytes, size) as path:
        # Checked in Python first, so that llama.cpp's C++ parser does not see an impossible header.
        model_header.refuse_impossible(gguf_reader.read(path, name), name)
        said = _asked(path, name)
    if said:
        raise _refusal(said, name)


def header(found, artifact: Artifact) -> tuple[bytes, gguf_reader.Header]:
    """Return the first bytes of an artifact, its header and little more, and the header itself. Raises UserError."""

    def read() -> tuple[bytes, gguf_reader.Header]:
        with found.opened(artifact, 0) as (_, blocks):
            return _begun(blocks, artifact)

    return hub.patiently(f"pull {artifact.file}", read)


@contextlib.contextmanager
def sparse(head: bytes, size: int) -> Iterator[Path]:
    """Create a temporary file of `size` bytes that begins with `header_bytes`; the rest are zeros that take no disk."""
    with tempfile.NamedTemporaryFile(prefix="ferry-", suffix=".gguf") as file:
        try:
            file.write(head[:size])
            file.truncate(size)
        except (OSError, OverflowError) as error:
            why = f"{tempfile.gettempdir()} can hold no file of {size} bytes: {error}"
            raise UserError(why, "free some disk there, or set TMPDIR to another folder") from error
        yield Path(file.name)


def _begun(blocks: Iterator[bytes], artifact: Artifact) -> tuple[bytes, gguf_reader.Header]:
    """Read blocks until they hold a whole header. (If it is cut off, the next name in it is empty: an error.)"""
    head, enough, most = bytearray(), FIRST, min(artifact.bytes, gguf_reader.MAX_HEADER)
    while True:
        while len(head) < min(enough, most) and (block := next(blocks, b"")):
            head += block
        try:
            with sparse(head, artifact.bytes) as path:
                return bytes(head), gguf_reader.read(path, artifact.file)
        except UserError:
            if len(head) < enough or len(head) >= most:
                raise
        enough *= 2


def _refusal(said: list[str], name: str) -> UserError:
    """Return the error for a file that llama.cpp does not load, from what llama.cpp said."""
    version = importlib.metadata.version("llama_cpp_python")
    for words, what in NEWER.items():
        if match := re.search(words, " ".join(said)):
            known = what.format(shown(match[1], 60))
            return UserError(f"{name}: {known} not known to llama-cpp-python {version}", NEW)
    why = next((line for line in said if WHY in line), said[-1]).rpartition(WHY)[2]
    return UserError(f"{name}: llama-cpp-python {version} cannot load it: {shown(why)}", NEW)


def _asked(path: Path, name: str) -> list[str]:
    """Load the file with llama.cpp in a child process and return llama.cpp's errors.

    Raises UserError when the child crashes, hangs or does not start.
    """
    places = json.dumps([str(ROOT), *(str(Path(place).resolve()) for place in sys.path)])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", "-c", START, places, str(path)],
            cwd=ROOT,
            timeout=PATIENCE,
            env={name: os.environ[name] for name in KEPT if name in os.environ} | SET,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"llama.cpp takes more than {PATIENCE} s over the header of {name}", STRANGE) from None
    if done.returncode < 0:
        raise UserError(f"llama.cpp breaks off over the header of {name} (signal {-done.returncode})", STRANGE)
    if done.returncode:
        raise UserError("llama-cpp-python does not start here", "make its environment again: `make deploy-env`")
    return [str(line) for line in json.loads(done.stdout)]


def child() -> None:
    """Load the file of the second argument and print llama.cpp's errors as JSON. The child process runs this."""
    _limit()
    import ctypes

    import llama_cpp

    said = []

    @llama_cpp.llama_log_callback
    def hear(level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            said.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(hear, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, 0, 0  # no memory, no mapping, no GPU
    model = llama_cpp.llama_model_load_from_file(sys.argv[2].encode(), params)
    sys.stdout.write(json.dumps([] if model else said or ["no reason is given"]))
    sys.stdout.flush()
    os._exit(0)


def _limit() -> None:
    """Forbid this process to write files or a core dump, and limit its CPU time in case the parent dies."""
    import resource

    for name, most in {"CORE": 0, "FSIZE": 0, "CPU": PATIENCE}.items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
