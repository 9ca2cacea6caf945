"""summary: the files that were made, the scores before and after training, answers, and how to talk to the model."""

from pathlib import Path
from typing import Any

from common import console
from common.errors import UserError
from contract.manifest import Manifest, Score
from deploy import store

TITLES = {"base": "base model, before", "adapter": "LoRA adapter, torch", "merged": "merged weights, torch"}


def render_summary(folder: Path, repo: str) -> str:
    """Return the last page that `make demo` and `make deploy-mac` print."""
    manifest, path = store.load_tested(folder)
    smoke = store.read_record(folder / "smoke.json")
    if not smoke:
        raise UserError(
            f"{folder / 'smoke.json'} is damaged",
            f"run `make smoke {store.format_make_arguments(repo, folder.parent.parent)}`",
            code="store.damaged_record",
        )
    facts, scores = _file_lines(manifest, path, folder), _score_lines(manifest)
    return "\n".join(["", *facts, "", *scores, "", *_answer_lines(smoke), "", *_command_lines(folder, repo)])


def _file_lines(manifest: Manifest, path: Path, folder: Path) -> list[str]:
    artifact = manifest.find_artifact(path.name)
    file_line = f"{path}  {artifact.bytes / 1e6:.1f} MB"
    return [file_line, f"  sha256 {artifact.sha256}", f"{folder / 'Modelfile'}"]


def _score_lines(manifest: Manifest) -> list[str]:
    """Return the quality ladder: loss, KL and score of base model, adapter, merged model and GGUFs."""
    if not (scores := manifest.scores.get("heldout")):
        return ["(nothing was scored)"]
    rows = [
        f"  {_score_title(name):<28}{s['loss']:>14.3f}{_format_kl(s):>14}{_format_score(s):>14}"
        for name, s in scores.items()
    ]
    return [
        console.wrap_text(f"{manifest.scores.get('used', 'held-out rows')}, rule: {manifest.scores.get('rule')}", 2),
        f"  {'':<28}{'held-out loss':>14}{'KL to 16 bit':>14}{'right':>14}",
        *rows,
        *(f"  note: {note}" for note in manifest.scores.get("notes", [])),
    ]


def _score_title(name: str) -> str:
    if name in TITLES:
        return TITLES[name]
    return f"{name.removesuffix('-static')} GGUF{', no imatrix' if name.endswith('-static') else ''}"


def _format_kl(scores: Score) -> str:
    return f"{scores['kl']:.5f}" if "kl" in scores else "-"


def _format_score(scores: Score) -> str:
    if not {"score", "rows"} <= scores.keys():
        return "-"
    return f"{round(scores['score'] * scores['rows'])}/{scores['rows']} {scores['score']:.1%}"


def _answer_lines(smoke: dict[str, Any]) -> list[str]:
    head = (
        f"{smoke['file']} in llama.cpp on this machine, {smoke['tokens_per_second']} tokens/s, "
        f"loaded in {smoke['load_seconds']} s, "
        f"log-probabilities within {smoke['difference']} of those on the training machine:"
    )
    return [console.wrap_text(head, 2), *(f"  > {a['message']}\n  {a['answer']}" for a in smoke["answers"])]


def _command_lines(folder: Path, repo: str) -> list[str]:
    """Return the commands that reach the model; those of the apps that have it come first."""
    ollama, lmstudio = store.read_record(folder / "ollama.json"), store.read_record(folder / "lmstudio.json")
    arguments = store.format_make_arguments(repo, folder.parent.parent)
    return [
        "talk to it:",
        *([f"  ollama run {ollama['latest'].removesuffix(':latest')}"] if ollama.get("digest") else []),
        *(
            [f"  LM Studio: {lmstudio['key'] or Path(lmstudio['target']).name} (My Models)"]
            if lmstudio.get("done")
            else []
        ),
        f"  make chat {arguments}",
        f"  make serve {arguments}      # OpenAI's API on 127.0.0.1:8080",
    ]
