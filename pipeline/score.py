"""Scores that mean the same in torch and in llama.cpp: one rule, one definition of held-out loss.

Held-out loss: mean natural-log loss over every response position (labels that carry loss) of the rows used.
"""

from collections.abc import Callable, Sequence

from contract import files
from pipeline.config import Evaluate
from pipeline.rows import IGNORED

# (prompt ids of several rows) -> answers as text, greedy
Answer = Callable[[Sequence[list[int]]], list[str]]
# several rows -> for each the sum of losses over its response positions
Loss = Callable[[Sequence[dict]], list[float]]


def score(rows: list[dict], rule: Evaluate, answer: Answer, loss: Loss, label: str, batch_tokens: int) -> dict:
    """{loss, positions, rows[, score, answers]} of one system on held-out rows.

    batch_tokens: rows x (longest row and its answer) that go together, padding included; 0: one row at a time.
    """
    longest = max(len(row["input_ids"]) for row in rows) + rule.max_new_tokens
    size = max(1, batch_tokens // longest)
    losses: list[float] = []
    answers: list[str] = []
    with files.bar(len(rows), label, unit="rows") as tick:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            losses += loss(batch)
            if rule.rule == "exact":
                answers += answer([prompt_ids(row) for row in batch])
            tick(len(batch))
    positions = sum(len(response_positions(row)) for row in rows)
    result = {"loss": round(sum(losses) / positions, 4), "positions": positions, "rows": len(rows)}
    if rule.rule == "exact":
        right = sum(said.strip() == row["answer"] for said, row in zip(answers, rows, strict=True))
        result |= {"score": round(right / len(rows), 4), "answers": answers}
    return result


def prompt_ids(row: dict) -> list[int]:
    """The tokens of a row up to its last answer."""
    return row["input_ids"][: row["prompt_tokens"]]


def response_positions(row: dict) -> list[int]:
    """Indexes of the tokens that carry loss."""
    return [i for i, label in enumerate(row["labels"]) if label != IGNORED]
