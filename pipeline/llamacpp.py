"""The pinned llama.cpp that `make env` built: converter, quantizer, and what they know."""

import functools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from contract import files
from contract.errors import UserError

# Bits a weight, measured by llama.cpp on 8B models: good enough for a progress bar and a disk estimate.
BITS = {"f16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.5, "q4_k_m": 4.9, "q4_k_s": 4.6, "q3_k_m": 3.9}


def folder() -> Path:
    """Where `make env` links it into the environment."""
    return Path(os.environ.get("FERRY_LLAMA_CPP") or Path(sys.prefix) / "llama.cpp")


def there() -> bool:
    return (folder() / "build.json").is_file()


def home() -> Path:
    """Its folder. Raises UserError when it is not there."""
    if not there():
        raise UserError(f"llama.cpp is not set up ({folder()})", "run `make env`")
    return folder()


def version() -> str:
    """Such as 'llama.cpp 0c1e57098 of llama-cpp-python 0.3.36'."""
    build = files.read_json(home() / "build.json")
    return f"llama.cpp {build['commit'][:9]} of llama-cpp-python {build['version']}"


@functools.cache
def architectures() -> frozenset[str]:
    """Every `architectures` name of a config.json that the converter registers for text models."""
    register = re.compile(r"@ModelBase\.register\(([^)]*)\)")
    names: set[str] = set()
    for source in (home() / "convert" / "conversion").glob("*.py"):
        for arguments in register.findall(source.read_text(encoding="utf-8")):
            names.update(re.findall(r"\"([^\"]+)\"", arguments))
    return frozenset(names)


def convert(model: Path, target: Path, log: Path) -> None:
    """A Transformers folder to an f16 GGUF."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    script = home() / "convert" / "convert_hf_to_gguf.py"
    _run([sys.executable, str(script), str(model), "--outtype", "f16", "--outfile", str(target)], target, size, log)


def quantize(source: Path, target: Path, kind: str, log: Path) -> None:
    """An f16 GGUF to `kind`, such as q4_k_m."""
    size = int(source.stat().st_size * BITS[kind] / BITS["f16"])
    _run([str(home() / "bin" / "llama-quantize"), str(source), str(target), kind.upper()], target, size, log)


def _run(command: list[str], target: Path, size: int, log: Path) -> None:
    """Run a tool with its output in `log`; the bar follows the size of the file it writes."""
    with log.open("ab") as out, files.bar(size, target.name.strip(".").removesuffix(".part")) as tick:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        seen = 0
        try:
            while process.poll() is None:
                time.sleep(0.1)
                now = min(target.stat().st_size, size) if target.exists() else 0
                if now > seen:
                    tick(now - seen)
                seen = now
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise UserError(
            f"{Path(command[1] if command[0] == sys.executable else command[0]).name} failed: {''.join(last)}",
            f"read {log}, then run the same command again",
        )
