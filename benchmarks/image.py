"""What the images cost: bytes a layer, seconds to build (cold, again, after a change of code), start-up to the first line.

    .venv/bin/python benchmarks/image.py [cuda]

The CPU image on the tests' stand-in base (tests/helpers/images.py) with llama.cpp lent by the native build; `cuda` adds the
sizes of a ferry:cuda that is there. The rival for start-up is the same program natively.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.helpers import images
from tests.helpers.commands import MAKE, ROOT

PARTS = ("base", "Debian packages", "CUDA and triton", "torch", "llama.cpp", "other Python packages")


def seconds(action, times: int = 1) -> float:
    """The median of some runs of it."""
    taken = []
    for _ in range(times):
        began = time.monotonic()
        action()
        taken.append(time.monotonic() - began)
    return round(sorted(taken)[times // 2], 1)


def make_image(*arguments: str) -> None:
    done = images.make_image(*arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def cold() -> None:
    """Nothing but the base, the lent llama.cpp and pip's own cache."""
    make_image("DOCKER_BUILD_FLAGS=" + images.build_flags() + " --no-cache")


def after_a_change() -> None:
    """One line of a stage is another."""
    path = ROOT / "pipeline" / "preflight" / "check_run.py"
    text = path.read_text()
    try:
        path.write_text(text + f"\n# {time.time()}\n")
        make_image()
    finally:
        path.write_text(text)


def first_line(command: list) -> float:
    """Seconds from the command to the first byte of its answer."""
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.read(1)
        taken = time.monotonic() - began
        process.stdout.read()
    return round(taken, 2)


def median_of(command: list, times: int = 5) -> float:
    return sorted(first_line(command) for _ in range(times))[times // 2]


def layers(name: str, case: str, parts: tuple[str, ...]) -> list[dict]:
    """The layers that count, in the Dockerfile's order, and all of them."""
    sizes = images.layers(name)
    large = [size for size in sizes if size > 1e7]
    rows = [row(f"{case}: {part}", mb=round(size / 1e6)) for part, size in zip(parts, large, strict=True)]
    return [*rows, row(f"{case}: all layers", mb=round(sum(sizes) / 1e6))]


def row(case: str, mb=None, wall_s=None, system: str = "ferry") -> dict:
    return {"system": system, "case": case, "MB": mb, "wall_s": wall_s}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        images.built(Path(folder))
        found = [row("CPU image: cold build, wheels and llama.cpp there", wall_s=seconds(cold))]
        make_image()
        found.append(row("CPU image: build again, nothing changed", wall_s=seconds(make_image, 3)))
        found.append(row("CPU image: build again, a line of a stage changed", wall_s=seconds(after_a_change, 3)))
        make_image()
        found += layers(images.IMAGE, "CPU image", tuple(part for part in PARTS if part != "CUDA and triton"))
        if "cuda" in sys.argv:
            found += layers("ferry:cuda", "CUDA image", PARTS)
        inside = [
            sys.executable,
            "setup/container.py",
            "run",
            "DEVICE=cpu",
            "ENGINE=podman",
            "DOCKER_RUN_FLAGS=--network=none",
            "--",
        ]
        found.append(
            row("start: make config, in the image", wall_s=median_of([*inside, "config", "configs/demo.yaml"]))
        )
        found.append(
            row("start: make config", wall_s=median_of([*MAKE, "config", "CONFIG=configs/demo.yaml"]), system="native")
        )
    table.write("image", " ".join(["benchmarks/image.py", *sys.argv[1:]]), ("pip",), found)


if __name__ == "__main__":
    main()
