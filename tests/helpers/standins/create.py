"""POST /api/create (server/create.go): a GGUF or a model that is there, and what the Modelfile says of it."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from tests.helpers.standins import library, runner
from tests.helpers.standins.library import MEDIA, Library, Name, Refused

BY_CODE = ("gemma4", "laguna", "nemotron_h", "nemotron_h_moe", "nemotron_h_omni", "gptoss", "gpt-oss")


def control(name: str) -> Path:
    """A file between a test and its stand-in (tests/helpers/apps.py)."""
    return Path(os.environ["OLLAMA_STANDIN"]) / name


def faults() -> dict:
    with contextlib.suppress(FileNotFoundError):
        return json.loads(control("faults.json").read_bytes())
    return {}


def ref(text: str) -> Name:
    """internal/modelref: the tag `local` only says where a model is."""
    if not text.strip():
        raise Refused(400, "model is required")
    name = Name.parse(re.sub(r"(?i):\s*local$", "", text.strip()))
    if not name.valid():
        raise Refused(400, "invalid model name")
    return name


def count(header) -> int:
    return sum(math.prod(tensor.shape) for tensor in header.tensors)


def parameters(header) -> str:
    """format.HumanNumber of how many there are."""
    number = count(header)
    for unit, name, form in ((1e9, "B", ".1f"), (1e6, "M", ".2f")):
        if number >= unit:
            return f"{number / unit:{'.0f' if number % unit == 0 else form}}{name}"
    return f"{number / 1e3:.0f}K" if number >= 1000 else str(number)


def quantization(header) -> str:
    import gguf

    number = int(header.metadata.get("general.file_type") or 0)
    known = {int(kind): kind.name.removeprefix("MOSTLY_") for kind in gguf.LlamaFileType}
    return known.get(number, "unknown") if number else "unknown"


class Create:
    """One /api/create: what it says while it works."""

    def __init__(self, store: Library, asked: dict):
        self.store, self.asked = store, asked
        for file, digest in (asked.get("files") or {}).items():
            if not file or file.startswith("/") or {"", ".", ".."} & set(file.split("/")):
                raise Refused(400, "file path must be relative")
            if not digest:
                raise Refused(400, "invalid digest format")
        self.name = Name.parse(asked.get("model") or asked.get("name") or "")
        if not self.name.valid():
            raise Refused(400, "invalid model name")
        self.name = store.existing(self.name)
        self.layers: list[dict] = []
        self.said: list[str] = []  # of each layer, told at the end

    def run(self) -> Iterator[dict]:
        before = self.store.manifest(self.name)
        if self.asked.get("from"):
            yield from self._from_model()
        elif self.asked.get("files") is not None:
            yield from self._from_files()
        else:
            raise Refused(400, "neither 'from' or 'files' was specified")
        self._from_modelfile()
        config, _ = self.store.add([json.dumps(self.config).encode() + b"\n"], library.CONFIG)
        yield from ({"status": line} for line in self.said)
        yield {"status": "writing manifest"}
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        made = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": self.layers}
        self.store.write(self.name, json.dumps(made, separators=(",", ":")).encode() + b"\n")
        if before:
            self.store.drop([*before["layers"], before["config"]])
        yield {"status": "success"}

    def _from_model(self) -> Iterator[dict]:
        name = ref(self.asked["from"])
        made = self.store.manifest(name)
        if made is None:
            yield {"status": "pulling manifest"}
            raise Refused(500, "pull model manifest: file does not exist")
        self.config = json.loads(self.store.blob(made["config"]["digest"]).read_bytes())
        self.layers = [layer | {"from": str(name)} for layer in made["layers"]]
        self.said = [f"using existing layer {layer['digest']}" for layer in self.layers]

    def _from_files(self) -> Iterator[dict]:
        files = self.asked["files"]
        if len(files) != 1:
            raise Refused(400, "the stand-in takes one GGUF" if files else "unknown type")
        file, digest = next(iter(files.items()))
        source = self.store.blob(digest)
        magic = next(library.chunks(source), b"")[:4] if source.exists() else None
        if not file.endswith(".gguf") and magic != b"GGUF":
            raise Refused(400, "unknown type")
        yield {"status": "parsing GGUF"}
        if magic is None:
            raise Refused(500, f"open {source}: no such file or directory")
        if magic != b"GGUF":
            raise Refused(400, "supplied file was not in GGUF format")
        header = self._header(source)
        self._autodetect(str(header.metadata.get("tokenizer.chat_template") or ""))
        yield from self._rewrite(source)

    def _header(self, source: Path):
        try:
            header = runner.header(source)
        except UserError as error:
            raise Refused(500, error.message) from error
        family = header.metadata["general.architecture"]
        if family in BY_CODE:
            raise Refused(501, f"the stand-in does not render {family} as Ollama does")
        self.config = {
            "model_format": "gguf", "model_family": family, "model_families": [family], "model_type": parameters(header),
            "file_type": quantization(header), "architecture": "amd64", "os": "linux",
        }  # fmt: skip
        return header

    def _autodetect(self, template: str) -> None:
        if template and library.known(template):
            self._add("template", library.CHATML.encode(), "using autodetected template chatml")
            self._add("params", json.dumps(library.CHATML_STOPS).encode() + b"\n")

    def _rewrite(self, source: Path) -> Iterator[dict]:
        """Every GGUF goes through llama-quantize: another digest, and the uploaded one stays beside it."""
        copy = source.with_name(f"COPY{os.urandom(4).hex()}")
        try:
            if faults().get("die") == "create":
                os._exit(9)
            if faults().get("full") or not runner.rewritten(source, copy):
                why = "failed to validate GGUF with llama-quantize without compatibility patches"
                raise Refused(500, f"{why}: llama-quantize failed: exit status 1")
            yield {"status": "verifying conversion"}
            layer, said = self.store.add(library.chunks(copy), f"{MEDIA}model")
        finally:
            copy.unlink(missing_ok=True)
        self.layers.insert(0, layer)
        self.said.insert(0, said)

    def _from_modelfile(self) -> None:
        if template := self.asked.get("template"):
            answer = runner.go().ask(Template=template, Messages=[], Raw=True)
            if answer["names"] is None:
                raise Refused(400, f"template error: {answer['error']}")
            self._replace("template", template.encode())
        if system := self.asked.get("system"):
            self._replace("system", system.encode())
        params = self._json("params", {}) | (self.asked.get("parameters") or {})
        if params:
            self._replace("params", json.dumps(params, ensure_ascii=False).encode() + b"\n")

    def _json(self, kind: str, usual: dict) -> dict:
        found = [layer for layer in self.layers if layer["mediaType"] == MEDIA + kind]
        return json.loads(self.store.blob(found[0]["digest"]).read_bytes()) if found else usual

    def _add(self, kind: str, content: bytes, said: str = "") -> None:
        layer, usual = self.store.add([content], MEDIA + kind)
        self.layers.append(layer)
        self.said.append(said or usual)

    def _replace(self, kind: str, content: bytes) -> None:
        kept = [i for i, layer in enumerate(self.layers) if layer["mediaType"] != MEDIA + kind]
        gone = [layer for layer in self.layers if layer["mediaType"] == MEDIA + kind]
        self.layers, self.said = [self.layers[i] for i in kept], [self.said[i] for i in kept]
        self.store.drop(gone)
        self._add(kind, content)
