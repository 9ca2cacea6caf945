"""`make lock-images`: write the digest of each base image into docker/Dockerfile, behind its tag.

    python3 setup/pin.py            ask the registry and write
    python3 setup/pin.py --check    exit with code 2 when a base image has no digest (the release workflow)

skopeo asks the registry, or docker when there is no skopeo.
"""

import os
import re
import sys
from pathlib import Path

from interpreter import read_output
from shared import fail, write_atomically

DOCKERFILE = Path(
    os.environ.get("FERRY_DOCKERFILE") or Path(__file__).resolve().parent.parent / "docker" / "Dockerfile"
)
BASE_IMAGE_LINE = re.compile(r"^(ARG BASE_IMAGE=)([^\s@]+)(@sha256:[0-9a-f]{64})?$", re.MULTILINE)


def fetch_digest(name: str) -> str:
    """Ask the registry for the current digest (sha256:...) of a tag, for all platforms. Exit when none answers."""
    commands = (
        ["skopeo", "inspect", "--no-tags", "--format", "{{.Digest}}", "docker://" + name],
        ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", name],
    )
    for command in commands:
        if re.fullmatch("sha256:[0-9a-f]{64}", answer := read_output(command)):
            return answer
    fail(f"no registry answered for {name}", "install skopeo, check the network, then make lock-images")


def main() -> None:
    """Pin the base images in the Dockerfile, or with --check only test that they are pinned."""
    text = DOCKERFILE.read_text()
    if "--check" in sys.argv:
        if unpinned := [match[2] for match in BASE_IMAGE_LINE.finditer(text) if not match[3]]:
            fail(f"not pinned by a digest: {', '.join(unpinned)}", "make lock-images, then commit docker/Dockerfile")
        return
    pinned = BASE_IMAGE_LINE.sub(lambda match: f"{match[1]}{match[2]}@{fetch_digest(match[2].split('@')[0])}", text)
    write_atomically(DOCKERFILE, pinned)
    print(
        "\n".join("".join(match[1:3]) for match in BASE_IMAGE_LINE.findall(pinned)) if pinned != text else "no change"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
