"""export: adapter -> merged 16-bit weights -> 16-bit GGUF -> importance matrix -> quantized GGUFs.

Only the pinned llama.cpp is used: nothing is downloaded, cloned or installed here.
"""

import functools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import files
from common.errors import UserError
from pipeline.config import references
from pipeline.config.schema import Export
from pipeline.export import merge
from pipeline.export.imatrix import build_imatrix, count_imatrix_tokens
from pipeline.run.records import BaseModelFacts, DataRecord, EvaluateRecord, ExportRecord, FinetuneRecord
from pipeline.run.run_folder import Run
from pipeline.toolchain import git, llama_tools
from pipeline.toolchain.finite_numbers import refuse_broken_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
GGUF_TYPES = {"float16": "f16", "bfloat16": "bf16"}
METADATA_FILE, KEY_VALUES_FILE = "metadata.json", "keys.json"


def run_export(
    export: Export, data: DataRecord, finetune: FinetuneRecord, evaluate: EvaluateRecord, run: Run
) -> ExportRecord:
    """Write export/merged/, the 16-bit GGUF, imatrix.gguf, the quantized GGUFs and the record.

    With an importance matrix each quantization has a static twin, which was made without it.

    Raises:
        UserError: The disk is too small, or the merged weights are not W + scale * B @ A.
    """
    folder = run.prepare_stage_folder("export", "finetune", dtype=export.dtype)
    remove_outdated_ggufs(run, export, folder)
    weights, adapter_path = Path(finetune.weights), finetune.output_path("adapter")
    refuse_broken_adapter(adapter_path)
    files.remove(folder / "evidence.json")  # left by an attempt that failed
    refuse_full_disk(weights, folder, export)
    merged_folder = build_merged_weights(
        weights, adapter_path.parent, run.folder / "data" / "tokenizer", folder, export.dtype
    )
    write_gguf_metadata(data, evaluate, run, merged_folder, folder)
    gguf_type = GGUF_TYPES[export.dtype]
    base_gguf = convert_merged(merged_folder, gguf_type, folder / f"{run.model_name}.{gguf_type}.gguf")
    imatrix = None
    if export.imatrix:
        imatrix = build_imatrix(base_gguf, data, run, count_imatrix_tokens(export, data, finetune))
    quantized = quantize_all(base_gguf, export.quantizations, imatrix)
    return run.write_record(
        ExportRecord,
        ("finetune", "evaluate"),
        {gguf_type: base_gguf} | quantized | ({"imatrix": imatrix} if imatrix else {}),
        llama_cpp=llama_tools.describe_version(),
        default=export.quantizations[0],
        sixteen=gguf_type,
        id=manifest_id(run),
        imatrix=files.sha256(imatrix) if imatrix else None,
    )


def convert_merged(merged_folder: Path, gguf_type: str, target: Path) -> Path:
    """Write the merged model as a 16-bit GGUF with the metadata beside it, unless it exists; return its path."""
    folder = target.parent
    convert = functools.partial(
        llama_tools.convert_to_gguf,
        merged_folder,
        gguf_type=gguf_type,
        metadata=folder / METADATA_FILE,
        key_values=folder / KEY_VALUES_FILE,
        log=folder / "convert.log",
    )
    return files.write_if_missing(target, convert)


def quantize_all(base_gguf: Path, names: Sequence[str], imatrix: Path | None) -> dict[str, Path]:
    """Write the quantizations beside the 16-bit GGUF, with an importance matrix also their static twins; return all."""
    matrix_by_suffix = {"": imatrix, llama_tools.STATIC_SUFFIX: None} if imatrix else {"": None}
    return {
        name + suffix: llama_tools.quantize_once(base_gguf, name + suffix, matrix, base_gguf.parent)
        for name in names
        for suffix, matrix in matrix_by_suffix.items()
    }


def remove_outdated_ggufs(run: Run, export: Export, folder: Path) -> None:
    """Remove GGUFs made with another importance matrix, or with the scores of another evaluation in their header."""
    settings_path = folder / "ggufs.json"
    settings = {"evaluate": manifest_id(run)} | export.model_dump(include={"imatrix", "imatrix_tokens"})
    if settings_path.is_file() and files.read_json(settings_path) != settings:
        for path in folder.glob("*.gguf"):
            files.remove(path)
    files.write_json(settings_path, settings)


def build_merged_weights(weights: Path, adapter: Path, tokenizer: Path, folder: Path, dtype: str) -> Path:
    """Write folder/merged, with the trained tokenizer and its template, unless it exists; return its path.

    Raises:
        UserError: The merge gate found a fault; folder/evidence.json has the details.
    """

    def write_merged(target: Path) -> None:
        merge.merge_adapter(weights, adapter, target, dtype)
        copy_tokenizer(tokenizer, target)
        if faults := merge.find_merge_faults(weights, adapter, target, dtype):
            raise write_merge_error(faults, folder / "evidence.json")

    return files.write_if_missing(folder / "merged", write_merged)


def write_merge_error(faults: list[merge.MergeFault], evidence_path: Path) -> UserError:
    """Write the faults of a merge to a file and return the error, which names that file."""
    files.write_json(evidence_path, {"gate": "merge", "faults": faults})
    return UserError(
        f"the merge is wrong in {len(faults)} tensors, the first is {faults[0]['tensor']}: {faults[0]['what']}",
        f"read {evidence_path}; the adapter is unchanged: report it, or run the same command again",
        code="merge.wrong_tensors",
    )


def copy_tokenizer(tokenizer_folder: Path, target: Path) -> None:
    """Copy the trained tokenizer, and add settings that the converter reads and transformers 5 no longer writes."""
    from transformers import AutoTokenizer

    for file in tokenizer_folder.iterdir():
        files.copy_and_hash(file, target / file.name)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    path = target / "tokenizer_config.json"
    added_tokens = {"added_tokens_decoder": describe_added_tokens(tokenizer)}
    files.write_json(path, files.read_json(path) | added_tokens | find_automatic_tokens(tokenizer))


def describe_added_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, dict]:
    """Return the added tokens by id: without them, Gemma's <start_of_turn> becomes an ordinary word of the GGUF."""
    fields = ("content", "special", "lstrip", "rstrip", "normalized", "single_word")
    return {
        str(token_id): {field: getattr(token, field) for field in fields}
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }


def find_automatic_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bool]:
    """Return whether BOS and EOS are added: else llama.cpp gives Phi 3 a BOS that it was not trained with."""
    ids = tokenizer("").input_ids
    return {
        "add_bos_token": tokenizer.bos_token_id in ids,
        "add_eos_token": bool(ids) and ids[-1] == tokenizer.eos_token_id,
    }


def general_name(run: Run, merged_folder: Path) -> str:
    """Return the value of general.name: the run's name, and 'phi-3' for Phi 3 alone.

    llama.cpp reads Phi 3's token rules off general.name, so the word must be in its files and in no others.
    """
    name = re.sub(r"(?i)phi-?3", "phi 3", run.model_name)
    return f"{name} (phi-3)" if has_phi3_tokens(merged_folder) else name


def has_phi3_tokens(merged_folder: Path) -> bool:
    """Return whether the model has the special tokens of Phi 3, some of which strip the white space after them."""
    tokens = files.read_json(merged_folder / "tokenizer_config.json")["added_tokens_decoder"].values()
    has_stripping_token = any(token["rstrip"] and token["special"] for token in tokens)
    return has_stripping_token and any(token["content"] == "<|endoftext|>" for token in tokens)


def manifest_id(run: Run) -> str:
    """Return the id that the manifest and the GGUFs share: the sha256 of the record of `evaluate`.

    It is known before either of them is written.
    """
    return files.sha256(run.record_path("evaluate"))


def write_gguf_metadata(
    data: DataRecord, evaluate: EvaluateRecord, run: Run, merged_folder: Path, folder: Path
) -> None:
    """Write metadata.json (general.*, as the GGUF specification names them) and keys.json (Ferry's own key-values)."""
    metadata = {
        "general.name": general_name(run, merged_folder),
        "general.base_models": [describe_base_model(data.base)],
        "general.datasets": [{"name": data.settings["data.source"]}],
    }
    key_values = collect_key_values(data, evaluate, run)
    files.write_json(folder / METADATA_FILE, metadata)
    files.write_json(folder / KEY_VALUES_FILE, {key: value for key, value in key_values.items() if value is not None})


def describe_base_model(base: BaseModelFacts) -> dict[str, str | None]:
    """Return the entry of general.base_models."""
    if not references.is_hub_model(base.model):
        return {"name": base.name}
    return {"name": base.name, "repo_url": f"https://huggingface.co/{base.model}"}


def collect_key_values(data: DataRecord, evaluate: EvaluateRecord, run: Run) -> dict[str, str | None]:
    """Return Ferry's own key-values. A value that is None is not written."""
    scores = {name: entry.to_json() for name, entry in evaluate.scores.items()}
    return {
        # the converter takes a licence from a model card only
        "general.license": data.base.license,
        "ferry.run": run.folder.name,
        "ferry.manifest_id": manifest_id(run),
        "ferry.base": data.base.model,
        "ferry.base.revision": data.base.revision or "",
        "ferry.data": data.settings["data.source"],
        "ferry.data.heldout_sha256": data.outputs["heldout"].sha256,
        "ferry.config_sha256": files.sha256(run.config_file),
        "ferry.code": git.read_checkout()["commit"],
        "ferry.scores": json.dumps({"rule": evaluate.rule, **scores}),
    }


def refuse_full_disk(weights: Path, folder: Path, export: Export) -> None:
    """Raise UserError when the disk cannot hold the peak of the export.

    Besides the base model these are the merged weights, the 16-bit GGUF, and the quantizations.
    """
    merged_bytes = merge.merged_bytes(merge.list_weight_shards(weights))
    quantized_bytes = estimate_quantized_bytes(export, merged_bytes)
    existing_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    needed_bytes, free_bytes = 2 * merged_bytes + quantized_bytes - existing_bytes, shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"export needs {needed_bytes / 1e9:.1f} GB in {folder} "
            f"(merged weights and 16-bit GGUF {merged_bytes / 1e9:.1f} GB each, "
            f"quantized {quantized_bytes / 1e9:.1f} GB), {free_bytes / 1e9:.1f} GB are free",
            "free disk space, then run the same command again",
            code="disk.too_small",
        )


def estimate_quantized_bytes(export: Export, merged_bytes: int) -> float:
    """Return the bytes of all quantizations, each of which is made twice with an importance matrix."""
    shares = (llama_tools.BITS_PER_WEIGHT[name] / 16 for name in export.quantizations)
    return sum(shares) * merged_bytes * (2 if export.imatrix else 1)
