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
from common.errors import UserError, printable_line
from contract import model_header
from contract.manifest import Artifact
from contract.published_model import ModelSource

ROOT = Path(__file__).resolve().parents[2]
PROBE_FROM_BYTES = 256 << 20  # bytes: a smaller file is downloaded as fast as its header is read
FIRST_READ_BYTES = 1 << 20  # bytes: a vocabulary of 32,000 tokens takes 0.7 MB
LOAD_TIMEOUT = 60  # seconds; a vocabulary of 262,144 tokens takes 1.7 s on two busy cores, 0.5 s of it to start Python
# The variables that the child inherits: library paths, without which some Pythons do not start.
INHERITED_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# Its further variables: llama.cpp starts no debugger when it aborts, and no GPU is initialized.
FIXED_VARIABLES = {"GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": ""}
CHILD_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from deploy.stages import header_check; header_check.print_load_errors()"
)
ERROR_LEVEL = 4  # enum ggml_log_level
ERROR_PREFIX = "error loading model: "
UPDATE_HINT = "update Ferry: `git pull && make deploy-env` (a different QUANT of the repo has the same fault)"
BAD_FILE_HINT = "do not use this repo: its publisher has to fix it"
# What llama.cpp says about a model that is too new for it, and what it does not support then.
UNSUPPORTED_PATTERNS = {
    r"unknown model architecture: '([^']*)'": "architecture",
    r"unknown pre-tokenizer type: '([^']*)'": "pre-tokenizer",
    r"unknown tokenizer: '([^']*)'": "tokenizer",
}


def refuse_unloadable_artifact(source: ModelSource, artifact: Artifact) -> None:
    """Raise UserError when this machine's llama.cpp cannot load a large artifact of a source.

    Only the header is downloaded.
    """
    if artifact.bytes >= PROBE_FROM_BYTES:
        refuse_unloadable_header(read_header(source, artifact)[0], artifact.bytes, artifact.file)


def refuse_unloadable_header(header_bytes: bytes, size: int, name: str) -> None:
    """Raise UserError when the llama.cpp of this environment cannot load a file of `size` bytes with this header.

    Where no llama.cpp is installed, nothing is refused.
    """
    if not importlib.util.find_spec("llama_cpp"):
        return
    with create_sparse_file(header_bytes, size) as path:
        # Checked in Python first, so that llama.cpp's C++ parser does not see an impossible header.
        model_header.refuse_impossible_header(gguf_reader.read_header(path, name), name)
        load_errors = _list_load_errors(path, name)
    if load_errors:
        raise _load_error(load_errors, name)


def read_header(source: ModelSource, artifact: Artifact) -> tuple[bytes, gguf_reader.Header]:
    """Return the first bytes of an artifact, its header and little more, and the header itself. Raise UserError."""

    def read_start() -> tuple[bytes, gguf_reader.Header]:
        with source.open_blocks(artifact, 0) as (_, blocks):
            return _read_until_header(blocks, artifact)

    return hub.retry(f"pull {artifact.file}", read_start)


@contextlib.contextmanager
def create_sparse_file(header_bytes: bytes | bytearray, size: int) -> Iterator[Path]:
    """Create a temporary file of `size` bytes that begins with `header_bytes`; the rest are zeros that take no disk."""
    with tempfile.NamedTemporaryFile(prefix="ferry-", suffix=".gguf") as file:
        try:
            file.write(header_bytes[:size])
            file.truncate(size)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot create a file of {size} bytes in {tempfile.gettempdir()}: {error}",
                "free disk space there, or set TMPDIR to a different folder",
                code="disk.no_temporary_file",
            ) from error
        yield Path(file.name)


def _read_until_header(blocks: Iterator[bytes], artifact: Artifact) -> tuple[bytes, gguf_reader.Header]:
    """Read blocks until they hold a complete header: if it is cut off, the next name in it is empty, an error."""
    header_bytes, target_bytes = bytearray(), FIRST_READ_BYTES
    max_bytes = min(artifact.bytes, gguf_reader.MAX_HEADER_BYTES)
    while True:
        while len(header_bytes) < min(target_bytes, max_bytes) and (block := next(blocks, b"")):
            header_bytes += block
        try:
            with create_sparse_file(header_bytes, artifact.bytes) as path:
                return bytes(header_bytes), gguf_reader.read_header(path, artifact.file)
        except UserError:
            if len(header_bytes) < target_bytes or len(header_bytes) >= max_bytes:
                raise
        target_bytes *= 2


def _load_error(load_errors: list[str], name: str) -> UserError:
    """Return the error for a file that llama.cpp does not load, from what llama.cpp said."""
    version = importlib.metadata.version("llama_cpp_python")
    for pattern, part in UNSUPPORTED_PATTERNS.items():
        if match := re.search(pattern, " ".join(load_errors)):
            return UserError(
                f"{name}: llama-cpp-python {version} does not support the {part} {printable_line(match[1], 60)}",
                UPDATE_HINT,
                code="gguf.unsupported_model",
            )
    reason = next((line for line in load_errors if ERROR_PREFIX in line), load_errors[-1]).rpartition(ERROR_PREFIX)[2]
    return UserError(
        f"{name}: llama-cpp-python {version} cannot load it: {printable_line(reason)}",
        UPDATE_HINT,
        code="gguf.not_loadable",
    )


def _list_load_errors(path: Path, name: str) -> list[str]:
    """Load the file with llama.cpp in a child process and return llama.cpp's errors.

    Raise UserError when the child crashes, hangs or does not start.
    """
    import_paths = json.dumps([str(ROOT), *(str(Path(import_path).resolve()) for import_path in sys.path)])
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-B", "-c", CHILD_CODE, import_paths, str(path)],
            cwd=ROOT,
            timeout=LOAD_TIMEOUT,
            env={name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ} | FIXED_VARIABLES,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"llama.cpp takes more than {LOAD_TIMEOUT} s to read the header of {name}",
            BAD_FILE_HINT,
            code="gguf.load_timeout",
        ) from None
    if result.returncode < 0:
        raise UserError(
            f"llama.cpp crashes on the header of {name} (signal {-result.returncode})",
            BAD_FILE_HINT,
            code="gguf.load_crashed",
        )
    if result.returncode:
        raise UserError(
            f"llama-cpp-python does not start in this environment (exit code {result.returncode})",
            "set the environment up again: `make deploy-env`",
            code="environment.llama_cpp_broken",
        )
    return [str(line) for line in json.loads(result.stdout)]


def print_load_errors() -> None:
    """Load the file of the second argument and print llama.cpp's errors as JSON. The child process runs this."""
    _limit_resources()
    import ctypes

    import llama_cpp

    load_errors = []

    @llama_cpp.llama_log_callback
    def collect_error(level: int, text: bytes, _: object) -> None:
        if level == ERROR_LEVEL:
            load_errors.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(collect_error, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, 0, 0  # no memory, no mapping, no GPU
    model = llama_cpp.llama_model_load_from_file(sys.argv[2].encode(), params)
    sys.stdout.write(json.dumps([] if model else load_errors or ["no reason given"]))
    sys.stdout.flush()
    os._exit(0)


def _limit_resources() -> None:
    """Forbid this process to write files or a core dump, and limit its CPU time in case the parent dies."""
    import resource

    for name, limit in {"CORE": 0, "FSIZE": 0, "CPU": LOAD_TIMEOUT}.items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
