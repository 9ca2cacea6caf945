"""Ollama's models folder: names, blobs, manifests, and `create`. What is where is what the real one writes."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MEDIA = "application/vnd.ollama.image."
CONFIG = "application/vnd.docker.container.image.v1+json"
# PARAMETER -> its type (api/types.go, Options and Runner).
PARAMETERS = {
    **dict.fromkeys(["num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"], int),
    **dict.fromkeys(["top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"], float),
    "stop": list, "use_mmap": bool,
}  # fmt: skip
# Known chat templates, and what is put beside a GGUF whose own one is nearly the same (template/index.json has 37).
TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
DEFAULT = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
KNOWN = [
    f"{{% for message in messages %}}{start}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
    for start in ("", DEFAULT)
]
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
CHATML_STOPS = {"stop": ["<|im_start|>", "<|im_end|>"]}


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Name(NamedTuple):
    """types/model/name.go"""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> "Name":
        tag, missing = "latest", "!MISSING!"  # a part that a separator promised
        if text.rfind(":") > text.rfind("/"):
            text, _, tag = text.rpartition(":")
            text, tag = text or missing, tag or missing
        rest, slash, model = text.rpartition("/")
        model = (model or missing) if slash else text
        host, cut, namespace = rest.rpartition("/")
        namespace = (namespace or missing) if slash else "library"
        host = (host.rpartition("://")[2] or missing) if cut else "registry.ollama.ai"
        return cls(host, namespace, model, tag)

    def valid(self) -> bool:
        kinds = ("[A-Za-z0-9_.:-]{0,349}", "[A-Za-z0-9_-]{0,79}", "[A-Za-z0-9_.-]{0,79}", "[A-Za-z0-9_.-]{0,79}")
        return all(re.fullmatch(f"[A-Za-z0-9_]{kind}", part) for kind, part in zip(kinds, self, strict=True))

    def __str__(self) -> str:
        """DisplayShortest"""
        start = "" if self.namespace.lower() == "library" else f"{self.namespace}/"
        start = start if self.host.lower() == "registry.ollama.ai" else f"{self.host}/{self.namespace}/"
        return f"{start}{self.model}:{self.tag}"


def sha256(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


class Library:
    def __init__(self, folder: Path):
        self.blobs, self.manifests = folder / "blobs", folder / "manifests"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.manifests.mkdir(exist_ok=True)

    def blob(self, digest: str) -> Path:
        if not re.fullmatch("sha256[:-][0-9a-fA-F]{64}", digest):
            raise Refused(400, "invalid digest format")
        return self.blobs / digest.replace(":", "-")

    def add(self, data: Iterable[bytes], media: str = "") -> tuple[dict, str]:
        """(layer, status) of a blob with this content (manifest/layer.go)."""
        part = self.blobs / f"sha256-{os.urandom(5).hex()}"
        try:
            with part.open("wb") as file:
                digest = sha256(chunk for chunk in data if file.write(chunk) or True)
            there = self.blob(digest).exists()
            if there:
                os.utime(self.blob(digest))
            else:
                os.replace(part, self.blob(digest))
        finally:
            part.unlink(missing_ok=True)
        layer = {"mediaType": media, "digest": digest, "size": self.blob(digest).stat().st_size}
        return layer, f"{'using existing' if there else 'creating new'} layer {digest}"

    def names(self) -> dict[Name, dict]:
        found = {}
        for path in self.manifests.glob("*/*/*/*"):
            name = Name(*path.relative_to(self.manifests).parts)
            # `list` shows no manifest that a full disk emptied
            if path.is_file() and path.stat().st_size and name.valid():
                found[name] = json.loads(path.read_bytes())
        return found

    def existing(self, name: Name) -> Name:
        """Each part spelled as in any model that is there."""
        for other in self.names():
            name = Name(*(b if a.lower() == b.lower() else a for a, b in zip(name, other, strict=True)))
        return name

    def path(self, name: Name) -> Path:
        return self.manifests.joinpath(*name)

    def manifest(self, name: Name) -> dict | None:
        if not self.path(name).is_file():
            return None
        if not (content := self.path(name).read_bytes()):
            raise Refused(500, "EOF")
        return json.loads(content)

    def write(self, name: Name, content: bytes) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_bytes(content)

    def layer(self, made: dict, kind: str) -> bytes | None:
        for layer in made["layers"]:
            if layer["mediaType"] == MEDIA + kind:
                return self.blob(layer["digest"]).read_bytes()
        return None

    def drop(self, layers: Iterable[dict]) -> None:
        """Delete the blobs that no manifest names."""
        used = {layer["digest"] for made in self.names().values() for layer in [*made["layers"], made["config"]]}
        for layer in layers:
            if layer["digest"] not in used:
                self.blob(layer["digest"]).unlink(missing_ok=True)

    def delete(self, name: Name) -> None:
        made = self.manifest(name)
        self.path(name).unlink()
        for folder in list(self.path(name).parents)[:3]:
            if not any(folder.iterdir()):
                folder.rmdir()
        self.drop([*made["layers"], made["config"]])

    def prune(self) -> None:
        """At the server's start: blobs older than an hour that no manifest names (server/images.go, PruneLayers).

        So the file that a client uploaded for `create` stays beside the rewritten one until then.
        """
        old = [path for path in self.blobs.iterdir() if time.time() - path.stat().st_mtime > 3600]
        self.drop({"digest": path.name.replace("-", ":")} for path in old if len(path.name) == 71)
        for path in old:
            if len(path.name) != 71:
                path.unlink()


def distance(a: str, b: str, most: int) -> int:
    """Levenshtein's, `most` when it is greater."""
    if abs(len(a) - len(b)) >= most:
        return most
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return min(row[-1], most)


def known(template: str) -> bool:
    return any(distance(template, each, 100) < 100 for each in KNOWN)
