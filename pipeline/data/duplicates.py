"""Exact and near duplicates, and training rows that give held-out rows away: 280 bytes a row, whatever its length.

Near means: the MinHash estimate of the Jaccard similarity of word 3-grams (case and punctuation ignored; system prompts
left out) reaches a threshold. 128 permutations: the estimate's standard error is 0.027 at 0.9. Signatures come from
rensa. Its index holds every row's bands at once (2.5 GB for a million rows, measured), so candidates are found here band
by band, by sorting; the result does not depend on the order of work.
"""

import hashlib
import json
import re

import numpy as np

PERMUTATIONS = 128
BANDS, WIDTH = 21, 6  # a pair of similarity 0.8 meets in one band with 99.8 %, of 0.9 with 99.99999 %, of 0.5 with 28 %
SEED = 3407
ROUNDS = 64  # leaders tried in one group: many unlike rows that share a band (templated data) must not take for ever
PAIRS = 50_000  # compared at once: 25 MB
WORD = re.compile(r"\w+")


def plain(messages: list[dict]) -> str:
    """What is compared: the words of user and assistant."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def digest(messages: list[dict]) -> bytes:
    """16 bytes of a conversation: equal ones are exact duplicates."""
    fields = [(message["role"], message["content"]) for message in messages]
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).digest()


def question(messages: list[dict]) -> int:
    """64 bits of all that is not the assistant's, case and white space ignored; of the whole text if there is nothing else.

    The split goes by it: one question never stands on both sides, and adding rows never moves an old row across.
    """
    asked = [m["content"] for m in messages if m["role"] == "user"] or [m["content"] for m in messages]
    text = "\n".join(" ".join(content.lower().split()) for content in asked)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def signatures(texts: list[str]) -> np.ndarray:
    """MinHash signatures, uint16 of shape (texts, PERMUTATIONS). 16 of 32 bits: they agree by chance once in 65,536."""
    from rensa import RMinHash

    rows = RMinHash.digests_from_token_sets([shingles(text) for text in texts], num_perm=PERMUTATIONS, seed=SEED)
    return np.array(rows, dtype=np.uint32).reshape(len(texts), PERMUTATIONS).astype(np.uint16)


def shingles(text: str) -> list[str]:
    """Word 3-grams, lower case; of a shorter text the words that there are."""
    words = WORD.findall(text.lower())
    return list(map(" ".join, zip(words, words[1:], words[2:], strict=False))) or [" ".join(words)]


def exact(digests: np.ndarray) -> np.ndarray:
    """For each row the index of the first row with the same digest; its own, if there is none before."""
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    return first[group]


def near(
    signs: np.ndarray, threshold: float, rows: np.ndarray, held: np.ndarray | None = None
) -> dict[int, tuple[int, float]]:
    """{row: (the row that it nearly repeats, estimated similarity)}, for `rows` (indexes, in order).

    Without `held` every row is compared with earlier ones. With it (one bool a row of signs) only rows that are not
    held out are compared, with held-out ones. A row may repeat one that is dropped itself: what is near is a cluster.
    """
    found: dict[int, tuple[int, float]] = {}
    alive = np.ones(len(signs), dtype=bool)
    if held is not None:
        rows = np.concatenate([rows[held[rows]], rows[~held[rows]]])  # the first of a group is the row that stays
    multipliers = np.random.default_rng(SEED).integers(0, 2**64, WIDTH, dtype=np.uint64) | np.uint64(1)
    for band in range(0, BANDS * WIDTH, WIDTH):
        keys = (signs[rows, band : band + WIDTH].astype(np.uint64) * multipliers).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        _compare(signs, threshold, rows[order], keys[order], held, found)
        alive[list(found)] = False
        rows = rows[alive[rows]]
    return found


def _compare(
    signs: np.ndarray, threshold: float, rows: np.ndarray, keys: np.ndarray, held: np.ndarray | None, found: dict
) -> None:
    """Add to `found` what repeats the first row of its group (equal keys, side by side); then the first of the rest leads."""
    for _ in range(ROUNDS):
        first = np.r_[True, keys[1:] != keys[:-1]]
        leads = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))]
        pairs = np.flatnonzero(~first if held is None else ~first & held[leads] & ~held[rows])
        if not len(pairs):
            return
        alike = np.concatenate([
            (signs[rows[some]] == signs[leads[some]]).mean(axis=1)
            for some in np.array_split(pairs, len(pairs) // PAIRS + 1)
        ])  # fmt: skip
        hits = alike >= threshold
        found |= {int(rows[at]): (int(leads[at]), float(s)) for at, s in zip(pairs[hits], alike[hits], strict=True)}
        left = ~first
        left[pairs[hits]] = False
        rows, keys = rows[left], keys[left]


def asked(questions: np.ndarray, held: np.ndarray, kept: np.ndarray) -> dict[int, tuple[int, float]]:
    """Training rows whose question a held-out row asks too: {row: (that held-out row, 1.0)}."""
    there = np.flatnonzero(held & kept)
    first = {int(questions[row]): int(row) for row in there[::-1]}
    rows = np.flatnonzero(kept & ~held & np.isin(questions, questions[there]))
    return {int(row): (first[int(questions[row])], 1.0) for row in rows}
