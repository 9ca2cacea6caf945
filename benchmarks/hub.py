"""Measures the way to the Hub and back: publish and pull beside the bare client's upload_folder and hf_hub_download.

    .venv/bin/python benchmarks/hub.py [--repeat 3] [--sizes 0.5,2]

The Hub is tests/helpers/hub.py on loopback, a process of its own whose time is not counted, with an empty storage for each upload,
which it takes in parts of 2 MB. A repo is one random GGUF of so many GB (2**30 bytes), an adapter and small files. Each
system is a fresh process with an empty HF_HOME, Xet is off, all take turns, and before each the disk is at rest and memory
full of page cache (see settle). "publish" is what sends a laid-out folder: repo, one commit, comparison, tag; "and put's
sha256" adds the hash that the stage makes of the GGUF while laying it out: upload_folder makes its own. "pull" is the whole
command into an empty store: manifest, download, sha256, fsync, GGUF header, template; the bare client compares the file's
length only and does not wait for the disk. cpu_s is that of the process tree, peak_memory_gb that of its largest process.
Linux only. Writes benchmarks/results/hub.{json,md}.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import table

ROOT = Path(__file__).resolve().parent.parent
REPO, GGUF = "you/tiny", "tiny.q4_k_m.gguf"
FIGURES = ("wall_s", "cpu_s", "peak_memory_gb")

# This process makes no file itself: a child's peak begins with what its parent holds.
MAKE = "import sys; from pathlib import Path; from tests.helpers import repos; repos.make(Path(sys.argv[1]), int(sys.argv[2]))"
ADD = f"import sys; from tests.helpers.hub import Storage; Storage(sys.argv[1]).add('models/{REPO}', sys.argv[2])"
SEND = f"from pipeline.publish import upload; upload.upload_folder({{'folder': sys.argv[1], 'repo': '{REPO}', 'private': False, 'tag': None}})"
PUT = f"from pathlib import Path; from pipeline.publish import repo_files; gguf = Path(sys.argv[1], '{GGUF}'); repo_files.link_or_copy(gguf, gguf)"
UPLOAD = f"from huggingface_hub import HfApi; HfApi().create_repo('{REPO}'); HfApi().upload_folder(repo_id='{REPO}', folder_path=sys.argv[1])"
DOWNLOAD = f"from huggingface_hub import hf_hub_download; path = hf_hub_download('{REPO}', '{GGUF}')"
DIGEST = "import hashlib; hashlib.file_digest(open(path, 'rb'), 'sha256')"

UP = {
    ("ferry", "publish"): SEND,
    ("huggingface_hub", "upload_folder"): UPLOAD,
    ("ferry", "publish, and put's sha256"): f"{PUT}; {SEND}",
}
DOWN = {
    ("ferry", "pull"): f"from cli.main import ferry; ferry(['pull', '{REPO}', '--models', sys.argv[2]])",
    ("huggingface_hub", "hf_hub_download"): DOWNLOAD,
    ("huggingface_hub", "hf_hub_download, then sha256"): f"{DOWNLOAD}; {DIGEST}",
}
BARE = ("huggingface_hub", "upload_folder"), ("huggingface_hub", "hf_hub_download")


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", f"import sys; {code}", *map(str, arguments)]


@contextlib.contextmanager
def serving(storage: Path) -> Iterator[str]:
    """The address of a Hub."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.hub", str(storage)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def settle(holes: Path) -> None:
    """The disk has nothing to do, and no memory is free: it is all page cache, as on a machine that has run for a while.

    A virtual machine gives free memory back to its host, and each first touch asks for it anew: writing a file of 2 GB
    took 0.6 to 5 s here, as chance would have it. So what is free is filled with the holes of a sparse file, unwritten.
    """
    os.sync()
    free, buffer = psutil.virtual_memory().free, bytearray(1 << 20)
    with holes.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.truncate(end + free)
        while file.readinto(buffer):
            pass


def measure(code: str, folder: Path, storage: Path, work: Path) -> dict:
    """Wall and CPU seconds, and the memory of the largest process, of one transfer with empty caches and an empty store."""
    fresh = work / "fresh"
    fresh.mkdir()
    with serving(storage) as url, (work / "log").open("w") as log:
        settings = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_writer", "HF_HOME": str(fresh), "HF_HUB_DISABLE_XET": "1"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
        settle(work / "holes")
        started = time.monotonic()
        process = subprocess.Popen(
            python(code, folder, fresh / "models"), cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        _, status, used = os.wait4(process.pid, 0)  # of the process and all it waited for
        wall = time.monotonic() - started
    if status:
        sys.exit(f"{code} failed:\n{(work / 'log').read_text()[-2000:]}")
    shutil.rmtree(fresh)
    return dict(zip(FIGURES, (wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9), strict=True))


def sent(code: str, folder: Path, work: Path) -> dict:
    """An upload to an empty Hub: what it has is not sent again."""
    try:
        return measure(code, folder, work / "empty", work)
    finally:
        shutil.rmtree(work / "empty")


def rows(gigabytes: str, repeat: int, work: Path) -> list[dict]:
    folder, storage = work / "tiny", work / "storage"
    subprocess.run(python(MAKE, folder, int(float(gigabytes) * 2**30)), cwd=ROOT, check=True)
    subprocess.run(python(ADD, storage, folder), cwd=ROOT, check=True)
    turns: dict[tuple[str, str], Callable[[], dict]] = {}
    turns |= {key: lambda code=code: sent(code, folder, work) for key, code in UP.items()}
    turns |= {key: lambda code=code: measure(code, folder, storage, work) for key, code in DOWN.items()}
    found: dict[tuple[str, str], list[dict]] = {key: [] for key in turns}
    for _ in range(repeat):
        for key, turn in turns.items():
            found[key].append(turn())
            print(gigabytes, *key, found[key][-1], flush=True)
    shutil.rmtree(folder)
    shutil.rmtree(storage)
    middle = {
        key: {name: statistics.median(one[name] for one in several) for name in FIGURES}
        for key, several in found.items()
    }
    return [row(f"{gigabytes} GB", key, middle, middle[BARE[key in DOWN]]) for key in turns]


def row(size: str, key: tuple[str, str], middle: dict, bare: dict) -> dict:
    figures = {name: round(value, 2) for name, value in middle[key].items()}
    ratios = {f"{name}, x bare": round(middle[key][name] / bare[name], 2) for name in FIGURES[:2]}
    return {"system": key[0], "case": f"{size}: {key[1]}"} | figures | ratios


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sizes", default="0.5,2")
    options, found = parser.parse_args(), []
    work = Path(tempfile.mkdtemp(prefix="ferry-hub-"))
    try:
        for size in options.sizes.split(","):
            found += rows(size, options.repeat, work)
    finally:
        shutil.rmtree(work)
    command = f"benchmarks/hub.py --repeat {options.repeat} --sizes {options.sizes}"
    table.write("hub", command, ("huggingface_hub", "httpx", "httpcore", "h11"), found)


if __name__ == "__main__":
    main()
