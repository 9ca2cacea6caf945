"""Find Ollama's server, start it, and use its HTTP API."""

import contextlib
import http.client
import ipaddress
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import files, hub
from common.errors import UserError, printable_line
from contract.chat_format import ChatMessage

MAC_APP = Path("/Applications/Ollama.app")
SERVICE_MODELS = Path("/usr/share/ollama/.ollama/models")  # of the service on Linux, which has a home folder of its own
BREW_HINT = "brew install ollama, or " if sys.platform == "darwin" else ""
INSTALL_HINT = f"{BREW_HINT}https://ollama.com/download"
ANSWER_TIMEOUT = 600  # seconds: the first request loads the model, perhaps from a cold disk
# While it makes its copy, Ollama needs 2.9 times the file's size (measured).
DISK_HINT = (
    "free disk space where Ollama keeps its models (OLLAMA_MODELS): three times the file's size, "
    "then run the same command again"
)
RETRY_HINT = "run the same command again; `ollama list` and Ollama's log say more"


class OllamaUnavailable(UserError):
    """Ollama is not installed, or no server runs; the other apps can be used without it."""


def find_command() -> str | None:
    """Return the path of the `ollama` command, also of the one inside the app; None without it."""
    app_command = MAC_APP / "Contents" / "Resources" / "ollama"
    return shutil.which("ollama") or (str(app_command) if os.access(app_command, os.X_OK) else None)


def server_url() -> str:
    """Return the address of the server, from OLLAMA_HOST as Ollama itself reads it (envconfig/config.go)."""
    setting = os.environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    scheme, has_scheme, rest = setting.partition("://")
    scheme, rest = (scheme, rest) if has_scheme else ("http", setting)
    default_port = {"http": 80, "https": 443}.get(scheme, 11434) if has_scheme else 11434
    address, _, path = rest.partition("/")
    name, port = _split_address(address)
    # a server listens at these addresses, but clients need the loopback one
    name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)
    port_number = int(port) if port.isdecimal() and int(port) <= 65535 else default_port
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port_number}{f'/{path}' if path else ''}".rstrip("/")


def _split_address(address: str) -> tuple[str, str]:
    """Return (host, port or ''). An IPv6 address may be in brackets."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(address.strip("[]"))), ""
    name, _, port = address.rpartition(":")
    return (name.strip("[]"), port) if _ else (address, "")


def is_local(url: str) -> bool:
    """Return whether the server is on this machine."""
    with contextlib.suppress(ValueError):
        name = urlsplit(url).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    return False


def server_port(url: str) -> int | None:
    """Return the port of an address that `server_url` returned; None when it has none."""
    with contextlib.suppress(ValueError):
        return urlsplit(url).port
    return None


def find_server_version() -> str | None:
    """Return the version of the server that answers; None when none does.

    It uses the standard library, because the doctor may run before httpx is installed.
    """
    handlers = [urllib.request.ProxyHandler({})] if is_local(server_url()) else []  # a proxy is for other machines
    try:
        with urllib.request.build_opener(*handlers).open(f"{server_url()}/api/version", timeout=5) as response:
            return str(json.loads(response.read(4096))["version"])
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return None


class Server:
    """A client of Ollama's HTTP API (docs/api.md), as far as Ferry uses it."""

    def __init__(self, url: str):
        self.url = url

    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float = 60
    ) -> dict[str, Any]:
        """Send a request and return the JSON of the response; {} when it is empty.

        Raise UserError when the server does not answer or answers with an error.
        """
        import httpx

        try:
            # A proxy of the environment is for other machines.
            with httpx.Client(timeout=httpx.Timeout(seconds, connect=5), trust_env=not is_local(self.url)) as client:
                response = client.request(method, self.url + path, json=body)
                content = response.json() if response.content.strip() else {}
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise UserError(
                f"Ollama at {self.url} does not answer {path}: {printable_line(str(error)) or type(error).__name__}",
                "check that its server runs (`ollama serve`, or open the app), then run the same command again",
                code="ollama.no_answer",
            ) from error
        if response.is_error or not isinstance(content, dict):
            reason = str(content.get("error") if isinstance(content, dict) else content)
            raise server_error(
                f"Ollama at {self.url} answers {path} with {response.status_code}: {printable_line(reason)}",
                reason,
                code="ollama.error_response",
            )
        return content

    def read_header(self, model: str) -> dict[str, Any]:
        """Return the key-values of a model's GGUF; {} when the server does not return them."""
        try:
            return self.request("POST", "/api/show", {"model": model}).get("model_info") or {}
        except UserError:
            return {}

    def list_models(self) -> dict[str, dict[str, Any]]:
        """Return {name:tag: facts of the model (digest, size, modified_at)}."""
        entries = self.request("GET", "/api/tags").get("models") or []
        return {model["name"]: model for model in entries}

    def render_prompt(self, model: str, messages: Sequence[ChatMessage]) -> str:
        """Return the text that the server renders from a conversation. Raise UserError when Ollama is too old."""
        body = {"model": model, "messages": list(messages), "stream": False, "_debug_render_only": True}
        response = self.request("POST", "/api/chat", body, ANSWER_TIMEOUT)
        try:
            return response["_debug_info"]["rendered_template"]
        except KeyError:
            raise UserError(
                f"Ollama {find_server_version()} does not report the prompts that it renders",
                "update Ollama: 0.12 or newer",
                code="ollama.too_old",
            ) from None

    def generate_answer(self, model: str, message: str, max_tokens: int) -> dict[str, Any]:
        """Let the model answer a message greedily with at most `max_tokens` tokens; return the JSON of /api/chat."""
        options = {"temperature": 0, "num_predict": max_tokens, "seed": 0}
        body = {"model": model, "messages": [{"role": "user", "content": message}], "stream": False, "options": options}
        return self.request("POST", "/api/chat", body, ANSWER_TIMEOUT)

    def copy_model(self, source: str, target: str) -> None:
        self.request("POST", "/api/copy", {"source": source, "destination": target})

    def delete_model(self, model: str) -> None:
        self.request("DELETE", "/api/delete", {"model": model})


def server_error(message: str, reason: str, code: str) -> UserError:
    """Return the error for a request that Ollama refused. reason: what Ollama says; a full disk has its own code."""
    if "no space left" in reason.lower() or "failed to validate gguf" in reason.lower():  # a full disk gives either
        return UserError(message, DISK_HINT, code="ollama.disk_full")
    return UserError(message, RETRY_HINT, code=code)


def models_folder() -> Path:
    """Return where a server on this machine keeps its models: OLLAMA_MODELS, else the default of Ollama's FAQ."""
    if setting := os.environ.get("OLLAMA_MODELS"):
        return Path(setting)
    return SERVICE_MODELS if os.path.isdir(SERVICE_MODELS) else Path.home() / ".ollama" / "models"


def measure_storage(server: Server) -> int:
    """Return the bytes that the server's models take: of its blobs where they can be read, else as it reports."""
    blobs = models_folder() / "blobs"
    if is_local(server.url) and os.access(blobs, os.R_OK | os.X_OK):
        return sum(path.stat().st_size for path in blobs.iterdir())
    return sum({facts["digest"]: int(facts.get("size", 0)) for facts in server.list_models().values()}.values())


def ensure_server(start: bool) -> Server:
    """Return the server that answers, or start one when that is allowed.

    start: whether it is allowed; otherwise the user is asked on a terminal. Raise OllamaUnavailable when Ollama is not
    installed, or no server answers and none may be started.
    """
    if find_server_version():
        return Server(server_url())
    command, url = find_command(), server_url()
    if command is None:
        raise OllamaUnavailable(
            f"Ollama is not installed, and no server answers at {url}", INSTALL_HINT, code="ollama.not_installed"
        )
    if not is_local(url):
        raise OllamaUnavailable(
            f"no Ollama server answers at {url} (OLLAMA_HOST)",
            "check that it runs there, or unset OLLAMA_HOST",
            code="ollama.host_unreachable",
        )
    if not (start or confirm_start(url)):
        raise OllamaUnavailable(
            f"Ollama is installed, but no server answers at {url}",
            "open the app or run `ollama serve`; or the same command with START=1 starts it",
            code="ollama.not_running",
        )
    return start_server(command, url)


def confirm_start(url: str) -> bool:
    """Ask on the terminal whether to start a server; return False when there is no terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"No Ollama server answers at {url}. Start it now? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def start_server(command: str, url: str) -> Server:
    """Start a server that keeps running after this command, with the app where there is one.

    Raise UserError when it does not answer within 60 seconds.
    """
    log = files.cache_dir() / "ollama.log"
    start_command = ["open", "-j", "-a", "Ollama"] if MAC_APP.is_dir() else [command, "serve"]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as log_file:
            process = subprocess.Popen(
                start_command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True
            )
    except OSError as error:
        raise UserError(
            f"`{' '.join(start_command)}` cannot be started: {error.strerror} ({error.filename})",
            f"install Ollama again: {INSTALL_HINT}",
            code="ollama.command_broken",
        ) from error
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (process.poll() or 0) > 0:
        if find_server_version():
            hub.print_message(
                f"ollama: started {' '.join(start_command)}, it keeps running (pid {process.pid}, log {log})"
            )
            return Server(url)
        time.sleep(0.2)
    raise UserError(
        f"`{' '.join(start_command)}` was started, but does not answer at {url}",
        f"read {log}",
        code="ollama.start_timeout",
    )
