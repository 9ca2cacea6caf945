"""Fetch the result of a job: from the Hub, or over the connection to it, where each file is checked by its sha256."""

from pathlib import Path

from common import console, files, hub
from common.errors import UserError
from contract import manifest
from launch.provider import ConnectionLost, Provider
from launch.watch_job import RetryTimer
from pipeline.publish.folder_hub import claim_hub_folder, hub_folder
from pipeline.run.records import DataRecord, PublishRecord, RecordType
from pipeline.run.run_folder import Run

MAX_RECORD_BYTES = 64 << 20  # bytes of a record


def read_remote_record(provider: Provider, job_name: str, run_name: str, record_type: type[RecordType]) -> RecordType:
    """Return the record that a stage of the job's run wrote. Raise UserError when it is no such record."""
    path = f"runs/{run_name}/{record_type.model_fields['stage'].default}.json"
    try:
        return record_type.model_validate_json(read_remote_file(provider, job_name, path))
    except ValueError as error:
        raise UserError(
            f"{provider.label}: {path} is not a valid record: {str(error).splitlines()[0]}",
            "delete it there, then run the same command again",
            code="job.invalid_record",
        ) from None


def read_remote_file(provider: Provider, job_name: str, path: str) -> bytes:
    """Return a file of the job's folder. Raise UserError when it does not exist or is larger than 64 MiB."""
    content = bytearray()
    for block in provider.read_file(job_name, path):
        content += block
        if len(content) > MAX_RECORD_BYTES:
            raise UserError(
                f"{path} on {provider.label} is larger than {MAX_RECORD_BYTES >> 20} MiB, the limit for a record",
                f"check {path} there",
                code="job.record_too_large",
            )
    return bytes(content)


def fetch_published_repo(provider: Provider, job_name: str, run_name: str, hubs_folder: Path) -> str:
    """Return the repo on the Hub that the job published; download it first when it is a folder hub at the provider.

    The result is what `make deploy-mac REPO=` takes.
    """
    record = read_remote_record(provider, job_name, run_name, PublishRecord)
    if not hub.is_folder(record.repo):
        return record.repo_with_tag
    model = Run(Path(run_name)).model_name
    target = hub_folder(f"./{hubs_folder / model}", model)
    claim_hub_folder(target, model)
    download_folder_hub(provider, job_name, record.repo, target)
    return f"./{target}"


def download_folder_hub(provider: Provider, job_name: str, remote_folder: str, target: Path) -> None:
    """Download a folder hub, its manifest last. Files that are complete here already are not downloaded again."""
    remote_path, local_path = f"{remote_folder}/{manifest.FILE_NAME}", target / manifest.FILE_NAME
    manifest_bytes = read_remote_file(provider, job_name, remote_path)
    remote_manifest = manifest.parse_manifest(manifest_bytes, f"{provider.label}:{remote_path}")
    if local_path.is_file() and local_path.read_bytes() != manifest_bytes:
        files.remove(local_path)  # an old manifest must not describe new files
    for entry in (*remote_manifest.artifacts, *remote_manifest.files):
        download_file(provider, job_name, f"{remote_folder}/{entry.file}", target / entry.file, entry)
    with files.write_atomically(local_path) as part:
        part.write_bytes(manifest_bytes)


def download_file(
    provider: Provider, job_name: str, remote_path: str, target: Path, entry: manifest.PublishedFile
) -> None:
    """Download one file; after a lost connection only what was in transit is sent again.

    Raise UserError when the file has another sha256 than the manifest says.
    """
    if target.is_file() and target.stat().st_size == entry.bytes and files.sha256(target) == entry.sha256:
        return
    part = target.with_name(f".{target.name}.{entry.sha256[:12]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download_with_retries(provider, job_name, remote_path, part, entry)
        if files.sha256(part) != entry.sha256:
            files.remove(part)
            raise UserError(
                f"{target.name} from {provider.label} is not the file that was published: its sha256 differs",
                "run the same command again",
                code="job.wrong_sha256",
            )
        files.fsync_tree(part)
        part.replace(target)
    except OSError as error:
        raise files.translate_write_error(error, target) from error


def _download_with_retries(
    provider: Provider, job_name: str, remote_path: str, part: Path, entry: manifest.PublishedFile
) -> None:
    """Download the whole file into `part`, and retry after each lost connection. Progress resets the time limit."""
    retry_timer, byte_count = RetryTimer(), 0
    while True:
        try:
            return _append_missing_bytes(provider, job_name, remote_path, part, entry)
        except ConnectionLost as error:
            if part.is_file() and part.stat().st_size > byte_count:
                retry_timer, byte_count = RetryTimer(), part.stat().st_size
            retry_timer.pause_or_raise(error)


def _append_missing_bytes(
    provider: Provider, job_name: str, remote_path: str, part: Path, entry: manifest.PublishedFile
) -> None:
    """Download what `part` does not have yet, over one connection."""
    offset = part.stat().st_size if part.is_file() else 0
    if offset >= entry.bytes:
        return
    with console.show_progress(entry.bytes, entry.file, "B") as tick, part.open("ab") as file:
        tick(offset)
        for block in provider.read_file(job_name, remote_path, offset):
            file.write(block)
            tick(len(block))


def list_row_differences(local: DataRecord, remote: DataRecord) -> list[str]:
    """Return how the training and held-out rows made there differ from those made here; empty when all bytes agree."""
    return [
        f"{name}: {local.outputs[name].sha256[:12]} here, {remote.outputs[name].sha256[:12]} there"
        for name in ("train", "heldout")
        if local.outputs[name].sha256 != remote.outputs[name].sha256
    ]
