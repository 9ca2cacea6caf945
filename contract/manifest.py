"""manifest.json: the contract between the cloud side and the Mac side, and all that the Mac needs to know.

Written last into a hub folder, read first by `pull`. A field is added with a new SCHEMA; readers refuse newer ones.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from contract import files
from contract.errors import UserError
from contract.turns import Turns

SCHEMA = 2
NAME = "manifest.json"
MAX_BYTES = 8 << 20  # a manifest is text of some 20 KB; anything far larger is not one

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _safe(name: str) -> str:
    """A plain relative file name: nothing that could be written outside the folder it belongs to."""
    if (
        not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127})?", name)
        or ".." in PurePosixPath(name).parts
    ):
        raise ValueError(f"{name!r} is no safe file name")
    return name


FileName = Annotated[str, AfterValidator(_safe)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class BaseModelInfo(Part):
    """Where it started."""

    model: str
    revision: str | None
    license: str | None
    architecture: str
    name: str


class Dataset(Part):
    source: str
    revision: str | None
    sha256: dict[str, Sha256]
    """Of every local file that was read."""
    rows: dict[str, int]
    split: str
    split_hash: Sha256
    """Of the held-out rows."""


class ChatFormat(Part):
    template: str
    """Jinja text, as trained and as embedded in the GGUF."""
    sha256: Sha256
    stop: tuple[str, ...]
    bos: str | None
    bos_in_template: bool
    adds_bos: bool = False
    """Whether runtimes put the BOS in front of a prompt by themselves (tokenizer.ggml.add_bos_token)."""
    system: str | None
    turns: Turns | None = None
    """What an Ollama TEMPLATE says of the template, proven on the golden prompts; None: no TEMPLATE says the same."""
    embedded: tuple[str, ...] = ()
    """Why the template inside the GGUF is the one to use: what a TEMPLATE cannot say of it. Empty: TEMPLATE says it all."""


class Generation(Part):
    temperature: float
    top_p: float
    num_ctx: int
    max_tokens: int


class Artifact(Part):
    kind: Literal["gguf", "adapter"]
    file: FileName
    quantization: str | None
    sha256: Sha256
    bytes: Annotated[int, Field(gt=0)]
    tensor_types: dict[str, int] = {}
    imatrix: Sha256 | None = None
    """Of the importance matrix that weighed the quantization."""
    default: bool = False


class Golden(Part):
    """A synthetic conversation, its exact prompt and the prompt's token ids."""

    messages: tuple[dict[str, str], ...]
    add_generation_prompt: bool = True
    prompt: str
    ids: tuple[int, ...]


class Smoke(Part):
    """A prompt, and what the default artifact answered on the cloud side."""

    message: str
    ids: tuple[int, ...]
    """Tokens of the rendered prompt."""
    answer: str
    answer_ids: tuple[int, ...]
    """Greedy, with the end token when the model gave it."""
    log_probs: tuple[float, ...]
    """Natural-log probability of each answer token, given all before it."""


class Manifest(Part):
    schema_version: int = SCHEMA
    id: Sha256 | None = None
    """Stands in every GGUF of the run too, as ferry.manifest_id."""
    name: str
    base: BaseModelInfo
    dataset: Dataset
    chat: ChatFormat
    generation: Generation
    artifacts: tuple[Artifact, ...]
    config: dict
    training: dict
    scores: dict
    provenance: dict
    golden: tuple[Golden, ...]
    smoke: tuple[Smoke, ...]

    def default(self) -> Artifact:
        """The artifact that the Mac takes when none is named."""
        return next(artifact for artifact in self.artifacts if artifact.default)


def read(path: Path) -> Manifest:
    """Raises UserError when the file is missing, too large, newer than this reader, or not a valid manifest."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(
            f"{path} is {path.stat().st_size} bytes, a manifest has at most {MAX_BYTES}",
            "is this the right repo? publish it again",
        )
    value = files.read_json(path)
    version = value.get("schema_version")
    if isinstance(version, int) and version > SCHEMA:
        raise UserError(f"{path} has schema {version}, this Ferry reads up to {SCHEMA}", "update Ferry: `git pull`")
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(
            f"{path} is no valid manifest: {'.'.join(map(str, fault['loc']))}: {fault['msg']}",
            "publish it again: `make publish`",
        ) from error
    if sum(artifact.default for artifact in manifest.artifacts) != 1:
        raise UserError(f"{path} names no single default artifact", "publish it again: `make publish`")
    return manifest
