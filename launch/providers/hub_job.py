"""What all launchers that rent a machine for a job share: what goes there and what comes back lies on the Hub."""

import json
from collections.abc import Iterator

from common import files, hub
from common.errors import UserError, shown
from launch import job_script, source_archive
from launch.provider import Job, Lost, Missing, State
from pipeline.checkpoint_sync import snapshot as states

JOB = "job.json"
CARD = "---\ntags:\n- ferry\n---\n# Job of the Ferry run {run}\n\nIts code, config and data, for the machine that trains. Private. When the run has ended, it can be deleted.\n"


class Engine:
    """where: for messages. checkpoints: owner/name of the repo of what the run makes."""

    ours, rented = False, True

    def __init__(self, where: str, checkpoints: str):
        self.where, self.checkpoints = where, checkpoints
        self.sent = ""  # where the job lies

    def send(self, job: Job) -> None:
        """Tree, config and data, in one commit of a private data set repo."""
        api, repo = hub.api(), self.job_repo(job.name)
        what = f"the job to {repo}"
        hub.patiently(what, lambda: api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True))
        commit = hub.patiently(what, lambda: committed(api, repo, job), again=(409, 412))
        self.sent = f"{api.endpoint}/datasets/{repo}/resolve/{commit}/"

    def job_repo(self, name: str) -> str:
        return f"{self.checkpoints.split('/')[0]}/{name}-job"

    def task(self, job: Job, goal: str, passed: dict[str, str]) -> job_script.Task:
        settings = (*job.settings, f"CHECKPOINTS={self.checkpoints}")
        return job_script.of(Job(**(vars(job) | {"settings": settings})), goal, passed, self.sent)

    def state(self, name: str) -> State:
        """As the engine has it; a result on the Hub is a job that ended well, whether the engine remembers it or not."""
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
        """The job as the engine has it."""
        raise NotImplementedError

    def note(self, name: str) -> dict:
        """What was sent; empty when nothing was."""
        try:
            return parse_note(self.content("dataset", self.job_repo(name), JOB))
        except Missing:
            return {}

    def result(self, note: dict) -> bool:
        """Has the run of that note come to its end?"""
        try:
            state = states.parse(self.content("model", self.checkpoints, states.INDEX), self.checkpoints)
        except Missing:
            return False
        return states.RESULT in state.files and state.config == note.get("config")

    def rest(self, name: str, path: str, start: int = 0) -> Iterator[bytes]:
        """The log as the engine kept it, or a record from the repo."""
        if path == "job/log":
            yield from skipped(self.log(name, follow=False), start)
        else:
            yield self.content("model", self.checkpoints, path.rsplit("/", 1)[-1])[start:]

    def content(self, kind: str, repo: str, path: str) -> bytes:
        """A small file. Raises Missing, and Lost when the Hub cannot be reached."""
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
        """From its beginning. follow: until the job ends."""
        raise NotImplementedError

    def pack(self, name: str, run: str) -> Iterator[bytes]:
        raise Missing(f"{self.where} keeps nothing of a job", "what it made is in its repo of checkpoints")

    def teardown(self, name: str) -> str | None:
        return None

    def kept(self, name: str) -> str:
        """What stays when all is done."""
        return (
            f"{self.job_repo(name)} (code and data) and {self.checkpoints} (checkpoints) stay on the Hub, private, until you delete them: "
            f"`hf repos delete {self.job_repo(name)} --type dataset`, `hf repos delete {self.checkpoints}`"
        )


def reached(ask):
    """ask(); a Hub that cannot be reached now is Lost."""
    try:
        return ask()
    except hub.Unreachable as error:
        raise Lost(error.message, error.hint) from error


def skipped(blocks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Without the first `count` bytes."""
    for block in blocks:
        if block[count:]:
            yield block[count:]
        count = max(0, count - len(block))


def parse_note(content: bytes) -> dict:
    """Return what a job.json says: {"run", "config", "commit", "data"}; empty where no Ferry wrote it."""
    try:
        note = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    known = isinstance(note, dict) and all(isinstance(note.get(key), str) for key in ("run", "config", "commit"))
    return note if known else {}


def read_note(repo: str, revision: str, run: str) -> dict:
    """Return what the job.json of a repo says. Raises UserError where it is not that of a job of this run."""
    note = parse_note(hub.read_small(repo, JOB, revision, states.MOST, "dataset"))
    if not note:
        raise UserError(f"{repo} is a repo of something else: no Ferry wrote its {JOB}", "RUN=another-name")
    if note["run"] != run:
        raise UserError(f"{repo} holds the job of the run {shown(note['run'])}, this one is {run}", "RUN=another-name")
    return note


def data_of_note(note: dict) -> set[str]:
    """Return the names of that job's data files in its repo; none for an older Ferry's, which did not note them."""
    names = note.get("data")
    return {n for n in names if isinstance(n, str) and n.startswith("data/")} if isinstance(names, list) else set()


def committed(api, repo: str, job: Job) -> str:
    """The commit that holds the job. Raises UserError for a repo that is public or something else's."""
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
        "job.tar": source_archive.packed(job, {"job/data.json": json.dumps(listed)}), JOB: json.dumps(about, indent=1).encode(),
        "README.md": CARD.format(run=job.run).encode(),
    }  # fmt: skip
    operations = [CommitOperationAdd(name, content) for name, content in (written | data).items()]
    operations += [CommitOperationDelete(name) for name in sorted(old & names - data.keys())]
    return api.create_commit(
        repo, operations, repo_type="dataset", commit_message=job.commit[:12], parent_commit=head.sha
    ).oid
