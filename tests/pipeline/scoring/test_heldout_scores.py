"""Scores are what they say they are: held against hand computation, against llama.cpp's own API, and llama-perplexity."""

import json
import math
import subprocess

import numpy as np
import pytest

from common import llama_runtime
from pipeline.config.schema import Evaluate
from pipeline.evaluate.stage import build_prompt_rows
from pipeline.run.training_rows import IGNORED_LABEL
from pipeline.scoring.backends import LlamaCppBackend, RowScore, answer_and_score, is_greedy_reference
from pipeline.scoring.heldout_scores import compute_scores, select_heldout_rows, select_rows_to_answer
from pipeline.toolchain import llama_tools
from tests.helpers.commands import ROOT, refuses

pytestmark = pytest.mark.slow  # scores real weights in torch and llama.cpp

PROMPTS = [
    "What is 2 + 2?", "Translate 'cat' to French.", "How many days are in a week?", "What is the capital of France?", "Name three colours.",
    "Who wrote Hamlet?", "Is the sky blue?", "Name a fruit.", "What is the opposite of hot?", "Tell me, in as many words as you like, about rain.",
]  # fmt: skip
MOST = 24  # tokens of an answer
EXACT = Evaluate(rule="exact", max_new_tokens=MOST)


class Heard(LlamaCppBackend):
    """A Gguf that remembers which prompts it answered (not those whose speed is measured: they have no label)."""

    heard: tuple[list[int], ...] = ()

    def generate(self, prompts, label=""):
        self.heard = (*self.heard, *(prompts if label else []))
        return super().generate(prompts, label)


@pytest.fixture(scope="module")
def full(source, tmp_path_factory):
    """The demo's base with the same weights as float32. On its own Q4_1 file llama.cpp gives other logits for other batch
    shapes: 0.5 nats at one position, 1.2% in perplexity; here what is compared is the method, not those kernels."""
    path = tmp_path_factory.mktemp("full") / "full.gguf"
    command = [llama_tools.require_folder() / "bin" / "llama-quantize", "--allow-requantize", source, path, "F32"]
    subprocess.run(command, check=True, capture_output=True)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def side(full):
    made = Heard(full, 512, MOST)
    yield made
    made.model.close()


@pytest.fixture(scope="module")
def model(side):
    return side.model


@pytest.fixture(scope="module")
def asking(trained_format, tmp_path_factory):
    """The prompts, rendered and tokenized, as rows without a reference."""
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(PROMPTS))
    return build_prompt_rows(str(path), trained_format[0], None)


@pytest.fixture(scope="module")
def alone(model, asking):
    """(greedy answer, end token) of each prompt, one by one."""
    return [llama_runtime.generate_greedy(model, row["input_ids"], MOST) for row in asking]


@pytest.fixture(scope="module")
def rows(model, asking, alone):
    """Rows whose reference is what the model says itself, end token included; a line break behind it carries no loss."""
    after = llama_runtime.tokenize(model, "\n")
    made = [
        row
        | {
            "input_ids": [*row["input_ids"], *said, *end, *after],
            "labels": [*[IGNORED_LABEL] * len(row["input_ids"]), *said, *end, *[IGNORED_LABEL] * len(after)],
            "answer": llama_runtime.detokenize(model, said),
        }
        for row, (said, end) in zip(asking, alone, strict=True)
        if end
    ]
    assert len(made) >= 2  # else nothing is tested: choose other prompts
    return made


def changed(row: dict, place: int) -> dict:
    """The same row, one token of its reference (place counts from the answer's start) another one."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    at = row["prompt_tokens"] + place
    ids[at] = labels[at] = 0 if ids[at] == 2 else ids[at] + 1  # 0 ends an answer too, but the model did not say it
    return row | {"input_ids": ids, "labels": labels}


def row(prompt: int, answer: int) -> dict:
    """A row of so many tokens."""
    ids = list(range(10, 10 + prompt + answer))
    return {
        "input_ids": ids,
        "labels": [IGNORED_LABEL] * prompt + ids[prompt:],
        "prompt_tokens": prompt,
        "answer": "yes",
    }


def test_held_out_takes_the_first_rows_up_to_either_cap_and_says_so(tmp_path):
    path, every = tmp_path / "heldout.jsonl", [row(3, 2), row(2, 2), row(5, 5), row(1, 1)]
    path.write_text("".join(json.dumps(r) + "\n" for r in every))

    def used(**caps):
        return select_heldout_rows(path, Evaluate(**caps))

    assert used() == (every, "4 of 4 held-out rows, 21 tokens (evaluate.max_rows 200, evaluate.max_tokens 65536)")
    assert used(max_rows=2)[0] == every[:2] and used(max_rows=2)[1].startswith("2 of 4 held-out rows, 9 tokens")
    for tokens, rows in ((21, 4), (20, 3), (19, 3), (18, 2), (9, 2), (8, 1), (5, 1), (1, 1)):
        taken, said = used(max_tokens=tokens)
        assert taken == every[:rows] and said.startswith(f"{rows} of 4 held-out rows, ")
        assert f"evaluate.max_tokens {tokens}" in said


def test_loss_is_per_response_position_over_all_rows_not_per_row():
    rows = [row(4, 1), row(2, 9)]  # 10 response positions; a mean of row means would be (2 + 1) / 2
    found = compute_scores(rows, Evaluate(), [2.0, 9.0], [])
    assert found.to_json() == {"loss": 1.1, "perplexity": round(math.exp(1.1), 4), "positions": 10, "rows": 2}


def test_a_score_is_the_mean_of_the_answers_points():
    assert compute_scores([row(1, 1)] * 3, EXACT, [1.0] * 3, ["yes", "no", " yes"]).score == 0.6667
    with pytest.raises(ValueError):  # an answer is missing
        compute_scores([row(1, 1)] * 3, EXACT, [1.0] * 3, ["yes"])


@pytest.mark.parametrize("loss", [1e3, 1e300, math.inf])
def test_a_huge_loss_does_not_overflow(loss):
    found = compute_scores([row(1, 1)], Evaluate(), [loss], [])
    assert found.loss == loss and math.isfinite(found.perplexity)


def test_every_row_is_asked_where_a_rule_judges_else_a_few():
    rows = [row(1, 1)] * 5
    assert select_rows_to_answer(rows, EXACT) == rows
    assert [len(select_rows_to_answer(rows, Evaluate(samples=n))) for n in (0, 2, 8)] == [0, 2, 5]


def test_only_the_last_answer_decides_whether_the_reference_is_said():
    ids = [5, 6, 7, 2, 8, 9, 11, 2, 3]  # 7 2: an earlier answer; 11 2: the last one; 3: behind it, with loss on both
    two = {"input_ids": ids, "labels": [-100, -100, 7, 2, -100, -100, 11, 2, -100], "prompt_tokens": 6}
    positions = [2, 3, 6, 7]
    assert is_greedy_reference(two, positions, [7, 2, 11, 2], [2])
    assert is_greedy_reference(two, positions, [0, 0, 11, 2], [2])
    assert not is_greedy_reference(two, positions, [7, 2, 0, 2], [2])
    assert not is_greedy_reference(two, positions, [7, 2, 11, 0], [2])
    assert not is_greedy_reference(two, positions, [7, 2, 11, 2], [4])  # cut: it does not end with an end token
    assert not is_greedy_reference(two | {"prompt_tokens": 5}, positions, [7, 2, 11, 2], [2])  # starts without loss
    assert not is_greedy_reference(two | {"prompt_tokens": 9}, positions, [7, 2, 11, 2], [2])  # no last answer


def test_an_answer_that_is_the_reference_is_known_without_generating_it(side, rows, asking):
    readings = side.score_rows(rows, "")
    assert all(reading.is_greedy_reference for reading in readings)
    wrong = changed(rows[1], 2)
    mixed, own = [rows[0], wrong, *rows[2:]], asking[-1:]
    read = [readings[0], *side.score_rows([wrong], ""), *readings[2:]]
    side.heard = ()
    found, said = answer_and_score(side, mixed, read, EXACT, "model", own)
    assert list(side.heard) == [r["input_ids"][: r["prompt_tokens"]] for r in (wrong, *own)]
    assert said[: len(rows)] == [r["answer"] for r in rows]  # what it says, not what the changed reference would be
    assert said[len(rows) :] == [side.decode(ids) for ids in side.generate([own[0]["input_ids"]])]
    assert found.score == 1 and found.rows == len(rows) and found.tokens_per_second > 0


def test_one_other_token_anywhere_and_the_reference_is_not_said(side, rows):
    longest = min(rows, key=lambda r: len(r["input_ids"]))
    count = len(longest["input_ids"]) - longest["prompt_tokens"] - 1  # the line break carries no loss
    readings = side.score_rows([changed(longest, place) for place in range(count)], "")
    assert [reading.is_greedy_reference for reading in readings] == [False] * count


def test_a_reading_sums_the_loss_of_its_response_positions(side, rows):
    values = llama_runtime.token_log_probs(side.model, rows[0]["input_ids"], range(1, len(rows[0]["input_ids"])))
    wanted = -sum(v for v, label in zip(values, rows[0]["labels"][1:], strict=True) if label != IGNORED_LABEL)
    (reading,) = side.score_rows(rows[:1], "")
    assert isinstance(reading, RowScore) and reading.loss == pytest.approx(wanted, abs=1e-3)


def test_a_known_answer_is_cut_where_a_generated_one_is(side, rows, monkeypatch):
    monkeypatch.setattr(side, "max_new_tokens", 4)
    short = EXACT.model_copy(update={"max_new_tokens": 4})
    readings = side.score_rows(rows, "")
    known = answer_and_score(side, rows, readings, short, "model")[1]
    generated = answer_and_score(side, rows, [RowScore(reading.loss, False) for reading in readings], short, "model")[1]
    assert known == generated
    assert all(len(llama_runtime.tokenize(side.model, said)) <= 4 for said in known)


def test_answers_are_those_given_one_by_one(model, asking, alone):
    ticks = []
    found = llama_runtime.generate_greedy_answers(
        model, [row["input_ids"] for row in asking], MOST, advance=ticks.append
    )
    assert sum(ticks) == len(found) == len(asking) and found == alone
    assert len({len(said) for said, _ in found}) > 2  # each with its own length
    for said, end in found:
        assert len(said) == MOST if not end else end[0] in llama_runtime.end_tokens(model)
        assert not set(said) & set(llama_runtime.end_tokens(model))


def test_log_probs_are_the_last_logits_of_a_plain_eval_of_each_prefix(model):
    """Of the prefix at once: token by token llama.cpp's own figures are others by 0.02 here, and by 0.5 on Q4_1."""
    import llama_cpp

    ids = llama_runtime.tokenize(model, "<|im_start|>user\nThe quick brown fox jumps over the lazy dog.<|im_end|>\n")
    found = llama_runtime.next_token_log_probs(model, ids)
    assert found.dtype == np.float32 and np.abs(np.exp(found).sum(-1) - 1).max() < 1e-4
    for count in range(1, len(ids) + 1):
        model.reset()
        model.eval(ids[:count])
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))
        wanted = logits.astype(float) - logits.max() - math.log(np.exp(logits.astype(float) - logits.max()).sum())
        assert np.abs(found[count - 1] - wanted).max() < 1e-3, count
    assert (llama_runtime.next_token_log_probs(model, ids, [7, 2]) == found[[7, 2]]).all()


def test_perplexity_is_llama_perplexitys_within_half_a_percent(full, model, tmp_path):
    """Its method: windows of n_ctx tokens, each on its own (its first token BOS where the vocabulary adds one); the tokens
    behind the first half of a window are scored; what is left behind the last whole window is not read."""
    import llama_cpp

    text, size = " ".join((ROOT / "LICENSE").read_text().split()[:800]), 256
    (tmp_path / "text").write_text(text)
    theirs = llama_tools.measure_perplexity(full, tmp_path / "text", size, tmp_path / "log")
    ids = model.tokenize(text.encode(), add_bos=True, special=False)  # add_bos: what the vocabulary adds, if anything
    vocabulary, losses = llama_cpp.llama_model_get_vocab(model.model), []
    assert len(ids) > 2 * size
    for start in range(0, len(ids) // size * size, size):
        window = ids[start : start + size]
        if llama_cpp.llama_vocab_get_add_bos(vocabulary):
            window[0] = llama_cpp.llama_vocab_bos(vocabulary)
        losses += llama_runtime.token_log_probs(model, window, range(size // 2 + 1, size))
    assert math.exp(-sum(losses) / len(losses)) == pytest.approx(theirs, rel=0.005)


def test_layers_that_no_gpu_can_hold_are_computed_beside_it(source, monkeypatch):
    """The refusal is made here (there is no GPU); what is then opened is real."""
    import llama_cpp

    plain, asked = llama_runtime._open_model, []

    def small_gpu(gguf, context, vocab_only, layers, verbose):
        asked.append(layers)
        if not vocab_only and not 0 <= layers <= 15:
            raise ValueError("out of memory")
        return plain(gguf, context, vocab_only, layers, verbose)

    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(llama_runtime, "_open_model", small_gpu)
    model = llama_runtime.load_model(source, 64, allow_partial_offload=True)
    assert asked == [-1, -1, 22, 15] and model.n_vocab() == 49152  # its vocabulary, then all, 3/4, half of 30 layers
    model.close()
    with refuses("gguf.not_loadable") as error:
        llama_runtime.load_model(source, 64)
    assert "out of memory" in error.value.message and source.name in error.value.message
