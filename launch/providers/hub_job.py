"""What the providers that rent an instance for a job share: all that is sent and all that comes back is on the Hub."""

import json
from collections.abc import Iterator

from common import files, hub
from common.errors import UserError, shown
from launch import job_script, source_archive
from launch.provider import Job, Lost, Missing, State
from pipeline.checkpoint_sync import snapshot as states

JOB = "job.json"
CARD = (
    "---\ntags:\n- ferry\n---\n# Job of the Ferry run {run}\n\n"
    "Its code, config and data, for the machine that trains. Private. When the run has ended, it can be deleted.\n"
)


class Engine:
    """A provider that rents an instance for each job. Subclasses start, watch and stop jobs by the provider's API."""

    ours: bool = False
    rented: bool = True

    def __init__(self, where: str, checkpoints: str):
        """Set the provider's name for messages, and owner/name of the repo that gets what the run makes."""
        self.where, self.checkpoints = where, checkpoints
        self.sent = ""  # address of the job that send_job sent

    def send(self, job: Job) -> None:
        """Upload tree, config and data in one commit of a private data set repo."""
        api, repo = hub.api(), self.job_repo(job.name)
        what = f"the job to {repo}"
        hub.patiently(what, lambda: api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True))
        commit = hub.patiently(what, lambda: committed(api, repo, job), again=(409, 412))
        self.sent = f"{api.endpoint}/datasets/{repo}/resolve/{commit}/"

    def job_repo(self, name: str) -> str:
        """Return the repo for what is sent to the job: it has the owner of the checkpoints' repo."""
        return f"{self.checkpoints.split('/')[0]}/{name}-job"

    def task(self, job: Job, goal: str, passed: dict[str, str]) -> job_script.Task:
        """Return the task that runs `make <goal>` for a job that was sent."""
        settings = (*job.settings, f"CHECKPOINTS={self.checkpoints}")
        return job_script.of(Job(**(vars(job) | {"settings": settings})), goal, passed, self.sent)

    def state(self, name: str) -> State:
        """Return the state of the job, by the provider's word and by what is on the Hub.

        A result on the Hub means that the job ended well, even when the provider no longer knows it. A job that ended
        well without a result has died.
        """
        found, note = self.found(name), self.note(name)
        if found.word == "absent" and self.result(note):
            found = State("ended", 0)
        elif found.code == 0 and not self.result(note):
            found = State("died", why="ended, and its result is not on the Hub")
        if found.word == "absent":
            return found
        known = {"goal": "train", "config": note.get("config", ""), "commit": note.get("commit", ""), "log": None}
        return State(**(vars(found) | known))

    def found(self, name: str) -> State:
        """Return the state of the job as the provider reports it."""
        raise NotImplementedError

    def note(self, name: str) -> dict:
        """Return the job.json that was sent; empty when nothing was."""
        try:
            return parse_note(self.content("dataset", self.job_repo(name), JOB))
        except Missing:
            return {}

    def result(self, note: dict) -> bool:
        """Return whether the Hub has the result of the run that this job.json describes."""
        try:
            state = states.parse(self.content("model", self.checkpoints, states.INDEX), self.checkpoints)
        except Missing:
            return False
        return states.RESULT in state.files and state.config == note.get("config")

    def rest(self, name: str, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the log as the provider kept it, or a record from the checkpoints' repo."""
        if path == "job/log":
            yield from skipped(self.log(name, follow=False), start)
        else:
            yield self.content("model", self.checkpoints, path.rsplit("/", 1)[-1])[start:]

    def content(self, kind: str, repo: str, path: str) -> bytes:
        """Return a small file of a repo. Raises RemoteFileMissing, and ConnectionLost when the Hub is unreachable."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        def asked() -> bytes | None:
            try:
                return hub.read_small(repo, path, "main", states.MOST, kind)
            except (EntryNotFoundError, RepositoryNotFoundError):
                return None

        found = reached(lambda: hub.patiently(f"{repo}/{path}", asked, seconds=hub.QUICK))
        if found is None:
            raise Missing(f"{repo} holds no {path}", "see what the job's log says")
        return found

    def log(self, name: str, follow: bool) -> Iterator[bytes]:
        """Yield the job's log from its beginning: what there is now, or with `follow` all until the job ends."""
        raise NotImplementedError

    def pack(self, name: str, run: str) -> Iterator[bytes]:
        raise Missing(f"{self.where} keeps nothing of a job", "what it made is in its repo of checkpoints")

    def teardown(self, name: str) -> str | None:
        return None

    def kept(self, name: str) -> str:
        """Return a sentence on the repos that stay on the Hub after the job."""
        return (
            f"{self.job_repo(name)} (code and data) and {self.checkpoints} (checkpoints) stay on the Hub, private, "
            "until you delete them: "
            f"`hf repos delete {self.job_repo(name)} --type dataset`, `hf repos delete {self.checkpoints}`"
        )


def reached(ask):
    """Return `call()`. Raises ConnectionLost when the Hub cannot be reached now."""
    try:
        return ask()
    except hub.Unreachable as error:
        raise Lost(error.message, error.hint) from error


def skipped(blocks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Yield the blocks without their first `count` bytes."""
    for block in blocks:
        if block[count:]:
            yield block[count:]
        count = max(0, count - len(block))


def parse_note(content: bytes) -> dict:
    """Return the fields of a job.json: {"run", "config", "commit", "data"}; empty when Ferry did not write it."""
    try:
        note = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    known = isinstance(note, dict) and all(isinstance(note.get(key), str) for key in ("run", "config", "commit"))
    return note if known else {}


def read_note(repo: str, revision: str, run: str) -> dict:
    """Return the fields of a repo's job.json. Raises UserError when it does not describe a job of this run."""
    note = parse_note(hub.read_small(repo, JOB, revision, states.MOST, "dataset"))
    if not note:
        raise UserError(f"{repo} is a repo of something else: no Ferry wrote its {JOB}", "RUN=another-name")
    if note["run"] != run:
        raise UserError(f"{repo} holds the job of the run {shown(note['run'])}, this one is {run}", "RUN=another-name")
    return note


def data_of_note(note: dict) -> set[str]:
    """Return the names of a job's data files in its repo; empty for a job.json of an older Ferry, which has none."""
    names = note.get("data")
    return {n for n in names if isinstance(n, str) and n.startswith("data/")} if isinstance(names, list) else set()


def committed(api, repo: str, job: Job) -> str:
    """Commit a job to its repo and return the id of the commit; data files of an earlier job are deleted.

    Raises UserError when the repo is public or is not a repo of jobs.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.repo_info(repo, repo_type="dataset")
    names = {sibling.rfilename for sibling in head.siblings}
    if not head.private:
        raise UserError(
            f"{repo} is public, and a job holds your data", "make it private on the Hub, or RUN=another-name"
        )
    if strange := hub.strange(head, JOB):
        raise UserError(f"{repo} is a repo of something else: it holds {', '.join(strange[:4])}", "RUN=another-name")
    old = data_of_note(read_note(repo, head.sha, job.run)) if JOB in names else set()
    data = {f"data/{name}": path for name, path in job.files.items()}
    listed = [{"path": name, "sha256": files.sha256(path)} for name, path in sorted(job.files.items())]
    about = {"run": job.run, "config": files.sha256_bytes(job.config.encode()), "commit": job.commit}
    about |= {"data": sorted(data)}
    written = {
        "job.tar": source_archive.packed(job, {"job/data.json": json.dumps(listed)}),
        JOB: json.dumps(about, indent=1).encode(),
        "README.md": CARD.format(run=job.run).encode(),
    }
    operations = [CommitOperationAdd(name, content) for name, content in (written | data).items()]
    operations += [CommitOperationDelete(name) for name in sorted(old & names - data.keys())]
    return api.create_commit(
        repo, operations, repo_type="dataset", commit_message=job.commit[:12], parent_commit=head.sha
    ).oid
