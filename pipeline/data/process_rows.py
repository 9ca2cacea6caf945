"""Process chunks of rows, in this process or in a pool of workers: parse, clean, mask, and compute fingerprints."""

import functools
import gc
import json
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.config.schema import Clean
from pipeline.data import duplicates, personal_data
from pipeline.data.chat_template import ChatFormat
from pipeline.data.clean import Cleaner
from pipeline.data.drop_reasons import UnusableRow
from pipeline.data.file_formats import DuplicateKeys, NumberedRow, mark_duplicate_keys
from pipeline.data.loss_mask import Masker, RenderedConversation, TokenizedRow
from pipeline.data.row_formats import RowSchema, build_conversation, find_unused_fields

CHUNK_ROWS = 500  # rows; the same for one process and for many
MIN_POOL_ROWS = 4 * CHUNK_ROWS  # rows that one process has done before a pool has even started
MAX_SAMPLE_LINES = 2000  # from the first lines of each part; more do not improve the smoke prompts
# The prompt of every tenth row, and of each held-out row, is also tokenized alone, as `verify` will need it.
PROMPT_CHECK_INTERVAL = 10
MAX_LISTED_ROWS = 50  # rows that an error names for each reason
# Different system prompts that are counted; where there are more, no prompt is shared by many rows.
MAX_SYSTEM_PROMPTS = 2000
MAX_QUOTED_CHARACTERS = 2000  # characters of a dropped row that rejected.jsonl quotes


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a worker; each worker gets a copy."""

    tokenizer_dir: Path
    chat: ChatFormat
    clean: Clean
    every_turn: bool
    default_system: str | None
    """The system prompt that is added to rows without one."""
    max_tokens: int
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
    schema: RowSchema
    is_heldout: bool
    rows: list[NumberedRow]


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
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first dropped row of each reason."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """Where the dropped rows of each reason are, at most the first MAX_LISTED_ROWS of them."""
    unused: Counter[str] = field(default_factory=Counter)
    """Rows that have a field which is not trained on, by the name of the field."""
    system_prompts: Counter[str | None] = field(default_factory=Counter)
    """Rows by their own system prompt; None counts the rows without one."""

    def count_drop(self, place: str, reason: str, detail: str, **fields) -> None:
        """Count a dropped row, and note it with `fields` for rejected.jsonl."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, f"{place}: {detail}")
        self.places.setdefault(reason, []).append(place)
        self.notes.append({"where": place, "action": "dropped", "reason": reason, "detail": detail, **fields})

    def add(self, other: "Tally") -> None:
        """Add the counts of another tally, without its notes."""
        self.rows += other.rows
        for name in ("dropped", "changed", "findings", "truncated", "unused", "system_prompts"):
            getattr(self, name).update(getattr(other, name))
        self.examples = other.examples | self.examples
        for reason, places in other.places.items():
            self.places[reason] = [*self.places.get(reason, []), *places][:MAX_LISTED_ROWS]
        if len(self.system_prompts) > MAX_SYSTEM_PROMPTS:
            self.system_prompts = Counter(dict(self.system_prompts.most_common(MAX_SYSTEM_PROMPTS // 2)))

    def count_system_prompt(self, messages: list[dict[str, str]]) -> None:
        self.system_prompts[messages[0]["content"] if messages[0]["role"] == "system" else None] += 1

    def count_changes(self, place: str, changes: set[str], findings: Counter[str]) -> None:
        """Count the changes and findings of a kept row, and note them for rejected.jsonl."""
        self.changed.update(changes)
        self.findings.update(findings)
        if changes or findings:
            action, reason = "changed" if changes else "reported", ", ".join(sorted(changes | findings.keys()))
            self.notes.append({"where": place, "action": action, "reason": reason})


@dataclass
class ProcessedChunk:
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
    texts: list[dict[str, object]]
    sample_questions: list[str] = field(default_factory=list)
    """The last questions of training rows from the first chunks only: smoke prompts are made to look like them."""


class CleanRow(NamedTuple):
    """A row that is cleaned and rendered; `question_hash` decides whether it is held out."""

    line: int
    place: str
    messages: list[dict[str, str]]
    question_hash: int
    is_heldout: bool
    rendered: RenderedConversation
    changes: set[str]
    findings: Counter[str]


class Worker:
    """Process one chunk of rows at a time. The same rows give the same bytes in every process."""

    def __init__(self, settings: WorkerSettings):
        self.settings = settings
        self.masker = Masker(settings.tokenizer_dir, settings.chat, settings.every_turn)
        self.searches = (
            (settings.clean.secrets, personal_data.find_secrets),
            (settings.clean.personal, personal_data.find_personal_data),
        )
        self.cleaner = Cleaner(settings.clean, settings.chat.special_tokens, settings.chat.is_raw)

    def __call__(self, chunk: Chunk) -> ProcessedChunk:
        """Return the kept rows of a chunk, with a tally of all its rows."""
        tally = Tally(len(chunk.rows))
        results = (self.clean_row(chunk, line, payload, tally) for line, payload in chunk.rows)
        clean_rows = [item for item in results if item]
        tokenized_rows = self.masker.tokenize_rows([item.rendered for item in clean_rows])
        kept = []
        for item, row in zip(clean_rows, tokenized_rows, strict=True):
            try:
                if isinstance(row, UnusableRow):
                    raise row
                cut_tokens = self.cut_and_check(row, item)
            except UnusableRow as error:
                self.record_drop(tally, item.place, error, item.messages)
                continue
            tally.count_changes(item.place, item.changes, item.findings)
            tally.truncated.update({"rows": 1, "tokens": cut_tokens} if cut_tokens else {})
            kept.append((item, row))
        tally.notes.sort(key=lambda note: int(note["where"].rpartition(":")[2]))
        return self.pack_rows(chunk, tally, kept)

    def clean_row(self, chunk: Chunk, line: int, payload: bytes | dict, tally: Tally) -> CleanRow | None:
        """Parse, clean and render one row; return None when it is dropped."""
        place, row = f"{chunk.name}:{line}", None
        try:
            row = parse_row(payload)
            tally.unused.update(find_unused_fields(row, chunk.schema))
            messages, changes, findings = self.cleaner(build_conversation(row, chunk.schema))
            question_hash = duplicates.hash_question(messages)
            tally.count_system_prompt(messages)
            messages = self.add_system_prompt(messages)
            rendered = self.masker.render(messages, self.token_limit())
        except UnusableRow as error:
            self.record_drop(tally, place, error, row)
            return None
        return CleanRow(
            line, place, messages, question_hash, self.is_heldout(chunk, question_hash), rendered, changes, findings
        )

    def record_drop(self, tally: Tally, place: str, error: UnusableRow, row: object) -> None:
        """Tally a dropped row and quote it, without the secrets and personal data that must not be kept."""
        try:
            harmless_row = self.mask_private_values(row)
            text = json.dumps(harmless_row, default=repr, skipkeys=True)[:MAX_QUOTED_CHARACTERS]
        except (ValueError, RecursionError):
            harmless_row, text = row, f"{type(row).__name__}, nested too deeply to be written"
        detail = error.detail if harmless_row == row else "not quoted: the row holds a secret or personal data"
        tally.count_drop(place, error.reason, detail, **({} if row is None else {"row": text}))

    def mask_private_values(self, value: object) -> object:
        """Return a row with secrets and personal data masked, if the config asks to mask or drop them."""
        searches = [search for action, search in self.searches if action in ("mask", "drop")]
        if not searches or isinstance(value, int | float | None):
            return value
        if isinstance(value, dict):
            return {self.mask_private_values(key): self.mask_private_values(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.mask_private_values(inner) for inner in value)
        text = value if isinstance(value, str) else repr(value)
        masked = functools.reduce(
            lambda masked_text, search: personal_data.mask_findings(masked_text, search(masked_text)), searches, text
        )
        return masked if masked != text else value

    def is_heldout(self, chunk: Chunk, question_hash: int) -> bool:
        """Return whether a row with this hash of its question belongs to the held-out set."""
        share = self.settings.validation_share
        return chunk.is_heldout if share is None else question_hash / 2**64 < share

    def token_limit(self) -> int | None:
        """Return the most tokens of a row that is worth tokenizing; None where long rows are truncated."""
        return self.settings.max_tokens if self.settings.clean.too_long == "drop" else None

    def add_system_prompt(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Add the default system prompt where the row has none; raise UnusableRow when the template drops prompts."""
        if messages[0]["role"] != "system" and self.settings.default_system:
            messages = [{"role": "system", "content": self.settings.default_system}, *messages]
        if messages[0]["role"] == "system" and not self.settings.chat.supports_system:
            raise UnusableRow("system_ignored", f"the system prompt {messages[0]['content'][:40]!r}")
        return messages

    def cut_and_check(self, row: TokenizedRow, item: CleanRow) -> int:
        """Cut a row to the limit, compare the tokens of its prompt, and return how many tokens were cut off."""
        cut_tokens = self.cut_to_limit(row, item.is_heldout)
        if not cut_tokens and (item.is_heldout or not item.line % PROMPT_CHECK_INTERVAL):
            self.masker.refuse_other_prompt_tokens(row)
        return cut_tokens

    def cut_to_limit(self, row: TokenizedRow, is_heldout: bool) -> int:
        """Cut a row to the limit in place and return how many tokens were cut off; a held-out row is never cut.

        Raises:
            UnusableRow: The row is too short or too long, or has no token left that carries loss.
        """
        limit, clean, length = self.settings.max_tokens, self.settings.clean, len(row.ids)
        if length < clean.min_tokens:
            raise UnusableRow("too_short", f"{length} tokens")
        if length > limit and (is_heldout or clean.too_long == "drop"):
            raise UnusableRow("too_long", f"{length} tokens, base.max_seq_length is {limit}")
        row.ids, row.loss = row.ids[:limit], row.loss[:limit]
        if not row.loss.any():
            raise UnusableRow("no_loss", f"no token of the assistant within the first {limit} tokens")
        return max(0, length - limit)

    def pack_rows(self, chunk: Chunk, tally: Tally, kept: list[tuple[CleanRow, TokenizedRow]]) -> ProcessedChunk:
        """Return the kept rows as arrays."""
        clean, clean_rows, rows = self.settings.clean, [clean_row for clean_row, _ in kept], [row for _, row in kept]
        rows_to_compare = clean_rows if clean.near_duplicates or clean.leakage else []
        return ProcessedChunk(
            chunk.part,
            tally,
            lines=np.array([clean_row.line for clean_row in clean_rows], dtype=np.int64),
            held=np.array([clean_row.is_heldout for clean_row in clean_rows], dtype=bool),
            lengths=np.array([len(row.ids) for row in rows], dtype=np.int32),
            ids=np.concatenate([row.ids for row in rows] or [np.zeros(0, np.int32)]),
            loss=np.concatenate([row.loss for row in rows] or [np.zeros(0, bool)]),
            digests=np.frombuffer(
                b"".join(duplicates.hash_conversation(clean_row.messages) for clean_row in clean_rows), dtype="V16"
            ),
            questions=np.array([clean_row.question_hash for clean_row in clean_rows], dtype=np.uint64),
            signatures=duplicates.compute_signatures(
                [duplicates.text_to_compare(clean_row.messages) for clean_row in rows_to_compare]
            ),
            texts=[_describe_heldout_row(clean_row, row) for clean_row, row in kept if clean_row.is_heldout],
            sample_questions=[
                clean_row.messages[-2]["content"]
                for clean_row, _ in kept
                if not clean_row.is_heldout and clean_row.line <= MAX_SAMPLE_LINES and len(clean_row.messages) > 1
            ],
        )


def _describe_heldout_row(clean_row: CleanRow, row: TokenizedRow) -> dict[str, object]:
    """Return the texts of a held-out row."""
    answer = {"prompt": row.prompt, "prompt_tokens": row.prompt_tokens, "answer": row.answer}
    return answer | {"messages": clean_row.messages[:-1]}


def parse_row(payload: bytes | dict) -> object:
    """Return a row, parsed where it is JSON text. Raise UnusableRow when that fails, or when a key is repeated."""
    row = _parse_line(payload) if isinstance(payload, bytes) else payload
    if isinstance(row, DuplicateKeys):
        raise UnusableRow("duplicate_keys", f"the row repeats one of its keys {', '.join(map(str, row))}")
    return row


def _parse_line(line: bytes) -> object:
    """Return the JSON value of a line. Raise UnusableRow when the line is not UTF-8, or not JSON."""
    try:
        return json.loads(line.decode(), object_pairs_hook=mark_duplicate_keys)
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start + 1} of the line"
        raise UnusableRow("broken_encoding", f"not UTF-8: {place}") from None
    except (ValueError, RecursionError) as error:
        raise UnusableRow("broken_json", str(error)) from None


_worker: Worker  # of a process of the pool, which `_start_worker` creates


def _start_worker(settings: WorkerSettings) -> None:
    """Prepare a process of the pool: create its worker, ignore Ctrl-C, and let it end with its parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; only the parent reports it
    _worker = Worker(settings)
    gc.freeze()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process when its parent ends: after a kill -9 of the parent, a worker would wait for ever."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _process_chunk(chunk: Chunk) -> ProcessedChunk:
    return _worker(chunk)


def process_chunks(chunks: Iterable[Chunk], settings: WorkerSettings, processes: int) -> Iterator[ProcessedChunk]:
    """Process all chunks and yield the results in their order, with at most two chunks a process in memory."""
    chunks = iter(chunks)
    first_chunks = list(islice(chunks, MIN_POOL_ROWS // CHUNK_ROWS))
    if processes == 1 or len(first_chunks) < MIN_POOL_ROWS // CHUNK_ROWS:
        yield from map(Worker(settings), chain(first_chunks, chunks))
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (settings,)) as pool:
        futures: deque[Future[ProcessedChunk]] = deque()
        try:
            for chunk in chain(first_chunks, chunks):
                futures.append(pool.submit(_process_chunk, chunk))
                if len(futures) > 2 * processes:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
