"""Rules that score an answer from 0 to 1 by comparing it with a reference; they need nothing but the two texts."""

import re
import string
from collections import Counter
from collections.abc import Callable

# (the model's answer, the reference answer) -> a score from 0 to 1
Judge = Callable[[str, str], float]


def exact_match(answer: str, reference: str) -> float:
    """Return 1 when the texts are equal, except for white space at their ends, else 0."""
    return float(answer.strip() == reference.strip())


def label_match(answer: str, reference: str) -> float:
    """Return 1 when the labels are equal, except for case and for punctuation and white space at their ends, else 0."""
    return float(_normalize_label(answer) == _normalize_label(reference))


def _normalize_label(text: str) -> str:
    return text.casefold().strip(string.punctuation + string.whitespace)


def word_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, counted as in SQuAD: no articles, no punctuation."""
    answer_words, reference_words = _split_words(answer), _split_words(reference)
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    shared_count = sum((Counter(answer_words) & Counter(reference_words)).values())
    return 2 * shared_count / (len(answer_words) + len(reference_words))


def _split_words(text: str) -> list[str]:
    text = text.casefold().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


RULES_BY_NAME: dict[str, Judge] = {"exact": exact_match, "accuracy": label_match, "f1": word_f1}
