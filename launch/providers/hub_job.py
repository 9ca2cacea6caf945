"""What the providers that rent an instance for a job share: all that is sent and all that comes back is on the Hub."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common import files, hub
from common.errors import UserError, printable_line
from launch import job_script, source_archive
from launch.provider import ConnectionLost, Job, JobState, RemoteFileMissing
from pipeline.checkpoint_sync import snapshot

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi

T = TypeVar("T")
JobNote = dict[str, Any]  # a job.json: {"run", "config", "commit", "data"}; empty when there is none
JOB_FILE = "job.json"
REPO_README = (
    "---\ntags:\n- ferry\n---\n# Job of the Ferry run {run}\n\n"
    "Its code, config and data, for the machine that trains. Private. When the run has ended, it can be deleted.\n"
)


class HubJobProvider:
    """A provider that rents an instance for each job. Subclasses start, watch and stop jobs by the provider's API."""

    is_local: bool = False
    is_rented: bool = True

    def __init__(self, label: str, checkpoints: str):
        """Set the provider's name for messages, and owner/name of the repo that gets what the run makes."""
        self.label, self.checkpoints = label, checkpoints
        self.job_url = ""  # address of the job that send_job sent

    def send_job(self, job: Job) -> None:
        """Upload tree, config and data in one commit of a private data set repo."""
        api, repo = hub.create_client(), self.job_repo(job.name)
        description = f"the job to {repo}"
        hub.retry(description, lambda: api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True))
        commit = hub.retry(description, lambda: commit_job(api, repo, job), retry_statuses=(409, 412))
        self.job_url = f"{api.endpoint}/datasets/{repo}/resolve/{commit}/"

    def job_repo(self, job_name: str) -> str:
        """Return the repo for what is sent to the job: it has the owner of the checkpoints' repo."""
        return f"{self.checkpoints.split('/')[0]}/{job_name}-job"

    def build_task(self, job: Job, goal: str, variables: dict[str, str]) -> job_script.JobTask:
        """Return the task that runs `make <goal>` for a job that was sent."""
        settings = (*job.settings, f"CHECKPOINTS={self.checkpoints}")
        return job_script.build_task(replace(job, settings=settings), goal, variables, self.job_url)

    def read_job_state(self, job_name: str) -> JobState:
        """Return the state of the job, by the provider's word and by what is on the Hub.

        A result on the Hub means that the job ended well, even when the provider no longer knows it. A job that ended
        well without a result has died.
        """
        state, note = self.read_provider_state(job_name), self.fetch_job_note(job_name)
        if state.status == "absent" and self.has_result(note):
            state = JobState("ended", 0)
        elif state.exit_code == 0 and not self.has_result(note):
            state = JobState("died", reason="ended, and its result is not on the Hub")
        if state.status == "absent":
            return state
        config_sha256, commit = note.get("config", ""), note.get("commit", "")
        return replace(state, goal="train", config_sha256=config_sha256, commit=commit, log_bytes=None)

    def read_provider_state(self, job_name: str) -> JobState:
        """Return the state of the job as the provider reports it."""
        raise NotImplementedError

    def fetch_job_note(self, job_name: str) -> JobNote:
        """Return the job.json that was sent; empty when nothing was."""
        try:
            return parse_job_note(self.read_hub_file("dataset", self.job_repo(job_name), JOB_FILE))
        except RemoteFileMissing:
            return {}

    def has_result(self, note: JobNote) -> bool:
        """Return whether the Hub has the result of the run that this job.json describes."""
        try:
            content = self.read_hub_file("model", self.checkpoints, snapshot.STATE_FILE)
        except RemoteFileMissing:
            return False
        state = snapshot.parse_state(content, self.checkpoints)
        return snapshot.RESULT_FILE in state.files and state.config == note.get("config")

    def read_file(self, job_name: str, path: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the log as the provider kept it, or a record from the checkpoints' repo."""
        if path == "job/log":
            yield from skip_bytes(self.stream_log(job_name, follow=False), offset)
        else:
            yield self.read_hub_file("model", self.checkpoints, path.rsplit("/", 1)[-1])[offset:]

    def read_hub_file(self, repo_type: str, repo: str, path: str) -> bytes:
        """Return a small file of a repo. Raise RemoteFileMissing, and ConnectionLost when the Hub is unreachable."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        def read_if_exists() -> bytes | None:
            try:
                return hub.read_small_file(repo, path, "main", snapshot.MAX_STATE_BYTES, repo_type)
            except (EntryNotFoundError, RepositoryNotFoundError):
                return None

        content = call_hub(lambda: hub.retry(f"{repo}/{path}", read_if_exists, retry_seconds=hub.QUICK_RETRY_SECONDS))
        if content is None:
            raise RemoteFileMissing(f"{repo} has no {path}", "read the job's log", code="job.file_missing")
        return content

    def stream_log(self, job_name: str, follow: bool) -> Iterator[bytes]:
        """Yield the job's log from its beginning: what there is now, or with `follow` all until the job ends."""
        raise NotImplementedError

    def pack_run(self, job_name: str, run_name: str) -> Iterator[bytes]:
        raise RemoteFileMissing(
            f"{self.label} keeps no files of a job",
            f"the files of {run_name} are in {self.checkpoints}",
            code="provider.keeps_no_files",
        )

    def teardown_command(self, job_name: str) -> str | None:
        return None

    def describe_kept_repos(self, job_name: str) -> str:
        """Return a sentence on the repos that stay on the Hub after the job."""
        return (
            f"{self.job_repo(job_name)} (code and data) and {self.checkpoints} (checkpoints) stay on the Hub, private, "
            "until you delete them: "
            f"`hf repos delete {self.job_repo(job_name)} --type dataset`, `hf repos delete {self.checkpoints}`"
        )


def call_hub(call: Callable[[], T]) -> T:
    """Return `call()`. Raise ConnectionLost when the Hub cannot be reached now."""
    try:
        return call()
    except hub.Unreachable as error:
        raise ConnectionLost(error.message, error.hint, code=error.code) from error


def skip_bytes(blocks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Yield the blocks without their first `count` bytes."""
    for block in blocks:
        if block[count:]:
            yield block[count:]
        count = max(0, count - len(block))


def parse_job_note(content: bytes) -> JobNote:
    """Return the fields of a job.json; empty when Ferry did not write it."""
    try:
        note = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    is_note = isinstance(note, dict) and all(isinstance(note.get(key), str) for key in ("run", "config", "commit"))
    return note if is_note else {}


def read_job_note(repo: str, revision: str, run_name: str) -> JobNote:
    """Return the fields of a repo's job.json. Raise UserError when it does not describe a job of this run."""
    note = parse_job_note(hub.read_small_file(repo, JOB_FILE, revision, snapshot.MAX_STATE_BYTES, "dataset"))
    if not note:
        raise UserError(
            f"{repo} was not created by Ferry: its {JOB_FILE} describes no job",
            "RUN=another-name",
            code="job.foreign_repo",
        )
    if note["run"] != run_name:
        raise UserError(
            f"{repo} holds the job of the run {printable_line(note['run'])}, this one is {run_name}",
            "RUN=another-name",
            code="job.repo_of_other_run",
        )
    return note


def list_note_files(note: JobNote) -> set[str]:
    """Return the names of a job's data files in its repo; empty for a job.json of an older Ferry, which has none."""
    names = note.get("data")
    return {n for n in names if isinstance(n, str) and n.startswith("data/")} if isinstance(names, list) else set()


def commit_job(api: "HfApi", repo: str, job: Job) -> str:
    """Commit a job to its repo and return the id of the commit; data files of an earlier job are deleted.

    Raise UserError when the repo is public or is not a repo of jobs.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_info = api.dataset_info(repo)
    assert repo_info.sha, "the Hub names the commit of a repo that it describes"
    refuse_foreign_repo(repo, repo_info)
    names = hub.list_repo_files(repo_info)
    old_data = list_note_files(read_job_note(repo, repo_info.sha, job.run_name)) if JOB_FILE in names else set()
    job_files = build_job_files(job)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in job_files.items()
    ]
    operations += [CommitOperationDelete(name) for name in sorted(old_data & names - job_files.keys())]
    return api.create_commit(
        repo, operations, repo_type="dataset", commit_message=job.commit[:12], parent_commit=repo_info.sha
    ).oid


def refuse_foreign_repo(repo: str, repo_info: "DatasetInfo") -> None:
    """Raise UserError when a repo for jobs is public, or has files that are not a job's."""
    if not repo_info.private:
        raise UserError(
            f"{repo} is public, and a job contains your data",
            "make it private on the Hub, or RUN=another-name",
            code="job.public_repo",
        )
    if foreign_names := hub.find_foreign_files(repo_info, JOB_FILE):
        raise UserError(
            f"{repo} was not created by Ferry: it contains {', '.join(foreign_names[:4])}",
            "RUN=another-name",
            code="job.foreign_repo",
        )


def build_job_files(job: Job) -> dict[str, bytes | Path]:
    """Return name in the job's repo -> content, or local file, of all that is sent for a job."""
    data: dict[str, bytes | Path] = {f"data/{name}": path for name, path in job.files.items()}
    data_listing = [{"path": name, "sha256": files.sha256(path)} for name, path in sorted(job.files.items())]
    config_sha256 = files.sha256_bytes(job.config.encode())
    note = {"run": job.run_name, "config": config_sha256, "commit": job.commit, "data": sorted(data)}
    return {
        "job.tar": source_archive.build_archive(job, {"job/data.json": json.dumps(data_listing)}),
        JOB_FILE: json.dumps(note, indent=1).encode(),
        "README.md": REPO_README.format(run=job.run_name).encode(),
    } | data
