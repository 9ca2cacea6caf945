"""Upload a folder to the Hub: one commit with all files, a comparison with what arrived, then a tag.

A child process uploads, because an upload over Xet can hang where no timeout applies (xet-core#883). The child process
reports its progress, at most once a second. When it reports none until the timeout, it is killed, and a new process
continues over plain LFS. Files that are on the Hub already are not sent again.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from typing import IO, Any, TypedDict

from common import hub
from common.errors import UserError

MAX_ATTEMPTS = 3
PROGRESS_BAR_VARIABLES = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


class UploadJob(TypedDict):
    """What an upload process gets."""

    folder: str
    """A complete repo."""
    repo: str
    """Its id on the Hub, owner/name."""
    private: bool
    tag: str | None


def progress_timeout() -> float:
    """Return the timeout of an upload: seconds without progress after which its process is killed.

    By default 5 minutes, which is longer than the client's own retries take.
    """
    return 5 * hub.timeout_seconds()


def upload_folder(job: UploadJob) -> dict[str, Any]:
    """Upload the folder of a job and return {repo, commit, tag}.

    Raises:
        UserError: The Hub refuses the upload, or every attempt ended without a result.
    """
    message = _run_upload_process(job, {})
    for _ in range(MAX_ATTEMPTS - 1):
        if "lost" in message:
            hub.print_message(f"publish to {job['repo']}: {message['lost']}; retrying in a new process over plain LFS")
            message = _run_upload_process(job, {"HF_HUB_DISABLE_XET": "1"})
    if "lost" in message:
        reason = f"publish to {job['repo']}: {message['lost']} ({MAX_ATTEMPTS} attempts)"
        raise UserError(reason, hub.STATUS_HINTS[None], code="hub.upload_failed")
    if "error" in message:
        text, hint, code = message["error"]
        raise UserError(text, hint, code=code)
    return message["result"]


def _run_upload_process(job: UploadJob, variables: dict[str, str]) -> dict[str, Any]:
    """Run one upload process and return its last message: {result}, {error} or {lost: reason}."""
    process = _start_upload_process(variables)
    assert process.stdin, "Popen makes a stream for each PIPE"
    try:
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        return _read_messages(process)
    finally:
        process.kill()
        process.wait()


def _start_upload_process(variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start an upload process with these environment variables, besides those of this process."""
    command = [sys.executable, "-m", "pipeline.publish.upload_process"]
    # It takes its progress from the progress bars, so they must not be turned off.
    environment = {name: value for name, value in os.environ.items() if name not in PROGRESS_BAR_VARIABLES} | variables
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def _read_messages(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the last message of an upload process, or {lost: reason} when it ended or made no progress."""
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_forward_lines, args=(process.stdout, lines), daemon=True).start()
    client_warning = ""
    while True:
        try:
            line = lines.get(timeout=progress_timeout())
        except queue.Empty:
            return {"lost": f"no progress for {progress_timeout():.0f} s{client_warning}"}
        if not line:
            return {"lost": f"the upload process ended without a result (exit code {process.wait()})"}
        message = _parse_message(line)
        if "beat" not in message:
            return message
        client_warning = f" (last warning: {message['client']})" if message.get("client") else ""


def _forward_lines(stream: IO[str], lines: "queue.Queue[str]") -> None:
    """Put the lines of a stream into a queue, and the empty text at the end."""
    for line in stream:
        lines.put(line)
    lines.put("")


def _parse_message(line: str) -> dict[str, Any]:
    """Parse one line of the upload process. Any other output comes from a library and counts as progress."""
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    return message if isinstance(message, dict) else {"beat": 0}
