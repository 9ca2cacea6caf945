"""Run while the image is built: prove that what was put into it works, and write down what it is.

python setup/image.py stack /opt/stack.json             after the packages: import all of it, say what there is
python setup/image.py whole /opt/stack.json image.json  after the code: run the programs, add what they were made from
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
# unsloth before transformers, as Ferry imports them.
STACK = (
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


def stack() -> dict:
    """Import everything; versions, locks, llama.cpp. Raises what an import raises."""
    for name in STACK:
        importlib.import_module(name)
    llama = Path(sys.prefix) / "llama.cpp"
    cuda = os.environ | {"LD_LIBRARY_PATH": sysconfig.get_path("platlib") + "/nvidia/cu13/lib"}
    for tool in ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-render"):  # its libraries are found
        done = subprocess.run([llama / "bin" / tool, "--help"], env=cuda, capture_output=True, text=True)
        if "error while loading" in done.stderr:
            raise SystemExit(done.stderr)
    return {
        "device": os.environ["FERRY_DEVICE"],
        "base": os.environ["BASE_IMAGE"],
        "debian": os.environ["DEBIAN"],
        "python": platform.python_version(),
        "llama.cpp": json.loads((llama / "build.json").read_text()),
        "packages": dict(sorted((found.metadata["Name"].lower(), found.version) for found in distributions())),
    }


def whole(described: dict) -> dict:
    """Run both programs and the graph as a user's command would; the checkout that they came from."""
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
    return {"sources": os.environ.get("SOURCES"), "git": git, "locks": locks, **described}


def main() -> None:
    what, *paths = sys.argv[1:]
    described = stack() if what == "stack" else whole(json.loads(Path(paths[0]).read_text()))
    Path(paths[-1]).write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
