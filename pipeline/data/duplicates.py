"""Find exact and near duplicates, and training rows that leak held-out rows.

This takes 280 bytes of memory a row, whatever the row's length.

Two rows are near duplicates when the MinHash estimate of the Jaccard similarity of their word 3-grams reaches a
threshold (case and punctuation are ignored, system prompts are left out). With 128 permutations the estimate's standard
error is 0.027 at 0.9. The signatures come from rensa. Its index would hold the bands of all rows at once (2.5 GB for a
million rows, measured), so candidates are found here one band at a time, by sorting. The result does not depend on the
order of work.
"""

import hashlib
import json
import re

import numpy as np

PERMUTATIONS = 128  # hashes of 32 bits, of which 16 are kept: two different ones agree by chance once in 65,536
BANDS, BAND_WIDTH = 21, 6  # chance that a pair shares a band: 99.8 % at similarity 0.8, 99.99999 % at 0.9, 28 % at 0.5
SEED = 3407
MAX_ROUNDS = 64  # leads tried in one group: many unlike rows that share a band (templated data) must not take for ever
PAIRS_AT_ONCE = 50_000  # compared at once: 25 MB
WORD = re.compile(r"\w+")


def text_to_compare(messages: list[dict[str, str]]) -> str:
    """Return the text in which near duplicates are searched: the words of user and assistant."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def hash_conversation(messages: list[dict[str, str]]) -> bytes:
    """Return a hash of 16 bytes that only exact duplicates share."""
    fields = [(message["role"], message["content"]) for message in messages]
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).digest()


def hash_question(messages: list[dict[str, str]]) -> int:
    """Return a hash of 64 bits of the user's messages (without any, of all), case and white space ignored.

    The held-out set is split off by it: a question is never in both sets, and new rows move no old row to the other.
    """
    asked = [message for message in messages if message["role"] == "user"] or messages
    text = "\n".join(" ".join(message["content"].lower().split()) for message in asked)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def compute_signatures(texts: list[str]) -> np.ndarray:
    """Return the MinHash signatures, uint16 of shape (texts, PERMUTATIONS)."""
    from rensa import RMinHash

    shingles = [split_shingles(text) for text in texts]
    digests = RMinHash.digests_from_token_sets(shingles, num_perm=PERMUTATIONS, seed=SEED)
    return np.array(digests, dtype=np.uint32).reshape(len(texts), PERMUTATIONS).astype(np.uint16)


def split_shingles(text: str) -> list[str]:
    """Return the word 3-grams in lower case; for a text of fewer words, all its words as one entry."""
    words = WORD.findall(text.lower())
    return list(map(" ".join, zip(words, words[1:], words[2:], strict=False))) or [" ".join(words)]


def find_first_equal(digests: np.ndarray) -> np.ndarray:
    """Return for each row the index of the first row with the same digest: its own, if no earlier row has it."""
    _, first_rows, group_numbers = np.unique(digests, return_index=True, return_inverse=True)
    return first_rows[group_numbers]


def find_near_duplicates(
    signatures: np.ndarray, threshold: float, rows: np.ndarray, is_heldout: np.ndarray | None = None
) -> dict[int, tuple[int, float]]:
    """Find the rows that nearly repeat another row.

    A row may repeat one that is dropped itself, because near duplicates form clusters.

    Args:
        signatures: The MinHash signatures of all rows.
        threshold: The similarity from which a row counts as a near duplicate.
        rows: The indexes of the rows to compare, in order.
        is_heldout: One bool for each row of `signatures`. With it, only training rows are compared, and only with
            held-out rows. Without it, every row is compared with the rows before it.

    Returns:
        {row: (the row that it nearly repeats, estimated similarity)}.
    """
    repeated: dict[int, tuple[int, float]] = {}
    is_unmatched = np.ones(len(signatures), dtype=bool)
    if is_heldout is not None:
        # The first row of a group is the one that is kept: held-out rows come first.
        rows = np.concatenate([rows[is_heldout[rows]], rows[~is_heldout[rows]]])
    multipliers = np.random.default_rng(SEED).integers(0, 2**64, BAND_WIDTH, dtype=np.uint64) | np.uint64(1)
    for band in range(0, BANDS * BAND_WIDTH, BAND_WIDTH):
        keys = (signatures[rows, band : band + BAND_WIDTH].astype(np.uint64) * multipliers).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        _compare_with_leads(signatures, threshold, rows[order], keys[order], is_heldout, repeated)
        is_unmatched[list(repeated)] = False
        rows = rows[is_unmatched[rows]]
    return repeated


def _compare_with_leads(
    signatures: np.ndarray,
    threshold: float,
    rows: np.ndarray,
    keys: np.ndarray,
    is_heldout: np.ndarray | None,
    repeated: dict[int, tuple[int, float]],
) -> None:
    """Compare each row with the lead of its group, and add those that repeat it to `repeated`.

    A group is a run of rows with equal keys, and its lead is its first row. In the next round the leads and the rows
    that were found are left out, and the first row of the rest leads the group.
    """
    for _ in range(MAX_ROUNDS):
        is_first = np.r_[True, keys[1:] != keys[:-1]]
        leads = rows[np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))]
        pairs = np.flatnonzero(~is_first if is_heldout is None else ~is_first & is_heldout[leads] & ~is_heldout[rows])
        if not len(pairs):
            return
        similarity = np.concatenate(
            [
                (signatures[rows[part]] == signatures[leads[part]]).mean(axis=1)
                for part in np.array_split(pairs, len(pairs) // PAIRS_AT_ONCE + 1)
            ]
        )
        is_hit = similarity >= threshold
        repeated |= {
            int(rows[index]): (int(leads[index]), float(value))
            for index, value in zip(pairs[is_hit], similarity[is_hit], strict=True)
        }
        is_left = ~is_first
        is_left[pairs[is_hit]] = False
        rows, keys = rows[is_left], keys[is_left]


def find_shared_questions(
    questions: np.ndarray, is_heldout: np.ndarray, is_kept: np.ndarray
) -> dict[int, tuple[int, float]]:
    """Return {row: (held-out row, 1.0)} for the training rows whose question a held-out row asks too."""
    heldout_rows = np.flatnonzero(is_heldout & is_kept)
    heldout_by_question = {int(questions[row]): int(row) for row in heldout_rows[::-1]}
    leaking_rows = np.flatnonzero(is_kept & ~is_heldout & np.isin(questions, questions[heldout_rows]))
    return {int(row): (heldout_by_question[int(questions[row])], 1.0) for row in leaking_rows}
