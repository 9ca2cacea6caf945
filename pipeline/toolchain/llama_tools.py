"""The pinned llama.cpp that `make env` built: its converter, quantizer and other tools, and what they support."""

import functools
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import console, files
from common.errors import UserError

# Bits per weight from llama.cpp's own table for 8B models: good enough for a progress bar and a disk estimate.
BITS_PER_WEIGHT = {
    "f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.6, "q5_0": 5.6, "q4_k_m": 4.9,
    "q4_k_s": 4.7, "q4_0": 4.7, "iq4_nl": 4.7, "iq4_xs": 4.5, "q3_k_l": 4.3, "q3_k_m": 4.0, "q3_k_s": 3.7,
    "iq3_xxs": 3.3, "q2_k": 3.2, "iq2_xs": 2.6, "iq2_xxs": 2.4,
}  # fmt: skip
STATIC_SUFFIX = "-static"  # marks a quantization without the importance matrix, made to compare; the usual word for it
CHUNK_TOKENS = 512  # tokens of an imatrix chunk: llama-imatrix's own default
CHUNK_DONE_LINE = b"save_imatrix: saving"  # what llama-imatrix logs after each chunk

Command = list[str | int | Path]
"""The program of a tool and its arguments."""


def tools_folder() -> Path:
    """Return the folder where `make env` links llama.cpp into the environment."""
    return Path(os.environ.get("FERRY_LLAMA_CPP") or Path(sys.prefix) / "llama.cpp")


def is_set_up() -> bool:
    """Return whether llama.cpp is set up in this environment."""
    return (tools_folder() / "build.json").is_file()


def require_folder() -> Path:
    """Return the folder of llama.cpp. Raise UserError when it is not set up."""
    if not is_set_up():
        raise UserError(f"llama.cpp is not set up ({tools_folder()})", "run `make env`", code="llama_cpp.not_set_up")
    return tools_folder()


def describe_version() -> str:
    """Return the version as text, such as 'llama.cpp 0c1e57098 of llama-cpp-python 0.3.36'."""
    build = files.read_json(require_folder() / "build.json")
    return f"llama.cpp {build['commit'][:9]} of llama-cpp-python {build['version']}"


def tool_environment() -> dict[str, str]:
    """Return the environment variables for the tools: with a GPU they load the CUDA libraries that torch installed."""
    cuda_folder = Path(sysconfig.get_path("platlib")) / "nvidia" / "cu13" / "lib"
    if not cuda_folder.is_dir():
        return dict(os.environ)
    library_path = os.environ.get("LD_LIBRARY_PATH")  # on some machines only this finds the driver's library
    return os.environ | {"LD_LIBRARY_PATH": f"{cuda_folder}:{library_path}" if library_path else str(cuda_folder)}


@functools.cache
def list_architectures() -> frozenset[str]:
    """Return every `architectures` name of a config.json that the converter registers for text models."""
    register_pattern = re.compile(r"@ModelBase\.register\(([^)]*)\)")
    names: set[str] = set()
    for source in (require_folder() / "convert" / "conversion").glob("*.py"):
        for arguments in register_pattern.findall(source.read_text(encoding="utf-8")):
            names.update(re.findall(r"\"([^\"]+)\"", arguments))
    return frozenset(names)


def convert_to_gguf(model: Path, target: Path, gguf_type: str, metadata: Path, key_values: Path, log: Path) -> None:
    """Convert a folder in Transformers layout to a GGUF.

    Args:
        model: The folder.
        target: The GGUF to write.
        gguf_type: f16 or bf16.
        metadata: A JSON file with general.* values for the converter.
        key_values: A JSON file with further string key-values.
        log: The file that gets the converter's output.
    """
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    script = Path(__file__).parents[1] / "export" / "convert.py"
    command: Command = [sys.executable, script, require_folder() / "convert", key_values, model]
    command += ["--outtype", gguf_type, "--metadata", metadata, "--outfile", target]
    _run_tool(command, log, _file_progress(target, size, "16-bit GGUF"))


def quantize_gguf(source: Path, target: Path, quantization: str, log: Path, imatrix: Path | None = None) -> None:
    """Quantize a 16-bit GGUF to a type such as q4_k_m, by an importance matrix if there is one."""
    size = int(source.stat().st_size * BITS_PER_WEIGHT[quantization] / BITS_PER_WEIGHT["f16"])
    # Only the name of the importance matrix is passed, because llama-quantize writes the path into the GGUF.
    command: Command = [require_folder() / "bin" / "llama-quantize", *(["--imatrix", imatrix.name] if imatrix else [])]
    command += [source.absolute(), target.absolute(), quantization.upper()]
    _run_tool(command, log, _file_progress(target, size, quantization), imatrix.parent if imatrix else None)


def quantize_once(source: Path, name: str, imatrix: Path | None, folder: Path) -> Path:
    """Write <run>.<name>.gguf (name: q4_k_m, q4_k_m-static) from <run>.f16.gguf unless it exists; return its path."""
    target, quantization = folder / f"{source.name.rsplit('.', 2)[0]}.{name}.gguf", name.removesuffix(STATIC_SUFFIX)
    return files.write_if_missing(
        target, lambda temporary: quantize_gguf(source, temporary, quantization, folder / "quantize.log", imatrix)
    )


def compute_imatrix(model: Path, text: Path, target: Path, token_count: int, log: Path) -> None:
    """Compute the importance matrix of a GGUF over the first `token_count` tokens of rendered text.

    Special tokens in the text are parsed as such. The tool runs in the folder of the text and writes only the text's
    name into the matrix, so a run may be anywhere.
    """
    chunks = token_count // CHUNK_TOKENS
    command: Command = [require_folder() / "bin" / "llama-imatrix", "-m", model.absolute(), "-f", text.name]
    command += ["-o", target.absolute(), "--parse-special", "--no-ppl", "-c", CHUNK_TOKENS, "--chunks", chunks]
    command += ["--output-frequency", "1", "-ngl", "99"]
    _run_tool(command, log, _chunk_progress(log, chunks), text.parent)


def render_prompts(model: Path, conversations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Render conversations as llama.cpp's server does, with its own Jinja and the template inside the GGUF.

    Args:
        model: The GGUF.
        conversations: {messages, add_generation_prompt} each.

    Returns:
        {prompt, ids} or {error} of each conversation; ids as the server feeds them, BOS included.

    Raises:
        UserError: The tool fails.
    """
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in conversations)
    command = [str(require_folder() / "bin" / "llama-render"), str(model)]
    result = subprocess.run(
        command, input=lines, capture_output=True, text=True, encoding="utf-8", env=tool_environment()
    )
    if result.returncode:
        raise UserError(
            f"llama.cpp cannot render a prompt with {model}: {result.stderr.strip()[-300:]}",
            "export the GGUF again",
            code="llama_cpp.render_failed",
        )
    return [json.loads(line) for line in result.stdout.splitlines()]


def measure_perplexity(model: Path, text: Path, context: int, log: Path) -> float:
    """Return the perplexity of a plain text from llama-perplexity. It is only used to check Ferry's own method."""
    tool, progress = require_folder() / "bin" / "llama-perplexity", ToolProgress(0, "perplexity", "", lambda: 0)
    _run_tool([tool, "-m", model, "-f", text, "-c", context, "-ngl", "99"], log, progress)
    return float(re.findall(r"Final estimate: PPL = ([\d.]+)", log.read_text(encoding="utf-8", errors="replace"))[-1])


@dataclass(frozen=True)
class ToolProgress:
    """The progress of a tool: `count_done` is called regularly and returns how much of `total` is done."""

    total: float
    label: str
    unit: str
    count_done: Callable[[], float]


def _file_progress(target: Path, size: int, label: str) -> ToolProgress:
    """Return the progress of a tool that writes a file of about `size` bytes."""
    return ToolProgress(size, label, "B", lambda: min(target.stat().st_size, size) if target.exists() else 0)


def _chunk_progress(log: Path, chunks: int) -> ToolProgress:
    """Return the progress of llama-imatrix, which logs a line for each chunk of tokens."""
    earlier_chunks = log.read_bytes().count(CHUNK_DONE_LINE) if log.is_file() else 0
    return ToolProgress(
        chunks, "importance matrix", "chunks", lambda: log.read_bytes().count(CHUNK_DONE_LINE) - earlier_chunks
    )


def _run_tool(command: Command, log: Path, progress: ToolProgress, folder: Path | None = None) -> None:
    """Run a tool in `folder`, append its output to `log`, and show its progress. Raise UserError when it fails."""
    with log.open("ab") as log_file, console.show_progress(progress.total, progress.label, progress.unit) as advance:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=log_file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=tool_environment(),
        )
        try:
            _report_progress(process, progress, advance)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        raise _tool_error(command, log)


def _report_progress(process: subprocess.Popen, progress: ToolProgress, advance: Callable[[float], None]) -> None:
    """Call `advance` with the progress of a tool until it ends."""
    reported = 0.0
    while process.poll() is None:
        time.sleep(0.1)
        current = progress.count_done()
        advance(current - reported)
        reported = current


def _tool_error(command: Command, log: Path) -> UserError:
    """Return the error of a tool that failed, with the last line of its output."""
    last_line = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    program = Path(str(command[1] if command[0] == sys.executable else command[0])).name
    hint = f"read {log}, then run the same command again"
    return UserError(f"{program} failed: {''.join(last_line)}", hint, code="llama_cpp.tool_failed")
