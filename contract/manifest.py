"""manifest.json: the contract between the GPU side and the Mac side, with all that the Mac needs to know.

It is written last into a hub folder and read first by `pull`. Every new field comes with a new SCHEMA_VERSION; a reader
refuses manifests that are newer than itself.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
    with_config,
)
from typing_extensions import Required, TypedDict  # pydantic needs this one below Python 3.12

from common import files
from common.errors import UserError, printable_line
from contract import limits
from contract.limits import Message, Temperature, Text, Tokens, TopP
from contract.ollama_template import Turns

SCHEMA_VERSION = 5
FILE_NAME = "manifest.json"

SUFFIX_BY_KIND = {"gguf": ".gguf", "adapter": ".safetensors", "merged": ".safetensors"}  # never a pickle
# Ends of names that Ferry itself uses beside the pulled files, and of files that run as code when they are loaded.
FORBIDDEN_SUFFIXES = (
    *(".part", "pull.json", "smoke.json", "modelfile", "modelfile.json"),
    *(".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".py", ".so", ".dylib", ".sh"),
)
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _validate_file_name(name: str) -> str:
    """Return `name`. Raise ValueError unless it is a plain relative name, which cannot leave its folder."""
    if not is_safe_name(name):
        raise ValueError(f"{name!r} is not a safe file name")
    return name


def is_safe_name(name: str) -> bool:
    """Return whether a manifest may list a file of that name."""
    return bool(re.fullmatch(f"{NAME_PATTERN}(/{NAME_PATTERN})?", name)) and not name.lower().endswith(
        FORBIDDEN_SUFFIXES
    )


TokenIds = tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...]
# One token more than an answer may have: the end token.
AnswerIds = Annotated[TokenIds, Field(min_length=1, max_length=limits.MAX_ANSWER_TOKENS + 1)]
Quantization = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")]  # llama.cpp's names, such as q4_k_m
Fingerprint = Annotated[str, Field(pattern=r"^(\d{1,9}:[0-9a-f]{0,8192})?$")]  # pipeline/data/fingerprint.py
Nats = Annotated[float, Field(ge=-1e9, le=1e9)]
# A step of the quality ladder: base, adapter, q4_k_m.
LadderStep = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]
ShortText = Annotated[str, Field(max_length=256)]
FileName = Annotated[str, AfterValidator(_validate_file_name)]
Name = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]


class ManifestPart(BaseModel):
    """A part of the manifest: frozen, without unknown fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class BaseModelInfo(ManifestPart):
    """The base model."""

    model: Text
    revision: Text | None
    license: Text | None
    """As the base model states it, by the Hub's identifiers; None: it states none."""
    license_name: Text | None = None
    license_link: Text | None = None
    architecture: Text
    name: Text


class Dataset(ManifestPart):
    """The training data."""

    source: Text
    revision: Text | None
    sha256: Annotated[dict[Text, Sha256], Field(max_length=limits.MAX_FILES)]
    """By name of each local file that was read."""
    rows: dict[str, Annotated[int, Field(ge=0, lt=1 << 63)]]
    split: Text
    split_hash: Sha256
    """Hash of the held-out rows."""
    train_sha256: Sha256 | None = None
    """Hash of the training rows, as token ids and labels."""
    fingerprints: Annotated[dict[Text, Fingerprint], Field(max_length=limits.MAX_FILES)] = {}
    """By name of each local file: tells which rows changed when its sha256 differs (pipeline/data/fingerprint.py)."""


class ChatFormat(ManifestPart):
    """How conversations become prompts."""

    template: Annotated[str, Field(max_length=limits.MAX_TEMPLATE_CHARS)]
    """The chat template (Jinja), as trained and as embedded in the GGUF."""
    sha256: Sha256
    stop: Annotated[tuple[ShortText, ...], Field(max_length=64)]
    bos: ShortText | None
    bos_in_template: bool
    adds_bos: bool = False
    """Whether runtimes add the BOS in front of a prompt by themselves (tokenizer.ggml.add_bos_token)."""
    system: Message | None
    """The default system prompt, for conversations that have none."""
    input: ShortText | None = None
    """The text between an instruction and its input in one user message, where the rows have both (Alpaca)."""
    turns: Turns | None = None
    """The template in the form of an Ollama TEMPLATE, proven on the golden prompts; None: no TEMPLATE is equivalent."""
    embedded: Annotated[tuple[Message, ...], Field(max_length=64)] = ()
    """What a TEMPLATE cannot express, so that the template inside the GGUF is used. Empty: it expresses everything."""


class Generation(ManifestPart):
    """The default settings for generating text."""

    temperature: Temperature
    top_p: TopP
    num_ctx: Tokens
    max_tokens: Tokens


class PublishedFile(ManifestPart):
    """One published file, such as the model card, the licence, or the adapter's config and tokenizer."""

    file: FileName
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0, le=limits.MAX_FILE_BYTES, strict=True)]


class Artifact(PublishedFile):
    """A published file with weights."""

    kind: Literal["gguf", "adapter", "merged"]
    quantization: Quantization | None
    tensor_types: dict[str, int] = {}
    weights_sha256: Sha256 | None = None
    """Hash of a GGUF's tensor data alone: equal for runs with equal weights, whose headers differ in scores and ids."""
    imatrix: Sha256 | None = None
    """Hash of the importance matrix that the quantization used."""
    default: bool = False


class GoldenPrompt(ManifestPart):
    """A golden prompt: a synthetic conversation, its exact prompt and the prompt's token ids."""

    messages: Annotated[tuple[dict[ShortText, Message], ...], Field(min_length=1, max_length=64)]
    add_generation_prompt: bool = True
    prompt: Annotated[str, Field(max_length=4 * limits.MAX_MESSAGE)]
    ids: Annotated[TokenIds, Field(max_length=limits.MAX_GOLDEN_TOKENS)]

    @model_validator(mode="after")
    def _require_role_and_content(self) -> "GoldenPrompt":
        if not all({"role", "content"} <= message.keys() for message in self.messages):
            raise ValueError("a message needs a role and a content")
        return self


# Of the parts that may have more keys than those listed here: what a later Ferry measures or knows.
EXTENSIBLE = ConfigDict(extra="allow", allow_inf_nan=False)


@with_config(EXTENSIBLE)
class Score(TypedDict, total=False):
    """The scores of one backend on the held-out rows. Further measurements are allowed."""

    loss: Required[Nats]
    """Mean loss in nats per response token."""
    kl: Nats
    """Divergence from the 16-bit weights, in nats per position."""
    score: Annotated[float, Field(ge=0, le=1)]
    """Mean score by the task's rule, 0 to 1."""
    rows: Annotated[int, Field(ge=0, lt=1 << 63)]


@with_config(EXTENSIBLE)
class Scores(TypedDict, total=False):
    """All scores, with the rule and the rows that they were measured with."""

    rule: str
    used: str
    heldout: Annotated[dict[LadderStep, Score], Field(max_length=64)]
    """By backend, in the order of the quality ladder."""
    notes: list[str]


@with_config(EXTENSIBLE)
class Checkout(TypedDict, total=False):
    """The git state of Ferry's code, or of another code."""

    url: Text | None
    commit: Text | None
    dirty: bool | None


@with_config(EXTENSIBLE)
class Provenance(TypedDict, total=False):
    """What made the model, so that it can be reproduced."""

    git: Checkout | None
    image: dict[str, Any] | None
    packages: Annotated[dict[Text, Text | None], Field(max_length=1000)] | None


class SmokePrompt(ManifestPart):
    """A smoke prompt, and what the default artifact answered on the GPU side."""

    message: Message
    ids: Annotated[TokenIds, Field(min_length=1, max_length=limits.MAX_PROMPT_TOKENS)]
    """Token ids of the rendered prompt."""
    answer: str
    answer_ids: AnswerIds
    """Token ids of the greedy answer, with the end token when the model produced it."""
    log_probs: tuple[float, ...]
    """Natural-log probability of each answer token, given all tokens before it."""

    @model_validator(mode="after")
    def _require_equal_lengths(self) -> "SmokePrompt":
        if len(self.answer_ids) != len(self.log_probs):
            raise ValueError("answer_ids and log_probs have different lengths")
        return self


GoldenPrompts = Annotated[tuple[GoldenPrompt, ...], Field(max_length=limits.MAX_GOLDEN_PROMPTS)]
SmokePrompts = Annotated[tuple[SmokePrompt, ...], Field(max_length=limits.MAX_SMOKE_PROMPTS)]


class Manifest(ManifestPart):
    """A published model: its origin, its files, and how to prompt and test it."""

    schema_version: int = SCHEMA_VERSION
    id: Sha256 | None = None
    """Also written to every GGUF of the run, as ferry.manifest_id."""
    name: Name
    """The run's name, and the model's name in Ollama."""
    base: BaseModelInfo
    dataset: Dataset
    chat: ChatFormat
    generation: Generation
    artifacts: Annotated[tuple[Artifact, ...], Field(max_length=limits.MAX_FILES)]
    files: Annotated[tuple[PublishedFile, ...], Field(max_length=limits.MAX_FILES)] = ()
    """All other files of the repo except this manifest."""
    config: dict[str, dict[str, Any]]
    training: dict[str, Any]
    scores: Scores
    provenance: Provenance
    golden: GoldenPrompts
    smoke: SmokePrompts

    @model_validator(mode="after")
    def _require_consistent_files(self) -> "Manifest":
        if [artifact.kind for artifact in self.artifacts if artifact.default] != ["gguf"]:
            raise ValueError("artifacts: exactly one GGUF must be the default")
        _refuse_repeated_names([item.file for item in (*self.artifacts, *self.files)])
        _refuse_misnamed_artifacts(self.artifacts)
        if hashlib.sha256(self.chat.template.encode()).hexdigest() != self.chat.sha256:
            raise ValueError("chat: sha256 is not that of the template")
        return self

    def find_artifact(self, file: str) -> Artifact:
        """Return the artifact with that file name. Raise StopIteration when there is none."""
        return next(artifact for artifact in self.artifacts if artifact.file == file)

    def default_artifact(self) -> Artifact:
        """Return the artifact that the Mac uses when the user names none."""
        return next(artifact for artifact in self.artifacts if artifact.default)


def _refuse_repeated_names(names: Sequence[str]) -> None:
    # Names that differ in case only are one file on a Mac's disk.
    counts = Counter(name.lower() for name in names)
    if repeated_names := [name for name in names if counts[name.lower()] > 1 or name == FILE_NAME]:
        raise ValueError(f"artifacts and files: {repeated_names[0]!r} appears twice")


def _refuse_misnamed_artifacts(artifacts: Sequence[Artifact]) -> None:
    if bad_names := [item.file for item in artifacts if not item.file.endswith(SUFFIX_BY_KIND[item.kind])]:
        raise ValueError(f"artifacts: {bad_names[0]!r} has the wrong extension for its kind")
    if nested_ggufs := [item.file for item in artifacts if item.kind == "gguf" and "/" in item.file]:
        raise ValueError(f"artifacts: {nested_ggufs[0]!r} is a GGUF in a folder")


def read_manifest(path: Path) -> Manifest:
    """Return the manifest in a file. Raise UserError when it cannot be read, or as `parse_manifest` does."""
    try:
        with path.open("rb") as file:
            content = file.read(limits.MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}",
            "run the stage that writes it (`make` lists them)",
            code="manifest.unreadable",
        ) from error
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, source: str) -> Manifest:
    """Return the manifest in `content`, which may be untrusted.

    Args:
        content: the bytes of a manifest.json.
        source: its path or address, for messages.

    Raises:
        UserError: it is too large, newer than this reader, or not a valid manifest.
    """
    value = _load_json(content, source)
    _refuse_newer_schema(value, source)
    try:
        return Manifest.model_validate(value)
    except (ValidationError, RecursionError) as error:
        raise UserError(
            f"{source} is not a valid manifest: {_describe_fault(error)}", PUBLISH_HINT, code="manifest.invalid"
        ) from error


def _load_json(content: bytes, source: str) -> object:
    """Return the JSON value in `content`. Raise UserError when it is too large, or no JSON."""
    if len(content) > limits.MAX_MANIFEST_BYTES:
        raise UserError(
            f"{source} is larger than {limits.MAX_MANIFEST_BYTES} bytes, the limit of a manifest",
            "check that this is the right repo",
            code="manifest.too_large",
        )
    try:
        return _parse_json(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{source} is not valid JSON: {printable_line(str(error), 100)}", PUBLISH_HINT, code="manifest.not_json"
        ) from error


def _refuse_newer_schema(value: object, source: str) -> None:
    version = _schema_version(value)
    if version is not None and version > SCHEMA_VERSION:
        raise UserError(
            f"{source} has schema {version}, this Ferry reads up to {SCHEMA_VERSION}",
            "update Ferry: `git pull`",
            code="manifest.newer_schema",
        )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest. Raise UserError, and write nothing, when a reader would refuse it."""
    content = files.encode_json(manifest.model_dump(mode="json"))
    parse_manifest(content, str(path))
    with files.write_atomically(path) as part:
        part.write_bytes(content)


def refuse_invalid_parts(parts: dict[str, Any]) -> None:
    """Raise UserError when `parts`, {"chat", "golden", "smoke"}, would not be valid in a manifest."""
    try:
        ChatFormat.model_validate(parts["chat"])
        TypeAdapter(GoldenPrompts).validate_python(parts["golden"])
        TypeAdapter(SmokePrompts).validate_python(parts["smoke"])
    except ValidationError as error:
        raise UserError(
            f"the manifest cannot hold this: {_describe_fault(error)}",
            "shorten the system prompt, the chat template or generation.smoke_prompts, with a new RUN=name",
            code="manifest.invalid_parts",
        ) from error


def _describe_fault(error: ValidationError | RecursionError) -> str:
    """Return the first fault as one line: where it is, and what is wrong."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    fault = error.errors()[0]
    text = f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    return printable_line(text, 300)


def _parse_json(content: bytes) -> object:
    """Return a JSON value. Raise ValueError for what JSON forbids and Python reads: NaN, infinity, a lone surrogate."""
    value: object = json.loads(content, parse_constant=_refuse_constant, parse_float=_parse_finite)
    json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def read_schema_version(content: bytes) -> int | None:
    """Return the schema version that a manifest states; None: it is not a manifest of Ferry."""
    try:
        value = _parse_json(content)
    except (ValueError, RecursionError):
        return None
    return _schema_version(value)


def _schema_version(value: object) -> int | None:
    version = value.get("schema_version") if isinstance(value, dict) else None
    return version if isinstance(version, int) else None


PUBLISH_HINT = "publish it again: `make publish`"
