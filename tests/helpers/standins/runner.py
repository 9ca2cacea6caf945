"""A model of Ollama's library at work: which of its templates renders, and what llama.cpp answers."""

import codecs
import functools
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import gguf_reader
from common.errors import UserError
from contract import chat_format
from tests.helpers.standins.go import Go
from tests.helpers.standins.library import MEDIA, PARAMETERS, Library, Name, Refused

TOOL_TURNS = (
    "tool_response", "tool_results", "role'] == 'tool'", "role'] == \"tool\"", "role\"] == 'tool'", 'role"] == "tool"',
    "message.role == 'tool'", 'message.role == "tool"', "ipython",
)  # fmt: skip
USUAL = {
    "num_ctx": int(os.environ.get("OLLAMA_CONTEXT_LENGTH") or 4096), "num_predict": -1, "num_keep": 4, "temperature": 0.8,
    "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.0, "seed": -1, "stop": [],
}  # fmt: skip


@functools.cache
def go() -> Go:
    return Go()


@functools.lru_cache(maxsize=16)
def header(path: Path) -> gguf_reader.Header:
    return gguf_reader.read_header(path)


def in_go(template: str, messages: Sequence[dict], think: bool = False) -> str:
    said = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    answer = go().ask(Template=template, Messages=said, Raw=True, Think=think)
    if "error" in answer:
        raise Refused(500, answer["error"])
    return answer["text"]


def jinja_capabilities(template: str) -> list[str]:
    """server/images.go, chatTemplateCapabilities"""
    thinks = "<think>" in template and "</think>" in template
    splits = any(f"content.split({q}</think>{q})" in template for q in "'\"")
    thinks |= splits and "reasoning_content" not in template and "<SPECIAL_12>" not in template
    return ["tools"] * ("tools" in template or "tool_call" in template) + ["thinking"] * thinks


def go_capabilities(template: str) -> list[str]:
    """goTemplateCapabilities, without the tags of thinking that it looks for."""
    names = go().ask(Template=template, Messages=[], Raw=True)["names"] or []
    return ["tools"] * ("tools" in names) + ["insert"] * ("suffix" in names)


def jinja_wins(jinja: str, template: str) -> bool:
    """shouldPreferChatTemplate"""
    jinja_can, go_can = jinja_capabilities(jinja), go_capabilities(template)
    calls = "tool_calls" in jinja or "assistant_tool_call" in jinja
    jinja_trip = "tools" in jinja_can and calls and any(word in jinja for word in TOOL_TURNS)
    names = go().ask(Template=template, Messages=[], Raw=True)["names"] or []
    marked = any(word in template for word in ('eq .Role "tool"', "tool_response", "TOOL_RESULTS"))
    go_trip = {"tools", "toolcalls"} <= set(names) and marked
    if len(jinja_can) > len(go_can):
        return not go_trip or jinja_trip
    return set(jinja_can) == set(go_can) and "tools" in jinja_can and jinja_trip and not go_trip


class Model:
    """server/images.go, GetModel"""

    def __init__(self, library: Library, name: Name, flip: bool = False):
        made = library.manifest(name)
        if made is None:
            raise FileNotFoundError(name)
        self.name, self.manifest = name, made
        self.config = json.loads(library.blob(made["config"]["digest"]).read_bytes())
        self.path = next(
            library.blob(layer["digest"]) for layer in made["layers"] if layer["mediaType"] == f"{MEDIA}model"
        )
        self.header = header(self.path)
        self.jinja = str(self.header.metadata.get("tokenizer.chat_template") or "")
        texts = (library.layer(made, kind) for kind in ("template", "system", "params"))
        template, system, params = (text and text.decode() for text in texts)
        self.template, self.system, self.options = template, system or "", json.loads(params or "{}")
        self.rendered = self._go_renders() != flip  # else by the GGUF's Jinja

    def _go_renders(self) -> bool:
        forced = os.environ.get("OLLAMA_GO_TEMPLATE", "")
        if self.template is None or forced:
            return self.template is not None and forced.lower() not in ("0", "f", "false")
        return not (self.jinja and jinja_wins(self.jinja, self.template))

    def capabilities(self) -> list[str]:
        by_go = go_capabilities(self.template or "{{ .Prompt }}") if self.rendered or self.template is None else []
        return [*([] if self.rendered else jinja_capabilities(self.jinja)), "completion", *by_go]

    def settings(self, asked: dict) -> dict:
        for options in (self.options, asked):
            for key, value in options.items():
                check(key, value)
        return USUAL | self.options | {key: value for key, value in asked.items() if value is not None}

    def prompt(self, messages: Sequence[dict], think: bool) -> str:
        if self.rendered:
            return in_go(self.template or "{{ .Prompt }}", messages, think)
        switches = {"enable_thinking": think} if "thinking" in self.capabilities() else {}
        special = [self._token("bos"), self._token("eos")]
        try:
            # Without a template llama.cpp takes ChatML.
            text = chat_format.render(self.jinja or CHATML, messages, *special, **switches)
        except UserError as error:
            raise Refused(500, error.message) from error
        # llama-server takes off what its tokenizer adds (common/chat.cpp, apply).
        return text.removeprefix(special[0]) if self.adds_bos() else text

    def _token(self, role: str) -> str:
        number = self.header.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return "" if number is None else str(self.header.metadata["tokenizer.ggml.tokens"][number])

    def adds_bos(self) -> bool:
        """What llama.cpp does without the key: SentencePiece adds one, others do not."""
        usual = self.header.metadata.get("tokenizer.ggml.model") == "llama"
        return bool(self.header.metadata.get("tokenizer.ggml.add_bos_token", usual))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def check(key: str, value: object) -> None:
    """api/types.go, Options.FromMap: a name that it does not know is passed over, a wrong type is not."""
    kind = PARAMETERS.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {None: True, int: number, float: number, bool: isinstance(value, bool), list: isinstance(value, list)}
    if value is not None and not fits[kind]:
        called = {int: "integer", float: "float32", bool: "boolean", list: "array"}[kind]
        raise Refused(500, f'option "{key}" must be of type {called}')


@dataclass
class Answer:
    """One answer, counted and timed in nanoseconds as `api.Metrics` says it."""

    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0
    done_reason: str = "stop"


@dataclass
class Loaded:
    """A model in memory."""

    llama: object
    context: int
    asked: int  # context that was asked for
    digest: str
    until: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tokens(self, text: str, special: bool = True) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=special, special=True)

    def fitting(self, model: Model, messages: list[dict], think: bool) -> str:
        """The prompt of as many messages as fit, the first ones left out but for system messages (server/prompt.go)."""
        for skip in range(len(messages)):
            kept = [m for m in messages[:skip] if m["role"] == "system"] + messages[skip:]
            prompt = model.prompt(kept, think)
            if len(self.tokens(prompt, special=False)) <= self.context:
                break
        return prompt

    def answer(self, prompt: str, settings: dict, facts: Answer) -> Iterator[str]:
        """Pieces of text; `facts` is complete when they end."""
        ids = self.tokens(prompt)
        if len(ids) >= self.context:  # the middle goes, as before a context shift (llm/llama_server.go)
            keep = min(settings["num_keep"] + (len(self.tokens("")) > 0), self.context - 1)
            ids = ids[:keep] + ids[keep + len(ids) - self.context + (self.context - keep) // 2 :]
        room = self.context - len(ids)
        limit = room if settings["num_predict"] < 0 else min(settings["num_predict"], room)
        with self.lock:
            yield from self._said(ids, limit, settings, facts)

    def _said(self, ids: list[int], limit: int, settings: dict, facts: Answer) -> Iterator[str]:
        import llama_cpp

        start, first, text = time.monotonic_ns(), 0, _Text(settings["stop"])
        facts.prompt_eval_count = len(ids)
        self.llama.reset()  # what a cached prompt computes differs in the last digits
        self.llama.set_seed(int(settings["seed"]) & 0xFFFFFFFF)
        names = ("top_k", "top_p", "min_p", "repeat_penalty")
        for token in self.llama.generate(ids, temp=settings["temperature"], **{name: settings[name] for name in names}):
            first = first or time.monotonic_ns()
            facts.eval_count += 1
            vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
            yield from text.add(self.llama.detokenize([token]))
            if text.stopped:
                break
            if facts.eval_count >= limit:
                facts.done_reason = "length"
                break
        yield from text.rest()
        facts.prompt_eval_duration, facts.eval_duration = first - start, time.monotonic_ns() - first


class _Text:
    """Bytes in, text out, up to the first stop string; what may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.stopped = [stop.encode() for stop in stops if stop], b"", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character's first bytes wait

    def add(self, more: bytes) -> Iterator[str]:
        data = self.held + more
        if found := [end for stop in self.stops if (end := data.find(stop)) >= 0]:
            self.held, self.stopped = data[: min(found)], True
            return
        held = max((n for stop in self.stops for n in range(1, len(stop)) if data.endswith(stop[:n])), default=0)
        self.held = data[len(data) - held :]
        if text := self.decoder.decode(data[: len(data) - held]):
            yield text

    def rest(self) -> Iterator[str]:
        if text := self.decoder.decode(self.held, final=True):
            yield text


def load(model: Model, settings: dict) -> Loaded:
    import llama_cpp

    from common import llama_runtime

    trained = model.header.metadata.get(f"{model.header.metadata['general.architecture']}.context_length")
    context = max(4, min(int(settings["num_ctx"]), int(trained or settings["num_ctx"])))
    try:
        llama = llama_runtime.load_model(model.path, context)
    except UserError as error:
        raise Refused(500, f"error loading model: {error.message}") from error
    llama_cpp.llama_set_n_threads(llama.ctx, 1, 1)  # two threads wait for each other: 7 times slower on a busy machine
    return Loaded(llama, context, settings["num_ctx"], model.path.name)


def rewritten(source: Path, target: Path) -> bool:
    """llama-quantize's COPY, which `create` makes of every GGUF; False when llama.cpp cannot read it."""
    import llama_cpp

    quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.only_copy = params.allow_requantize = True
    return llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params) == 0


@functools.cache
def quiet() -> object:
    """llama.cpp's log goes nowhere; the callback has to be kept."""
    import ctypes

    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    return silent
