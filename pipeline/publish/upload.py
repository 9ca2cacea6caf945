"""Sending a folder to the Hub: one commit with all of it, then a tag, then a look at what arrived.

The sending is done by a process of its own, because an upload over Xet can hang where no time limit reaches
(xet-core#883): it tells every second how far it is, and one that stands still is killed and replaced by a fresh one
that uses plain LFS. What is on the Hub already is not sent again.
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
    """Seconds without progress after which a sender is given up: 5 minutes, beyond all that the client retries itself."""
    return 5 * hub.silence()


def send(job: dict) -> dict:
    """The sender's result for `job` (pipeline/publish/upload_process.py). Raises UserError when it cannot be done."""
    # Bars are its signs of life: they must not be turned off.
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
    """What one sender says last: {result}, {error} or {lost: why}."""
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
    """Its last word, or that it stood still or died."""
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
    """What a library writes to stdout is no word of ours, but a sign of life."""
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {"beat": 0}
