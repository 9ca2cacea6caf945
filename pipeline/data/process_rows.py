"""Process chunks of rows, in this process or in a pool of workers: parse, clean, mask, and compute fingerprints."""

import functools
import gc
import json
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.config.schema import Clean
from pipeline.data import duplicates, personal_data
from pipeline.data.chat_template import Chat
from pipeline.data.clean import Cleaner
from pipeline.data.drop_reasons import Unfit
from pipeline.data.file_formats import DuplicateKeys, Item, distinct
from pipeline.data.loss_mask import Masker, Rendered, Row
from pipeline.data.row_formats import Schema, conversation, unused_fields

CHUNK = 500  # rows; the same for one process and for many
SMALL = 4 * CHUNK  # rows that one process has done before a pool has even started
SAMPLED_QUESTIONS = 2000  # from the first lines of each part; more do not improve the smoke prompts
# The prompt of every tenth row, and of each held-out row, is also tokenized alone, as `verify` will need it.
SAMPLED = 10
LISTED = 50  # rows that an error names for each reason
# Different system prompts that are counted; where there are more, no prompt is shared by many rows.
MANY_PROMPTS = 2000
QUOTED = 2000  # characters of a dropped row that rejected.jsonl quotes


@dataclass(frozen=True)
class Settings:
    """The settings of a worker; each worker gets a copy."""

    tokenizer: Path
    chat: Chat
    clean: Clean
    every_turn: bool
    system: str | None
    """The system prompt that is added to rows without one."""
    limit: int
    """The setting base.max_seq_length, in tokens."""
    validation_share: float | None
    """Share of the rows that is held out by content hash; None: whole parts are held out or trained on."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of one part, in order.

    Attributes:
        part: The number of the part.
        name: The name of the part in messages.
        schema: The format of its rows.
        is_heldout: Whether the part is a validation file.
        rows: The rows, each with its line or row number.
    """

    part: int
    name: str
    schema: Schema
    held: bool
    items: list[Item]


@dataclass
class Tally:
    """Counts of what happened to rows.

    Attributes:
        rows: Rows that were read.
        notes: Lines for rejected.jsonl.
        dropped: Rows that were dropped, by reason.
        changed: Rows that were changed, by kind of change.
        findings: Secrets and personal data, by kind.
        truncated: Rows that were cut at the limit, and the tokens that were cut off.
    """

    rows: int = 0
    notes: list[dict] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    findings: Counter = field(default_factory=Counter)
    truncated: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first dropped row of each reason."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """Where the dropped rows of each reason are, at most the first MAX_LISTED_ROWS of them."""
    unused: Counter = field(default_factory=Counter)
    """Rows that have a field which is not trained on, by the name of the field."""
    system_prompts: Counter = field(default_factory=Counter)
    """Rows by their own system prompt; None counts the rows without one."""

    def drop(self, where: str, reason: str, detail: str, **more) -> None:
        """Count a dropped row, and note it with `fields` for rejected.jsonl."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, f"{where}: {detail}")
        self.places.setdefault(reason, []).append(where)
        self.notes.append({"where": where, "action": "dropped", "reason": reason, "detail": detail, **more})

    def add(self, other: "Tally") -> None:
        """Add the counts of another tally, without its notes."""
        self.rows += other.rows
        for name in ("dropped", "changed", "findings", "truncated", "unused", "system_prompts"):
            getattr(self, name).update(getattr(other, name))
        self.examples = other.examples | self.examples
        for reason, places in other.places.items():
            self.places[reason] = [*self.places.get(reason, []), *places][:LISTED]
        if len(self.system_prompts) > MANY_PROMPTS:
            self.system_prompts = Counter(dict(self.system_prompts.most_common(MANY_PROMPTS // 2)))

    def count_system_prompt(self, messages: list[dict]) -> None:
        self.system_prompts[messages[0]["content"] if messages[0]["role"] == "system" else None] += 1

    def note(self, where: str, changes: set[str], found: Counter) -> None:
        """Count the changes and findings of a kept row, and note them for rejected.jsonl."""
        self.changed.update(changes)
        self.findings.update(found)
        if changes or found:
            action = "changed" if changes else "reported"
            self.notes.append({"where": where, "action": action, "reason": ", ".join(sorted(changes | found.keys()))})


@dataclass
class Done:
    """The kept rows of a chunk.

    The arrays have one entry a row, but for `ids` and `loss`, which have one entry for each token of all rows.

    Attributes:
        part: The number of the part.
        tally: What happened to the rows of the chunk.
        lines: Line or row number of each row in its part.
        held: Whether the row is held out.
        lengths: Tokens of each row.
        ids: The token ids of all rows, one row after the other.
        loss: Whether each token carries loss.
        digests: Hashes by which exact duplicates are found.
        questions: Hashes by which rows with the same question are found.
        signatures: MinHash signatures, of shape (rows, PERMUTATIONS); empty where near duplicates are not searched.
        texts: Prompt, answer and messages of each held-out row.
    """

    part: int
    tally: Tally
    lines: np.ndarray
    held: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    loss: np.ndarray
    digests: np.ndarray
    questions: np.ndarray
    signatures: np.ndarray
    texts: list[dict]
    questions_asked: list[str] = field(default_factory=list)
    """The last questions of training rows from the first chunks only: smoke prompts are made to look like them."""


class Fit(NamedTuple):
    """A row that is cleaned and rendered; `question_hash` decides whether it is held out."""

    line: int
    where: str
    messages: list[dict]
    question: int
    held: bool
    rendered: Rendered
    changes: set[str]
    findings: Counter


class Worker:
    """Process one chunk of rows at a time. The same rows give the same bytes in every process."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.masker = Masker(settings.tokenizer, settings.chat, settings.every_turn)
        self.looks = (
            (settings.clean.secrets, personal_data.secrets),
            (settings.clean.personal, personal_data.personal),
        )
        self.cleaner = Cleaner(settings.clean, settings.chat.specials, settings.chat.raw)

    def __call__(self, chunk: Chunk) -> Done:
        """Return the kept rows of a chunk, with a tally of all its rows."""
        tally = Tally(len(chunk.items))
        fit = [item for item in (self.cleaned(chunk, line, payload, tally) for line, payload in chunk.items) if item]
        kept = []
        for item, row in zip(fit, self.masker.rows([item.rendered for item in fit]), strict=True):
            try:
                cut = self.fitted(row, item.held)
                if not cut and (item.held or not item.line % SAMPLED):
                    self.masker.refuse_unlike(row)
            except Unfit as unfit:
                self.drop(tally, item.where, unfit, item.messages)
                continue
            tally.note(item.where, item.changes, item.findings)
            tally.truncated.update({"rows": 1, "tokens": cut} if cut else {})
            kept.append((item, row))
        tally.notes.sort(key=lambda note: int(note["where"].rpartition(":")[2]))
        return self.done(chunk, tally, kept)

    def cleaned(self, chunk: Chunk, line: int, payload: bytes | dict, tally: Tally) -> "Fit | None":
        """Parse, clean and render one row; return None when it is dropped."""
        where, row = f"{chunk.name}:{line}", None
        try:
            row = parsed(payload)
            tally.unused.update(unused_fields(row, chunk.schema))
            messages, changes, findings = self.cleaner(conversation(row, chunk.schema))
            asked = duplicates.question(messages)
            tally.count_system_prompt(messages)
            messages = self.with_system(messages)
            rendered = self.masker.rendered(messages, self.longest())
        except Unfit as unfit:
            self.drop(tally, where, unfit, row)
            return None
        return Fit(line, where, messages, asked, self.held(chunk, asked), rendered, changes, findings)

    def drop(self, tally: Tally, where: str, unfit: Unfit, row: object) -> None:
        """Tally a dropped row and quote it, without the secrets and personal data that must not be kept."""
        try:
            known = self.harmless(row)
            text = json.dumps(known, default=repr, skipkeys=True)[:QUOTED]
        except (ValueError, RecursionError):
            known, text = row, f"{type(row).__name__}, nested too deeply to be written"
        detail = unfit.detail if known == row else "not quoted: the row holds a secret or personal data"
        tally.drop(where, unfit.reason, detail, **({} if row is None else {"row": text}))

    def harmless(self, value: object) -> object:
        """Return a row with secrets and personal data masked, if the config asks to mask or drop them."""
        looks = [look for action, look in self.looks if action in ("mask", "drop")]
        if not looks or isinstance(value, int | float | None):
            return value
        if isinstance(value, dict):
            return {self.harmless(key): self.harmless(below) for key, below in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.harmless(below) for below in value)
        text = value if isinstance(value, str) else repr(value)
        masked = functools.reduce(lambda said, look: personal_data.masked(said, look(said)), looks, text)
        return masked if masked != text else value

    def held(self, chunk: Chunk, question: int) -> bool:
        """Return whether a row with this hash of its question belongs to the held-out set."""
        share = self.settings.validation_share
        return chunk.held if share is None else question / 2**64 < share

    def longest(self) -> int | None:
        """Return the most tokens of a row that is worth tokenizing; None where long rows are truncated."""
        return self.settings.limit if self.settings.clean.too_long == "drop" else None

    def with_system(self, messages: list[dict]) -> list[dict]:
        """Add the default system prompt where the row has none; raise UnusableRow when the template drops prompts."""
        if messages[0]["role"] != "system" and self.settings.system:
            messages = [{"role": "system", "content": self.settings.system}, *messages]
        if messages[0]["role"] == "system" and not self.settings.chat.system:
            raise Unfit("system_ignored", f"the system prompt {messages[0]['content'][:40]!r}")
        return messages

    def fitted(self, row: Row | Unfit, held: bool) -> int:
        """Cut a row to the limit in place and return how many tokens were cut off; a held-out row is never cut.

        Raises:
            UnusableRow: The row is one already, is too short or too long, or has no token left that carries loss.
        """
        if isinstance(row, Unfit):
            raise row
        limit, clean, length = self.settings.limit, self.settings.clean, len(row.ids)
        if length < clean.min_tokens:
            raise Unfit("too_short", f"{length} tokens")
        if length > limit and (held or clean.too_long == "drop"):
            raise Unfit("too_long", f"{length} tokens, base.max_seq_length is {limit}")
        row.ids, row.loss = row.ids[:limit], row.loss[:limit]
        if not row.loss.any():
            raise Unfit("no_loss", f"no token of the assistant's within the first {limit}")
        return max(0, length - limit)

    def done(self, chunk: Chunk, tally: Tally, kept: list[tuple["Fit", Row]]) -> Done:
        """Return the kept rows as arrays."""
        clean, fits, rows = self.settings.clean, [fit for fit, _ in kept], [row for _, row in kept]
        compared = fits if clean.near_duplicates or clean.leakage else []
        return Done(
            chunk.part,
            tally,
            lines=np.array([fit.line for fit in fits], dtype=np.int64),
            held=np.array([fit.held for fit in fits], dtype=bool),
            lengths=np.array([len(row.ids) for row in rows], dtype=np.int32),
            ids=np.concatenate([row.ids for row in rows] or [np.zeros(0, np.int32)]),
            loss=np.concatenate([row.loss for row in rows] or [np.zeros(0, bool)]),
            digests=np.frombuffer(b"".join(duplicates.digest(fit.messages) for fit in fits), dtype="V16"),
            questions=np.array([fit.question for fit in fits], dtype=np.uint64),
            signatures=duplicates.signatures([duplicates.plain(fit.messages) for fit in compared]),
            texts=[
                {
                    "prompt": row.prompt,
                    "prompt_tokens": row.prompt_tokens,
                    "answer": row.answer,
                    "messages": fit.messages[:-1],
                }
                for fit, row in kept
                if fit.held
            ],
            questions_asked=[
                fit.messages[-2]["content"]
                for fit, _ in kept
                if not fit.held and fit.line <= SAMPLED_QUESTIONS and len(fit.messages) > 1
            ],
        )


def parsed(payload: bytes | dict) -> dict:
    """Return a row as an object, parsed where it is JSON text.

    Raises:
        UnusableRow: The text is no UTF-8 or no JSON, or the object has a key twice.
    """
    if isinstance(payload, bytes):
        try:
            payload = json.loads(payload.decode(), object_pairs_hook=distinct)
        except UnicodeDecodeError as error:
            raise Unfit("broken_encoding", f"no UTF-8: {error.reason} at byte {error.start + 1} of the line") from None
        except (ValueError, RecursionError) as error:
            raise Unfit("broken_json", str(error)) from None
    if isinstance(payload, DuplicateKeys):
        raise Unfit("duplicate_keys", f"its keys are {', '.join(map(str, payload))}, and one stands there twice")
    return payload


_worker: Worker | None = None


def _begin(settings: Settings) -> None:
    """Prepare a process of the pool: create its worker, ignore Ctrl-C, and let it end with its parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; only the parent reports it
    _worker = Worker(settings)
    gc.freeze()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent ends: after a kill -9 of the parent, a worker would wait for ever."""
    parent_process().join()
    os._exit(1)


def _work(chunk: Chunk) -> Done:
    return _worker(chunk)


def through(chunks: Iterable[Chunk], settings: Settings, processes: int) -> Iterator[Done]:
    """Process all chunks and yield the results in their order, with at most two chunks a process in memory."""
    chunks = iter(chunks)
    head = list(islice(chunks, SMALL // CHUNK))
    if processes == 1 or len(head) < SMALL // CHUNK:
        yield from map(Worker(settings), chain(head, chunks))
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (settings,)) as pool:
        waiting: deque = deque()
        try:
            for chunk in chain(head, chunks):
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
