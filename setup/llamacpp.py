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

from packages import detect_device, gpu_capabilities, read_lock
from shared import NETWORK_HINT, SETUP_COMMAND, cache_folder, ensure_writable_folder, fail, run_or_fail

RECIPE = 2  # increase it when this file builds something else from the same inputs
# Bytes. Measured: sdist 77 MB, unpacked 232 MB, build 60 MB, result 110 MB; the rest is reserve. nvcc alone is 0.84 GB.
DISK = 700e6 if detect_device() == "cpu" else 4e9
RENDER_SOURCE = Path(__file__).with_name("render.cpp")
TOOLS = ["llama-quantize", "llama-imatrix", "llama-perplexity"]
IS_MAC = sys.platform == "darwin"
# For a build that is not for the GPUs of this machine: T4, A100 (its code runs on A10 and L4), H100, B200, RTX 50.
DEFAULT_CAPABILITIES = "75;80;90;100;120"
NO_AMX = "-U__AMX_INT8__"  # the macro that the kernels test; unlike -mno-amx-int8, every compiler accepts this flag


def version() -> str:
    """Return the pinned version of llama-cpp-python, which `make lock` takes from pyproject.toml."""
    return re.search(r"^llama-cpp-python==([\w.]+)$", read_lock("build"), re.MULTILINE)[1]


def cuda_capabilities() -> str:
    """Return the compute capabilities to compile for, such as 90 or 80;90; empty without a GPU."""
    return (
        (os.environ.get("FERRY_CUDA") or gpu_capabilities() or DEFAULT_CAPABILITIES)
        if detect_device() == "cuda"
        else ""
    )


def cmake_flags() -> list[str]:
    """Return the arguments of CMake.

    The libraries find each other relative to their own folder, so that it can be moved and packed.
    """
    definitions = ["CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "CMAKE_BUILD_WITH_INSTALL_RPATH=ON"]
    # In an environment llama_cpp finds the CUDA libraries that torch uses. The tools get their path from
    # pipeline/toolchain/llama_tools.py.
    cuda_rpath = ";$ORIGIN/../../nvidia/cu13/lib" if cuda_capabilities() else ""
    definitions += ["CMAKE_INSTALL_RPATH=" + ("@loader_path" if IS_MAC else "$ORIGIN" + cuda_rpath)]
    definitions += ["LLAMA_OPENSSL=OFF", "GGML_CCACHE=OFF"]
    definitions += [f"LLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP")]
    # Without NO_VMM the driver's library is linked, and nothing loads on a machine without a driver (docker build).
    definitions += (
        [f"CMAKE_CUDA_ARCHITECTURES={cuda_capabilities()}", "GGML_CUDA=ON", "GGML_CUDA_NCCL=OFF", "GGML_CUDA_NO_VMM=ON"]
        if cuda_capabilities()
        else []
    )
    definitions += ["GGML_METAL_EMBED_LIBRARY=ON"] if IS_MAC else []
    definitions += [f"CMAKE_{language}_FLAGS={NO_AMX}" for language in ("C", "CXX")] if native_build_uses_amx() else []
    return ["-D" + flag for flag in definitions] + os.environ.get("FERRY_LLAMA_FLAGS", "").split()


def native_build_uses_amx() -> bool:
    """Return whether `-march=native` would compile llama.cpp's AMX kernels on this machine.

    GCC 12 drops half of their tile configuration as dead stores (its `_tile_loadconfig` claims to read 8 of 64 bytes),
    and the first matrix multiplication then ends the process with a general protection fault.
    """
    return (
        not IS_MAC
        and "amx_tile" in cpu_features().split()
        and "-DGGML_NATIVE=OFF" not in os.environ.get("FERRY_LLAMA_FLAGS", "")
    )


def compiler_version() -> str:
    """Return the first line of the C++ compiler's --version. Exit when there is no compiler."""
    for name in filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]):
        if path := shutil.which(name):
            result = subprocess.run([path, "--version"], capture_output=True, text=True)
            if result.returncode == 0:  # a Mac without Xcode's tools has a c++ that only prints that they are missing
                return result.stdout.splitlines()[0]
    install_command = (
        "xcode-select --install" if IS_MAC else "sudo apt-get install g++   (or your system's C++ compiler)"
    )
    fail(
        "no C++ compiler: llama.cpp must be compiled once, and c++, g++ and clang++ are not on PATH",
        f"{install_command}, then {SETUP_COMMAND}",
    )


def cpu_features() -> str:
    """Return the instruction sets of this processor, which a native build depends on; on a Mac its name."""
    if IS_MAC:
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    try:
        match = re.search(r"^(flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return " ".join(sorted(match[2].split())) if match else "unknown"


def build_key() -> str:
    """Return eight hex digits of the hash of all that the result depends on."""
    is_native = "-DGGML_NATIVE=OFF" not in cmake_flags()
    render_hash = hashlib.sha256(RENDER_SOURCE.read_bytes()).hexdigest()
    parts = [
        version(),
        cmake_flags(),
        RECIPE,
        render_hash,
        compiler_version(),
        sys.platform,
        platform.machine(),
        cpu_features() if is_native else "portable",
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def build_folder(only_wheel: bool = False) -> Path:
    """Return the folder of the build for this machine, which may not exist yet."""
    return Path(cache_folder()) / "llama.cpp" / (f"{version()}-{build_key()}" + ("-wheel" if only_wheel else ""))


def is_complete(path: Path) -> bool:
    """Return whether the folder holds a complete build: build.json is written last, before the folder gets its name."""
    return (path / "build.json").is_file()


def find_build() -> Path | None:
    """Return a complete build for this machine, with or without the tools; None when there is none.

    When no build of this version exists, the compiler is not asked for its version: on a Mac without a compiler that
    opens a window.
    """
    if not list((Path(cache_folder()) / "llama.cpp").glob(f"{version()}-*")):
        return None
    return next(filter(is_complete, (build_folder(), build_folder(only_wheel=True))), None)


@contextmanager
def hold_lock(path: Path, say):
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
    last_said = 0.0
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - last_said > 30 or not last_said:
                last_said = time.monotonic()
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


def print_progress(text: str) -> None:
    """Print progress on stderr, because stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def ensure_build(say=print_progress, only_wheel: bool = False) -> Path:
    """Return the folder of a complete build; build it first when it is missing."""
    target = build_folder(only_wheel)
    if is_complete(target):
        return target
    ensure_writable_folder(str(target.parent), f"FERRY_CACHE=/some/other/folder {SETUP_COMMAND}")
    with hold_lock(target.parent / "lock", say):
        if not is_complete(target):
            build_llama_cpp(target, say, only_wheel)
    return target


def build_llama_cpp(target: Path, say, only_wheel: bool) -> None:
    """Build in a temporary folder beside the target, and rename it at the end. The caller holds the lock of the target.

    Exit when the disk is full.
    """
    remove_unfinished_builds(target.parent)
    if (free := shutil.disk_usage(target.parent).free) < DISK:
        fail(
            f"too little disk: {free / 1e9:.1f} GB free in {target.parent}, {DISK / 1e9:.1f} GB needed for llama.cpp",
            f"FERRY_CACHE=/a/bigger/disk {SETUP_COMMAND}",
        )
    log = target.parent / f"{target.name}.log"
    log.unlink(missing_ok=True)
    work_folder = Path(tempfile.mkdtemp(prefix=target.name + ".part-", dir=target.parent))
    started = time.monotonic()
    try:
        commit = build_in_folder(work_folder, log, say, only_wheel)
        record = {
            "version": version(),
            "commit": commit,
            "flags": cmake_flags(),
            "compiler": compiler_version(),
            "recipe": RECIPE,
        }
        record["seconds"] = round(time.monotonic() - started)
        (work_folder / "out" / "build.json").write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(work_folder / "out", target)
    except OSError as error:
        fail(
            f"llama.cpp could not be built: {error}",
            f"free some disk, or FERRY_CACHE=/some/other/folder {SETUP_COMMAND}",
        )
    finally:
        shutil.rmtree(work_folder, ignore_errors=True)


def remove_unfinished_builds(folder: Path) -> None:
    """Remove the temporary folders of killed builds of this version, which have the exact name that the build gives.

    No process uses them, because the caller holds the lock.
    """
    name_pattern = re.compile(re.escape(version()) + r"-[0-9a-f]{8}(-wheel)?\.part-\w+")
    for path in folder.glob(f"{version()}-*.part-*"):
        if name_pattern.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def build_in_folder(work_folder: Path, log: Path, say, only_wheel: bool) -> str:
    """Download, compile and collect the result in `work`/out; return the commit of llama.cpp."""
    result_folder, compile_folder = work_folder / "out", work_folder / "build"
    result_folder.mkdir()
    environment = install_build_tools(work_folder, log)
    source = download_source(work_folder, log, environment)
    vendored = source / "vendor" / "llama.cpp"
    commit = (source / ".git/modules/vendor/llama.cpp/HEAD").read_text().strip()
    compile_targets(vendored, compile_folder, ["llama"] if only_wheel else ["llama", *TOOLS], log, environment, say)
    if not only_wheel:
        compile_render_tool(vendored, compile_folder, log)
        shutil.copytree(compile_folder / "bin", result_folder / "bin", symlinks=True)
    build_wheels(source, compile_folder / "bin", result_folder / "wheels", only_wheel, log, environment)
    if not only_wheel:
        move_converter(vendored, result_folder)
    shutil.copy(vendored / "LICENSE", result_folder)
    shutil.copytree(vendored / "licenses", result_folder / "licenses")
    return commit


def move_converter(vendored: Path, result_folder: Path) -> None:
    """Move the parts of the source that are used uncompiled into the result."""
    (result_folder / "convert").mkdir()
    for name in ("convert_hf_to_gguf.py", "conversion", "gguf-py"):
        os.rename(vendored / name, result_folder / "convert" / name)
    os.rename(vendored / "models", result_folder / "models")


def install_build_tools(work_folder: Path, log: Path) -> dict[str, str]:
    """Install the pinned build tools into a virtual environment; return the environment variables to run them.

    For a GPU these include nvcc and CUDA's headers, which PyPI has too.
    """
    venv_message = "Python cannot make a virtual environment"
    run_or_fail(
        [sys.executable, "-m", "venv", work_folder / "tools"],
        log,
        venv_message,
        f"install Python's venv module, then {SETUP_COMMAND}",
    )
    pins = [
        line for name in ("build", "nvcc")[: 2 if cuda_capabilities() else 1] for line in read_lock(name).splitlines()
    ]
    pins = [line for line in pins if line and not line.startswith(("#", "llama-cpp-python=="))]
    pip = [work_folder / "tools/bin/python", "-m", "pip", "install", "--no-deps", *pins]
    run_or_fail(pip, log, "the tools that compile llama.cpp could not be installed", NETWORK_HINT)
    return os.environ | {"PATH": f"{work_folder / 'tools' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}


def download_source(work_folder: Path, log: Path, environment: dict[str, str]) -> Path:
    """Download and unpack the sdist; return its folder.

    pip also asks the sdist for its metadata, which takes 7 s.
    """
    name = f"llama-cpp-python=={version()}"
    pip = [work_folder / "tools/bin/python", "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
    pip += ["--no-binary", "llama-cpp-python"]
    run_or_fail(
        [*pip, "--dest", work_folder, name],
        log,
        f"the source of {name} cannot be downloaded",
        NETWORK_HINT,
        environment,
    )
    (archive,) = work_folder.glob("llama_cpp_python-*.tar.gz")
    shutil.unpack_archive(archive, work_folder)
    archive.unlink()
    return work_folder / archive.name.removesuffix(".tar.gz")


def compile_targets(source: Path, build: Path, targets: list[str], log: Path, environment: dict[str, str], say) -> None:
    """Configure and compile the given targets: with the tools 145 files, which take 6 minutes on 2 cores."""
    message, hint = "llama.cpp could not be compiled", f"read the log; then {SETUP_COMMAND}"
    run_or_fail(
        ["cmake", "-S", source, "-B", build, "-G", "Ninja", *cmake_flags(), *cuda_cmake_flags(build.parent)],
        log,
        message,
        hint,
        environment,
    )
    # At most 16: a compiler takes up to 0.6 GB, and pods often show more cores than they may use.
    jobs = str(min(os.cpu_count() or 1, 16))
    run_or_fail(
        ["cmake", "--build", build, "-j", jobs, "--target", *targets],
        log,
        message,
        hint,
        environment,
        create_progress_printer(say),
    )


def cuda_cmake_flags(work_folder: Path) -> list[str]:
    """Return the arguments by which CMake finds CUDA in wheels, which have no lib64 and no unversioned libraries."""
    if not cuda_capabilities():
        return []
    toolkit_folder = cuda_toolkit_folder(work_folder)
    cudart, cublas = toolkit_folder / "lib/libcudart.so.13", toolkit_folder / "lib/libcublas.so.13"
    definitions = {
        "CMAKE_CUDA_COMPILER": toolkit_folder / "bin/nvcc",
        "CMAKE_CUDA_FLAGS": f"-L{toolkit_folder}/lib",
        "CUDA_CUDART": cudart,
    }
    definitions |= {"CUDA_cudart_LIBRARY": cudart, "CUDA_cublas_LIBRARY": cublas}
    definitions |= {"CMAKE_EXE_LINKER_FLAGS": "-Wl,-rpath-link," + str(toolkit_folder / "lib")}
    return [f"-D{name}={path}" for name, path in definitions.items()]


def cuda_toolkit_folder(work_folder: Path) -> Path:
    """Return the folder where `install_build_tools` has put the CUDA toolkit."""
    return next(work_folder.glob("tools/lib/python3*/site-packages/nvidia/cu13"))


def compile_render_tool(source: Path, build: Path, log: Path) -> None:
    """Compile llama-render (render.cpp) against the new libraries, with the compiler that CMake chose; it takes 4 s."""
    cache = (build / "CMakeCache.txt").read_text()
    compiler_path = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)[1]
    # clang++ of a Mac needs it when called by its path
    sdk = re.search(r"^CMAKE_OSX_SYSROOT:\w+=(/.+)$", cache, re.MULTILINE)
    headers = ["-isysroot", sdk[1]] if sdk else []
    headers += [f"-I{source / name}" for name in ("common", "include", "ggml/include", "vendor")]
    libraries = ["-L" + str(build / "bin"), "-lllama-common", "-lllama", "-lggml", "-lggml-base"]
    rpath_flag = "-Wl,-rpath," + ("@loader_path" if IS_MAC else "$ORIGIN")
    libraries += [f"-Wl,-rpath-link,{cuda_toolkit_folder(build.parent)}/lib"] if cuda_capabilities() else []
    command = [
        compiler_path,
        "-std=c++17",
        "-O1",
        RENDER_SOURCE,
        *headers,
        *libraries,
        rpath_flag,
        "-o",
        build / "bin" / "llama-render",
    ]
    run_or_fail(command, log, "llama-render could not be compiled", f"read the log; then {SETUP_COMMAND}")


def create_progress_printer(say):
    """Return a reader of ninja's `[12/240]` that prints one changing line on a terminal, else a line every 30 s."""
    started, last_print, is_terminal = time.monotonic(), [0.0], sys.stderr.isatty()

    def report_line(line: str) -> None:
        spent = time.monotonic() - started
        match = re.match(r"\[(\d+)/(\d+)\]", line)
        if not match:
            return
        done, total = int(match[1]), int(match[2])
        if spent - last_print[0] < (1 if is_terminal else 30) and done < total:
            return
        last_print[0] = spent
        text = (
            f"      compiled {done} of {total} files, {spent:.0f} s, about {spent * (total - done) / done:.0f} s to go"
        )
        if is_terminal:
            sys.stderr.write(f"\r{text}\033[K" + ("\n" if done == total else ""))
        else:
            say(text)

    return report_line


def build_wheels(
    source: Path, built: Path, wheels: Path, only_wheel: bool, log: Path, environment: dict[str, str]
) -> None:
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
    message = "the wheels of llama-cpp-python and gguf could not be made"
    run_or_fail(
        command, log, message, f"read the log; then {SETUP_COMMAND}", environment | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    )


if __name__ == "__main__":
    try:
        print(build_folder() if "--print" in sys.argv else ensure_build())
    except KeyboardInterrupt:
        sys.exit(130)
