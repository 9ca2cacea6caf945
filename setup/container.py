"""Ferry's image: when a target runs in it, how it is built, how it is started. Any Python 3.6 of the host will do.

    python3 setup/container.py where  [SETTING=value ...] -- train      `image`, `native` or `refused`; on stderr, why
    python3 setup/container.py build  [SETTING=value ...]
    python3 setup/container.py run    [SETTING=value ...] -- train configs/a.yaml    (arguments of `ferry`)
    python3 setup/container.py shell  [SETTING=value ...]
    python3 setup/container.py arguments [DEVICE=...]       the build arguments, for another builder

Settings, by their names in make: DOCKER=0|1, IMAGE=name:tag, DEVICE=cpu|cuda, ENGINE=docker|podman, MOUNT="folder ...",
DOCKER_BUILD_FLAGS, DOCKER_RUN_FLAGS; and what must be mounted: CONFIG, RUNS, MODELS, REPO. The checkout and the current
folder are mounted at their own paths, so that what is printed inside is true outside. The code that runs is the image's.
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
# What the image is made from (.dockerignore lets in no more); their hash tells whether an image is this checkout's.
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
# By name: the value never stands on a command line, in a log or in the image.
PASSED = (
    "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "WANDB_API_KEY", "WANDB_MODE", "CUDA_VISIBLE_DEVICES",
    "UNSLOTH_FORCE_CPU", "OMP_NUM_THREADS", "FERRY_HUB_SECONDS", "FERRY_SILENCE_SECONDS", "FERRY_API_KEY", "FERRY_GRACE_SECONDS",
    *PROXIES,
)  # fmt: skip


def decide(settings):
    """(in the image?, why), from what was typed, else from what this machine is."""
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
    """The one word for make, which does not see this program's exit code; why, for the user."""
    try:
        chosen, why = decide(settings)
    except SystemExit:
        return "refused"
    sys.stderr.write("{}: {} ({})\n".format(goal, "in the image" if chosen else "natively", why))
    return "image" if chosen else "native"


def inside():
    """Is this machine a container? A rented pod is one, and has no engine of its own."""
    return any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))) or "KUBERNETES_SERVICE_HOST" in os.environ


def lacking(engine):
    """What a container with a GPU would need and is not here; nothing if all is."""
    about = said([engine, "info", "--format", "{{json .}}"])
    if not about or '"ServerErrors"' in about:  # an old docker tells of itself when its daemon does not
        return f"no {engine} here that answers"
    if "nvidia" not in about and not said(["nvidia-ctk", "--version"]):
        return f"{engine} has no NVIDIA runtime (nvidia-container-toolkit; then: nvidia-ctk runtime configure)"
    return ""


def engine_of(settings):
    """The engine, which must answer."""
    engine = settings.get("ENGINE") or "docker"
    if not said([engine, "version"]):
        cure = "start it or install it; ENGINE=podman takes another one, DOCKER=0 runs without"
        fail(f"the container engine `{engine}` does not answer", cure)
    return engine


def kind_of(settings, otherwise):
    """cpu or cuda."""
    kind = settings.get("DEVICE") or otherwise
    if kind not in ("cpu", "cuda"):
        fail(f"DEVICE={kind}: there is an image for cpu and one for cuda", "DEVICE=cpu or DEVICE=cuda")
    return kind


def sources():
    """Twelve hex digits of everything that goes into the image."""
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in files_of(os.path.join(ROOT, name))):
        digest.update(f"{os.path.relpath(path, ROOT)} {hash_of(path)}\n".encode())
    return digest.hexdigest()[:12]


def files_of(path):
    """A file, or all files of a folder that are not made by running them."""
    if os.path.isfile(path):
        return [path]
    walked = ((folder, name) for folder, _, names in os.walk(path) for name in names)
    return [
        os.path.join(*found)
        for found in walked
        if not found[0].endswith("__pycache__") and os.path.isfile(os.path.join(*found))
    ]


def revision():
    """The checkout's commit, whether it was changed since, and where it came from, for provenance."""
    sent = os.path.join(
        ROOT, "revision.json"
    )  # a tree that `make cloud-to-local` sent: it has no repository (pipeline/toolchain/git.py)
    if os.path.isfile(sent):
        return revision_sent(sent)
    git = ["git", "-C", ROOT]
    url = re.sub("//[^/@]*@", "//", said(git + ["remote", "get-url", "origin"]))  # no token of a remote
    commit = said(git + ["rev-parse", "HEAD"])
    changed = said(git + ["status", "--porcelain"]) or not commit
    return {"COMMIT": commit, "DIRTY": "true" if changed else "false", "ORIGIN": url}


def revision_sent(path):
    """The same of a tree without git."""
    with open(path, encoding="utf-8") as file:
        sent = json.load(file)
    changed = (name for name, digest in sent["files"].items() if hash_of(os.path.join(ROOT, name)) != digest)
    dirty = "true" if any(changed) else "false"
    return {"COMMIT": sent["commit"], "DIRTY": dirty, "ORIGIN": sent["url"] or ""}


def hash_of(path):
    """sha256 of a file; nothing where there is none."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def arguments(kind, own):
    """The image's build arguments; own: for this machine alone. None is a secret: they stay in its history."""
    # An old buildah does not follow the Dockerfile's own default to a stage.
    given = dict({"DEVICE": kind, "LLAMA_IMAGE": "llama-built", "SOURCES": sources()}, **revision())
    if own and kind == "cuda" and capability():  # only this card's code: five times faster to compile
        given["FERRY_CUDA"] = capability()
    return given


def build(settings, engine, kind, name):
    """`docker build`, with the sources' hash as a label."""
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
    """A name that was typed and that another image has stays with it: Ferry's images carry a label, others do not."""
    if not settings.get("IMAGE") or name in DEFAULT_NAMES or not said([engine, "image", "inspect", name]):
        return
    if len(said([engine, "image", "inspect", "--format", ASK, name]).split()) < 2:  # no more than its id
        told = f"{engine} has an image {name} that Ferry did not build: the build would take its name"
        fail(told, "choose another IMAGE=name:tag, or leave it out for {} or {}".format(*DEFAULT_NAMES))


def image(settings, engine, kind):
    """(name, id) of the image to run: the one asked for, or this checkout's, built if it is not there as it should be."""
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
    """Become `docker run`: its signals and its exit code are ours. attached: what it takes of stdin and the terminal."""
    engine, kind = engine_of(settings), kind_of(settings, device())
    if kind == "cuda":
        check_card()
    name, identity = image(settings, engine, kind)
    started = [engine, "run", "--rm", "--init", "--user", user(engine), "--read-only"]
    # exec: what Triton and libffi compile is loaded from there
    started += ["--tmpfs", "/tmp:rw,exec,mode=1777", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
    if os.getuid() == 0 and os.stat(ROOT).st_uid:  # `sudo make`: root without it writes to no one's folders
        started += ["--cap-add", "DAC_OVERRIDE"]
    started += ["--shm-size", "8g", "--stop-timeout", "120"]  # loaders' shared memory; time to write a checkpoint
    started += gpu(engine) if kind == "cuda" else []
    started += attached
    started += [word for name in PASSED if name in os.environ for word in ("--env", name)]
    # Ctrl-C must reach what make started, and not make alone.
    started += ["--env", "TINI_KILL_PROCESS_GROUP=1", "--env", "FERRY_IMAGE_ID=" + identity, "--workdir", os.getcwd()]
    started += [word for place in mounts(settings) for word in ("--volume", place)]
    started += words(settings, "DOCKER_RUN_FLAGS") + [name] + command
    sys.stdout.flush()
    os.execvp(engine, started)


def user(engine):
    """The caller, so that what is written is his. A rootless engine maps its root to him."""
    shape = "{{.Host.Security.Rootless}}" if engine.endswith("podman") else "{{json .SecurityOptions}}"
    rootless = re.search("true|rootless", said([engine, "info", "--format", shape]))
    return "0:0" if rootless else f"{os.getuid()}:{os.getgid()}"


def gpu(engine):
    """How a container gets to see the cards."""
    return ["--device", "nvidia.com/gpu=all"] if engine.endswith("podman") else ["--gpus", "all"]


def words(settings, name):
    """A setting that is a list, as a shell would read it."""
    try:
        return shlex.split(settings.get(name, ""))
    except ValueError as error:
        fail(f"{name}={settings[name]}: {error}", f"correct {name}")


def mounts(settings):
    """Where the container sees which folder of this machine; made here, or the engine would make them as root."""
    hub = os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    seen = {"/cache": cache_folder(), "/cache/huggingface": os.path.abspath(hub)}
    asked = [ROOT] + asked_for(settings)
    seen.update((place, place) for place in asked + outside(settings, asked))
    # The last one is where the engine would make a mount point.
    for folder in [*seen.values(), os.path.join(cache_folder(), "huggingface")]:
        make_folder(folder)
    return [f"{folder}:{place}" for place, folder in seen.items()]


def asked_for(settings):
    """The folders of MOUNT, which must be there."""
    found = [os.path.abspath(os.path.expanduser(folder)) for folder in words(settings, "MOUNT")]
    for folder in found:
        if not os.path.isdir(folder):
            fail(f"MOUNT: there is no folder {folder}", "correct MOUNT")
    return found


def outside(settings, mounted):
    """Folders that a command writes to or reads from and that are in none of those mounted, or only by a link."""
    given = dict({"RUNS": "runs", "MODELS": "models", "REPO": "hub"}, **settings)
    # A name on the Hub looks like a path in the current folder, which is mounted.
    paths = [".", given["RUNS"], given["MODELS"], given["REPO"]]
    config = os.path.dirname(given.get("CONFIG", ""))
    paths += [config] if os.path.isdir(config or ".") else []  # a mistyped one is the command's to refuse
    both = [resolve(path) for path in paths for resolve in (os.path.abspath, os.path.realpath)]
    there = [*mounted, os.path.realpath(ROOT)]
    return sorted({path for path in both if not any(within(path, folder) for folder in there)})


def within(path, folder):
    """Is it that folder, or below it?"""
    return os.path.commonpath([path, folder]) == folder


def make_folder(folder):
    """A folder that can be mounted where it is."""
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
    """({setting: value}, what comes after --)"""
    end = words.index("--") if "--" in words else len(words)
    return dict(word.split("=", 1) for word in words[:end]), words[end + 1 :]


def main():
    """One of the five."""
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
