"""Build the manifest of a run from its records."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from common import files
from contract import manifest
from pipeline.config.schema import Config
from pipeline.publish.finished_stages import FinishedStages
from pipeline.run.records import DataRecord, FinetuneRecord
from pipeline.run.run_folder import STAGES, Run
from pipeline.toolchain import git, llama_tools, machine

LOCKS_DIR = Path(__file__).resolve().parents[2] / "setup" / "locks"
PROVENANCE_PACKAGES = (
    "unsloth",
    "unsloth_zoo",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "llama_cpp_python",
)
# What the manifest says of the training, from the record of `finetune`.
TRAINING_FACTS = {
    "steps",
    "epochs",
    "tokens",
    "seconds",
    "peak_memory_gb",
    "device",
    "seed",
    "final_loss",
    "trainable",
    "rows",
    "train_batch_size",
    "learning_rate",
    "best_step",
}


def build_manifest(
    config: Config,
    run: Run,
    records: FinishedStages,
    artifacts: list[manifest.Artifact],
    companion_files: list[manifest.PublishedFile],
) -> manifest.Manifest:
    """Build the manifest of a run from its records.

    Args:
        companion_files: The entries of the files that are no artifacts: configs, tokenizer, licence files.
    """
    contract_fields = files.read_json(records.verify.output_path("contract"))
    return manifest.Manifest(
        id=records.export.id,
        name=run.model_name,
        base=manifest.BaseModelInfo(**records.data.base.model_dump(exclude_unset=True)),
        dataset=describe_dataset(config, records.data),
        generation=describe_generation(config),
        artifacts=tuple(artifacts),
        files=tuple(companion_files),
        config=config.model_dump(mode="json"),
        training=summarize_training(config, records.finetune),
        scores=summarize_scores(config, records),
        provenance=collect_provenance(run),
        **contract_fields,
    )


def describe_dataset(config: Config, data: DataRecord) -> manifest.Dataset:
    """Return where the rows come from, how they were split, and their hashes."""
    share = f"{config.data.validation_share:g} of the rows, by content hash"
    return manifest.Dataset(
        source=config.data.source,
        revision=data.dataset["training"].get("revision") or config.data.revision,
        sha256=data.inputs,
        rows=data.rows.model_dump(),
        split=config.data.validation or share,
        split_hash=data.outputs["heldout"].sha256,
        train_sha256=data.outputs["train"].sha256,
        fingerprints=data.fingerprints,
    )


def describe_generation(config: Config) -> manifest.Generation:
    """Return the default settings for generating text."""
    settings = config.generation.model_dump(include={"temperature", "top_p", "max_tokens"})
    return manifest.Generation(num_ctx=config.generation.num_ctx or config.base.max_seq_length, **settings)


def summarize_training(config: Config, finetune: FinetuneRecord) -> dict[str, Any]:
    """Return the method and the facts of the training."""
    method = "QLoRA" if config.base.load_in_4bit else "LoRA"
    return {"method": method} | finetune.model_dump(mode="json", include=TRAINING_FACTS)


def summarize_scores(config: Config, records: FinishedStages) -> manifest.Scores:
    """Return the quality ladder, the thresholds of `verify` and its results."""
    verify = records.verify
    scores = {
        "rule": config.evaluate.rule,
        "heldout": {name: scores.to_json() for name, scores in records.scores.items()},
        "used": verify.used,
        "thresholds": config.verify.model_dump(mode="json"),
        "conversion": verify.conversion.model_dump(mode="json", exclude_none=True),
        "training": records.evaluate.training.model_dump(mode="json"),
        "notes": verify.notes,
        "as_served": verify.as_served.to_json(),
    }
    return cast("manifest.Scores", scores)  # the manifest checks them, and takes further keys


def collect_provenance(run: Run) -> manifest.Provenance:
    """Return what is needed to make the model again: hashes of config, records and locks; versions; git; the image."""
    provenance = {
        "config_sha256": files.sha256(run.config_file),
        "records": {name: files.sha256(run.record_path(name)) for name in STAGES if run.is_done(name)},
        "git": git.read_checkout(),
        "image": describe_image(),
        "lock_sha256": {lock.name: files.sha256(lock) for lock in sorted(LOCKS_DIR.glob("*.txt"))},
        "llama_cpp": llama_tools.describe_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "driver": machine.query_nvidia().driver or None,
        "packages": {name: version(name) for name in PROVENANCE_PACKAGES},
    }
    return cast("manifest.Provenance", provenance)  # the manifest checks it, and takes further keys


def describe_image() -> dict[str, Any] | None:
    """Return the id of the image that this process runs in, and what it was built from; None outside of an image."""
    facts_path = os.environ.get("FERRY_IMAGE")
    facts = files.read_json(Path(facts_path)) if facts_path else {}
    if not facts:
        return None
    selected_facts = {key: facts[key] for key in ("sources", "base", "debian", "device", "llama.cpp")}
    return {"id": os.environ.get("FERRY_IMAGE_ID")} | selected_facts
