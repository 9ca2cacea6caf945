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
from itertools import chain

from common import hub
from common.errors import UserError

MAX_ATTEMPTS = 3
PROGRESS_BAR_VARIABLES = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


def progress_timeout() -> float:
    """Return the timeout of an upload: seconds without progress after which its process is killed.

    By default 5 minutes, which is longer than the client's own retries take.
    """
    return 5 * hub.timeout_seconds()


def upload_folder(job: dict) -> dict:
    """Upload the folder of a job and return {repo, commit, tag}.

    Args:
        job: See pipeline/publish/upload_process.py.

    Raises:
        UserError: The Hub refuses the upload, or every attempt ended without a result.
    """
    # The child process takes its progress from the progress bars, so they must not be turned off.
    environment = {name: value for name, value in os.environ.items() if name not in PROGRESS_BAR_VARIABLES}
    for attempt in range(MAX_ATTEMPTS):
        message = _run_upload_process(job, environment | ({"HF_HUB_DISABLE_XET": "1"} if attempt else {}))
        if "result" in message:
            return message["result"]
        if "error" in message:
            text, hint, code = message["error"]
            raise UserError(text, hint, code=code)
        if attempt < MAX_ATTEMPTS - 1:
            hub.print_message(f"publish to {job['repo']}: {message['lost']}; retrying in a new process over plain LFS")
    raise UserError(
        f"publish to {job['repo']}: {message['lost']} ({MAX_ATTEMPTS} attempts)",
        hub.STATUS_HINTS[None],
        code="hub.upload_failed",
    )


def _run_upload_process(job: dict, environment: dict[str, str]) -> dict:
    """Run one upload process and return its last message: {result}, {error} or {lost: reason}."""
    command = [sys.executable, "-m", "pipeline.publish.upload_process"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        return _read_messages(process)
    finally:
        process.kill()
        process.wait()


def _read_messages(process: subprocess.Popen) -> dict:
    """Return the last message of an upload process, or {lost: reason} when it ended or made no progress."""
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in chain(process.stdout, [""])], daemon=True).start()
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


def _parse_message(line: str) -> dict:
    """Parse one line of the upload process. Any other output comes from a library and counts as progress."""
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    return message if isinstance(message, dict) else {"beat": 0}
