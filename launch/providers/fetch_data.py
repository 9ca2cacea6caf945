"""Download a job's data to a rented instance, and check each file by its sha256.

It runs before there is an environment, so it uses the standard library only. $FERRY_JOB is the job's address on the
Hub, up to the last slash; job/data.json names the files: [{"path", "sha256"}].
"""

import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

TRIES = 5
PAUSE_SECONDS = 5  # seconds between two tries


def main():
    """Download every file that job/data.json lists."""
    with open("job/data.json", encoding="utf-8") as listing:
        for item in json.load(listing):
            fetch_file(item["path"], item["sha256"])


def fetch_file(path, sha256):
    """Download a file, with retries. End with exit code 2 when that fails or the file has another sha256."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    for tries_left in reversed(range(TRIES)):
        try:
            digest = download_file(path)
            if digest == sha256:
                return
            reason = "it is not the file that was sent: its sha256 differs"
        except (OSError, urllib.error.URLError) as error:
            reason = str(error)
        print(f"{path}: {reason}" + (f"; retrying in {PAUSE_SECONDS} s" if tries_left else ""), file=sys.stderr)
        time.sleep(PAUSE_SECONDS if tries_left else 0)
    sys.exit(2)


def download_file(path):
    """Download a file to the path and return its sha256."""
    request = urllib.request.Request(os.environ["FERRY_JOB"] + "data/" + urllib.parse.quote(path))
    # The header is not sent on a redirect: the storage has signed addresses and must not get the token.
    request.add_unredirected_header("Authorization", "Bearer " + os.environ["HF_TOKEN"])
    digest = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=60) as response, open(path, "wb") as file:
        while block := response.read(1 << 20):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
