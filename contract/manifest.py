"""manifest.json: the contract between the cloud side and the Mac side, and all that the Mac needs to know.

Written last into a hub folder, read first by `pull`. A field is added with a new SCHEMA; readers refuse newer ones.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import Required, TypedDict  # pydantic asks for it below Python 3.12

from common import files
from common.errors import UserError, shown
from contract import limits
from contract.limits import Message, Temperature, Text, Tokens, TopP
from contract.ollama_template import Turns

SCHEMA = 5
NAME = "manifest.json"
MAX_BYTES = 8 << 20  # a manifest is text of some 20 KB; anything far larger is not one

SUFFIXES = {"gguf": ".gguf", "adapter": ".safetensors", "merged": ".safetensors"}  # no pickle, ever
# Ours, beside the pulled files; and what runs as code when it is loaded.
RESERVED = (
    *(".part", "pull.json", "smoke.json", "modelfile", "modelfile.json"),
    *(".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".py", ".so", ".dylib", ".sh"),
)
PLAIN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _safe(name: str) -> str:
    """A plain relative file name: nothing that could be written outside the folder it belongs to."""
    if not is_safe_name(name):
        raise ValueError(f"{name!r} is no safe file name")
    return name


def is_safe_name(name: str) -> bool:
    """Whether a manifest takes a file of that name."""
    return bool(re.fullmatch(f"{PLAIN}(/{PLAIN})?", name)) and not name.lower().endswith(RESERVED)


Ids = tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...]
Answer = Annotated[Ids, Field(min_length=1, max_length=limits.MAX_ANSWER_TOKENS + 1)]  # the end token comes on top
Quantization = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")]  # llama.cpp's names, such as q4_k_m
Fingerprint = Annotated[str, Field(pattern=r"^(\d{1,9}:[0-9a-f]{0,8192})?$")]  # pipeline/data/fingerprint.py
Nats = Annotated[float, Field(ge=-1e9, le=1e9)]
SystemName = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]  # of the quality ladder: base, adapter, q4_k_m
Stop = Annotated[str, Field(max_length=256)]
FileName = Annotated[str, AfterValidator(_safe)]
Name = Annotated[str, Field(pattern=f"^{PLAIN}$")]


class Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class BaseModelInfo(Part):
    """Where it started."""

    model: Text
    revision: Text | None
    license: Text | None
    """As the base itself says it, by the Hub's identifiers; None: it says nothing."""
    license_name: Text | None = None
    license_link: Text | None = None
    architecture: Text
    name: Text


class Dataset(Part):
    source: Text
    revision: Text | None
    sha256: Annotated[dict[Text, Sha256], Field(max_length=limits.MAX_FILES)]
    """Of every local file that was read."""
    rows: dict[str, Annotated[int, Field(ge=0, lt=1 << 63)]]
    split: Text
    split_hash: Sha256
    """Of the held-out rows."""
    train_sha256: Sha256 | None = None
    """Of the training rows, as token ids and labels."""
    fingerprints: Annotated[dict[Text, Fingerprint], Field(max_length=limits.MAX_FILES)] = {}
    """Of every local file: which of its rows was changed, should its sha256 be another one (pipeline/data/fingerprint.py)."""


class ChatFormat(Part):
    template: Annotated[str, Field(max_length=limits.MAX_TEMPLATE)]
    """Jinja text, as trained and as embedded in the GGUF."""
    sha256: Sha256
    stop: Annotated[tuple[Stop, ...], Field(max_length=64)]
    bos: Stop | None
    bos_in_template: bool
    adds_bos: bool = False
    """Whether runtimes put the BOS in front of a prompt by themselves (tokenizer.ggml.add_bos_token)."""
    system: Message | None
    """The default system prompt: what runtimes put in front of a conversation that brings none."""
    input: Stop | None = None
    """What stands between an instruction and its input in one user message, where the rows have both (Alpaca)."""
    turns: Turns | None = None
    """What an Ollama TEMPLATE says of the template, proven on the golden prompts; None: no TEMPLATE says the same."""
    embedded: Annotated[tuple[Message, ...], Field(max_length=64)] = ()
    """Why the template inside the GGUF is the one to use: what a TEMPLATE cannot say of it. Empty: TEMPLATE says it all."""


class Generation(Part):
    temperature: Temperature
    top_p: TopP
    num_ctx: Tokens
    max_tokens: Tokens


class File(Part):
    """One published file: card, licence, the adapter's config and tokenizer."""

    file: FileName
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0, le=limits.MAX_BYTES, strict=True)]


class Artifact(File):
    kind: Literal["gguf", "adapter", "merged"]
    quantization: Quantization | None
    tensor_types: dict[str, int] = {}
    weights_sha256: Sha256 | None = None
    """Of a GGUF's tensor data alone: equal for two runs with the same weights, whose headers hold other scores and ids."""
    imatrix: Sha256 | None = None
    """Of the importance matrix that weighed the quantization."""
    default: bool = False


class Golden(Part):
    """A synthetic conversation, its exact prompt and the prompt's token ids."""

    messages: Annotated[tuple[dict[Stop, Message], ...], Field(min_length=1, max_length=64)]
    add_generation_prompt: bool = True
    prompt: Annotated[str, Field(max_length=4 * limits.MAX_MESSAGE)]
    ids: Annotated[Ids, Field(max_length=limits.MAX_GOLDEN_TOKENS)]

    @model_validator(mode="after")
    def _said(self) -> "Golden":
        if not all({"role", "content"} <= message.keys() for message in self.messages):
            raise ValueError("a message has a role and a content")
        return self


class Score(TypedDict, total=False):
    """Of one system on the held-out rows, and whatever else was measured."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)
    loss: Required[Nats]
    """Nats per response token."""
    kl: Nats
    """To the 16-bit weights, nats a position."""
    score: Annotated[float, Field(ge=0, le=1)]
    """By the task's rule, 0 to 1."""
    rows: Annotated[int, Field(ge=0, lt=1 << 63)]


class Scores(TypedDict, total=False):
    """What was measured, on which rows, and what was asked of it."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)
    rule: str
    used: str
    heldout: Annotated[dict[SystemName, Score], Field(max_length=64)]
    """By system, in the order of the ladder."""
    notes: list[str]


class Checkout(TypedDict, total=False):
    """Of Ferry's code, or another's."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)
    url: Text | None
    commit: Text | None
    dirty: bool | None


class Provenance(TypedDict, total=False):
    """What made it, to make it again."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)
    git: Checkout | None
    image: dict | None
    packages: Annotated[dict[Text, Text | None], Field(max_length=1000)] | None


class Smoke(Part):
    """A prompt, and what the default artifact answered on the cloud side."""

    message: Message
    ids: Annotated[Ids, Field(min_length=1, max_length=limits.MAX_PROMPT_TOKENS)]
    """Tokens of the rendered prompt."""
    answer: str
    answer_ids: Answer
    """Greedy, with the end token when the model gave it."""
    log_probs: tuple[float, ...]
    """Natural-log probability of each answer token, given all before it."""

    @model_validator(mode="after")
    def _paired(self) -> "Smoke":
        if len(self.answer_ids) != len(self.log_probs):
            raise ValueError("answer_ids and log_probs have different lengths")
        return self


Goldens = Annotated[tuple[Golden, ...], Field(max_length=limits.MAX_GOLDEN_PROMPTS)]
Smokes = Annotated[tuple[Smoke, ...], Field(max_length=limits.MAX_SMOKE_PROMPTS)]


class Manifest(Part):
    schema_version: int = SCHEMA
    id: Sha256 | None = None
    """Stands in every GGUF of the run too, as ferry.manifest_id."""
    name: Name
    """Of the run; Ollama's model gets it too."""
    base: BaseModelInfo
    dataset: Dataset
    chat: ChatFormat
    generation: Generation
    artifacts: Annotated[tuple[Artifact, ...], Field(max_length=limits.MAX_FILES)]
    files: Annotated[tuple[File, ...], Field(max_length=limits.MAX_FILES)] = ()
    """Everything else in the repo but this manifest."""
    config: dict[str, dict]
    training: dict
    scores: Scores
    provenance: Provenance
    golden: Goldens
    smoke: Smokes

    @model_validator(mode="after")
    def _whole(self) -> "Manifest":
        if [a.kind for a in self.artifacts if a.default] != ["gguf"]:
            raise ValueError("artifacts: exactly one GGUF must be the default")
        names = [item.file for item in (*self.artifacts, *self.files)]
        if len({name.lower() for name in names}) < len(names) or NAME in names:
            raise ValueError("artifacts and files: a name stands twice")  # or would, on a Mac's disk
        if wrong := [a.file for a in self.artifacts if not a.file.endswith(SUFFIXES[a.kind])]:
            raise ValueError(f"artifacts: {wrong[0]!r} does not end as its kind does")
        if any(a.kind == "gguf" and "/" in a.file for a in self.artifacts):
            raise ValueError("artifacts: a GGUF lies in no folder")
        if hashlib.sha256(self.chat.template.encode()).hexdigest() != self.chat.sha256:
            raise ValueError("chat: the template has another sha256")
        return self

    def artifact(self, file: str) -> Artifact:
        """The one of that name."""
        return next(artifact for artifact in self.artifacts if artifact.file == file)

    def default(self) -> Artifact:
        """The artifact that the Mac takes when none is named."""
        return next(artifact for artifact in self.artifacts if artifact.default)


def read(path: Path) -> Manifest:
    """Raises UserError when the file is missing, too large, newer than this reader, or not a valid manifest."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", "run the stage that writes it (`make` lists them)"
        ) from error
    return parse(content, str(path))


def parse(content: bytes, where: str) -> Manifest:
    """The manifest in `content`, which a stranger may have written. where: its path or address, for messages.

    Raises UserError when it is too large, newer than this reader, or not a valid manifest.
    """
    if len(content) > MAX_BYTES:
        raise UserError(f"{where} is larger than {MAX_BYTES} bytes, which no manifest is", "is this the right repo?")
    try:
        value = _read_json(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {shown(str(error), 100)}", AGAIN) from error
    version = _schema(value)
    if version is not None and version > SCHEMA:
        raise UserError(f"{where} has schema {version}, this Ferry reads up to {SCHEMA}", "update Ferry: `git pull`")
    try:
        return Manifest.model_validate(value)
    except (ValidationError, RecursionError) as error:
        raise UserError(f"{where} is no valid manifest: {_describe_fault(error)}", AGAIN) from error


def write(path: Path, made: Manifest) -> None:
    """Write a manifest that every reader takes. Raises UserError, and writes nothing, where one would refuse it."""
    content = files.to_json(made.model_dump(mode="json"))
    parse(content, str(path))
    with files.writing(path) as part:
        part.write_bytes(content)


def refuse_invalid(parts: dict) -> None:
    """Raise UserError where some of a manifest's fields could not be published. parts: {"chat", "golden", "smoke"}."""
    try:
        ChatFormat.model_validate(parts["chat"])
        TypeAdapter(Goldens).validate_python(parts["golden"])
        TypeAdapter(Smokes).validate_python(parts["smoke"])
    except ValidationError as error:
        raise UserError(
            f"the manifest cannot hold this: {_describe_fault(error)}",
            "shorten the system prompt, the chat template or generation.smoke_prompts, with a new RUN=name",
        ) from error


def _describe_fault(error: ValidationError | RecursionError) -> str:
    fault = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deeply"}
    text = f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    return shown(text, 300)


def _read_json(content: bytes) -> object:
    """Raises ValueError for what is no JSON, and for what Python's reader takes for it: NaN, infinity, half a surrogate pair."""
    value = json.loads(content, parse_constant=_refuse_constant, parse_float=_read_finite)
    json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _read_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that a computer holds")
    return number


def schema(content: bytes) -> int | None:
    """The schema that a manifest says it has; None: it is no manifest of Ferry's."""
    try:
        value = _read_json(content)
    except (ValueError, RecursionError):
        return None
    return _schema(value)


def _schema(value: object) -> int | None:
    version = value.get("schema_version") if isinstance(value, dict) else None
    return version if isinstance(version, int) else None


AGAIN = "publish it again: `make publish`"
