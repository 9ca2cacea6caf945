"""Make smoke prompts that look like the rows but repeat no row's text.

A smoke prompt becomes part of the manifest, so it must not repeat a user's words. It is a chain of words. Each of its
words, and each three words that follow each other, occur in at least SHARED_BY rows; digits and codes are drawn anew.
Of many such chains the most probable ones are taken.
"""

import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise

from contract.chat_format import ALPACA_INPUT
from pipeline.data import personal_data

SHARED_BY = 5  # rows that must have a word, or three words that follow each other
CHAINS_TO_DRAW = 20_000  # 0.3 s for 2,000 rows
MIN_WORDS, MAX_WORDS = 4, 25  # words of a prompt
START, END = "<start>", "<end>"
GENERAL_PROMPTS = ("What can you do?", "Say hello in one sentence.", "Name three colours.")


@dataclass(frozen=True)
class WordStatistics:
    """Word counts of the rows.

    Attributes:
        rows_with: Rows that have a word.
        rows_with_three: Rows that have three words in this order.
        followers: How often a word follows another.
    """

    rows_with: Counter[str]
    rows_with_three: Counter[tuple[str, str, str]]
    followers: dict[str, Counter[str]]


def make_smoke_prompts(questions: list[str], count: int = 3) -> list[str]:
    """Return up to `count` prompts like `questions`, each with another first word; fewer if the rows share too little.

    Questions with a secret or personal data are left out: an address in everybody's signature is in many rows.
    """
    statistics = count_words([split_words(question) for question in questions if not has_private_data(question)])
    generator = random.Random(3407)
    chains = {tuple(words) for _ in range(CHAINS_TO_DRAW) if (words := draw_chain(statistics, generator))}
    prompts: dict[str, str] = {}
    for chain in sorted(chains, key=lambda chain: (-mean_log_probability(chain, statistics), chain)):
        prompts.setdefault(chain[0], join_words(list(chain), generator))
        if len(prompts) == count:
            break
    return list(prompts.values())


def has_private_data(text: str) -> bool:
    """Return whether a text holds a secret or personal data."""
    return bool(personal_data.find_secrets(text) or personal_data.find_personal_data(text))


def count_words(rows: list[list[str]]) -> WordStatistics:
    """Count the words of the rows."""
    rows_with = Counter(word for row in rows for word in {START, END, *row})
    rows_with_three: Counter[tuple[str, str, str]] = Counter()
    followers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        chain = [START, *row, END]
        rows_with_three.update(set(zip(chain, chain[1:], chain[2:], strict=False)))
        for word, following in pairwise(chain):
            if min(rows_with[word], rows_with[following]) >= SHARED_BY:
                followers[word][following] += 1
    return WordStatistics(rows_with, rows_with_three, followers)


def draw_chain(statistics: WordStatistics, generator: random.Random) -> list[str] | None:
    """Draw a chain of words; return None where it does not end, repeats a word, has a wrong length, or quotes a row."""
    words: list[str] = []
    word = START
    while len(words) <= MAX_WORDS:
        choices = statistics.followers.get(word)
        if not choices:
            return None
        word = generator.choices(list(choices), list(choices.values()))[0]
        if word == END:
            break
        words.append(word)
    is_usual = MIN_WORDS <= len(words) <= MAX_WORDS and len(set(words)) == len(words)
    return words if is_usual and not is_quote(words, statistics) else None


def is_quote(words: list[str], statistics: WordStatistics) -> bool:
    """Return whether three words of a chain follow each other in a few rows only."""
    chain = [START, *words, END]
    trigrams = zip(chain, chain[1:], chain[2:], strict=False)
    return any(0 < statistics.rows_with_three[trigram] < SHARED_BY for trigram in trigrams)


def mean_log_probability(words: tuple[str, ...], statistics: WordStatistics) -> float:
    """Return the mean log-probability of each word, given the word before it."""
    pairs = pairwise([START, *words, END])
    shares = [statistics.followers[word][following] / statistics.rows_with[word] for word, following in pairs]
    log_probabilities = list(map(math.log, shares))
    return sum(log_probabilities) / len(log_probabilities)


def split_words(text: str) -> list[str]:
    """Return the words and line breaks of a text; words with a digit become codes of 0 and A: `K4821` is `A0000`."""
    words = re.findall(r"\n+|[^\s]+", text.replace(ALPACA_INPUT, f" {ALPACA_INPUT.strip()} "))
    return [re.sub(r"\d", "0", re.sub(r"[A-Z]", "A", word)) if re.search(r"\d", word) else word for word in words]


def join_words(words: list[str], generator: random.Random) -> str:
    """Return the words as text, with random digits and letters in codes."""
    text = " ".join(fill_code(word, generator) if "0" in word else word for word in words)
    text = re.sub(r" ?(\n+) ?", r"\1", text)
    marker = ALPACA_INPUT.strip()
    return re.sub(rf"\s*{re.escape(marker)}\s*", lambda match: ALPACA_INPUT, text).strip()


def fill_code(code: str, generator: random.Random) -> str:
    """Return a code such as `A0000` with random letters and digits."""

    def draw(match: re.Match[str]) -> str:
        return str(generator.randrange(10)) if match[0] == "0" else generator.choice("BCDFGHKLMNPRTVWX")

    return re.sub("[0A]", draw, code)
