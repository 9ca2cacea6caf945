"""Build llama.cpp once for this machine, from the sdist of llama-cpp-python.

There is one source for everything: the tools and the converter of the cloud side and the runtime of both sides are of
the same commit. PyPI has no wheel of it, and no wheel has the converter, so it is compiled here and kept:

    ${FERRY_CACHE:-~/.cache/ferry}/llama.cpp/<version>-<key>/
        bin/         llama-quantize, llama-imatrix, llama-perplexity, our llama-render (render.cpp) and their libraries
        convert/     convert_hf_to_gguf.py with conversion/ and gguf-py/
        models/      real chat templates and vocabularies, for the tests
        wheels/      llama_cpp_python (with the same libraries inside) and gguf
        LICENSE  build.json

The side that only runs models needs only wheels/llama_cpp_python, which <version>-<key>-wheel/ holds alone.

The key is a hash of all that the result depends on, so a folder is never outdated, only unused. FERRY_LLAMA_FLAGS adds
CMake flags: `-DGGML_CUDA=ON`, or `-DGGML_NATIVE=OFF` for a build that runs on other machines too.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from packages import capability, device, read_lock
from shared import AGAIN, NETWORK, cache_folder, fail, run, writable_folder

RECIPE = 2  # increase it when this file builds something else from the same inputs
# Bytes. Measured: sdist 77 MB, unpacked 232 MB, build 60 MB, result 110 MB; the rest is reserve. nvcc alone is 0.84 GB.
DISK = 700e6 if device() == "cpu" else 4e9
RENDER = Path(__file__).with_name("render.cpp")
TOOLS = ["llama-quantize", "llama-imatrix", "llama-perplexity"]
MAC = sys.platform == "darwin"
# For a build that is not for the GPUs of this machine: T4, A100 (its code runs on A10 and L4), H100, B200, RTX 50.
CARDS = "75;80;90;100;120"
NO_AMX = "-U__AMX_INT8__"  # the macro that the kernels test; unlike -mno-amx-int8, every compiler accepts this flag


def version() -> str:
    """Return the pinned version of llama-cpp-python, which `make lock` takes from pyproject.toml."""
    return re.search(r"^llama-cpp-python==([\w.]+)$", read_lock("build"), re.MULTILINE)[1]


def cuda() -> str:
    """Return the compute capabilities to compile for, such as 90 or 80;90; empty without a GPU."""
    return (os.environ.get("FERRY_CUDA") or capability() or CARDS) if device() == "cuda" else ""


def flags() -> list[str]:
    """Return the arguments of CMake.

    The libraries find each other relative to their own folder, so that it can be moved and packed.
    """
    ours = ["CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "CMAKE_BUILD_WITH_INSTALL_RPATH=ON"]
    # In an environment llama_cpp finds the CUDA libraries that torch uses. The tools get their path from
    # pipeline/toolchain/llama_tools.py.
    beside = ";$ORIGIN/../../nvidia/cu13/lib" if cuda() else ""
    ours += ["CMAKE_INSTALL_RPATH=" + ("@loader_path" if MAC else "$ORIGIN" + beside)]
    ours += ["LLAMA_OPENSSL=OFF", "GGML_CCACHE=OFF"]
    ours += [f"LLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP")]
    # Without NO_VMM the driver's library is linked, and nothing loads on a machine without a driver (docker build).
    ours += (
        [f"CMAKE_CUDA_ARCHITECTURES={cuda()}", "GGML_CUDA=ON", "GGML_CUDA_NCCL=OFF", "GGML_CUDA_NO_VMM=ON"]
        if cuda()
        else []
    )
    ours += ["GGML_METAL_EMBED_LIBRARY=ON"] if MAC else []
    ours += [f"CMAKE_{language}_FLAGS={NO_AMX}" for language in ("C", "CXX")] if native_build_uses_amx() else []
    return ["-D" + flag for flag in ours] + os.environ.get("FERRY_LLAMA_FLAGS", "").split()


def native_build_uses_amx() -> bool:
    """Return whether `-march=native` would compile llama.cpp's AMX kernels on this machine.

    GCC 12 drops half of their tile configuration as dead stores (its `_tile_loadconfig` claims to read 8 of 64 bytes),
    and the first matrix multiplication then ends the process with a general protection fault.
    """
    return (
        not MAC and "amx_tile" in cpu().split() and "-DGGML_NATIVE=OFF" not in os.environ.get("FERRY_LLAMA_FLAGS", "")
    )


def compiler() -> str:
    """Return the first line of the C++ compiler's --version. Exit when there is no compiler."""
    for name in filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]):
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, text=True)
            if said.returncode == 0:  # a Mac without Xcode's tools has a c++ that only prints that they are missing
                return said.stdout.splitlines()[0]
    fix = "xcode-select --install" if MAC else "sudo apt-get install g++   (or your system's C++ compiler)"
    fail(
        "no C++ compiler: llama.cpp must be compiled once, and c++, g++ and clang++ are not on PATH",
        f"{fix}, then {AGAIN}",
    )


def cpu() -> str:
    """Return the instruction sets of this processor, which a native build depends on; on a Mac its name."""
    if MAC:
        ask = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    try:
        found = re.search(r"^(flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return " ".join(sorted(found[2].split())) if found else "unknown"


def key() -> str:
    """Return eight hex digits of the hash of all that the result depends on."""
    native = "-DGGML_NATIVE=OFF" not in flags()
    ours = hashlib.sha256(RENDER.read_bytes()).hexdigest()
    parts = [
        version(),
        flags(),
        RECIPE,
        ours,
        compiler(),
        sys.platform,
        platform.machine(),
        cpu() if native else "portable",
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def folder(only_wheel: bool = False) -> Path:
    """Return the folder of the build for this machine, which may not exist yet."""
    return Path(cache_folder()) / "llama.cpp" / (f"{version()}-{key()}" + ("-wheel" if only_wheel else ""))


def complete(path: Path) -> bool:
    """Return whether the folder holds a complete build: build.json is written last, before the folder gets its name."""
    return (path / "build.json").is_file()


def cached() -> Path | None:
    """Return a complete build for this machine, with or without the tools; None when there is none.

    When no build of this version exists, the compiler is not asked for its version: on a Mac without a compiler that
    opens a window.
    """
    if not list((Path(cache_folder()) / "llama.cpp").glob(f"{version()}-*")):
        return None
    return next(filter(complete, (folder(), folder(only_wheel=True))), None)


@contextmanager
def locked(path: Path, say):
    """Hold a lock file, so that only one set-up runs at a time.

    The system releases the lock when this process and its child processes have ended, however they ended. The child
    processes count, because pip continues to install for a while after a kill -9 of this process.

    Args:
        path: The lock file.
        say: Prints a line while another set-up has the lock.
    """
    with open(path, "a+") as file:
        os.set_inheritable(file.fileno(), True)
        wait_for_lock(file, say)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "since": time.time(), "command": " ".join(sys.argv)}))
        file.flush()
        yield


def wait_for_lock(file, say) -> None:
    """Wait for the lock and take it. Say every 30 s which other set-up has it, and for how long."""
    said = 0.0
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - said > 30 or not said:
                said = time.monotonic()
                say(f"another set-up is running{describe_holder(file)}: waiting for it")
            time.sleep(0.2)


def describe_holder(file) -> str:
    """Return who has the lock, such as ` (pid 123, setup/env.py --venv .venv, for 42 s)`; empty when unknown."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f" (pid {holder['pid']}, {holder['command']}, for {time.time() - holder['since']:.0f} s)"
    except (ValueError, KeyError, TypeError):
        return ""


def tell(text: str) -> None:
    """Print progress on stderr, because stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def ensure(say=tell, only_wheel: bool = False) -> Path:
    """Return the folder of a complete build; build it first when it is missing."""
    target = folder(only_wheel)
    if complete(target):
        return target
    writable_folder(str(target.parent), f"FERRY_CACHE=/some/other/folder {AGAIN}")
    with locked(target.parent / "lock", say):
        if not complete(target):
            build(target, say, only_wheel)
    return target


def build(target: Path, say, only_wheel: bool) -> None:
    """Build in a temporary folder beside the target, and rename the result at the end. Exit when the disk is full."""
    remove_unfinished(target.parent)
    if (free := shutil.disk_usage(target.parent).free) < DISK:
        fail(
            f"too little disk: {free / 1e9:.1f} GB free in {target.parent}, {DISK / 1e9:.1f} GB needed for llama.cpp",
            f"FERRY_CACHE=/a/bigger/disk {AGAIN}",
        )
    log = target.parent / f"{target.name}.log"
    log.unlink(missing_ok=True)
    work = Path(tempfile.mkdtemp(prefix=target.name + ".part-", dir=target.parent))
    started = time.monotonic()
    try:
        commit = make(work, log, say, only_wheel)
        facts = {"version": version(), "commit": commit, "flags": flags(), "compiler": compiler(), "recipe": RECIPE}
        facts["seconds"] = round(time.monotonic() - started)
        (work / "out" / "build.json").write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(work / "out", target)
    except OSError as error:
        fail(f"llama.cpp could not be built: {error}", f"free some disk, or FERRY_CACHE=/some/other/folder {AGAIN}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary folders of killed builds of this version, which have the exact name that the build gives.

    No process uses them, because the caller holds the lock.
    """
    ours = re.compile(re.escape(version()) + r"-[0-9a-f]{8}(-wheel)?\.part-\w+")
    for path in folder.glob(f"{version()}-*.part-*"):
        if ours.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def make(work: Path, log: Path, say, only_wheel: bool) -> str:
    """Download, compile and collect the result in `work`/out; return the commit of llama.cpp."""
    out, compiled = work / "out", work / "build"
    out.mkdir()
    env = with_tools(work, log)
    source = download(work, log, env)
    vendored = source / "vendor" / "llama.cpp"
    commit = (source / ".git/modules/vendor/llama.cpp/HEAD").read_text().strip()
    compile_all(vendored, compiled, ["llama"] if only_wheel else ["llama", *TOOLS], log, env, say)
    if not only_wheel:
        compile_render(vendored, compiled, log)
        shutil.copytree(compiled / "bin", out / "bin", symlinks=True)
    make_wheels(source, compiled / "bin", out / "wheels", only_wheel, log, env)
    if not only_wheel:
        keep_converter(vendored, out)
    shutil.copy(vendored / "LICENSE", out)
    shutil.copytree(vendored / "licenses", out / "licenses")
    return commit


def keep_converter(vendored: Path, out: Path) -> None:
    """Move the parts of the source that are used uncompiled into the result."""
    (out / "convert").mkdir()
    for name in ("convert_hf_to_gguf.py", "conversion", "gguf-py"):
        os.rename(vendored / name, out / "convert" / name)
    os.rename(vendored / "models", out / "models")


def with_tools(work: Path, log: Path) -> dict[str, str]:
    """Install the pinned build tools into a virtual environment; return the environment variables to run them.

    For a GPU these include nvcc and CUDA's headers, which PyPI has too.
    """
    say_venv = "Python cannot make a virtual environment"
    run([sys.executable, "-m", "venv", work / "tools"], log, say_venv, f"install Python's venv module, then {AGAIN}")
    pins = [line for name in ("build", "nvcc")[: 2 if cuda() else 1] for line in read_lock(name).splitlines()]
    pins = [line for line in pins if line and not line.startswith(("#", "llama-cpp-python=="))]
    pip = [work / "tools/bin/python", "-m", "pip", "install", "--no-deps", *pins]
    run(pip, log, "the tools that compile llama.cpp could not be installed", NETWORK)
    return os.environ | {"PATH": f"{work / 'tools' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}


def download(work: Path, log: Path, env: dict[str, str]) -> Path:
    """Download and unpack the sdist; return its folder. (pip also asks the sdist for its metadata, which takes 7 s.)"""
    name = f"llama-cpp-python=={version()}"
    pip = [work / "tools/bin/python", "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    pip += ["--no-binary", "llama-cpp-python"]
    run([*pip, "--dest", work, name], log, f"the source of {name} cannot be downloaded", NETWORK, env)
    (archive,) = work.glob("llama_cpp_python-*.tar.gz")
    shutil.unpack_archive(archive, work)
    archive.unlink()
    return work / archive.name.removesuffix(".tar.gz")


def compile_all(source: Path, build: Path, targets: list[str], log: Path, env: dict[str, str], say) -> None:
    """Configure and compile the given targets: with the tools 145 files, which take 6 minutes on 2 cores."""
    what, hint = "llama.cpp could not be compiled", f"read the log; then {AGAIN}"
    run(["cmake", "-S", source, "-B", build, "-G", "Ninja", *flags(), *toolkit(build.parent)], log, what, hint, env)
    # At most 16: a compiler takes up to 0.6 GB, and pods often show more cores than they may use.
    jobs = str(min(os.cpu_count() or 1, 16))
    run(["cmake", "--build", build, "-j", jobs, "--target", *targets], log, what, hint, env, progress(say))


def toolkit(work: Path) -> list[str]:
    """Return the arguments by which CMake finds CUDA in wheels, which have no lib64 and no unversioned libraries."""
    if not cuda():
        return []
    there = cuda_wheels(work)
    cudart, cublas = there / "lib/libcudart.so.13", there / "lib/libcublas.so.13"
    places = {"CMAKE_CUDA_COMPILER": there / "bin/nvcc", "CMAKE_CUDA_FLAGS": f"-L{there}/lib", "CUDA_CUDART": cudart}
    places |= {"CUDA_cudart_LIBRARY": cudart, "CUDA_cublas_LIBRARY": cublas}
    places |= {"CMAKE_EXE_LINKER_FLAGS": "-Wl,-rpath-link," + str(there / "lib")}
    return [f"-D{name}={place}" for name, place in places.items()]


def cuda_wheels(work: Path) -> Path:
    """Return the folder where `install_build_tools` has put the CUDA toolkit."""
    return next(work.glob("tools/lib/python3*/site-packages/nvidia/cu13"))


def compile_render(source: Path, build: Path, log: Path) -> None:
    """Compile llama-render (render.cpp) against the new libraries, with the compiler that CMake chose; it takes 4 s."""
    cache = (build / "CMakeCache.txt").read_text()
    cxx = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)[1]
    # clang++ of a Mac needs it when called by its path
    sdk = re.search(r"^CMAKE_OSX_SYSROOT:\w+=(/.+)$", cache, re.MULTILINE)
    headers = ["-isysroot", sdk[1]] if sdk else []
    headers += [f"-I{source / name}" for name in ("common", "include", "ggml/include", "vendor")]
    libraries = ["-L" + str(build / "bin"), "-lllama-common", "-lllama", "-lggml", "-lggml-base"]
    place = "-Wl,-rpath," + ("@loader_path" if MAC else "$ORIGIN")
    libraries += [f"-Wl,-rpath-link,{cuda_wheels(build.parent)}/lib"] if cuda() else []
    command = [cxx, "-std=c++17", "-O1", RENDER, *headers, *libraries, place, "-o", build / "bin" / "llama-render"]
    run(command, log, "llama-render could not be compiled", f"read the log; then {AGAIN}")


def progress(say):
    """Return a reader of ninja's `[12/240]` that prints one changing line on a terminal, else a line every 30 s."""
    started, last, terminal = time.monotonic(), [0.0], sys.stderr.isatty()

    def read(line: str) -> None:
        now = time.monotonic() - started
        found = re.match(r"\[(\d+)/(\d+)\]", line)
        if not found:
            return
        done, total = int(found[1]), int(found[2])
        if now - last[0] < (1 if terminal else 30) and done < total:
            return
        last[0] = now
        text = f"      compiled {done} of {total} files, {now:.0f} s, about {now * (total - done) / done:.0f} s to go"
        if terminal:
            sys.stderr.write(f"\r{text}\033[K" + ("\n" if done == total else ""))
        else:
            say(text)

    return read


def make_wheels(source: Path, built: Path, wheels: Path, only_wheel: bool, log: Path, env: dict[str, str]) -> None:
    """Build the wheels of llama_cpp_python and of gguf of this commit.

    llama_cpp_python takes the libraries that were just compiled, and does not compile them again.
    """
    libraries = source / "llama_cpp" / "lib"
    libraries.mkdir(exist_ok=True)
    for path in built.iterdir():  # copies libggml.so and libggml.so.0, not libggml.so.0.25.3: a wheel has no links
        if path.name != "libggml-cuda.so" and re.fullmatch(
            r"lib(llama|ggml[\w-]*)\.(so(\.\d+)?|(\d+\.)?dylib)", path.name
        ):
            shutil.copy(path, libraries / path.name)
    (source / ".gitignore").unlink(missing_ok=True)  # scikit-build-core omits what git ignores, such as these libraries
    os.rename(source / ".git", source.parent / "git")
    pip = [
        source.parent / "tools/bin/python",
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-cache-dir",
        "--no-build-isolation",
    ]
    command = [*pip, "--wheel-dir", wheels, source, *([] if only_wheel else [source / "vendor/llama.cpp/gguf-py"])]
    what = "the wheels of llama-cpp-python and gguf could not be made"
    run(command, log, what, f"read the log; then {AGAIN}", env | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"})


if __name__ == "__main__":
    try:
        print(folder() if "--print" in sys.argv else ensure())
    except KeyboardInterrupt:
        sys.exit(130)
