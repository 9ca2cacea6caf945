"""Rules that score an answer from 0 to 1 by comparing it with a reference; they need nothing but the two texts."""

import re
import string
from collections import Counter
from collections.abc import Callable

# (the model's answer, the reference answer) -> a score from 0 to 1
Judge = Callable[[str, str], float]


def exact(said: str, reference: str) -> float:
    """Return 1 when the texts are equal, except for white space at their ends, else 0."""
    return float(said.strip() == reference.strip())


def accuracy(said: str, reference: str) -> float:
    """Return 1 when the labels are equal, except for case and for punctuation and white space at their ends, else 0."""
    return float(_label(said) == _label(reference))


def _label(text: str) -> str:
    return text.casefold().strip(string.punctuation + string.whitespace)


def f1(said: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, counted as in SQuAD: no articles, no punctuation."""
    ours, wanted = _words(said), _words(reference)
    if not ours or not wanted:
        return float(ours == wanted)
    common = sum((Counter(ours) & Counter(wanted)).values())
    return 2 * common / (len(ours) + len(wanted))


def _words(text: str) -> list[str]:
    text = text.casefold().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


BY_NAME: dict[str, Judge] = {"exact": exact, "accuracy": accuracy, "f1": f1}
