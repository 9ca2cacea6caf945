"""What holds of the data stage whatever the rows are: no row lost, the right tokens learned, the same bytes every time."""

import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from pipeline.config.schema import Clean
from pipeline.data import duplicates, process_rows
from pipeline.data.clean import Cleaner, normalize_text
from pipeline.data.drop_reasons import UnusableRow
from pipeline.run import training_rows
from tests.fuzzing import readers
from tests.helpers.row_files import jsonl, lines, made, pair, words

END = "<|im_end|>"
ONCE = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}
WHOLE = ONCE | {"phases": [Phase.generate]}  # a run of the stage each: too slow to be made smaller
PIECES = [
    "the", "ferry", "leaves", "at", "seven", "why", " ", "  ", "\n", "\n\n", "\t", "\r\n", "    ", "```", "`", "``", "~~~", "````py\n", "> ", "\u00a0",
    "\u200b", "\u00ad", "caf\u00e9", "caf\u00c3\u00a9", "e\u0301", "\u2019", "\u00e2\u20ac\u2122", "\u6e21\u8f2a", "\U0001f469\u200d\U0001f4bb", "\u0007",
    "\x1b[0m", "&amp;", "<b>", "\ufb01", "\ud83d", "\ufffd", END, "[1, 2]", "{", "\u2028", "\u0130", "\u0905\u094d\u0937", "x" * 40,
]  # fmt: skip
TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.sampled_from(PIECES[:6]), min_size=1, max_size=9).map(" ".join),
    st.text(alphabet=st.characters(max_codepoint=0x3FFFF, exclude_categories=("Cc",)), max_size=20),
)
ASCII = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126, include_characters="\n\t"), max_size=60)
SAID = st.one_of(TEXT, TEXT, TEXT, TEXT, st.sampled_from([None, 3, ["a"], {"a": "b"}]))


def said(role: str, content: object) -> dict:
    return {"role": role, "content": content}


@st.composite
def talk(draw) -> list[dict]:
    """Mostly a sound conversation of one to three exchanges; sometimes one with a turn too many or too few."""
    turns = [said("system", draw(SAID))] if draw(st.integers(0, 3)) == 0 else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [said("user", draw(SAID)), said("assistant", draw(SAID))]
    return turns[: -1 if draw(st.integers(0, 9)) == 0 else None]


PAIR = st.tuples(SAID, SAID)
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
# Each format: rows of it, a good row from a question and an answer, and the turns that a row says.
FORMATS = {
    "messages": (talk().map(lambda t: {"messages": t}), lambda q, a: {"messages": [said("user", q), said("assistant", a)]}, lambda row: row["messages"]),
    "sharegpt": (
        talk().map(lambda t: {"conversations": [{"from": NAMES[m["role"]], "value": m["content"]} for m in t]}),
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        lambda row: [said(next(ours for ours, theirs in NAMES.items() if theirs == m["from"]), m["value"]) for m in row["conversations"]],
    ),
    "alpaca": (
        st.tuples(SAID, st.one_of(st.none(), TEXT), SAID).map(lambda t: dict(zip(("instruction", "input", "output"), t, strict=True))),
        lambda q, a: {"instruction": q, "output": a},
        lambda row: [said("user", row["instruction"] + (f"\n\n### Input:\n{row['input']}" if (row.get("input") or "").strip() else "")), said("assistant", row["output"])],
    ),
    "prompt-completion": (PAIR.map(lambda t: {"prompt": t[0], "completion": t[1]}), lambda q, a: {"prompt": q, "completion": a}, lambda row: [said("user", row["prompt"]), said("assistant", row["completion"])]),
    "question-answer": (PAIR.map(lambda t: {"question": t[0], "answer": t[1]}), lambda q, a: {"question": q, "answer": a}, lambda row: [said("user", row["question"]), said("assistant", row["answer"])]),
    "text": (SAID.map(lambda text: {"text": text}), lambda q, a: {"text": f"{q} {a}"}, lambda row: [said("assistant", row["text"])]),
}  # fmt: skip


def stage_of(base: Path, given_rows: list[dict], folder: Path, **more):
    """One run over rows written as JSON Lines."""
    (folder / "rows.jsonl").write_bytes(jsonl(*given_rows))
    return made(base, folder, folder / "rows.jsonl", **more)


@pytest.mark.parametrize("labels", ["all", "last"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_row_is_kept_or_accounted_for_and_learns_its_answers(base, quick, form, labels):
    some, good, turns_of = FORMATS[form]
    first = [good(*pair(i).values()) for i in range(20)]
    raw = form == "text"

    @settings(max_examples=12, **WHOLE)
    @given(st.lists(some, min_size=8, max_size=20))
    def holds(more):
        with tempfile.TemporaryDirectory() as name:
            got = stage_of(
                base, [*first, *more], Path(name), data__labels=labels, data__template="completion" if raw else "tokenizer",
                data__format=form, data__validation_share=0.4, clean__max_rejected=1,
            )  # fmt: skip
            assert got.record["rows"]["read"] == 20 + len(more)
            gone = {int(note["where"].rpartition(":")[2]) for note in got.dropped}
            kept = [row for number, row in enumerate([*first, *more], 1) if number not in gone]
            cleaner = Cleaner(Clean(), (END,), raw)
            expected = []
            for row in kept:
                answers = [m["content"] for m in cleaner(turns_of(row))[0] if m["role"] == "assistant"]
                expected.append("".join(a + END for a in (answers if labels == "all" else answers[-1:])))
            if raw:  # all but the first token, which nothing could predict
                assert Counter(got.texts()) == Counter(expected)
                assert all(row["labels"][1:] == row["input_ids"][1:] for row in got.trained)
            else:
                assert Counter(got.learned()) == Counter(expected)

    holds()


@settings(max_examples=1500, **ONCE)
@given(TEXT)
def test_normalizing_twice_is_normalizing_once(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    once = normalize_text(text, set())
    assert normalize_text(once, set()) == once


@settings(max_examples=600, **ONCE)
@given(ASCII)
def test_plain_text_is_left_alone(text):
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    changes = set()
    assert normalize_text(text, changes) == text and not changes


@settings(max_examples=600, **ONCE)
@given(
    st.sampled_from(["```", "````", "~~~", "`````"]), st.sampled_from(["", "py", "c++ title=x"]), TEXT, TEXT,
    st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "  ", "\t"]),
)  # fmt: skip
def test_a_fence_keeps_every_byte(fence, language, inside, after, end, indent):
    inside = inside.replace("`", "").replace("~", "").replace("\r", "")
    code = f"{indent}{fence}{language}{end}{inside}{end}{indent}{fence}"
    around = after.replace("`", "").replace("~", "")
    assert normalize_text(f"so\u00a0:\n{code}{end}{around}", set()).startswith(f"so :\n{code}")


@settings(max_examples=400, **ONCE)
@given(TEXT, st.sampled_from(["`", "``"]))
def test_inline_code_keeps_every_byte(inside, ticks):
    inside = "".join(inside.replace("`", "").splitlines()) or "x"
    assert normalize_text(f"use\u00a0{ticks}{inside}{ticks}\u00a0now", set()) == f"use {ticks}{inside}{ticks} now"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("```\r\nx\u00a0\r\n```\r\nso\u00a0on", "```\r\nx\u00a0\r\n```\r\nso on"), ("> ```\n> x\u00a0= 1\n> ```\n", None), ("1. ```py\n   x\u00a0= 1\n   ```\n", None)],
    ids=["CRLF", "a quotation", "a list"],
)  # fmt: skip
def test_a_fence_ends_where_it_ends(text, expected):
    assert normalize_text(text, set()) == (text if expected is None else expected)


def every_kind(count: int) -> list[dict]:
    """Good rows, doubled and nearly doubled ones, broken, long, with personal data, and answers that give others away."""
    rng, out = random.Random(5), []
    for i in range(count):
        question, long = f"{words(f'q{i}', 4)}?", words(f"l{rng.randrange(count // 9)}", 60)
        out.append([
            pair(i), pair(i), pair(i), pair(rng.randrange(count)), {"question": question, "answer": long},
            {"question": words("same", 4), "answer": f"{long} {rng.choice(['now', 'then'])}"},
            {"question": question, "answer": [None, 3, "", "a\ufffd", "word " * 300][i % 5]},
            {"question": question, "answer": f"caf\u00c3\u00a9  \n{words(f'n{i}')} ann" + "@example.org"},
        ][rng.randrange(8)])  # fmt: skip
    return out


def test_the_result_does_not_depend_on_chunks_or_processes(base, quick, tmp_path, monkeypatch):
    given_rows, more = every_kind(2600), {"clean__max_rejected": 1, "clean__personal": "mask"}
    found = {"one": stage_of(base, given_rows, tmp_path, name="one", **more)}
    found["two"] = stage_of(base, given_rows, tmp_path, name="two", processes=2, **more)
    monkeypatch.setattr(process_rows, "CHUNK_ROWS", 37)
    found["small"] = stage_of(base, given_rows, tmp_path, name="small", **more)
    assert {"empty", "not_text", "too_long", "duplicate", "near_duplicate", "leaked"} <= found["one"].record[
        "dropped"
    ].keys()
    for name in ("train.parquet", "heldout.jsonl", "rejected.jsonl"):
        contents = {run: (got.folder / name).read_bytes() for run, got in found.items()}
        assert contents["one"] == contents["two"], name
        if name != "train.parquet":  # whose pages follow the chunks
            assert contents["one"] == contents["small"], name
    assert training_rows.read_table(found["one"].folder / "train.parquet") == training_rows.read_table(
        found["small"].folder / "train.parquet"
    )


def alike(a: str, b: str) -> float:
    """Exact Jaccard similarity of word 3-grams."""
    one, two = set(duplicates.split_shingles(a)), set(duplicates.split_shingles(b))
    return len(one & two) / len(one | two)


@settings(max_examples=60, **ONCE)
@given(st.integers(0, 10**6), st.sampled_from([0.7, 0.8, 0.9]))
def test_near_duplicates_are_near_and_copies_are_found(seed, threshold):
    rng = random.Random(seed)
    texts = [words(f"{seed}{i}", rng.randint(1, 60)) for i in range(12)]
    copies = {}
    for _ in range(12):
        of = rng.randrange(len(texts))
        changed = texts[of].split()
        for _ in range(rng.randint(0, 4)):
            changed[rng.randrange(len(changed))] = rng.choice(["harbour", "ferry", "zebra"])
        if rng.random() < 0.5:
            copies[len(texts)] = of
            changed = [f"{word.upper()}{rng.choice(['', ',', '!', ' -'])}" for word in texts[of].split()]
        texts.append(" ".join(changed))
    found = duplicates.find_near_duplicates(duplicates.compute_signatures(texts), threshold, np.arange(len(texts)))
    for row, (other, estimate) in found.items():
        assert other < row and estimate >= threshold
        assert alike(texts[row], texts[other]) >= threshold - 0.12
    assert copies.keys() <= found.keys()
    for row in range(len(texts)):
        if max((alike(texts[row], texts[other]) for other in range(row)), default=0) < 0.5:
            assert row not in found


@settings(max_examples=60, **ONCE)
@given(st.integers(0, 10**6), st.sampled_from([0.7, 0.8, 0.9]))
def test_only_training_rows_leave_for_a_held_out_one(seed, threshold):
    rng = random.Random(seed)
    texts = [words(str(seed + rng.randrange(9)), 30) for _ in range(24)]
    held = np.array([rng.random() < 0.3 for _ in texts])
    found = duplicates.find_near_duplicates(
        duplicates.compute_signatures(texts), threshold, np.arange(len(texts)), held
    )
    assert all(held[other] and not held[row] and texts[row] == texts[other] for row, (other, _) in found.items())
    assert found.keys() == {
        row for row in range(len(texts)) if not held[row] and any(held[o] and texts[o] == texts[row] for o in range(len(texts)))
    }  # fmt: skip


@pytest.mark.slow
@settings(max_examples=6, **WHOLE)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_adding_rows_moves_no_row_across_the_split(base, quick, seed, count):
    old = [pair(f"{seed}-{i}") for i in range(50)]
    rng = random.Random(seed)
    new = [
        *old,
        *(pair(f"{seed}+{i}") for i in range(count)),
        *({**rng.choice(old), "answer": words(f"{seed}{i}", 12)} for i in range(count)),
    ]
    rng.shuffle(new)
    with tempfile.TemporaryDirectory() as name:
        before, after = (stage_of(base, some, Path(name), name=run) for run, some in (("old", old), ("new", new)))
        sides = [
            ({text_of(got, row) for row in got.trained}, {row["prompt"] for row in got.held}) for got in (before, after)
        ]
    (train, held), (later_train, later_held) = sides
    assert not train & later_held and not held & later_train
    assert not later_train & later_held and held <= later_held


def text_of(got, row: dict) -> str:
    """The prompt of a trained row of one exchange."""
    return got.tokenizer.decode(
        row["input_ids"][: next(i for i, n in enumerate(row["labels"]) if n != training_rows.IGNORED_LABEL)]
    )


@settings(max_examples=300, **ONCE)
@given(TEXT, TEXT, TEXT)
def test_equal_questions_stay_on_one_side(question, answer, other):
    question, answer, other = (text.encode(errors="ignore").decode() for text in (question, answer, other))
    plain, shouted = (
        [said("user", text), said("assistant", a)] for text, a in ((question, answer), (f"  {question} \n", other))
    )
    assert (
        duplicates.hash_question(plain)
        == duplicates.hash_question(shouted)
        == duplicates.hash_question([said("system", other), *plain])
    )


def test_no_mutated_file_is_more_than_a_clear_error(tmp_path):
    one, seeds, rng = readers.target(tmp_path), readers.seeds(), random.Random(3407)
    assert all(one(*seed) for seed in seeds)
    read = 0
    for i in range(4000):
        suffix, content = rng.choice([seed for seed in seeds if seed[0] == ".jsonl" or i % 3])
        bend = suffix == ".jsonl" and i % 2
        read += one(suffix, readers.odd_lines(rng, content) if bend else readers.mutated(rng, content))
    assert read > 2000


@pytest.mark.parametrize("form", ["messages", "question-answer"])
def test_a_row_is_worth_the_same_alone_and_among_others(masker, form):
    """What becomes of a row does not depend on the rows beside it, but for duplicates."""
    some, _, turns_of = FORMATS[form]

    @settings(max_examples=40, **ONCE)
    @given(st.lists(some, min_size=2, max_size=6))
    def holds(given_rows):
        rendered = []
        for row in given_rows:
            try:
                rendered.append(masker.render(Cleaner(Clean(), (END,), False)(turns_of(row))[0]))
            except (UnusableRow, UserError, AttributeError, TypeError):
                continue
        together = list(masker.tokenize_rows(rendered))
        for item, row in zip(rendered, together, strict=True):
            alone = next(masker.tokenize_rows([item]))
            assert type(alone) is type(row)
            if not isinstance(row, UnusableRow):
                assert (alone.ids == row.ids).all() and (alone.loss == row.loss).all()

    holds()


@pytest.mark.parametrize(
    "answer", ["so\U0005fd1b there", "`a\u0006b` is code"], ids=["no assigned letter", "a control character"]
)
def test_what_the_tokenizer_cannot_say_is_not_trained_in_pieces(base, quick, tmp_path, answer):
    got = stage_of(base, [*map(pair, range(40)), {"question": "what?", "answer": answer}], tmp_path)
    assert got.dropped or answer + END in got.learned()


def test_rejected_rows_are_valid_json_whatever_they_hold(base, quick, tmp_path):
    rng = random.Random(9)
    good = [{"messages": [said("user", words(f"q{i}")), said("assistant", words(f"a{i}"))]} for i in range(40)]
    odd = [readers.bent(rng, {"messages": [said("user", f"why {i}?"), said("assistant", "so")]}) for i in range(300)]
    got = stage_of(base, [*good, *map(json.dumps, odd)], tmp_path, clean__max_rejected=1)
    assert got.record["rows"]["read"] == 340 and len(got.dropped) > 150
    assert all({"where", "action", "reason"} <= note.keys() for note in lines(got.folder / "rejected.jsonl"))
    assert all(isinstance(json.loads(json.dumps(note)), dict) for note in got.rejected)
