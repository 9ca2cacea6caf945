"""The image that `make image` builds, and the whole chain in it: any user, read-only, no network."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from common import files
from tests.helpers import images
from tests.helpers.chain import Chain
from tests.helpers.commands import ROOT, typed_environment
from tests.helpers.images import podman

pytestmark = pytest.mark.image
USER = 12345
LAYER = 1.3e9  # bytes; the largest is the Python packages without torch


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    return images.built(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def described(image) -> dict:
    return json.loads(podman("image", "inspect", image, check=True).stdout)[0]


@pytest.fixture(scope="module")
def run_in_image(image, chain, tmp_path_factory) -> Chain:
    """The same chain as the native one, by `make` in the image, as a user who is in no passwd file."""
    folder = tmp_path_factory.mktemp("imaged")
    made = Chain(folder / "work")
    cache = folder / "cache"
    shutil.copytree(files.cache_dir() / "base", cache / "base", symlinks=True)
    (cache / "huggingface").mkdir()
    (folder / "work").mkdir()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)
    folder.chmod(0o755)
    for parent in (folder.parent, *list(folder.parents)[1:-1]):  # pytest's own folders are closed to others
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(0o755)
    flags = f"--network none --no-healthcheck --user {USER}:{USER}"
    settings = ["DOCKER=1", "ENGINE=podman", "DEVICE=cpu", f"MOUNT={folder / 'work'}", f"DOCKER_RUN_FLAGS={flags}"]
    before = listing(ROOT)
    environment = {"FERRY_CACHE": str(cache), "HF_HOME": str(cache / "huggingface"), "HF_TOKEN": "hf_notarealsecret"}
    done = started(made, [*settings, "demo"], environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made.output, made.left = done.stdout + done.stderr, listing(ROOT) - before
    return made


def started(made: Chain, arguments: list[str], environment: dict) -> subprocess.CompletedProcess:
    """`make` as a user has it: no environment of the tests, which the image would not see."""
    settings = [*made.settings[1:], *made.deploy_settings]  # `make demo` has its own config
    wanted = ["make", "--no-print-directory", *settings, *arguments]
    return subprocess.run(wanted, cwd=ROOT, env=typed_environment() | environment, capture_output=True, text=True)


def listing(folder: Path) -> set[str]:
    ignored = ("__pycache__", ".git", ".pytest_cache", ".ruff_cache", ".hypothesis")
    return {str(path) for path in folder.rglob("*") if not any(part in ignored for part in path.parts)}


def record(chain: Chain, stage: str) -> dict:
    return files.read_json(chain.run / f"{stage}.json")


def test_the_chain_is_the_native_one(chain, run_in_image):
    """Same rows, byte for byte; a loss within 1 %; a GGUF of the same type and size."""
    ours, native = record(run_in_image, "data"), record(chain, "data")
    assert ours["outputs"]["train"]["sha256"] == native["outputs"]["train"]["sha256"]
    assert ours["outputs"]["heldout"]["sha256"] == native["outputs"]["heldout"]["sha256"]
    loss = [record(made, "finetune")["final_loss"] for made in (run_in_image, chain)]
    assert loss[0] == pytest.approx(loss[1], rel=0.01)
    sizes = [{k: v["bytes"] for k, v in record(made, "export")["outputs"].items()} for made in (run_in_image, chain)]
    assert sizes[0] == sizes[1] and any(name.startswith("q4_k_m") for name in sizes[0])
    assert (run_in_image.model / "smoke.json").is_file(), "and the other side ran in it, too"


def test_its_provenance_names_the_image(image, described, run_in_image):
    """The manifest says which image, of which sources, and the checkout that it was made from."""
    made = files.read_json(run_in_image.hub / "manifest.json")["provenance"]
    assert made["image"]["id"].removeprefix("sha256:") == described["Id"].removeprefix("sha256:")
    assert made["image"]["sources"] == described["Config"]["Labels"]["ferry.sources"]
    assert made["image"]["base"] == images.BASE and made["image"]["llama.cpp"]["commit"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert made["git"]["commit"] == head


def test_all_that_was_written_is_the_callers_and_within_its_mounts(run_in_image):
    assert not run_in_image.left, "something was written into the checkout"
    owners = {path.lstat().st_uid for path in run_in_image.folder.parent.rglob("*")}
    assert owners == {USER}


@pytest.mark.parametrize("place", ["/opt/ferry/x", "/opt/venv/x", "/usr/x", "/x"])
def test_nothing_else_can_be_written(image, place):
    done = podman("run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", image, "touch", place)
    assert done.returncode and "Read-only file system" in done.stderr


def test_the_token_is_nowhere(image, run_in_image):
    history = podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", image, check=True).stdout
    assert "hf_" not in history and "hf_notarealsecret" not in run_in_image.output
    texts = [
        path for path in run_in_image.folder.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml", ".md", ".log")
    ]
    assert texts and not [path for path in texts if "hf_notarealsecret" in path.read_text(errors="replace")]


def test_it_is_nobodys_and_no_root(described):
    user = described["Config"]["User"].split(":")[0]
    assert user.isdigit() and int(user) > 0
    assert described["Config"]["Volumes"] == {"/cache": {}}
    assert not [
        entry for entry in described["Config"]["Env"] if re.match(r"(?i)[^=]*(token|secret|passw|api_?key)", entry)
    ]


def test_no_layer_is_over_its_size(image):
    sizes = images.layers(image)
    assert 1e8 < max(sizes) <= LAYER and sum(sizes) < 2.6e9


def test_it_holds_no_compiler_and_its_licences(image):
    ask = "command -v gcc g++ cc c++ ninja cmake; ls NOTICE LICENSE /opt/llama.cpp/*/LICENSE /opt/venv/lib/python3*/site-packages/unsloth-*/licenses"
    done = podman("run", "--rm", image, "sh", "-c", ask)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"/(gcc|g\+\+|cc|c\+\+|ninja|cmake)$", done.stdout, re.MULTILINE) and "NOTICE" in done.stdout


def test_a_shell_takes_what_is_piped_into_it(image, chain):
    ask = ["python3", "setup/container.py", "shell", "DEVICE=cpu", "ENGINE=podman"]
    done = subprocess.run(ask, cwd=ROOT, input="cat $FERRY_IMAGE; pwd; touch /opt/x", capture_output=True, text=True)
    assert '"device": "cpu"' in done.stdout and done.stdout.endswith(f"{ROOT}\n") and "Read-only" in done.stderr


def test_a_second_build_of_the_same_checkout_is_not_made(image, chain):
    """`make train` takes the image that is there as long as the sources are its own."""
    ask = ["python3", "setup/container.py", "run", "DEVICE=cpu", "ENGINE=podman", "--", "--help"]
    done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "deploy-mac" in done.stdout and "STEP" not in done.stdout + done.stderr


def test_debians_packages_are_those_of_the_bases_day(image, tmp_path):
    """docker/packages.sh, on the sources file that Debian's own images have."""
    sources = tmp_path / "debian.sources"
    sources.write_text(
        "Types: deb\n# http://archive.example/debian/20260112T000000Z\nURIs: http://mirror.example/debian\nSuites: bookworm\n\n"
        "Types: deb\n# http://archive.example/security/20260112T000000Z\nURIs: http://mirror.example/security\nSuites: s\n"
    )
    fake = tmp_path / "apt-get"
    fake.write_text('#!/bin/sh\necho "$@"\n[ "$1" = update ] && cat /etc/apt/sources.list.d/debian.sources || true\n')
    fake.chmod(0o755)
    mounts = [
        f"{ROOT}/docker/packages.sh:/packages.sh:ro",
        f"{tmp_path}:/etc/apt/sources.list.d",
        f"{fake}:/usr/local/bin/apt-get:ro",
    ]
    flags = [word for mount in mounts for word in ("--volume", mount)]
    done = podman(
        "run", "--rm", "--user", "0", *flags, "--env", "DEBIAN=snapshot", image, "bash", "/packages.sh", "make"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("URIs: http://archive.example/") == 2 and "mirror.example" not in done.stdout
    assert "Check-Valid-Until: no" in done.stdout and "install -q -y --no-install-recommends make" in done.stdout
    sources.write_text("Types: deb\nURIs: http://mirror.example/debian\n")
    done = podman(
        "run", "--rm", "--user", "0", *flags, "--env", "DEBIAN=snapshot", image, "bash", "/packages.sh", "make"
    )
    assert done.returncode == 2 and "names no snapshot" in done.stderr
