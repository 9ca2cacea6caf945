"""export: adapter -> merged 16-bit weights -> 16-bit GGUF -> importance matrix -> quantized GGUFs.

Only the pinned llama.cpp is used: nothing is downloaded, cloned or installed here.
"""

import json
import re
import shutil
from pathlib import Path

from common import files
from common.errors import UserError
from pipeline.config import references
from pipeline.config.schema import Export
from pipeline.export import merge
from pipeline.run import training_rows
from pipeline.run.records import DataRecord, EvaluateRecord, ExportRecord, FinetuneRecord
from pipeline.run.run_folder import Run
from pipeline.toolchain import git, llama_tools
from pipeline.toolchain.finite_numbers import refuse_broken_adapter

GGUF_TYPES = {"float16": "f16", "bfloat16": "bf16"}
IMATRIX_TIME_SHARE = 0.1  # the share of the training time that the importance matrix may take without a GPU


def run_export(
    export: Export, data: DataRecord, finetune: FinetuneRecord, evaluate: EvaluateRecord, run: Run
) -> ExportRecord:
    """Write export/merged/, the 16-bit GGUF, imatrix.gguf, the quantized GGUFs and the record.

    With an importance matrix each quantization has a static twin, which was made without it.

    Raises:
        UserError: The disk is too small, or the merged weights are not W + scale * B @ A.
    """
    gguf_type, folder = GGUF_TYPES[export.dtype], run.prepare_stage_folder("export", "finetune", dtype=export.dtype)
    remove_outdated_ggufs(run, export, folder)
    weights, adapter_path = Path(finetune.weights), finetune.output_path("adapter")
    refuse_broken_adapter(adapter_path)
    files.remove(folder / "evidence.json")  # left by an attempt that failed
    refuse_full_disk(weights, folder, export)
    merged_folder = build_merged_weights(
        weights, adapter_path.parent, run.folder / "data" / "tokenizer", folder, export.dtype
    )
    base_gguf = folder / f"{run.model_name}.{gguf_type}.gguf"
    metadata_path, key_values_path = write_gguf_metadata(data, evaluate, run, merged_folder, folder)
    files.write_if_missing(
        base_gguf,
        lambda temporary: llama_tools.convert_to_gguf(
            merged_folder, temporary, gguf_type, metadata_path, key_values_path, folder / "convert.log"
        ),
    )
    outputs = {gguf_type: base_gguf}
    imatrix = None
    if export.imatrix:
        text = build_imatrix_text(data, run, count_imatrix_tokens(export, data, finetune))
        imatrix = build_imatrix(base_gguf, text, folder, count_imatrix_tokens(export, data, finetune))
    for name in export.quantizations:
        outputs[name] = llama_tools.quantize_once(base_gguf, name, imatrix, folder)
        if imatrix:
            outputs[name + llama_tools.STATIC_SUFFIX] = llama_tools.quantize_once(
                base_gguf, name + llama_tools.STATIC_SUFFIX, None, folder
            )
    return run.write_record(
        ExportRecord,
        ("finetune", "evaluate"),
        outputs | ({"imatrix": imatrix} if imatrix else {}),
        llama_cpp=llama_tools.describe_version(),
        default=export.quantizations[0],
        sixteen=gguf_type,
        id=manifest_id(run),
        imatrix=files.sha256(imatrix) if imatrix else None,
    )


def remove_outdated_ggufs(run: Run, export: Export, folder: Path) -> None:
    """Remove GGUFs made with another importance matrix, or with the scores of another evaluation in their header."""
    settings_path = folder / "ggufs.json"
    settings = {"evaluate": files.sha256(run.record_path("evaluate"))} | export.model_dump(
        include={"imatrix", "imatrix_tokens"}
    )
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
            evidence_path = folder / "evidence.json"
            files.write_json(evidence_path, {"gate": "merge", "faults": faults})
            raise UserError(
                f"the merge is wrong in {len(faults)} tensors, the first is {faults[0]['tensor']}: {faults[0]['what']}",
                f"read {evidence_path}; the adapter is unchanged: report it, or run the same command again",
                code="merge.wrong_tensors",
            )

    return files.write_if_missing(folder / "merged", write_merged)


def copy_tokenizer(tokenizer_folder: Path, target: Path) -> None:
    """Copy the trained tokenizer, and add settings that the converter reads and transformers 5 no longer writes.

    Without added_tokens_decoder Gemma's <start_of_turn> becomes an ordinary word of the GGUF. Without add_bos_token
    llama.cpp gives Phi 3 a BOS that it was not trained with.
    """
    from transformers import AutoTokenizer

    for file in tokenizer_folder.iterdir():
        files.copy_and_hash(file, target / file.name)
    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    added = {
        str(token_id): {"content": token.content, "special": token.special}
        | {key: getattr(token, key) for key in ("lstrip", "rstrip", "normalized", "single_word")}
        for token_id, token in loaded.added_tokens_decoder.items()
    }
    empty_ids = loaded("").input_ids
    facts = {
        "add_bos_token": loaded.bos_token_id in empty_ids,
        "add_eos_token": bool(empty_ids) and empty_ids[-1] == loaded.eos_token_id,
    }
    path = target / "tokenizer_config.json"
    files.write_json(path, files.read_json(path) | {"added_tokens_decoder": added} | facts)


def general_name(run: Run, merged_folder: Path) -> str:
    """Return the value of general.name: the run's name, and 'phi-3' for Phi 3 alone.

    llama.cpp reads Phi 3's token rules off general.name, so the word must be in its files and in no others.
    """
    tokens = files.read_json(merged_folder / "tokenizer_config.json")["added_tokens_decoder"].values()
    has_stripping_token = any(token["rstrip"] and token["special"] for token in tokens)
    name = re.sub(r"(?i)phi-?3", "phi 3", run.model_name)
    return (
        f"{name} (phi-3)"
        if has_stripping_token and any(token["content"] == "<|endoftext|>" for token in tokens)
        else name
    )


def manifest_id(run: Run) -> str:
    """Return the id that the manifest and the GGUFs share: the sha256 of the record of `evaluate`.

    It is known before either of them is written.
    """
    return files.sha256(run.record_path("evaluate"))


def write_gguf_metadata(
    data: DataRecord, evaluate: EvaluateRecord, run: Run, merged_folder: Path, folder: Path
) -> tuple[Path, Path]:
    """Write metadata.json (general.*, as the GGUF specification names them) and keys.json (Ferry's own key-values).

    Returns:
        The paths of both files.
    """
    base_id, data_source = data.base.model, data.settings["data.source"]
    base_entry = {"name": data.base.name}
    if references.is_hub_model(base_id):
        base_entry["repo_url"] = f"https://huggingface.co/{base_id}"
    metadata = {
        "general.name": general_name(run, merged_folder),
        "general.base_models": [base_entry],
        "general.datasets": [{"name": data_source}],
    }
    scores = {name: entry.to_json() for name, entry in evaluate.scores.items()}
    key_values = {
        # the converter takes a licence from a model card only
        "general.license": data.base.license,
        "ferry.run": run.folder.name,
        "ferry.manifest_id": manifest_id(run),
        "ferry.base": base_id,
        "ferry.base.revision": data.base.revision or "",
        "ferry.data": data_source,
        "ferry.data.heldout_sha256": data.outputs["heldout"].sha256,
        "ferry.config_sha256": files.sha256(run.config_file),
        "ferry.code": git.describe_checkout()["commit"],
        "ferry.scores": json.dumps({"rule": evaluate.rule, **scores}),
    }
    paths = folder / "metadata.json", folder / "keys.json"
    for path, value in zip(paths, (metadata, key_values), strict=True):
        files.write_json(path, {key: item for key, item in value.items() if item is not None})
    return paths


def build_imatrix(base_gguf: Path, text: str, folder: Path, token_count: int) -> Path:
    """Write imatrix.gguf from `text` unless it exists; return its path."""
    text_path = folder / "imatrix.txt"
    text_path.write_text(text, encoding="utf-8")
    return files.write_if_missing(
        folder / "imatrix.gguf",
        lambda temporary: llama_tools.compute_imatrix(
            base_gguf, text_path, temporary, token_count, folder / "imatrix.log"
        ),
    )


def count_imatrix_tokens(export: Export, data: DataRecord, finetune: FinetuneRecord) -> int:
    """Return the number of tokens for the importance matrix: as configured, at most as many as the training rows hold.

    On a CPU it is also at most as many as can be read in a tenth of the training time. (Training takes about three
    times as long for a token: forward, and backward through it.) The number is at least one chunk.
    """
    limits = [export.imatrix_tokens, data.tokens.train]
    limits += [int(IMATRIX_TIME_SHARE * 3 * finetune.tokens)] if finetune.device.startswith("CPU") else []
    return max(llama_tools.CHUNK_TOKENS, min(limits))


def build_imatrix_text(data: DataRecord, run: Run, min_tokens: int) -> str:
    """Return the text of evenly spaced training rows, rendered as trained; too few rows are repeated.

    Held-out rows are never used. The text has at least `min_tokens` tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer")
    id_column = training_rows.read_table(data.output_path("train"))["input_ids"]
    mean_length = sum(map(len, id_column)) / len(id_column)
    step = max(1, int(len(id_column) * mean_length / min_tokens))
    texts, token_count, index = [], 0, 0
    while token_count < min_tokens + llama_tools.CHUNK_TOKENS:
        token_ids = id_column[index % len(id_column)].as_py()
        texts.append(tokenizer.decode(token_ids))
        token_count, index = token_count + len(token_ids), index + step
    return "".join(texts)


def refuse_full_disk(weights: Path, folder: Path, export) -> None:
    """Raise UserError when the disk cannot hold the peak of the export.

    Besides the base model these are the merged weights, the 16-bit GGUF, and every quantization (twice with an
    importance matrix).
    """
    merged_bytes = merge.merged_bytes(merge.list_weight_shards(weights))
    quantized_bytes = (
        sum(llama_tools.BITS_PER_WEIGHT[kind] / 16 for kind in export.quantizations)
        * merged_bytes
        * (2 if export.imatrix else 1)
    )
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
