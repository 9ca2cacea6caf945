"""The Hugging Face Hub for both sides: repo ids, timeouts, retries, and errors as messages for the user.

The client is huggingface_hub. It waits for an answer without a limit, and it retries some calls but not others (commit,
create_tag, create_repo, the file itself). Here every call has a timeout and a limited time for retries.
The token comes from HF_TOKEN or `hf auth login`, is sent to the Hub's own host only, and appears in no message.
"""

import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from common import console
from common.errors import UserError, printable_line

if TYPE_CHECKING:
    from httpx import Client
    from huggingface_hub import DatasetInfo, HfApi, KernelInfo, ModelInfo, SpaceInfo
    from huggingface_hub.hf_api import RepoSibling

T = TypeVar("T")
REPO_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
REVISION_PATTERN = re.compile(r"[A-Za-z0-9][\w./-]{0,127}")
MAX_RETRY_PAUSE = 30  # seconds between two attempts at most
QUICK_RETRY_SECONDS = 2  # seconds of retry pauses where nothing is lost yet, so that a missing network is reported soon
CONNECT_TIMEOUT = 3  # seconds until a connection is accepted
# Statuses that go away by themselves. 501 (not implemented) and 507 (no storage) do not.
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
attempts = 0  # calls tried by this process; a watchdog sees by it that the process is not stuck


class TransientError(Exception):
    """A failure that a new request may cure: a signed address has expired, or a wrong part of a file was sent."""


class Unreachable(UserError):
    """The Hub cannot be reached: there is no network, or it is down."""


def timeout_seconds() -> float:
    """Return the seconds without a byte after which a connection times out: $FERRY_SILENCE_SECONDS, by default 60."""
    return seconds_from_environment("FERRY_SILENCE_SECONDS", 60)


def max_retry_seconds() -> float:
    """Return the seconds of pauses that a failing call is retried for: $FERRY_HUB_SECONDS, by default 300."""
    return seconds_from_environment("FERRY_HUB_SECONDS", 300)


def seconds_from_environment(name: str, default: float) -> float:
    """Return a time limit from the environment. Raise UserError when it is not a number."""
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"{name}={printable_line(text)} is not a number of seconds",
            f"unset {name}, or set it to a number",
            code="environment.not_a_number",
        ) from None


def is_folder(repo: str) -> bool:
    """Return whether `repo` names a folder: it exists or looks like a path. Everything else is taken for a Hub id."""
    if repo.startswith((".", "/", "~", "file://")):
        return True
    # A folder in the working directory does not hide a Hub repo of the same name, unless it has a manifest.
    return os.path.exists(Path(repo) / "manifest.json" if REPO_ID_PATTERN.fullmatch(repo) else repo)


def is_existing_folder(repo: str) -> bool:
    """Return whether `repo` names a folder that exists."""
    return is_folder(repo) and os.path.exists(folder_path(repo))


def folder_path(repo: str) -> Path:
    """Return the path of a folder hub. Raise UserError when it begins with `~name`, and there is no such user."""
    try:
        return Path(repo.removeprefix("file://")).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"REPO {printable_line(repo)}: {error}", "write the path of the folder", code="file.unknown_user"
        ) from None


def parse_repo_id(repo: str) -> tuple[str, str | None]:
    """Return (id, revision or None) of owner/name[@revision]. Raise UserError for any other text."""
    name, _, revision = repo.partition("@")
    if (
        not REPO_ID_PATTERN.fullmatch(name)
        or (revision and not REVISION_PATTERN.fullmatch(revision))
        or ".." in repo
        or repo.endswith("@")
    ):
        raise UserError(
            f"REPO {printable_line(repo)}: no such folder, and not a Hub id",
            "write owner/name or owner/name@tag for the Hub, ./folder for a folder hub",
            code="hub.bad_repo_id",
        )
    return name, revision or None


def create_client() -> "HfApi":
    """Return a client of the Hub with timeouts. Raise UserError when HF_ENDPOINT is not an address."""
    refuse_bad_endpoint()
    import logging

    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils import set_client_factory

    hub_logging.set_verbosity(logging.ERROR)  # its own messages contain signed URLs
    set_client_factory(_create_http_client)
    return HfApi(library_name="ferry")


def _create_http_client() -> "Client":
    """Return huggingface_hub's own client of HTTP, with timeouts."""
    from huggingface_hub.utils._http import default_client_factory

    client, seconds = default_client_factory(), timeout_seconds()
    # (connect, read, write, pool). A tuple, because huggingface_hub 2 has the client of httpx2, which does not take an
    # httpx.Timeout.
    client.timeout = (min(CONNECT_TIMEOUT, seconds), seconds, seconds, seconds)
    return client


def refuse_bad_endpoint() -> None:
    """Raise UserError when HF_ENDPOINT is not an address: with some values huggingface_hub cannot be imported."""
    from urllib.parse import urlsplit

    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        url_parts = urlsplit(url)
        is_valid = url_parts.scheme in ("http", "https") and url_parts.hostname and (url_parts.port or 1)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise UserError(
            f"HF_ENDPOINT={printable_line(url)} is not the address of a Hub",
            "unset HF_ENDPOINT, or correct it",
            code="hub.bad_endpoint",
        )


def read_token() -> str | None:
    """Return the Hub's token, None when there is none. Raise UserError when it cannot be sent in a header."""
    from huggingface_hub import get_token

    hub_token = get_token()
    if hub_token and not (hub_token.isascii() and hub_token.isprintable()):
        raise UserError("the Hub token contains characters that no token has", LOGIN_HINT, code="hub.bad_token")
    return hub_token


def request_headers() -> dict[str, str]:
    """Return the headers, with the token, of a request to the Hub's own host; never send them to another one."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(library_name="ferry")


def is_hub_url(url: str) -> bool:
    """Return whether a URL leads to the Hub that the token is for."""
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    hub_url, target_url = urlsplit(constants.ENDPOINT), urlsplit(url)
    return (hub_url.scheme, hub_url.netloc) == (target_url.scheme, target_url.netloc)


def read_small_file(repo: str, name: str, revision: str | None, max_bytes: int, repo_type: str = "model") -> bytes:
    """Return the content of a file of at most `max_bytes` bytes, whatever size the server claims.

    Raises:
        UserError: the file is larger. Errors of the client are passed on.
    """
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import hf_raise_for_status

    content = bytearray()
    headers = request_headers() | {"Accept-Encoding": "identity"}
    with get_session().stream(
        "GET", hf_hub_url(repo, name, revision=revision, repo_type=repo_type), headers=headers
    ) as response:
        hf_raise_for_status(response)
        for block in response.iter_raw():
            content += block
            if len(content) > max_bytes:
                raise UserError(
                    f"{repo}/{name} is larger than {max_bytes} bytes",
                    "check that this is the right repo, or ask its publisher",
                    code="hub.file_too_large",
                )
    return bytes(content)


def retry(
    action: str,
    call: Callable[[], T],
    retry_statuses: tuple[int, ...] = (),
    retry_seconds: float | None = None,
    progress: Callable[[], float] = lambda: 0,
) -> T:
    """Return `call()`; while it fails with a transient error, repeat it after growing pauses.

    Args:
        action: what the call does, for messages, such as "publish to you/model".
        retry_statuses: further HTTP statuses that are worth another attempt.
        retry_seconds: all pauses together, at most; None: `max_retry_seconds()`.
        progress: a number; whenever it has grown, the time for pauses starts again.

    Raises:
        UserError: any failure of the Hub or the network.
    """
    global attempts
    remaining_seconds, base_pause, last_progress = (
        max_retry_seconds() if retry_seconds is None else min(retry_seconds, max_retry_seconds()),
        1.0,
        progress(),
    )
    while True:
        attempts += 1
        try:
            return call()
        except Exception as error:
            if (cause := _find_hub_error(error)) is None:
                raise
            if progress() > last_progress:
                remaining_seconds, base_pause, last_progress = max_retry_seconds(), 1.0, progress()
            pause = _retry_after_seconds(cause) or base_pause * random.uniform(0.5, 1.5)
            if not _is_transient(cause, retry_statuses) or pause > remaining_seconds:
                raise translate_hub_error(cause, action) from error
        print_message(f"{action}: {_describe_error(cause)}; retrying in {pause:.0f} s")
        time.sleep(pause)
        remaining_seconds, base_pause = remaining_seconds - pause, min(base_pause * 2, MAX_RETRY_PAUSE)


def fill_placeholders(repo: str, run: str | None) -> str:
    """Return `repo` with {run} and {user} filled in. Raise UserError when the Hub does not know the user."""
    repo = repo.replace("{run}", run) if run else repo
    if "{user}" in repo:
        client = create_client()
        repo = repo.replace("{user}", retry("read your user name from the Hub", client.whoami)["name"])
    return repo


def find_foreign_files(repo_info: "ModelInfo | DatasetInfo | SpaceInfo | KernelInfo", index: str) -> list[str]:
    """Return files which show that a repo serves another purpose.

    The list is empty where the file `index` is among them, or where there is only what a new repo may hold.
    """
    names = sorted(list_repo_files(repo_info))
    return [] if index in names else [name for name in names if name not in (".gitattributes", "README.md")]


def list_repo_files(repo_info: "ModelInfo | DatasetInfo | SpaceInfo | KernelInfo") -> set[str]:
    """Return the names of a repo's files as the Hub lists them; none for a kernel, whose answer has no list."""
    siblings: list[RepoSibling] = getattr(repo_info, "siblings", None) or []
    return {sibling.rfilename for sibling in siblings}


def fetch_or_none(action: str, call: Callable[[], T]) -> T | None:
    """Return `call()` with short retries, or None where the Hub has no such repo."""
    from huggingface_hub.errors import RepositoryNotFoundError

    def call_or_none() -> T | None:
        try:
            return call()
        except RepositoryNotFoundError:
            return None

    return retry(action, call_or_none, retry_seconds=QUICK_RETRY_SECONDS)


def print_message(text: str) -> None:
    """Print a line about the work on stderr, without tokens and signed addresses."""
    console.print_message(redact_secrets(text))


def _find_hub_error(error: BaseException | None) -> BaseException | None:
    """Return the error of Hub or network behind an exception, or None.

    huggingface_hub wraps the errors of uploads in a RuntimeError.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    known_types = (
        HTTPError,
        OfflineModeIsEnabled,
        LocalTokenNotFoundError,
        HFValidationError,
        TransientError,
        json.JSONDecodeError,
    )
    while error is not None and not isinstance(error, known_types):
        error = error.__cause__
    return error


def translate_client_error(error: Exception, action: str) -> UserError:
    """Return a failed call of the client as a UserError; raise `error` again when Hub, network and disk are fine."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error if isinstance(error, LocalEntryNotFoundError) else _find_hub_error(error)
    if cause is not None:
        return translate_hub_error(cause, action)
    if isinstance(error, OSError):
        return UserError(
            f"{action}: the download failed: {redact_secrets(str(error))}",
            STATUS_HINTS[None],
            code="hub.download_failed",
        )
    raise error


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status of the answer behind an error; None when there was no answer."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _is_transient(error: BaseException, retry_statuses: tuple[int, ...]) -> bool:
    """Return whether another attempt may succeed."""
    from huggingface_hub.errors import HTTPError

    code = http_status(error)
    if isinstance(error, HTTPError):
        return code is None or code in TRANSIENT_STATUSES or code in retry_statuses
    return isinstance(error, TransientError)


def _retry_after_seconds(error: BaseException) -> float | None:
    """Return the seconds that the Hub asks to wait (Retry-After), or None."""
    response = getattr(error, "response", None)
    retry_after = response.headers.get("retry-after", "") if response is not None else ""
    return float(retry_after) if retry_after.isascii() and retry_after.isdecimal() else None


def translate_hub_error(error: BaseException, action: str) -> UserError:
    """Return a failure of Hub or network as a UserError.

    A missing token, terms that are not accepted, no network and a wrong address are four errors with four cures.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return translate_hub_error(error.__cause__, action)  # the error itself only adds that the cache has no copy
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return Unreachable(
            f"{action}: HF_HUB_OFFLINE is set, and it is not in the local cache",
            "unset HF_HUB_OFFLINE, then run the same command again",
            code="hub.offline",
        )
    if isinstance(error, LocalTokenNotFoundError):
        return UserError(f"{action}: no Hub token is set", LOGIN_HINT, code="hub.no_token")
    if isinstance(error, json.JSONDecodeError):
        return Unreachable(f"{action}: {endpoint()} answers, but is not a Hub", ENDPOINT_HINT, code="hub.not_a_hub")
    if isinstance(error, HFValidationError):
        return UserError(
            f"{action}: {_describe_error(error)}",
            "correct the name: a Hub id has the form owner/name",
            code="hub.bad_repo_id",
        )
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{action}: the repo is gated, and this account has not accepted its terms",
            f"accept them on its page on the Hub, {endpoint()} (and `hf auth login`), then run the same command again",
            code="hub.gated",
        )
    if isinstance(error, RepositoryNotFoundError) and read_token() is None:
        return UserError(
            f"{action}: it does not exist on the Hub or is private, and no Hub token is set",
            LOGIN_HINT,
            code="hub.not_found_without_token",
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{action}: no such revision", "name a branch, tag or commit of the repo", code="hub.revision_not_found"
        )
    if http_status(error) is None and os.environ.get("HF_ENDPOINT") and _is_transient(error, ()):
        return Unreachable(
            f"{action}: no answer from HF_ENDPOINT={endpoint()}: {_describe_error(error)}",
            ENDPOINT_HINT,
            code="hub.endpoint_unreachable",
        )
    error_type, status = Unreachable if _is_transient(error, ()) else UserError, _status_or_missing(error)
    return error_type(
        f"{action}: {_describe_error(error)}",
        STATUS_HINTS.get(status, "run the same command again"),
        code=STATUS_CODES.get(status, "hub.unexpected_status"),
    )


def endpoint() -> str:
    """Return the address of the Hub in use, as one printable line."""
    return printable_line(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", 100)


ENDPOINT_HINT = "unset HF_ENDPOINT, or correct it, then run the same command again"
LOGIN_HINT = "`hf auth login`, or set HF_TOKEN, then run the same command again"
STORAGE_HINT = "free storage on the Hub (https://huggingface.co/settings/billing), then run the same command again"
STATUS_HINTS = {
    None: "check the network, then run the same command again; what was already transferred is kept",
    401: LOGIN_HINT,
    402: STORAGE_HINT,
    403: "use a token that may do this (https://huggingface.co/settings/tokens), then run the same command again",
    404: "correct the name; a private repo needs a token that may read it: " + LOGIN_HINT,
    409: "choose another name, or run the same command again",
    412: "another process is writing to this repo: wait for it, then run the same command again",
    413: "the Hub does not accept a file of this size: choose a smaller quantization",
    429: "run the same command again in a few minutes",
}
STATUS_CODES = {
    None: "hub.unreachable",
    401: "hub.unauthorized",
    402: "hub.payment_required",
    403: "hub.forbidden",
    404: "hub.not_found",
    409: "hub.conflict",
    412: "hub.repo_changed",
    413: "hub.upload_too_large",
    429: "hub.rate_limited",
} | dict.fromkeys((408, 425, 500, 502, 503, 504), "hub.unavailable")
STATUS_MEANINGS = {
    401: "the Hub does not accept this token",
    402: "the Hub requires payment",
    403: "the Hub refuses",
    404: "it does not exist on the Hub or is private, and no token that may read it is set",
    412: "the repo changed in the meantime",
    413: "too large for the Hub",
    429: "too many requests",
}


def _status_or_missing(error: BaseException) -> int | None:
    """Return the HTTP status; 404 for a missing repo, for which the Hub answers 401 to a client without a token."""
    from huggingface_hub.errors import RepositoryNotFoundError

    return 404 if isinstance(error, RepositoryNotFoundError) else http_status(error)


def _describe_error(error: BaseException) -> str:
    """Return one line: what the status means, and what the Hub's answer says about it."""
    code = _status_or_missing(error)
    if isinstance(error, ValueError) and code is None:  # an invalid repo name
        return redact_secrets(str(error))
    if code is None:
        return redact_secrets(f"the Hub cannot be reached ({str(error).strip() or type(error).__name__})")
    server_message = " ".join((getattr(error, "server_message", None) or "").split())
    meaning = STATUS_MEANINGS.get(code, f"the Hub answers {code}")
    return redact_secrets(f"{meaning}{f' ({server_message})' if server_message else ''}")


def redact_secrets(text: str) -> str:
    """Return `text` as one printable line without tokens and without the queries of signed addresses."""
    from huggingface_hub import get_token

    for secret in filter(None, (get_token(), os.environ.get("HF_TOKEN"))):
        text = text.replace(secret, "hf_***")
    text = re.sub(r"\bhf_\w{4,}", "hf_***", text)
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?...", text)
    return printable_line(text)
