"""`make env` and `make deploy-env`: install a locked Python environment. A second run only says that it is there.

    python3 setup/env.py --venv .venv                    the cloud side, with the tools of llama.cpp
    python3 setup/env.py --venv .venv-deploy --deploy    the side that runs models: llama-cpp-python, no torch
    python3 setup/env.py --venv .venv-light --light      only what `make data` needs: no torch, llama.cpp or compiler

<venv>/ferry.json is written last and says what is in the environment. It is removed before anything is changed, so that
after an interruption the next run finds an unfinished environment and repairs it.
"""

import argparse
import errno
import glob
import hashlib
import json
import os
import shutil
import time

from interpreter import hand_over, said
from packages import (
    BUILT,
    CUDA_RUNTIME,
    TORCH_INDEX,
    check_card,
    check_headers,
    check_owner,
    device,
    elsewhere,
    install,
    install_lines,
    make_venv,
    python_of,
    read_lock,
    split_locks,
)
from shared import AGAIN, DISK_FULL, cache_folder, fail, writable_folder, write_whole

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# For each side: its locks, the oldest Python it runs on, and the disk space it takes while pip unpacks.
LOCKS = {"train": (device(), "test"), "image": (device(),), "deploy": ("deploy",), "data": ("data",)}
OLDEST = {"train": (3, 11), "image": (3, 11), "deploy": (3, 10), "data": (3, 11)}
# Measured: 1.9 GB (torch 0.7, pyarrow 0.15, ...), 0.2 GB and 0.6 GB; with CUDA 5.6 GB and 3.0 GB for its wheels.
TORCH_DISK = 2.2e9 if device() == "cpu" else 9e9
DISK = {"train": TORCH_DISK, "image": TORCH_DISK, "deploy": 0.4e9, "data": 0.8e9}
TORCH = ("train", "image")  # the sides that train
SIDES = (
    ("deploy", "the side that runs models: no torch"),
    ("light", "only what `make data` needs"),
    ("image", "what an image needs: all but the tests"),
)
STEPS = {"train": 5, "image": 5, "deploy": 3, "data": 2}


def wanted(side):
    """Return what a finished environment records: the hashes of its locks, and its llama.cpp."""
    locks = {name: hashlib.sha256(read_lock(name).encode()).hexdigest() for name in LOCKS[side]}
    return {"device": None if side == "data" else device(), "locks": locks, "llama.cpp": wanted_llama_cpp(side)}


def wanted_llama_cpp(side):
    """Return which llama.cpp a finished environment has; None for the side without one.

    The train side has the build for this machine. The deploy side takes any build that works, so that it needs no
    compiler to compute a key.
    """
    if side == "data":
        return None
    import llamacpp

    if side == "deploy":
        return {"version": llamacpp.version(), "flags": os.environ.get("FERRY_LLAMA_FLAGS", "")}
    return {"version": llamacpp.version(), "key": llamacpp.key()}


def kept(venv, side):
    """Return `train` for an environment that has torch, else the requested side.

    An environment with torch has all that the other sides need, and took the longest to install. An image is exempt.
    """
    if side == "image":
        return side
    return "train" if glob.glob(os.path.join(glob.escape(venv), "lib", "python*", "site-packages", "torch")) else side


def ready(venv, side, want):
    """Return whether the environment is finished and has all that is expected."""
    try:
        with open(os.path.join(venv, "ferry.json"), encoding="utf-8") as file:
            have = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(have, dict):
        return False
    parts = ("bin/python",) + (("llama.cpp/build.json",) if side in TORCH else ())
    return all(have.get(k) == v for k, v in want.items()) and all(os.path.exists(os.path.join(venv, p)) for p in parts)


class Steps:
    """Prints the steps of a set-up, such as `[2/5] torch ... 21 s`."""

    def __init__(self, total):
        self.total, self.number, self.name, self.began = total, 0, "", time.monotonic()

    def begin(self, name, newline=False):
        """Print the name of a step. With newline=True the step may print its own lines of progress."""
        self.end_line = "      done: " if newline else " "
        self.number, self.started = self.number + 1, time.monotonic()
        print(f"[{self.number}/{self.total}] {name} ...", end="\n" if newline else "", flush=True)

    def done(self, text=""):
        """Print the result of the step, by default how long it took."""
        print(self.end_line + (text or f"{time.monotonic() - self.started:.0f} s"), flush=True)


def link(target, path):
    """Create a symbolic link, and replace an older one."""
    if os.path.lexists(path + ".new"):
        os.remove(path + ".new")
    os.symlink(target, path + ".new")
    os.replace(path + ".new", path)


def write_last(path, content):
    """Write the environment's record, completely or not at all."""
    write_whole(path, json.dumps(content, indent=2))


def set_up(venv, side, want, log):
    """Run all steps of one side. Each step can be repeated."""
    check_owner(venv)
    record = os.path.join(venv, "ferry.json")
    if os.path.exists(record):
        os.remove(record)
    steps = Steps(STEPS[side])
    steps.begin("virtual environment")
    make_venv(venv, OLDEST[side], log)
    link(os.path.join(ROOT, "ferry"), os.path.join(venv, "bin", "ferry"))
    steps.done()

    torch, others = split_locks(want["locks"])
    if side == "deploy" and device() == "cuda":
        others += [line for line in split_locks(["cuda"])[1] if line.startswith(CUDA_RUNTIME)]
    if torch:
        steps.begin("torch")
        install(venv, log, "torch", (TORCH_INDEX if any("+cpu" in line for line in torch) else []) + torch)
        steps.done()

    steps.begin(f"python packages ({len(others)})")
    install_lines(venv, log, others)
    steps.done()

    if side in TORCH:
        set_up_llama_cpp(venv, want["llama.cpp"]["version"], steps, log)
    facts = {"python": said([python_of(venv), "--version"]).split()[-1]}
    if side == "deploy":
        facts["llama-cpp-python"] = set_up_runtime(venv, want["llama.cpp"]["version"], steps, log)
    write_last(record, dict(want, **facts))


def set_up_llama_cpp(venv, version, steps, log):
    """Build llama.cpp once for this machine, install its wheels into the environment, and link its folder there."""
    import llamacpp

    name = "llama.cpp " + version
    there = llamacpp.complete(llamacpp.folder())
    long = "5 minutes on 16 cores" if llamacpp.cuda() else "6 minutes on 2 cores"
    steps.begin(name if there else f"{name}: compiled once for this machine ({long})", newline=not there)
    built = llamacpp.ensure(say=print)
    steps.done("there already" if there else "")

    steps.begin("llama-cpp-python and gguf")
    wheels = [str(next((built / "wheels").glob(name + "-*.whl"))) for name in BUILT]
    install(venv, log, "llama-cpp-python", ["--force-reinstall"] + wheels)
    link(built, os.path.join(venv, "llama.cpp"))
    steps.done()


def set_up_runtime(venv, version, steps, log):
    """Install llama-cpp-python from the first source that works; return a description of that source."""
    import runtime

    steps.begin("llama-cpp-python " + version, newline=True)
    source = runtime.set_up(venv, log)
    steps.done(source)
    return source


def main():
    """Set up the environment, unless it is ready."""
    given = arguments()
    venv, cache = os.path.abspath(given.venv), cache_folder()
    side = kept(venv, given.side)
    hand_over(OLDEST[side])
    import llamacpp

    want = wanted(side)
    place = f"environment: {venv}, {describe(side, want)}"
    if ready(venv, side, want):
        return None if given.quiet else print(place + ": all there")
    if side in TORCH:
        check_card()
        check_headers()
    writable_folder(cache, "FERRY_CACHE=/some/other/folder " + AGAIN)
    writable_folder(venv, elsewhere())
    with llamacpp.locked(os.path.join(cache, "env.lock"), print):
        if not ready(venv, side, want):  # checked again, because another set-up may have finished meanwhile
            check_disk(venv, side, cache, llamacpp)
            log = os.path.join(cache, "env.log")
            open(log, "w").close()
            set_up(venv, side, want, log)
    print(place + ": ready")


def arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Make one of Ferry's Python environments.")
    parser.add_argument("--venv", default=".venv", help="where (default: .venv)")
    parser.add_argument("--quiet", action="store_true", help="say nothing where all is there")
    parser.set_defaults(side="train")
    for side, what in SIDES:
        parser.add_argument(
            "--" + side, dest="side", action="store_const", const=side.replace("light", "data"), help=what
        )
    return parser.parse_args()


def describe(side, want):
    """Return which llama.cpp the environment has, for messages."""
    names = {
        "train": "llama.cpp {version}-{key}",
        "image": "llama.cpp {version}-{key}",
        "deploy": "llama-cpp-python {version}",
        "data": "light",
    }
    return names[side].format(**(want["llama.cpp"] or {}))


def check_disk(venv, side, cache, llamacpp):
    """Exit when there is too little disk space, because a disk that fills up half-way costs ten minutes.

    The compilation of a wheel checks again.
    """
    new = not os.path.exists(python_of(venv))
    built = side not in TORCH or llamacpp.complete(llamacpp.folder())
    needs = [(venv, DISK[side] if new else 0), (cache, 0 if built else llamacpp.DISK)]
    for folder, _ in needs:
        need = sum(size for other, size in needs if os.stat(other).st_dev == os.stat(folder).st_dev)
        free = shutil.disk_usage(folder).free
        if free < need:
            told = f"too little disk: {free / 1e9:.1f} GB free in {folder}, {need / 1e9:.1f} GB needed"
            fail(told, f"free some disk, then {AGAIN}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; what is finished is kept", AGAIN)
    except OSError as error:  # the disk filled up meanwhile, or a folder was removed
        if error.errno not in DISK_FULL + (errno.EROFS, errno.EACCES, errno.EIO):
            raise
        place = error.filename or "the environment or its log"
        fail(f"cannot write to {place}: {error.strerror}", f"free some disk, then {AGAIN}")
