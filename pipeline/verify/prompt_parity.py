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
class TrainedFormat:
    """The prompt format as it was trained."""

    tokenizer: "PreTrainedTokenizerFast"
    golden: Sequence[dict]
    end_tokens: Sequence[str]
    """The texts of the tokens that end an answer."""
    heldout_prompts: Sequence[tuple[str, list[int]]]
    """Held-out prompts and their token ids."""


class ParityError(Exception):
    """A runtime or file that does not give the trained prompt. `evidence` has what was expected and what was found.

    `code` is the code of the UserError that reports it.
    """

    def __init__(self, what: str, expected: object, found: object, code: str):
        super().__init__(what)
        self.code = code
        self.evidence = {"what": what, "expected": expected, "found": found}


def require_equal(what: str, expected: object, found: object, code: str) -> None:
    """Raise ParityError with the text `what` unless both values are equal."""
    if expected != found:
        raise ParityError(what, expected, found, code=code)


def verify_gguf(path: Path, model: "Llama", trained: TrainedFormat) -> None:
    """Raise ParityError unless a GGUF gives the trained prompts, token ids and end token."""
    template = chat_format.embedded_template(model)
    what = "its chat template is not the trained one"
    require_equal(what, trained.tokenizer.chat_template, template, code="parity.chat_template")
    verify_end_tokens(model, trained)
    verify_token_ids(model, trained)
    verify_bos_count(model, [item["ids"] for item in trained.golden])
    verify_server_prompts(path, trained.golden)


def verify_end_tokens(model: "Llama", trained: TrainedFormat) -> None:
    """Raise ParityError unless a GGUF has the trained end token, and llama.cpp stops at all that end an answer."""
    trained_eos, eos = trained.tokenizer.eos_token_id, model.token_eos()
    require_equal(f"its end token is {eos}, not {trained_eos}", trained_eos, eos, code="parity.end_token")
    missing_stops = find_missing_stops(model, trained)
    what = f"llama.cpp does not stop at {', '.join(missing_stops)}"
    require_equal(what, [], missing_stops, code="parity.stop_tokens")


def verify_token_ids(model: "Llama", trained: TrainedFormat) -> None:
    """Raise ParityError unless llama.cpp gives the trained token ids for golden and held-out prompts."""
    golden_prompts = [(item["prompt"], item["ids"]) for item in trained.golden]
    for text, token_ids in [*golden_prompts, *trained.heldout_prompts]:
        what = f"llama.cpp tokenizes {text[-60:]!r} differently"
        require_equal(what, list(token_ids), llama_runtime.tokenize(model, text), code="parity.token_ids")


def find_missing_stops(model: "Llama", trained: TrainedFormat) -> list[str]:
    """Return the trained end tokens at which llama.cpp does not stop."""
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    end_tokens = {trained.tokenizer.eos_token, *trained.end_tokens}
    ids = {token: trained.tokenizer.convert_tokens_to_ids(token) for token in end_tokens}
    return sorted(token for token in ids if not llama_cpp.llama_vocab_is_eog(vocabulary, ids[token]))


def has_automatic_bos(model: "Llama") -> bool:
    """Return whether runtimes add a BOS to the start of a prompt by themselves."""
    import llama_cpp

    return llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model.model))


def verify_bos_count(model: "Llama", prompts: Sequence[Sequence[int]]) -> None:
    """Raise ParityError unless prompts were trained with exactly one BOS where a runtime adds one."""
    bos_id, adds_bos = model.token_bos(), has_automatic_bos(model)
    for token_ids in prompts:
        expected = 1 if adds_bos else int(token_ids[:1] == [bos_id])
        bos_count = next((i for i, token in enumerate(token_ids) if token != bos_id), len(token_ids))
        what = f"a trained prompt starts with {bos_count} BOS tokens, a runtime sends {expected}"
        require_equal(what, expected, bos_count, code="parity.bos_count")


def verify_server_prompts(path: Path, golden: Sequence[dict]) -> None:
    """Raise ParityError unless the Jinja of llama.cpp, which its server and LM Studio use, gives the golden prompts."""
    questions = [{key: item[key] for key in ("messages", "add_generation_prompt")} for item in golden]
    for item, rendered in zip(golden, llama_tools.render_prompts(path, questions), strict=True):
        if rendered.get("ids") != list(item["ids"]):
            what = f"llama.cpp's server renders {item['messages'][-1]['content'][:60]!r} differently"
            expected = {"prompt": item["prompt"], "ids": list(item["ids"])}
            raise ParityError(what, expected, rendered, code="parity.server_prompt")


def strip_bos(text: str, bos: str | None, adds_bos: bool) -> str:
    """Return the prompt as a TEMPLATE must give it: where llama.cpp adds the BOS, a second one must not be there."""
    return text.removeprefix(bos) if bos and adds_bos else text


def derive_ollama_turns(trained: TrainedFormat, adds_bos: bool) -> tuple[Turns | None, list[str]]:
    """Return the trained template as Turns for Ollama's TEMPLATE, and the reasons for what Turns cannot express."""
    template = trained.tokenizer.chat_template
    bos, eos = trained.tokenizer.bos_token, trained.tokenizer.eos_token

    def render(messages: Sequence[dict], add_generation_prompt: bool) -> str:
        text = chat_format.render(template, messages, bos or "", eos or "", add_generation_prompt)
        return strip_bos(text, bos, adds_bos)

    return derive_template.derive_turns(render, template, select_answer_prompts(trained.golden, bos, adds_bos))


def select_answer_prompts(golden: Sequence[dict], bos: str | None, adds_bos: bool) -> list[dict]:
    """Return the golden conversations that end with a question, their prompts without a BOS that llama.cpp adds."""
    return [
        {"messages": item["messages"], "prompt": strip_bos(item["prompt"], bos, adds_bos)}
        for item in golden
        if item["add_generation_prompt"]
    ]


def verify_ollama_template(turns: Turns, trained: TrainedFormat, adds_bos: bool) -> None:
    """Raise ParityError unless the TEMPLATE for the manifest gives every golden prompt."""
    for item in select_answer_prompts(trained.golden, trained.tokenizer.bos_token, adds_bos):
        what = f"Ollama's TEMPLATE gives a different prompt for {item['messages'][-1]['content'][:60]!r}"
        require_equal(what, item["prompt"], turns.render_prompt(item["messages"]), code="parity.ollama_template")
