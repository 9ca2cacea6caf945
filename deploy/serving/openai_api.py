"""The requests and responses of OpenAI's API. A parameter that cannot be honoured is refused by its name."""

import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.exceptions import HTTPException

from common.errors import printable_line
from deploy.serving.conversation import Answer, Sampling

# Parameters that would change the answer and are not supported, with the values that change nothing.
UNSUPPORTED_FIELDS = {
    "n": (1,), "best_of": (1,), "tools": ([],), "functions": ([],), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "grammar": ("",), "echo": (False,), "suffix": ("",),
    "modalities": (["text"],), "audio": (),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
}  # fmt: skip
matches_pattern = re.fullmatch
RequestType = TypeVar("RequestType", bound=BaseModel)


class RequestError(HTTPException):
    """An error of a request, with the fields of OpenAI's errors."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, kind: str | None = None
    ):
        super().__init__(status, message)
        self.param, self.code, self.kind = param, code, kind


def build_error_body(error: HTTPException) -> dict[str, Any]:
    """Return the JSON body of an error response."""
    default_kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
    kind = getattr(error, "kind", None) or default_kind
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": error.detail, "type": kind, "param": param, "code": code}}


class RequestPart(BaseModel):
    """A part of a request; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Message(RequestPart):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: object) -> object:
        """Join a list of text parts, as in the training rows. Raise ValueError for other parts."""
        if not isinstance(content, list):
            return content
        if not all(map(_is_text_part, content)):
            raise ValueError("only text is understood here, no pictures and no sound")
        return "".join(part["text"] for part in content)

    @field_validator("content")
    @classmethod
    def _refuse_half_characters(cls, content: str) -> str:
        content.encode()  # raises ValueError for half a character (JSON's \ud800)
        return content

    def to_dict(self) -> dict[str, str]:
        """Return the message for the template. `developer` is OpenAI's newer name for `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _rename_max_completion_tokens(request: dict[str, object]) -> dict[str, object]:
    """Return a request with the newer name of `max_tokens` under the older one."""
    max_tokens = request.get("max_completion_tokens")
    return request if max_tokens is None else request | {"max_tokens": max_tokens}


class GenerationRequest(RequestPart):
    """What both endpoints take; None is the model's default."""

    stream: bool = False
    stream_options: dict[str, Any] | None = None
    stop: tuple[str, ...] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError("a request is a JSON object")  # noqa: TRY004  pydantic expects ValueError
        for name, accepted in UNSUPPORTED_FIELDS.items():
            if value.get(name) is not None and value[name] not in accepted:
                raise RequestError(400, f"{name} is not supported here", name, "unsupported_parameter")
        return _rename_max_completion_tokens(value)

    @field_validator("stop", mode="before")
    @classmethod
    def _wrap_single_stop(cls, stop: object) -> object:
        return [stop] if isinstance(stop, str) else stop

    def build_sampling(self, default: Sampling) -> Sampling:
        """Return the default sampling with the values of the request, whose stop strings add to the trained ones."""
        named = {f.name: getattr(self, f.name) for f in fields(Sampling) if getattr(self, f.name) is not None}
        if self.stop is not None:
            named["stop"] = (*default.stop, *filter(None, self.stop))
        if self.seed is not None:
            named["seed"] = self.seed % 0xFFFFFFFF  # 0xFFFFFFFF means a random seed in llama.cpp
        return replace(default, **named)

    def wants_usage(self) -> bool:
        """Return whether a streamed response ends with token counts."""
        return bool((self.stream_options or {}).get("include_usage"))


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: tuple[Message, ...] = Field(min_length=1)

    def list_messages(self) -> list[dict[str, str]]:
        return [message.to_dict() for message in self.messages]


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _unwrap_single_prompt(cls, prompt: object) -> object:
        return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt

    @field_validator("prompt")
    @classmethod
    def _refuse_half_characters(cls, prompt: str) -> str:
        prompt.encode()
        return prompt


def parse_request(request_class: type[RequestType], content: bytes) -> RequestType:
    """Parse the body of a request. Raise RequestError."""
    try:
        return request_class.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"])) or None
        text = printable_line(first["msg"].removeprefix("Value error, "), 300)
        raise RequestError(400, f"{location}: {text}" if location else text, location) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body is no JSON") from error


@dataclass(frozen=True)
class ResponseForm:
    """The names and choices that an endpoint uses for a whole response and for its chunks."""

    prefix: str
    object_name: str
    chunk_name: str
    full_choice: Callable[[str], dict[str, Any]]
    chunk_choice: Callable[[str], dict[str, Any]]
    first_choices: tuple[dict[str, Any], ...]
    last_choice: dict[str, Any]


CHAT_FORM = ResponseForm(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text}},
    ({"delta": {"role": "assistant", "content": ""}},),
    {"delta": {}},
)
TEXT_FORM = ResponseForm(
    "cmpl", "text_completion", "text_completion", lambda t: {"text": t}, lambda t: {"text": t}, (), {"text": ""}
)


class ResponseBuilder:
    """Builds the response objects of one answer."""

    def __init__(self, form: ResponseForm, model: str, answer: Answer):
        self.form, self.answer = form, answer
        self.head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def build_response(self, text: str) -> dict[str, Any]:
        response = self._build_object(self.form.object_name, self.form.full_choice(text), self._finish_reason())
        return response | {"usage": self._token_usage()}

    def build_first_chunks(self) -> Iterator[dict[str, Any]]:
        return (self._build_object(self.form.chunk_name, choice) for choice in self.form.first_choices)

    def build_chunk(self, text: str) -> dict[str, Any]:
        return self._build_object(self.form.chunk_name, self.form.chunk_choice(text))

    def build_last_chunks(self, include_usage: bool) -> Iterator[dict[str, Any]]:
        yield self._build_object(self.form.chunk_name, self.form.last_choice, self._finish_reason())
        if include_usage:
            yield {"object": self.form.chunk_name, **self.head, "choices": [], "usage": self._token_usage()}

    def _build_object(self, kind: str, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {
            "object": kind,
            **self.head,
            "choices": [{"index": 0, **choice, "logprobs": None, "finish_reason": finish_reason}],
        }

    def _finish_reason(self) -> str:
        return "stop" if self.answer.end == "stop" else "length"

    def _token_usage(self) -> dict[str, int]:
        counts = {"prompt_tokens": len(self.answer.prompt), "completion_tokens": len(self.answer.ids)}
        return counts | {"total_tokens": sum(counts.values())}


def build_model_entry(name: str) -> dict[str, Any]:
    """Return the entry of a model in /v1/models."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "ferry"}


def format_event(value: dict[str, Any]) -> str:
    """Return a value as one server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
