"""reproduce: train a published model again from its manifest.json alone, and compare the two.

The code is that of the manifest's commit, the environment that of its lock files, base model and data set those of
their revisions; local data is found by its sha256. The rows are made first: when they differ, nothing is trained.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from common import files, hub
from common.console import format_duration
from common.errors import UserError, printable_line
from contract import manifest, published_model
from contract.manifest import Manifest
from launch import cloud_to_local, fetch_result, published_sources, source_archive, upload_files, verdict
from launch.cloud_to_local import LaunchOptions
from launch.costs import JobSession, confirm_cost
from launch.provider import Job, Machine, Provider
from launch.upload_files import Config
from pipeline.config import references
from pipeline.plan import gpu_table
from pipeline.run.records import DataRecord, PublishRecord

COMMIT_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Reproduction:
    """A published model to make again, and the folder for the log and the verdict."""

    repo: str
    manifest: Manifest
    folder: Path

    @property
    def name(self) -> str:
        """Return the name of the job."""
        return self.folder.name


def load_reproduction(repo: str, runs: Path) -> Reproduction:
    """Read the manifest of a published model. Raise UserError when there is no such repo or no valid manifest."""
    content = published_model.find_source(repo).read_manifest()
    published_manifest = manifest.parse_manifest(content, f"{printable_line(repo)}/{manifest.FILE_NAME}")
    job_name = f"{published_manifest.name}-{files.sha256_bytes(content)[:12]}"
    return Reproduction(repo, published_manifest, runs / "reproduce" / job_name)


def run_reproduce(
    reproduction: Reproduction, provider: Provider, stop_command: str, data: Path | None, options: LaunchOptions
) -> list[verdict.VerdictRow]:
    """Train a published model again and return the rows of the comparison.

    Args:
        reproduction: The published model.
        provider: Where it is trained.
        stop_command: The command that ends a running job, as the end of a sentence.
        data: Where to look for its local data, a file or a folder.
        options: What else the user typed.

    Raises:
        UserError: Code, data or machine are not available, or the rows differ from the published ones.
    """
    options = keep_training_device(reproduction.manifest, options)
    job = build_job(reproduction, data, options)
    session, log = JobSession(provider, reproduction.name, stop_command, options.teardown), reproduction.folder / "log"
    with session.report_costs_on_exit():
        state = cloud_to_local.resume_existing_job(session, job)
        if session.is_running:
            state = cloud_to_local.wait_for_job(session, job, log)
        if (state.goal, state.exit_code) != ("train", 0):
            confirm_reproduction(
                reproduction, provider, cloud_to_local.require_suitable_machine(provider, options), options
            )
            train_again(session, job, reproduction, options, log)
        rows = verdict.compare_manifests(reproduction.manifest, read_new_manifest(provider, job))
    report = session.teardown_and_report()
    hub.print_message(report)
    return rows


def keep_training_device(published_manifest: Manifest, options: LaunchOptions) -> LaunchOptions:
    """Return the options with DEVICE=cpu when the model was trained on a CPU and the user typed no DEVICE."""
    has_device = any(setting.startswith("DEVICE=") for setting in options.settings)
    on_cpu = str(published_manifest.training.get("device", "")).startswith("CPU")
    return replace(options, settings=(*options.settings, "DEVICE=cpu")) if on_cpu and not has_device else options


def train_again(session: JobSession, job: Job, reproduction: Reproduction, options: LaunchOptions, log: Path) -> None:
    """Make the rows and compare them, then run all the other stages. Raise UserError when the rows differ."""
    cloud_to_local.submit_job(session, job, "data", options)
    cloud_to_local.wait_for_job(session, job, log)
    refuse_different_rows(reproduction, session.provider, job)
    cloud_to_local.submit_job(session, job, "train", options)
    cloud_to_local.wait_for_job(session, job, log)


def build_job(reproduction: Reproduction, data: Path | None, options: LaunchOptions) -> Job:
    """Return the job with code, config and files. Raise UserError when one of them is not available."""
    published_manifest, commit = reproduction.manifest, ensure_training_commit(reproduction.manifest)
    pinned_config = pin_revisions(published_manifest)
    source_files = published_sources.find_source_files(published_manifest, pinned_config, commit, data)
    config, _ = published_sources.relocate_published_paths(pinned_config)
    hub.print_message(
        f"{reproduction.repo}: {published_manifest.name}, with the code of {commit[:12]}, "
        f"trained on {published_manifest.training.get('device')}"
    )
    return Job(
        reproduction.name,
        published_manifest.name,
        source_archive.ROOT,
        commit,
        (published_manifest.provenance.get("git") or {}).get("url"),
        upload_files.dump_config(config),
        upload_files.select_uncommitted_files(source_archive.ROOT, commit, source_files),
        options.settings,
    )


def ensure_training_commit(published_manifest: Manifest) -> str:
    """Return the commit that trained the model, after fetching it from origin when this checkout does not have it.

    Raise UserError when origin does not have it either.
    """
    git = published_manifest.provenance.get("git") or {}
    commit = str(git.get("commit") or "")
    if not COMMIT_ID.fullmatch(commit):
        raise UserError(
            f"the manifest of {published_manifest.name} has no valid commit, so its code is not known",
            "publish it again from a git checkout: without the commit it cannot be reproduced",
            code="manifest.no_commit",
        )
    if git.get("dirty"):
        hub.print_message(
            f"note: {published_manifest.name} cannot be reproduced exactly: "
            f"its checkout had uncommitted changes besides {commit[:12]}"
        )
    if not source_archive.has_commit(source_archive.ROOT, commit):
        fetch_from_origin(commit, printable_line(str(git.get("url"))))
    return commit


def fetch_from_origin(commit: str, published_url: str) -> None:
    """Fetch a commit from origin. Raise UserError when origin does not have it."""
    try:
        source_archive.run_git(source_archive.ROOT, "fetch", "--quiet", "origin", commit)
    except UserError as error:
        # Never fetched from the address in the manifest: whoever wrote that would choose which code runs here.
        raise UserError(
            f"this checkout does not have the commit {commit[:12]}, "
            f"and its origin does not provide it ({error.message})",
            f"if you trust {published_url}: `git fetch {published_url} {commit}`, then run the same command again",
            code="git.no_commit",
        ) from error


def pin_revisions(published_manifest: Manifest) -> Config:
    """Return the model's config with every revision as it was resolved, and with a folder to publish to."""
    config = {section: dict(values) for section, values in published_manifest.config.items()}
    if references.is_hub_model(published_manifest.base.model):
        config.setdefault("base", {})["revision"] = published_manifest.base.revision
    if not published_manifest.dataset.sha256:
        config.setdefault("data", {})["revision"] = published_manifest.dataset.revision
    config["publish"] = config.get("publish", {}) | {"repo": "./hub/{run}", "tag": None}
    return config


def confirm_reproduction(
    reproduction: Reproduction, provider: Provider, machine: Machine, options: LaunchOptions
) -> None:
    """Ask the user to confirm hours and price, and note the answer in agreed.json.

    The same machine is asked about once, and the laptop itself never.
    """
    agreed_file = reproduction.folder / "agreed.json"
    terms = {"where": provider.label, "cards": list(machine.gpu_names)}
    if provider.is_local:
        return
    was_confirmed = agreed_file.is_file() and files.read_json(agreed_file) == terms
    hours, dollars = estimate_cost(reproduction.manifest, machine)
    hours_text = f"about {format_duration(3600 * hours)} of training" if hours else "hours not known"
    price_text = f" and ${dollars:.2f}" if dollars is not None else ", price not known"
    summary = (
        f"{reproduction.repo} again on {provider.label}: {hours_text}{price_text}, set-up and downloads not counted"
    )
    confirm_cost(summary, dollars, options.max_dollars, options.assume_yes or was_confirmed)
    files.write_json(agreed_file, terms)


def estimate_cost(published_manifest: Manifest, machine: Machine) -> tuple[float | None, float | None]:
    """Return (hours, dollars) of a training, from the time that it took before and the speed of the two GPUs.

    Both are None when only one of the two GPUs is in configs/gpus.csv, or when that time is not known; dollars are None
    when neither GPU is there.
    """
    seconds = published_manifest.training.get("seconds")
    old_gpu = gpu_table.find_gpu(str(published_manifest.training.get("device", "")))
    new_gpu = gpu_table.find_gpu(machine.gpu_names[0]) if machine.gpu_names else None
    if not isinstance(seconds, int | float) or (new_gpu is None) != (old_gpu is None):
        return None, None
    hours = seconds / 3600 * (old_gpu.tflops / new_gpu.tflops if new_gpu and old_gpu else 1)
    return hours, hours * new_gpu.dollars_per_hour if new_gpu else None


def refuse_different_rows(reproduction: Reproduction, provider: Provider, job: Job) -> None:
    """Raise UserError when the rows made there, or the base model, differ from the published ones."""
    record = fetch_result.read_remote_record(provider, job.name, job.run_name, DataRecord)
    if differences := list_data_differences(reproduction.manifest, record):
        raise UserError(
            f"{reproduction.manifest.name}: the same code and sources give different rows; nothing was trained:\n  "
            + "\n  ".join(differences),
            f"read runs/{job.run_name}/data/rejected.jsonl in {job.name} on {provider.label}, "
            "and check that the data set's revision has not changed",
            code="data.not_reproduced",
        )


def list_data_differences(published_manifest: Manifest, record: DataRecord) -> list[str]:
    """Return how rows and base model of a record differ from the published ones; empty when they are the same."""
    dataset, base = published_manifest.dataset, published_manifest.base
    pairs = (("held-out rows", dataset.split_hash, "heldout"), ("training rows", dataset.train_sha256, "train"))
    differences = [
        f"{title}: {published_sha256[:12]} published, {record.outputs[output].sha256[:12]} now"
        for title, published_sha256, output in pairs
        if published_sha256 and published_sha256 != record.outputs[output].sha256
    ]
    differences += [
        f"rows {kind}: {dataset.rows.get(kind)} published, {count} now"
        for kind, count in record.rows.model_dump().items()
        if dataset.rows.get(kind) != count
    ]
    if record.base.revision != base.revision:
        differences.append(f"base model: {base.revision} published, {record.base.revision} now")
    return differences


def read_new_manifest(provider: Provider, job: Job) -> Manifest:
    """Return the manifest of the model that the job made."""
    repo = fetch_result.read_remote_record(provider, job.name, job.run_name, PublishRecord).repo
    path = f"{repo}/{manifest.FILE_NAME}"
    return manifest.parse_manifest(fetch_result.read_remote_file(provider, job.name, path), f"{provider.label}:{path}")
