"""The environment of the side that runs models: which Python, which llama-cpp-python, and nothing of the other side."""

import ast
import contextlib
import http.server
import os
import platform
import re
import resource
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.commands import ROOT

SETUP = ROOT / "setup"
OURS = ("click", "contract", "deploy")


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The set-up's modules as on a machine without any build, index or Python but what a test gives it."""
    monkeypatch.syspath_prepend(str(SETUP))
    monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
    for name in ("FERRY_LLAMA_FLAGS", "FERRY_LLAMA_INDEX"):
        monkeypatch.delenv(name, raising=False)
    import env
    import interpreter
    import llamacpp
    import runtime

    monkeypatch.setattr(interpreter, "PYTHON_FOLDERS", ())
    return SimpleNamespace(env=env, interpreter=interpreter, llamacpp=llamacpp, runtime=runtime)


def refusal(text: str) -> tuple[str, str]:
    """The two lines of an error."""
    error, hint = text.strip().splitlines()
    assert error.startswith("error: ") and hint.startswith("next: ")
    return error, hint


def tool(folder: Path, name: str, script: str) -> str:
    """A command that a shell script stands in for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


# Which Python


@pytest.fixture
def handed_over(setup, monkeypatch, tmp_path):
    """Start with this Python, for the side that wants this one at least: the Python it goes on with (None: with itself)."""

    def hand_over(version: tuple, oldest: tuple = (3, 10)) -> str | None:
        class Started(Exception):
            pass

        def start(path, arguments):
            assert arguments == [path, *sys.argv]
            raise Started(path)

        monkeypatch.setattr(sys, "version_info", version)
        monkeypatch.setattr(os, "execv", start)
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        try:
            return setup.interpreter.switch_to_usable_python(oldest)
        except Started as started:
            return started.args[0]

    return hand_over


@pytest.mark.parametrize(("version", "oldest", "fits"), [((3, 10, 2), (3, 10), True), ((3, 14, 0), (3, 11), True), ((3, 10, 2), (3, 11), False)])  # fmt: skip
def test_the_side_that_runs_models_is_content_with_an_older_python(handed_over, version, oldest, fits):
    if fits:
        assert handed_over(version, oldest) is None
    else:
        with pytest.raises(SystemExit):
            handed_over(version, oldest)


@pytest.mark.parametrize(("system", "cure"), [("darwin", "brew install python@3.13   or: uv python install 3.13"), ("linux", "python3.12")])  # fmt: skip
def test_an_old_python_alone_is_refused_with_the_cure(handed_over, monkeypatch, capsys, system, cure):
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(SystemExit) as stop:
        handed_over((3, 9, 6))
    error, hint = refusal(capsys.readouterr().err)
    assert stop.value.code == 2
    assert "Python 3.10 to 3.14 is needed; this is 3.9.6" in error and cure in hint


def test_an_old_python_hands_over_to_one_on_path_that_works(handed_over, tmp_path):
    tool(tmp_path / "path", "python3.13", "exit 1")  # a pyenv name that only prints an error
    (tmp_path / "path" / "python3.12").write_bytes(b"\xcf\xfa\xed\xfe")  # made for another kind of machine
    (tmp_path / "path" / "python3.12").chmod(0o755)
    good = tool(tmp_path / "path", "python3.10", "exit 0")
    assert handed_over((3, 9, 6)) == good


def test_a_python_that_homebrew_has_is_found_though_it_is_not_on_path(handed_over, setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.interpreter, "PYTHON_FOLDERS", (str(tmp_path / "homebrew"),))
    good = tool(tmp_path / "homebrew", "python3.11", "exit 0")
    assert handed_over((3, 9, 6)) == good


def test_a_python_that_uv_has_is_found(handed_over, tmp_path):
    good = tool(tmp_path / "uv's", "python3", "exit 0")
    tool(tmp_path / "path", "uv", f'[ "$1 $2 $5" = "python find >=3.10,<=3.14.999" ] && echo "{good}"')
    assert handed_over((3, 9, 6)) == good


@pytest.fixture
def mac(setup, monkeypatch):
    """A Mac with the given processor, as the Python that runs sees it."""

    def be(machine: str, facts: dict[str, str]) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(setup.interpreter, "read_sysctl", lambda name: facts.get(name, ""))

    return be


@pytest.mark.parametrize("facts", [{"sysctl.proc_translated": "1"}, {"hw.optional.arm64": "1"}])
def test_an_intel_python_on_apple_silicon_is_refused_with_the_fix(handed_over, mac, capsys, tmp_path, facts):
    mac("x86_64", facts)
    tool(tmp_path / "path", "python3.12", 'case "$2" in *arm64*) exit 1;; esac')  # an Intel one too
    with pytest.raises(SystemExit):
        handed_over((3, 12, 1))
    error, hint = refusal(capsys.readouterr().err)
    assert "Intel one under Rosetta" in error and "/opt/homebrew/bin/brew install" in hint and "aarch64" in hint


def test_an_intel_python_on_apple_silicon_hands_over_to_one_made_for_it(handed_over, mac, tmp_path):
    mac("x86_64", {"hw.optional.arm64": "1"})
    tool(tmp_path / "path", "python3.12", 'case "$2" in *arm64*) exit 1;; esac')
    good = tool(tmp_path / "path", "python3.11", "exit 0")
    assert handed_over((3, 12, 1)) == good


@pytest.mark.parametrize(("machine", "facts"), [("arm64", {"hw.optional.arm64": "1"}), ("x86_64", {"hw.optional.arm64": "0"}), ("x86_64", {})])  # fmt: skip
def test_a_python_made_for_its_mac_is_left_alone(handed_over, mac, machine, facts):
    mac(machine, facts)
    assert handed_over((3, 12, 1)) is None


def test_the_question_for_the_processor_is_answered_by_a_real_python(setup):
    fits = setup.interpreter.is_usable_python
    assert fits(sys.executable, (3, 10)) and not fits(sys.executable, (3, 15))
    assert fits(sys.executable, (3, 10), apple_silicon=True) == (platform.machine() == "arm64")


@pytest.mark.parametrize("name", ["env.py", "shared.py", "command_line.py", "interpreter.py", "packages.py"])
def test_what_runs_before_the_version_check_is_old_syntax(name):
    ast.parse((SETUP / name).read_text(), feature_version=(3, 6))


@pytest.mark.parametrize(
    "check",
    [
        ["vermin", "--no-tips", "--violations", "-t=3.10-"],  # what is newer in the standard library
        ["ruff", "check", "--isolated", "--target-version", "py310", "--select", "E9"],  # newer syntax
    ],
)
def test_what_runs_on_a_mac_runs_on_python_3_10(check):
    command = [Path(sys.executable).with_name(check[0]), *check[1:], "cli", "common", "contract", "deploy", "setup"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# The environment


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The one that `make env` compiled on this machine."""
    command = [sys.executable, SETUP / "llamacpp.py", "--print"]
    folder = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return next((folder / "wheels").glob("llama_cpp_python-*.whl"))


@contextlib.contextmanager
def serving(folder: Path, *wheels: Path) -> Iterator[SimpleNamespace]:
    """A package index on loopback, laid out as the project's own: a page of links. `asked` lists the requests."""
    page = folder / "llama-cpp-python" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("".join(f'<a href="{path.name}">{path.name}</a><br>' for path in wheels))
    for path in wheels:
        (page.parent / path.name).symlink_to(path)
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
    finally:
        server.shutdown()
        server.server_close()


def oldest_python() -> str:
    """A Python 3.10 if there is one that has pip, else the one of these tests."""
    folders = os.environ["PATH"].split(os.pathsep)
    ask = "import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 10))"
    for path in (os.path.join(folder, "python3.10") for folder in folders):
        if os.access(path, os.X_OK) and subprocess.run([path, "-c", ask], capture_output=True).returncode == 0:
            return path
    return sys.executable


def start(venv: Path, **settings: str) -> subprocess.Popen:
    """What `make deploy-env` runs."""
    command = [oldest_python(), SETUP / "env.py", "--deploy", "--venv", venv]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **settings}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> SimpleNamespace:
    """Its exit code and what it said."""
    out, err = process.communicate()
    assert "Traceback" not in err, err
    return SimpleNamespace(code=process.returncode, out=out, err=err)


@pytest.fixture(scope="module")
def made(wheel, tmp_path_factory) -> SimpleNamespace:
    """A whole set-up, on a machine with no compiler and no build; killed once in the middle."""
    folder = tmp_path_factory.mktemp("deploy")
    (folder / "path").mkdir()
    venv = folder / "a folder" / "venv"
    with serving(folder / "index", wheel) as index:
        settings = {"PATH": str(folder / "path"), "FERRY_CACHE": str(folder / "cache"), "FERRY_LLAMA_INDEX": index.url}
        killed = start(venv, **settings)
        while not (venv / "pip-is-running").exists():
            assert killed.poll() is None, killed.stderr.read()
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        left = sorted(path.name for path in venv.iterdir())
        first, again = finish(start(venv, **settings)), finish(start(venv, **settings))
    return SimpleNamespace(venv=venv, left=left, first=first, again=again, asked=index.asked, url=index.url, log=folder / "cache" / "env.log")  # fmt: skip


def python(made, code: str) -> subprocess.CompletedProcess:
    """Run code in the environment, in the checkout."""
    return subprocess.run([made.venv / "bin" / "python", "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_a_set_up_that_was_killed_is_repaired_by_the_next(made):
    assert "ferry.json" not in made.left
    assert made.first.code == 0, made.first.err
    assert (made.venv / "ferry.json").exists() and not (made.venv / "pip-is-running").exists()


def test_a_ready_wheel_needs_no_compiler_and_says_where_it_is_from(made):
    assert f"done: a ready wheel from {made.url}" in made.first.out and made.first.out.endswith(": ready\n")
    assert "/llama-cpp-python/" in made.asked
    assert re.fullmatch(r"environment: .*, llama-cpp-python [\d.]+: all there\n", made.again.out)


def test_it_is_closed_and_holds_nothing_of_the_other_side(made):
    """Every package has what it asks for; nothing is there that was not pinned."""
    check = subprocess.run([made.venv / "bin" / "python", "-m", "pip", "check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout
    names = python(
        made, "import importlib.metadata as m; print(*{d.metadata['Name'].lower() for d in m.distributions()})"
    )
    there = {name.replace("_", "-") for name in names.stdout.split()}
    pinned = set(re.findall(r"^([a-z0-9.-]+)==", (SETUP / "locks" / "deploy.txt").read_text(), re.MULTILINE))
    assert there <= pinned | {"pip", "setuptools", "llama-cpp-python"}
    assert not there & {"torch", "transformers", "datasets", "unsloth", "gguf"} and "numpy" in there


def test_everything_that_the_side_imports_is_there(made):
    files = [
        path for name in ("deploy", "contract") for path in (ROOT / name).rglob("*.py") if path.name != "__main__.py"
    ]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    for path in files:  # inside functions too
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules |= {*names, node.module} if isinstance(node, ast.ImportFrom) else set(names)
    assert {"llama_cpp", "huggingface_hub", "starlette.applications", "deploy.stages.pull"} <= modules
    code = f"import importlib\nfor name in {sorted(modules)}: importlib.import_module(name)"
    done = python(made, code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("before", ["a file where the folder should be", "thesis.txt"])
def test_a_place_where_it_cannot_be_is_said_with_the_way_to_name_another(tmp_path, before):
    venv = tmp_path / "file" / "venv" if before.startswith("a file") else tmp_path
    (tmp_path / "file").touch()
    done = finish(start(venv, FERRY_CACHE=str(tmp_path.parent / "cache")))
    assert done.code == 2 and "DEPLOY_VENV=/some/other/folder" in refusal(done.err)[1]


def test_no_network_is_one_error(tmp_path):
    nowhere = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_RETRIES": "0",
        "PIP_FIND_LINKS": "",
        "PIP_NO_CACHE_DIR": "1",
    }
    done = finish(start(tmp_path / "venv", FERRY_CACHE=str(tmp_path / "cache"), **nowhere))
    assert done.code == 2 and done.err.count("error: ") == 1
    assert "the python packages could not be installed" in done.err
    assert done.err.endswith("next: check the network (and pip config list), then make deploy-env\n")
    assert not (tmp_path / "venv" / "ferry.json").exists()


@pytest.mark.parametrize("megabytes", [1e-6, 3])
def test_a_disk_that_fills_up_on_the_way_is_one_error(tmp_path, monkeypatch, megabytes):
    """A limit on a file's size stands in for it: for the set-up's own log, and for what pip unpacks."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6), limits[1]))
    try:
        process = start(tmp_path / "venv", FERRY_CACHE=str(tmp_path / "cache"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    done = finish(process)
    assert done.code == 2 and done.err.count("error: ") == 1 and "File too large" in done.err
    assert done.err.endswith("next: free some disk, then make deploy-env\n")
    assert not (tmp_path / "venv" / "ferry.json").exists()


def test_the_other_sides_environment_serves_this_one_and_keeps_its_torch(setup, monkeypatch, capsys, tmp_path):
    (tmp_path / "lib/python3.12/site-packages/torch").mkdir(parents=True)
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("bin/python", "llama.cpp/build.json"):
        (tmp_path / name).touch()
    setup.env.write_record(str(tmp_path / "ferry.json"), setup.env.expected_record("train"))
    monkeypatch.setattr(sys, "argv", ["env.py", "--deploy", "--venv", str(tmp_path)])
    setup.env.main()
    assert "all there" in capsys.readouterr().out
    locks = [set((SETUP / "locks" / f"{name}.txt").read_text().splitlines()) for name in ("cpu", "deploy")]
    names = [{line.split("==")[0] for line in lock} for lock in locks]
    assert names[1] - names[0] <= {"exceptiongroup", "tomli"}, "what Python 3.10 needs"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ".venv-deploy"),
        ({"FERRY_VENV": "/a/venv"}, "/a/venv"),
        ({"FERRY_VENV": "/a/venv", "FERRY_DEPLOY_VENV": "/another"}, "/another"),
    ],
)
def test_it_has_a_folder_of_its_own_unless_one_was_asked_for(monkeypatch, environment, expected):
    from cli import environment as module

    for name in ("FERRY_VENV", "FERRY_DEPLOY_VENV"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert module.environment_folders()["deploy"].folder == ROOT / expected


def test_make_hands_the_folder_on(tmp_path):
    """VENV= of make, typed or of the environment, is the command's FERRY_VENV."""
    done = subprocess.run(
        ["make", "-s", "deploy-env", f"VENV={tmp_path}/venv", "PYTHON=printenv FERRY_VENV #"], cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert done.stdout.strip() == f"{tmp_path}/venv", done.stderr


# llama-cpp-python


def changed(wheel: Path, folder: Path, path: str = "nothing", text: str = "", name: str | None = None) -> Path:
    """The wheel with other content under a path, or under another file name."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(folder / (name or wheel.name), "w") as new:
        for item in old.infolist():
            new.writestr(item, text if item.filename.startswith(path) else old.read(item))
    return folder / (name or wheel.name)


@pytest.fixture
def get(wheel, setup, made, monkeypatch, tmp_path):
    """Set up llama-cpp-python in the environment; what was said, where it came from, how often it was compiled."""
    compiled = []

    def ensure(say, only_wheel):
        assert only_wheel
        compiled.append(1)
        return wheel.parent.parent

    def set_up() -> SimpleNamespace:
        said = []
        with monkeypatch.context() as patch:
            patch.setattr(setup.llamacpp, "ensure_build", ensure)
            source = setup.runtime.install_runtime(str(made.venv), str(tmp_path / "log"), said.append)
        assert setup.runtime.find_runtime_fault(str(made.venv), gpu=False) is None
        return SimpleNamespace(said=" ".join(said), source=source, compiled=len(compiled))

    return set_up


def test_a_wheel_compiled_before_is_taken_and_nothing_is_asked(wheel, setup, get, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.llamacpp, "find_build", lambda: wheel.parent.parent)
    with serving(tmp_path / "index", wheel) as index:
        monkeypatch.setenv("FERRY_LLAMA_INDEX", index.url)
        done = get()
    assert (done.source, done.compiled, done.said, index.asked) == ("compiled on this machine before", 0, "", [])


def test_builds_of_both_kinds_are_found_again_and_one_of_another_version_is_not(setup, monkeypatch):
    llamacpp = setup.llamacpp
    with monkeypatch.context() as patch:
        patch.setattr(llamacpp, "compiler_version", lambda: pytest.fail("no build is there, so none is asked for"))
        assert llamacpp.find_build() is None
    other = llamacpp.build_folder().with_name("0.1.0-12345678")
    for folder in (other, llamacpp.build_folder(only_wheel=True), llamacpp.build_folder()):
        folder.mkdir(parents=True)
        (folder / "build.json").touch()
        assert llamacpp.find_build() == (None if folder == other else folder)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("another version", "has no llama-cpp-python {version} for this machine"),
        ("another machine", "has no llama-cpp-python {version} for this machine"),
        ("only a source", "has no llama-cpp-python {version} for this machine"),
        ("not there", "does not answer"),
        ("mislabelled", "says that it is version 0.3.1"),
        ("broken", "cannot be loaded"),
        ("no wheel at all", "failed: "),
    ],
)
def test_a_ready_wheel_that_will_not_do_is_said_in_one_line_and_compiled_instead(
    wheel, setup, get, monkeypatch, tmp_path, case, why
):
    good, version = wheel, setup.llamacpp.version()
    for name in (good.name, f"llama_cpp_python-{version}.tar.gz"):
        (tmp_path / name).write_text("<html>503</html>")
    offered = {
        "another version": lambda: [changed(good, tmp_path, name=good.name.replace(version, "0.3.1"))],
        "another machine": lambda: [changed(good, tmp_path, name=good.name.replace("linux_x86_64", "win_amd64"))],
        "not there": list,
        "only a source": lambda: [tmp_path / f"llama_cpp_python-{version}.tar.gz"],
        "mislabelled": lambda: [changed(good, tmp_path, "llama_cpp/__init__", "__version__ = '0.3.1'\ndef llama_supports_gpu_offload(): ...")],
        "broken": lambda: [changed(good, tmp_path, "llama_cpp/lib", "not a library")],
        "no wheel at all": lambda: [tmp_path / good.name],
    }  # fmt: skip
    with serving(tmp_path / "index", *offered[case]()) as index:
        address = "http://127.0.0.1:9/whl" if case == "not there" else index.url
        monkeypatch.setenv("FERRY_LLAMA_INDEX", address)
        done = get()
    assert re.fullmatch(rf" +no ready wheel: .*{re.escape(address)} {re.escape(why.format(version=version))}.*; compiled instead, once for this machine", done.said)  # fmt: skip
    assert done.compiled == 1 and done.source.startswith("compiled here in ")


def test_on_a_mac_a_wheel_without_metal_will_not_do(wheel, setup, get, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.llamacpp, "IS_MAC", True)
    with serving(tmp_path / "index", wheel) as index:
        monkeypatch.setenv("FERRY_LLAMA_INDEX", index.url)
        done = get()
    assert "computes on the CPU only" in done.said and done.compiled == 1


@pytest.mark.parametrize(("name", "value"), [("FERRY_LLAMA_INDEX", ""), ("FERRY_LLAMA_FLAGS", "-DGGML_CUDA=ON")])
def test_who_wants_no_ready_wheel_gets_none(get, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    done = get()
    assert f"no ready wheel: {name} is set to '{value}'" in done.said and done.compiled == 1


def test_no_wheel_and_no_compiler_is_one_error(setup, made, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FERRY_LLAMA_INDEX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup.llamacpp, "IS_MAC", True)
    with pytest.raises(SystemExit):
        setup.runtime.install_runtime(str(made.venv), str(tmp_path / "log"), lambda _: None)
    error, hint = refusal(capsys.readouterr().err)
    assert "no C++ compiler" in error and "xcode-select --install" in hint


@pytest.mark.parametrize(
    ("mac", "machine", "instructions", "cuda", "expected"),
    [
        (True, "arm64", "Apple M3 Pro", None, "metal"),
        (True, "x86_64", "Intel Core i7", None, None),
        (False, "x86_64", "avx avx2 bmi2 f16c fma", None, "cpu"),
        (False, "x86_64", "avx", None, None),
        (False, "aarch64", "asimd fp", None, None),
        (False, "x86_64", "avx avx2 bmi2 f16c fma", "12.4", "cu124"),
        (False, "x86_64", "avx avx2 bmi2 f16c fma", "12.9", "cu125"),
        (False, "x86_64", "avx avx2 bmi2 f16c fma", "11.2", "cpu"),
    ],
)
def test_each_machine_asks_the_index_that_has_a_wheel_for_it(
    setup, monkeypatch, tmp_path, mac, machine, instructions, cuda, expected
):
    monkeypatch.setattr(setup.llamacpp, "IS_MAC", mac)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(setup.llamacpp, "cpu_features", lambda: instructions)
    monkeypatch.setenv("PATH", str(tmp_path))
    if cuda:
        tool(tmp_path, "nvidia-smi", f"echo '| NVIDIA-SMI 550.54  Driver Version: 550.54.15  CUDA Version: {cuda}  |'")
    address = setup.runtime.wheel_index()
    assert address == (f"https://abetlen.github.io/llama-cpp-python/whl/{expected}" if expected else None)
    assert address or f"({machine})" in setup.runtime.explain_no_index()
