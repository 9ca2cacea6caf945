"""The quality ladder: base, adapter, merged, 16-bit GGUF and each quantization, on one held-out set by one definition.

KL to 16 bit is the mean over the response positions of KL(16-bit GGUF || this one), in nats, over the whole vocabulary.
Top-1 is the share of those positions at which both have the same likeliest token. (llama-perplexity's --kl-divergence
has the same definitions, but cannot score chat rows, because it tokenizes without special tokens.)
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import files
from pipeline.run.records import Conversion, Scores
from pipeline.scoring.heldout_scores import describe_interval, response_positions

if TYPE_CHECKING:
    import numpy as np

    from pipeline.scoring.backends import Backend, LlamaCppBackend, RowScore, TorchBackend

CACHE_BYTES = 512 << 20  # bytes of log-probabilities on disk, for each of the two comparisons


class LogProbCache:
    """The log-probabilities of a model, on disk, so that the model can be closed: two models never share a GPU.

    They are float32 of shape (positions, vocabulary), and are read in the order in which they were written. The file
    has no name, so it is gone with the process however that ends.
    """

    def __init__(self, folder: Path, vocabulary_size: int):
        self.folder, self.vocabulary_size = folder, vocabulary_size
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 open as long as this object

    def append(self, log_probs: "np.ndarray") -> None:
        """Write log-probabilities at the end of the file. Raise UserError when the disk is full."""
        try:
            self.file.write(log_probs.tobytes())
        except OSError as error:
            raise files.translate_write_error(error, self.folder) from error

    def read_next(self, count: int) -> "np.ndarray":
        """Read the log-probabilities of the next positions."""
        import numpy as np

        content = self.file.read(count * self.vocabulary_size * 4)
        return np.frombuffer(content, np.float32).reshape(-1, self.vocabulary_size)

    def rewind(self) -> None:
        """Start reading at the first position again."""
        self.file.seek(0)


class ReferenceLogProbs:
    """The log-probabilities of the 16-bit GGUF at the first response positions of `rows`."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], vocabulary_size: int, max_positions: int):
        """Prepare the file in `folder`; fewer than `max_positions` are used when they would exceed CACHE_BYTES."""
        row_positions = sum(len(response_positions(row)) for row in rows)
        self.position_count = min(max_positions, CACHE_BYTES // (4 * vocabulary_size), row_positions)
        self.rows, self.cache = rows, LogProbCache(folder, vocabulary_size)

    def score_and_store(self, backend: "LlamaCppBackend", label: str) -> list["RowScore"]:
        """Write the log-probabilities of the 16-bit GGUF and return its row scores."""
        row_scores = []
        for row_score, log_probs in self._iter_compared_positions(backend, label):
            self.cache.append(log_probs)
            row_scores.append(row_score)
        return row_scores

    def score_and_compare(self, backend: "Backend", label: str) -> tuple[list["RowScore"], dict[str, float]]:
        """Return the row scores of another backend, and its {kl, top1}."""
        import numpy as np

        row_scores = []
        kl_sum, agreements = 0.0, 0
        self.cache.rewind()
        for row_score, log_probs in self._iter_compared_positions(backend, label):
            expected = self.cache.read_next(len(log_probs))
            actual = log_probs[:, : self.cache.vocabulary_size]  # torch pads vocabularies
            kl_sum += float((np.exp(expected) * (expected - actual)).sum())
            agreements += int((expected.argmax(-1) == actual.argmax(-1)).sum())
            row_scores.append(row_score)
        kl, top1 = abs(round(kl_sum / self.position_count, 5)), round(agreements / self.position_count, 4)
        return row_scores, {"kl": kl, "top1": top1}

    def _iter_compared_positions(self, backend: "Backend", label: str) -> "Iterator[tuple[RowScore, np.ndarray]]":
        """Yield the score of each row, and the log-probabilities at those of its positions that are compared."""
        remaining = self.position_count
        for row_score, log_probs in backend.iter_row_scores(self.rows, label):
            compared = log_probs[:remaining]
            remaining -= len(compared)
            yield row_score, compared


class ConversionCheck:
    """How far llama.cpp on the 16-bit GGUF is from Transformers on the merged weights, for the same token ids."""

    def __init__(self, folder: Path, token_sequences: Sequence[list[int]], gguf_backend: "LlamaCppBackend"):
        """Write the GGUF's log-probabilities at every position, or every second (third, ...) beyond CACHE_BYTES."""
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
    heading = f"  {'':<23}{'loss':>6}{'KL':>9}{'top-1':>7}{'right':>18}{'MB':>8}{'tok/s':>7}"
    return "\n".join([heading, *(_format_line(name, entry) for name, entry in scores.items())])


def _format_line(name: str, entry: Scores) -> str:
    """Return one line of the quality ladder for a terminal."""
    loss, kl = _format_number(entry.loss, ".3f"), _format_number(entry.kl, ".5f")
    top1, score = _format_number(entry.top1, ".1%"), describe_interval(entry)
    size, speed = _format_number(entry.megabytes, ",.1f"), _format_number(entry.tokens_per_second, ",.1f")
    return f"  {_format_title(name):<23}{loss:>6}{kl:>9}{top1:>7}{score:>18}{size:>8}{speed:>7}"


def _format_title(name: str) -> str:
    """Return the title of a model in the quality ladder, such as `q4_k_m GGUF, no imatrix`."""
    imatrix_note = ", no imatrix" if name.endswith("-static") else ""
    return ROW_TITLES.get(name) or f"{name.removesuffix('-static')} GGUF{imatrix_note}"


def _format_number(value: float | None, format_spec: str) -> str:
    return "-" if value is None else f"{value:{format_spec}}"


def _format_cell(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key in ("top1", "score") else f"{value:g}"
