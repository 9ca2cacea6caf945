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

from shared import fail, write_whole

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "setup" / "locks"
PYTHON, PYTHON_DEPLOY = "3.11", "3.10"  # the oldest supported versions; markers cover the newer ones
TORCH_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
HEADER = "# Made by `make lock` from pyproject.toml. Do not edit: change pyproject.toml and run it again.\n"


def pip_setting(name: str) -> list[str]:
    """Return a setting of pip from its environment variable, else from its configuration file. (uv reads neither.)"""
    said = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if said is None:
        ask = [sys.executable, "-m", "pip", "config", "get", "global." + name]
        said = subprocess.run(ask, capture_output=True, text=True).stdout
    return said.split()


def uv_arguments() -> list[str]:
    """Return the indexes for uv: pip's find-links and index, and PyTorch's index when it answers.

    uv stops when an index does not answer, whereas pip continues.
    """
    arguments = [word for link in pip_setting("find-links") for word in ("--find-links", link)]
    arguments += [word for url in pip_setting("index-url")[:1] for word in ("--default-index", url)]
    try:
        urllib.request.urlopen(TORCH_INDEX, timeout=10).close()
    except OSError:
        print("note: PyTorch's index does not answer; torch comes from pip's find-links")
        arguments.append("--no-sources")
    return arguments


def resolve(uv: list[str], extras: list[str], held: Path | None = None, python: str = PYTHON) -> list[str]:
    """Return the pinned lines for the core dependencies and the extras.

    Args:
        uv: The command `uv pip compile` with its options.
        constraints: A file of pins to keep.
    """
    return compiled(uv, ["pyproject.toml", *(word for extra in extras for word in ("--extra", extra))], held, python)


def compiled(uv: list[str], what: list[str], held: Path | None, python: str = PYTHON) -> list[str]:
    """Run `uv pip compile` and return the pinned lines for all platforms. Exit when it fails."""
    fixed = f"--universal --python-version {python} --no-header --no-annotate --quiet".split()
    command = [*uv, *what, *fixed, *(["-c", str(held)] if held else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        fail(f"pyproject.toml cannot be resolved\n{done.stderr.rstrip()}", "change the pin it names, then make lock")
    return [line for line in done.stdout.splitlines() if "'never'" not in line]


def from_python(version: str, lines: list[str]) -> list[str]:
    """Limit pins to this Python and newer ones, because on an older one a package may need an older version."""
    marked = (line.partition(" ; ") for line in lines)
    asked = f"python_full_version >= '{version}'"
    return [f"{pin} ; {asked} and ({marker})" if marker else f"{pin} ; {asked}" for pin, _, marker in marked]


def pins(lines: list[str]) -> dict[str, str]:
    """Return the version of each pinned line, such as {'numpy ; marker': '2.4.6'}."""
    found = (re.fullmatch(r"([^=#\s]+)={2,3}(\S+)(.*)", line) for line in lines)
    return {m[1] + m[3]: m[2] for m in found if m}


def write(name: str, lines: list[str]) -> list[str]:
    """Write one lock; return a line `name old -> new` for each changed pin."""
    path = LOCKS / name
    old, new = pins(path.read_text().splitlines() if path.exists() else []), pins(lines)
    LOCKS.mkdir(exist_ok=True)
    write_whole(path, HEADER + "\n".join(lines) + "\n")
    return [
        f"{key} {old.get(key, 'none')} -> {new.get(key, 'none')}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]


def locks(uv: list[str], folder: Path) -> dict[str, list[str]]:
    """Resolve all locks and return their lines by name.

    A package has the same version in all locks, except for torch, which has two builds.
    """
    held, no_triton = folder / "held.txt", folder / "overrides.txt"
    no_triton.write_text("triton ; sys_platform == 'never'\n")
    without = [*uv, "--override", str(no_triton)]
    cpu = resolve(without, ["data", "train", "cpu", "deploy"])
    held.write_text("\n".join(cpu) + "\n")
    test = [line for line in resolve(without, ["data", "train", "cpu", "deploy", "test"], held) if line not in cpu]
    data = resolve(without, ["data"], held)
    held.write_text("\n".join(line for line in cpu if not line.startswith("torch==")) + "\n")
    cuda = resolve(uv, ["data", "train", "cuda", "deploy"], held)
    held.write_text("\n".join(from_python(PYTHON, cpu)) + "\n")
    deploy = resolve(without, ["deploy"], held, PYTHON_DEPLOY)
    build = compiled(uv, ["--group", "build"], None, PYTHON_DEPLOY)
    held.write_text("\n".join(from_python(PYTHON, cuda)) + "\n")
    nvcc = compiled(uv, ["--group", "nvcc"], held, PYTHON_DEPLOY)
    sky = compiled(uv, ["--group", "sky"], None)
    cuda = [line.replace("torch==", "torch===", 1) if line.startswith("torch==") else line for line in cuda]
    return {
        "cpu": cpu,
        "cuda": cuda,
        "test": test,
        "data": data,
        "deploy": deploy,
        "build": [*llama(), *build],
        "nvcc": nvcc,
        "sky": sky,
    }


def llama() -> list[str]:
    """Return the pin of llama-cpp-python, which is in no other lock because its source is compiled."""
    return re.findall(r'^ *"(llama-cpp-python==[\w.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def main() -> None:
    """Resolve and write all locks, and print what changed."""
    uv = Path(sys.executable).with_name("uv")
    with tempfile.TemporaryDirectory() as folder:
        made = locks([str(uv), "--cache-dir", f"{folder}/cache", "pip", "compile", *uv_arguments()], Path(folder))
    changes = [change for name, lines in made.items() for change in write(f"{name}.txt", lines)]
    print("\n".join(changes) or "no change")


if __name__ == "__main__":
    main()
