"""preflight: check what would otherwise fail only after hours of paid GPU time."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import files, gguf_reader, hub
from common.errors import UserError
from contract import manifest
from pipeline.base_model import licences
from pipeline.checkpoint_sync import push
from pipeline.checkpoint_sync.snapshot import RunState, fill_repo_name
from pipeline.config import references
from pipeline.config.load import dump_config
from pipeline.config.schema import Base, Config
from pipeline.config.stage_settings import hash_training_settings
from pipeline.plan import disk_space, memory_need
from pipeline.publish import upload_process
from pipeline.publish.folder_hub import hub_folder
from pipeline.run.run_folder import Run

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

T = TypeVar("T")
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


def require_write_access(action: str, repo: str) -> dict[str, Any]:
    """Return the user of the Hub token. Raise UserError, beginning with `action`, when it may not write to `repo`."""
    if not hub.read_token():
        raise UserError(f"{action}: no Hub token is set", hub.LOGIN_HINT, code="hub.no_token")
    user = ask_hub(action, hub.create_client().whoami)
    if reason := find_permission_fault(user, repo):
        raise UserError(f"{action}: {reason}", hub.STATUS_HINTS[403], code="hub.no_write_access")
    return user


def ask_hub(action: str, call: Callable[[], T]) -> T:
    """Return `call()` with short retries only. Raise UserError, beginning with `action`, when it fails."""
    return hub.retry(action, call, retry_seconds=hub.QUICK_RETRY_SECONDS)


def check_checkpoint_repo(config: Config, run: Run, checkpoints: str) -> str:
    """Check the repo for checkpoints; return a sentence about it.

    Raises:
        UserError: The token may not write to the repo, the repo is public, or it holds another run.
    """
    repo = fill_repo_name(checkpoints, run.folder.name)
    action = f"CHECKPOINTS {repo}"
    require_write_access(action, repo)
    api = hub.create_client()
    repo_info = hub.fetch_or_none(action, lambda: api.model_info(repo))
    pushed_state = push.read_repo_state(repo, repo_info) if repo_info else None
    push.refuse_conflicting_state(repo, pushed_state, describe_local_state(config, run), may_be_behind=True)
    state = f"at {pushed_state}" if pushed_state else describe_age(repo_info)
    return f"checkpoints go to {repo} on the Hub ({state}, private)"


def describe_local_state(config: Config, run: Run) -> RunState:
    """Return the state of the run on this machine, for the comparison with the one on the Hub."""
    config_hash = files.sha256_bytes(dump_config(config).encode())
    return RunState(run.name, config_hash, training=hash_training_settings(config))


def describe_age(repo_info: "ModelInfo | None") -> str:
    """Return whether a repo exists already, for messages."""
    return "existing" if repo_info else "new"


def check_destination(config: Config, repo: str, model: str) -> str:
    """Check that publish.repo can be written; return a sentence about it.

    Raises:
        UserError: The folder or the repo cannot be written, or it holds something else.
    """
    if not hub.is_folder(repo):
        return check_hub_repo(config, hub.parse_repo_id(repo)[0], model)
    folder = hub_folder(repo, model)
    refuse_unwritable_folder(folder)
    return f"goes to the folder {folder}"


def refuse_unwritable_folder(folder: Path) -> None:
    """Raise UserError when a folder cannot be written or created."""
    existing_parent = files.nearest_existing_path(folder)
    if not existing_parent.is_dir() or not os.access(existing_parent, os.W_OK):
        raise UserError(
            f"publish.repo {folder} cannot be written: {existing_parent} is not a writable folder",
            "set publish.repo to a different folder",
            code="file.unwritable",
        )


def check_hub_repo(config: Config, repo: str, model: str) -> str:
    """Check that a repo on the Hub can be written; return a sentence about it."""
    action, visibility = f"publish.repo {repo}", "private" if config.publish.private else "public"
    user, api = require_write_access(action, repo), hub.create_client()
    repo_info = hub.fetch_or_none(action, lambda: api.model_info(repo))
    if repo_info:
        refuse_unusable_repo(config, repo_info, repo, model)
        refuse_taken_tag(api, repo, config.publish.tag)
    return f"goes to {repo} on the Hub ({describe_age(repo_info)}, {visibility}), as {user['name']}"


def refuse_unusable_repo(config: Config, repo_info: "ModelInfo", repo: str, model: str) -> None:
    """Raise UserError when the repo holds something else or another model, or is public against the config."""
    upload_process.refuse_foreign_repo(repo_info, repo, config.publish.private)
    if manifest.FILE_NAME in hub.list_repo_files(repo_info):
        assert repo_info.sha, "the Hub names the commit of a repo that it describes"
        upload_process.list_published_files(repo, repo_info.sha, model)


def refuse_taken_tag(api: "HfApi", repo: str, tag: str | None) -> None:
    """Raise UserError when the repo already has the requested tag; without one, the next free tag is chosen later."""
    if tag and tag in {tag_ref.name for tag_ref in hub.retry(repo, lambda: api.list_repo_refs(repo)).tags}:
        raise UserError(
            f"{repo} already has a tag {tag}, of a different version",
            "choose a different publish.tag, or none for the next version tag",
            code="hub.tag_exists",
        )


def find_permission_fault(user: dict[str, Any], repo: str) -> str | None:
    """Return why this user's token may not write to `repo`.

    The result is None when it may write, or when the Hub's answer has an unknown form.

    Args:
        user: The Hub's answer to `whoami`.
    """
    owner, token = repo.split("/")[0].lower(), (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "fineGrained":
        return find_scope_fault(token, owner, repo)
    if token.get("role") == "read":
        return "the token may only read"
    orgs = {org.get("name", "").lower() for org in user.get("orgs") or [] if org.get("roleInOrg") != "read"}
    return None if owner in {user["name"].lower(), *orgs} else f"{user['name']} may not write to {owner}'s repos"


def find_scope_fault(token: dict[str, Any], owner: str, repo: str) -> str | None:
    """Return why a fine-grained token may not write to `repo`; None when it may."""
    scopes = (token.get("fineGrained") or {}).get("scoped") or []
    writable_scopes = [scope for scope in scopes if WRITE_PERMISSIONS & {*(scope.get("permissions") or [])}]
    grants = {(scope.get("entity") or {}).get("name", "") for scope in writable_scopes}
    if {name.lower() for name in grants} & {owner, repo.lower()}:
        return None
    return f"the token may not write there (fine-grained; it may write to {', '.join(sorted(grants)) or 'nothing'})"


def check_base_model(config: Config, run: Run, repo: str, trains_here: bool) -> list[str]:
    """Check that the base model can be fetched, that its licence allows publishing, and that the disk has space for it.

    Returns:
        What the user should know, one sentence an item.
    """
    model = config.base.model
    if not references.is_hub_model(model):
        weights_bytes = local_weights_bytes(model)
        return check_disk_space(config, run, weights_bytes, repo) if trains_here and weights_bytes else []
    try:
        info = fetch_model_info(config.base)
    except hub.Unreachable as error:
        return [f"{error.message}: only the local cache is used"]
    weights = (sibling for sibling in info.siblings or () if sibling.rfilename.endswith(".safetensors"))
    weights_bytes = sum(sibling.size or 0 for sibling in weights)
    notes = check_disk_space(config, run, weights_bytes, repo) if trains_here else []
    if not hub.is_folder(repo):  # a folder on this machine is not a publication
        notes += [*check_licence(config, info, repo), check_upload_size(config, weights_bytes)]
    return notes


def fetch_model_info(base: Base) -> "ModelInfo":
    """Return what the Hub says of the base model. Raise UserError when this token may not download it."""
    api, action = hub.create_client(), f"base.model {base.model}"
    info = ask_hub(action, lambda: api.model_info(base.model, revision=base.revision, files_metadata=True))
    ask_hub(action, lambda: api.auth_check(base.model))
    return info


def check_licence(config: Config, info: "ModelInfo", repo: str) -> list[str]:
    """Return what the base model's licence asks of the publisher. Raise UserError when it forbids publishing."""
    model_card = info.card_data.to_dict() if info.card_data else {}
    licence_name = model_card.get("license") or config.base.license
    return licences.review_licence(
        licence_name if isinstance(licence_name, str) or licence_name is None else "other",
        config.base.model,
        config.publish.private,
        bool(config.base.license),
        repo=repo,
        copy_count=sum(bool(licences.LICENCE_FILE_NAME.match(name)) for name in hub.list_repo_files(info)),
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

    The copy in a folder hub is checked too. On the run's own disk it consists of hard links, which take no disk space.

    Args:
        weights_bytes: The size of the base model in 16 bit.
    """
    parts = disk_space.artifact_bytes(config, weights_bytes)
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
    if not hub.is_folder(repo) or is_same_disk(hub.folder_path(repo), run.folder):
        return
    free = shutil.disk_usage(files.nearest_existing_path(hub.folder_path(repo))).free
    need = sum(disk_space.quantization_bytes(config, weights_bytes)) + weights_bytes * config.publish.merged
    if free < need:
        raise UserError(
            f"publish.repo {repo} needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on its disk",
            "free disk space there, or set publish.repo to a folder on a different disk",
            code="disk.too_small",
        )


def is_same_disk(first: Path, second: Path) -> bool:
    """Return whether two folders, which need not exist yet, are on one disk."""
    devices = (os.stat(files.nearest_existing_path(folder)).st_dev for folder in (first, second))
    return len(set(devices)) == 1


def check_upload_size(config: Config, weights_bytes: int) -> str:
    """Return a sentence about the size of the upload. Raise UserError when a GGUF is larger than the Hub accepts."""
    sizes = disk_space.quantization_bytes(config, weights_bytes)
    if max(sizes) > FILE_LIMIT:
        raise UserError(
            f"a GGUF of {max(sizes) / 1e9:.0f} GB is too large for the Hub (at most {FILE_LIMIT / 1e9:.0f} GB a file)",
            "choose a smaller base.model or export.quantizations, or publish.repo=./hub/{run}",
            code="hub.gguf_too_large",
        )
    total = sum(sizes) + weights_bytes * config.publish.merged
    # The Hub does not tell whether the account has space for it.
    return f"about {total / 1e9:.1f} GB to upload (a free account holds {FREE_PRIVATE / 1e9:.0f} GB of private files)"


def check_dataset(config: Config) -> list[str]:
    """Check that the data set can be fetched, and return what the user should know, one sentence an item.

    Its subset and split are not checked here: the `data` stage does that minutes later, and needs no GPU.
    """
    if not references.is_hub_dataset(config.data.source):
        return []
    try:
        refuse_closed_dataset(config.data.source, config.data.revision)
    except hub.Unreachable as error:
        return [f"{error.message}: only the local cache is used"]
    return []


def refuse_closed_dataset(source: str, revision: str | None) -> None:
    """Raise UserError when a data set of the Hub does not exist, or this token may not download it."""
    api, action = hub.create_client(), f"data.source {source}"
    ask_hub(action, lambda: api.dataset_info(source, revision=revision))
    if "/" in source:
        ask_hub(action, lambda: api.auth_check(source, repo_type="dataset"))
