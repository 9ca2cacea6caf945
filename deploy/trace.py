"""trace: find the run that made a file or an installed model, with its config, data, code and scores.

The file's sha256 is looked up in the manifests of the store. A file that was copied, renamed or rewritten is identified
by the ferry.* keys of its own header.
"""

import json
from pathlib import Path

from common import files, gguf_reader
from common.errors import UserError, shown
from contract import manifest
from contract.manifest import Manifest
from deploy import store
from deploy.apps import lmstudio
from deploy.apps import ollama_server as ollama

KEYS = "ferry."


def stage(what: str, models: Path, as_json: bool = False) -> str:
    """Return what is known about the origin of a model, as text or as JSON.

    Args:
        target: A GGUF, a folder of the store, a path in LM Studio's models folder, or the name of a model in Ollama.
        models: The store.
        as_json: Whether to return JSON.

    Raises:
        UserError: There is no such file or model, or Ferry did not make it.
    """
    path = file_of(what, models)
    if path:
        digest, header = files.sha256(path), _header(path)
        return page(str(path), digest, *known(models, digest, header.get("ferry.manifest_id")), header, as_json)
    version, header = in_ollama(what, models)
    made = (
        manifest.read(version / manifest.NAME) if version else known(models, None, header.get("ferry.manifest_id"))[0]
    )
    return page(f"{what} in Ollama", None, made, version, header, as_json)


def file_of(what: str, models: Path) -> Path | None:
    """Return the GGUF that `target` means; None when it may be the name of a model in Ollama.

    Raises UserError when it can only be a file and there is none.
    """
    place = Path(what).expanduser()
    for path in (place, lmstudio.models() / what):
        if path.is_file():
            return path
        if (path / store.RECORD).is_file():
            return path / store.record(path)["file"]
    if what.endswith(".gguf") or what.startswith((".", "/", "~")):
        raise UserError(
            f"{shown(what)}: no such file", "name a GGUF, a path in LM Studio's models folder, or a model in Ollama"
        )
    return None


def _header(path: Path) -> dict:
    """Return Ferry's keys in the header of a GGUF."""
    return {key: value for key, value in gguf_reader.read(path).metadata.items() if key.startswith(KEYS)}


def known(models: Path, digest: str | None, identity: object) -> tuple[Manifest | None, Path | None]:
    """Return the manifest that names the file, and its version; else a manifest of the same run, and its version.

    Args:
        models: The store.
        digest: The sha256 of the file; None when it is not known.
        manifest_id: What the header of the file says; None when it says nothing.
    """
    found = []
    for path in models.glob(f"*/*/{manifest.NAME}"):
        made = _read(path)
        if made and digest in {artifact.sha256 for artifact in made.artifacts}:
            return made, path.parent
        found += [(made, path.parent)] if made and identity and made.id == identity else []
    return found[0] if found else (None, None)


def _read(path: Path) -> Manifest | None:
    try:
        return manifest.read(path)
    except UserError:  # written by a newer Ferry, or damaged: it does not help here
        return None


def in_ollama(name: str, models: Path) -> tuple[Path | None, dict]:
    """Return the version that Ferry put into Ollama under a name or None, and Ferry's keys in the model of that name.

    The keys are read only when no version is known. Raises UserError when Ollama has no such model, or cannot be asked
    and no record names it.
    """
    wanted = name if ":" in name else f"{name}:latest"
    records = {v: r for folder in models.glob("*/") for v, r in store.records(folder, "ollama.json").items()}
    ours = [
        v for v, r in records.items() if wanted in (r["model"], r["latest"] if store.in_use(v.parent) == v else None)
    ]
    try:
        server = ollama.Server(ollama.host())
        held = server.models()
    except UserError:
        if ours:
            return ours[0], {}
        raise
    if wanted not in held:
        raise UserError(f"Ollama has no model {shown(wanted)}", "`ollama list` names those it has; or name a file")
    same = [v for v, r in records.items() if r.get("digest") == held[wanted]["digest"]]
    if same:
        return same[0], {}
    info = server.ask("POST", "/api/show", {"model": wanted}).get("model_info") or {}
    return None, {key: value for key, value in info.items() if key.startswith(KEYS)}


def page(
    what: str, digest: str | None, made: Manifest | None, version: Path | None, header: dict, as_json: bool = False
) -> str:
    """Return the page about `target`, as text or as JSON. Raises UserError when nothing is known about it."""
    if made is None and not header:
        raise UserError(
            f"{shown(what)} was not made by Ferry: no manifest here names it, and its header holds no {KEYS}* keys",
            "`make models` lists what was pulled",
        )
    lines = from_manifest(made) if made else from_header(header)
    exact = made and digest in {artifact.sha256 for artifact in made.artifacts}
    how = (
        f"its manifest, {version}"
        if exact
        else f"the manifest of its run, {version}; the file itself is another copy"
        if made
        else "its own header; `make pull` of its repo brings the manifest"
    )
    head = [("file", what), *([("sha256", digest)] if digest else []), ("known by", how)]
    if as_json:
        return json.dumps(_by_name([*head, *lines]), indent=2)
    return "\n".join(f"{name:<9}{shown(value, 2000)}" for name, value in [*head, *lines] if value)


def _by_name(lines: list[tuple[str, str]]) -> dict[str, str]:
    """Return the values of a page by their names; a line without a name is appended to the value before it."""
    found: dict[str, str] = {}
    for name, value in lines:
        if not name:
            last = list(found)[-1]
            found[last] = f"{found[last]}; {value}"
        elif value:
            found[name] = value
    return found


def from_manifest(made: Manifest) -> list[tuple[str, str]]:
    """Return (name, value) for each line that the manifest gives."""
    said, git = made.provenance, made.provenance.get("git") or {}
    changed = ", with changes that are not committed" if git.get("dirty") else ""
    data, train = made.dataset, made.training
    sources = ", ".join(f"{name} {digest[:12]}" for name, digest in data.sha256.items())
    scores = {name: (score["loss"], score.get("score")) for name, score in made.scores.get("heldout", {}).items()}
    return [
        (
            "run",
            (
                f"{made.name}, {train.get('method')} on {train.get('device')}, "
                f"{train.get('steps')} steps, final loss {train.get('final_loss')}"
            ),
        ),
        ("base", f"{made.base.model} at {made.base.revision}, {made.base.license}"),
        ("config", f"sha256 {said.get('config_sha256')}, all of it in the manifest"),
        ("data", f"{data.source} at {data.revision}" if data.revision else f"{data.source}: {sources}"),
        (
            "",
            (
                f"{data.rows.get('train')} rows trained on, "
                f"{data.rows.get('heldout')} held out (sha256 {data.split_hash[:12]})"
            ),
        ),
        ("code", f"{git.get('url')} {git.get('commit')}{changed}"),
        ("made by", f"{said.get('llama_cpp')}, python {said.get('python')}"),
        ("scores", f"{made.scores.get('rule')}, held-out loss and score: {_scores(scores)}"),
    ]


def from_header(header: dict) -> list[tuple[str, str]]:
    """Return (name, value) for each line that the file's own header gives."""
    scores = _parsed(header.get("ferry.scores"))
    losses = {n: (s.get("loss"), s.get("score")) for n, s in scores.items() if isinstance(s, dict)}
    revision, rows = header.get("ferry.base.revision"), str(header.get("ferry.data.heldout_sha256", ""))
    return [
        ("run", f"{header.get('ferry.run')}, manifest id {header.get('ferry.manifest_id')}"),
        ("base", f"{header.get('ferry.base')}{f' at {revision}' if revision else ''}"),
        ("config", f"sha256 {header['ferry.config_sha256']}" if "ferry.config_sha256" in header else ""),
        ("data", f"{header.get('ferry.data')}, held-out rows sha256 {rows[:12]}"),
        ("code", str(header.get("ferry.code", ""))),
        ("scores", f"{scores.get('rule')}, held-out loss and score: {_scores(losses)}"),
    ]


def _parsed(text: object) -> dict:
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _scores(found: dict[str, tuple]) -> str:
    shown_as = [f"{name} {loss}{'' if score is None else f' {score:.1%}'}" for name, (loss, score) in found.items()]
    return "; ".join(shown_as) or "none"
