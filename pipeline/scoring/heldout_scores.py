"""Scores that mean the same in torch and in llama.cpp: the same rows, one rule, one definition of held-out loss.

The held-out loss is the mean natural-log loss over every response position of the rows used, that is, over every label
that carries loss. The perplexity is its exponential.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from common import files
from pipeline.config.schema import Evaluate
from pipeline.run.records import Scores
from pipeline.run.training_rows import IGNORED_LABEL
from pipeline.scoring.judges import create_judge


def select_heldout_rows(path: Path, evaluate_config: Evaluate) -> tuple[list[dict[str, Any]], str]:
    """Return the first rows, up to evaluate.max_rows and evaluate.max_tokens, and a text that says which they are."""
    all_rows = files.read_rows(path)
    token_counts = list(accumulate(map(count_tokens, all_rows[: evaluate_config.max_rows])))
    row_count = bisect_right(token_counts, evaluate_config.max_tokens)
    rows = all_rows[: max(1, row_count)]  # the first row is scored however long it is
    limits = f"evaluate.max_rows {evaluate_config.max_rows}, evaluate.max_tokens {evaluate_config.max_tokens}"
    return rows, f"{len(rows)} of {len(all_rows)} held-out rows, {sum(map(count_tokens, rows))} tokens ({limits})"


def count_tokens(row: dict[str, Any]) -> int:
    """Return the number of tokens of a row."""
    return len(row["input_ids"])


def select_rows_to_answer(rows: list[dict[str, Any]], evaluate_config: Evaluate) -> list[dict[str, Any]]:
    """Return the rows that are answered too: all of them when a rule judges the answers, else a few samples."""
    return rows if evaluate_config.rule != "loss" else rows[: evaluate_config.samples]


def compute_scores(
    rows: list[dict[str, Any]], evaluate_config: Evaluate, losses: Sequence[float], answers: Sequence[str]
) -> Scores:
    """Return the scores of one backend.

    Args:
        rows: The held-out rows.
        evaluate_config: The section `evaluate` of the config.
        losses: The loss of each row, summed over its response positions.
        answers: The greedy answers to `select_rows_to_answer(rows, evaluate_config)`.
    """
    positions = sum(len(response_positions(row)) for row in rows)
    loss = sum(losses) / positions
    scores = Scores(
        loss=round(loss, 4), perplexity=round(math.exp(min(loss, 50)), 4), positions=positions, rows=len(rows)
    )
    if not (judge_answer := create_judge(evaluate_config)):
        return scores
    points = [judge_answer(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    share = sum(points) / len(points)
    return scores.model_copy(update={"score": round(share, 4), "interval": confidence_interval(share, len(points))})


def confidence_interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count` answers (https://doi.org/10.1080/01621459.1927.10502953)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def describe_interval(scores: Scores) -> str:
    """Return a score and its interval as text, such as `96.0% (90-98 %)`; `-` where no rule judges answers."""
    if scores.score is None or scores.interval is None:
        return "-"
    low, high = scores.interval
    return f"{scores.score:.1%} ({100 * low:.0f}-{100 * high:.0f} %)"


def prompt_ids(row: dict[str, Any]) -> list[int]:
    """Return the token ids of a row up to its last answer."""
    return row["input_ids"][: row["prompt_tokens"]]


def last_answer_positions(row: dict[str, Any]) -> list[int]:
    """Return the indexes of the last answer's tokens; the last of them is its end token."""
    positions = [position for position in response_positions(row) if position >= row["prompt_tokens"]]
    gaps = [i for i, position in enumerate(positions) if i and position != positions[i - 1] + 1]
    return positions[: gaps[0]] if gaps else positions


def response_positions(row: dict[str, Any]) -> list[int]:
    """Return the indexes of the tokens that carry loss."""
    return [i for i, label in enumerate(row["labels"]) if label != IGNORED_LABEL]
