"""Render chat templates without transformers, as llama.cpp and the Mac side do."""

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, NoReturn

from common.errors import UserError, printable_line

if TYPE_CHECKING:
    from jinja2 import Template, Undefined, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from llama_cpp import Llama

ChatMessage = Mapping[str, str]  # {"role", "content"}
ALPACA_INPUT = "\n\n### Input:\n"  # between an Alpaca row's instruction and its `input` in one user message


def render(
    template: str,
    messages: Sequence[ChatMessage],
    bos: str = "",
    eos: str = "",
    add_generation_prompt: bool = True,
    **switches: bool,
) -> str:
    """Return `messages` as text, by default with the opening of the assistant's answer at the end.

    Args:
        template: the chat template, as Jinja text.
        messages: the conversation.
        bos: text of the BOS token, for the template.
        eos: text of the EOS token, for the template.
        add_generation_prompt: whether the text ends with the opening of an answer.
        switches: other variables of the template, such as enable_thinking.

    Raises:
        UserError: the template is not valid Jinja, or it fails.
    """
    jinja_template = compile_template(template)
    try:
        return jinja_template.render(
            messages=list(messages),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
            **switches,
        )
    except Exception as error:  # a template is a program: it can divide by zero, recurse, ask for all memory
        raise _render_error(messages, error) from error


def _render_error(messages: Sequence[ChatMessage], error: Exception) -> UserError:
    roles = " ".join(str(message.get("role")) for message in messages)
    return UserError(
        f"the chat template cannot render {roles or 'an empty conversation'}: {describe_template_error(error)}",
        "set data.template to a template that can; if the model is published, publish it again",
        code="template.render_failed",
    )


def describe_template_error(error: BaseException) -> str:
    """Return what failed in a template as one printable line: the text may come from the template itself."""
    text = str(error)
    if not text or isinstance(error, LookupError | RecursionError | MemoryError):  # "'x'" alone says nothing
        text = f"{type(error).__name__} {text}"
    return printable_line(text, 300)


def find_undefined_names(template: str, messages: Sequence[ChatMessage], bos: str = "", eos: str = "") -> list[str]:
    """Return the names of undefined variables that the template prints: they would be empty in every prompt."""
    from jinja2 import Undefined

    names: set[str] = set()

    class RecordingUndefined(Undefined):
        def __str__(self) -> str:
            names.update(filter(None, [self._undefined_name]))
            return ""

    jinja_template = compile_template(template, RecordingUndefined)
    with contextlib.suppress(Exception):  # `render` reports what fails
        jinja_template.render(messages=list(messages), tools=None, documents=None, bos_token=bos, eos_token=eos)
    return sorted(names)


@functools.lru_cache(maxsize=8)
def compile_template(template: str, undefined: "type[Undefined] | None" = None) -> "Template":
    """Compile a chat template with the settings, filters and functions of transformers (chat_template_utils.py).

    Raises:
        UserError: the template is not valid Jinja.
    """
    from jinja2 import Undefined

    try:
        return _create_environment(undefined or Undefined).from_string(template)
    except Exception as error:  # Python's compiler refuses more than Jinja's: 20 nested loops, deep nesting
        raise UserError(
            f"the chat template is not valid Jinja: {describe_template_error(error)}",
            "set data.template to a different one, such as alpaca or chatml",
            code="template.not_jinja",
        ) from error


def _create_environment(undefined: "type[Undefined]") -> "ImmutableSandboxedEnvironment":
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_extension()],
        undefined=undefined,
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_template_error,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


def _generation_extension() -> "type[Extension]":
    """Return a Jinja extension that accepts {% generation %}, with which transformers marks the assistant's text."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 a set, as in the base class

        def parse(self, parser: "Parser") -> "nodes.Scope":
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return `value` as JSON; Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_template_error(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def embedded_template(model: "Llama") -> str:
    """Return the chat template inside a GGUF. Raise UserError when there is none: llama-cpp-python would guess one."""
    if template := model.metadata.get("tokenizer.chat_template"):
        return str(template)
    raise UserError(
        "the GGUF has no chat template, so its prompt format is unknown",
        "export it again: a trained file contains its template",
        code="template.missing",
    )


def special_token_text(model: "Llama", role: str) -> str:
    """Return the text of the GGUF's 'bos' or 'eos' token; '' when it has none."""
    import llama_cpp

    token_id = model.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if token_id is None:
        return ""
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    text: bytes = llama_cpp.llama_vocab_get_text(vocabulary, int(token_id))
    return text.decode()


def render_model_prompt(model: "Llama", messages: Sequence[ChatMessage], add_generation_prompt: bool = True) -> str:
    """Return `messages` rendered with the template inside the model's file."""
    bos, eos = (special_token_text(model, role) for role in ("bos", "eos"))
    return render(embedded_template(model), messages, bos, eos, add_generation_prompt)
