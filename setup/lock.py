"""`make lock`: resolve pyproject.toml again, write setup/locks/*.txt and print the changed pins.

cpu.txt     the cloud side (core + data + train + deploy, because `verify` runs the same llama.cpp as the Mac)
cuda.txt    the same for a machine with an NVIDIA GPU: another torch, CUDA's libraries, triton
data.txt    what `data` needs on a laptop: the same versions, no torch
deploy.txt  the side that runs models: the same versions, from Python 3.10 on, no torch
test.txt    what the tests need beyond cpu.txt
build.txt   what setup/llamacpp.py compiles, and its build tools
nvcc.txt    its further build tools for a GPU: compiler and headers of the CUDA that torch brings
sky.txt     SkyPilot, only for the tests, in an environment of its own

uv resolves for every platform at once, which pip cannot do. The format of the locks depends on the version of uv.
"""

import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from shared import fail, write_atomically

ROOT = Path(__file__).resolve().parent.parent
LOCKS_DIR = ROOT / "setup" / "locks"
PYTHON, PYTHON_DEPLOY = "3.11", "3.10"  # the oldest supported versions; markers cover the newer ones
TORCH_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
HEADER = "# Made by `make lock` from pyproject.toml. Do not edit: change pyproject.toml and run it again.\n"


def read_pip_setting(name: str) -> list[str]:
    """Return a setting of pip from its environment variable, else from its configuration file; uv reads neither."""
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if value is None:
        command = [sys.executable, "-m", "pip", "config", "get", "global." + name]
        value = subprocess.run(command, capture_output=True, text=True).stdout
    return value.split()


def uv_index_arguments() -> list[str]:
    """Return the indexes for uv: pip's find-links and index, and PyTorch's index when it answers.

    uv stops when an index does not answer, whereas pip continues.
    """
    arguments = [word for link in read_pip_setting("find-links") for word in ("--find-links", link)]
    arguments += [word for url in read_pip_setting("index-url")[:1] for word in ("--default-index", url)]
    try:
        urllib.request.urlopen(TORCH_INDEX, timeout=10).close()
    except OSError:
        print("note: PyTorch's index does not answer; torch comes from pip's find-links")
        arguments.append("--no-sources")
    return arguments


def resolve_extras(
    uv: list[str], extras: list[str], constraints: Path | None = None, python: str = PYTHON
) -> list[str]:
    """Return the pinned lines for the core dependencies and the extras. constraints: a file of pins to keep."""
    extra_options = [word for extra in extras for word in ("--extra", extra)]
    return compile_requirements(uv, ["pyproject.toml", *extra_options], constraints, python)


def compile_requirements(uv: list[str], inputs: list[str], constraints: Path | None, python: str = PYTHON) -> list[str]:
    """Run `uv`, which is `uv pip compile`, and return the pinned lines for all platforms. Exit when it fails."""
    options = f"--universal --python-version {python} --no-header --no-annotate --quiet".split()
    command = [*uv, *inputs, *options, *(["-c", str(constraints)] if constraints else [])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        fail(f"pyproject.toml cannot be resolved\n{result.stderr.rstrip()}", "change the pin it names, then make lock")
    return [line for line in result.stdout.splitlines() if "'never'" not in line]


def limit_to_python(version: str, lines: list[str]) -> list[str]:
    """Limit pins to this Python and newer ones, because on an older one a package may need an older version."""
    parts = (line.partition(" ; ") for line in lines)
    condition = f"python_full_version >= '{version}'"
    return [f"{pin} ; {condition} and ({marker})" if marker else f"{pin} ; {condition}" for pin, _, marker in parts]


def parse_pins(lines: list[str]) -> dict[str, str]:
    """Return the version of each pinned line, such as {'numpy ; marker': '2.4.6'}."""
    matches = (re.fullmatch(r"([^=#\s]+)={2,3}(\S+)(.*)", line) for line in lines)
    return {match[1] + match[3]: match[2] for match in matches if match}


def write_lock(name: str, lines: list[str]) -> list[str]:
    """Write one lock; return a line `name old -> new` for each changed pin."""
    path = LOCKS_DIR / name
    old_pins, new_pins = parse_pins(path.read_text().splitlines() if path.exists() else []), parse_pins(lines)
    LOCKS_DIR.mkdir(exist_ok=True)
    write_atomically(path, HEADER + "\n".join(lines) + "\n")
    changed = [key for key in sorted(old_pins | new_pins) if old_pins.get(key) != new_pins.get(key)]
    return [f"{key} {old_pins.get(key, 'none')} -> {new_pins.get(key, 'none')}" for key in changed]


def resolve_locks(uv: list[str], folder: Path) -> dict[str, list[str]]:
    """Resolve all locks and return their lines by name.

    A package has the same version in all locks, except for torch, which has two builds.
    """
    constraints, overrides = folder / "constraints.txt", folder / "overrides.txt"
    overrides.write_text("triton ; sys_platform == 'never'\n")
    uv_without_triton = [*uv, "--override", str(overrides)]
    cpu = resolve_extras(uv_without_triton, ["data", "train", "cpu", "deploy"])
    constraints.write_text("\n".join(cpu) + "\n")
    test = [
        line
        for line in resolve_extras(uv_without_triton, ["data", "train", "cpu", "deploy", "test"], constraints)
        if line not in cpu
    ]
    data = resolve_extras(uv_without_triton, ["data"], constraints)
    constraints.write_text("\n".join(line for line in cpu if not line.startswith("torch==")) + "\n")
    cuda = resolve_extras(uv, ["data", "train", "cuda", "deploy"], constraints)
    constraints.write_text("\n".join(limit_to_python(PYTHON, cpu)) + "\n")
    deploy = resolve_extras(uv_without_triton, ["deploy"], constraints, PYTHON_DEPLOY)
    build = compile_requirements(uv, ["--group", "build"], None, PYTHON_DEPLOY)
    constraints.write_text("\n".join(limit_to_python(PYTHON, cuda)) + "\n")
    nvcc = compile_requirements(uv, ["--group", "nvcc"], constraints, PYTHON_DEPLOY)
    sky = compile_requirements(uv, ["--group", "sky"], None)
    cuda = [line.replace("torch==", "torch===", 1) if line.startswith("torch==") else line for line in cuda]
    return {
        "cpu": cpu,
        "cuda": cuda,
        "test": test,
        "data": data,
        "deploy": deploy,
        "build": [*llama_cpp_pin(), *build],
        "nvcc": nvcc,
        "sky": sky,
    }


def llama_cpp_pin() -> list[str]:
    """Return the pin of llama-cpp-python, which is in no other lock because its source is compiled."""
    return re.findall(r'^ *"(llama-cpp-python==[\w.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def main() -> None:
    """Resolve and write all locks, and print what changed."""
    with tempfile.TemporaryDirectory() as folder:
        uv = [str(Path(sys.executable).with_name("uv")), "--cache-dir", f"{folder}/cache", "pip", "compile"]
        locks = resolve_locks([*uv, *uv_index_arguments()], Path(folder))
    changes = [change for name, lines in locks.items() for change in write_lock(f"{name}.txt", lines)]
    print("\n".join(changes) or "no change")


if __name__ == "__main__":
    main()
