"""Test what is in the image while the image is built, and write a description of it.

python setup/image.py stack /opt/stack.json             after the packages: import all of them, describe them
python setup/image.py whole /opt/stack.json image.json  after the code: run the programs, add their sources
"""

import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).resolve().parent
# unsloth comes before transformers, as in Ferry's imports.
STACK_MODULES = (
    "unsloth",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "llama_cpp",
    "gguf",
    "click",
)


def check_stack() -> dict:
    """Import all packages, start the tools of llama.cpp, and return a description: device, base image, versions.

    Raises:
        SystemExit: A tool does not find its libraries.
    """
    for name in STACK_MODULES:
        importlib.import_module(name)
    llama = Path(sys.prefix) / "llama.cpp"
    environment = os.environ | {"LD_LIBRARY_PATH": sysconfig.get_path("platlib") + "/nvidia/cu13/lib"}
    for tool in (
        "llama-quantize",
        "llama-imatrix",
        "llama-perplexity",
        "llama-render",
    ):  # whether each finds its libraries
        done = subprocess.run([llama / "bin" / tool, "--help"], env=environment, capture_output=True, text=True)
        if "error while loading" in done.stderr:
            raise SystemExit(done.stderr)
    return {
        "device": os.environ["FERRY_DEVICE"],
        "base": os.environ["BASE_IMAGE"],
        "debian": os.environ["DEBIAN"],
        "python": platform.python_version(),
        "llama.cpp": json.loads((llama / "build.json").read_text()),
        "packages": dict(
            sorted((distribution.metadata["Name"].lower(), distribution.version) for distribution in distributions())
        ),
    }


def check_image(description: dict) -> dict:
    """Run `ferry` and make as a user would, and return the description with the checkout that the code came from."""
    for command in ("/opt/ferry/ferry --help", "/opt/ferry/ferry deploy-mac --help", "make -f /opt/ferry/Makefile"):
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL, cwd="/")
    git = {
        "url": os.environ.get("ORIGIN") or None,
        "commit": os.environ.get("COMMIT") or None,
        "dirty": os.environ.get("DIRTY") != "false",
    }
    locks = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((HERE / "locks").glob("*.txt"))
    }
    return {"sources": os.environ.get("SOURCES"), "git": git, "locks": locks, **description}


def main() -> None:
    """Run `stack` or `whole`, and write the description."""
    action, *paths = sys.argv[1:]
    description = check_stack() if action == "stack" else check_image(json.loads(Path(paths[0]).read_text()))
    Path(paths[-1]).write_text(json.dumps(description, indent=2) + "\n")


if __name__ == "__main__":
    main()
