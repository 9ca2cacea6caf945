"""preflight: check what would otherwise fail only after hours of paid GPU time."""

import os
import shutil
from pathlib import Path

from common import files, gguf_reader, hub
from common.errors import UserError
from contract import manifest
from pipeline.base_model import licences
from pipeline.checkpoint_sync import push
from pipeline.checkpoint_sync.snapshot import State, repository
from pipeline.config import references
from pipeline.config.load import dump_config
from pipeline.config.schema import Config
from pipeline.config.stage_settings import hash_training_settings
from pipeline.plan import disk_space as space
from pipeline.plan import memory_need
from pipeline.publish import upload_process
from pipeline.publish.stage import hub_folder
from pipeline.run.run_folder import Run

LARGEST = 50e9  # bytes of one file that the Hub accepts: https://huggingface.co/docs/hub/storage-limits
WRITE = {"repo.write", "repo.content.write"}  # permissions of a fine-grained token
FREE_PRIVATE = 100e9  # bytes of private files in a free account, from the same page


def stage(config: Config, run: Run, here: bool = True, checkpoints: str | None = None) -> list[str]:
    """Run all checks that need no GPU; return what the user should know, one sentence an item.

    Args:
        trains_here: Whether this machine will train, so that its disk is checked.
        checkpoints: The repo that checkpoints go to; None when they stay on the machine.

    Raises:
        UserError: The first thing that would stop the run later.
    """
    if run.done("publish"):
        return []
    repo = hub.named(config.publish.repo, run.model)
    said = [destination(config, repo, run.model)]
    said += [leaving(config, run, checkpoints)] if checkpoints else []
    if not run.done("export"):
        said += [*base(config, run, repo, here), *dataset(config)]
    return said


def writable(what: str, name: str) -> dict:
    """Return the user of the Hub token. Raise UserError when there is none or it may not write to the repo.

    Args:
        action: The start of the error message, such as "publish.repo you/model".
    """
    if not hub.token():
        raise UserError(f"{what}: no token of the Hub is set", hub.LOGIN)
    user = hub.patiently(what, hub.api().whoami, seconds=hub.QUICK)
    if why := lacks(user, name):
        raise UserError(f"{what}: {why}", hub.HINTS[403])
    return user


def leaving(config: Config, run: Run, checkpoints: str) -> str:
    """Check the repo for checkpoints; return a sentence about it.

    Raises:
        UserError: The token may not write to the repo, the repo is public, or it holds another run.
    """
    name = repository(checkpoints, run.folder.name)
    writable(f"CHECKPOINTS {name}", name)
    api = hub.api()
    head = hub.found(f"CHECKPOINTS {name}", lambda: api.repo_info(name))
    there = push.found(name, head) if head else None
    push.refuse(
        name,
        there,
        State(run.name, files.sha256_bytes(dump_config(config).encode()), training=hash_training_settings(config)),
        behind=True,
    )
    return (
        f"checkpoints go to {name} on the Hub "
        f"({f'at {there}' if there else 'there already' if head else 'new'}, private)"
    )


def destination(config: Config, repo: str, model: str) -> str:
    """Check that publish.repo can be written; return a sentence about it.

    Raises:
        UserError: The folder or the repo cannot be written, or it holds something else.
    """
    if hub.is_folder(repo):
        folder = hub_folder(repo, model)
        above = files.nearest(folder)
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"publish.repo {folder} cannot be written: see to {above}", "name another folder")
        return f"goes to the folder {folder}"
    name, _ = hub.split(repo)
    user, api = writable(f"publish.repo {name}", name), hub.api()
    head = hub.found(f"publish.repo {name}", lambda: api.repo_info(name))
    if head:
        upload_process.refuse_strange(head, name, config.publish.private)
        if manifest.NAME in {sibling.rfilename for sibling in head.siblings}:
            upload_process.outdated(name, head.sha, model)
        refuse_tag(api, name, config.publish.tag)
    return (
        f"goes to {name} on the Hub ({'there already' if head else 'new'}, "
        f"{'private' if config.publish.private else 'public'}), as {user['name']}"
    )


def refuse_tag(api, repo: str, tag: str | None) -> None:
    """Raise UserError when the repo has the requested tag already. (Without one, the next free tag is chosen later.)"""
    if tag and tag in {there.name for there in hub.patiently(repo, lambda: api.list_repo_refs(repo)).tags}:
        raise UserError(
            f"{repo} has a tag {tag} already, of another version", "choose another publish.tag, or none for the next"
        )


def lacks(user: dict, repo: str) -> str | None:
    """Return why this user's token may not write to `repo`.

    The result is None when it may write, or when the Hub's answer has an unknown form.

    Args:
        user: The Hub's answer to `whoami`.
    """
    owner, token = repo.split("/")[0].lower(), (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        may = {
            (scope.get("entity") or {}).get("name", "")
            for scope in scopes
            if WRITE & {*(scope.get("permissions") or [])}
        }
        if {name.lower() for name in may} & {owner, repo.lower()}:
            return None
        return f"the token may not write there (fine-grained; it may write to {', '.join(sorted(may)) or 'nothing'})"
    if token.get("role") == "read":
        return "the token may only read"
    orgs = {org.get("name", "").lower() for org in user.get("orgs") or [] if org.get("roleInOrg") != "read"}
    return None if owner in {user["name"].lower(), *orgs} else f"{user['name']} may not write to {owner}'s repos"


def base(config: Config, run: Run, repo: str, here: bool) -> list[str]:
    """Check that the base model can be fetched, that its licence allows publishing, and that the disk has space for it.

    Returns:
        What the user should know, one sentence an item.
    """
    model = config.base.model
    if not references.is_hub_model(model):
        sixteen = local_weights(model)
        return disk(config, run, sixteen, repo) if here and sixteen else []
    api, what = hub.api(), f"base.model {model}"
    try:
        info = hub.patiently(
            what, lambda: api.model_info(model, revision=config.base.revision, files_metadata=True), seconds=hub.QUICK
        )
        hub.patiently(what, lambda: api.auth_check(model), seconds=hub.QUICK)
    except hub.Unreachable as error:
        return [f"{error.message}: what is in the local cache decides"]
    sixteen = sum(s.size or 0 for s in info.siblings if s.rfilename.endswith(".safetensors"))
    said = disk(config, run, sixteen, repo) if here else []
    if not hub.is_folder(repo):  # a folder on this machine is not a publication
        said += [*licence(config, info, repo), upload(config, sixteen)]
    return said


def licence(config: Config, info, repo: str) -> list[str]:
    """Return what the base model's licence asks of the publisher. Raise UserError when it forbids publishing."""
    card = info.card_data.to_dict() if info.card_data else {}
    names = card.get("license") or config.base.license
    return licences.refuse(
        names if isinstance(names, str) or names is None else "other",
        config.base.model,
        config.publish.private,
        bool(config.base.license),
        name=repo,
        copies=sum(bool(licences.NAMES.match(s.rfilename)) for s in info.siblings),
    )


def local_weights(model: str) -> int:
    """Return the bytes of a local base model in 16 bit; 0 when they are not known before the base model is fetched."""
    path = Path(model).expanduser()
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    shape = memory_need.gguf_shape(gguf_reader.read(path)) if path.is_file() else None
    return shape.sixteen if shape else 0


def disk(config: Config, run: Run, sixteen: int, repo: str) -> list[str]:
    """Check the disk space for the base model, the merged model, the 16-bit GGUF and the quantizations.

    The copy in a folder hub is checked too. On the run's own disk it consists of hard links, which take no space.

    Args:
        weights_bytes: The size of the base model in 16 bit.
    """
    parts = space.parts(config, sixteen)
    need, free = sum(parts.values()), shutil.disk_usage(files.nearest(run.folder)).free
    refuse_full_hub(config, run, sixteen, repo)
    if free < need:
        raise UserError(
            f"{config.base.model} needs {need / 1e9:.0f} GB of disk to its end "
            f"({', '.join(f'{name} {size / 1e9:.1f}' for name, size in parts.items())}), "
            f"{free / 1e9:.0f} GB are free",
            "take a machine with more disk, then run the same command again",
        )
    return [f"{need / 1e9:.1f} GB of disk needed, {free / 1e9:.0f} GB free"]


def refuse_full_hub(config: Config, run: Run, sixteen: int, repo: str) -> None:
    """Raise UserError when a folder hub on another disk has too little space for what is published."""
    if not hub.is_folder(repo):
        return
    there = files.nearest(hub.folder(repo))
    if os.stat(there).st_dev == os.stat(files.nearest(run.folder)).st_dev:
        return
    need, free = sum(space.quantized(config, sixteen)) + sixteen * config.publish.merged, shutil.disk_usage(there).free
    if free < need:
        raise UserError(
            f"publish.repo {repo} gets {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on its disk",
            "free some disk there, or name a folder on another disk in publish.repo",
        )


def upload(config: Config, sixteen: int) -> str:
    """Return a sentence about the size of the upload. The Hub does not tell whether the account has space for it.

    Raises:
        UserError: A GGUF is larger than the Hub accepts.
    """
    sizes = space.quantized(config, sixteen)
    if max(sizes) > LARGEST:
        raise UserError(
            f"a GGUF of {max(sizes) / 1e9:.0f} GB does not go to the Hub, which takes {LARGEST / 1e9:.0f} GB a file",
            "choose a smaller base.model or export.quantizations, or publish.repo=./hub/{run}",
        )
    sent = sum(sizes) + sixteen * config.publish.merged
    return f"about {sent / 1e9:.1f} GB to send (a free account holds {FREE_PRIVATE / 1e9:.0f} GB of private files)"


def dataset(config: Config) -> list[str]:
    """Check that the data set can be fetched.

    Its subset and split are not checked here: the `data` stage does that minutes later, and needs no GPU.

    Returns:
        What the user should know, one sentence an item.
    """
    source = config.data.source
    if not references.is_hub_dataset(source):
        return []
    api, what = hub.api(), f"data.source {source}"
    try:
        hub.patiently(what, lambda: api.dataset_info(source, revision=config.data.revision), seconds=hub.QUICK)
        if "/" in source:
            hub.patiently(what, lambda: api.auth_check(source, repo_type="dataset"), seconds=hub.QUICK)
    except hub.Unreachable as error:
        return [f"{error.message}: what is in the local cache decides"]
    return []
