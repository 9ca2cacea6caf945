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

from contract import hub
from contract.errors import UserError

TRIES = 3


def patience() -> float:
    """Seconds without progress after which a sender is given up: 5 minutes, beyond all that the client retries itself."""
    return 5 * hub.silence()


def send(job: dict) -> dict:
    """The sender's result for `job` (pipeline/publish/sender.py). Raises UserError when it cannot be done."""
    plain = os.environ.get("HF_HUB_DISABLE_XET")
    for attempt in range(TRIES):
        found = _sent(job, {"HF_HUB_DISABLE_XET": plain or "1"} if plain or attempt else {})
        if "result" in found:
            return found["result"]
        if "error" in found:
            raise UserError(*found["error"])
        hub.say(f"publish to {job['repo']}: {found['lost']}; again in a fresh process, over plain LFS")
    raise UserError(f"publish to {job['repo']}: {TRIES} tries ended without an answer", hub.HINTS[None])


def _sent(job: dict, settings: dict[str, str]) -> dict:
    """What one sender says last: {result}, {error} or {lost: why}."""
    command = [sys.executable, "-m", "pipeline.publish.sender"]
    sender = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | settings
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
    threading.Thread(target=lambda: [lines.put(line) for line in [*sender.stdout, ""]], daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=patience())
        except queue.Empty:
            return {"lost": f"no progress for {patience():.0f} s"}
        if not line:
            return {"lost": f"the sending process ended by itself (exit code {sender.wait()})"}
        said = json.loads(line)
        if "beat" not in said:
            return said
