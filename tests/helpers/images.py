"""Ferry's CPU image, built where no registry of images is: podman, on a base made by debootstrap.

The stand-in base is Debian 12 as the real one is, made from the same packages. It gets what this machine's pip needs to
reach its package index. llama.cpp is the build that the native tests use; everything else is `make image` as it is.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from common import files
from tests.helpers.commands import MAKE, ROOT, typed_environment

BASE, LLAMA, IMAGE = "localhost/ferry-stand-in:bookworm", "localhost/ferry-llama.cpp:native", "ferry:cpu"
NEEDS = ("podman", "buildah", "runc", "debootstrap")
CONTAINERS = '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n[containers]\n' + (
    'default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n'
)
STORAGE = '[storage]\ndriver = "overlay"\ngraphroot = "{0}/store"\nrunroot = "{0}/run"\n'
CERTIFICATES = Path("/usr/local/share/ca-certificates"), Path("/etc/ssl/certs/ca-certificates.crt")


def lack() -> str:
    """Why no image can be built here; empty if one can."""
    missing = [name for name in NEEDS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed"
    return "" if os.getuid() == 0 else "debootstrap and this podman want root"


def configure() -> None:
    """A store and settings of the tests' own, kept between runs."""
    home = files.cache_dir() / "test" / "containers"
    home.mkdir(parents=True, exist_ok=True)
    (home / "containers.conf").write_text(CONTAINERS)
    (home / "storage.conf").write_text(STORAGE.format(home))
    os.environ |= {
        "CONTAINERS_CONF": str(home / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(home / "storage.conf"),
    }


def podman(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["podman", *map(str, arguments)], **{"capture_output": True, "text": True} | options)


def stand_in(folder: Path) -> None:
    """The base image: Debian 12, the smallest kind, with this machine's way to its package index."""
    if podman("image", "exists", BASE).returncode == 0:
        return
    root = folder / "rootfs"
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", root],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for path in filter(Path.exists, CERTIFICATES):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, root / path.relative_to("/"), **({"dirs_exist_ok": True} if path.is_dir() else {}))
    (root / "etc/pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in index().items()))
    imported(root, ".", BASE)


def index() -> dict[str, str]:
    """This machine's settings of pip that say where packages are."""
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = re.findall(
        r"^(?:global|:env:)\.(cert|find-links|index-url|extra-index-url|timeout)='(.*)'$", asked, re.MULTILINE
    )
    return dict(found)


def local_folders() -> list[str]:
    """Folders of this machine that pip takes packages from."""
    words = " ".join(value for name, value in index().items() if name != "cert").replace("file://", "").split()
    paths = [Path(word) for word in words if word.startswith("/") and Path(word).is_dir()]
    return sorted({str(path.parent if path.name == "simple" else path) for path in paths})


def imported(root: Path, what: str, name: str) -> None:
    """A folder as an image, links as they are."""
    with tarfile.open(root.parent / "image.tar", "w") as archive:
        archive.add(
            root / what, what, filter=lambda entry: None if entry.name.startswith(("./dev/", "./proc/")) else entry
        )
    podman("import", root.parent / "image.tar", name, check=True)
    (root.parent / "image.tar").unlink()


def lend_llama(folder: Path) -> None:
    """The native llama.cpp where the Dockerfile's own stage would have left it."""
    built = (Path(sys.prefix) / "llama.cpp").resolve()
    shutil.copytree(built, folder / "lent/opt/llama.cpp" / built.name, symlinks=True)
    imported(folder / "lent", ".", LLAMA)


def build_flags() -> str:
    """What of `make image` is this machine's."""
    flags = ["--isolation", "oci", "--format", "docker", "--network", "host", "--pull=never"]
    given = {"BASE_IMAGE": BASE, "DEBIAN": "current", "LLAMA_IMAGE": LLAMA, "FERRY_LLAMA_FLAGS": ""}
    flags += [word for name, value in given.items() for word in ("--build-arg", f"{name}={value}")]
    flags += [word for path in local_folders() for word in ("--volume", f"{path}:{path}:ro")]
    return shlex.join(flags)


def built(folder: Path) -> str:
    """The image's name, after `make image`."""
    if why := lack():
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    configure()
    stand_in(folder)
    lend_llama(folder)
    done = make_image()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    podman("image", "prune", "--force", "--filter", "until=12h")  # layers of older checkouts
    return IMAGE


def make_image(*arguments: str) -> subprocess.CompletedProcess:
    """`make image` of the CPU image, by podman."""
    command = [*MAKE, "image", "DEVICE=cpu", "ENGINE=podman", f"DOCKER_BUILD_FLAGS={build_flags()}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=typed_environment() | {"FERRY_LLAMA_FLAGS": ""}
    )


def layers(name: str) -> list[int]:
    """The bytes of each layer, the base first."""
    listed = json.loads(podman("history", "--format", "json", name, check=True).stdout)
    return [layer["size"] for layer in reversed(listed)]
