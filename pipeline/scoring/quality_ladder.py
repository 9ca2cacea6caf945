"""The quality ladder: base, adapter, merged, 16-bit GGUF and each quantization, on one held-out set by one definition.

KL to 16 bit is the mean over the response positions of KL(16-bit GGUF || this one), in nats, over the whole vocabulary.
Top-1 is the share of those positions at which both have the same likeliest token. (llama-perplexity's --kl-divergence
has the same definitions, but cannot score chat rows, because it tokenizes without special tokens.)
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import files
from pipeline.scoring.heldout_scores import describe_interval, response_positions

if TYPE_CHECKING:
    import numpy as np

    from pipeline.scoring.backends import Gguf, Reading, Torch

ROOM = 512 << 20  # bytes of log-probabilities on disk, for each of the two comparisons


class Kept:
    """The log-probabilities of a model, on disk, so that the model can be closed: two models never share a GPU.

    They are float32 of shape (positions, vocabulary), and are read in the order in which they were written. The file
    has no name, so it is gone with the process however that ends.
    """

    def __init__(self, folder: Path, vocabulary: int):
        self.file, self.folder, self.vocabulary = (
            tempfile.TemporaryFile(dir=folder),  # noqa: SIM115
            folder,
            vocabulary,
        )

    def put(self, values: "np.ndarray") -> None:
        """Write log-probabilities at the end of the file.

        Raises:
            UserError: The disk is full.
        """
        try:
            self.file.write(values.tobytes())
        except OSError as error:
            raise files.translated(error, self.folder) from error

    def take(self, positions: int) -> "np.ndarray":
        """Read the log-probabilities of the next positions."""
        import numpy as np

        return np.frombuffer(self.file.read(positions * self.vocabulary * 4), np.float32).reshape(-1, self.vocabulary)

    def rewind(self) -> None:
        """Start reading at the first position again."""
        self.file.seek(0)


class Reference:
    """The log-probabilities of the 16-bit GGUF at the first response positions of `rows`."""

    def __init__(self, folder: Path, rows: list[dict], vocabulary: int, most: int):
        """Prepare the file.

        Args:
            folder: Where the file without a name is created.
            rows: The held-out rows.
            vocabulary_size: The number of tokens in the vocabulary.
            max_positions: The largest number of positions; fewer are used when they would take more than CACHE_BYTES.
        """
        there = sum(len(response_positions(row)) for row in rows)
        self.positions = min(most, ROOM // (4 * vocabulary), there)
        self.rows, self.kept = rows, Kept(folder, vocabulary)

    def fill(self, side: "Gguf", label: str) -> list["Reading"]:
        """Write the log-probabilities of the 16-bit GGUF and return its row scores."""
        readings, left = [], self.positions
        for reading, values in side.distributions(self.rows, label):
            self.kept.put(values[:left])
            readings, left = [*readings, reading], max(0, left - len(values))
        return readings

    def compare(self, side: "Torch | Gguf", label: str) -> tuple[list["Reading"], dict]:
        """Return the row scores of another backend, and its {kl, top1}."""
        import numpy as np

        readings, left, divergence, agree = [], self.positions, 0.0, 0
        self.kept.rewind()
        for reading, values in side.distributions(self.rows, label):
            wanted = self.kept.take(min(left, len(values)))
            found = values[: len(wanted), : self.kept.vocabulary]  # torch pads vocabularies
            divergence += float((np.exp(wanted) * (wanted - found)).sum())
            agree += int((wanted.argmax(-1) == found.argmax(-1)).sum())
            readings, left = [*readings, reading], left - len(wanted)
        return readings, {"kl": abs(round(divergence / self.positions, 5)), "top1": round(agree / self.positions, 4)}


class Conversion:
    """How far llama.cpp on the 16-bit GGUF is from Transformers on the merged weights, for the same token ids."""

    def __init__(self, folder: Path, texts: Sequence[list[int]], converted: "Gguf"):
        """Write the log-probabilities of the GGUF at every position of `token_sequences`.

        When they would take more than CACHE_BYTES, only every second (third, ...) position is compared.
        """
        vocabulary = converted.model.n_vocab()
        step = -(-sum(map(len, texts)) * 4 * vocabulary // ROOM)
        self.texts = [(ids, range(0, len(ids), step)) for ids in texts]
        self.kept = Kept(folder, vocabulary)
        for ids, places in self.texts:
            self.kept.put(converted.log_probs(ids, places))

    def compare(self, merged: "Torch") -> dict:
        """Return {kl, worst, top1, positions}: the mean and the largest KL(merged || GGUF) of a position, in nats."""
        import numpy as np

        divergences, agree = [], []
        self.kept.rewind()
        for ids, places in self.texts:
            b = self.kept.take(len(places))
            a = merged.log_probs(ids, places)[:, : self.kept.vocabulary]
            divergences.append((np.exp(a) * (a - b)).sum(-1))
            agree.append(a.argmax(-1) == b.argmax(-1))
        kl = np.nan_to_num(np.concatenate(divergences), nan=np.inf)  # a NaN counts as the largest difference
        same = float(np.concatenate(agree).mean())
        return {"kl": float(kl.mean()), "worst": float(kl.max()), "top1": same, "positions": len(kl)}


def table(scores: dict[str, dict]) -> str:
    """Return the quality ladder as a Markdown table."""
    columns = ("loss", "perplexity", "kl", "top1", "score", "megabytes", "tokens_per_second")
    heads = ("held-out loss", "perplexity", "KL to 16 bit", "same top-1", "score", "MB", "tokens/s")
    lines = [f"| system | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for name, found in scores.items():
        lines.append(f"| {name} | {' | '.join(_cell(found.get(key), key) for key in columns)} |")
    return "\n".join(lines)


TITLES = {"base": "base model", "adapter": "adapter, torch", "merged": "merged, torch"}


def format_for_terminal(scores: dict[str, dict]) -> str:
    """Return the quality ladder in 80 columns."""
    lines = [f"  {'':<23}{'loss':>6}{'KL':>9}{'top-1':>7}{'right':>18}{'MB':>8}{'tok/s':>7}"]
    for name, found in scores.items():
        title = (
            TITLES.get(name)
            or f"{name.removesuffix('-static')} GGUF{', no imatrix' if name.endswith('-static') else ''}"
        )
        right = describe_interval(found) if "score" in found else "-"
        cells = [_number(found.get(key), form) for key, form in (("loss", ".3f"), ("kl", ".5f"), ("top1", ".1%"))]
        size, speed = _number(found.get("megabytes"), ",.1f"), _number(found.get("tokens_per_second"), ",.1f")
        lines.append(f"  {title:<23}{cells[0]:>6}{cells[1]:>9}{cells[2]:>7}{right:>18}{size:>8}{speed:>7}")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _cell(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key in ("top1", "score") else f"{value:g}"
