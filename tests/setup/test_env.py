"""The set-up: what it refuses, what it remembers, and that a half-finished one is never taken for a whole one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SETUP = Path(__file__).resolve().parents[2] / "setup"
LOCKS = sorted((SETUP / "locks").glob("*.txt"))


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The set-up's modules, with a cache of their own."""
    monkeypatch.syspath_prepend(str(SETUP))
    monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FERRY_LLAMA_FLAGS", raising=False)
    import env
    import interpreter
    import llamacpp
    import lock
    import packages

    return SimpleNamespace(env=env, interpreter=interpreter, llamacpp=llamacpp, lock=lock, packages=packages)


def script(name, *arguments, **environment):
    """Run one of the scripts as make does."""
    command = [sys.executable, SETUP / name, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def refusal(capsys):
    """The two lines of an error."""
    error, hint = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and hint.startswith("next: ")
    return error, hint


@pytest.mark.parametrize("name", ["env.py", "llamacpp.py"])
def test_no_compiler_is_said_in_one_line(name, tmp_path):
    arguments = ["--venv", str(tmp_path / "venv")] if name == "env.py" else []
    done = script(name, *arguments, PATH=str(tmp_path), CXX="", FERRY_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: no C++ compiler") and "install" in hint
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("name", ["env.py", "llamacpp.py"])
def test_an_unwritable_cache_is_said_in_one_line(name, tmp_path):
    (tmp_path / "cache").write_text("a file, because root may write to any folder")
    arguments = ["--venv", str(tmp_path / "venv")] if name == "env.py" else []
    done = script(name, *arguments, FERRY_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2
    error, hint = done.stderr.strip().splitlines()
    assert str(tmp_path / "cache") in error and "FERRY_CACHE=" in hint


def test_too_little_disk_is_said_before_anything_is_built(setup, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(setup.llamacpp, "DISK", 1e18)
    with pytest.raises(SystemExit):
        setup.llamacpp.ensure_build()
    assert "too little disk" in refusal(capsys)[0]
    for side in setup.env.DISK:
        monkeypatch.setitem(setup.env.DISK, side, 1e18)
        with pytest.raises(SystemExit):
            setup.env.refuse_full_disk(str(tmp_path), side, str(tmp_path), setup.llamacpp)
        assert "too little disk" in refusal(capsys)[0]


def test_a_failing_command_shows_its_last_words_and_its_log(setup, capsys, tmp_path):
    command = [sys.executable, "-c", "print('ERROR: no matching distribution'); raise SystemExit(1)"]
    with pytest.raises(SystemExit) as stop:
        setup.packages.run_or_fail(command, tmp_path / "log", "torch could not be installed", "check the network")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert (
        "no matching distribution" in said
        and str(tmp_path / "log") in said
        and said.endswith("next: check the network\n")
    )


def test_the_key_follows_everything_the_build_depends_on(setup, monkeypatch, tmp_path):
    llamacpp = setup.llamacpp
    first = llamacpp.build_key()
    assert llamacpp.build_key() == first and re.fullmatch("[0-9a-f]{8}", first)
    keys = {first}
    (tmp_path / "render.cpp").write_text("int main() {}")
    with monkeypatch.context() as patch:
        patch.setattr(llamacpp, "RENDER_SOURCE", tmp_path / "render.cpp")
        keys.add(llamacpp.build_key())
    for name, value in (("version", "9.9.9"), ("compiler_version", "other 1.0"), ("cpu_features", "sse")):
        with monkeypatch.context() as patch:
            patch.setattr(llamacpp, name, lambda value=value: value)
            keys.add(llamacpp.build_key())
    with monkeypatch.context() as patch:
        patch.setattr(llamacpp, "RECIPE", llamacpp.RECIPE + 1)
        keys.add(llamacpp.build_key())
    monkeypatch.setenv("FERRY_LLAMA_FLAGS", "-DGGML_CUDA=ON")
    keys.add(llamacpp.build_key())
    assert len(keys) == 7


def test_a_portable_build_has_the_same_key_on_every_processor(setup, monkeypatch):
    monkeypatch.setenv("FERRY_LLAMA_FLAGS", "-DGGML_NATIVE=OFF")
    first = setup.llamacpp.build_key()
    monkeypatch.setattr(setup.llamacpp, "cpu_features", lambda: "another processor")
    assert setup.llamacpp.build_key() == first


@pytest.fixture
def fake_build(setup, monkeypatch):
    """llamacpp with the slow parts replaced; `compiled` counts the compiles."""
    llamacpp = setup.llamacpp
    llamacpp.compiled = 0

    def download(work, *_):
        vendored = work / "source" / "vendor" / "llama.cpp"
        for folder in ("conversion", "gguf-py", "models", "licenses"):
            (vendored / folder).mkdir(parents=True)
        (vendored / "convert_hf_to_gguf.py").touch()
        (vendored / "LICENSE").touch()
        head = work / "source" / ".git/modules/vendor/llama.cpp/HEAD"
        head.parent.mkdir(parents=True)
        head.write_text("0c1e\n")
        return work / "source"

    def compile_all(source, build, *_):
        llamacpp.compiled += 1
        (build / "bin").mkdir(parents=True)

    monkeypatch.setattr(llamacpp, "install_build_tools", lambda *_: {})
    monkeypatch.setattr(llamacpp, "download_source", download)
    monkeypatch.setattr(llamacpp, "compile_targets", compile_all)
    monkeypatch.setattr(llamacpp, "compile_render_tool", lambda *_: None)
    monkeypatch.setattr(llamacpp, "build_wheels", lambda source, built, wheels, *_: wheels.mkdir())
    return llamacpp


def test_a_build_is_kept_and_used_again(fake_build):
    target = fake_build.ensure_build()
    assert target == fake_build.ensure_build() == fake_build.build_folder() and fake_build.compiled == 1
    assert {path.name for path in target.iterdir()} == {
        "bin",
        "convert",
        "models",
        "wheels",
        "LICENSE",
        "licenses",
        "build.json",
    }
    assert json.loads((target / "build.json").read_text())["commit"] == "0c1e"


def test_an_interrupted_build_leaves_nothing_taken_for_complete(fake_build, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fake_build, "compile_targets", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fake_build.ensure_build()
    target = fake_build.build_folder()
    assert not target.exists() and not list(target.parent.glob("*.part-*"))
    assert fake_build.is_complete(fake_build.ensure_build())


def test_a_killed_build_is_cleared_away_by_the_next(fake_build):
    target = fake_build.build_folder()
    left = target.parent / (target.name + ".part-abc") / "out"
    left.mkdir(parents=True)
    (left / "build.json").write_text("{}")
    target.mkdir()  # even a folder of the right name counts only with its build.json
    assert not fake_build.is_complete(target)
    fake_build.ensure_build()
    assert fake_build.compiled == 1 and fake_build.is_complete(target) and not left.exists()


def test_two_set_ups_build_once(setup, tmp_path):
    """The second waits for the lock, then finds the first one's work."""
    code = (
        "import llamacpp, sys, time, pathlib\n"
        "def build(target, say, only_wheel):\n"
        "    time.sleep(0.3); target.mkdir(); (target / 'build.json').touch(); print('built')\n"
        "llamacpp.build_llama_cpp = build\n"
        "llamacpp.ensure_build()\n"
    )
    start = [sys.executable, "-c", code]
    both = [subprocess.Popen(start, cwd=SETUP, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate()[0] for process in both) == ["", "built\n"]


def test_the_lock_outlives_its_holder_while_what_it_started_runs(setup, tmp_path):
    """A killed set-up leaves a pip behind that still writes: the next one waits for it."""
    code = (
        "import llamacpp, shared, os, sys\n"
        "with llamacpp.hold_lock(sys.argv[1], print):\n"
        "    child = [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(1)']\n"
        "    shared.run_or_fail(child, sys.argv[2], '', '', each_line=lambda line: os.kill(os.getpid(), 9))\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "lock", tmp_path / "log"], cwd=SETUP)
    said = []
    with setup.llamacpp.hold_lock(tmp_path / "lock", said.append):
        assert len(said) == 1 and re.fullmatch(
            r"another set-up is running \(pid \d+, .*, for \d s\): waiting for it", said[0]
        )


def test_the_record_is_gone_while_an_environment_is_changed(setup, monkeypatch, tmp_path):
    env = setup.env
    want = env.expected_record("train")
    venv = tmp_path / "venv"
    for part in ("bin/python", "llama.cpp/build.json"):
        (venv / part).parent.mkdir(parents=True)
        (venv / part).touch()
    env.write_record(str(venv / "ferry.json"), {**want, "python": "3.12.1"})
    assert env.is_ready(str(venv), "train", want)
    for changed in ({"locks": {}}, {"llama.cpp": {"version": "0", "key": "0"}}):
        assert not env.is_ready(str(venv), "train", {**want, **changed})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "make_venv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        env.set_up_environment(str(venv), "train", want, "log")
    assert not env.is_ready(str(venv), "train", want)


def test_an_environment_in_which_pip_was_killed_is_made_anew(setup, monkeypatch, tmp_path):
    packages = setup.packages
    (tmp_path / "bin").mkdir()
    (tmp_path / "pyvenv.cfg").touch()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    made = []
    monkeypatch.setattr(packages, "run_or_fail", lambda command, *_: made.append(command))
    packages.make_venv(str(tmp_path), (3, 11), "log")
    assert not made

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packages, "run_logged", killed)
        with pytest.raises(KeyboardInterrupt):
            packages.run_pip(str(tmp_path), "log", ["install"])
    assert packages.pip_marker_path(str(tmp_path)) in map(str, tmp_path.iterdir())
    packages.make_venv(str(tmp_path), (3, 11), "log")
    assert made == [[sys.executable, "-m", "venv", str(tmp_path)]]
    assert [path.name for path in tmp_path.iterdir()] == [packages.OWNER_MARK], "and nothing of the old one is in it"


def test_a_folder_that_is_no_environment_is_never_emptied(setup, capsys, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SystemExit):
        setup.packages.make_venv(str(tmp_path), (3, 11), "log")
    assert "is no virtual environment" in refusal(capsys)[0] and (tmp_path / "thesis.txt").exists()


def test_a_finished_environment_says_so_and_changes_nothing(setup, tmp_path):
    venv = tmp_path / "venv"
    for part in ("bin/python", "llama.cpp/build.json"):
        (venv / part).parent.mkdir(parents=True)
        (venv / part).touch()
    setup.env.write_record(str(venv / "ferry.json"), setup.env.expected_record("train"))
    done = script("env.py", "--venv", str(venv))
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "all there" in done.stdout


def test_the_locks_pin_every_line():
    assert [path.stem for path in LOCKS] == ["build", "cpu", "cuda", "data", "deploy", "nvcc", "sky", "test"]
    for path in LOCKS:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert len(lines) >= 5
        for line in lines:
            assert re.fullmatch(r"[a-z0-9.-]+={2,3}[\w.+]+( ; .+)?", line), line
            assert "'never'" not in line and not line.startswith(("gguf", "torchvision", "xformers"))
            assert path.stem == "build" or not line.startswith("llama-cpp-python"), "compiled, in no environment's lock"


@pytest.fixture
def card(setup, monkeypatch):
    """A machine with an NVIDIA card, as nvidia-smi tells of it."""

    def of(capability="9.0", cuda="13.0"):
        def said(command):
            if command[0] != "nvidia-smi":
                return ""
            return capability if len(command) > 1 else f"| NVIDIA-SMI 580.1    CUDA Version: {cuda}  |"

        for name in ("FERRY_DEVICE", "FERRY_CUDA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(setup.packages, "read_output", said)
        monkeypatch.setattr(setup.packages.shutil, "which", lambda name: "/usr/bin/" + name)
        setup.packages.run_nvidia_smi.cache_clear()
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        return setup

    yield of
    setup.packages.run_nvidia_smi.cache_clear()


def test_a_card_decides_the_lock_and_what_is_compiled(setup, card):
    assert (
        setup.packages.detect_device() == "cpu"
        and not setup.llamacpp.cuda_capabilities()
        and "CUDA" not in " ".join(setup.llamacpp.cmake_flags())
    )
    cpu = setup.llamacpp.build_key()
    flags = card("9.0\n8.0\n8.0").llamacpp.cmake_flags()
    assert setup.packages.detect_device() == "cuda" and setup.llamacpp.build_key() != cpu
    for flag in ("CMAKE_CUDA_ARCHITECTURES=80;90", "GGML_CUDA=ON", "GGML_CUDA_NCCL=OFF", "GGML_CUDA_NO_VMM=ON"):
        assert "-D" + flag in flags
    assert "-DCMAKE_INSTALL_RPATH=$ORIGIN;$ORIGIN/../../nvidia/cu13/lib" in flags, "beside torch's libraries"


def test_asked_for_without_a_card_it_is_compiled_for_all_of_them(setup, monkeypatch):
    monkeypatch.setenv("FERRY_DEVICE", "cuda")
    assert setup.llamacpp.cuda_capabilities() == "75;80;90;100;120"
    monkeypatch.setenv("FERRY_CUDA", "90")
    assert setup.llamacpp.cuda_capabilities() == "90"
    monkeypatch.setenv("FERRY_DEVICE", "cpu")
    assert setup.llamacpp.cuda_capabilities() == ""
    monkeypatch.setenv("FERRY_DEVICE", "tpu")
    with pytest.raises(SystemExit):
        setup.packages.detect_device()


@pytest.mark.parametrize(
    ("capability", "cuda", "told"),
    [
        ("9.0", "13.0", ""),
        ("7.5", "13.2", ""),
        ("9.0", "12.8", "runs CUDA 12.8 at most; Ferry's torch needs 13.0"),
        ("7.0\n9.0", "13.0", "begins with 7.5"),
        ("No devices were found", "13.0", "names no card"),
        ("[N/A]", "13.0", "names no card"),
    ],
)
def test_a_card_that_cannot_be_used_is_said_before_the_download(card, capsys, monkeypatch, capability, cuda, told):
    """And the sides that need no torch go on without it."""
    packages = card(capability, cuda).packages
    assert packages.detect_device() == ("cpu" if told else "cuda")
    if not told:
        return packages.refuse_unusable_gpu()
    with pytest.raises(SystemExit):
        packages.refuse_unusable_gpu()
    error, hint = refusal(capsys)
    assert told in error and "FERRY_DEVICE=cpu" in hint
    monkeypatch.setenv("FERRY_DEVICE", "cpu")
    packages.refuse_unusable_gpu()


def test_missing_headers_are_said_before_the_download(card, capsys, monkeypatch, tmp_path):
    packages = card().packages
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit):
        packages.refuse_missing_headers()
    error, hint = refusal(capsys)
    assert "Python.h is missing" in error and "-dev" in hint
    (tmp_path / "Python.h").touch()
    packages.refuse_missing_headers()


def test_torchs_cuda_is_the_one_that_drivers_are_checked_for(setup):
    pinned = dict(
        line.split(" ")[0].split("==")[:2]
        for line in setup.packages.read_lock("cuda").splitlines()
        if "===" not in line and "==" in line
    )
    assert tuple(map(int, pinned["cuda-toolkit"].split(".")[:2])) == setup.packages.REQUIRED_CUDA


def test_the_tools_for_a_card_are_pinned_wheels(card, monkeypatch, tmp_path):
    llamacpp, ran = card().llamacpp, []
    monkeypatch.setattr(llamacpp, "run_or_fail", lambda command, *_: ran.append([str(word) for word in command]))
    llamacpp.install_build_tools(tmp_path, tmp_path / "log")
    words = ran[-1]
    assert "--no-deps" in words and not [word for word in words if word.startswith(("llama-cpp-python", "#"))]
    assert {"cmake", "ninja", "nvidia-cuda-nvcc", "nvidia-cublas"} <= {word.split("==")[0] for word in words}
    wheels = tmp_path / "tools/lib/python3.11/site-packages/nvidia/cu13"
    wheels.mkdir(parents=True)
    assert f"-DCMAKE_CUDA_COMPILER={wheels}/bin/nvcc" in llamacpp.cuda_cmake_flags(tmp_path)


def test_the_lock_reports_what_moved(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(setup.lock, "LOCKS_DIR", tmp_path)
    assert setup.lock.write_lock("x.txt", ["a==1", "b==1 ; sys_platform == 'linux'"])
    assert setup.lock.write_lock("x.txt", ["a==1", "b==1 ; sys_platform == 'linux'"]) == []
    assert setup.lock.write_lock("x.txt", ["a==2"]) == ["a 1 -> 2", "b ; sys_platform == 'linux' 1 -> none"]
