"""Run the stage `data`: turn rows into token ids, labels and held-out rows, and account for every row that is dropped.

    read -> detect format -> clean -> mask (in chunks, on all cores) -> spool -> duplicates, leakage -> write -> report

Checks that compare all rows use hashes only, and the rows that are kept are then copied from the spool. Memory use
therefore grows by about 400 bytes a row, whatever the length of the rows.
"""

import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from common import console, files
from common.errors import UserError, shown
from contract import chat_format, limits
from pipeline.base_model import fetch as bases
from pipeline.base_model import licences, model_config, restore_gguf
from pipeline.config.advice import list_warnings
from pipeline.config.schema import Base, Config, Data
from pipeline.data import (
    chat_template,
    fingerprint,
    process_rows,
    row_formats,
    row_store,
    sources,
    statistics,
    synthetic_prompts,
    system_prompt,
)
from pipeline.run.run_folder import Run


def stage(config: Config, run: Run, processes: int | None = None) -> dict:
    """Write data/{train.parquet,heldout.jsonl,rejected.jsonl,tokenizer/} and return the record.

    Args:
        config: The whole config.
        run: The run to write to; its folder data/ is emptied first.
        processes: The number of processes that work on the rows; None: one a core. The result does not depend on it.

    Raises:
        UserError: The source, the template or too many of the rows cannot be used.
    """
    folder = run.folder / "data"
    files.remove(folder)
    base = bases.fetch_base_model(config.base.model, config.base.revision, weights=False)
    sources = Sources(config.data)
    tokenizer, chat_format, changed = chat_template.load(
        restore_gguf.prepare_tokenizer(base), config.data.template, config.data.date, sources.reasoning()
    )
    settings = settings_of(config, chat_format, folder / "tokenizer", sources)
    with files.writing(settings.tokenizer) as part:
        tokenizer.save_pretrained(part)
    rows = gathered(sources, settings, folder, processes or os.cpu_count() or 1)
    statistics.refuse_broken(rows.tally, config.clean, folder / "rejected.jsonl")
    system = system_prompt.choose_default(config.data.system, rows.tally.system_prompts)
    rows.decide(config.clean, split=settings.validation_share is not None)
    statistics.refuse_empty(rows, config)
    outputs = rows.write(tokenizer)
    smoke_prompts = synthetic_prompts.make_smoke_prompts(rows.questions_asked) or synthetic_prompts.GENERAL
    refuse_long_prompts(tokenizer, config.generation.smoke_prompts or smoke_prompts, system.default, config)
    facts = statistics.facts(rows, config)
    fallback = model_config.describe_tokenizer_fallback(base)
    said = [
        *([fallback] if fallback else []),
        *changed,
        *statistics.cautions(facts, config, chat_format),
        *statistics.describe_system(system, chat_format),
        *list_warnings(config, facts["rows"]["train"], facts["tokens"]["max"]),
    ]
    beside = {f"tokenizer/{item.name}": item for item in sorted(settings.tokenizer.iterdir())}
    return run.write(
        "data",
        (),
        outputs | beside | licence(base, folder / "licence"),
        inputs=sources.inputs,
        dataset=sources.facts,
        formats=sources.formats(),
        fingerprints={name: fingerprint.of(Path(name)) for name in sources.inputs},
        base=describe_base(config.base, base),
        warnings=said,
        chat={
            "end": chat_format.ends,
            "scaffold": chat_format.scaffolds[0],
            "system": chat_format.system,
            "joined": chat_format.joined,
        },
        default_system=system.default,
        rows_keep_their_system=config.data.system == system_prompt.NONE,
        has_input=sources.has_input(),
        smoke_prompts=list(smoke_prompts),
        **facts,
    )


def settings_of(
    config: Config, chat_format: chat_template.Chat, tokenizer: Path, sources: "Sources"
) -> process_rows.Settings:
    """Return the settings of the workers.

    Raises:
        UserError: The rows are plain text, and the template puts turns around it.
    """
    formats = {found.format for _, _, found in sources.parts}
    if "text" in formats and not chat_format.raw:
        raise UserError(
            f"{config.data.source} holds plain text, and a chat template puts turns around it",
            "set data.template to completion, or map the columns of questions and answers in data.columns",
        )
    return process_rows.Settings(
        tokenizer=tokenizer,
        chat=chat_format,
        clean=config.clean,
        every_turn=config.data.labels == "all",
        system=None if config.data.system in (system_prompt.FROM_ROWS, system_prompt.NONE) else config.data.system,
        limit=config.base.max_seq_length,
        validation_share=None if sources.held else config.data.validation_share,
    )


def gathered(sources: "Sources", settings: process_rows.Settings, folder: Path, processes: int) -> row_store.Spool:
    """Clean and mask all rows, and return them in a spool that is closed."""
    rows = row_store.Spool(folder, [part.name for part, _, _ in sources.parts])
    with console.progress(0, "cleaning and tokenizing") as tick:
        for done in process_rows.through(sources.chunks(), settings, processes):
            rows.add(done)
            tick(done.tally.rows)
    rows.close()
    return rows


def refuse_long_prompts(tokenizer, prompts: Sequence[str], system: str | None, config: Config) -> None:
    """Raise UserError when a smoke prompt and its system prompt together are too long for the model or a manifest."""
    most = min(config.base.max_seq_length, limits.MAX_PROMPT_TOKENS)
    before = [{"role": "system", "content": system}] if system else []
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    for prompt in prompts:
        text = chat_format.render(tokenizer.chat_template, [*before, {"role": "user", "content": prompt}], bos, eos)
        if (tokens := len(tokenizer.encode(text, add_special_tokens=False))) > most:
            raise UserError(
                f"the smoke prompt {shown(prompt, 60)!r} has {tokens:,} tokens with its system prompt, "
                f"at most {most:,} fit",
                "shorten generation.smoke_prompts or data.system, or raise base.max_seq_length",
            )


class Sources:
    """All parts of the data set, training and validation, with their formats.

    Attributes:
        parts: (part, whether it is held out as a whole, format) of each part.
        has_validation: Whether the user gives the held-out rows.
        first_rows: The first rows of each part.
        inputs: The sha256 of each local file, by its path.
        facts: What the record says about a Hub data set.
    """

    def __init__(self, data: Data):
        training, held = sources.training(data), sources.validation(data)
        self.held = held is not None
        named = [(part, False) for part in training.parts] + [(part, True) for part in (held.parts if held else ())]
        self.heads = [heads(part) for part, _ in named]
        self.parts = [
            (part, is_held, row_formats.detect(head, data, part.name))
            for (part, is_held), head in zip(named, self.heads, strict=True)
        ]
        self.inputs = training.inputs | (held.inputs if held else {})
        if data.template.endswith(".jinja"):
            chat_template.source(data.template, None)
            self.inputs |= {data.template: files.sha256(Path(data.template))}
        self.facts = {"training": training.facts, "validation": held.facts if held else {}}

    def formats(self) -> list[str]:
        """Return a sentence for each part that says which format it has and why."""
        return [f"{part.name}: {found.format} ({found.evidence})" for part, _, found in self.parts]

    def has_input(self) -> bool:
        """Return whether rows have an instruction and an input, which become one user message."""
        return any(found.format == "alpaca" and "input" in found.columns for _, _, found in self.parts)

    def reasoning(self) -> bool:
        """Return whether rows hold a thinking block of their own."""
        return any("</think>" in json.dumps(row, default=repr, skipkeys=True) for head in self.heads for row in head)

    def chunks(self) -> Iterator[process_rows.Chunk]:
        """Read all rows and yield them in chunks."""
        for number, (part, held, found) in enumerate(self.parts):
            items = part.items()
            while some := list(islice(items, process_rows.CHUNK)):
                yield process_rows.Chunk(number, part.name, found, held, some)


def heads(part: sources.Part) -> list[dict]:
    """Return the rows that can be parsed among the first ones of a part, to detect its format.

    Raises:
        UserError: None of them can be parsed.
    """
    rows, faults = [], []
    for line, payload in islice(part.items(), row_formats.HEAD):
        try:
            row = process_rows.parsed(payload)
            faults += [] if isinstance(row, dict) else [f"{part.name}:{line}: {type(row).__name__}, not an object"]
            rows += [row] if isinstance(row, dict) else []
        except process_rows.Unfit as unfit:
            faults.append(f"{part.name}:{line}: {unfit.detail}")
    if not rows:
        raise UserError(
            f"{part.name} holds no row that can be read" + (f"; the first: {faults[0]}" if faults else ""),
            "put rows into it (JSON objects, or a table with a header), or name another file in data.source",
        )
    return rows


def licence(base: Path, folder: Path) -> dict[str, Path]:
    """Copy the base model's licence files, which a published derivative must include; return them by name of output."""
    made = {}
    for path in licences.files_of(base):
        made[f"licence/{path.name}"] = folder / path.name
        with files.writing(folder / path.name) as part:
            files.copy(path, part)
    return made


def describe_base(base: Base, source: Path) -> dict:
    """Return what the manifest says about the base model. Its own metadata about the licence precedes the config's."""
    if source.is_file():
        meta = restore_gguf.read_metadata(source)
        return {
            "model": base.model,
            "revision": restore_gguf.hash_gguf(source),
            "architecture": meta["general.architecture"],
            "license": meta.get("general.license") or base.license,
            "name": meta.get("general.basename") or source.stem,
        }
    revision = source.name if "snapshots" in source.parts else None
    return {
        "model": base.model,
        "revision": revision or base.revision,
        "architecture": model_config.read_architecture(source),
        "license": base.license,
        "name": base.model.rstrip("/").split("/")[-1],
    } | {key: value for key, value in licences.read_card(source).items() if value}
