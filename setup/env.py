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

from interpreter import OLDEST_PYTHON, read_output, switch_to_usable_python
from packages import (
    BUILT_PACKAGES,
    CUDA_RUNTIME_PINS,
    TORCH_INDEX_ARGUMENTS,
    claim_venv,
    detect_device,
    install_lock_lines,
    install_packages,
    make_venv,
    other_folder_hint,
    read_lock,
    refuse_missing_headers,
    refuse_unusable_gpu,
    split_locks,
    venv_python,
)
from shared import DISK_FULL_ERRORS, SETUP_COMMAND, cache_folder, ensure_writable_folder, fail, write_atomically

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# For each side: its locks, and the disk space it takes while pip unpacks.
SIDE_LOCKS = {"train": (detect_device(), "test"), "image": (detect_device(),), "deploy": ("deploy",), "data": ("data",)}
# Measured: 1.9 GB (torch 0.7, pyarrow 0.15, ...), 0.2 GB and 0.6 GB; with CUDA 5.6 GB and 3.0 GB for its wheels.
TORCH_DISK_BYTES = 2.2e9 if detect_device() == "cpu" else 9e9
DISK = {"train": TORCH_DISK_BYTES, "image": TORCH_DISK_BYTES, "deploy": 0.4e9, "data": 0.8e9}
TORCH_SIDES = ("train", "image")  # the sides that train
SIDES = (
    ("deploy", "the side that runs models: no torch"),
    ("light", "only what `make data` needs"),
    ("image", "what an image needs: all but the tests"),
)
STEP_COUNTS = {"train": 5, "image": 5, "deploy": 3, "data": 2}


def expected_record(side):
    """Return what a finished environment records: the hashes of its locks, and its llama.cpp."""
    locks = {name: hashlib.sha256(read_lock(name).encode()).hexdigest() for name in SIDE_LOCKS[side]}
    return {
        "device": None if side == "data" else detect_device(),
        "locks": locks,
        "llama.cpp": expected_llama_cpp(side),
    }


def expected_llama_cpp(side):
    """Return which llama.cpp a finished environment has; None for the side without one.

    The train side has the build for this machine. The deploy side takes any build that works, so that it needs no
    compiler to compute a key.
    """
    if side == "data":
        return None
    import llamacpp

    if side == "deploy":
        return {"version": llamacpp.version(), "flags": os.environ.get("FERRY_LLAMA_FLAGS", "")}
    return {"version": llamacpp.version(), "key": llamacpp.build_key()}


def effective_side(venv, side):
    """Return `train` for an environment that has torch, else the requested side.

    An environment with torch has all that the other sides need, and took the longest to install. An image is exempt.
    """
    if side == "image":
        return side
    return "train" if glob.glob(os.path.join(glob.escape(venv), "lib", "python*", "site-packages", "torch")) else side


def is_ready(venv, side, expected):
    """Return whether the environment is finished and has all that is expected."""
    try:
        with open(os.path.join(venv, "ferry.json"), encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(record, dict):
        return False
    parts = ("bin/python",) + (("llama.cpp/build.json",) if side in TORCH_SIDES else ())
    return all(record.get(key) == value for key, value in expected.items()) and all(
        os.path.exists(os.path.join(venv, part)) for part in parts
    )


class StepPrinter:
    """Prints the steps of a set-up, such as `[2/5] torch ... 21 s`."""

    def __init__(self, total):
        self.total, self.number, self.name, self.began = total, 0, "", time.monotonic()

    def start(self, name, newline=False):
        """Print the name of a step. With newline=True the step may print its own lines of progress."""
        self.end_line = "      done: " if newline else " "
        self.number, self.started = self.number + 1, time.monotonic()
        print(f"[{self.number}/{self.total}] {name} ...", end="\n" if newline else "", flush=True)

    def finish(self, text=""):
        """Print the result of the step, by default how long it took."""
        print(self.end_line + (text or f"{time.monotonic() - self.started:.0f} s"), flush=True)


def replace_link(target, path):
    """Create a symbolic link, and replace an older one."""
    if os.path.lexists(path + ".new"):
        os.remove(path + ".new")
    os.symlink(target, path + ".new")
    os.replace(path + ".new", path)


def write_record(path, content):
    """Write the environment's record, completely or not at all."""
    write_atomically(path, json.dumps(content, indent=2))


def set_up_environment(venv, side, expected, log):
    """Run all steps of one side. Each step can be repeated."""
    claim_venv(venv)
    record_path = os.path.join(venv, "ferry.json")
    if os.path.exists(record_path):
        os.remove(record_path)
    steps = StepPrinter(STEP_COUNTS[side])
    steps.start("virtual environment")
    make_venv(venv, OLDEST_PYTHON[side], log)
    replace_link(os.path.join(ROOT, "ferry"), os.path.join(venv, "bin", "ferry"))
    steps.finish()

    torch, other_packages = split_locks(expected["locks"])
    if side == "deploy" and detect_device() == "cuda":
        other_packages += [line for line in split_locks(["cuda"])[1] if line.startswith(CUDA_RUNTIME_PINS)]
    if torch:
        steps.start("torch")
        install_packages(
            venv, log, "torch", (TORCH_INDEX_ARGUMENTS if any("+cpu" in line for line in torch) else []) + torch
        )
        steps.finish()

    steps.start(f"python packages ({len(other_packages)})")
    install_lock_lines(venv, log, other_packages)
    steps.finish()

    if side in TORCH_SIDES:
        set_up_llama_cpp(venv, expected["llama.cpp"]["version"], steps, log)
    facts = {"python": read_output([venv_python(venv), "--version"]).split()[-1]}
    if side == "deploy":
        facts["llama-cpp-python"] = set_up_runtime(venv, expected["llama.cpp"]["version"], steps, log)
    write_record(record_path, dict(expected, **facts))


def set_up_llama_cpp(venv, version, steps, log):
    """Build llama.cpp once for this machine, install its wheels into the environment, and link its folder there."""
    import llamacpp

    name = "llama.cpp " + version
    is_built = llamacpp.is_complete(llamacpp.build_folder())
    duration = "5 minutes on 16 cores" if llamacpp.cuda_capabilities() else "6 minutes on 2 cores"
    steps.start(name if is_built else f"{name}: compiled once for this machine ({duration})", newline=not is_built)
    built = llamacpp.ensure_build(say=print)
    steps.finish("there already" if is_built else "")

    steps.start("llama-cpp-python and gguf")
    wheels = [str(next((built / "wheels").glob(name + "-*.whl"))) for name in BUILT_PACKAGES]
    install_packages(venv, log, "llama-cpp-python", ["--force-reinstall"] + wheels)
    replace_link(built, os.path.join(venv, "llama.cpp"))
    steps.finish()


def set_up_runtime(venv, version, steps, log):
    """Install llama-cpp-python from the first source that works; return a description of that source."""
    import runtime

    steps.start("llama-cpp-python " + version, newline=True)
    source = runtime.install_runtime(venv, log)
    steps.finish(source)
    return source


def main():
    """Set up the environment, unless it is ready."""
    options = parse_arguments()
    venv, cache = os.path.abspath(options.venv), cache_folder()
    side = effective_side(venv, options.side)
    switch_to_usable_python(OLDEST_PYTHON[side])
    import llamacpp

    expected = expected_record(side)
    description = f"environment: {venv}, {describe_environment(side, expected)}"
    if is_ready(venv, side, expected):
        return None if options.quiet else print(description + ": all there")
    if side in TORCH_SIDES:
        refuse_unusable_gpu()
        refuse_missing_headers()
    ensure_writable_folder(cache, "FERRY_CACHE=/some/other/folder " + SETUP_COMMAND)
    ensure_writable_folder(venv, other_folder_hint())
    with llamacpp.hold_lock(os.path.join(cache, "env.lock"), print):
        if not is_ready(venv, side, expected):  # checked again, because another set-up may have finished meanwhile
            refuse_full_disk(venv, side, cache, llamacpp)
            log = os.path.join(cache, "env.log")
            open(log, "w").close()
            set_up_environment(venv, side, expected, log)
    print(description + ": ready")


def parse_arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Make one of Ferry's Python environments.")
    parser.add_argument("--venv", default=".venv", help="where (default: .venv)")
    parser.add_argument("--quiet", action="store_true", help="say nothing where all is there")
    parser.set_defaults(side="train")
    for side, help_text in SIDES:
        parser.add_argument(
            "--" + side, dest="side", action="store_const", const=side.replace("light", "data"), help=help_text
        )
    return parser.parse_args()


def describe_environment(side, expected):
    """Return which llama.cpp the environment has, for messages."""
    tools = "llama.cpp {version}-{key}"
    names = {"train": tools, "image": tools, "deploy": "llama-cpp-python {version}", "data": "light"}
    return names[side].format(**(expected["llama.cpp"] or {}))


def refuse_full_disk(venv, side, cache, llamacpp):
    """Exit when there is too little disk space, because a disk that fills up half-way costs ten minutes.

    The compilation of a wheel checks again.
    """
    is_new = not os.path.exists(venv_python(venv))
    is_built = side not in TORCH_SIDES or llamacpp.is_complete(llamacpp.build_folder())
    needs = [(venv, DISK[side] if is_new else 0), (cache, 0 if is_built else llamacpp.DISK)]
    for folder, _ in needs:
        need = sum(size for other, size in needs if os.stat(other).st_dev == os.stat(folder).st_dev)
        free = shutil.disk_usage(folder).free
        if free < need:
            message = f"too little disk: {free / 1e9:.1f} GB free in {folder}, {need / 1e9:.1f} GB needed"
            fail(message, f"free some disk, then {SETUP_COMMAND}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; what is finished is kept", SETUP_COMMAND)
    except OSError as error:  # the disk filled up meanwhile, or a folder was removed
        if error.errno not in DISK_FULL_ERRORS + (errno.EROFS, errno.EACCES, errno.EIO):
            raise
        place = error.filename or "the environment or its log"
        fail(f"cannot write to {place}: {error.strerror}", f"free some disk, then {SETUP_COMMAND}")
