"""Scores that mean the same in torch and in llama.cpp: the same rows, one rule, one definition of held-out loss.

The held-out loss is the mean natural-log loss over every response position of the rows used, that is, over every label
that carries loss. The perplexity is its exponential.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from common import files
from pipeline.config.schema import Evaluate
from pipeline.run.training_rows import IGNORED
from pipeline.scoring.judges import judge


def held_out(path: Path, rule: Evaluate) -> tuple[list[dict], str]:
    """Return the rows that are scored, and a text that says which.

    They are the first rows, up to evaluate.max_rows and evaluate.max_tokens.
    """
    every = files.read_rows(path)
    rows, tokens = [], 0
    for row in every[: rule.max_rows]:
        if rows and tokens + len(row["input_ids"]) > rule.max_tokens:
            break
        rows.append(row)
        tokens += len(row["input_ids"])
    caps = f"evaluate.max_rows {rule.max_rows}, evaluate.max_tokens {rule.max_tokens}"
    return rows, f"{len(rows)} of {len(every)} held-out rows, {tokens} tokens ({caps})"


def asked(rows: list[dict], rule: Evaluate) -> list[dict]:
    """Return the rows that are answered too: all of them when a rule judges the answers, else a few samples."""
    return rows if rule.rule != "loss" else rows[: rule.samples]


def score(rows: list[dict], rule: Evaluate, losses: Sequence[float], answers: Sequence[str]) -> dict:
    """Return {loss, perplexity, positions, rows[, score, interval]} of one backend.

    Args:
        rows: The held-out rows.
        evaluate_config: The section `evaluate` of the config.
        losses: The loss of each row, summed over its response positions.
        answers: The greedy answers to `select_rows_to_answer(rows, evaluate_config)`.
    """
    positions = sum(len(response_positions(row)) for row in rows)
    loss = sum(losses) / positions
    result = {
        "loss": round(loss, 4),
        "perplexity": round(math.exp(min(loss, 50)), 4),
        "positions": positions,
        "rows": len(rows),
    }
    if right := judge(rule):
        points = [right(said, row["answer"]) for said, row in zip(answers, rows, strict=True)]
        share = sum(points) / len(points)
        result |= {"score": round(share, 4), "interval": confidence_interval(share, len(points))}
    return result


def confidence_interval(share: float, count: int) -> list[float]:
    """Return the 95 % interval of a share of `count` answers.

    Source: Wilson's formula, https://doi.org/10.1080/01621459.1927.10502953.
    """
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]


def describe_interval(scores: dict) -> str:
    """Return a score and its interval as text, such as `96.0% (90-98 %)`."""
    low, high = scores["interval"]
    return f"{scores['score']:.1%} ({100 * low:.0f}-{100 * high:.0f} %)"


def prompt_ids(row: dict) -> list[int]:
    """Return the token ids of a row up to its last answer."""
    return row["input_ids"][: row["prompt_tokens"]]


def answer_positions(row: dict) -> list[int]:
    """Return the indexes of the last answer's tokens; the last of them is its end token."""
    positions = [p for p in response_positions(row) if p >= row["prompt_tokens"]]
    ends = [i for i, p in enumerate(positions) if i and p != positions[i - 1] + 1]
    return positions[: ends[0]] if ends else positions


def response_positions(row: dict) -> list[int]:
    """Return the indexes of the tokens that carry loss."""
    return [i for i, label in enumerate(row["labels"]) if label != IGNORED]
