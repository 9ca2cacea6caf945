"""When the image is used, how it is started, and that everything in it is pinned."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.helpers.commands import ROOT, typed_environment

SETUP, DOCKERFILE = ROOT / "setup", ROOT / "docker" / "Dockerfile"
CARD = {"nvidia-smi": "9.0"}
DOCKER = {"docker info": '{"Runtimes": {"nvidia": {}}}', "docker version": "29"}


@pytest.fixture
def container(monkeypatch):
    """setup/container.py on a machine that is no container."""
    monkeypatch.syspath_prepend(str(SETUP))
    for name in ("FERRY_DEVICE", "FERRY_CUDA"):
        monkeypatch.delenv(name, raising=False)
    import container
    import packages

    monkeypatch.setattr(container, "is_container", lambda: False)

    def machine(answers: dict[str, str]):
        def said(command):
            line = " ".join(command)
            return next((answer for start, answer in answers.items() if line.startswith(start)), "")

        monkeypatch.setattr(container, "read_output", said)
        monkeypatch.setattr(packages, "read_output", said)
        monkeypatch.setattr(packages.shutil, "which", lambda name: name if name in answers else None)
        packages.run_nvidia_smi.cache_clear()
        return container

    yield machine
    packages.run_nvidia_smi.cache_clear()


@pytest.mark.parametrize(
    ("settings", "machine", "imaged", "why"),
    [
        ({}, {}, False, "no NVIDIA GPU"),
        ({}, DOCKER, False, "no NVIDIA GPU"),
        ({}, CARD, False, "no docker here that answers"),
        ({}, CARD | {"docker info": '{"Runtimes": {"runc": {}}}'}, False, "nvidia-container-toolkit"),
        ({}, CARD | {"docker info": "{}", "nvidia-ctk": "1.18"}, True, "an NVIDIA GPU and"),
        ({}, CARD | DOCKER, True, "an NVIDIA GPU and"),
        ({"DOCKER": "0"}, CARD | DOCKER, False, "DOCKER=0"),
        ({"DOCKER": "1"}, {}, True, "DOCKER=1"),
        ({"IMAGE": "ghcr.io/you/ferry:v1"}, {}, True, "IMAGE=ghcr.io/you/ferry:v1"),
        ({"IMAGE": "x", "DOCKER": "0"}, CARD | DOCKER, False, "DOCKER=0"),
    ],
)
def test_where_it_runs_and_why(container, settings, machine, imaged, why):
    chosen, reason = container(machine).decide_location(settings)
    assert chosen == imaged and why in reason


def test_a_pod_runs_natively(container, monkeypatch):
    module = container(CARD | DOCKER)
    monkeypatch.setattr(module, "is_container", lambda: True)
    assert module.decide_location({}) == (False, "this machine is itself a container")


@pytest.mark.parametrize(
    ("arguments", "told", "cure"),
    [
        (["DOCKER=2"], "DOCKER: '2' is not one of '0', '1'", "make train DOCKER="),
        (["DOCKER=1", "ENGINE=no-such-engine"], "`no-such-engine` does not answer", "DOCKER=0 runs without"),
        (["DOCKER=1", "ENGINE=true", "DEVICE=tpu"], "DEVICE: 'tpu' is not one of", "make train DEVICE="),
    ],
)
def test_what_cannot_be_is_refused_in_two_lines(arguments, told, cure, tmp_path):
    done = subprocess.run(
        ["make", *arguments, "train", "CONFIG=configs/demo.yaml"],
        cwd=ROOT,
        env=typed_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert told in done.stderr and cure in done.stderr and done.stderr.count("error: ") == 1


def started(container, monkeypatch, machine, settings, environment=()):
    """The command line that `make train` would become."""
    module = container(machine)
    for name, value in dict(environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "ensure_image", lambda settings, engine, kind: ("ferry:x", "sha256:1"))
    monkeypatch.setattr(module.os, "execvp", lambda name, words: (_ for _ in ()).throw(Became(words)))
    with pytest.raises(Became) as became:
        module.exec_container(settings, ["/opt/ferry/ferry", "train"], [])
    return became.value.args[0]


class Became(Exception):
    pass


def test_how_it_is_started(container, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    folders = {"FERRY_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret"}
    words = started(container, monkeypatch, CARD | DOCKER, {"MOUNT": f"'{tmp_path}/data'"}, folders)
    line = " ".join(words)
    for part in (
        "docker run --rm --init", f"--user {os.getuid()}:{os.getgid()}", "--read-only", "--cap-drop all", "--shm-size", "--gpus all",
        "--security-opt no-new-privileges", "--stop-timeout", "--env HF_TOKEN ", f"--volume {ROOT}:{ROOT}", f"--workdir {ROOT}",
        f"--volume {tmp_path}/cache:/cache", f"--volume {tmp_path}/hf:/cache/huggingface", f"--volume {tmp_path}/data:{tmp_path}/data",
    ):  # fmt: skip
        assert part in line
    assert "hf_secret" not in line, "others see command lines"
    assert words[-3:] == ["ferry:x", "/opt/ferry/ferry", "train"]
    assert (tmp_path / "cache").is_dir(), "the engine would make it as root"


@pytest.mark.parametrize("mount", ["'/data", "/no/such/folder", "/a:b"])
def test_a_mount_that_cannot_be_is_refused(container, mount, capsys):
    with pytest.raises(SystemExit):
        container({}).prepare_mounts({"MOUNT": mount})
    assert "MOUNT" in capsys.readouterr().err


def test_a_folder_with_a_colon_is_refused_before_it_is_made(container, tmp_path, capsys):
    with pytest.raises(SystemExit):
        container({}).prepare_mounts({"RUNS": f"{tmp_path}/a:b"})
    assert "a path with a colon cannot be mounted" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_the_graph_reads_and_writes_elsewhere_is_mounted(container, monkeypatch, tmp_path):
    """Typed paths outside the checkout, and links that lead out of it."""
    monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    module = container({})
    (tmp_path / "checkout").mkdir()
    (tmp_path / "large").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "checkout/runs").symlink_to(tmp_path / "large")
    monkeypatch.setattr(module, "ROOT", str(tmp_path / "checkout"))
    monkeypatch.chdir(tmp_path / "checkout")
    typed = {"MODELS": f"{tmp_path}/models", "REPO": "you/m", "CONFIG": f"{tmp_path}/configs/a.yaml"}
    found = module.prepare_mounts(typed)
    for name in ("large", "models", "configs", "checkout"):
        assert f"{tmp_path}/{name}:{tmp_path}/{name}" in found
    assert {f"{tmp_path}/cache:/cache", f"{tmp_path}/cache:/cache/huggingface"} <= set(found), "one folder for both"
    assert len(found) == 6 and (tmp_path / "models").is_dir()
    twice = module.prepare_mounts(
        {"MOUNT": f"{tmp_path}/large", "RUNS": f"{tmp_path}/large", "CONFIG": "/no/such/a.yaml"}
    )
    assert twice.count(f"{tmp_path}/large:{tmp_path}/large") == 1 and len(twice) == 4, (
        "an engine refuses a place named twice"
    )
    assert not Path("/no").exists(), "a mistyped config makes no folder"
    inside = {"RUNS": f"{tmp_path}/large/runs", "MODELS": f"{tmp_path}/large/x/../models"}
    module.prepare_mounts({"MOUNT": f"{tmp_path}/large"} | inside)
    assert not list((tmp_path / "large").iterdir()), "what is in a mounted folder is made by the user inside"
    with pytest.raises(SystemExit):
        module.prepare_mounts({"MOUNT": "/opt"})


def test_sudo_may_write_into_the_users_checkout(container, monkeypatch):
    """Root without capabilities may write to no one's folders but its own."""
    assert "--cap-add" not in started(container, monkeypatch, DOCKER, {})
    monkeypatch.setattr("os.getuid", lambda: 0)
    real = os.stat
    theirs = os.stat_result([1000 if place == 4 else value for place, value in enumerate(real(ROOT))])  # st_uid
    monkeypatch.setattr("os.stat", lambda path, **how: theirs if path == str(ROOT) else real(path, **how))
    assert "--cap-add DAC_OVERRIDE" in " ".join(started(container, monkeypatch, DOCKER, {}))


def test_a_device_that_chooses_nothing_is_refused(container, capsys):
    with pytest.raises(SystemExit):
        container({}).decide_location({"DEVICE": "cuda"})
    assert "FERRY_DEVICE=cuda without one" in capsys.readouterr().err


def test_an_image_for_others_is_compiled_for_every_card(container):
    module = container(CARD)
    assert module.image_build_arguments("cuda", for_this_machine=True)["FERRY_CUDA"] == "90"
    assert "FERRY_CUDA" not in module.image_build_arguments("cuda", for_this_machine=False)


def test_engines_differ(container, monkeypatch):
    monkeypatch.setattr("os.getuid", lambda: 1000)
    mine = CARD | {"podman version": "5", "podman info --format {{.Host.Security.Rootless}}": "true"}
    assert "--user 0:0" in " ".join(started(container, monkeypatch, mine, {"ENGINE": "podman"}))
    rootless = (
        CARD
        | {
            "podman version": "4",
            "docker version": "29",
            "podman info": '{"x": "nvidia"}',
            "docker info --format {{json .SecurityOptions}}": '["name=rootless"]',
        }
        | DOCKER
    )
    assert "--device nvidia.com/gpu=all" in " ".join(started(container, monkeypatch, rootless, {"ENGINE": "podman"}))
    assert "--user 0:0" in " ".join(started(container, monkeypatch, rootless, {}))
    assert "--gpus" not in started(container, monkeypatch, {"docker version": "29"}, {})


def test_what_was_typed_reaches_the_command_inside(tmp_path):
    """An engine that only says how it was called: every word arrives as it was typed."""
    engine = tmp_path / "engine"
    engine.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >> {tmp_path}/said\necho x y\n")
    engine.chmod(0o755)
    (tmp_path / "my configs").mkdir()
    (tmp_path / "my configs" / "a.yaml").write_text((ROOT / "configs" / "demo.yaml").read_text())
    config, override = f"{tmp_path}/my configs/a.yaml", 'data.system=it\'s $HOME "a" `b`'
    typed_words = [f"CONFIG={config}", f"SET={override}", "RUN=r", "DOCKER=1", f"ENGINE={engine}", "IMAGE=ferry:x"]
    done = subprocess.run(
        ["make", "train", *typed_words], cwd=ROOT, env=typed_environment(), capture_output=True, text=True
    )
    said = (tmp_path / "said").read_text().splitlines()
    words = said[said.index("/opt/ferry/ferry") :]
    assert words[:2] == ["/opt/ferry/ferry", "train"] and words[-2:] == ["--", config], done.stderr
    options = ["--run=r", f"--set={override}", "--docker=1", f"--engine={engine}", "--image=ferry:x"]
    assert sorted(words[2:-2]) == sorted(options)


def test_sources_are_what_the_image_is_made_from(container, monkeypatch, tmp_path):
    """The .dockerignore lets in what the hash covers, and a change of any of it is another image."""
    module = container({})
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == set(module.SOURCES)
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE))
    assert {word.split("/")[0] for words in copied for word in words.split()} <= let_in
    for name in module.SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(module, "ROOT", str(tmp_path))
    first = module.hash_sources()
    (tmp_path / "pipeline" / "__pycache__").mkdir(exist_ok=True)
    (tmp_path / "pipeline" / "__pycache__" / "x.pyc").touch()
    assert module.hash_sources() == first
    (tmp_path / "setup/locks/cuda.txt").write_text("")
    assert module.hash_sources() != first


# --- pins -------------------------------------------------------------------------------------------------------------


def instructions() -> list[str]:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_every_base_is_an_argument_with_an_exact_tag():
    given = dict(re.findall(r"^ARG (\w+)=(\S*)$", "\n".join(instructions()), re.MULTILINE))
    assert re.fullmatch(r"debian:\d+\.\d+-slim(@sha256:[0-9a-f]{64})?", given["BASE_IMAGE"])
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", "\n".join(instructions()), re.MULTILINE))
    for source in re.findall(r"^FROM (\S+)", "\n".join(instructions()), re.MULTILINE):
        named = re.sub(r"\$\{(\w+)\}", lambda found: given[found[1]], source)
        assert named in stages or source == "${BASE_IMAGE}", f"{source}: a base that is no argument"


def test_no_argument_hides_in_an_environment_that_is_cached():
    """buildah 1.28 reuses `ENV x=${y}` whatever y is now; only behind a FROM that differs it is safe."""
    before = DOCKERFILE.read_text().split("FROM runtime-${DEVICE}")[0]
    assert not re.findall(r"^ENV .*\$", before, re.MULTILINE)


def test_no_secret_is_a_build_argument():
    names = [
        name
        for line in instructions()
        if line.startswith(("ARG", "ENV"))
        for name in re.findall(r"(\w+)(?==|$|\s)", line)
    ]
    assert "BASE_IMAGE" in names
    assert not [name for name in names if re.search(r"TOKEN|SECRET|PASSW|KEY|CREDENTIAL", name)]


def test_the_image_is_nobodys_and_installs_only_what_is_locked():
    lines = instructions()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert (
        users
        and all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) for user in users)
        and lines.index(f"USER {users[0]}") > len(lines) - 4
    )
    ran = [line for line in lines if line.startswith("RUN")]
    assert not [
        line for line in ran if re.search(r"\b(pip3?|apt-get|apt|curl|wget|git)\b", line.replace("cache/pip", ""))
    ]
    assert "ADD" not in {line.split()[0] for line in lines}


def test_code_comes_after_packages_and_they_after_llama_cpp():
    order = [DOCKERFILE.read_text().index(text) for text in (
        "python3 setup/llamacpp.py", "setup/env.py --image", "COPY --from=packages /opt/venv", "setup/image.py stack", "COPY pipeline", "setup/image.py whole",
    )]  # fmt: skip
    assert order == sorted(order)


def lock(name: str) -> list[str]:
    lines = (SETUP / "locks" / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def names(lines: list[str]) -> dict[str, str]:
    """{package: version} of the lines that count on the image's platform."""
    from packaging.requirements import Requirement

    where = {
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "python_full_version": "3.11.2",
        "python_version": "3.11",
    }
    found = [Requirement(line) for line in lines]
    return {
        each.name: str(each.specifier).lstrip("=") for each in found if not each.marker or each.marker.evaluate(where)
    }


def test_pyproject_and_locks_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for name, of in {"cpu": ("data", "train", "cpu"), "cuda": ("data", "train", "cuda"), "data": ("data",)}.items():
        pinned = names(lock(name))
        for wish, version in names([line for extra in of for line in extras[extra]]).items():
            assert version in ("", pinned[wish]), f"{name}.txt has another {wish}"
    assert names(lock("cuda")).items() - {("torch", "2.13.0")} >= names(lock("cpu")).items() - {("torch", "2.13.0+cpu")}
    shared = names(lock("nvcc")).keys() & names(lock("cuda")).keys()
    assert {"nvidia-cublas", "nvidia-cuda-runtime"} <= shared, "llama.cpp is compiled against what torch brings"
    assert all(names(lock("nvcc"))[name] == names(lock("cuda"))[name] for name in shared)
    assert lock("build")[0] in [line.split(" ")[0] for line in extras["deploy"]]


@pytest.mark.parametrize("name", ["cpu", "cuda", "deploy", "data"])
def test_a_lock_is_closed(name, tmp_path):
    """Resolved anew from its own lines, with all that they ask for, nothing is added (but what pyproject drops)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["override-dependencies"]
    dropped = [line for line in project if "'never'" in line] + ["triton ; sys_platform == 'never'"] * (name != "cuda")
    (tmp_path / "overrides.txt").write_text("\n".join([*dropped, "certifi>=2026"]))
    sys.path.insert(0, str(SETUP))
    from lock import uv_index_arguments

    wishes = [line for line in lock(name) if "!= 'linux'" not in line]
    (tmp_path / "wishes.in").write_text("\n".join(wishes))
    command = [
        Path(sys.executable).with_name("uv"),
        "pip",
        "compile",
        tmp_path / "wishes.in",
        "--override",
        tmp_path / "overrides.txt",
    ]
    command += [
        "--python-version",
        "3.11",
        "--python-platform",
        "x86_64-manylinux_2_28",
        "--no-header",
        "--no-annotate",
        *uv_index_arguments(),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resolved = {line.split("==")[0] for line in done.stdout.splitlines() if not line.startswith("#")}
    assert resolved <= names(lock(name)).keys(), "not pinned"


def test_actions_are_pinned_to_commits():
    found = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert {path.stem for path in found} >= {"tests", "image", "macos"}
    for path in found:
        assert yaml.safe_load(path.read_text())["permissions"]["contents"] == "read"
        for uses in re.findall(r"uses: (.+)$", path.read_text(), re.MULTILINE):
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", uses), f"{path.name}: {uses}"


# --- digests, from a real registry on loopback ------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Debian's docker-registry with one image in it, and skopeo that speaks plain HTTP to it."""
    for name in ("docker-registry", "skopeo"):
        if not shutil.which(name):
            pytest.fail(name + " is missing") if os.environ.get("CI") else pytest.skip(name + " is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "registry.yml").write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/storage}}}}\nhttp: {{addr: '{place}'}}\nlog: {{level: error}}\n"
    )
    settings = tmp_path / ".config/containers/registries.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(f'[[registry]]\nlocation = "{place}"\ninsecure = true\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    process = subprocess.Popen(["docker-registry", "serve", tmp_path / "registry.yml"], stderr=subprocess.DEVNULL)
    try:
        yield SimpleNamespace(place=place, name=put_image(tmp_path, place))
    finally:
        process.terminate()
        process.wait()


def put_image(folder: Path, place: str) -> str:
    """An image of one empty layer."""
    import tarfile

    (folder / "image").mkdir()
    with tarfile.open(folder / "layer.tar", "w"):
        pass
    script = Path(folder / "oci.py")
    script.write_text(OCI)
    subprocess.run([sys.executable, script, folder], check=True)
    for _ in range(50):
        copy = [
            "skopeo",
            "copy",
            "--insecure-policy",
            f"oci:{folder}/image:x",
            f"docker://{place}/library/debian:12.13-slim",
        ]
        done = subprocess.run(copy, capture_output=True, text=True)
        if done.returncode == 0:
            return f"{place}/library/debian:12.13-slim"
        time.sleep(0.2)
    raise AssertionError(done.stderr)


OCI = """
import hashlib, json, pathlib, sys
root = pathlib.Path(sys.argv[1]); blobs = root / "image/blobs/sha256"; blobs.mkdir(parents=True)
def put(data, kind):
    digest = hashlib.sha256(data).hexdigest(); (blobs / digest).write_bytes(data)
    return {"mediaType": "application/vnd.oci.image." + kind, "digest": "sha256:" + digest, "size": len(data)}
layer = put((root / "layer.tar").read_bytes(), "layer.v1.tar")
config = put(json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}}).encode(), "config.v1+json")
made = put(json.dumps({"schemaVersion": 2, "config": config, "layers": [layer]}).encode(), "manifest.v1+json")
made["annotations"] = {"org.opencontainers.image.ref.name": "x"}
(root / "image/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [made]}))
(root / "image/oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
"""


def pin(dockerfile: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"FERRY_DOCKERFILE": str(dockerfile)}
    return subprocess.run([sys.executable, SETUP / "pin.py", *arguments], env=env, capture_output=True, text=True)


def test_lock_images_freezes_what_the_registry_says(registry, tmp_path):
    file = tmp_path / "Dockerfile"
    file.write_text(DOCKERFILE.read_text().replace("=debian:12.13-slim", f"={registry.name}"))
    loose = pin(file, "--check")
    assert (
        loose.returncode == 2
        and f"not pinned by a digest: {registry.name}" in loose.stderr
        and "make lock-images" in loose.stderr
    )
    assert pin(file).returncode == 0
    found = re.search(r"^ARG BASE_IMAGE=(\S+)@sha256:([0-9a-f]{64})$", file.read_text(), re.MULTILINE)
    kept = tmp_path / "storage/docker/registry/v2/blobs/sha256" / found[2][:2] / found[2] / "data"
    assert found[1] == registry.name and json.loads(kept.read_text())["layers"]
    assert pin(file, "--check").returncode == 0 and pin(file).stdout == "no change\n"


def test_without_a_registry_nothing_is_written(tmp_path):
    file = tmp_path / "Dockerfile"
    file.write_text("ARG BASE_IMAGE=127.0.0.1:9/debian:12.13-slim\n")
    done = pin(file)
    assert done.returncode == 2 and "no registry answered" in done.stderr and "Traceback" not in done.stderr
    assert file.read_text() == "ARG BASE_IMAGE=127.0.0.1:9/debian:12.13-slim\n"


# --- linters ----------------------------------------------------------------------------------------------------------


def test_linters_find_nothing():
    if lacks := [name for name in ("shellcheck",) if not shutil.which(name)]:
        pytest.fail(f"{lacks} missing") if os.environ.get("CI") else pytest.skip(f"{lacks} not installed")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "setup/lint.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "lint: clean"


def test_every_recipe_longer_than_a_line_is_clean():
    """As the shell gets it: make's variables as words."""
    recipes = re.findall(r"^[\w$()/. -]+:.*\n((?:\t.*\n){2,})", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipes
    for recipe in recipes:
        lines = [line.lstrip("@-") for line in recipe.replace("\n\t", "\n").lstrip("\t").splitlines()]
        shell = "\n".join(lines).replace("$$", "\0")
        text = re.sub(r"\$\([^()]*(\([^()]*\)[^()]*)*\)", "word", shell).replace("\0", "$")
        done = subprocess.run(
            ["shellcheck", "-s", "sh", "-"], input="#!/bin/sh\n" + text + "\n", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
