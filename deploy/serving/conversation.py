"""What `chat` and `serve` share: render a conversation as the trained prompt, tokenize it and generate the answer.

The template of the file is rendered in the sandbox, and the text is tokenized as in `verify` and `smoke`. llama.cpp
gets token ids only, so no library guesses a chat format or puts a second BOS in front of the prompt.
"""

import codecs
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import child_process, gguf_reader, llama_runtime
from common.errors import UserError, printable_line
from contract import chat_format, template_sandbox
from contract.chat_format import ChatMessage
from contract.manifest import Manifest
from deploy import store
from deploy.stages import memory_need, modelfile

if TYPE_CHECKING:
    from llama_cpp import Llama

START_SECONDS, SECONDS_PER_BYTE = 120, 60e-9  # time to load the model, on a busy machine with a cold disk
PROMPT_BATCH = 256  # tokens of a prompt that are computed at once; between two batches an answer can be cancelled


@dataclass(frozen=True)
class Sampling:
    """How an answer is sampled and where it ends, with llama.cpp's names. The defaults turn a sampler off."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None


def run_in_child(function: str, version: Path, arguments: Sequence[object]) -> int:
    """Run `function(version, *arguments)` in a process that has this terminal; return its exit code.

    Raise UserError when llama.cpp crashes there, takes too long to start or too much memory.
    """
    manifest, path = store.load_tested(version)
    header, size = gguf_reader.read_header(path), path.stat().st_size
    seconds = START_SECONDS + size * SECONDS_PER_BYTE
    limits = memory_need.process_limits(header, size, manifest.generation.num_ctx, seconds)
    return child_process.run_attached(function, [str(version), *arguments], limits, f"llama.cpp with {path.name}")


@contextlib.contextmanager
def open_model(version: Path, context: int | None = None) -> Iterator["ChatModel"]:
    """Load the pulled model, verify its prompts and yield it.

    context: the most tokens; never more than in the manifest, nor more than fit into memory. Raise UserError when the
    file did not pass its smoke test, or a golden prompt is not the trained one.
    """
    manifest, path = store.load_tested(version)
    size = min(context or manifest.generation.num_ctx, modelfile.choose_context(manifest, path))
    model = llama_runtime.load_model(path, size)
    try:
        chat_model = ChatModel(manifest, model, size)
        chat_model.verify_prompts()
        child_process.report_ready()
        yield chat_model
    finally:
        model.close()


class ChatModel:
    """A loaded model with its chat template, tokenizer and default sampling."""

    def __init__(self, manifest: Manifest, model: "Llama", context: int):
        import llama_cpp

        self.manifest, self.model, self.context = manifest, model, context
        self.vocabulary = llama_cpp.llama_model_get_vocab(model.model)
        self.template = chat_format.embedded_template(model)
        self.bos, self.eos = chat_format.special_token_text(model, "bos"), chat_format.special_token_text(model, "eos")
        generation = manifest.generation
        stops = tuple(stop for stop in manifest.chat.stop if stop)
        self.sampling = Sampling(generation.temperature, generation.top_p, generation.max_tokens, stops)

    def verify_prompts(self) -> None:
        """Raise UserError when `ids`, which makes all prompts, does not give every prompt of the manifest."""
        golden_prompts, smoke_prompts = self.manifest.golden, self.manifest.smoke
        conversations: list[tuple[Sequence[ChatMessage], bool]] = [
            *((golden.messages, golden.add_generation_prompt) for golden in golden_prompts),
            *((self.with_default_system([{"role": "user", "content": s.message}]), True) for s in smoke_prompts),
        ]
        trained_ids = [*(golden.ids for golden in golden_prompts), *(smoke.ids for smoke in smoke_prompts)]
        for (messages, _), ids, expected_ids in zip(conversations, self.ids(conversations), trained_ids, strict=True):
            if ids != list(expected_ids):
                raise UserError(
                    f"the prompt for {printable_line(messages[-1]['content'], 60)!r} is not the trained one: it "
                    f"has the tokens {ids[:8]}..., the manifest {list(expected_ids[:8])}...",
                    "run `make smoke`; if it passes, report it",
                    code="serve.wrong_prompt",
                )

    def ids(self, conversations: Sequence[tuple[Sequence[ChatMessage], bool]]) -> list[list[int]]:
        """Return the token ids of each (messages, add_generation_prompt). A BOS is only where the template puts one."""
        texts = template_sandbox.render_prompts(self.template, conversations, self.bos, self.eos)
        return [llama_runtime.tokenize(self.model, text) for text in texts]

    def with_default_system(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Return the messages with the manifest's default system prompt in front when they have none.

        A default system prompt inside the template is left to the template.
        """
        system = self.manifest.chat.system
        system_messages = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
        return [*system_messages, *messages]

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the token ids of the prompt. Raise UserError when the template does not accept the conversation."""
        try:
            return self.ids([(messages, True)])[0]
        except UserError as error:
            reason = error.message.removeprefix("the chat template is refused: ")
            raise UserError(
                f"the model's chat template does not accept this conversation: {reason}",
                "leave out the system prompt, or start a new conversation",
                code=error.code,
            ) from error

    def fit_messages(self, messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[int]]:
        """Return the newest messages that leave room for an answer, and the ids of their prompt.

        The system prompt and the last question are never left out.
        """
        max_prompt_tokens = self.context - min(self.sampling.max_tokens, self.context // 2)
        kept_messages, ids = list(messages), self.prompt(messages)
        while len(ids) > max_prompt_tokens and (shorter := drop_oldest(kept_messages)):
            kept_messages, ids = shorter, self.prompt(shorter)
        return kept_messages, ids

    def tokenize_text(self, text: str) -> list[int]:
        """Return the token ids of a plain text, after one BOS when the model wants one."""
        import llama_cpp

        ids, bos = llama_runtime.tokenize(self.model, text), self.model.token_bos()
        return [bos, *ids] if llama_cpp.llama_vocab_get_add_bos(self.vocabulary) and ids[:1] != [bos] else ids

    def is_end_token(self, token: int) -> bool:
        """Return whether llama.cpp stops at this token."""
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(self.vocabulary, token)


def drop_oldest(messages: Sequence[ChatMessage]) -> list[ChatMessage] | None:
    """Return the messages without the oldest question and its answer; None when it is the only question."""
    system = 1 if messages[0]["role"] == "system" else 0
    users = [i for i, message in enumerate(messages) if i > system and message["role"] == "user"]
    return [*messages[:system], *messages[users[0] :]] if users else None


class PromptTooLong(UserError):
    """A prompt that leaves no room for an answer."""


class Answer:
    """Generates the answer to a prompt; iterate over it once for its pieces of text.

    Afterwards `ids` holds its tokens and `end` says why it ended. The KV cache keeps what the prompt has in common with
    the last prompt and answer: only the rest is computed.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        prompt: list[int],
        sampling: Sampling,
        is_stopped: Callable[[], bool] = lambda: False,
    ):
        """is_stopped: called at every token; returns whether to cancel the answer.

        Raise PromptTooLong, or UserError for an empty prompt.
        """
        self.chat_model, self.prompt, self.sampling, self.is_stopped = chat_model, prompt, sampling, is_stopped
        self.max_tokens = min(sampling.max_tokens, chat_model.context - len(prompt))
        if self.max_tokens < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context has {chat_model.context}",
                "use fewer words",
                code="serve.prompt_too_long",
            )
        if not prompt:
            raise UserError("the prompt is empty", "write something", code="serve.empty_prompt")
        self.ids: list[int] = []
        self.end: str | None = None  # "stop", "length" or "stopped"

    def __iter__(self) -> Iterator[str]:
        decoder = StreamDecoder(self.sampling.stop)
        for token in self._tokens():
            if self.chat_model.is_end_token(token):
                self.end = "stop"
                break
            self.ids.append(token)
            yield decoder.add(llama_runtime.token_bytes(self.chat_model.model, token))
            self.end = "stop" if decoder.ended else "length" if len(self.ids) == self.max_tokens else None
            if self.end or self.is_stopped():
                break
        self.end = self.end or "stopped"
        yield decoder.add(b"", last=True)

    def _tokens(self) -> Iterator[int]:
        """Generate tokens without an end; none when the answer is cancelled before the prompt is computed."""
        sampling, model = self.sampling, self.chat_model.model
        cached_tokens = model.longest_token_prefix(model.input_ids[: model.n_tokens].tolist(), self.prompt)
        for end in range(cached_tokens + PROMPT_BATCH, len(self.prompt), PROMPT_BATCH):
            if self.is_stopped():
                return
            next(model.generate(self.prompt[:end], temp=0.0))
        if self.is_stopped():
            return
        import llama_cpp

        # The default means a random seed.
        model.set_seed(llama_cpp.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed)
        yield from model.generate(
            self.prompt,
            temp=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repeat_penalty=sampling.repeat_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
        )


class StreamDecoder:
    """Decodes bytes to text and holds back half characters, stop strings, and text that may become a stop string."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.ended = stops, "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes, last: bool = False) -> str:
        """Return the text that is complete now. last: whether this is the last piece."""
        if self.ended:
            return ""
        text = self.held + self.decoder.decode(piece, last)
        stop_positions = [text.index(stop) for stop in self.stops if stop in text]
        self.ended = bool(stop_positions)
        held_length = 0 if last else self._partial_stop_length(text)
        cut = min(stop_positions, default=len(text) - held_length)
        self.held = text[cut:]
        return text[:cut]

    def _partial_stop_length(self, text: str) -> int:
        """Return the length of the longest end of `text` that is the beginning of a stop string."""
        return max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
