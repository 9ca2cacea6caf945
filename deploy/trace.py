"""trace: find the run that made a file or an installed model, with its config, data, code and scores.

The file's sha256 is looked up in the manifests of the store. A file that was copied, renamed or rewritten is identified
by the ferry.* keys of its own header.
"""

import json
from pathlib import Path
from typing import Any

from common import files, gguf_reader
from common.errors import UserError, printable_line
from contract import manifest
from contract.manifest import Manifest
from deploy import store
from deploy.apps import lmstudio, ollama_server

PREFIX = "ferry."


def run_trace(target: str, models: Path, as_json: bool = False) -> str:
    """Return what is known about the origin of a model, as text or as JSON.

    Args:
        target: A GGUF, a folder of the store, a path in LM Studio's models folder, or the name of a model in Ollama.
        models: The store.
        as_json: Whether to return JSON.

    Raises:
        UserError: There is no such file or model, or Ferry did not make it.
    """
    path = find_file(target, models)
    if path:
        digest, header = files.sha256(path), _read_ferry_keys(path)
        return render_trace(
            str(path), digest, *find_manifest(models, digest, header.get("ferry.manifest_id")), header, as_json
        )
    version, header = find_in_ollama(target, models)
    model_manifest = (
        manifest.read_manifest(version / manifest.FILE_NAME)
        if version
        else find_manifest(models, None, header.get("ferry.manifest_id"))[0]
    )
    return render_trace(f"{target} in Ollama", None, model_manifest, version, header, as_json)


def find_file(target: str, models: Path) -> Path | None:
    """Return the GGUF that `target` means; None when it may be the name of a model in Ollama.

    Raise UserError when it can only be a file and there is none.
    """
    target_path = Path(target).expanduser()
    for path in (target_path, lmstudio.models_folder() / target):
        if path.is_file():
            return path
        if (path / store.PULL_RECORD).is_file():
            return path / store.read_pull_record(path)["file"]
    if target.endswith(".gguf") or target.startswith((".", "/", "~")):
        raise UserError(
            f"{printable_line(target)}: no such file",
            "name a GGUF, a path in LM Studio's models folder, or a model in Ollama",
            code="trace.no_such_file",
        )
    return None


def _read_ferry_keys(path: Path) -> dict[str, Any]:
    """Return Ferry's keys in the header of a GGUF."""
    return {key: value for key, value in gguf_reader.read_header(path).metadata.items() if key.startswith(PREFIX)}


def find_manifest(models: Path, digest: str | None, manifest_id: object) -> tuple[Manifest | None, Path | None]:
    """Return the manifest that names the file, and its version; else a manifest of the same run, and its version.

    Args:
        models: The store.
        digest: The sha256 of the file; None when it is not known.
        manifest_id: What the header of the file says; None when it says nothing.
    """
    same_run = []
    for path in models.glob(f"*/*/{manifest.FILE_NAME}"):
        model_manifest = _read_manifest(path)
        if model_manifest and digest in {artifact.sha256 for artifact in model_manifest.artifacts}:
            return model_manifest, path.parent
        same_run += (
            [(model_manifest, path.parent)]
            if model_manifest and manifest_id and model_manifest.id == manifest_id
            else []
        )
    return same_run[0] if same_run else (None, None)


def _read_manifest(path: Path) -> Manifest | None:
    try:
        return manifest.read_manifest(path)
    except UserError:  # written by a newer Ferry, or damaged: it does not help here
        return None


def find_in_ollama(name: str, models: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the version that Ferry put into Ollama under a name or None, and Ferry's keys in the model of that name.

    The keys are read only when no version is known. Raise UserError when Ollama has no such model, or cannot be asked
    and no record names it.
    """
    full_name = name if ":" in name else f"{name}:latest"
    records = {v: r for folder in models.glob("*/") for v, r in store.read_records(folder, "ollama.json").items()}
    recorded_versions = [
        v
        for v, r in records.items()
        if full_name in (r["model"], r["latest"] if store.current_version(v.parent) == v else None)
    ]
    try:
        server = ollama_server.Server(ollama_server.server_url())
        server_models = server.list_models()
    except UserError:
        if recorded_versions:
            return recorded_versions[0], {}
        raise
    if full_name not in server_models:
        raise UserError(
            f"Ollama has no model {printable_line(full_name)}",
            "`ollama list` shows its models; or name a file",
            code="trace.not_in_ollama",
        )
    same_digest = [v for v, r in records.items() if r.get("digest") == server_models[full_name]["digest"]]
    if same_digest:
        return same_digest[0], {}
    model_info = server.request("POST", "/api/show", {"model": full_name}).get("model_info") or {}
    return None, {key: value for key, value in model_info.items() if key.startswith(PREFIX)}


def render_trace(
    target: str,
    digest: str | None,
    model_manifest: Manifest | None,
    version: Path | None,
    header: dict[str, Any],
    as_json: bool = False,
) -> str:
    """Return the page about `target`, as text or as JSON. Raise UserError when nothing is known about it."""
    if model_manifest is None and not header:
        raise UserError(
            f"{printable_line(target)} was not created by Ferry: no manifest in the store names it, and its header "
            f"has no {PREFIX}* keys",
            "`make models` lists the models in the store",
            code="trace.not_created_by_ferry",
        )
    lines = list_manifest_facts(model_manifest) if model_manifest else list_header_facts(header)
    is_exact = model_manifest and digest in {artifact.sha256 for artifact in model_manifest.artifacts}
    evidence = (
        f"its manifest, {version}"
        if is_exact
        else f"the manifest of its run, {version}; the file itself is a different copy"
        if model_manifest
        else "its own header; `make pull` of its repo fetches the manifest"
    )
    head = [("file", target), *([("sha256", digest)] if digest else []), ("known by", evidence)]
    if as_json:
        return json.dumps(_group_lines([*head, *lines]), indent=2)
    return "\n".join(f"{name:<9}{printable_line(value, 2000)}" for name, value in [*head, *lines] if value)


def _group_lines(lines: list[tuple[str, str]]) -> dict[str, str]:
    """Return the values of a page by their names; a line without a name is appended to the value before it."""
    values_by_name: dict[str, str] = {}
    for name, value in lines:
        if not name:
            last = list(values_by_name)[-1]
            values_by_name[last] = f"{values_by_name[last]}; {value}"
        elif value:
            values_by_name[name] = value
    return values_by_name


def list_manifest_facts(model_manifest: Manifest) -> list[tuple[str, str]]:
    """Return (name, value) for each line that the manifest gives."""
    provenance, git = model_manifest.provenance, model_manifest.provenance.get("git") or {}
    uncommitted = ", with changes that are not committed" if git.get("dirty") else ""
    data, training = model_manifest.dataset, model_manifest.training
    sources = ", ".join(f"{name} {digest[:12]}" for name, digest in data.sha256.items())
    scores = {
        name: (score["loss"], score.get("score")) for name, score in model_manifest.scores.get("heldout", {}).items()
    }
    return [
        (
            "run",
            (
                f"{model_manifest.name}, {training.get('method')} on {training.get('device')}, "
                f"{training.get('steps')} steps, final loss {training.get('final_loss')}"
            ),
        ),
        ("base", f"{model_manifest.base.model} at {model_manifest.base.revision}, {model_manifest.base.license}"),
        ("config", f"sha256 {provenance.get('config_sha256')}; the manifest has all of it"),
        ("data", f"{data.source} at {data.revision}" if data.revision else f"{data.source}: {sources}"),
        (
            "",
            (
                f"{data.rows.get('train')} rows trained on, "
                f"{data.rows.get('heldout')} held out (sha256 {data.split_hash[:12]})"
            ),
        ),
        ("code", f"{git.get('url')} {git.get('commit')}{uncommitted}"),
        ("made by", f"{provenance.get('llama_cpp')}, python {provenance.get('python')}"),
        ("scores", f"{model_manifest.scores.get('rule')}, held-out loss and score: {_format_scores(scores)}"),
    ]


def list_header_facts(header: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) for each line that the file's own header gives."""
    scores = _parse_json_object(header.get("ferry.scores"))
    losses = {n: (s.get("loss"), s.get("score")) for n, s in scores.items() if isinstance(s, dict)}
    revision, heldout_hash = header.get("ferry.base.revision"), str(header.get("ferry.data.heldout_sha256", ""))
    return [
        ("run", f"{header.get('ferry.run')}, manifest id {header.get('ferry.manifest_id')}"),
        ("base", f"{header.get('ferry.base')}{f' at {revision}' if revision else ''}"),
        ("config", f"sha256 {header['ferry.config_sha256']}" if "ferry.config_sha256" in header else ""),
        ("data", f"{header.get('ferry.data')}, held-out rows sha256 {heldout_hash[:12]}"),
        ("code", str(header.get("ferry.code", ""))),
        ("scores", f"{scores.get('rule')}, held-out loss and score: {_format_scores(losses)}"),
    ]


def _parse_json_object(text: object) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        value = {}
    return value if isinstance(value, dict) else {}


def _format_scores(scores: dict[str, tuple]) -> str:
    parts = [f"{name} {loss}{'' if score is None else f' {score:.1%}'}" for name, (loss, score) in scores.items()]
    return "; ".join(parts) or "none"
