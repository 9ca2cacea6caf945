"""publish: put the artifacts of a run into a folder hub or on the Hub. The GGUFs go first, manifest.json last."""

import socket
from pathlib import Path

from common import files, hub
from common.errors import UserError
from contract import manifest
from pipeline.base_model import licences
from pipeline.config.schema import Config
from pipeline.publish import model_card, upload
from pipeline.publish.build_manifest import build_manifest
from pipeline.publish.finished_stages import FinishedStages
from pipeline.publish.folder_hub import MODEL_CARD_FILE, back_up_edited_card, claim_hub_folder, hub_folder
from pipeline.publish.repo_files import (
    add_adapter,
    add_companion_files,
    add_gguf,
    add_merged_model,
    describe_file,
    list_published_ggufs,
)
from pipeline.run.records import DataRecord, PublishRecord
from pipeline.run.run_folder import Run


def run_publish(config: Config, run: Run) -> PublishRecord:
    """Write the repo into a folder, upload it when `publish.repo` is on the Hub, and write the record of the stage.

    Raises:
        UserError: The upload failed. Everything stays in the folder.
    """
    records = FinishedStages.read(run)
    repo = config.publish.repo.replace("{run}", run.model_name)
    publish = publish_to_folder if hub.is_folder(repo) else publish_to_hub
    new_manifest, upload_result = publish(config, run, records, repo)
    return run.write_record(
        PublishRecord,
        ("verify", "export", "evaluate", "finetune", "data"),
        {},
        **upload_result,
        default=new_manifest.default_artifact().model_dump(mode="json"),
    )


def publish_to_folder(config: Config, run: Run, records: FinishedStages, repo: str) -> tuple[manifest.Manifest, dict]:
    """Write the run into a folder hub; return its manifest and {repo}."""
    folder = hub_folder(repo, run.model_name)
    claim_hub_folder(folder, run.model_name)
    back_up_edited_card(folder)
    manifest_without_card = write_repo_files(config, run, records, folder)
    return write_card_and_manifest(config, records, folder, manifest_without_card, None), {"repo": repo}


def publish_to_hub(config: Config, run: Run, records: FinishedStages, repo: str) -> tuple[manifest.Manifest, dict]:
    """Upload the run to the Hub; return its manifest and the {repo, commit, tag} that the Hub now holds."""
    folder = run.prepare_stage_folder("publish", "verify") / run.model_name
    new_manifest = write_repo_files(config, run, records, folder)
    # The folder is complete before the Hub is asked, so a failure loses nothing.
    write_card_and_manifest(config, records, folder, new_manifest, None)
    try:
        repo, _ = hub.parse_repo_id(hub.fill_placeholders(repo, run.model_name))
        enforce_licence(config, records.data, repo)
        full_manifest = write_card_and_manifest(config, records, folder, new_manifest, repo)
        private, tag = config.publish.private, config.publish.tag
        return full_manifest, upload.upload_folder(
            {"folder": str(folder), "repo": repo, "private": private, "tag": tag}
        )
    except UserError as error:
        raise kept_folder_error(error, folder) from error


def kept_folder_error(error: UserError, folder: Path) -> UserError:
    """Return the error of an upload with the folder that stays, and how to copy it to the Mac."""
    return UserError(
        f"{error.message}\n  nothing is lost: the complete model is in {folder}. To copy it off this machine:\n"
        f"  scp -r {socket.gethostname()}:{folder.absolute()} .   "
        f"and then, on your Mac: make deploy-mac REPO=./{folder.name}",
        error.hint,
        code=error.code,
    )


def enforce_licence(config: Config, data: DataRecord, repo: str) -> None:
    """Raise UserError when the base model's licence forbids publishing to `repo`; print what the licence asks for."""
    licence_file_count = sum(name.lower().startswith(("licence/lic", "licence/copying")) for name in data.outputs)
    for note in licences.review_licence(
        data.base.license,
        data.base.model,
        config.publish.private,
        bool(config.base.license),
        repo=repo,
        copy_count=licence_file_count,
    ):
        hub.print_message(f"note: {note}")


def write_repo_files(config: Config, run: Run, records: FinishedStages, folder: Path) -> manifest.Manifest:
    """Write everything but the model card and manifest.json into the folder; return the manifest without the card."""
    files.remove(folder / manifest.FILE_NAME)  # an old manifest must not describe new files
    artifacts = [
        add_gguf(record, name, records, folder) for record, name in list_published_ggufs(records.export, records.verify)
    ]
    artifacts.append(add_adapter(records.finetune, folder))
    companion_names = add_companion_files(records.data, records.finetune, folder)
    if config.publish.merged:
        merged_artifacts, merged_names = add_merged_model(run.folder / "export" / "merged", folder)
        artifacts, companion_names = artifacts + merged_artifacts, companion_names + merged_names
    return build_manifest(config, run, records, artifacts, [describe_file(folder, name) for name in companion_names])


def write_card_and_manifest(
    config: Config, records: FinishedStages, folder: Path, new_manifest: manifest.Manifest, repo: str | None
) -> manifest.Manifest:
    """Write the model card, then manifest.json; return the complete manifest.

    Args:
        repo: The repo's id on the Hub, for the commands in the model card; None for a folder hub.
    """
    ladder = records.verify.output_path("ladder").read_text(encoding="utf-8").rstrip()
    card = model_card.render_model_card(new_manifest, ladder, repo, config.publish.private)
    with files.write_atomically(folder / MODEL_CARD_FILE) as part:
        part.write_text(card, encoding="utf-8")
    published_files = (*new_manifest.files, describe_file(folder, MODEL_CARD_FILE))
    full_manifest = new_manifest.model_copy(update={"files": published_files})
    manifest.write_manifest(folder / manifest.FILE_NAME, full_manifest)
    return full_manifest
