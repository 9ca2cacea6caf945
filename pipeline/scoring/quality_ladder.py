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
from pipeline.run.records import Conversion, Scores
from pipeline.scoring.heldout_scores import describe_interval, response_positions

if TYPE_CHECKING:
    import numpy as np

    from pipeline.scoring.backends import LlamaCppBackend, RowScore, TorchBackend

CACHE_BYTES = 512 << 20  # bytes of log-probabilities on disk, for each of the two comparisons


class LogProbCache:
    """The log-probabilities of a model, on disk, so that the model can be closed: two models never share a GPU.

    They are float32 of shape (positions, vocabulary), and are read in the order in which they were written. The file
    has no name, so it is gone with the process however that ends.
    """

    def __init__(self, folder: Path, vocabulary_size: int):
        self.file, self.folder, self.vocabulary_size = (
            tempfile.TemporaryFile(dir=folder),  # noqa: SIM115
            folder,
            vocabulary_size,
        )

    def append(self, log_probs: "np.ndarray") -> None:
        """Write log-probabilities at the end of the file.

        Raises:
            UserError: The disk is full.
        """
        try:
            self.file.write(log_probs.tobytes())
        except OSError as error:
            raise files.translate_write_error(error, self.folder) from error

    def read_next(self, count: int) -> "np.ndarray":
        """Read the log-probabilities of the next positions."""
        import numpy as np

        return np.frombuffer(self.file.read(count * self.vocabulary_size * 4), np.float32).reshape(
            -1, self.vocabulary_size
        )

    def rewind(self) -> None:
        """Start reading at the first position again."""
        self.file.seek(0)


class ReferenceLogProbs:
    """The log-probabilities of the 16-bit GGUF at the first response positions of `rows`."""

    def __init__(self, folder: Path, rows: list[dict], vocabulary_size: int, max_positions: int):
        """Prepare the file.

        Args:
            folder: Where the file without a name is created.
            rows: The held-out rows.
            vocabulary_size: The number of tokens in the vocabulary.
            max_positions: The largest number of positions; fewer are used when they would take more than CACHE_BYTES.
        """
        row_positions = sum(len(response_positions(row)) for row in rows)
        self.position_count = min(max_positions, CACHE_BYTES // (4 * vocabulary_size), row_positions)
        self.rows, self.cache = rows, LogProbCache(folder, vocabulary_size)

    def score_and_store(self, backend: "LlamaCppBackend", label: str) -> list["RowScore"]:
        """Write the log-probabilities of the 16-bit GGUF and return its row scores."""
        row_scores, remaining = [], self.position_count
        for row_score, log_probs in backend.iter_row_scores(self.rows, label):
            self.cache.append(log_probs[:remaining])
            row_scores, remaining = [*row_scores, row_score], max(0, remaining - len(log_probs))
        return row_scores

    def score_and_compare(self, backend: "TorchBackend | LlamaCppBackend", label: str) -> tuple[list["RowScore"], dict]:
        """Return the row scores of another backend, and its {kl, top1}."""
        import numpy as np

        row_scores, remaining, kl_sum, agreements = [], self.position_count, 0.0, 0
        self.cache.rewind()
        for row_score, log_probs in backend.iter_row_scores(self.rows, label):
            expected = self.cache.read_next(min(remaining, len(log_probs)))
            actual = log_probs[: len(expected), : self.cache.vocabulary_size]  # torch pads vocabularies
            kl_sum += float((np.exp(expected) * (expected - actual)).sum())
            agreements += int((expected.argmax(-1) == actual.argmax(-1)).sum())
            row_scores, remaining = [*row_scores, row_score], remaining - len(expected)
        return row_scores, {
            "kl": abs(round(kl_sum / self.position_count, 5)),
            "top1": round(agreements / self.position_count, 4),
        }


class ConversionCheck:
    """How far llama.cpp on the 16-bit GGUF is from Transformers on the merged weights, for the same token ids."""

    def __init__(self, folder: Path, token_sequences: Sequence[list[int]], gguf_backend: "LlamaCppBackend"):
        """Write the log-probabilities of the GGUF at every position of `token_sequences`.

        When they would take more than CACHE_BYTES, only every second (third, ...) position is compared.
        """
        vocabulary_size = gguf_backend.model.n_vocab()
        step = -(-sum(map(len, token_sequences)) * 4 * vocabulary_size // CACHE_BYTES)
        self.samples = [(token_ids, range(0, len(token_ids), step)) for token_ids in token_sequences]
        self.cache = LogProbCache(folder, vocabulary_size)
        for token_ids, positions in self.samples:
            self.cache.append(gguf_backend.log_probs(token_ids, positions))

    def compare_merged(self, merged_backend: "TorchBackend") -> Conversion:
        """Return the mean and the largest KL(merged || GGUF) of a position, in nats, and the agreement."""
        import numpy as np

        divergences, agreements = [], []
        self.cache.rewind()
        for token_ids, positions in self.samples:
            gguf_log_probs = self.cache.read_next(len(positions))
            merged_log_probs = merged_backend.log_probs(token_ids, positions)[:, : self.cache.vocabulary_size]
            divergences.append((np.exp(merged_log_probs) * (merged_log_probs - gguf_log_probs)).sum(-1))
            agreements.append(merged_log_probs.argmax(-1) == gguf_log_probs.argmax(-1))
        kl_values = np.nan_to_num(np.concatenate(divergences), nan=np.inf)  # a NaN counts as the largest difference
        top1 = float(np.concatenate(agreements).mean())
        return Conversion(kl=float(kl_values.mean()), worst=float(kl_values.max()), top1=top1, positions=len(kl_values))


def format_as_markdown(scores: dict[str, Scores]) -> str:
    """Return the quality ladder as a Markdown table."""
    columns = ("loss", "perplexity", "kl", "top1", "score", "megabytes", "tokens_per_second")
    headers = ("held-out loss", "perplexity", "KL to 16 bit", "same top-1", "score", "MB", "tokens/s")
    lines = [f"| system | {' | '.join(headers)} |", "| --- " * (len(headers) + 1) + "|"]
    for name, entry in scores.items():
        lines.append(f"| {name} | {' | '.join(_format_cell(getattr(entry, key), key) for key in columns)} |")
    return "\n".join(lines)


ROW_TITLES = {"base": "base model", "adapter": "adapter, torch", "merged": "merged, torch"}


def format_for_terminal(scores: dict[str, Scores]) -> str:
    """Return the quality ladder in 80 columns."""
    lines = [f"  {'':<23}{'loss':>6}{'KL':>9}{'top-1':>7}{'right':>18}{'MB':>8}{'tok/s':>7}"]
    for name, entry in scores.items():
        title = (
            ROW_TITLES.get(name)
            or f"{name.removesuffix('-static')} GGUF{', no imatrix' if name.endswith('-static') else ''}"
        )
        score = "-" if entry.score is None else describe_interval(entry)
        cells = [
            _format_number(value, format_spec)
            for value, format_spec in ((entry.loss, ".3f"), (entry.kl, ".5f"), (entry.top1, ".1%"))
        ]
        size, speed = _format_number(entry.megabytes, ",.1f"), _format_number(entry.tokens_per_second, ",.1f")
        lines.append(f"  {title:<23}{cells[0]:>6}{cells[1]:>9}{cells[2]:>7}{score:>18}{size:>8}{speed:>7}")
    return "\n".join(lines)


def _format_number(value: float | None, format_spec: str) -> str:
    return "-" if value is None else f"{value:{format_spec}}"


def _format_cell(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key in ("top1", "score") else f"{value:g}"
