"""`make env`: the locked Python environment and the one llama.cpp. Run again, it says in one line that all is there.

    python3 setup/env.py --venv .venv
    python3 setup/env.py --venv .venv-light --light    only what `make data` needs: no torch, no llama.cpp, no compiler

<venv>/ferry.json is written last and says what is in the environment; it is taken away before anything is changed.
So whatever happens on the way, a second run sees an unfinished environment and repairs it.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

from common import cache_folder, fail, run, writable_folder

OLDEST, NEWEST = (3, 11), (3, 14)
LOCKS, LIGHT = ("cpu", "test"), ("data",)
HERE = os.path.dirname(os.path.abspath(__file__))
AGAIN = "make env"
NETWORK = f"check the network (and pip config list), then {AGAIN}"
DISK = 2.2e9  # the environment takes 1.9 GB (torch 0.7, pyarrow 0.15, ...), and pip unpacks beside it
DISK_LIGHT = 0.8e9
BUILT = ("llama_cpp_python", "gguf")  # from setup/llamacpp.py, not from a lock
# pip asks an extra index for every package, five times each if it is not reachable: this one is for torch alone.
TORCH_INDEX = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1"]


def fitting_python():
    """Go on with a Python that fits. Up to here and in common.py the syntax is Python 3.6's, to be able to say so."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    for name in ("python3.13", "python3.12", "python3.11", "python3.14"):
        path = shutil.which(name)
        if path and fits(path):
            os.execv(path, [path] + sys.argv)
    have = ".".join(map(str, sys.version_info[:3]))
    fail(
        f"Python 3.11 to 3.14 is needed; this is {have} ({sys.executable}), and no other is on PATH",
        f"install python3.12 (with its venv module), then {AGAIN}",
    )


def fits(python, module="sys"):
    """Is this a Python that can be used, and has it this module? (Run it: pyenv's names on PATH may only print an error.)"""
    ask = f"import sys, {module}; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"
    return subprocess.call([python, "-c", ask], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def wanted(light=False):
    """What a finished environment has: the locks' hashes, and (if it is not a light one) the llama.cpp for this machine."""
    import llamacpp

    locks = {name: hashlib.sha256(read_lock(name).encode()).hexdigest() for name in (LIGHT if light else LOCKS)}
    return {"locks": locks, "llama.cpp": None if light else {"version": llamacpp.version(), "key": llamacpp.key()}}


def read_lock(name):
    """The text of one lock."""
    with open(os.path.join(HERE, "locks", name + ".txt"), encoding="utf-8") as file:
        return file.read()


def ready(venv, want):
    """Is all of it there, and did it get to its end?"""
    try:
        with open(os.path.join(venv, "ferry.json"), encoding="utf-8") as file:
            have = json.load(file)
    except (OSError, ValueError):
        return False
    parts = ("bin/python",) + (("llama.cpp/build.json",) if want["llama.cpp"] else ())
    return all(have.get(k) == v for k, v in want.items()) and all(os.path.exists(os.path.join(venv, p)) for p in parts)


class Steps:
    """`[2/5] torch ... 21 s`"""

    def __init__(self, total):
        self.total, self.number, self.name, self.began = total, 0, "", time.monotonic()

    def begin(self, name, newline=False):
        """Announce a step; with newline its own progress lines may follow."""
        self.end_line = "      done: " if newline else " "
        self.number, self.started = self.number + 1, time.monotonic()
        print(f"[{self.number}/{self.total}] {name} ...", end="\n" if newline else "", flush=True)

    def done(self, text=""):
        """Say how long it took."""
        print(self.end_line + (text or f"{time.monotonic() - self.started:.0f} s"), flush=True)


def make_venv(venv, log):
    """The environment that is there if it can be built upon, else an empty one."""
    python, config = os.path.join(venv, "bin", "python"), os.path.join(venv, "pyvenv.cfg")
    if os.path.exists(config) and not os.path.exists(marker(venv)) and os.path.exists(python) and fits(python, "pip"):
        return python
    if os.listdir(venv) and not os.path.exists(config):  # --clear would empty it, whatever it is
        fail(f"{venv} is there and is no virtual environment", "move it away, or make env VENV=/some/other/folder")
    hint = "sudo apt-get install python{}.{}-venv   (Debian, Ubuntu), then {}".format(*sys.version_info[:2], AGAIN)
    if not importlib.util.find_spec("venv") or not importlib.util.find_spec("ensurepip"):
        fail(f"this Python ({sys.executable}) has no venv module", hint)
    run([sys.executable, "-m", "venv", "--clear", venv], log, f"no virtual environment could be made in {venv}", hint)
    return python


def marker(venv):
    """There while pip changes the environment. Found at the start, pip was killed half way: nothing in it can be trusted."""
    return os.path.join(venv, "pip-is-running")


def split_locks(names):
    """(the lines of torch, all other pinned lines)"""
    lines = [line for name in names for line in read_lock(name).splitlines() if line and not line.startswith("#")]
    torch = [line for line in lines if line.startswith("torch==")]
    return torch, [line for line in lines if line not in torch]


def pip(venv, log, what, arguments):
    """Run the environment's pip."""
    open(marker(venv), "w").close()
    command = [os.path.join(venv, "bin", "python"), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    try:
        run(command + arguments, log, what, NETWORK)
    except SystemExit:  # pip gave up by itself, and it tidies up
        os.remove(marker(venv))
        raise
    os.remove(marker(venv))


def install(venv, log, name, arguments):
    """Without a look at dependencies: the locks are complete, and unsloth's own wishes cannot be met."""
    pip(venv, log, f"{name} could not be installed", ["install", "--no-deps"] + arguments)


def remove_others(venv, log, others):
    """What no lock names any more: some packages do harm by being there (torchvision, xformers)."""
    keep = {line.split("==")[0].replace("_", "-").lower() for line in others}
    keep |= {"torch", "pip", "setuptools", "wheel"} | {name.replace("_", "-") for name in BUILT}
    ask = [os.path.join(venv, "bin", "python"), "-m", "pip", "list", "--format=json"]
    listed = json.loads(subprocess.run(ask, capture_output=True, text=True).stdout)
    extra = sorted({package["name"].replace("_", "-").lower() for package in listed} - keep)
    if extra:
        print(f" not in the locks, removed: {', '.join(extra)} ...", end="", flush=True)
        pip(venv, log, "pip cannot uninstall " + ", ".join(extra), ["uninstall", "--yes"] + extra)


def link(target, path):
    """A symbolic link, in place of an older one."""
    if os.path.lexists(path + ".new"):
        os.remove(path + ".new")
    os.symlink(target, path + ".new")
    os.replace(path + ".new", path)


def write_last(path, content):
    """The record, in one piece or not at all."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)


def set_up(venv, want, log):
    """All five steps, or the two of a light environment. Each can be repeated."""
    record = os.path.join(venv, "ferry.json")
    if os.path.exists(record):
        os.remove(record)
    steps = Steps(5 if want["llama.cpp"] else 2)
    steps.begin("virtual environment")
    python = make_venv(venv, log)
    steps.done()

    torch, others = split_locks(want["locks"])
    if torch:
        steps.begin("torch")
        install(venv, log, "torch", (TORCH_INDEX if any("+cpu" in line for line in torch) else []) + torch)
        steps.done()

    steps.begin(f"python packages ({len(others)})")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(others) + "\n")
        file.flush()
        install(venv, log, "the python packages", ["-r", file.name])
    remove_others(venv, log, others)
    steps.done()

    if want["llama.cpp"]:
        set_up_llama_cpp(venv, want["llama.cpp"]["version"], steps, log)
    said = subprocess.run([python, "--version"], capture_output=True, text=True).stdout
    write_last(record, dict(want, python=said.split()[-1]))


def set_up_llama_cpp(venv, version, steps, log):
    """Built once for this machine; its wheels into the environment, its folder beside them."""
    import llamacpp

    name = "llama.cpp " + version
    there = llamacpp.complete(llamacpp.folder())
    steps.begin(name if there else name + ": compiled once for this machine (6 minutes on 2 cores)", newline=not there)
    built = llamacpp.ensure(say=print)
    steps.done("there already" if there else "")

    steps.begin("llama-cpp-python and gguf")
    wheels = [str(next((built / "wheels").glob(name + "-*.whl"))) for name in BUILT]
    install(venv, log, "llama-cpp-python", ["--force-reinstall"] + wheels)
    link(built, os.path.join(venv, "llama.cpp"))
    steps.done()


def main():
    """Check, then set up what is missing."""
    fitting_python()
    parser = argparse.ArgumentParser(description="Make Ferry's Python environment.")
    parser.add_argument("--venv", default=".venv", help="where (default: .venv)")
    parser.add_argument("--light", action="store_true", help="only what `make data` needs: no torch, no llama.cpp")
    given = parser.parse_args()
    venv, cache = os.path.abspath(given.venv), cache_folder()
    import llamacpp

    want = wanted(given.light)
    place = "environment: " + venv
    place += ", llama.cpp {version}-{key}".format(**want["llama.cpp"]) if want["llama.cpp"] else ", light"
    if ready(venv, want):
        return print(place + ": all there")
    writable_folder(cache, "FERRY_CACHE=/some/other/folder " + AGAIN)
    writable_folder(venv, "make env VENV=/some/other/folder")
    with llamacpp.locked(os.path.join(cache, "env.lock"), print):
        if not ready(venv, want):  # now that any other set-up is over
            check_disk(venv, cache, llamacpp, given.light)
            log = os.path.join(cache, "env.log")
            open(log, "w").close()
            set_up(venv, want, log)
    print(place + ": ready")


def check_disk(venv, cache, llamacpp, light=False):
    """Before the first byte: a full disk in the middle costs ten minutes."""
    new = not os.path.exists(os.path.join(venv, "bin", "python"))
    built = light or llamacpp.complete(llamacpp.folder())
    needs = [(venv, (DISK_LIGHT if light else DISK) if new else 0), (cache, 0 if built else llamacpp.DISK)]
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
