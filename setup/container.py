"""Decide whether a target runs in Ferry's image, build the image and run it. Any Python from 3.6 on runs this file.

    python3 setup/container.py where  [SETTING=value ...] -- train      prints image, native or refused; stderr: why
    python3 setup/container.py build  [SETTING=value ...]
    python3 setup/container.py run    [SETTING=value ...] -- train configs/a.yaml    (arguments of `ferry`)
    python3 setup/container.py shell  [SETTING=value ...]
    python3 setup/container.py arguments [DEVICE=...]       the build arguments, for another builder

The settings have their names in make: DOCKER=0|1, IMAGE=name:tag, DEVICE=cpu|cuda, ENGINE=docker|podman,
MOUNT="folder ...", DOCKER_BUILD_FLAGS, DOCKER_RUN_FLAGS. CONFIG, RUNS, MODELS and REPO name further paths to mount.
The checkout and the current folder are mounted at their own paths, so that paths printed in the container are valid
outside. The code that runs is the one in the image.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys

from interpreter import read_output
from packages import detect_device, gpu_capabilities, refuse_unusable_gpu
from shared import cache_folder, fail

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What the image is made from (.dockerignore admits nothing else). Their hash tells whether an image fits this checkout.
SOURCES = [
    "cli",
    "common",
    "contract",
    "deploy",
    "pipeline",
    "setup",
    "docker",
    "ferry",
    "Makefile",
    "Modelfile.template",
    "NOTICE",
    "LICENSE",
    "pyproject.toml",
]
DEFAULT_IMAGE_NAMES = ("ferry:cpu", "ferry:cuda")
INSPECT_FORMAT = '{{index .Config.Labels "ferry.sources"}} {{.Id}}'
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
# Passed to the container by name, so that no value stands on a command line, in a log or in the image.
PASSTHROUGH_VARIABLES = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET",
    "WANDB_API_KEY",
    "WANDB_MODE",
    "CUDA_VISIBLE_DEVICES",
    "UNSLOTH_FORCE_CPU",
    "OMP_NUM_THREADS",
    "FERRY_HUB_SECONDS",
    "FERRY_SILENCE_SECONDS",
    "FERRY_API_KEY",
    "FERRY_GRACE_SECONDS",
    *PROXY_VARIABLES,
)


def decide_location(settings):
    """Return (whether to run in the image, the reason), from the settings, else from what this machine has."""
    docker_setting = settings.get("DOCKER", "")
    if docker_setting not in ("", "0", "1"):
        fail(f"DOCKER={docker_setting}: neither 0 nor 1", "DOCKER=1 runs in the image, DOCKER=0 without one")
    if (
        settings.get("DEVICE", detect_device()) != detect_device()
        and docker_setting != "1"
        and not settings.get("IMAGE")
    ):
        message = "DEVICE={} chooses an image, and this machine's device is {}".format(
            settings["DEVICE"], detect_device()
        )
        fail(message, "DOCKER=1 DEVICE={0} in the image, FERRY_DEVICE={0} without one".format(settings["DEVICE"]))
    if docker_setting:
        return docker_setting == "1", "DOCKER=" + docker_setting
    if settings.get("IMAGE"):
        return True, "IMAGE=" + settings["IMAGE"]
    if is_container():
        return False, "this machine is itself a container"
    if detect_device() == "cpu":
        return False, "no NVIDIA GPU here"
    fault = find_engine_fault(settings.get("ENGINE", "docker"))
    return (False, fault) if fault else (True, "an NVIDIA GPU and a container engine that can reach it")


def report_location(settings, goal):
    """Return `image`, `native` or `refused`, and print the reason on stderr.

    It is a word because make does not see this program's exit code.
    """
    try:
        in_image, reason = decide_location(settings)
    except SystemExit:
        return "refused"
    sys.stderr.write("{}: {} ({})\n".format(goal, "in the image" if in_image else "natively", reason))
    return "image" if in_image else "native"


def is_container():
    """Return whether this machine is a container. A rented pod is one, and has no engine of its own."""
    return any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))) or "KUBERNETES_SERVICE_HOST" in os.environ


def find_engine_fault(engine):
    """Return what is missing to run a container with a GPU; empty when nothing is."""
    engine_info = read_output([engine, "info", "--format", "{{json .}}"])
    # An old docker answers about itself when its daemon does not run.
    if not engine_info or '"ServerErrors"' in engine_info:
        return f"no {engine} here that answers"
    if "nvidia" not in engine_info and not read_output(["nvidia-ctk", "--version"]):
        return f"{engine} has no NVIDIA runtime (nvidia-container-toolkit; then: nvidia-ctk runtime configure)"
    return ""


def require_engine(settings):
    """Return the name of the container engine. Exit when it does not answer."""
    engine = settings.get("ENGINE") or "docker"
    if not read_output([engine, "version"]):
        cure = "start it or install it; ENGINE=podman takes another one, DOCKER=0 runs without"
        fail(f"the container engine `{engine}` does not answer", cure)
    return engine


def image_device(settings, default):
    """Return the device that the image is for: cpu or cuda."""
    kind = settings.get("DEVICE") or default
    if kind not in ("cpu", "cuda"):
        fail(f"DEVICE={kind}: there is an image for cpu and one for cuda", "DEVICE=cpu or DEVICE=cuda")
    return kind


def hash_sources():
    """Return twelve hex digits of the hash of everything that goes into the image."""
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in list_files(os.path.join(ROOT, name))):
        digest.update(f"{os.path.relpath(path, ROOT)} {hash_file(path)}\n".encode())
    return digest.hexdigest()[:12]


def list_files(path):
    """Return the file, or all files of a folder except __pycache__."""
    if os.path.isfile(path):
        return [path]
    entries = (entry for entry in os.walk(path) if not entry[0].endswith("__pycache__"))
    paths = (os.path.join(folder, name) for folder, _, names in entries for name in names)
    return list(filter(os.path.isfile, paths))


def read_revision():
    """Return the checkout's commit, whether it has changes, and its origin, for the image's provenance."""
    # `make cloud-to-local` sends a tree with this file instead of a repository (pipeline/toolchain/git.py).
    sent_file = os.path.join(ROOT, "revision.json")
    if os.path.isfile(sent_file):
        return read_sent_revision(sent_file)
    git_command = ["git", "-C", ROOT]
    # The URL of a remote may hold a token, which is removed.
    url = re.sub("//[^/@]*@", "//", read_output(git_command + ["remote", "get-url", "origin"]))
    commit = read_output(git_command + ["rev-parse", "HEAD"])
    changes = read_output(git_command + ["status", "--porcelain"]) or not commit
    return {"COMMIT": commit, "DIRTY": "true" if changes else "false", "ORIGIN": url}


def read_sent_revision(path):
    """Return the same for a tree without git, from its revision.json."""
    with open(path, encoding="utf-8") as file:
        revision = json.load(file)
    hashes = revision["files"].items()
    is_changed = any(hash_file(os.path.join(ROOT, name)) != digest for name, digest in hashes)
    dirty = "true" if is_changed else "false"
    return {"COMMIT": revision["commit"], "DIRTY": dirty, "ORIGIN": revision["url"] or ""}


def hash_file(path):
    """Return the sha256 of a file; empty when it does not exist."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def image_build_arguments(kind, for_this_machine):
    """Return the image's build arguments. None of them is a secret, because they stay in the image's history.

    for_this_machine: Whether to compile only for the GPUs of this machine.
    """
    # LLAMA_IMAGE is the Dockerfile's own default, which an old buildah does not resolve to a stage.
    values = dict({"DEVICE": kind, "LLAMA_IMAGE": "llama-built", "SOURCES": hash_sources()}, **read_revision())
    # To compile for the GPUs of this machine only is five times faster.
    if for_this_machine and kind == "cuda" and gpu_capabilities():
        values["FERRY_CUDA"] = gpu_capabilities()
    return values


def build_image(settings, engine, kind, name):
    """Build the image, with the hash of its sources as a label. Exit when the build fails."""
    refuse_foreign_image(settings, engine, name)
    command = [engine, "build", "--file", "docker/Dockerfile", "--tag", name]
    command += [
        word
        for item in image_build_arguments(kind, not settings.get("IMAGE")).items()
        for word in ("--build-arg", "=".join(item))
    ]
    command += [word for name in PROXY_VARIABLES if name in os.environ for word in ("--build-arg", name)]
    command += split_setting(settings, "DOCKER_BUILD_FLAGS") + ["."]
    exit_code = subprocess.call(command, cwd=ROOT, env=dict(os.environ, DOCKER_BUILDKIT="1"))
    if exit_code:
        fail(f"the image {name} could not be built (exit {exit_code})", "read what is above, then make image")


def refuse_foreign_image(settings, engine, image_name):
    """Exit when IMAGE names an image that Ferry did not build, because the build would take its name.

    Ferry's images have a label, which other images do not have.
    """
    if (
        not settings.get("IMAGE")
        or image_name in DEFAULT_IMAGE_NAMES
        or not read_output([engine, "image", "inspect", image_name])
    ):
        return
    # An image without the label answers with its id only.
    if len(read_output([engine, "image", "inspect", "--format", INSPECT_FORMAT, image_name]).split()) < 2:
        message = f"{engine} has an image {image_name} that Ferry did not build: the build would take its name"
        fail(message, "choose another IMAGE=name:tag, or leave it out for {} or {}".format(*DEFAULT_IMAGE_NAMES))


def ensure_image(settings, engine, kind):
    """Return (name, id) of the image to run.

    The image of IMAGE is pulled when it is missing. Without IMAGE, the image of this checkout is built when it is
    missing or of other sources.
    """
    requested_name = settings.get("IMAGE")
    image_name = requested_name or "ferry:" + kind
    inspect_command = [engine, "image", "inspect", "--format", INSPECT_FORMAT, image_name]
    label_and_id = read_output(inspect_command).split()
    if requested_name and not label_and_id and subprocess.call([engine, "pull", image_name]):
        fail(f"there is no image {image_name}", "correct IMAGE, or leave it out to have it built")
    elif not requested_name and label_and_id[:1] != [hash_sources()]:
        build_image(settings, engine, kind, image_name)
    label_and_id = read_output(inspect_command).split()
    if not label_and_id:
        fail(f"{image_name} was made, and {engine} does not have it", "unset BUILDX_BUILDER, then the same command")
    if label_and_id[:1] != [hash_sources()]:
        sys.stderr.write(f"note: {image_name} was made from other sources than this checkout; its code runs\n")
    return image_name, label_and_id[-1]


def exec_container(settings, command, attach_flags):
    """Replace this process by `docker run`, so that its signals and its exit code are those of the container.

    attach_flags: How the container is attached to stdin and the terminal.
    """
    engine, kind = require_engine(settings), image_device(settings, detect_device())
    if kind == "cuda":
        refuse_unusable_gpu()
    name, image_id = ensure_image(settings, engine, kind)
    docker_command = [engine, "run", "--rm", "--init", "--user", container_user(engine), "--read-only"]
    # "exec" because Triton and libffi load from /tmp what they compile there
    docker_command += ["--tmpfs", "/tmp:rw,exec,mode=1777", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
    if os.getuid() == 0 and os.stat(ROOT).st_uid:  # `sudo make`: without it root cannot write to the user's folders
        docker_command += ["--cap-add", "DAC_OVERRIDE"]
    # Shared memory for data loaders; time to write a checkpoint.
    docker_command += ["--shm-size", "8g", "--stop-timeout", "120"]
    docker_command += gpu_flags(engine) if kind == "cuda" else []
    docker_command += attach_flags
    docker_command += [word for name in PASSTHROUGH_VARIABLES if name in os.environ for word in ("--env", name)]
    # Ctrl-C must reach the processes that make started, not only make.
    docker_command += [
        "--env",
        "TINI_KILL_PROCESS_GROUP=1",
        "--env",
        "FERRY_IMAGE_ID=" + image_id,
        "--workdir",
        os.getcwd(),
    ]
    docker_command += [word for mount in prepare_mounts(settings) for word in ("--volume", mount)]
    docker_command += split_setting(settings, "DOCKER_RUN_FLAGS") + [name] + command
    sys.stdout.flush()
    os.execvp(engine, docker_command)


def container_user(engine):
    """Return the user of the container: the caller, who then owns the files that it writes.

    A rootless engine maps the container's root to the caller.
    """
    info_format = "{{.Host.Security.Rootless}}" if engine.endswith("podman") else "{{json .SecurityOptions}}"
    is_rootless = re.search("true|rootless", read_output([engine, "info", "--format", info_format]))
    return "0:0" if is_rootless else f"{os.getuid()}:{os.getgid()}"


def gpu_flags(engine):
    """Return the flags that give a container access to the GPUs."""
    return ["--device", "nvidia.com/gpu=all"] if engine.endswith("podman") else ["--gpus", "all"]


def split_setting(settings, name):
    """Return a setting split as a shell would split it. Exit when that fails."""
    try:
        return shlex.split(settings.get(name, ""))
    except ValueError as error:
        fail(f"{name}={settings[name]}: {error}", f"correct {name}")


def prepare_mounts(settings):
    """Create the folders to mount, and return "folder of this machine:path in the container" for each.

    They are created here because the engine would create them as root.
    """
    hub_cache = os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    folders = {"/cache": cache_folder(), "/cache/huggingface": os.path.abspath(hub_cache)}
    mounted = [ROOT] + list_extra_mounts(settings)
    folders.update((target, target) for target in mounted + list_unmounted_folders(settings, mounted))
    # The engine would create the last one as a mount point.
    for folder in [*folders.values(), os.path.join(cache_folder(), "huggingface")]:
        make_mount_folder(folder)
    return [f"{folder}:{target}" for target, folder in folders.items()]


def list_extra_mounts(settings):
    """Return the folders of MOUNT. Exit when one does not exist."""
    folders = [os.path.abspath(os.path.expanduser(folder)) for folder in split_setting(settings, "MOUNT")]
    for folder in folders:
        if not os.path.isdir(folder):
            fail(f"MOUNT: there is no folder {folder}", "correct MOUNT")
    return folders


def list_unmounted_folders(settings, mounted):
    """Return the folders of a command that are not inside a mounted folder, or are inside only by a link."""
    values = dict({"RUNS": "runs", "MODELS": "models", "REPO": "hub"}, **settings)
    # A name on the Hub looks like a path in the current folder, which is mounted.
    paths = [".", values["RUNS"], values["MODELS"], values["REPO"]]
    config = os.path.dirname(values.get("CONFIG", ""))
    paths += [config] if os.path.isdir(config or ".") else []  # the command itself refuses a mistyped one
    candidates = [resolve(path) for path in paths for resolve in (os.path.abspath, os.path.realpath)]
    mounted_roots = [*mounted, os.path.realpath(ROOT)]
    return sorted({path for path in candidates if not any(is_within(path, folder) for folder in mounted_roots)})


def is_within(path, folder):
    """Return whether `path` is `folder` or below it."""
    return os.path.commonpath([path, folder]) == folder


def make_mount_folder(folder):
    """Create a folder to mount. Exit when it cannot be created or mounted at its own path."""
    if ":" in folder:
        fail(f"{folder}: a path with a colon cannot be mounted", "DOCKER=0 runs without an image")
    if any(is_within(image_folder, folder) for image_folder in ("/opt/ferry", "/opt/venv", "/usr")):
        fail(f"{folder}: what the image has there would be hidden", "choose another folder, or DOCKER=0")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        message = f"cannot make {folder}: {error.strerror}"
        fail(message, "give another folder in RUNS, MODELS, FERRY_CACHE or HF_HOME")


def parse_arguments(arguments):
    """Return ({setting: value}, the words after --)."""
    separator = arguments.index("--") if "--" in arguments else len(arguments)
    return dict(word.split("=", 1) for word in arguments[:separator]), arguments[separator + 1 :]


def main():
    """Run one of the five commands."""
    action, (settings, goals) = sys.argv[1], parse_arguments(sys.argv[2:])
    if action == "where":
        print(report_location(settings, goals[0]))
    elif action == "arguments":
        print(
            "\n".join(
                "=".join(item)
                for item in image_build_arguments(image_device(settings, "cuda"), for_this_machine=False).items()
            )
        )
    elif action == "build":
        kind = image_device(settings, "cuda")
        build_image(settings, require_engine(settings), kind, settings.get("IMAGE") or "ferry:" + kind)
    elif action == "shell":
        exec_container(settings, ["bash"], ["--interactive"] + ["--tty"] * sys.stdin.isatty())
    else:
        command = ["/opt/ferry/ferry"] + goals
        exec_container(
            settings, command, ["--interactive", "--tty"] if sys.stdout.isatty() and sys.stdin.isatty() else []
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
