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
from typing import TYPE_CHECKING

from common import console, files
from common.errors import UserError, printable_line
from contract import chat_format, limits
from pipeline.base_model import fetch, licences, model_config, restore_gguf
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
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run_data(config: Config, run: Run, processes: int | None = None) -> DataRecord:
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
    base_path = fetch.fetch_base_model(config.base.model, config.base.revision, weights=False)
    dataset = DatasetParts(config.data)
    tokenizer, chat, template_changes = chat_template.load_chat_tokenizer(
        restore_gguf.prepare_tokenizer(base_path), config.data.template, config.data.date, dataset.has_reasoning()
    )
    settings = build_worker_settings(config, chat, folder / "tokenizer", dataset)
    tokenizer_files = save_tokenizer(tokenizer, settings.tokenizer_dir)
    spool = collect_rows(dataset, settings, folder, processes or os.cpu_count() or 1)
    statistics.refuse_broken_rows(spool.tally, config.clean, folder / "rejected.jsonl")
    prompt_choice = system_prompt.choose_default(config.data.system, spool.tally.system_prompts)
    spool.drop_repeated_rows(config.clean, split=settings.validation_share is not None)
    statistics.refuse_empty_sets(spool, config)
    outputs = spool.write_outputs(tokenizer)
    smoke_prompts = synthetic_prompts.make_smoke_prompts(spool.sample_questions) or synthetic_prompts.GENERAL_PROMPTS
    refuse_long_prompts(tokenizer, config.generation.smoke_prompts or smoke_prompts, prompt_choice.default, config)
    facts = statistics.compute_facts(spool, config)
    fallback = model_config.describe_tokenizer_fallback(base_path)
    warnings = [
        *([fallback] if fallback else []),
        *template_changes,
        *statistics.list_data_warnings(facts, config, chat),
        *statistics.describe_system_prompt(prompt_choice, chat),
        *list_warnings(config, facts.rows.train, facts.tokens.max),
    ]
    return run.write_record(
        DataRecord,
        (),
        outputs | tokenizer_files | copy_licence_files(base_path, folder / "licence"),
        inputs=dataset.inputs,
        dataset=dataset.facts,
        formats=dataset.describe_formats(),
        fingerprints={name: fingerprint.compute_fingerprint(Path(name)) for name in dataset.inputs},
        base=describe_base(config.base, base_path),
        warnings=warnings,
        chat=describe_chat(chat),
        default_system=prompt_choice.default,
        rows_keep_their_system=config.data.system == system_prompt.NONE,
        has_input=dataset.has_input(),
        smoke_prompts=list(smoke_prompts),
        **dict(facts),
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> dict[str, Path]:
    """Write the tokenizer with its chat template to `folder`, and return its files by name of output."""
    with files.write_atomically(folder) as temporary_folder:
        tokenizer.save_pretrained(temporary_folder)
    return {f"tokenizer/{path.name}": path for path in sorted(folder.iterdir())}


def describe_chat(chat: chat_template.ChatFormat) -> dict[str, object]:
    """Return what the record says about the chat template: the fields of ChatFacts."""
    facts = {"end": chat.end_tokens, "scaffold": chat.scaffolds[0]}
    return facts | {"system": chat.supports_system, "joined": chat.is_joined}


def build_worker_settings(
    config: Config, chat: chat_template.ChatFormat, tokenizer_dir: Path, dataset: "DatasetParts"
) -> process_rows.WorkerSettings:
    """Return the settings of the workers.

    Raises:
        UserError: The rows are plain text, and the template puts turns around it.
    """
    formats = {schema.format for _, _, schema in dataset.parts}
    if "text" in formats and not chat.is_raw:
        raise UserError(
            f"{config.data.source} holds plain text, but the chat template adds turns around it",
            "set data.template to completion, or map the columns of questions and answers in data.columns",
            code="data.plain_text",
        )
    has_own_prompt = config.data.system not in (system_prompt.FROM_ROWS, system_prompt.NONE)
    return process_rows.WorkerSettings(
        tokenizer_dir=tokenizer_dir,
        chat=chat,
        clean=config.clean,
        every_turn=config.data.labels == "all",
        default_system=config.data.system if has_own_prompt else None,
        max_tokens=config.base.max_seq_length,
        validation_share=None if dataset.has_validation else config.data.validation_share,
    )


def collect_rows(
    dataset: "DatasetParts", settings: process_rows.WorkerSettings, folder: Path, processes: int
) -> row_store.RowSpool:
    """Clean and mask all rows, and return them in a spool that is closed."""
    spool = row_store.RowSpool(folder, [part.name for part, _, _ in dataset.parts])
    with console.show_progress(0, "cleaning and tokenizing") as advance:
        for chunk in process_rows.process_chunks(dataset.read_chunks(), settings, processes):
            spool.add_chunk(chunk)
            advance(chunk.tally.rows)
    spool.close()
    return spool


def refuse_long_prompts(
    tokenizer: "PreTrainedTokenizerFast", prompts: Sequence[str], default_system: str | None, config: Config
) -> None:
    """Raise UserError when a smoke prompt and its system prompt together are too long for the model or a manifest."""
    max_tokens = min(config.base.max_seq_length, limits.MAX_PROMPT_TOKENS)
    system_messages = [{"role": "system", "content": default_system}] if default_system else []
    for prompt in prompts:
        token_count = count_prompt_tokens(tokenizer, [*system_messages, {"role": "user", "content": prompt}])
        if token_count > max_tokens:
            raise UserError(
                f"the smoke prompt {printable_line(prompt, 60)!r} has {token_count:,} tokens with its system prompt, "
                f"at most {max_tokens:,} fit",
                "shorten generation.smoke_prompts or data.system, or raise base.max_seq_length",
                code="smoke.prompt_too_long",
            )


def count_prompt_tokens(tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, str]]) -> int:
    """Return the number of tokens of the prompt for a conversation."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    text = chat_format.render(tokenizer.chat_template, messages, bos, eos)
    return len(tokenizer.encode(text, add_special_tokens=False))


class DatasetParts:
    """All parts of the data set, training and validation, with their formats.

    Attributes:
        parts: (part, whether it is held out as a whole, format) of each part.
        has_validation: Whether the user gives the held-out rows.
        first_rows: The first rows of each part.
        inputs: The sha256 of each local file, by its path.
        facts: What the record says about a Hub data set.
    """

    def __init__(self, data: Data):
        training_source, validation_source = sources.load_training_source(data), sources.load_validation_source(data)
        self.has_validation = validation_source is not None
        parts = [(part, False) for part in training_source.parts] + [
            (part, True) for part in (validation_source.parts if validation_source else ())
        ]
        self.first_rows = [read_first_rows(part) for part, _ in parts]
        self.parts = [
            (part, is_heldout, row_formats.detect_format(first_rows, data, part.name))
            for (part, is_heldout), first_rows in zip(parts, self.first_rows, strict=True)
        ]
        self.inputs = training_source.inputs | (validation_source.inputs if validation_source else {})
        if data.template.endswith(".jinja"):
            chat_template.read_template_text(data.template, None)
            self.inputs |= {data.template: files.sha256(Path(data.template))}
        self.facts = {
            "training": training_source.facts,
            "validation": validation_source.facts if validation_source else {},
        }

    def describe_formats(self) -> list[str]:
        """Return a sentence for each part that says which format it has and why."""
        return [f"{part.name}: {schema.format} ({schema.evidence})" for part, _, schema in self.parts]

    def has_input(self) -> bool:
        """Return whether rows have an instruction and an input, which become one user message."""
        return any(schema.format == "alpaca" and "input" in schema.columns for _, _, schema in self.parts)

    def has_reasoning(self) -> bool:
        """Return whether rows hold a thinking block of their own."""
        return any(
            "</think>" in json.dumps(row, default=repr, skipkeys=True) for rows in self.first_rows for row in rows
        )

    def read_chunks(self) -> Iterator[process_rows.Chunk]:
        """Read all rows and yield them in chunks."""
        for part_number, (part, is_heldout, schema) in enumerate(self.parts):
            rows = part.read_rows()
            while chunk_rows := list(islice(rows, process_rows.CHUNK_ROWS)):
                yield process_rows.Chunk(part_number, part.name, schema, is_heldout, chunk_rows)


def read_first_rows(part: sources.Part) -> list[dict]:
    """Return the rows that can be parsed among the first ones of a part, to detect its format.

    Raises:
        UserError: None of them can be parsed.
    """
    rows, faults = [], []
    for line, payload in islice(part.read_rows(), row_formats.DETECTION_ROWS):
        try:
            rows.append(parse_object(payload))
        except process_rows.UnusableRow as error:
            faults.append(f"{part.name}:{line}: {error.detail}")
    if not rows:
        raise UserError(
            f"{part.name} has no readable row" + (f"; the first: {faults[0]}" if faults else ""),
            "put rows into it (JSON objects, or a table with a header), or name a different file in data.source",
            code="data.no_readable_rows",
        )
    return rows


def parse_object(payload: bytes | dict) -> dict:
    """Return a row that is an object. Raise UnusableRow for every other one."""
    row = process_rows.parse_row(payload)
    if not isinstance(row, dict):
        raise process_rows.UnusableRow("wrong_format", f"{type(row).__name__}, not an object")
    return row


def copy_licence_files(base: Path, folder: Path) -> dict[str, Path]:
    """Copy the base model's licence files, which a published derivative must include; return them by name of output."""
    outputs = {}
    for path in licences.find_licence_files(base):
        outputs[f"licence/{path.name}"] = folder / path.name
        with files.write_atomically(folder / path.name) as temporary_path:
            files.copy_and_hash(path, temporary_path)
    return outputs


def describe_base(base: Base, source: Path) -> dict[str, str | None]:
    """Return what the manifest says about the base model. Its own metadata about the licence precedes the config's."""
    if source.is_file():
        metadata = restore_gguf.read_metadata(source)
        return {
            "model": base.model,
            "revision": restore_gguf.hash_gguf(source),
            "architecture": metadata["general.architecture"],
            "license": metadata.get("general.license") or base.license,
            "name": metadata.get("general.basename") or source.stem,
        }
    revision = source.name if "snapshots" in source.parts else None
    return {
        "model": base.model,
        "revision": revision or base.revision,
        "architecture": model_config.read_architecture(source),
        "license": base.license,
        "name": base.model.rstrip("/").split("/")[-1],
    } | {key: value for key, value in licences.read_card_licence(source).items() if value}
