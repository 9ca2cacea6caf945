"""Rendering and masking, on the demo's real tokenizer: decoded labels are the assistant's words and their end token."""

import json

import pytest

from contract.errors import UserError
from pipeline import data
from pipeline.config import Data

ANSWERS = ["Yes.", '{"a": 1}', "Two lines\n\nand 3 digits 123 🚢", "def f():\n    return 1"]


def trained(row: dict, tokenizer) -> str:
    return tokenizer.decode([token for token in row["labels"] if token != data.IGNORED])


@pytest.mark.parametrize("answer", ANSWERS)
def test_only_the_answer_and_its_end_token_carry_loss(tokenizer, answer):
    row = data.mask([{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}], tokenizer)
    assert trained(row, tokenizer) == answer + tokenizer.eos_token
    assert len(row["labels"]) == len(row["input_ids"])
    assert tokenizer.encode(row["prompt"], add_special_tokens=False) == row["input_ids"][: row["prompt_tokens"]]


def test_every_assistant_turn_carries_loss(tokenizer):
    turns = [("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "2.")]
    row = data.mask([{"role": role, "content": text} for role, text in turns], tokenizer)
    assert trained(row, tokenizer) == f"1.{tokenizer.eos_token}2.{tokenizer.eos_token}"
    assert row["prompt"].endswith("Two?<|im_end|>\n<|im_start|>assistant\n")


def test_white_space_around_an_answer_is_not_trained(tokenizer):
    row = {"instruction": "q", "output": '\n  {"a": 1}\n'}
    masked = data.mask(data._messages(row, Data(source="x.jsonl"), "x:1"), tokenizer)
    assert trained(masked, tokenizer) == '{"a": 1}' + tokenizer.eos_token


def test_a_token_across_the_border_is_refused(tokenizer):
    with pytest.raises(UserError, match="reaches across the border"):
        data.mask([{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n\n  x"}], tokenizer)


def test_the_answers_words_in_the_question_carry_no_loss(tokenizer):
    row = data.mask(
        [{"role": "user", "content": "Say blue. blue"}, {"role": "assistant", "content": "blue"}], tokenizer
    )
    assert trained(row, tokenizer) == "blue" + tokenizer.eos_token


def test_alpaca_prompt_with_and_without_input(source):
    from pipeline import base

    tokenizer = data.load_tokenizer(base.tokenizer(source), Data(source="x.jsonl", template="alpaca"))
    plain = data.mask(data._alpaca({"instruction": "Add.", "output": "5"}), tokenizer)
    assert plain["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    both = data.mask(data._alpaca({"instruction": "Add.", "input": "2 3", "output": "5"}), tokenizer)
    assert both["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n"
    )
    assert trained(both, tokenizer) == "5" + tokenizer.eos_token


def test_the_pad_token_is_not_the_end_token(tokenizer):
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q"),
        ({"instruction": "Q", "input": "", "output": "A"}, "Q"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "Q"),
    ],
)
def test_formats_are_detected(row, expected):
    assert data._messages(row, Data(source="x.jsonl"), "x:1") == [
        {"role": "user", "content": expected},
        {"role": "assistant", "content": "A"},
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"messages": [', "rows.jsonl:1: no JSON"),
        ("[1]\n", "rows.jsonl:1: a row must be a JSON object"),
        ('{"foo": 1}\n', "its keys are foo"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}\n', "rows.jsonl:1: no messages row"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "does not end with the assistant"),
        ('{"messages": []}\n', "does not end with the assistant"),
        ('{"messages": [{"role": "assistant", "content": " "}]}\n', "empty or non-text content"),
        ('\n\n{"instruction": "x", "output": null}\n', "rows.jsonl:3: empty or non-text content"),
    ],
)
def test_a_bad_row_is_one_clear_error_with_its_line(tmp_path, text, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="") as caught:
        data.read(Data(source=str(path)))
    assert expected in str(caught.value)


def test_a_missing_or_binary_file_is_one_clear_error(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, expected in (("gone.jsonl", "is missing"), ("b.jsonl", "no UTF-8 JSON")):
        with pytest.raises(UserError) as caught:
            data.read(Data(source=str(tmp_path / name)))
        assert expected in str(caught.value)


def test_adding_rows_never_moves_an_old_one_across_the_split(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"instruction": f"q{i}", "output": "a"}) for i in range(400)]
    settings = Data(source=str(path), validation_share=0.1)
    path.write_text("\n".join(rows[:300]))
    train, held, _ = data.read(settings)
    path.write_text("\n".join(rows))
    more_train, more_held, _ = data.read(settings)
    assert 10 < len(held) < 60
    assert all(row in more_train for row in train) and all(row in more_held for row in held)


def test_too_long_rows_are_dropped_and_counted(tokenizer):
    long = [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "x"}]
    short = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]
    kept, dropped = data.tokenized([long, short], tokenizer, 100)
    assert (len(kept), dropped) == (1, 1)
