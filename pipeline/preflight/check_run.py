"""preflight: check what would otherwise fail only after hours of paid GPU time."""

import os
import shutil
from pathlib import Path

from common import files, gguf_reader, hub
from common.errors import UserError
from contract import manifest
from pipeline.base_model import licences
from pipeline.checkpoint_sync import push
from pipeline.checkpoint_sync.snapshot import RunState, fill_repo_name
from pipeline.config import references
from pipeline.config.load import dump_config
from pipeline.config.schema import Config
from pipeline.config.stage_settings import hash_training_settings
from pipeline.plan import disk_space as space
from pipeline.plan import memory_need
from pipeline.publish import upload_process
from pipeline.publish.folder_hub import hub_folder
from pipeline.run.run_folder import Run

FILE_LIMIT = 50e9  # bytes of one file that the Hub accepts: https://huggingface.co/docs/hub/storage-limits
WRITE_PERMISSIONS = {"repo.write", "repo.content.write"}  # permissions of a fine-grained token
FREE_PRIVATE = 100e9  # bytes of private files in a free account, from the same page


def run_preflight(config: Config, run: Run, trains_here: bool = True, checkpoints: str | None = None) -> list[str]:
    """Run all checks that need no GPU; return what the user should know, one sentence an item.

    Args:
        trains_here: Whether this machine will train, so that its disk is checked.
        checkpoints: The repo that checkpoints go to; None when they stay on the machine.

    Raises:
        UserError: The first thing that would stop the run later.
    """
    if run.is_done("publish"):
        return []
    repo = hub.fill_placeholders(config.publish.repo, run.model_name)
    notes = [check_destination(config, repo, run.model_name)]
    notes += [check_checkpoint_repo(config, run, checkpoints)] if checkpoints else []
    if not run.is_done("export"):
        notes += [*check_base_model(config, run, repo, trains_here), *check_dataset(config)]
    return notes


def require_write_access(action: str, repo: str) -> dict:
    """Return the user of the Hub token. Raise UserError when there is none or it may not write to the repo.

    Args:
        action: The start of the error message, such as "publish.repo you/model".
    """
    if not hub.read_token():
        raise UserError(f"{action}: no Hub token is set", hub.LOGIN_HINT, code="hub.no_token")
    user = hub.retry(action, hub.create_client().whoami, retry_seconds=hub.QUICK_RETRY_SECONDS)
    if reason := find_permission_fault(user, repo):
        raise UserError(f"{action}: {reason}", hub.STATUS_HINTS[403], code="hub.no_write_access")
    return user


def check_checkpoint_repo(config: Config, run: Run, checkpoints: str) -> str:
    """Check the repo for checkpoints; return a sentence about it.

    Raises:
        UserError: The token may not write to the repo, the repo is public, or it holds another run.
    """
    repo = fill_repo_name(checkpoints, run.folder.name)
    require_write_access(f"CHECKPOINTS {repo}", repo)
    api = hub.create_client()
    repo_info = hub.fetch_or_none(f"CHECKPOINTS {repo}", lambda: api.repo_info(repo))
    pushed_state = push.read_repo_state(repo, repo_info) if repo_info else None
    push.refuse_conflicting_state(
        repo,
        pushed_state,
        RunState(run.name, files.sha256_bytes(dump_config(config).encode()), training=hash_training_settings(config)),
        may_be_behind=True,
    )
    return (
        f"checkpoints go to {repo} on the Hub "
        f"({f'at {pushed_state}' if pushed_state else 'existing' if repo_info else 'new'}, private)"
    )


def check_destination(config: Config, repo: str, model: str) -> str:
    """Check that publish.repo can be written; return a sentence about it.

    Raises:
        UserError: The folder or the repo cannot be written, or it holds something else.
    """
    if hub.is_folder(repo):
        folder = hub_folder(repo, model)
        existing_parent = files.nearest_existing_path(folder)
        if not existing_parent.is_dir() or not os.access(existing_parent, os.W_OK):
            raise UserError(
                f"publish.repo {folder} cannot be written: {existing_parent} is not a writable folder",
                "set publish.repo to a different folder",
                code="file.unwritable",
            )
        return f"goes to the folder {folder}"
    repo_id, _ = hub.parse_repo_id(repo)
    user, api = require_write_access(f"publish.repo {repo_id}", repo_id), hub.create_client()
    repo_info = hub.fetch_or_none(f"publish.repo {repo_id}", lambda: api.repo_info(repo_id))
    if repo_info:
        upload_process.refuse_foreign_repo(repo_info, repo_id, config.publish.private)
        if manifest.FILE_NAME in {sibling.rfilename for sibling in repo_info.siblings}:
            upload_process.list_published_files(repo_id, repo_info.sha, model)
        refuse_taken_tag(api, repo_id, config.publish.tag)
    return (
        f"goes to {repo_id} on the Hub ({'existing' if repo_info else 'new'}, "
        f"{'private' if config.publish.private else 'public'}), as {user['name']}"
    )


def refuse_taken_tag(api, repo: str, tag: str | None) -> None:
    """Raise UserError when the repo already has the requested tag; without one, the next free tag is chosen later."""
    if tag and tag in {tag_ref.name for tag_ref in hub.retry(repo, lambda: api.list_repo_refs(repo)).tags}:
        raise UserError(
            f"{repo} already has a tag {tag}, of a different version",
            "choose a different publish.tag, or none for the next version tag",
            code="hub.tag_exists",
        )


def find_permission_fault(user: dict, repo: str) -> str | None:
    """Return why this user's token may not write to `repo`.

    The result is None when it may write, or when the Hub's answer has an unknown form.

    Args:
        user: The Hub's answer to `whoami`.
    """
    owner, token = repo.split("/")[0].lower(), (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        grants = {
            (scope.get("entity") or {}).get("name", "")
            for scope in scopes
            if WRITE_PERMISSIONS & {*(scope.get("permissions") or [])}
        }
        if {name.lower() for name in grants} & {owner, repo.lower()}:
            return None
        return f"the token may not write there (fine-grained; it may write to {', '.join(sorted(grants)) or 'nothing'})"
    if token.get("role") == "read":
        return "the token may only read"
    orgs = {org.get("name", "").lower() for org in user.get("orgs") or [] if org.get("roleInOrg") != "read"}
    return None if owner in {user["name"].lower(), *orgs} else f"{user['name']} may not write to {owner}'s repos"


def check_base_model(config: Config, run: Run, repo: str, trains_here: bool) -> list[str]:
    """Check that the base model can be fetched, that its licence allows publishing, and that the disk has space for it.

    Returns:
        What the user should know, one sentence an item.
    """
    model = config.base.model
    if not references.is_hub_model(model):
        weights_bytes = local_weights_bytes(model)
        return check_disk_space(config, run, weights_bytes, repo) if trains_here and weights_bytes else []
    api, action = hub.create_client(), f"base.model {model}"
    try:
        info = hub.retry(
            action,
            lambda: api.model_info(model, revision=config.base.revision, files_metadata=True),
            retry_seconds=hub.QUICK_RETRY_SECONDS,
        )
        hub.retry(action, lambda: api.auth_check(model), retry_seconds=hub.QUICK_RETRY_SECONDS)
    except hub.Unreachable as error:
        return [f"{error.message}: only the local cache is used"]
    weights_bytes = sum(sibling.size or 0 for sibling in info.siblings if sibling.rfilename.endswith(".safetensors"))
    notes = check_disk_space(config, run, weights_bytes, repo) if trains_here else []
    if not hub.is_folder(repo):  # a folder on this machine is not a publication
        notes += [*check_licence(config, info, repo), check_upload_size(config, weights_bytes)]
    return notes


def check_licence(config: Config, info, repo: str) -> list[str]:
    """Return what the base model's licence asks of the publisher. Raise UserError when it forbids publishing."""
    model_card = info.card_data.to_dict() if info.card_data else {}
    licence_name = model_card.get("license") or config.base.license
    return licences.review_licence(
        licence_name if isinstance(licence_name, str) or licence_name is None else "other",
        config.base.model,
        config.publish.private,
        bool(config.base.license),
        repo=repo,
        copy_count=sum(bool(licences.LICENCE_FILE_NAME.match(sibling.rfilename)) for sibling in info.siblings),
    )


def local_weights_bytes(model: str) -> int:
    """Return the bytes of a local base model in 16 bit; 0 when they are not known before the base model is fetched."""
    path = Path(model).expanduser()
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    shape = memory_need.shape_from_gguf(gguf_reader.read_header(path)) if path.is_file() else None
    return shape.weight_bytes if shape else 0


def check_disk_space(config: Config, run: Run, weights_bytes: int, repo: str) -> list[str]:
    """Check the disk space for the base model, the merged model, the 16-bit GGUF and the quantizations.

    The copy in a folder hub is checked too. On the run's own disk it consists of hard links, which take no space.

    Args:
        weights_bytes: The size of the base model in 16 bit.
    """
    parts = space.artifact_bytes(config, weights_bytes)
    need, free = sum(parts.values()), shutil.disk_usage(files.nearest_existing_path(run.folder)).free
    refuse_full_hub_disk(config, run, weights_bytes, repo)
    if free < need:
        raise UserError(
            f"{config.base.model} needs {need / 1e9:.0f} GB of disk for all stages "
            f"({', '.join(f'{name} {size / 1e9:.1f}' for name, size in parts.items())}), "
            f"{free / 1e9:.0f} GB are free",
            "use a machine with more disk, then run the same command again",
            code="disk.too_small",
        )
    return [f"{need / 1e9:.1f} GB of disk needed, {free / 1e9:.0f} GB free"]


def refuse_full_hub_disk(config: Config, run: Run, weights_bytes: int, repo: str) -> None:
    """Raise UserError when a folder hub on another disk has too little space for what is published."""
    if not hub.is_folder(repo):
        return
    existing_folder = files.nearest_existing_path(hub.folder_path(repo))
    if os.stat(existing_folder).st_dev == os.stat(files.nearest_existing_path(run.folder)).st_dev:
        return
    need, free = (
        sum(space.quantization_bytes(config, weights_bytes)) + weights_bytes * config.publish.merged,
        shutil.disk_usage(existing_folder).free,
    )
    if free < need:
        raise UserError(
            f"publish.repo {repo} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on its disk",
            "free disk space there, or set publish.repo to a folder on a different disk",
            code="disk.too_small",
        )


def check_upload_size(config: Config, weights_bytes: int) -> str:
    """Return a sentence about the size of the upload. The Hub does not tell whether the account has space for it.

    Raises:
        UserError: A GGUF is larger than the Hub accepts.
    """
    sizes = space.quantization_bytes(config, weights_bytes)
    if max(sizes) > FILE_LIMIT:
        raise UserError(
            f"a GGUF of {max(sizes) / 1e9:.0f} GB is too large for the Hub (at most {FILE_LIMIT / 1e9:.0f} GB a file)",
            "choose a smaller base.model or export.quantizations, or publish.repo=./hub/{run}",
            code="hub.gguf_too_large",
        )
    total = sum(sizes) + weights_bytes * config.publish.merged
    return f"about {total / 1e9:.1f} GB to upload (a free account holds {FREE_PRIVATE / 1e9:.0f} GB of private files)"


def check_dataset(config: Config) -> list[str]:
    """Check that the data set can be fetched.

    Its subset and split are not checked here: the `data` stage does that minutes later, and needs no GPU.

    Returns:
        What the user should know, one sentence an item.
    """
    source = config.data.source
    if not references.is_hub_dataset(source):
        return []
    api, action = hub.create_client(), f"data.source {source}"
    try:
        hub.retry(
            action,
            lambda: api.dataset_info(source, revision=config.data.revision),
            retry_seconds=hub.QUICK_RETRY_SECONDS,
        )
        if "/" in source:
            hub.retry(
                action, lambda: api.auth_check(source, repo_type="dataset"), retry_seconds=hub.QUICK_RETRY_SECONDS
            )
    except hub.Unreachable as error:
        return [f"{error.message}: only the local cache is used"]
    return []
