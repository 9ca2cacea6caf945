"""Render the model card, README.md of a published repo, from the manifest.

The model card states what the run knows. Its section "Limits" asks the user for the rest: what the model is for, and
where it fails. Rows of the data set never appear: the example prompt is one of the synthetic golden conversations.
Names and texts from users and base models pass through `code_span`, `escape_text` or `code_block`, so that none of
them can act as Markdown, HTML or YAML.
"""

import json
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, TypedDict
from urllib.parse import urlsplit

from common import hub
from contract.manifest import NAME_PATTERN, Artifact, GoldenPrompt, Manifest
from pipeline.base_model import licences
from pipeline.config import references

HUB_TAGS = ("gguf", "lora", "unsloth", "ferry")
HUB_URL = "https://huggingface.co"
MAX_NAME_LENGTH = 300  # characters of a name; a longer one is cut
PLAIN_PATH = re.compile(r"[\w./~%+-]*")
RULE_DESCRIPTIONS = {
    "exact": "the answer equals the reference",
    "accuracy": "the answer names the same label",
    "f1": "words shared with the reference",
    "regex": "the answer fits a pattern",
    "json_schema": "the answer fits a JSON schema",
    "loss": "free text, judged by held-out loss only",
}
ARTIFACT_LABELS = {"adapter": "LoRA adapter", "merged": "merged 16-bit weights"}
# Includes the characters that change the writing direction: a prompt must look as it is.
CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def render_model_card(manifest: Manifest, ladder: str, repo: str | None, private: bool = True) -> str:
    """Return the text of the model card.

    The front matter follows https://github.com/huggingface/hub-docs/blob/main/modelcard.md and
    https://huggingface.co/docs/hub/model-cards.

    Args:
        ladder: The quality ladder as a Markdown table.
        repo: The repo's id on the Hub; None for a folder hub.
        private: Whether the repo on the Hub is private, which changes the commands.

    Raises:
        UserError: `repo` is not a Hub id.
    """
    repo = hub.parse_repo_id(repo)[0] if repo else None
    parts = (
        render_front_matter(manifest),
        _render_title(manifest, repo),
        _render_base_model(manifest),
        _render_dataset(manifest),
        _render_training(manifest),
        _render_quality(manifest, ladder),
        _render_files(manifest),
        _render_prompt_format(manifest),
        _render_usage(manifest, repo, private),
        _render_transformers_usage(manifest, repo),
        LIMITS_SECTION,
        _render_provenance(manifest),
        _render_verification(manifest),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


# --- front matter -----------------------------------------------------------------------------------------------------


def render_front_matter(manifest: Manifest) -> str:
    """Return the YAML front matter. It has no language and no model-index, because the run does not know them."""
    from huggingface_hub import ModelCardData

    base_id, dataset_id = hub_base_model(manifest), hub_dataset(manifest)
    card_data = ModelCardData(
        base_model=base_id,
        base_model_relation="finetune" if base_id else None,
        **licence_fields(manifest),
        datasets=[dataset_id] if dataset_id else None,
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=[*HUB_TAGS, *(["conversational"] if manifest.chat.template.strip() else [])],
    )
    return f"---\n{card_data.to_yaml()}\n---"


def hub_base_model(manifest: Manifest) -> str | None:
    """Return the base model's Hub id; None when it did not come from the Hub."""
    base = manifest.base
    return base.model if _is_hub_id(base.model, base.revision) and references.is_hub_model(base.model) else None


def hub_dataset(manifest: Manifest) -> str | None:
    """Return the data set's Hub id; None for local files, which the manifest lists with their checksums."""
    dataset = manifest.dataset
    is_local = any(PurePath(path).is_relative_to(dataset.source) for path in dataset.sha256)
    return dataset.source if _is_hub_id(dataset.source, dataset.revision) and not is_local else None


def _is_hub_id(name: str, revision: str | None) -> bool:
    """Return whether `name` is a Hub id. An old id without an owner, such as gpt2, must have resolved to a commit."""
    if not name.isascii() or ".." in name or name.endswith(".gguf"):
        return False
    legacy_match = re.fullmatch(NAME_PATTERN, name) and re.fullmatch(r"[0-9a-f]{40}", revision or "")
    return bool(hub.REPO_ID_PATTERN.fullmatch(name) or legacy_match)


class LicenceFields(TypedDict, total=False):
    """The licence in the front matter; where the Hub has no name for it, `license` is "other"."""

    license: str
    license_name: str | None
    license_link: str | None


def licence_fields(manifest: Manifest) -> LicenceFields:
    """Return the licence as the front matter has it; {} when the base model names none."""
    licence = (manifest.base.license or "").strip()
    if not licence:
        return {}
    if licence.lower() in licences.TERMS_BY_LICENCE and licence.lower() != "other":
        return {"license": licence.lower()}
    licence_name = manifest.base.license_name if licence.lower() == "other" else licence
    slug = re.sub(r"[^a-z0-9.]+", "-", (licence_name or "").lower())[:64].strip("-.")
    return {"license": "other", "license_name": slug or None, "license_link": licence_link(manifest)}


def licence_link(manifest: Manifest) -> str | None:
    """Return where the licence's text is: the base model's own link, else the copy in the repo, else its known URL.

    The Hub accepts a URL, LICENSE or LICENSE.md.
    """
    link, file_names = manifest.base.license_link or "", {item.file for item in manifest.files}
    if re.fullmatch(r"https?://[A-Za-z0-9][\w.:/@?&=%+~#-]{1,300}", link, re.ASCII):
        return link
    for name in (link, "LICENSE", "LICENSE.md"):
        if name in ("LICENSE", "LICENSE.md") and name in file_names:
            return name
    if link and re.fullmatch(NAME_PATTERN, link) and hub_base_model(manifest):
        return f"{HUB_URL}/{manifest.base.model}/blob/{_base_revision(manifest) or 'main'}/{link}"
    return licences.find_terms(manifest.base.license).link


def _base_revision(manifest: Manifest) -> str | None:
    """Return the base model's revision; None when it cannot be part of a URL."""
    revision = manifest.base.revision or ""
    return revision if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,127}", revision, re.ASCII) else None


# --- what it is -------------------------------------------------------------------------------------------------------


def _render_title(manifest: Manifest, repo: str | None) -> str:
    name, method = (repo or manifest.name).split("/")[-1], escape_text(manifest.training.get("method") or "LoRA")
    credit = licences.find_terms(manifest.base.license).credit
    return _join_paragraphs(
        f"# {name}",
        f"A {method} fine-tune of {code_span(manifest.base.name)} on {_describe_rows(manifest)}, "
        "as GGUF files for Ollama, LM Studio and llama.cpp.",
        credit and f"**{credit}**",
    )


def _describe_rows(manifest: Manifest) -> str:
    """Return the data set's name, with the number of training rows where it is known."""
    row_count = manifest.dataset.rows.get("train")
    row_note = f" ({format_value(row_count)} training rows)" if row_count is not None else ""
    return f"{code_span(_public_name(manifest.dataset.source))}{row_note}"


def _render_base_model(manifest: Manifest) -> str:
    base = manifest.base
    is_digest = re.fullmatch(r"[0-9a-f]{64}", base.revision or "")
    facts = markdown_table(
        ("", ""),
        ("Model", _code_link(_public_name(base.model), _base_model_url(manifest))),
        ("sha256 of its file" if is_digest else "Revision", base.revision and code_span(base.revision)),
        ("Architecture", code_span(base.architecture)),
        ("Licence", _licence_name(manifest) if licence_fields(manifest) else "The base model names no licence"),
    )
    return _join_paragraphs("## Base model", facts, *_licence_notes(manifest))


def _licence_notes(manifest: Manifest) -> list[str | None]:
    """Return what the licence requires a recipient to be told; many licences require that changes are named."""
    terms = licences.find_terms(manifest.base.license)
    licence_files = [item.file for item in manifest.files if licences.LICENCE_FILE_NAME.match(item.file)]
    return [
        terms.notice and f"> {terms.notice}",
        None if terms.allows_commercial_use else "The licence forbids commercial use.",
        terms.use_restrictions and f"Whoever receives this model is bound by {terms.use_restrictions}.",
        f"Licence and notices in this repo: {', '.join(map(code_span, licence_files))}." if licence_files else None,
        "The base model was modified: fine-tuned, merged and quantized as this card says.",
    ]


def _licence_name(manifest: Manifest) -> str:
    name = manifest.base.license_name if (manifest.base.license or "").strip().lower() == "other" else None
    return _code_link(name or manifest.base.license, licence_link(manifest))


def _base_model_url(manifest: Manifest) -> str | None:
    if match := references.PYPI_MODEL.fullmatch(manifest.base.model):
        return f"https://pypi.org/project/{match['package']}/{match['version']}/"
    revision = _base_revision(manifest)
    return hub_base_model(manifest) and f"{HUB_URL}/{manifest.base.model}" + (f"/tree/{revision}" if revision else "")


def _render_dataset(manifest: Manifest) -> str:
    dataset, data_config = manifest.dataset, manifest.config.get("data", {})
    dataset_id = hub_dataset(manifest)
    return "## Data\n\n" + markdown_table(
        ("", ""),
        ("Data set", _code_link(_public_name(dataset.source), dataset_id and f"{HUB_URL}/datasets/{dataset_id}")),
        ("Subset", data_config.get("subset") and code_span(data_config["subset"])),
        ("Split", data_config.get("split") and code_span(data_config["split"])),
        ("Revision", dataset.revision and code_span(dataset.revision)),
        ("Held out", code_span(_public_name(dataset.split))),
        ("Rows", ", ".join(f"{format_value(count)} {escape_text(name)}" for name, count in dataset.rows.items())),
        *((f"sha256 of {code_span(_public_name(path))}", code_span(digest)) for path, digest in dataset.sha256.items()),
        ("sha256 of the held-out rows", code_span(dataset.split_hash)),
    )


def _render_training(manifest: Manifest) -> str:
    training = manifest.training
    length = map(training.get, ("steps", "epochs", "tokens"))
    return "## Training\n\n" + markdown_table(
        ("", ""),
        ("Method", _fill_in("{}", training.get("method"))),
        *_hyperparameter_rows(manifest.config.get("finetune", {}), training, manifest.config.get("base", {})),
        ("Seed", None if training.get("seed") is None else code_span(training["seed"])),
        ("Done", _fill_in("{} steps, {} epochs, {} tokens", *length)),
        ("Kept", _fill_in("the adapter of step {}, which had the lowest held-out loss", training.get("best_step"))),
        ("Trained parameters", _fill_in("{}", training.get("trainable"))),
        ("Last training loss", _fill_in("{}", training.get("final_loss"))),
        ("Time", _fill_in("{} s", training.get("seconds"))),
        ("Device", _fill_in("{}", training.get("device"))),
        ("Peak memory", _fill_in("{} GB", training.get("peak_memory_gb"))),
    )


def _hyperparameter_rows(
    finetune_config: dict[str, Any], training: dict[str, Any], base_config: dict[str, Any]
) -> list[tuple[str, str | None]]:
    """Return the table rows of the hyperparameters.

    They come from the config, except for the batch size and the learning rate, which come from the training record.

    Args:
        finetune_config: The config's `finetune` section.
        training: The manifest's training facts.
        base_config: The config's `base` section.
    """
    lora = map(finetune_config.get, ("r", "lora_alpha", "lora_dropout"))
    return [
        ("Base loaded in", _describe_precision(base_config.get("load_in_4bit"))),
        ("LoRA", _fill_in("r {}, alpha {}, dropout {}", *lora)),
        ("LoRA variants", _lora_variants(finetune_config)),
        ("Target modules", ", ".join(map(code_span, finetune_config.get("target_modules") or ())) or None),
        ("Learning rate", _fill_in("{}, {}", training.get("learning_rate"), finetune_config.get("lr_scheduler_type"))),
        ("Warm-up", _format_warmup(finetune_config.get("warmup_steps"))),
        ("Length", _describe_length(finetune_config)),
        ("Batch", _fill_in("{} rows a step", training.get("train_batch_size"))),
        ("Sequence length", _fill_in("{} tokens", base_config.get("max_seq_length"))),
        ("Optimizer", _format_optimizer(finetune_config.get("optim"), str(training.get("device", "")))),
        ("Weight decay", _fill_in("{}", finetune_config.get("weight_decay"))),
        ("Gradient norm at most", _fill_in("{}", finetune_config.get("max_grad_norm"))),
    ]


def _describe_precision(load_in_4bit: bool | None) -> str | None:
    if load_in_4bit is None:
        return None
    return "4 bit (nf4)" if load_in_4bit else "16 bit"


def _describe_length(finetune_config: dict[str, Any]) -> str | None:
    """Return the configured steps, or else epochs, of the training."""
    if max_steps := finetune_config.get("max_steps"):
        return _fill_in("{} steps", max_steps)
    return _fill_in("{} epochs", finetune_config.get("num_train_epochs"))


def _lora_variants(finetune_config: dict[str, Any]) -> str | None:
    """Return what differs from plain LoRA; None when nothing does."""
    bits, bias = finetune_config.get("loftq_bits"), finetune_config.get("bias", "none")
    variants = ["rsLoRA"] * bool(finetune_config.get("use_rslora")) + [f"LoftQ, {format_value(bits)} bits"] * bool(bits)
    return ", ".join(variants + [f"bias {format_value(bias)}"] * (bias != "none")) or None


def _format_warmup(steps: float | None) -> str | None:
    is_share = steps is not None and 0 < steps < 1
    return f"{steps:.1%} of the steps" if is_share else _fill_in("{} steps", steps)


def _format_optimizer(name: str | None, device: str) -> str | None:
    """Return the optimizer's name. On a CPU, 8-bit and paged optimizers are replaced: see Finetune.optim."""
    is_replaced = device.startswith("CPU") and re.search(r"8bit|paged", name or "")
    return _fill_in("adamw_torch_fused, on this CPU in place of {}", name) if is_replaced else _fill_in("{}", name)


def _render_quality(manifest: Manifest, ladder: str) -> str:
    scores: dict[str, Any] = dict(manifest.scores)
    training_fit, conversion = scores.get("training") or {}, scores.get("conversion") or {}
    return _join_paragraphs(
        "## Quality",
        ladder.strip(),
        _describe_rule(scores.get("rule")),
        _fill_in("Rows: {}.", scores.get("used")),
        "Losses are in nats a token; KL to 16 bit is the mean KL divergence from the 16-bit GGUF at response "
        "positions, same top-1 the share of them where both would choose the same token.",
        _fill_in(
            "For comparison, the loss on {} training rows: {}.", training_fit.get("rows"), training_fit.get("loss")
        ),
        training_fit.get("warning") and escape_text(training_fit["warning"]),
        _fill_in(
            "Conversion: the 16-bit GGUF in llama.cpp is {} nats (mean KL divergence; worst position {}) from the "
            "merged weights in Transformers, over {} positions.",
            *map(conversion.get, ("kl", "worst", "positions")),
        ),
        _describe_runtime_scores(scores.get("as_served") or {}),
        "\n".join(f"- {escape_text(note)}" for note in scores.get("notes") or ()),
    )


def _describe_rule(rule: str | None) -> str | None:
    """Return by which rule answers are judged; None when it is unknown."""
    if rule is None:
        return None
    description = f" ({RULE_DESCRIPTIONS[rule]})" if rule in RULE_DESCRIPTIONS else ""
    return f"Scoring rule: {code_span(rule)}{description}."


def _describe_runtime_scores(served_scores: dict[str, Any]) -> str | None:
    """Return how the default file scores with the prompts that its runtimes send; None when that was not measured."""
    if "same_prompts" not in served_scores or "rows" not in served_scores:
        return None
    row_count, same_count = served_scores["rows"], served_scores["same_prompts"]
    if same_count == row_count:
        return "Runtimes send the prompts that were scored, for every held-out row."
    return (
        "With the prompts that runtimes send (the default system prompt, sampling off): "
        f"{_describe_runtime_result(served_scores)}; the prompt differs from the row's "
        f"for {format_value(row_count - same_count)} of {format_value(row_count)} rows."
    )


def _describe_runtime_result(served_scores: dict[str, Any]) -> str:
    """Return the score, or where no rule judges answers the loss."""
    if "score" in served_scores:
        return f"score {served_scores['score']:.1%}"
    return f"held-out loss {format_value(served_scores.get('loss'))}"


def _render_files(manifest: Manifest) -> str:
    labels = {item.file: _artifact_label(item) for item in manifest.artifacts}
    rows = [
        (code_span(item.file), labels.get(item.file, ""), format_size(item.bytes), code_span(item.sha256[:12]))
        for item in (*manifest.artifacts, *manifest.files)
    ]
    return "## Files\n\n" + markdown_table(("file", "what", "size", "sha256 begins"), *rows)


def _artifact_label(artifact: Artifact) -> str:
    label = ARTIFACT_LABELS.get(artifact.kind) or code_span((artifact.quantization or "?").upper())
    return (
        f"{label}{', with importance matrix' if artifact.imatrix else ''}{', **default**' if artifact.default else ''}"
    )


# --- how to use it ----------------------------------------------------------------------------------------------------


def _render_prompt_format(manifest: Manifest) -> str:
    chat, example = manifest.chat, _choose_example(manifest)
    return _join_paragraphs(
        "## Prompt format",
        "The chat template is in every GGUF. An example, up to where the model answers:" if example else None,
        example and code_block(example.prompt),
        *_render_stops(chat.stop),
        chat.system and f"{SYSTEM_PROMPT_NOTE}\n\n{code_block(chat.system)}",
        chat.input
        and "A row's input followed its instruction in the same user message:\n\n"
        + code_block(f"INSTRUCTION{chat.input}INPUT"),
    )


SYSTEM_PROMPT_NOTE = (
    "The default system prompt, which `make deploy-mac` puts in front of a conversation that has none. "
    "Other runtimes must be told to send it: without it the model answers differently than it was scored."
)


def _choose_example(manifest: Manifest) -> GoldenPrompt | None:
    """Return a golden prompt that asks for an answer, if possible one with a system message."""
    prompts = [golden for golden in manifest.golden if golden.add_generation_prompt]
    with_system = [golden for golden in prompts if any(message.get("role") == "system" for message in golden.messages)]
    return next(iter(with_system or prompts), None)


def _render_stops(stops: Sequence[str]) -> list[str]:
    """Return the paragraphs about the texts that end an answer."""
    if not stops:
        return []
    return ["Stop strings, as JSON:", code_block("\n".join(json.dumps(s, ensure_ascii=False) for s in stops), "json")]


def _render_usage(manifest: Manifest, repo: str | None, private: bool) -> str:
    commands = _hub_commands(manifest, repo, private) if repo else _folder_commands(manifest)
    generation = manifest.generation
    settings_note = (
        f"Settings of `make deploy-mac`: temperature {format_value(generation.temperature)}, "
        f"top-p {format_value(generation.top_p)}, "
        f"{format_value(generation.num_ctx)} tokens of context, "
        f"answers of at most {format_value(generation.max_tokens)} tokens."
    )
    return _join_paragraphs("## Run it", "\n".join(f"- {line}" for line in commands), settings_note)


def _hub_commands(manifest: Manifest, repo: str, private: bool) -> list[str]:
    """Return a line for each runtime that fetches the model from the Hub.

    Sources: https://huggingface.co/docs/hub/ollama and /lmstudio, `llama-server --help`.
    """
    tag = (manifest.default_artifact().quantization or "").upper()
    ollama_note = "Here the Hub chooses a template, and no system prompt is set." + PRIVATE_OLLAMA_NOTE * private
    llama_cpp_note = ", with `HF_TOKEN` set: the repo is private." if private else "."
    return [
        f"**Ollama, checked:** in a checkout of Ferry `make deploy-mac REPO={repo}`{CHECKS_NOTE}",
        f"**Ollama:** `ollama run hf.co/{repo}:{tag}`. {ollama_note}",
        f"**LM Studio:** {_lm_studio_command(manifest, repo, private)}.",
        f"**llama.cpp:** `llama-server -hf {repo}:{tag}`{llama_cpp_note}",
    ]


def _lm_studio_command(manifest: Manifest, repo: str, private: bool) -> str:
    """Return how LM Studio gets the default file; from a private repo it cannot download by itself."""
    default = manifest.default_artifact()
    if private:
        return f"`hf download {repo} {default.file} --local-dir .`, then `lms import {default.file} --copy`"
    tag = (default.quantization or "").upper()
    return f"`lms get {HUB_URL}/{repo}@{tag}`, or paste the repo's address into its search box"


CHECKS_NOTE = (
    ": compares every file with the manifest, asks for known answers, and takes template, system prompt and settings "
    "from what was trained."
)
PRIVATE_OLLAMA_NOTE = (
    " The repo is private: first add `~/.ollama/id_ed25519.pub` to the "
    f"[keys of your account]({HUB_URL}/settings/keys)."
)


def _folder_commands(manifest: Manifest) -> list[str]:
    """Return a line for each runtime that reads the GGUF from this folder."""
    file_name, name = manifest.default_artifact().file, manifest.name
    ollama_command = (
        f'echo "FROM $PWD/{file_name}" > /tmp/Modelfile && ollama create {name} -f /tmp/Modelfile && ollama run {name}'
    )
    return [
        f"**Ollama, checked:** in a checkout of Ferry `make deploy-mac REPO=` and the path of this folder{CHECKS_NOTE}",
        f"**Ollama:** `{ollama_command}`. Here Ollama chooses a template, and no system prompt is set.",
        f"**LM Studio:** `lms import {file_name} --copy`.",
        f"**llama.cpp:** `llama-server -m {file_name}`.",
    ]


def _render_transformers_usage(manifest: Manifest, repo: str | None) -> str:
    kinds = {artifact.kind for artifact in manifest.artifacts}
    return _join_paragraphs(
        "## In Transformers" if kinds & {"adapter", "merged"} else None,
        _render_merged_usage(repo) if "merged" in kinds else None,
        _render_adapter_usage(manifest, repo) if "adapter" in kinds else None,
    )


def _render_merged_usage(repo: str | None) -> str:
    """Return the Python code that loads the merged model."""
    return code_block(
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({_repo_arguments(repo, 'merged')})",
        "python",
    )


def _render_adapter_usage(manifest: Manifest, repo: str | None) -> str:
    """Return the Python code that loads the adapter, or for a base model that is not on the Hub how to do it."""
    if base_id := hub_base_model(manifest):
        return code_block(_peft_snippet(manifest, repo, base_id), "python")
    return (
        f"The adapter in `adapter/` belongs to {code_span(_public_name(manifest.base.model))}, "
        "which Transformers cannot fetch by that name: "
        f"load the base first, then `PeftModel.from_pretrained(base, {_repo_arguments(repo, 'adapter')})`."
    )


def _peft_snippet(manifest: Manifest, repo: str | None, base_id: str) -> str:
    """Return the Python code that loads the base model with the adapter.

    It uses PeftModel, because AutoPeftModelForCausalLM looks for the base model in the subfolder too (peft 0.21.2).
    """
    revision, adapter_arguments = _base_revision(manifest), _repo_arguments(repo, "adapter")
    base_arguments = f'"{base_id}"' + (f', revision="{revision}"' if revision else "")
    has_tokenizer = any(item.file.startswith("adapter/tokenizer") for item in manifest.files)
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained({base_arguments}, dtype="auto")\n'
        f"model = PeftModel.from_pretrained(base, {adapter_arguments})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({adapter_arguments if has_tokenizer else base_arguments})"
    )


def _repo_arguments(repo: str | None, folder: str) -> str:
    """Return the arguments of `from_pretrained` for a subfolder of the published repo."""
    return f'"{repo}", subfolder="{folder}"' if repo else f'"./{folder}"'


LIMITS_SECTION = """## Limits

- **Intended use** (TODO): what it is for, who should use it, and what it must not be used for.
- **Not tested** (TODO): languages, topics, lengths and kinds of input that the scores above do not cover.
- **Known failures** (TODO): wrong answers that you have seen, and when they happen."""


# --- where it comes from ----------------------------------------------------------------------------------------------


def _render_provenance(manifest: Manifest) -> str:
    provenance = manifest.provenance
    git, packages = provenance.get("git") or {}, provenance.get("packages") or {}
    dirty = ", with uncommitted changes" if git.get("dirty") else ""
    url = _public_url(git.get("url"))
    return "## How it was made\n\n" + markdown_table(
        ("", ""),
        ("Ferry", git.get("commit") and f"{code_span(git['commit'])}{dirty}"),
        ("From", url and code_span(url)),
        ("Run", code_span(manifest.name)),
        ("llama.cpp", _fill_in("{}", provenance.get("llama_cpp"))),
        ("Python", _fill_in("{} on {}", provenance.get("python"), provenance.get("platform"))),
        ("Packages", ", ".join(f"{escape_text(name)} {escape_text(version)}" for name, version in packages.items())),
        ("Everything else", "`manifest.json`: the whole config, chat template, scores, checksums"),
    )


def _public_url(url: str | None) -> str | None:
    """Return the URL of a git remote without user and password; None for a path of this machine."""
    try:
        parts = urlsplit(url or "")
        if parts.scheme in ("http", "https", "ssh", "git") and parts.hostname and PLAIN_PATH.fullmatch(parts.path):
            return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        return None
    return url if re.fullmatch(r"[\w.-]+@[\w.-]+:[\w./~-]+", url or "", re.ASCII) else None


def _render_verification(manifest: Manifest) -> str:
    default = manifest.default_artifact()
    return _join_paragraphs(
        "## Verification",
        "`manifest.json` holds the sha256 of every other file. Of the default one:",
        code_block(f"{default.sha256}  {default.file}"),
        f"`shasum -a 256 {default.file}` must print the same line.",
        manifest.id and f"Every GGUF of the run names it as `ferry.manifest_id` {code_span(manifest.id)}.",
    )


# --- text that cannot act as markup -----------------------------------------------------------------------------------


def code_span(value: Any) -> str:
    """Return `value` as inline code in one line, which may stand in a table."""
    line = printable_line(value)
    if line and not re.search(r"[`|\\]", line):
        return f"`{line}`"
    # Entities never act as Markdown: https://spec.commonmark.org/0.31.2/#entity-and-numeric-character-references.
    return f"<code>{''.join(c if c.isalnum() or c == ' ' else f'&#{ord(c)};' for c in line)}</code>"


def escape_text(value: Any) -> str:
    """Return `value` in one line, with entities for the characters that could act as Markdown or HTML.

    An underscore inside a word, as in q4_k_m, stays as it is.
    """
    active_characters = r"[\\`*\[\]<>|&$~{}#!@]|:(?=//)|(?<![^\W_])_|_(?![^\W_])|^[-+=]|^\d(?=\d*[.)](\s|$))"
    return re.sub(active_characters, lambda match: f"&#{ord(match[0])};", printable_line(value))


def printable_line(value: Any) -> str:
    """Return `value` in one line of printable characters, cut at MAX_NAME_LENGTH."""
    line = " ".join(str(value).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= MAX_NAME_LENGTH else f"{line[:MAX_NAME_LENGTH]}…"


def code_block(content: str, language: str = "text") -> str:
    """Return a code block whose fence is longer than any run of backticks in `content`."""
    content = CONTROL_CHARACTERS.sub("\ufffd", content)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", content)), default=0))
    return f"{fence}{language}\n{content.removesuffix(chr(10))}\n{fence}"


def markdown_table(titles: tuple[str, ...], *rows: tuple[str | None, ...]) -> str:
    """Return a Markdown table without the rows whose second cell is None. The cells are Markdown already."""
    lines = [titles, ("---",) * len(titles), *(row for row in rows if row[1] is not None)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def format_value(value: Any) -> str:
    """Return a number with thousands separators or in short form, and everything else as escaped text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape_text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def format_size(count: int) -> str:
    """Return a size in decimal units, which disks and the Hub use."""
    unit, name = next(((10**n, name) for n, name in ((9, "GB"), (6, "MB"), (3, "kB")) if count >= 10**n), (1, "bytes"))
    return f"{count} bytes" if unit == 1 else f"{count / unit:.{2 if unit == 10**9 else 1}f} {name}"


def _fill_in(template: str, *values: Any) -> str | None:
    """Return `template` filled with the values; None when one of them is unknown."""
    return None if any(value is None for value in values) else template.format(*map(format_value, values))


def _public_name(name: str) -> str:
    """Return a name or path; of an absolute path only the last part, because the rest describes the user's machine."""
    return PurePath(name).name or name if name.startswith(("/", "~", "file:")) else name


def _code_link(name: str | None, address: str | None) -> str:
    """Return a name as code, with a link where there is an address."""
    return f"[{code_span(name)}]({address})" if address else code_span(name)


def _join_paragraphs(*parts: Any) -> str:
    """Join the parts that are not empty as paragraphs."""
    return "\n\n".join(part for part in parts if part)
