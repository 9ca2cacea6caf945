"""pull: fetch the manifest, then one artifact, and accept only what was published. The file is hashed as it arrives."""

import shutil
from pathlib import Path

from common import console, files, gguf_reader, hub
from common.errors import UserError, shown
from contract import manifest, model_header, published_model, template_sandbox
from contract.manifest import Artifact, Manifest
from deploy import store
from deploy.stages import header_check
from deploy.stages.partial_download import Part


def stage(repo: str, models: Path, quantization: str | None = None) -> dict:
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
        found = published_model.find(repo)
        content = found.manifest()
    except hub.Unreachable as error:
        return offline(repo, models, quantization, error)
    made = manifest.parse(content, f"{shown(repo)}/{manifest.NAME}")
    artifact = chosen(made, quantization)
    version = models / found.name / files.sha256_bytes(content)[:12]
    with store.locked(version.parent):
        try:
            put(found, version, made, artifact, content)
        except Exception:
            clean(version)
            raise
        return recorded(repo, found.commit, version, artifact, content) | {"folder": str(version)}


def offline(repo: str, models: Path, quantization: str | None, error: UserError) -> dict:
    """Return the record of an earlier pull, for when the Hub cannot be reached. Raises `error` when there is none."""
    version = store.known(models, repo)
    if version is None:
        raise error
    content = (version / manifest.NAME).read_bytes() if (version / manifest.NAME).is_file() else b""
    artifact = chosen(manifest.parse(content, str(version / manifest.NAME)), quantization)
    path = version / artifact.file
    if not path.is_file() or files.sha256(path) != artifact.sha256:
        raise UserError(f"{error.message}; {path} was not pulled before, or is damaged", error.hint)
    hub.say(f"{error.message}: using what was pulled before, {version}")
    with store.locked(version.parent):
        return recorded(repo, store.record(version)["commit"], version, artifact, content) | {"folder": str(version)}


def chosen(made: Manifest, quantization: str | None) -> Artifact:
    """Return the GGUF of a quantization, or the default one. Raises UserError when the repo has no such GGUF."""
    ggufs = {artifact.quantization: artifact for artifact in made.artifacts if artifact.kind == "gguf"}
    if quantization is None:
        return made.default()
    if quantization.lower() not in ggufs:
        raise UserError(
            f"there is no {quantization} GGUF in the repo", f"QUANT=one of: {', '.join(sorted(map(str, ggufs)))}"
        )
    return ggufs[quantization.lower()]


def put(found, version: Path, made: Manifest, artifact: Artifact, content: bytes) -> None:
    """Download and verify the artifact unless the store has it already, and write its manifest.

    Args:
        source: One of contract/published_model.py.
        version: The folder of the version in the store.
        model_manifest: The manifest.
        artifact: The artifact of the manifest to store.
        content: The bytes of the manifest.
    """
    target = version / artifact.file
    if not (target.is_file() and target.stat().st_size == artifact.bytes and files.sha256(target) == artifact.sha256):
        found.refuse(artifact)
        refuse_full_disk(target, artifact)
        header_check.probe(found, artifact)
        part = target.with_name(f".{target.name}.part")
        try:
            files.remove(target)
            fetch(found, part, artifact)
            refuse_liar(part, made, artifact)
        except OSError as error:
            raise files.translated(error, target) from error
        files.sync(part)
        part.rename(target)
    beside = version / manifest.NAME
    if not beside.is_file() or beside.read_bytes() != content:
        with files.writing(beside) as part:
            part.write_bytes(content)


def refuse_full_disk(target: Path, artifact: Artifact) -> None:
    """Raise UserError when the rest of the download does not fit on the disk."""
    part = target.with_name(f".{target.name}.part")
    need = artifact.bytes - (part.stat().st_size if part.is_file() else 0)
    free = shutil.disk_usage(files.nearest(target)).free
    if free < need:
        raise UserError(
            f"{artifact.file} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free at {target.parent}",
            "free some disk, then run the same command again",
        )


def fetch(found, path: Path, artifact: Artifact) -> None:
    """Download an artifact to `path`, with a progress bar; resume when a part of it is there."""
    with (
        console.progress(artifact.bytes, artifact.file, "B") as tick,
        Part(path, artifact, tick) as part,
    ):
        part.fill(found)


def refuse_liar(part: Path, made: Manifest, artifact: Artifact) -> None:
    """Verify that the header of a download is possible and agrees with the manifest: a right hash does not prove that.

    Raises UserError and removes the download when it does not.
    """
    try:
        header = gguf_reader.read(part, artifact.file)
        model_header.refuse_impossible(header, artifact.file)
        if artifact.tensor_types and gguf_reader.tensor_types(header) != artifact.tensor_types:
            raise UserError(f"{artifact.file} holds other tensors than its manifest says", "do not use this repo")
        if header.metadata.get("tokenizer.chat_template") != made.chat.template:
            raise UserError(f"{artifact.file} holds another chat template than its manifest", "do not use this repo")
        same_prompts(header, made)
    except Exception:
        files.remove(part)
        raise


def same_prompts(header: gguf_reader.Header, made: Manifest) -> None:
    """Verify that the chat template renders the golden prompts. It is untrusted code, so it runs in a sandbox.

    Raises UserError when a prompt differs, or the template takes too long.
    """
    asked = [(golden.messages, golden.add_generation_prompt) for golden in made.golden]
    texts = template_sandbox.prompts(made.chat.template, asked, special(header, "bos"), special(header, "eos"))
    for golden, text in zip(made.golden, texts, strict=True):
        if text != golden.prompt:
            raise UserError(
                f"the template does not give the manifest's prompt for {shown(golden.messages[-1]['content'])!r}",
                "publish it again: `make publish`",
            )


def special(header: gguf_reader.Header, role: str) -> str:
    """Return the text of the 'bos' or 'eos' token; '' when the header names none."""
    tokens, number = (
        header.metadata.get("tokenizer.ggml.tokens"),
        header.metadata.get(f"tokenizer.ggml.{role}_token_id"),
    )
    known = isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens)
    return str(tokens[number]) if known else ""


def clean(version: Path) -> None:
    """Remove the manifest of a version whose pull failed. An unfinished download stays, so that it can be resumed."""
    if not (version / store.RECORD).is_file():
        files.remove(version / manifest.NAME)


def recorded(repo: str, commit: str | None, version: Path, artifact: Artifact, content: bytes) -> dict:
    """Write pull.json and the requested name of the version, make it the current one, and return the record."""
    is_folder = hub.is_folder(repo)
    name, revision = (repo, None) if is_folder else hub.split(repo)
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
    store.remember(version, record, revision or store.MAIN)
    return record
