"""Prompt parity: the trained tokenizer, llama.cpp with the template in the GGUF and Ollama's TEMPLATE give one prompt.

A user's text is treated the same everywhere: where it spells a special token, the token is read (transformers,
llama.cpp's server, LM Studio and Ollama all parse special tokens in the rendered prompt). A golden conversation proves
it. Training rows with such text are dropped by `clean.special_tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import llama_runtime
from contract import chat_format
from contract.ollama_template import Turns
from pipeline.toolchain import llama_tools
from pipeline.verify import derive_template

if TYPE_CHECKING:
    from llama_cpp import Llama
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Trained:
    """The prompt format as it was trained."""

    tokenizer: "PreTrainedTokenizerFast"
    golden: Sequence[dict]
    ends: Sequence[str]
    """The texts of the tokens that end an answer."""
    prompts: Sequence[tuple[str, list[int]]]
    """Held-out prompts and their token ids."""


class Different(Exception):
    """A runtime or file that does not give the trained prompt. `evidence` has what was expected and what was found."""

    def __init__(self, what: str, expected, found):
        super().__init__(what)
        self.evidence = {"what": what, "expected": expected, "found": found}


def same(what: str, expected, found) -> None:
    """Raise ParityError with the text `what` unless both values are equal."""
    if expected != found:
        raise Different(what, expected, found)


def gguf(path: Path, model: "Llama", trained: Trained) -> None:
    """Check that a GGUF gives the trained prompts, token ids and end token.

    Raises:
        ParityError: It does not.
    """
    same(
        "its embedded chat template is not the one that was trained",
        trained.tokenizer.chat_template,
        chat_format.embedded(model),
    )
    same("its end token is another one", trained.tokenizer.eos_token_id, model.token_eos())
    same("llama.cpp does not stop at every token that ends an answer", [], not_stopping(model, trained))
    texts = [(item["prompt"], item["ids"]) for item in trained.golden] + list(trained.prompts)
    for text, ids in texts:
        same(f"llama.cpp tokenizes {text[-60:]!r} differently", list(ids), llama_runtime.tokenize(model, text))
    one_bos(model, [item["ids"] for item in trained.golden])
    served(path, trained.golden)


def not_stopping(model: "Llama", trained: Trained) -> list[str]:
    """Return the trained end tokens at which llama.cpp does not stop."""
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    ends = {trained.tokenizer.eos_token, *trained.ends}
    return sorted(
        end
        for end in ends
        if not llama_cpp.llama_vocab_is_eog(vocabulary, trained.tokenizer.convert_tokens_to_ids(end))
    )


def adds_bos(model: "Llama") -> bool:
    """Return whether runtimes add a BOS to the start of a prompt by themselves."""
    import llama_cpp

    return llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model.model))


def one_bos(model: "Llama", prompts: Sequence[Sequence[int]]) -> None:
    """Check that prompts were trained with exactly one BOS where a runtime adds one.

    Raises:
        ParityError: A prompt starts with other BOS tokens.
    """
    bos, adds = model.token_bos(), adds_bos(model)
    for ids in prompts:
        wanted = 1 if adds else int(ids[:1] == [bos])
        front = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        same("a prompt does not begin with the BOS tokens that a runtime will feed", wanted, front)


def served(path: Path, golden: Sequence[dict]) -> None:
    """Check every golden conversation with llama.cpp's own Jinja and tokenizer.

    Its server, LM Studio and Ollama use them.

    Raises:
        ParityError: A prompt differs.
    """
    answers = llama_tools.render(path, [{k: item[k] for k in ("messages", "add_generation_prompt")} for item in golden])
    for item, found in zip(golden, answers, strict=True):
        if found.get("ids") != list(item["ids"]):
            raise Different(
                f"llama.cpp's server makes another prompt of {item['messages'][-1]['content'][:60]!r}",
                {"prompt": item["prompt"], "ids": list(item["ids"])},
                found,
            )


def without_bos(text: str, bos: str | None, adds: bool) -> str:
    """Return the prompt as a TEMPLATE must give it: where llama.cpp adds the BOS, a second one must not be there."""
    return text.removeprefix(bos) if bos and adds else text


def ollama(trained: Trained, adds: bool) -> tuple[Turns | None, list[str]]:
    """Return the trained template as Turns for Ollama's TEMPLATE, and the reasons for what Turns cannot express."""
    tokenizer = trained.tokenizer
    bos, eos = tokenizer.bos_token, tokenizer.eos_token

    def render(messages: Sequence[dict], prompt: bool) -> str:
        return without_bos(
            chat_format.render(tokenizer.chat_template, messages, bos or "", eos or "", prompt), bos, adds
        )

    return derive_template.derive(render, tokenizer.chat_template, asking(trained.golden, bos, adds))


def asking(golden: Sequence[dict], bos: str | None, adds: bool) -> list[dict]:
    """Return the golden conversations that end with a question, their prompts without a BOS that llama.cpp adds."""
    return [
        {"messages": item["messages"], "prompt": without_bos(item["prompt"], bos, adds)}
        for item in golden
        if item["add_generation_prompt"]
    ]


def template(turns: Turns, trained: Trained, adds: bool) -> None:
    """Check that the TEMPLATE for the manifest gives every golden prompt.

    Raises:
        ParityError: It does not.
    """
    for item in asking(trained.golden, trained.tokenizer.bos_token, adds):
        same("Ollama's TEMPLATE gives another prompt", item["prompt"], turns.prompt(item["messages"]))
