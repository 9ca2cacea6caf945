"""Build the manifest of a run from its records."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from common import files
from contract import manifest
from pipeline.config.schema import Config
from pipeline.publish.finished_stages import FinishedStages
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
    data, contract_fields = records.data, files.read_json(records.verify.output_path("contract"))
    return manifest.Manifest(
        id=records.export.id,
        name=run.model_name,
        base=manifest.BaseModelInfo(**data.base.model_dump(exclude_unset=True)),
        dataset=manifest.Dataset(
            source=config.data.source,
            revision=data.dataset["training"].get("revision") or config.data.revision,
            sha256=data.inputs,
            rows=data.rows.model_dump(),
            split=config.data.validation or f"{config.data.validation_share:g} of the rows, by content hash",
            split_hash=data.outputs["heldout"].sha256,
            train_sha256=data.outputs["train"].sha256,
            fingerprints=data.fingerprints,
        ),
        generation=manifest.Generation(
            temperature=config.generation.temperature,
            top_p=config.generation.top_p,
            max_tokens=config.generation.max_tokens,
            num_ctx=config.generation.num_ctx or config.base.max_seq_length,
        ),
        artifacts=tuple(artifacts),
        files=tuple(companion_files),
        config=config.model_dump(mode="json"),
        training={"method": "QLoRA" if config.base.load_in_4bit else "LoRA"}
        | records.finetune.model_dump(mode="json", include=TRAINING_FACTS),
        scores=summarize_scores(config, records),
        provenance=collect_provenance(run),
        **contract_fields,
    )


def summarize_scores(config: Config, records: FinishedStages) -> dict:
    """Return the quality ladder, the thresholds of `verify` and its results."""
    verify = records.verify
    return {
        "rule": config.evaluate.rule,
        "heldout": {name: scores.to_json() for name, scores in records.scores.items()},
        "used": verify.used,
        "thresholds": config.verify.model_dump(mode="json"),
        "conversion": verify.conversion.model_dump(mode="json", exclude_none=True),
        "training": records.evaluate.training.model_dump(mode="json"),
        "notes": verify.notes,
        "as_served": verify.as_served.to_json(),
    }


def collect_provenance(run: Run) -> dict:
    """Return what is needed to make the model again: hashes of config, records and locks; versions; git; the image."""
    image_facts = files.read_json(Path(os.environ["FERRY_IMAGE"])) if os.environ.get("FERRY_IMAGE") else {}
    return {
        "config_sha256": files.sha256(run.config_file),
        "records": {name: files.sha256(run.record_path(name)) for name in STAGES if run.is_done(name)},
        "git": git.describe_checkout(),
        "image": {"id": os.environ.get("FERRY_IMAGE_ID")}
        | {key: image_facts[key] for key in ("sources", "base", "debian", "device", "llama.cpp")}
        if image_facts
        else None,
        "lock_sha256": {lock.name: files.sha256(lock) for lock in sorted(LOCKS_DIR.glob("*.txt"))},
        "llama_cpp": llama_tools.describe_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "driver": machine.query_nvidia().driver or None,
        "packages": {name: version(name) for name in PROVENANCE_PACKAGES},
    }
