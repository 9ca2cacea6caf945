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

from interpreter import said
from packages import capability, check_card, device
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
DEFAULT_NAMES = ("ferry:cpu", "ferry:cuda")
ASK = '{{index .Config.Labels "ferry.sources"}} {{.Id}}'
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
# Passed to the container by name, so that no value stands on a command line, in a log or in the image.
PASSED = (
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
    *PROXIES,
)


def decide(settings):
    """Return (whether to run in the image, the reason), from the settings, else from what this machine has."""
    asked = settings.get("DOCKER", "")
    if asked not in ("", "0", "1"):
        fail(f"DOCKER={asked}: neither 0 nor 1", "DOCKER=1 runs in the image, DOCKER=0 without one")
    if settings.get("DEVICE", device()) != device() and asked != "1" and not settings.get("IMAGE"):
        told = "DEVICE={} chooses an image, and this machine's device is {}".format(settings["DEVICE"], device())
        fail(told, "DOCKER=1 DEVICE={0} in the image, FERRY_DEVICE={0} without one".format(settings["DEVICE"]))
    if asked:
        return asked == "1", "DOCKER=" + asked
    if settings.get("IMAGE"):
        return True, "IMAGE=" + settings["IMAGE"]
    if inside():
        return False, "this machine is itself a container"
    if device() == "cpu":
        return False, "no NVIDIA GPU here"
    lack = lacking(settings.get("ENGINE", "docker"))
    return (False, lack) if lack else (True, "an NVIDIA GPU and a container engine that can reach it")


def where(settings, goal):
    """Return `image`, `native` or `refused`, and print the reason on stderr.

    It is a word because make does not see this program's exit code.
    """
    try:
        chosen, why = decide(settings)
    except SystemExit:
        return "refused"
    sys.stderr.write("{}: {} ({})\n".format(goal, "in the image" if chosen else "natively", why))
    return "image" if chosen else "native"


def inside():
    """Return whether this machine is a container. A rented pod is one, and has no engine of its own."""
    return any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))) or "KUBERNETES_SERVICE_HOST" in os.environ


def lacking(engine):
    """Return what is missing to run a container with a GPU; empty when nothing is."""
    about = said([engine, "info", "--format", "{{json .}}"])
    # An old docker answers about itself when its daemon does not run.
    if not about or '"ServerErrors"' in about:
        return f"no {engine} here that answers"
    if "nvidia" not in about and not said(["nvidia-ctk", "--version"]):
        return f"{engine} has no NVIDIA runtime (nvidia-container-toolkit; then: nvidia-ctk runtime configure)"
    return ""


def engine_of(settings):
    """Return the name of the container engine. Exit when it does not answer."""
    engine = settings.get("ENGINE") or "docker"
    if not said([engine, "version"]):
        cure = "start it or install it; ENGINE=podman takes another one, DOCKER=0 runs without"
        fail(f"the container engine `{engine}` does not answer", cure)
    return engine


def kind_of(settings, otherwise):
    """Return the device that the image is for: cpu or cuda."""
    kind = settings.get("DEVICE") or otherwise
    if kind not in ("cpu", "cuda"):
        fail(f"DEVICE={kind}: there is an image for cpu and one for cuda", "DEVICE=cpu or DEVICE=cuda")
    return kind


def sources():
    """Return twelve hex digits of the hash of everything that goes into the image."""
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in files_of(os.path.join(ROOT, name))):
        digest.update(f"{os.path.relpath(path, ROOT)} {hash_of(path)}\n".encode())
    return digest.hexdigest()[:12]


def files_of(path):
    """Return the file, or all files of a folder except __pycache__."""
    if os.path.isfile(path):
        return [path]
    walked = ((folder, name) for folder, _, names in os.walk(path) for name in names)
    return [
        os.path.join(*found)
        for found in walked
        if not found[0].endswith("__pycache__") and os.path.isfile(os.path.join(*found))
    ]


def revision():
    """Return the checkout's commit, whether it has changes, and its origin, for the image's provenance."""
    # `make cloud-to-local` sends a tree with this file instead of a repository (pipeline/toolchain/git.py).
    sent = os.path.join(ROOT, "revision.json")
    if os.path.isfile(sent):
        return revision_sent(sent)
    git = ["git", "-C", ROOT]
    # The URL of a remote may hold a token, which is removed.
    url = re.sub("//[^/@]*@", "//", said(git + ["remote", "get-url", "origin"]))
    commit = said(git + ["rev-parse", "HEAD"])
    changed = said(git + ["status", "--porcelain"]) or not commit
    return {"COMMIT": commit, "DIRTY": "true" if changed else "false", "ORIGIN": url}


def revision_sent(path):
    """Return the same for a tree without git, from its revision.json."""
    with open(path, encoding="utf-8") as file:
        sent = json.load(file)
    changed = (name for name, digest in sent["files"].items() if hash_of(os.path.join(ROOT, name)) != digest)
    dirty = "true" if any(changed) else "false"
    return {"COMMIT": sent["commit"], "DIRTY": dirty, "ORIGIN": sent["url"] or ""}


def hash_of(path):
    """Return the sha256 of a file; empty when it does not exist."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def arguments(kind, own):
    """Return the image's build arguments. None of them is a secret, because they stay in the image's history.

    for_this_machine: Whether to compile only for the GPUs of this machine.
    """
    # LLAMA_IMAGE is the Dockerfile's own default, which an old buildah does not resolve to a stage.
    given = dict({"DEVICE": kind, "LLAMA_IMAGE": "llama-built", "SOURCES": sources()}, **revision())
    # To compile for the GPUs of this machine only is five times faster.
    if own and kind == "cuda" and capability():
        given["FERRY_CUDA"] = capability()
    return given


def build(settings, engine, kind, name):
    """Build the image, with the hash of its sources as a label. Exit when the build fails."""
    refuse_others_image(settings, engine, name)
    command = [engine, "build", "--file", "docker/Dockerfile", "--tag", name]
    command += [
        word for item in arguments(kind, not settings.get("IMAGE")).items() for word in ("--build-arg", "=".join(item))
    ]
    command += [word for name in PROXIES if name in os.environ for word in ("--build-arg", name)]
    command += words(settings, "DOCKER_BUILD_FLAGS") + ["."]
    code = subprocess.call(command, cwd=ROOT, env=dict(os.environ, DOCKER_BUILDKIT="1"))
    if code:
        fail(f"the image {name} could not be built (exit {code})", "read what is above, then make image")


def refuse_others_image(settings, engine, name):
    """Exit when IMAGE names an image that Ferry did not build, because the build would take its name.

    Ferry's images have a label, which other images do not have.
    """
    if not settings.get("IMAGE") or name in DEFAULT_NAMES or not said([engine, "image", "inspect", name]):
        return
    # An image without the label answers with its id only.
    if len(said([engine, "image", "inspect", "--format", ASK, name]).split()) < 2:
        told = f"{engine} has an image {name} that Ferry did not build: the build would take its name"
        fail(told, "choose another IMAGE=name:tag, or leave it out for {} or {}".format(*DEFAULT_NAMES))


def image(settings, engine, kind):
    """Return (name, id) of the image to run.

    The image of IMAGE is pulled when it is missing. Without IMAGE, the image of this checkout is built when it is
    missing or of other sources.
    """
    given = settings.get("IMAGE")
    name = given or "ferry:" + kind
    ask = [engine, "image", "inspect", "--format", ASK, name]
    found = said(ask).split()
    if given and not found and subprocess.call([engine, "pull", name]):
        fail(f"there is no image {name}", "correct IMAGE, or leave it out to have it built")
    elif not given and found[:1] != [sources()]:
        build(settings, engine, kind, name)
    found = said(ask).split()
    if not found:
        fail(f"{name} was made, and {engine} does not have it", "unset BUILDX_BUILDER, then the same command")
    if found[:1] != [sources()]:
        sys.stderr.write(f"note: {name} was made from other sources than this checkout; its code runs\n")
    return name, found[-1]


def run(settings, command, attached):
    """Replace this process by `docker run`, so that its signals and its exit code are those of the container.

    attach_flags: How the container is attached to stdin and the terminal.
    """
    engine, kind = engine_of(settings), kind_of(settings, device())
    if kind == "cuda":
        check_card()
    name, identity = image(settings, engine, kind)
    started = [engine, "run", "--rm", "--init", "--user", user(engine), "--read-only"]
    # "exec" because Triton and libffi load from /tmp what they compile there
    started += ["--tmpfs", "/tmp:rw,exec,mode=1777", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
    if os.getuid() == 0 and os.stat(ROOT).st_uid:  # `sudo make`: without it root cannot write to the user's folders
        started += ["--cap-add", "DAC_OVERRIDE"]
    # Shared memory for data loaders; time to write a checkpoint.
    started += ["--shm-size", "8g", "--stop-timeout", "120"]
    started += gpu(engine) if kind == "cuda" else []
    started += attached
    started += [word for name in PASSED if name in os.environ for word in ("--env", name)]
    # Ctrl-C must reach the processes that make started, not only make.
    started += ["--env", "TINI_KILL_PROCESS_GROUP=1", "--env", "FERRY_IMAGE_ID=" + identity, "--workdir", os.getcwd()]
    started += [word for place in mounts(settings) for word in ("--volume", place)]
    started += words(settings, "DOCKER_RUN_FLAGS") + [name] + command
    sys.stdout.flush()
    os.execvp(engine, started)


def user(engine):
    """Return the user of the container: the caller, who then owns the files that it writes.

    A rootless engine maps the container's root to the caller.
    """
    shape = "{{.Host.Security.Rootless}}" if engine.endswith("podman") else "{{json .SecurityOptions}}"
    rootless = re.search("true|rootless", said([engine, "info", "--format", shape]))
    return "0:0" if rootless else f"{os.getuid()}:{os.getgid()}"


def gpu(engine):
    """Return the flags that give a container access to the GPUs."""
    return ["--device", "nvidia.com/gpu=all"] if engine.endswith("podman") else ["--gpus", "all"]


def words(settings, name):
    """Return a setting split as a shell would split it. Exit when that fails."""
    try:
        return shlex.split(settings.get(name, ""))
    except ValueError as error:
        fail(f"{name}={settings[name]}: {error}", f"correct {name}")


def mounts(settings):
    """Create the folders to mount, and return "folder of this machine:path in the container" for each.

    They are created here because the engine would create them as root.
    """
    hub = os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    seen = {"/cache": cache_folder(), "/cache/huggingface": os.path.abspath(hub)}
    asked = [ROOT] + asked_for(settings)
    seen.update((place, place) for place in asked + outside(settings, asked))
    # The engine would create the last one as a mount point.
    for folder in [*seen.values(), os.path.join(cache_folder(), "huggingface")]:
        make_folder(folder)
    return [f"{folder}:{place}" for place, folder in seen.items()]


def asked_for(settings):
    """Return the folders of MOUNT. Exit when one does not exist."""
    found = [os.path.abspath(os.path.expanduser(folder)) for folder in words(settings, "MOUNT")]
    for folder in found:
        if not os.path.isdir(folder):
            fail(f"MOUNT: there is no folder {folder}", "correct MOUNT")
    return found


def outside(settings, mounted):
    """Return the folders of a command that are not inside a mounted folder, or are inside only by a link."""
    given = dict({"RUNS": "runs", "MODELS": "models", "REPO": "hub"}, **settings)
    # A name on the Hub looks like a path in the current folder, which is mounted.
    paths = [".", given["RUNS"], given["MODELS"], given["REPO"]]
    config = os.path.dirname(given.get("CONFIG", ""))
    paths += [config] if os.path.isdir(config or ".") else []  # the command itself refuses a mistyped one
    both = [resolve(path) for path in paths for resolve in (os.path.abspath, os.path.realpath)]
    there = [*mounted, os.path.realpath(ROOT)]
    return sorted({path for path in both if not any(within(path, folder) for folder in there)})


def within(path, folder):
    """Return whether `path` is `folder` or below it."""
    return os.path.commonpath([path, folder]) == folder


def make_folder(folder):
    """Create a folder to mount. Exit when it cannot be created or mounted at its own path."""
    if ":" in folder:
        fail(f"{folder}: a path with a colon cannot be mounted", "DOCKER=0 runs without an image")
    if any(within(taken, folder) for taken in ("/opt/ferry", "/opt/venv", "/usr")):
        fail(f"{folder}: what the image has there would be hidden", "choose another folder, or DOCKER=0")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        told = f"cannot make {folder}: {error.strerror}"
        fail(told, "give another folder in RUNS, MODELS, FERRY_CACHE or HF_HOME")


def read(words):
    """Return ({setting: value}, the words after --)."""
    end = words.index("--") if "--" in words else len(words)
    return dict(word.split("=", 1) for word in words[:end]), words[end + 1 :]


def main():
    """Run one of the five commands."""
    what, (settings, goals) = sys.argv[1], read(sys.argv[2:])
    if what == "where":
        print(where(settings, goals[0]))
    elif what == "arguments":
        print("\n".join("=".join(item) for item in arguments(kind_of(settings, "cuda"), own=False).items()))
    elif what == "build":
        kind = kind_of(settings, "cuda")
        build(settings, engine_of(settings), kind, settings.get("IMAGE") or "ferry:" + kind)
    elif what == "shell":
        run(settings, ["bash"], ["--interactive"] + ["--tty"] * sys.stdin.isatty())
    else:
        command = ["/opt/ferry/ferry"] + goals
        run(settings, command, ["--interactive", "--tty"] if sys.stdout.isatty() and sys.stdin.isatty() else [])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
