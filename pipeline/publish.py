"""publish: the artifacts into the hub, GGUF first, manifest.json last."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from contract import files, manifest
from contract.errors import UserError
from pipeline import llamacpp
from pipeline.config import Config
from pipeline.record import STAGES, Run

STACK = (
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


def stage(config: Config, run: Run) -> dict:
    """Fill the folder hub and write the record."""
    hub = hub_folder(config.publish.repo.replace("{run}", run.folder.name))
    files.remove(hub / manifest.NAME)  # an old manifest must not describe new files
    artifacts = [put_gguf(run, stage, name, hub) for stage, name in published(run)]
    artifacts.append(put_adapter(run, hub, config.base.model))
    made = build(config, run, artifacts)
    put_card(hub, made, run.output("verify", "ladder").read_text(encoding="utf-8").rstrip())
    files.write_json(hub / manifest.NAME, made.model_dump(mode="json"))
    return run.write(
        "publish",
        ("verify", "export", "evaluate", "finetune", "data"),
        {},
        repo=str(hub),
        default=made.default().model_dump(mode="json"),
    )


def hub_folder(repo: str) -> Path:
    """Raises UserError when the folder holds something that is not a hub repo."""
    hub = Path(repo.removeprefix("file://")).expanduser()
    if (
        hub.is_dir()
        and any(hub.iterdir())
        and not any((hub / name).exists() for name in (manifest.NAME, "README.md"))
        and not list(hub.glob("*.gguf"))
    ):
        raise UserError(f"publish.repo {hub} is a folder with other things in it", "name an empty or new folder")
    return hub


def published(run: Run) -> list[tuple[str, str]]:
    """(stage, output) of every GGUF that goes out: the quantizations, and 16 bit only where nothing smaller will do."""
    export, verify = run.read("export"), run.read("verify")
    kept = {export["sixteen"], "imatrix"} - {verify["default"]}
    ours = [("export", name) for name in export["outputs"] if name not in kept and not name.endswith(llamacpp.STATIC)]
    return ours + [("verify", name) for name in verify["outputs"] if name in llamacpp.BITS]


def put_gguf(run: Run, stage: str, name: str, hub: Path) -> manifest.Artifact:
    """name: its quantization."""
    source, export = run.output(stage, name), run.read("export")
    digest = put(source, hub / source.name)
    if digest != run.read(stage)["outputs"][name]["sha256"]:
        raise UserError(
            f"{source} is not the file that {stage} made", f"delete {run.path(stage)} and run the same command again"
        )
    return manifest.Artifact(
        kind="gguf", file=source.name, quantization=name, sha256=digest, bytes=source.stat().st_size,
        tensor_types=tensor_types(source), default=name == run.read("verify")["default"],
        imatrix=export["imatrix"] if name != export["sixteen"] else None,
    )  # fmt: skip


def put_adapter(run: Run, hub: Path, model: str) -> manifest.Artifact:
    """The LoRA weights; their config names the base by its public name, not by a path of this machine."""
    weights = run.output("finetune", "adapter")
    settings = files.read_json(run.output("finetune", "adapter_config"))
    files.write_json(hub / "adapter" / "adapter_config.json", settings | {"base_model_name_or_path": model})
    digest = put(weights, hub / "adapter" / weights.name)
    return manifest.Artifact(
        kind="adapter", file=f"adapter/{weights.name}", quantization=None, sha256=digest, bytes=weights.stat().st_size
    )


def put(source: Path, target: Path) -> str:
    """Copy a file into the hub unless the same bytes are there; returns its sha256."""
    wanted = files.sha256(source)
    if not target.is_file() or files.sha256(target) != wanted:
        with files.writing(target) as part:
            files.copy(source, part)
    return wanted


def build(config: Config, run: Run, artifacts: list[manifest.Artifact]) -> manifest.Manifest:
    """The manifest of this run, from its records."""
    data, tune = run.read("data"), run.read("finetune")
    contract = files.read_json(run.output("verify", "contract"))
    scores = run.read("evaluate")["scores"] | run.read("verify")["scores"]
    return manifest.Manifest(
        id=run.read("export")["id"],
        name=run.folder.name,
        base=manifest.BaseModelInfo(**{key: data["base"][key] for key in manifest.BaseModelInfo.model_fields}),
        dataset=manifest.Dataset(
            source=config.data.source, revision=data["dataset"]["training"].get("revision") or config.data.revision, sha256=data["inputs"], rows=data["rows"],
            split=config.data.validation or f"{config.data.validation_share:g} of the rows, by content hash",
            split_hash=data["outputs"]["heldout"]["sha256"],
        ),
        generation=manifest.Generation(
            temperature=config.generation.temperature, top_p=config.generation.top_p, max_tokens=config.generation.max_tokens,
            num_ctx=config.generation.num_ctx or config.base.max_seq_length,
        ),
        artifacts=tuple(artifacts),
        config=config.model_dump(mode="json"),
        training={"method": "QLoRA" if config.base.load_in_4bit else "LoRA"}
        | {key: tune[key] for key in ("steps", "epochs", "tokens", "seconds", "peak_memory_gb", "device", "seed", "final_loss", "trainable")},
        scores={"rule": config.evaluate.rule, "heldout": scores, "used": run.read("verify")["used"]} | thresholds(run, config),
        provenance=provenance(run),
        **contract,
    )  # fmt: skip


def thresholds(run: Run, config: Config) -> dict:
    """What was asked of the scores, and what came of it."""
    verify = run.read("verify")
    return {
        "thresholds": config.verify.model_dump(mode="json"),
        "conversion": verify["conversion"],
        "training": run.read("evaluate")["training"],
        "notes": verify["notes"],
    }


def tensor_types(gguf: Path) -> dict[str, int]:
    """How many tensors of each type a GGUF holds."""
    from collections import Counter

    from gguf import GGUFReader

    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(gguf).tensors))


def provenance(run: Run) -> dict:
    """What made this, to make it again."""
    return {
        "config_sha256": files.sha256(run.config_file),
        "records": {name: files.sha256(run.path(name)) for name in STAGES if run.done(name)},
        "git": {
            "url": _git("remote", "get-url", "origin"),
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain")),
        },
        "lock_sha256": {lock.name: files.sha256(lock) for lock in sorted(Path("setup/locks").glob("*.txt"))},
        "llama_cpp": llamacpp.version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in STACK},
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def put_card(hub: Path, made: manifest.Manifest, ladder: str) -> None:
    """A short model card: only what the run knows. ladder: the scores as a Markdown table."""
    default = made.default()
    lines = [
        *(
            "---",
            f"base_model: {made.base.model}",
            *([f"license: {made.base.license}"] if made.base.license else []),
            "library_name: gguf",
            "---",
            "",
        ),
        f"# {made.name}",
        "",
        f"{made.training['method']} fine-tune of {made.base.name} on {made.dataset.source} ({made.dataset.rows['train']} rows).",
        "",
        ladder,
        "",
        f"Scoring rule: {made.scores['rule']}. Default file: `{default.file}`, sha256 `{default.sha256}`.",
    ]
    with files.writing(hub / "README.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
