"""How right one answer is beside a reference, from 0 to 1: the rules that need nothing but the two texts."""

import re
import string
from collections import Counter
from collections.abc import Callable

# (what the model said, the reference answer) -> 0 to 1
Judge = Callable[[str, str], float]


def exact(said: str, reference: str) -> float:
    """Equal, white space at the ends apart."""
    return float(said.strip() == reference.strip())


def accuracy(said: str, reference: str) -> float:
    """The same label: case, punctuation and white space at the ends apart."""
    return float(_label(said) == _label(reference))


def _label(text: str) -> str:
    return text.casefold().strip(string.punctuation + string.whitespace)


def f1(said: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD counts them (articles and punctuation dropped)."""
    ours, wanted = _words(said), _words(reference)
    if not ours or not wanted:
        return float(ours == wanted)
    common = sum((Counter(ours) & Counter(wanted)).values())
    return 2 * common / (len(ours) + len(wanted))


def _words(text: str) -> list[str]:
    text = text.casefold().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


BY_NAME: dict[str, Judge] = {"exact": exact, "accuracy": accuracy, "f1": f1}
