"""The records of a run: one frozen model for each stage, stored as `runs/<run>/<stage>.json`.

Records that an older Ferry wrote are read too, so a field that is added later needs a default.
"""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr


class RecordModel(BaseModel):
    """A frozen part of a record. It keeps the fields that a newer Ferry may have added."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class OutputFile(RecordModel):
    """A file that a stage wrote."""

    path: str
    """Relative to the run's folder."""
    bytes: int
    sha256: str


class Record(RecordModel):
    """What the record of every stage holds."""

    stage: str
    seconds: float
    settings: dict[str, Any]
    """{name: value} of the settings of the config that the stage depends on."""
    sources: dict[str, str]
    """{stage: sha256} of the records that this one was made from."""
    outputs: dict[str, OutputFile]
    _run_folder: Path = PrivateAttr(default=Path())

    def output_path(self, name: str) -> Path:
        """Return the path of one of the stage's files."""
        return self._run_folder / self.outputs[name].path

    def record_path(self) -> Path:
        """Return the path of the record itself."""
        return self._run_folder / f"{self.stage}.json"


RecordType = TypeVar("RecordType", bound=Record)


class Scores(RecordModel):
    """The scores of one model file, or of the adapter, on the held-out rows."""

    loss: float
    """Mean over the response positions, nats."""
    perplexity: float | None = None
    positions: int | None = None
    rows: int
    score: float | None = None
    """By the rule of the config's section `evaluate`, 0 to 1; None where no rule judges answers."""
    interval: tuple[float, float] | None = None
    """The 95 % interval of `score`."""
    tokens_per_second: float | None = None
    """Generated tokens, one prompt at a time, reading the prompt included."""
    kl: float | None = None
    """Mean KL divergence from the 16-bit GGUF, nats."""
    top1: float | None = None
    """Share of the positions with the same likeliest token as the 16-bit GGUF."""
    megabytes: float | None = None

    def to_json(self) -> dict:
        """Return the scores that are known, as the manifest and the ladder show them."""
        return self.model_dump(mode="json", exclude_none=True)


class RuntimeScores(Scores):
    """The scores of the default file with the prompts that runtimes send."""

    same_prompts: int
    """Rows for which that prompt is the one that was scored."""


class RowCounts(RecordModel):
    """Numbers of rows."""

    read: int
    train: int
    heldout: int
    dropped: int


class TokenCounts(RecordModel):
    """Tokens of the training rows: all of them, those that carry loss, and quantiles of the rows' lengths."""

    train: int
    loss: int
    p50: int
    p95: int
    max: int


class Packing(RecordModel):
    """How many sequences of base.max_seq_length the training rows fill when packed, and shares of useful tokens."""

    packs: int
    full: float
    unpacked_full: float


class BaseModelFacts(RecordModel):
    """The base model in the words of the manifest."""

    model: str
    revision: str | None
    architecture: str | None
    license: str | None
    license_name: str | None = None
    license_link: str | None = None
    name: str | None


class ChatFacts(RecordModel):
    """What the chat template does."""

    end: list[str]
    """The tokens that end an answer."""
    scaffold: Any = None
    system: Any = None
    joined: Any = None


class DataFacts(RecordModel):
    """The numbers of the rows."""

    rows: RowCounts
    dropped: dict[str, int]
    """{reason: rows}."""
    changed: dict[str, int]
    findings: dict[str, int] = {}
    unused: dict[str, int] = {}
    truncated: dict[str, int] = {}
    tokens: TokenCounts
    packing: Packing
    steps: int | None
    """Optimizer steps; None where the rows of a step are chosen on the GPU machine."""
    max_seq_length: int
    histogram: list[list[int]]


class DataRecord(Record, DataFacts):
    """The record of `data`."""

    stage: Literal["data"] = "data"
    inputs: dict[str, str]
    """{path: sha256} of the local files that the rows were made from."""
    dataset: dict[str, dict]
    """{"training" or "validation": what is known of a data set of the Hub}."""
    formats: list[str]
    """One sentence for each part: its format, and how it was detected."""
    fingerprints: dict[str, str] = {}
    """{path: fingerprint of its rows} (pipeline/data/fingerprint.py)."""
    base: BaseModelFacts
    warnings: list[str]
    chat: ChatFacts
    default_system: str | None
    rows_keep_their_system: bool = False
    has_input: bool = False
    """Whether rows have an instruction and an input, which become one user message."""
    smoke_prompts: list[str]


class FinetuneRecord(Record):
    """The record of `finetune`."""

    stage: Literal["finetune"] = "finetune"
    steps: int
    epochs: float
    rows: int
    """Rows that were trained on; a row that was trained on twice counts twice."""
    final_loss: float
    best_step: int | None
    best_loss: float | None = None
    resumed_from: str | None = None
    """The name of the checkpoint that this training continued from."""
    device: str
    peak_memory_gb: float
    tokens: int
    trainable: int
    """Parameters that were trained."""
    seed: int
    weights: str
    """The folder of the base model's weights on the machine that trained."""
    train_batch_size: int
    """Rows of an optimizer step."""
    learning_rate: float
    micro_batch_tokens: int
    largest_micro_batch: int
    """Tokens of the largest micro-batch, padding included."""
    use_gradient_checkpointing: bool | str
    packing: bool


class TrainingFit(RecordModel):
    """The loss on rows that were trained on, beside the held-out loss."""

    loss: float
    rows: int
    warning: str | None
    """Says that the held-out loss did not fall, or that the model overfits."""


class EvaluateRecord(Record):
    """The record of `evaluate`."""

    stage: Literal["evaluate"] = "evaluate"
    rule: str
    used: str
    """Which held-out rows were scored, in words."""
    scores: dict[str, Scores]
    """Of "base" and "adapter"."""
    training: TrainingFit


class ExportRecord(Record):
    """The record of `export`. Its outputs are GGUFs by quantization, and the importance matrix as "imatrix"."""

    stage: Literal["export"] = "export"
    llama_cpp: str
    default: str
    """The quantization that the config names first."""
    sixteen: str
    """The output name of the 16-bit GGUF: f16 or bf16."""
    id: str
    """The id of the manifest."""
    imatrix: str | None
    """sha256 of the importance matrix."""


class Conversion(RecordModel):
    """How far the 16-bit GGUF in llama.cpp is from the merged weights in torch."""

    kl: float
    """Mean KL divergence, nats."""
    worst: float | None = None
    top1: float
    positions: int


class VerifyRecord(Record):
    """The record of `verify`."""

    stage: Literal["verify"] = "verify"
    scores: dict[str, Scores]
    """Of "merged" and of each GGUF."""
    default: str
    """The quantization that `make deploy-mac` takes."""
    as_served: RuntimeScores
    used: str
    conversion: Conversion
    notes: list[str]
    sixteen: str
    template: Literal["derived", "embedded"]
    """Whether Ollama's TEMPLATE could be derived, or the one inside the GGUF is used."""
    reasons: list[str]
    """Why it could not be derived."""


class PublishRecord(Record):
    """The record of `publish`."""

    stage: Literal["publish"] = "publish"
    repo: str
    commit: str | None = None
    tag: str | None = None
    default: dict[str, Any]
    """The default file as the manifest describes it (contract.manifest.Artifact)."""

    @property
    def repo_with_tag(self) -> str:
        """The repo and its tag as `make deploy-mac REPO=` takes them."""
        return f"{self.repo}@{self.tag}" if self.tag else self.repo


RECORD_TYPES: dict[str, type[Record]] = {
    "data": DataRecord,
    "finetune": FinetuneRecord,
    "evaluate": EvaluateRecord,
    "export": ExportRecord,
    "verify": VerifyRecord,
    "publish": PublishRecord,
}
