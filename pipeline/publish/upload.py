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

TRIES = 3
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


def patience() -> float:
    """Return the timeout of an upload: seconds without progress after which its process is killed.

    By default 5 minutes, which is longer than the client's own retries take.
    """
    return 5 * hub.silence()


def send(job: dict) -> dict:
    """Upload the folder of a job and return {repo, commit, tag}.

    Args:
        job: See pipeline/publish/upload_process.py.

    Raises:
        UserError: The Hub refuses the upload, or every attempt ended without a result.
    """
    # The child process takes its progress from the progress bars, so they must not be turned off.
    settings = {name: value for name, value in os.environ.items() if name not in BARS}
    for attempt in range(TRIES):
        found = _sent(job, settings | ({"HF_HUB_DISABLE_XET": "1"} if attempt else {}))
        if "result" in found:
            return found["result"]
        if "error" in found:
            raise UserError(*found["error"])
        if attempt < TRIES - 1:
            hub.say(f"publish to {job['repo']}: {found['lost']}; again in a fresh process, over plain LFS")
    raise UserError(f"publish to {job['repo']}: {found['lost']}, {TRIES} times", hub.HINTS[None])


def _sent(job: dict, settings: dict[str, str]) -> dict:
    """Run one upload process and return its last message: {result}, {error} or {lost: reason}."""
    command = [sys.executable, "-m", "pipeline.publish.upload_process"]
    sender = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings, start_new_session=True
    )
    try:
        sender.stdin.write(json.dumps(job))
        sender.stdin.close()
        return _followed(sender)
    finally:
        sender.kill()
        sender.wait()


def _followed(sender: subprocess.Popen) -> dict:
    """Return the last message of an upload process, or {lost: reason} when it ended or made no progress."""
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in chain(sender.stdout, [""])], daemon=True).start()
    heard = ""
    while True:
        try:
            line = lines.get(timeout=patience())
        except queue.Empty:
            return {"lost": f"no progress for {patience():.0f} s{heard}"}
        if not line:
            return {"lost": f"the sending process ended by itself (exit code {sender.wait()})"}
        said = _word(line)
        if "beat" not in said:
            return said
        heard = f" (the client: {said['client']})" if said.get("client") else ""


def _word(line: str) -> dict:
    """Parse one line of the upload process. Any other output comes from a library and counts as progress."""
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {"beat": 0}
