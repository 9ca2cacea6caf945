"""serve: serve the pulled model with OpenAI's HTTP API, for the programs of this machine.

llama_cpp.server was tried and is not used. It cannot tell a sampling value that a request left out from its own default
(repeat_penalty 1.1 among them), continues answers after their client is gone, answers 200 to a streamed prompt that is
too long, accepts requests of every web page, and takes settings of the model from variables such as ROPE_FREQ_BASE.
"""

import asyncio
import contextlib
import errno
import functools
import hmac
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import UserError, printable_line
from deploy.serving import conversation, openai_api

LOCAL_HOSTS = ("127.0.0.1", "localhost")
LOCAL_ORIGINS = r"https?://(127\.0\.0\.1|localhost)(:\d+)?"  # web pages of this machine
MAX_BODY_BYTES = 8 << 20  # bytes; a context holds far less text
KEY_VARIABLE = "FERRY_API_KEY"
DISCONNECT_POLL = 0.1  # seconds between two checks whether the client is still connected


def run_server(version: Path, host: str = "127.0.0.1", port: int = 8080, context: int | None = None) -> None:
    """Serve until Ctrl-C.

    Args:
        version: A version that passed its smoke test.
        host: The address to listen on. Other machines can use any but the loopback one, so it needs FERRY_API_KEY.
        port: The port.
        context: The most tokens of context.

    Raises:
        UserError: The port cannot be opened, FERRY_API_KEY is missing or invalid, or a reason of
            `conversation.open_model`: a model that does not give the golden prompts is not served.
    """
    key = os.environ.get(KEY_VARIABLE)
    refuse_bad_key(host, key)
    with open_socket(host, port) as listener, conversation.open_model(version, context) as chat_model:
        print_greeting(chat_model, host, listener.getsockname()[1], key)
        with Api(chat_model).stop_workers_on_exit() as api:
            Server(api, build_app(api, host, key)).listen(listener)


def refuse_bad_key(host: str, key: str | None) -> None:
    """Raise UserError when other machines could send requests without a key, or no client can send the key."""
    if host not in LOCAL_HOSTS and not key:
        raise UserError(
            f"HOST={printable_line(host)} lets other machines send requests, and {KEY_VARIABLE} is not set",
            f"set {KEY_VARIABLE} to a secret (it is sent unencrypted: only for a network that you trust), "
            "or leave out HOST",
            code="serve.no_key",
        )
    if key and not key.isprintable():  # bytes that are not UTF-8 are not printable either
        raise UserError(
            f"{KEY_VARIABLE} has characters that an HTTP header cannot have",
            "choose one of letters and digits",
            code="serve.invalid_key",
        )


def run_server_as_child(version: str, host: str, port: int) -> None:
    """Run the server in this process, a child with limits. Its arguments are JSON."""
    run_server(Path(version), host, port)


def open_socket(host: str, port: int) -> socket.socket:
    """Open the socket to listen on. Raise UserError when that fails."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        raise port_error(host, port, error) from error


def port_error(host: str, port: int, error: Exception) -> UserError:
    """Return the error for a port that cannot be opened, with what to try."""
    reason = error.strerror if isinstance(error, OSError) else "that is not a host name"
    message = f"port {port} of {printable_line(host)} cannot be opened: {reason}"
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        other_port = port + 1 if port < 65535 else 8080
        hint = f"end the program that listens there, or use a different port: `make serve PORT={other_port}`"
        return UserError(message, hint, code="serve.port_in_use")
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM):
        return UserError(message, "use a port above 1023: `make serve PORT=8080`", code="serve.port_forbidden")
    hint = "HOST= takes an address of this machine; leave it out for 127.0.0.1"
    return UserError(message, hint, code="serve.invalid_host")


def print_greeting(chat_model: conversation.ChatModel, host: str, port: int, key: str | None) -> None:
    """Print the address of the server and an example request."""
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    print(f"serving {chat_model.manifest.name} at {address} (OpenAI-compatible), Ctrl-C ends")
    secret = f" -H 'Authorization: Bearer '\"${KEY_VARIABLE}\"" if key else ""
    print(f"  curl {address}/chat/completions -H 'Content-Type: application/json'{secret} \\")
    print("""    -d '{"messages": [{"role": "user", "content": "Hello"}]}'""", flush=True)


class Server(uvicorn.Server):
    """A uvicorn server on which Ctrl-C also cancels the answers in progress."""

    def __init__(self, api: "Api", app: ASGIApp):
        super().__init__(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=30))
        self.api = api

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.api.closing.set()
        super().handle_exit(sig, frame)

    def listen(self, listener: socket.socket) -> None:
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after its shutdown
            self.run(sockets=[listener])


class Api:
    """The endpoints. One thread uses the model and generates answers in the order of their requests."""

    def __init__(self, engine: conversation.ChatModel):
        self.engine, self.closing = engine, threading.Event()
        self.worker, self.renderer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    @contextlib.contextmanager
    def stop_workers_on_exit(self) -> Iterator["Api"]:
        """Stop both threads on exit; nothing uses the model afterwards."""
        try:
            yield self
        finally:
            self.closing.set()
            self.renderer.shutdown()
            self.worker.shutdown()

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [openai_api.build_model_entry(self.engine.manifest.name)]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.engine.manifest.name:
            raise openai_api.RequestError(404, "there is no such model here", "model", "model_not_found")
        return JSONResponse(openai_api.build_model_entry(self.engine.manifest.name))

    async def chat(self, request: Request) -> Response:
        chat_request = openai_api.parse_request(openai_api.ChatRequest, await read_body(request))

        def render_prompt() -> list[int]:
            return self.engine.prompt(self.engine.with_default_system(chat_request.list_messages()))

        return await self.respond(request, chat_request, render_prompt, openai_api.CHAT_FORM)

    async def completion(self, request: Request) -> Response:
        completion_request = openai_api.parse_request(openai_api.CompletionRequest, await read_body(request))
        tokenize = functools.partial(self.engine.tokenize_text, completion_request.prompt)
        return await self.respond(request, completion_request, tokenize, openai_api.TEXT_FORM)

    async def respond(
        self,
        request: Request,
        generation_request: openai_api.GenerationRequest,
        prompt: Callable[[], list[int]],
        form: openai_api.ResponseForm,
    ) -> Response:
        ids = await asyncio.get_running_loop().run_in_executor(self.renderer, prompt)
        reply = Reply(self, request, ids, generation_request.build_sampling(self.engine.sampling))
        builder = openai_api.ResponseBuilder(form, self.engine.manifest.name, reply.answer)
        if generation_request.stream:
            return StreamingResponse(stream_events(builder, reply, generation_request), media_type="text/event-stream")
        return JSONResponse(builder.build_response("".join([piece async for piece in reply.pieces()])))


class Reply:
    """An answer that the model's thread generates. It is cancelled when its client disconnects."""

    def __init__(self, api: Api, request: Request, ids: list[int], sampling: conversation.Sampling):
        self.client_left = threading.Event()
        self.answer = conversation.Answer(
            api.engine, ids, sampling, lambda: self.client_left.is_set() or api.closing.is_set()
        )
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self.watch_task = asyncio.create_task(self._watch(request))
        api.worker.submit(self._work)

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the pieces of the answer. Raises what the model's thread raised."""
        try:
            while (piece := await self.queue.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                if piece:
                    yield piece
        finally:
            self.client_left.set()
            self.watch_task.cancel()

    async def _watch(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(DISCONNECT_POLL)
        self.client_left.set()

    def _work(self) -> None:
        try:
            for piece in self.answer:
                self._put(piece)
            self._put(None)
        except Exception as error:  # noqa: BLE001  `pieces` raises it again
            self._put(error)

    def _put(self, piece: str | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, so nobody reads
            self.loop.call_soon_threadsafe(self.queue.put_nowait, piece)


async def stream_events(
    builder: openai_api.ResponseBuilder, reply: Reply, generation_request: openai_api.GenerationRequest
) -> AsyncIterator[str]:
    """Yield the answer as server-sent events, as OpenAI does."""
    try:
        for chunk in builder.build_first_chunks():
            yield openai_api.format_event(chunk)
        async for piece in reply.pieces():
            yield openai_api.format_event(builder.build_chunk(piece))
        for chunk in builder.build_last_chunks(generation_request.wants_usage()):
            yield openai_api.format_event(chunk)
        yield "data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001  the status 200 is sent already
        yield openai_api.format_event(openai_api.build_error_body(report_failure(error)))


async def read_body(request: Request) -> bytes:
    """Read the body of a request. Raise RequestError when it is too large."""
    content = b""
    async for block in request.stream():
        content += block
        if len(content) > MAX_BODY_BYTES:
            raise openai_api.RequestError(413, f"a request has at most {MAX_BODY_BYTES} bytes")
    return content


def report_failure(error: Exception) -> openai_api.RequestError:
    """Print an internal error, and return one for the client that gives no details."""
    print(f"serve: a request failed: {type(error).__name__}: {printable_line(str(error))}", flush=True)
    return openai_api.RequestError(500, "the model failed", kind="server_error")


def build_app(api: Api, host: str, key: str | None) -> ASGIApp:
    """Return the app: the endpoints behind the checks of `Guard`."""
    return Starlette(
        routes=[
            Route("/v1/models", api.models),
            Route("/v1/models/{name}", api.model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completion, methods=["POST"]),
        ],
        middleware=[
            Middleware(Guard, host=host, key=key),
            Middleware(
                CORSMiddleware,
                allow_origin_regex=LOCAL_ORIGINS,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            ),
        ],
        exception_handlers={HTTPException: respond_with_error, UserError: respond_with_error},
    )


async def respond_with_error(request: Request, error: Exception) -> Response:
    """Return the response for an error, in the format of OpenAI's API."""
    http_error = translate_error(error)
    return JSONResponse(openai_api.build_error_body(http_error), http_error.status_code, http_error.headers)


def translate_error(error: Exception) -> HTTPException:
    """Return the error that the client gets: with the reason where it can do something, else without details."""
    if isinstance(error, conversation.PromptTooLong):
        return openai_api.RequestError(400, error.message, "messages", "context_length_exceeded")
    if isinstance(error, UserError):
        return openai_api.RequestError(400, error.message)
    return error if isinstance(error, HTTPException) else report_failure(error)


class Guard:
    """Refuses requests of other web sites, also under a name that leads to this address, and those without the key."""

    def __init__(self, app: ASGIApp, host: str, key: str | None):
        self.app, self.host, self.key = app, host, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["type"] == "http":
                self.refuse_stranger(Request(scope))
            await self.app(scope, receive, noted)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001  a response, never a traceback
            if started:
                report_failure(error)
                return
            fault = error if isinstance(error, openai_api.RequestError) else report_failure(error)
            await (await respond_with_error(Request(scope), fault))(scope, receive, send)

    def refuse_stranger(self, request: Request) -> None:
        """Raise RequestError for a wrong host, another web site, or a missing key."""
        name, origin = request.headers.get("host", "").rsplit(":", 1)[0], request.headers.get("origin")
        if self.host in LOCAL_HOSTS and name not in LOCAL_HOSTS:
            raise openai_api.RequestError(
                403, "this server is for its own machine: ask http://127.0.0.1", code="wrong_host"
            )
        if origin and not openai_api.matches_pattern(LOCAL_ORIGINS, origin):
            raise openai_api.RequestError(403, "pages of other sites may not ask", code="wrong_origin")
        given_key = request.headers.get("authorization", "").removeprefix("Bearer ")
        needs_key = request.method != "OPTIONS"  # a browser's preflight request carries no key
        if self.key and needs_key and not hmac.compare_digest(given_key.encode("latin-1"), self.key.encode()):
            raise openai_api.RequestError(401, "the API key is missing or wrong", code="invalid_api_key")
