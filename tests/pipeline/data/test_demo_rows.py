"""The demo's held-out set is honest: other words, no dominant answer, nothing that a pattern of ours gives away."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path("configs/demo")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[tuple[str, dict]]]:
    """(question, parsed answer) of both files."""
    read = {}
    for name in ("train", "heldout"):
        lines = [
            json.loads(line)["messages"]
            for line in (Path(__file__).parents[3] / FOLDER / f"{name}.jsonl").read_text().splitlines()
        ]
        assert all([message["role"] for message in messages] == ["user", "assistant"] for messages in lines)
        read[name] = [(messages[0]["content"], json.loads(messages[1]["content"])) for messages in lines]
    return read


def shingles(text: str) -> set[tuple[str, ...]]:
    """Word 3-grams, lower case, every booking code made one word: a template with another code is the same text."""
    words = re.findall(r"\w+", re.sub(r"\b[A-Z]\d{4}\b", "code", text).lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def test_there_are_enough_rows(rows):
    assert len(rows["heldout"]) >= 100
    assert 300 <= len(rows["train"]) <= 1000


def test_no_held_out_question_is_nearly_a_training_question(rows):
    known = [shingles(question) for question, _ in rows["train"]]
    for question, _ in rows["heldout"]:
        mine = shingles(question)
        nearest = max(len(mine & other) / len(mine | other) for other in known)
        assert nearest < 0.5, f"{nearest:.2f}: {question}"


def test_no_question_stands_twice(rows):
    questions = [question for part in rows.values() for question, _ in part]
    assert len(set(questions)) == len(questions)


def test_no_answer_dominates(rows):
    answers = Counter(json.dumps(answer) for _, answer in rows["heldout"])
    desks = Counter(answer["desk"] for _, answer in rows["heldout"])
    assert max(answers.values()) <= 0.2 * len(rows["heldout"])
    assert max(desks.values()) <= 0.2 * len(rows["heldout"]) and len(desks) >= 8
    assert desks.keys() == {answer["desk"] for _, answer in rows["train"]}


def test_the_booking_to_copy_is_in_the_question_and_new(rows):
    for part in rows.values():
        assert all(answer["booking"] in question for question, answer in part)
    seen = {answer["booking"] for _, answer in rows["train"]}
    assert not seen & {answer["booking"] for _, answer in rows["heldout"]}
