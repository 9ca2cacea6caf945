"""`make lock`: resolve pyproject.toml again, write setup/locks/*.txt and print what changed.

cpu.txt  what the cloud side runs on (core + data + cpu + deploy: `verify` asks the same llama.cpp as the Mac)
data.txt what `data` alone needs, on a laptop: the same versions, no torch
test.txt what the tests add to cpu.txt

uv resolves for every platform at once, which pip cannot; it comes into a throwaway environment, not into the project's.
"""

import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from common import fail

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "setup" / "locks"
UV = "uv==0.13.9"  # the format of the locks follows it
PYTHON = "3.11"  # the oldest one allowed: markers speak of the newer ones
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


def resolve(uv: Path, where: list[str], extras: list[str], held: Path | None = None) -> list[str]:
    """The pinned lines for the core dependencies and these extras; versions in `held` stay."""
    fixed = f"pip compile pyproject.toml --universal --python-version {PYTHON} --no-header --no-annotate --quiet"
    command = [str(uv), *fixed.split()]
    command += where + [word for extra in extras for word in ("--extra", extra)] + (["-c", str(held)] if held else [])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        fail(f"pyproject.toml cannot be resolved\n{done.stderr.rstrip()}", "change the pin it names, then make lock")
    return [line for line in done.stdout.splitlines() if "'never'" not in line]


def pins(lines: list[str]) -> dict[str, str]:
    """{'numpy ; marker': '2.4.6'}"""
    found = (re.fullmatch(r"([^=#\s]+)==(\S+)(.*)", line) for line in lines)
    return {m[1] + m[3]: m[2] for m in found if m}


def write(name: str, lines: list[str]) -> list[str]:
    """Write one lock; `name old -> new` for each pin that moved."""
    path = LOCKS / name
    old, new = pins(path.read_text().splitlines() if path.exists() else []), pins(lines)
    LOCKS.mkdir(exist_ok=True)
    path.write_text(HEADER + "\n".join(lines) + "\n")
    return [
        f"{key} {old.get(key, 'none')} -> {new.get(key, 'none')}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        uv = Path(folder) / "bin" / "uv"
        pip = [uv.parent / "python", "-m", "pip", "install", "--quiet", UV]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            fail(f"{UV} cannot be installed\n{done.stderr.rstrip()}", "check the network, then make lock")
        where = uv_arguments()
        cpu = resolve(uv, where, ["data", "cpu", "deploy"])
        held = Path(folder) / "cpu.txt"
        held.write_text("\n".join(cpu) + "\n")
        test = [line for line in resolve(uv, where, ["data", "cpu", "deploy", "test"], held) if line not in cpu]
        data = resolve(uv, where, ["data"], held)
    changes = write("cpu.txt", cpu) + write("data.txt", data) + write("test.txt", test)
    print("\n".join(changes) or "no change")


if __name__ == "__main__":
    main()
