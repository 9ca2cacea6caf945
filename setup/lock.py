"""`make lock`: resolve pyproject.toml again, write setup/locks/*.txt and print what changed.

cpu.txt     what the cloud side runs on (core + data + train + deploy: `verify` asks the same llama.cpp as the Mac)
cuda.txt    the same on a machine with an NVIDIA GPU: another torch, CUDA's libraries, triton
data.txt    what `data` alone needs, on a laptop: the same versions, no torch
deploy.txt  what the side that runs models needs: the same versions, from Python 3.10 on, no torch
test.txt    what the tests add to cpu.txt
build.txt   what setup/llamacpp.py compiles, and with what
nvcc.txt    what it adds for a GPU: the compiler and headers of the CUDA that torch brings
sky.txt     SkyPilot, for the tests alone, in an environment of its own

uv resolves for every platform at once, which pip cannot; the format of the locks follows its version.
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
PYTHON, PYTHON_DEPLOY = "3.11", "3.10"  # the oldest ones allowed: markers speak of the newer ones
TORCH_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
HEADER = "# Made by `make lock` from pyproject.toml. Do not edit: change pyproject.toml and run it again.\n"


def pip_setting(name: str) -> list[str]:
    """What pip was told (uv reads none of it): its environment variable, else its configuration file."""
    said = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if said is None:
        ask = [sys.executable, "-m", "pip", "config", "get", "global." + name]
        said = subprocess.run(ask, capture_output=True, text=True).stdout
    return said.split()


def uv_arguments() -> list[str]:
    """Where uv looks: pip's find-links and index, and PyTorch's index if it answers (uv gives up where pip goes on)."""
    arguments = [word for link in pip_setting("find-links") for word in ("--find-links", link)]
    arguments += [word for url in pip_setting("index-url")[:1] for word in ("--default-index", url)]
    try:
        urllib.request.urlopen(TORCH_INDEX, timeout=10).close()
    except OSError:
        print("note: PyTorch's index does not answer; torch comes from pip's find-links")
        arguments.append("--no-sources")
    return arguments


def resolve(uv: list[str], extras: list[str], held: Path | None = None, python: str = PYTHON) -> list[str]:
    """The pinned lines for the core dependencies and these extras; versions in `held` stay."""
    return compiled(uv, ["pyproject.toml", *(word for extra in extras for word in ("--extra", extra))], held, python)


def compiled(uv: list[str], what: list[str], held: Path | None, python: str = PYTHON) -> list[str]:
    """Pinned lines for every platform at once."""
    fixed = f"--universal --python-version {python} --no-header --no-annotate --quiet".split()
    command = [*uv, *what, *fixed, *(["-c", str(held)] if held else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        fail(f"pyproject.toml cannot be resolved\n{done.stderr.rstrip()}", "change the pin it names, then make lock")
    return [line for line in done.stdout.splitlines() if "'never'" not in line]


def from_python(version: str, lines: list[str]) -> list[str]:
    """The same pins, for this Python and newer ones only: on an older one a package may need an older version."""
    marked = (line.partition(" ; ") for line in lines)
    asked = f"python_full_version >= '{version}'"
    return [f"{pin} ; {asked} and ({marker})" if marker else f"{pin} ; {asked}" for pin, _, marker in marked]


def pins(lines: list[str]) -> dict[str, str]:
    """{'numpy ; marker': '2.4.6'}"""
    found = (re.fullmatch(r"([^=#\s]+)={2,3}(\S+)(.*)", line) for line in lines)
    return {m[1] + m[3]: m[2] for m in found if m}


def write(name: str, lines: list[str]) -> list[str]:
    """Write one lock; `name old -> new` for each pin that moved."""
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
    """All of them. A package that two of them name has one version; only torch is two."""
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
    """The pin of llama-cpp-python, whose source is compiled: it is in no other lock."""
    return re.findall(r'^ *"(llama-cpp-python==[\w.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def main() -> None:
    uv = Path(sys.executable).with_name("uv")
    with tempfile.TemporaryDirectory() as folder:
        made = locks([str(uv), "--cache-dir", f"{folder}/cache", "pip", "compile", *uv_arguments()], Path(folder))
    changes = [change for name, lines in made.items() for change in write(f"{name}.txt", lines)]
    print("\n".join(changes) or "no change")


if __name__ == "__main__":
    main()
