"""Rendering a chat template without transformers, as llama.cpp and the Mac side do it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from contract.errors import UserError

if TYPE_CHECKING:
    from llama_cpp import Llama


def render(template: str, messages: Sequence[dict], bos: str = "", eos: str = "") -> str:
    """The prompt for `messages`, ready for the assistant's answer. Raises UserError when the template fails."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The same settings as transformers' own renderer.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except TemplateError as error:
        raise UserError(
            f"the chat template cannot render a prompt: {error}", "publish the model again with a template that can"
        ) from error


def _raise(message: str):
    from jinja2 import TemplateError

    raise TemplateError(message)


def embedded(model: "Llama") -> str:
    """The template inside a GGUF. Raises UserError when there is none: llama-cpp-python would guess one."""
    template = model.metadata.get("tokenizer.chat_template")
    if not template:
        raise UserError(
            "the GGUF holds no chat template, so its prompt format is unknown",
            "export it again: a trained file carries its template",
        )
    return template


def special(model: "Llama", role: str) -> str:
    """Text of the GGUF's 'bos' or 'eos' token; '' when it names none."""
    import llama_cpp

    number = model.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if number is None:
        return ""
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    return llama_cpp.llama_vocab_get_text(vocabulary, int(number)).decode()


def prompt(model: "Llama", messages: Sequence[dict]) -> str:
    """`messages` rendered with the template that is in the file."""
    return render(embedded(model), messages, special(model, "bos"), special(model, "eos"))
