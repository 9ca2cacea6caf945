"""Put the files of a model into its repo: GGUFs, adapter, merged model, tokenizer, licence files."""

import os
from pathlib import Path
from typing import Literal

from common import files, gguf_reader
from common.errors import UserError
from contract import manifest
from pipeline.base_model import licences
from pipeline.publish.finished_stages import FinishedStages
from pipeline.run.records import DataRecord, ExportRecord, FinetuneRecord, Record, VerifyRecord
from pipeline.toolchain import llama_tools


def list_published_ggufs(export: ExportRecord, verify: VerifyRecord) -> list[tuple[Record, str]]:
    """Return record and output name of each GGUF to publish: the quantizations, and the 16-bit one as the default."""
    unpublished_names = {export.sixteen, "imatrix"} - {verify.default}
    names = [name for name in export.outputs if not name.endswith(llama_tools.STATIC_SUFFIX)]
    ggufs: list[tuple[Record, str]] = [(export, name) for name in names if name not in unpublished_names]
    return ggufs + [(verify, name) for name in verify.outputs if name in llama_tools.BITS_PER_WEIGHT]


def add_gguf(record: Record, name: str, records: FinishedStages, folder: Path) -> manifest.Artifact:
    """Put one GGUF into the folder and return its manifest entry.

    Args:
        record: The record of the stage that made the file, `export` or `verify`.
        name: The quantization, which is also the name of the stage's output.

    Raises:
        UserError: The file is not the one that the stage recorded.
    """
    source, export = record.output_path(name), records.export
    digest = link_or_copy(source, folder / source.name)
    refuse_changed_file(record, name, digest)
    header = gguf_reader.read_header(source)
    return manifest.Artifact(
        kind="gguf",
        file=source.name,
        quantization=name,
        sha256=digest,
        bytes=source.stat().st_size,
        tensor_types=gguf_reader.count_tensor_types(header),
        weights_sha256=gguf_reader.weights_sha256(source, header),
        default=name == records.verify.default,
        imatrix=export.imatrix if name != export.sixteen else None,
    )


def refuse_changed_file(record: Record, name: str, digest: str) -> None:
    """Raise UserError when the sha256 of a file is not the one that its stage recorded."""
    if digest != record.outputs[name].sha256:
        raise UserError(
            f"{record.output_path(name)} was changed after {record.stage} wrote it",
            f"delete {record.record_path()} and run the same command again",
            code="publish.changed_file",
        )


def add_adapter(finetune: FinetuneRecord, folder: Path) -> manifest.Artifact:
    """Put the LoRA adapter into the folder and return its manifest entry."""
    return _add_weights("adapter", finetune.output_path("adapter"), folder)


def add_merged_model(merged_folder: Path, folder: Path) -> tuple[list[manifest.Artifact], list[str]]:
    """Put the merged 16-bit model into the folder, for Transformers, vLLM and others.

    Returns:
        The manifest entries of its weights, and the names of its other files (config and tokenizer).
    """
    paths = sorted(path for path in merged_folder.iterdir() if path.is_file())
    artifacts = [_add_weights("merged", path, folder) for path in paths if path.suffix == ".safetensors"]
    companions = [path for path in paths if path.suffix != ".safetensors"]
    for path in companions:
        link_or_copy(path, folder / "merged" / path.name)
    return artifacts, [f"merged/{path.name}" for path in companions]


def _add_weights(kind: Literal["adapter", "merged"], source: Path, folder: Path) -> manifest.Artifact:
    """Put a file of weights into the subfolder of its kind and return its manifest entry."""
    name = f"{kind}/{source.name}"
    digest = link_or_copy(source, folder / name)
    return manifest.Artifact(kind=kind, file=name, quantization=None, sha256=digest, bytes=source.stat().st_size)


def add_companion_files(data: DataRecord, finetune: FinetuneRecord, folder: Path) -> list[str]:
    """Write the small files that belong to the model into the folder and return their names.

    These are the adapter's config, which names the base model by its public name and not by a path of this machine; the
    trained tokenizer with its chat template; the base model's licence files; and the notice that its licence asks for.
    """
    adapter_config = files.read_json(finetune.output_path("adapter_config"))
    names = ["adapter/adapter_config.json"]
    files.write_json(folder / names[0], adapter_config | {"base_model_name_or_path": data.base.model})
    names += _add_outputs(data, "tokenizer/", folder, "adapter/")
    names += _add_outputs(data, "licence/", folder, "")
    return names + write_notice(licences.find_terms(data.base.license).notice, names, folder)


def _add_outputs(data: DataRecord, prefix: str, folder: Path, subfolder: str) -> list[str]:
    """Put the files of `data` whose output names begin with `prefix` into a subfolder; return their new names."""
    sources = [data.output_path(output) for output in data.outputs if output.startswith(prefix)]
    for source in sources:
        link_or_copy(source, folder / f"{subfolder}{source.name}")
    return [f"{subfolder}{source.name}" for source in sources]


def write_notice(notice: str | None, names: list[str], folder: Path) -> list[str]:
    """Write the notice that the licence asks to pass on, unless a licence file holds it already.

    Returns:
        The names of the written files: one or none.
    """
    licence_files = (folder / name for name in names if "/" not in name)
    if not notice or any(notice in path.read_text(encoding="utf-8", errors="replace") for path in licence_files):
        return []
    name = "NOTICE" if "notice" not in {name.lower() for name in names} else "NOTICE-base-model"
    with files.write_atomically(folder / name) as part:
        part.write_text(notice + "\n", encoding="utf-8")
    return [name]


def link_or_copy(source: Path, target: Path) -> str:
    """Hard-link `source` to `target`, or copy it where the disk does not allow that; return its sha256."""
    if target.is_file() and target.samefile(source):
        return files.sha256(source)
    with files.write_atomically(target) as part:
        try:
            os.link(source, part)
            return files.sha256(source)
        except OSError:  # another disk, or one without hard links
            return files.copy_and_hash(source, part)


def describe_file(folder: Path, name: str) -> manifest.PublishedFile:
    """Return the manifest's entry for a file: its name, sha256 and size."""
    return manifest.PublishedFile(file=name, sha256=files.sha256(folder / name), bytes=(folder / name).stat().st_size)
