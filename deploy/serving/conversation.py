"""The engine of `chat` and `serve`: a conversation becomes the trained prompt, its token ids, and the model's words.

The template in the file is rendered in the sandbox and the text is tokenized as `verify` and `smoke` do it. Token ids are
all that llama.cpp gets, so no library guesses a chat format or puts a second BOS in front of the prompt.
"""

import codecs
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import child_process, gguf_reader, llama_runtime
from common.errors import UserError, shown
from contract import chat_format, template_sandbox
from contract.manifest import Manifest
from deploy import store
from deploy.stages import memory_need, modelfile

if TYPE_CHECKING:
    from llama_cpp import Llama

START_SECONDS, SECONDS_OF_BYTE = 120, 60e-9  # until it answers: a busy machine, a cold disk
BATCH = 256  # tokens of a prompt that are read at a time: so long, at most, waits who gives an answer up


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and where it ends, by llama.cpp's names; what the manifest does not name is off."""

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


def run_in_child(function: str, version: Path, arguments: list) -> int:
    """Run `function(version, *arguments)` in a process that has this terminal; return its exit code.

    Raises UserError when llama.cpp crashes there, takes too long to start or too much memory.
    """
    made, path = store.passed(version)
    size = path.stat().st_size
    limits = memory_need.limits(
        gguf_reader.read(path), size, made.generation.num_ctx, START_SECONDS + size * SECONDS_OF_BYTE
    )
    return child_process.run_attached(function, [str(version), *arguments], limits, f"llama.cpp with {path.name}")


@contextlib.contextmanager
def opened(version: Path, context: int | None = None) -> Iterator["Talk"]:
    """The pulled model, loaded and proven. context: at most so many tokens; never more than the manifest's, nor than fit in memory.

    Raises UserError when the file did not pass its smoke test, or a golden prompt is not the trained one.
    """
    made, path = store.passed(version)
    size = min(context or made.generation.num_ctx, modelfile.fitting(made, path))
    model = llama_runtime.load(path, size)
    try:
        talk = Talk(made, model, size)
        talk.prove()
        child_process.report_ready()
        yield talk
    finally:
        model.close()


class Talk:
    """A model and the conversations that it is asked to go on with."""

    def __init__(self, made: Manifest, model: "Llama", context: int):
        import llama_cpp

        self.made, self.model, self.context = made, model, context
        self.vocabulary = llama_cpp.llama_model_get_vocab(model.model)
        self.template = chat_format.embedded(model)
        self.bos, self.eos = chat_format.special(model, "bos"), chat_format.special(model, "eos")
        usual = made.generation
        stops = tuple(stop for stop in made.chat.stop if stop)
        self.sampling = Sampling(usual.temperature, usual.top_p, usual.max_tokens, stops)

    def prove(self) -> None:
        """Every prompt of the manifest comes out of `ids`, as all others do. Raises UserError when one is another."""
        asked = [(golden.messages, golden.add_generation_prompt) for golden in self.made.golden]
        asked += [
            (self.with_default_system([{"role": "user", "content": smoke.message}]), True) for smoke in self.made.smoke
        ]
        wanted = [known.ids for known in (*self.made.golden, *self.made.smoke)]
        for (messages, _), found, trained in zip(asked, self.ids(asked), wanted, strict=True):
            if found != list(trained):
                raise UserError(
                    f"the prompt for {shown(messages[-1]['content'], 60)!r} is not the trained one: it has the tokens "
                    f"{found[:8]}..., the manifest {list(trained[:8])}...",
                    "run `make smoke`; if it passes, report it",
                )

    def ids(self, conversations: Sequence[tuple[Sequence[dict], bool]]) -> list[list[int]]:
        """Token ids of each (messages, add_generation_prompt): a BOS stands where the template puts one, and only there."""
        texts = template_sandbox.prompts(self.template, conversations, self.bos, self.eos)
        return [llama_runtime.tokenize(self.model, text) for text in texts]

    def with_default_system(self, messages: Sequence[dict]) -> list[dict]:
        """With the default system prompt in front where the conversation has none.
        A default that the template has of its own stays the template's business."""
        system = self.made.chat.system
        own = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
        return [*own, *messages]

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        """What the model is fed to answer. Raises UserError when its template does not take the conversation."""
        try:
            return self.ids([(messages, True)])[0]
        except UserError as error:
            why = error.message.removeprefix("the chat template is refused: ")
            raise UserError(
                f"the model's chat template does not take this conversation: {why}",
                "leave the system prompt away, or begin anew",
            ) from error

    def fitted(self, messages: Sequence[dict]) -> tuple[list[dict], list[int]]:
        """The newest messages that leave room for an answer, and their prompt. The system prompt and the last question are
        never left out."""
        room = self.context - min(self.sampling.max_tokens, self.context // 2)
        kept, ids = list(messages), self.prompt(messages)
        while len(ids) > room and (shorter := without_oldest(kept)):
            kept, ids = shorter, self.prompt(shorter)
        return kept, ids

    def raw(self, text: str) -> list[int]:
        """Token ids of a text that is no conversation, behind one BOS where the model wants one."""
        import llama_cpp

        ids, bos = llama_runtime.tokenize(self.model, text), self.model.token_bos()
        return [bos, *ids] if llama_cpp.llama_vocab_get_add_bos(self.vocabulary) and ids[:1] != [bos] else ids

    def ends(self, token: int) -> bool:
        """Is it one of the tokens that llama.cpp stops at?"""
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(self.vocabulary, token)


def without_oldest(messages: Sequence[dict]) -> list[dict] | None:
    """Without the oldest question and all that was said to it; None when it is the only one."""
    system = 1 if messages[0]["role"] == "system" else 0
    users = [i for i, message in enumerate(messages) if i > system and message["role"] == "user"]
    return [*messages[:system], *messages[users[0] :]] if users else None


class TooLong(UserError):
    """A prompt that leaves no room for an answer."""


class Answer:
    """The words that follow a prompt, as they come; for one reader. Afterwards `ids` holds the tokens, `end` says why it ended.

    The cache keeps what it has in common with the last prompt and answer: only what is new is read.
    """

    def __init__(self, talk: Talk, prompt: list[int], sampling: Sampling, stopped: Callable[[], bool] = lambda: False):
        """stopped: asked at every token whether the answer is given up. Raises TooLong, or UserError for an empty prompt."""
        self.talk, self.prompt, self.sampling, self.stopped = talk, prompt, sampling, stopped
        self.most = min(sampling.max_tokens, talk.context - len(prompt))
        if self.most < 1:
            raise TooLong(f"that makes {len(prompt)} tokens, the context has {talk.context}", "say it in fewer words")
        if not prompt:
            raise UserError("the prompt is empty", "say something")
        self.ids: list[int] = []
        self.end: str | None = None  # "stop", "length" or "stopped"

    def __iter__(self) -> Iterator[str]:
        words = Words(self.sampling.stop)
        for token in self._tokens():
            if self.talk.ends(token):
                self.end = "stop"
                break
            self.ids.append(token)
            yield words.add(llama_runtime.piece(self.talk.model, token))
            self.end = "stop" if words.ended else "length" if len(self.ids) == self.most else None
            if self.end or self.stopped():
                break
        self.end = self.end or "stopped"
        yield words.add(b"", last=True)

    def _tokens(self) -> Iterator[int]:
        """Those that the model gives, without an end; none when it is stopped before the prompt is read."""
        how, model = self.sampling, self.talk.model
        known = model.longest_token_prefix(model.input_ids[: model.n_tokens].tolist(), self.prompt)
        for end in range(known + BATCH, len(self.prompt), BATCH):
            if self.stopped():
                return
            next(model.generate(self.prompt[:end], temp=0.0))
        if self.stopped():
            return
        import llama_cpp

        model.set_seed(llama_cpp.LLAMA_DEFAULT_SEED if how.seed is None else how.seed)  # the default one is a new one
        yield from model.generate(
            self.prompt, temp=how.temperature, top_p=how.top_p, top_k=how.top_k, min_p=how.min_p, repeat_penalty=how.repeat_penalty,
            frequency_penalty=how.frequency_penalty, presence_penalty=how.presence_penalty,
        )  # fmt: skip


class Words:
    """Bytes to text: never half a character, nothing of a stop string, nor of what may yet become one."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.ended = stops, "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes, last: bool = False) -> str:
        """The text that is certain now. last: nothing follows."""
        if self.ended:
            return ""
        text = self.held + self.decoder.decode(piece, last)
        found = [text.index(stop) for stop in self.stops if stop in text]
        self.ended = bool(found)
        cut = min(found) if found else len(text) - (0 if last else self._may_stop(text))
        self.held = text[cut:]
        return text[:cut]

    def _may_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        return max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
