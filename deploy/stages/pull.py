"""pull: fetch the manifest, then one artifact, and accept only what was published. The file is hashed as it arrives."""

import shutil
from pathlib import Path
from typing import Any

from common import console, files, gguf_reader, hub
from common.errors import UserError, printable_line
from contract import manifest, model_header, published_model, template_sandbox
from contract.manifest import Artifact, Manifest
from contract.published_model import ModelSource
from deploy import store
from deploy.stages import header_check
from deploy.stages.partial_download import PartialDownload


def run_pull(repo: str, models: Path, quantization: str | None = None) -> dict[str, Any]:
    """Fetch manifest and artifact into the store, make that version the current one, and return its pull.json.

    Args:
        repo: owner/name[@revision] on the Hub, or a folder hub.
        models: The store.
        quantization: The GGUF to fetch; None takes the manifest's default.

    Returns:
        The record, with the folder of the version.

    Raises:
        UserError: The file differs from its manifest, or neither the repo nor an earlier pull of it is available.
    """
    try:
        source = published_model.find_source(repo)
        content = source.read_manifest()
    except hub.Unreachable as error:
        return use_earlier_pull(repo, models, quantization, error)
    model_manifest = manifest.parse_manifest(content, f"{printable_line(repo)}/{manifest.FILE_NAME}")
    artifact = choose_artifact(model_manifest, quantization)
    version = models / source.name / files.sha256_bytes(content)[:12]
    with store.lock_model(version.parent):
        try:
            store_artifact(source, version, model_manifest, artifact, content)
        except Exception:
            remove_stray_manifest(version)
            raise
        record = write_record(repo, source.commit, version, artifact, content)
    return record | {"folder": str(version)}


def use_earlier_pull(repo: str, models: Path, quantization: str | None, error: UserError) -> dict[str, Any]:
    """Return the record of an earlier pull, for when the Hub cannot be reached. Raises `error` when there is none."""
    version = store.find_version_by_name(models, repo)
    if version is None:
        raise error
    manifest_path = version / manifest.FILE_NAME
    content = manifest_path.read_bytes() if manifest_path.is_file() else b""
    artifact = choose_artifact(manifest.parse_manifest(content, str(manifest_path)), quantization)
    path = version / artifact.file
    if not path.is_file() or files.sha256(path) != artifact.sha256:
        raise UserError(f"{error.message}; {path} was not pulled before, or is damaged", error.hint, code=error.code)
    hub.print_message(f"{error.message}: using an earlier pull, {version}")
    with store.lock_model(version.parent):
        record = write_record(repo, store.read_pull_record(version)["commit"], version, artifact, content)
    return record | {"folder": str(version)}


def choose_artifact(model_manifest: Manifest, quantization: str | None) -> Artifact:
    """Return the GGUF of a quantization, or the default one. Raise UserError when the repo has no such GGUF."""
    ggufs = {artifact.quantization: artifact for artifact in model_manifest.artifacts if artifact.kind == "gguf"}
    if quantization is None:
        return model_manifest.default_artifact()
    if quantization.lower() not in ggufs:
        raise UserError(
            f"there is no {quantization} GGUF in the repo",
            f"QUANT=one of: {', '.join(sorted(map(str, ggufs)))}",
            code="pull.no_such_quantization",
        )
    return ggufs[quantization.lower()]


def store_artifact(
    source: ModelSource, version: Path, model_manifest: Manifest, artifact: Artifact, content: bytes
) -> None:
    """Download and verify the artifact unless the store has it already, and write its manifest.

    Args:
        source: Where the artifact is published.
        version: The folder of the version in the store.
        model_manifest: The manifest.
        artifact: The artifact of the manifest to store.
        content: The bytes of the manifest.
    """
    target = version / artifact.file
    if not (target.is_file() and target.stat().st_size == artifact.bytes and files.sha256(target) == artifact.sha256):
        source.refuse_changed(artifact)
        refuse_full_disk(target, artifact)
        header_check.refuse_unloadable_artifact(source, artifact)
        part = target.with_name(f".{target.name}.part")
        try:
            files.remove(target)
            download_artifact(source, part, artifact)
            verify_header(part, model_manifest, artifact)
        except OSError as error:
            raise files.translate_write_error(error, target) from error
        files.fsync_tree(part)
        part.rename(target)
    manifest_path = version / manifest.FILE_NAME
    if not manifest_path.is_file() or manifest_path.read_bytes() != content:
        with files.write_atomically(manifest_path) as part:
            part.write_bytes(content)


def refuse_full_disk(target: Path, artifact: Artifact) -> None:
    """Raise UserError when the rest of the download does not fit on the disk."""
    part = target.with_name(f".{target.name}.part")
    needed_bytes = artifact.bytes - (part.stat().st_size if part.is_file() else 0)
    free_bytes = shutil.disk_usage(files.nearest_existing_path(target)).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{artifact.file} needs {needed_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free at {target.parent}",
            "free disk space, then run the same command again",
            code="disk.full",
        )


def download_artifact(source: ModelSource, path: Path, artifact: Artifact) -> None:
    """Download an artifact to `path`, with a progress bar; resume when a part of it is there."""
    with (
        console.show_progress(artifact.bytes, artifact.file, "B") as tick,
        PartialDownload(path, artifact, tick) as part,
    ):
        part.download(source)


def verify_header(part: Path, model_manifest: Manifest, artifact: Artifact) -> None:
    """Verify that the header of a download is possible and agrees with the manifest: a right hash does not prove that.

    Raise UserError and removes the download when it does not.
    """
    try:
        header = gguf_reader.read_header(part, artifact.file)
        model_header.refuse_impossible_header(header, artifact.file)
        if artifact.tensor_types and gguf_reader.count_tensor_types(header) != artifact.tensor_types:
            raise UserError(
                f"the tensors of {artifact.file} differ from those in its manifest",
                "do not use this repo",
                code="gguf.wrong_tensors",
            )
        if header.metadata.get("tokenizer.chat_template") != model_manifest.chat.template:
            raise UserError(
                f"the chat template of {artifact.file} differs from the one in its manifest",
                "do not use this repo",
                code="gguf.wrong_template",
            )
        verify_prompts(header, model_manifest)
    except Exception:
        files.remove(part)
        raise


def verify_prompts(header: gguf_reader.Header, model_manifest: Manifest) -> None:
    """Verify that the chat template renders the golden prompts. It is untrusted code, so it runs in a sandbox.

    Raise UserError when a prompt differs, or the template takes too long.
    """
    conversations = [(golden.messages, golden.add_generation_prompt) for golden in model_manifest.golden]
    texts = template_sandbox.render_prompts(
        model_manifest.chat.template, conversations, special_token(header, "bos"), special_token(header, "eos")
    )
    for golden, text in zip(model_manifest.golden, texts, strict=True):
        if text != golden.prompt:
            raise UserError(
                "the chat template does not render the manifest's prompt for "
                f"{printable_line(golden.messages[-1]['content'])!r}",
                "publish it again: `make publish`",
                code="template.wrong_prompt",
            )


def special_token(header: gguf_reader.Header, role: str) -> str:
    """Return the text of the 'bos' or 'eos' token; '' when the header names none."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    token_id = header.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if isinstance(tokens, list) and isinstance(token_id, int) and 0 <= token_id < len(tokens):
        return str(tokens[token_id])
    return ""


def remove_stray_manifest(version: Path) -> None:
    """Remove the manifest of a version whose pull failed. An unfinished download stays, so that it can be resumed."""
    if not (version / store.PULL_RECORD).is_file():
        files.remove(version / manifest.FILE_NAME)


def write_record(repo: str, commit: str | None, version: Path, artifact: Artifact, content: bytes) -> dict[str, Any]:
    """Write pull.json and the requested name of the version, make it the current one, and return the record."""
    is_folder = hub.is_folder(repo)
    name, revision = (repo, None) if is_folder else hub.parse_repo_id(repo)
    record = {
        "stage": "pull",
        "repo": name,
        "commit": commit,
        "file": artifact.file,
        "quantization": artifact.quantization,
        "sha256": artifact.sha256,
        "bytes": artifact.bytes,
        "manifest_sha256": files.sha256_bytes(content),
    }
    store.record_pull(version, record, revision or store.DEFAULT_REVISION)
    return record
