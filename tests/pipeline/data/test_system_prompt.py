"""The default system prompt: what the rows share, said; or the user's choice. And smoke prompts that quote nobody."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.synthetic_prompts import SHARED_BY, make_smoke_prompts, split_words
from pipeline.data.system_prompt import choose_default
from tests.helpers.commands import refuses


@pytest.mark.parametrize(
    ("prompts", "default", "words"),
    [
        ({}, None, None), ({None: 100}, None, None), ({"Be kind.": 100}, "Be kind.", "all rows have"),
        ({"Be kind.": 95, None: 5}, "Be kind.", "95% of the rows have"), ({"A": 60, "B": 40}, "A", "60% of the rows have"),
        ({None: 95, "A": 5}, None, "5 rows have a different system prompt"),
    ],
)  # fmt: skip
def test_what_the_rows_share_becomes_the_default_and_is_said(prompts, default, words):
    found = choose_default("from-rows", Counter(prompts))
    assert found.default == default and (found.note is None if words is None else words in found.note)


@pytest.mark.parametrize("prompts", [{"A": 50, None: 50}, {f"Persona {i}": 10 for i in range(12)}])
def test_mixed_prompts_are_listed_with_their_shares_and_the_user_chooses(prompts):
    with refuses("data.mixed_system_prompts") as caught:
        choose_default("from-rows", Counter(prompts))
    assert f" {len(prompts)} different" in caught.value.message
    assert ("50.0%" if len(prompts) == 2 else "8.3%") in caught.value.message
    assert "data.system" in caught.value.hint


def test_the_users_choice_counts():
    prompts = Counter({"A": 50, None: 50})
    assert choose_default("none", prompts).default is None
    mine = choose_default("Mine.", prompts)
    assert mine.default == "Mine." and "50 rows have a different system prompt" in mine.note


NAMES = st.sampled_from(
    ["Ann Lee", "Bob Stone", "Cem Kaya", "Dana Ross", "Eve Long", "Finn Hall", "Gil Moss", "Hal Bird"]
)
FRAMES = [
    "Where is the bag of {name}, booking {code}?",
    "Please change the cabin of {name} on booking {code}.",
    "I am {name} and I missed the ship {code}.",
]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(FRAMES), NAMES, st.integers(1000, 9999)), min_size=30, max_size=120), st.uuids()
)
def test_smoke_prompts_hold_no_words_that_few_rows_have(rows, secret):
    questions = [frame.format(name=name, code=f"K{code}") for frame, name, code in rows]
    questions[7] += f" My diagnosis is {secret}."
    words = [set(split_words(question)) for question in questions]
    for prompt in make_smoke_prompts(questions):
        assert prompt not in questions or "K" in prompt
        for word in split_words(prompt):
            assert sum(word in row for row in words) >= SHARED_BY, prompt
        assert str(secret) not in prompt and "diagnosis" not in prompt


def test_what_is_personal_is_in_no_smoke_prompt_however_many_rows_have_it():
    signed = [f"Where is the bag of booking K{i}? Write to ann.lee@" + "example.org" for i in range(1000, 1060)]
    plain = [f"Where is the bag of booking K{i}?" for i in range(2000, 2020)]
    prompts = make_smoke_prompts(signed + plain)
    assert prompts and not any("ann.lee" in prompt for prompt in prompts)
    assert make_smoke_prompts(signed) == []


def test_rows_that_share_too_little_give_none():
    assert (
        make_smoke_prompts(
            [" ".join(f"{word}{'xyz' * i}" for word in ("only", "here", "once", "ever")) for i in range(50)]
        )
        == []
    )
    assert make_smoke_prompts([]) == []
