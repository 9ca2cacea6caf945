"""publish: put the artifacts of a run into a folder hub or on the Hub. The GGUFs go first, manifest.json last."""

import os
import platform
import socket
from importlib.metadata import version
from pathlib import Path

from common import console, files, gguf_reader, hub
from common.errors import UserError, shown
from contract import manifest
from pipeline.base_model import licences
from pipeline.config.schema import Config
from pipeline.publish import model_card, upload
from pipeline.run.run_folder import STAGES, Run
from pipeline.toolchain import git, llama_tools, machine

CARD = "README.md"
HUB_MARKER = ".ferry-hub.json"  # holds {"model": name}
LOCKS = Path(__file__).resolve().parents[2] / "setup" / "locks"

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
    """Write the repo into a folder, upload it when `publish.repo` is on the Hub, and write the record of the stage.

    Raises:
        UserError: The upload failed. Everything stays in the folder.
    """
    repo = config.publish.repo.replace("{run}", run.model)
    if hub.is_folder(repo):
        folder, sent = hub_folder(repo, run.model), {"repo": repo}
        claim_hub_folder(folder, run.model)
        keep_edited_card(folder)
        made = finish(config, run, folder, lay_out(config, run, folder), None)
    else:
        made, sent = to_hub(config, run, repo)
    return run.write(
        "publish",
        ("verify", "export", "evaluate", "finetune", "data"),
        {},
        **sent,
        default=made.default().model_dump(mode="json"),
    )


def to_hub(config: Config, run: Run, repo: str) -> tuple[manifest.Manifest, dict]:
    """Upload the run to the Hub; return its manifest and the {repo, commit, tag} that the Hub now holds."""
    folder = run.workspace("publish", "verify") / run.model
    made = lay_out(config, run, folder)
    # The folder is complete before the Hub is asked, so a failure loses nothing.
    finish(config, run, folder, made, None)
    try:
        repo, _ = hub.split(hub.named(repo, run.model))
        may_go(config, run, repo)
        whole = finish(config, run, folder, made, repo)
        wish = {"private": config.publish.private, "tag": config.publish.tag}
        return whole, upload.send({"folder": str(folder), "repo": repo} | wish)
    except UserError as error:
        raise UserError(
            f"{error.message}\n  nothing is lost: all of it is in {folder}. Before this machine is given back:\n"
            f"  scp -r {socket.gethostname()}:{folder.absolute()} .   "
            f"and then, on your Mac: make deploy-mac REPO=./{folder.name}",
            error.hint,
        ) from error


def may_go(config: Config, run: Run, repo: str) -> None:
    """Raise UserError when the base model's licence forbids publishing to `repo`; print what the licence asks for."""
    base, outputs = run.read("data")["base"], run.read("data")["outputs"]
    copies = sum(name.lower().startswith(("licence/lic", "licence/copying")) for name in outputs)
    for note in licences.refuse(
        base["license"], base["model"], config.publish.private, bool(config.base.license), name=repo, copies=copies
    ):
        hub.say(f"note: {note}")


def lay_out(config: Config, run: Run, folder: Path) -> manifest.Manifest:
    """Write everything but the model card and manifest.json into the folder; return the manifest without the card."""
    files.remove(folder / manifest.NAME)  # an old manifest must not describe new files
    artifacts = [put_gguf(run, stage, name, folder) for stage, name in published(run)]
    artifacts.append(put_adapter(run, folder))
    beside = put_companions(config, run, folder)
    if config.publish.merged:
        weights, more = put_merged(run, folder)
        artifacts, beside = artifacts + weights, beside + more
    return build(config, run, artifacts, [described(folder, name) for name in beside])


def finish(config: Config, run: Run, folder: Path, made: manifest.Manifest, repo: str | None) -> manifest.Manifest:
    """Write the model card, then manifest.json; return the complete manifest.

    Args:
        repo: The repo's id on the Hub, for the commands in the model card; None for a folder hub.
    """
    ladder = run.output("verify", "ladder").read_text(encoding="utf-8").rstrip()
    with files.writing(folder / CARD) as part:
        part.write_text(model_card.text(made, ladder, repo, config.publish.private), encoding="utf-8")
    whole = made.model_copy(update={"files": (*made.files, described(folder, CARD))})
    manifest.write(folder / manifest.NAME, whole)
    return whole


def described(folder: Path, name: str) -> manifest.File:
    """Return the manifest's entry for a file: its name, sha256 and size."""
    return manifest.File(file=name, sha256=files.sha256(folder / name), bytes=(folder / name).stat().st_size)


def hub_folder(repo: str, model: str) -> Path:
    """Return the folder hub of a model.

    Its manifest proves that Ferry made the folder, or the marker that `claim_hub_folder` writes before anything else.

    Raises:
        UserError: Ferry did not make the folder, or made it for another model, or it holds a symbolic link.
    """
    folder = hub.folder(repo)
    if not folder.exists():
        return folder
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    owner = hub_owner(folder)
    if owner is None and (names or not folder.is_dir()):
        raise UserError(
            f"publish.repo {folder} holds files that Ferry did not put there: {', '.join(map(shown, names[:3]))}",
            "name an empty or new folder in publish.repo",
        )
    if owner not in (None, model):
        raise UserError(
            f"publish.repo {folder} holds the model {shown(owner)}, this one is {model}",
            "name another folder in publish.repo, such as ./hub/{run}",
        )
    if links := [name for name in names if (folder / name).is_symlink()]:
        raise UserError(f"publish.repo {folder}: {links[0]} is a symbolic link", "a hub holds plain files: remove it")
    return folder


def hub_owner(folder: Path) -> str | None:
    """Return the name of the model that a folder hub belongs to; None when Ferry did not make the folder."""
    try:
        return manifest.read(folder / manifest.NAME).name
    except UserError:
        pass
    try:
        return str(files.read_json(folder / HUB_MARKER).get("model"))
    except UserError:
        return None


def claim_hub_folder(folder: Path, model: str) -> None:
    """Write the marker of a Ferry hub: while files are replaced, the folder has no manifest that could prove it."""
    if not (folder / HUB_MARKER).is_file():
        files.write_json(folder / HUB_MARKER, {"model": model})


def keep_edited_card(folder: Path) -> None:
    """Rename a model card that the user edited after it was published, because the new model card takes its name."""
    try:
        written = {item.file: item.sha256 for item in manifest.read(folder / manifest.NAME).files}
    except UserError:
        return
    path = folder / CARD
    if path.is_file() and files.sha256(path) != written.get(CARD):
        console.note(f"{path} was edited: it is kept as {files.set_aside(path).name}")


def published(run: Run) -> list[tuple[str, str]]:
    """Return (stage, output name) of every GGUF to publish.

    These are the quantizations. The 16-bit GGUF is published only when `verify` chose it as the default.
    """
    export, verify = run.read("export"), run.read("verify")
    kept = {export["sixteen"], "imatrix"} - {verify["default"]}
    ours = [
        ("export", name) for name in export["outputs"] if name not in kept and not name.endswith(llama_tools.STATIC)
    ]
    return ours + [("verify", name) for name in verify["outputs"] if name in llama_tools.BITS]


def put_gguf(run: Run, stage: str, name: str, folder: Path) -> manifest.Artifact:
    """Put one GGUF into the folder and return its manifest entry.

    Args:
        stage: The stage that made the file, `export` or `verify`.
        name: The quantization, which is also the name of the stage's output.

    Raises:
        UserError: The file is not the one that the stage recorded.
    """
    source, export = run.output(stage, name), run.read("export")
    digest = put(source, folder / source.name)
    if digest != run.read(stage)["outputs"][name]["sha256"]:
        raise UserError(
            f"{source} is not the file that {stage} made", f"delete {run.path(stage)} and run the same command again"
        )
    header = gguf_reader.read(source)
    return manifest.Artifact(
        kind="gguf",
        file=source.name,
        quantization=name,
        sha256=digest,
        bytes=source.stat().st_size,
        tensor_types=gguf_reader.tensor_types(header),
        weights_sha256=gguf_reader.weights_sha256(source, header),
        default=name == run.read("verify")["default"],
        imatrix=export["imatrix"] if name != export["sixteen"] else None,
    )


def put_adapter(run: Run, folder: Path) -> manifest.Artifact:
    """Put the LoRA adapter into the folder and return its manifest entry."""
    weights = run.output("finetune", "adapter")
    digest = put(weights, folder / "adapter" / weights.name)
    return manifest.Artifact(
        kind="adapter", file=f"adapter/{weights.name}", quantization=None, sha256=digest, bytes=weights.stat().st_size
    )


def put_merged(run: Run, folder: Path) -> tuple[list[manifest.Artifact], list[str]]:
    """Put the merged 16-bit model into the folder, for Transformers, vLLM and others.

    Returns:
        The manifest entries of its weights, and the names of its other files (config and tokenizer).
    """
    weights, beside = [], []
    for path in sorted(path for path in (run.folder / "export" / "merged").iterdir() if path.is_file()):
        name, digest = f"merged/{path.name}", put(path, folder / "merged" / path.name)
        if path.suffix == ".safetensors":
            weights.append(
                manifest.Artifact(kind="merged", file=name, quantization=None, sha256=digest, bytes=path.stat().st_size)
            )
        else:
            beside.append(name)
    return weights, beside


def put_companions(config: Config, run: Run, folder: Path) -> list[str]:
    """Write the small files that belong to the model into the folder and return their names.

    These are the adapter's config, which names the base model by its public name and not by a path of this machine; the
    trained tokenizer with its chat template; the base model's licence files; and the notice that its licence asks for.
    """
    settings = files.read_json(run.output("finetune", "adapter_config"))
    names = ["adapter/adapter_config.json"]
    files.write_json(folder / names[0], settings | {"base_model_name_or_path": config.base.model})
    data = run.read("data")
    for kind, place in (("tokenizer/", "adapter/"), ("licence/", "")):
        for output in (name for name in data["outputs"] if name.startswith(kind)):
            source = run.output("data", output)
            put(source, folder / f"{place}{source.name}")
            names.append(f"{place}{source.name}")
    return names + put_notice(licences.terms(data["base"]["license"]).notice, names, folder)


def put_notice(notice: str | None, names: list[str], folder: Path) -> list[str]:
    """Write the notice that the licence asks to pass on, unless a licence file holds it already.

    Returns:
        The names of the written files: one or none.
    """
    if not notice or any(
        notice in (folder / name).read_text(encoding="utf-8", errors="replace") for name in names if "/" not in name
    ):
        return []
    name = "NOTICE" if "notice" not in {name.lower() for name in names} else "NOTICE-base-model"
    with files.writing(folder / name) as part:
        part.write_text(notice + "\n", encoding="utf-8")
    return [name]


def put(source: Path, target: Path) -> str:
    """Hard-link `source` to `target`, or copy it where the disk does not allow that; return its sha256."""
    if target.is_file() and target.samefile(source):
        return files.sha256(source)
    with files.writing(target) as part:
        try:
            os.link(source, part)
            return files.sha256(source)
        except OSError:  # another disk, or one without hard links
            return files.copy(source, part)


def build(
    config: Config, run: Run, artifacts: list[manifest.Artifact], beside: list[manifest.File]
) -> manifest.Manifest:
    """Build the manifest of a run from its records.

    Args:
        companion_files: The entries of the files that are no artifacts: configs, tokenizer, licence files.
    """
    data, tune = run.read("data"), run.read("finetune")
    contract = files.read_json(run.output("verify", "contract"))
    scores = run.read("evaluate")["scores"] | run.read("verify")["scores"]
    return manifest.Manifest(
        id=run.read("export")["id"],
        name=run.model,
        base=manifest.BaseModelInfo(**data["base"]),
        dataset=manifest.Dataset(
            source=config.data.source,
            revision=data["dataset"]["training"].get("revision") or config.data.revision,
            sha256=data["inputs"],
            rows=data["rows"],
            split=config.data.validation or f"{config.data.validation_share:g} of the rows, by content hash",
            split_hash=data["outputs"]["heldout"]["sha256"],
            train_sha256=data["outputs"]["train"]["sha256"],
            fingerprints=data.get("fingerprints", {}),
        ),
        generation=manifest.Generation(
            temperature=config.generation.temperature,
            top_p=config.generation.top_p,
            max_tokens=config.generation.max_tokens,
            num_ctx=config.generation.num_ctx or config.base.max_seq_length,
        ),
        artifacts=tuple(artifacts),
        files=tuple(beside),
        config=config.model_dump(mode="json"),
        training={"method": "QLoRA" if config.base.load_in_4bit else "LoRA"}
        | {
            key: tune[key]
            for key in (
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
            )
        },
        scores={"rule": config.evaluate.rule, "heldout": scores, "used": run.read("verify")["used"]}
        | thresholds(run, config),
        provenance=provenance(run),
        **contract,
    )


def thresholds(run: Run, config: Config) -> dict:
    """Return the thresholds of `verify` and its results, together with the training loss that `evaluate` measured."""
    verify = run.read("verify")
    return {
        "thresholds": config.verify.model_dump(mode="json"),
        "conversion": verify["conversion"],
        "training": run.read("evaluate")["training"],
        "notes": verify["notes"],
        "as_served": verify["as_served"],
    }


def provenance(run: Run) -> dict:
    """Return what is needed to make the model again: hashes of config, records and locks; versions; git; the image."""
    image = files.read_json(Path(os.environ["FERRY_IMAGE"])) if os.environ.get("FERRY_IMAGE") else {}
    return {
        "config_sha256": files.sha256(run.config_file),
        "records": {name: files.sha256(run.path(name)) for name in STAGES if run.done(name)},
        "git": git.checkout(),
        "image": {"id": os.environ.get("FERRY_IMAGE_ID")}
        | {key: image[key] for key in ("sources", "base", "debian", "device", "llama.cpp")}
        if image
        else None,
        "lock_sha256": {lock.name: files.sha256(lock) for lock in sorted(LOCKS.glob("*.txt"))},
        "llama_cpp": llama_tools.version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "driver": machine.nvidia().driver or None,
        "packages": {name: version(name) for name in STACK},
    }
