"""Work grows with what is used: a million steps are planned with the memory of a hundred."""

import itertools
import tracemalloc

import numpy as np
import pytest

from contract import limits, manifest
from pipeline.config.schema import Base, Finetune
from pipeline.finetune import training_log
from pipeline.plan import batches, choose_batch, gpu_table
from pipeline.plan import estimate as plan
from tests.fuzzing.inputs import published
from tests.helpers.commands import refuses

LENGTHS = np.random.default_rng(0).integers(20, 400, 2000)
STEPS = (100, 1_000, 10_000, 100_000, 1_000_000)


def peak_bytes(work) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def plan_steps(steps: int):
    from tests.helpers.shapes import SHAPE

    tune = Finetune(max_steps=steps)
    h100 = next(card for card in gpu_table.read_gpu_table() if card.name == "H100")
    return plan.plan_on_gpu(h100, plan.Workload(Base(model="a/b"), tune, SHAPE, "llama", LENGTHS))


def test_a_plan_of_a_million_steps_takes_the_memory_of_a_hundred():
    plan_steps(100)
    few, many = (peak_bytes(lambda steps=steps: plan_steps(steps)) for steps in (1_000, 1_000_000))
    assert many < 1.5 * few + (1 << 20), (few, many)


def test_a_plan_of_many_steps_says_as_many_tokens_and_hours_as_they_are():
    plans = [plan_steps(steps) for steps in STEPS]
    assert [found.steps for found in plans] == list(STEPS)
    for before, after in itertools.pairwise(plans):
        assert after.tokens == pytest.approx(10 * before.tokens, rel=0.05)
        assert after.training_seconds - plan.START_SECONDS == pytest.approx(
            10 * (before.training_seconds - plan.START_SECONDS), rel=0.1
        )


def test_more_steps_than_are_ever_trained_are_refused():
    with refuses("finetune.too_many_steps") as error:
        choose_batch.build_choice(Finetune(num_train_epochs=10_000), np.full(100_000, 10), 4096, False, True, None)
    assert "125,000,000 steps" in error.value.message and "10,000,000" in error.value.message


def test_the_rows_of_a_step_are_found_without_those_before_it():
    order = batches.ShuffledRows(2000, 8_000_000, 7)
    few = peak_bytes(lambda: order[:8])
    assert peak_bytes(lambda: order[7_999_992:]) < few + (1 << 16)
    assert peak_bytes(lambda: order.count_tokens(LENGTHS, 7_000_001)) < 4 * LENGTHS.nbytes + (1 << 16)


def test_the_meter_of_a_million_steps_holds_no_list_of_them():
    order = batches.ShuffledRows(2000, 8_000_000, 7)
    meter = training_log.SpeedMeter(lambda step: order.count_tokens(LENGTHS, 8 * step), 1_000_000, 1.0, None, None)
    meter.start_at(500_000)
    assert peak_bytes(lambda: meter.read_entry(500_010, 1.0)) < 1 << 19


@pytest.mark.parametrize("batch", [8, "auto", 64])
def test_all_steps_of_a_usual_training_are_looked_at(batch):
    tune = Finetune(num_train_epochs=1, train_batch_size=batch)
    made, order = choose_batch.build_choice(tune, LENGTHS, 4096, False, True, None)
    assert len(choose_batch.select_first_rows(order, made.train_batch_size)) == len(order)
    assert made.largest_micro_batch == batches.largest_micro_batch_tokens(
        LENGTHS[order[:]], made.train_batch_size, 4096, True
    )


def test_the_longest_row_counts_wherever_it_stands():
    lengths = np.full(50_000, 10)
    order = batches.ShuffledRows(len(lengths), len(lengths), Finetune().seed)
    lengths[order[49_999:50_000]] = 3000
    made, _ = choose_batch.build_choice(Finetune(), lengths, 4096, False, False, None)
    assert made.largest_micro_batch == 3000


# A stranger's numbers

HUGE = {
    "a smoke prompt of 100,000 tokens": lambda made: made["smoke"][0].update(ids=[1] * 100_000),
    "an answer of 100,000 tokens": lambda made: made["smoke"][0].update(answer_ids=[1] * 100_000, log_probs=[0.0] * 100_000),
    "a thousand smoke prompts": lambda made: made.update(smoke=made["smoke"] * 1000),
    "a golden prompt of 100,000 tokens": lambda made: made["golden"][0].update(ids=[1] * 100_000),
    "a thousand golden prompts": lambda made: made.update(golden=made["golden"] * 1000),
    "a conversation of a thousand turns": lambda made: made["golden"][0].update(messages=made["golden"][0]["messages"] * 1000),
    "a message of 1 MB": lambda made: made["smoke"][0].update(message="x" * (1 << 20)),
    "a system prompt of 1 MB": lambda made: made["chat"].update(system="x" * (1 << 20)),
    "a template of 2 MB": lambda made: made["chat"].update(template="x" * (2 << 20)),
    "a context of 2^40 tokens": lambda made: made["generation"].update(num_ctx=1 << 40),
    "an answer of 2^40 tokens": lambda made: made["generation"].update(max_tokens=1 << 40),
    "a temperature of 1000": lambda made: made["generation"].update(temperature=1000),
    "a file of 2^60 bytes": lambda made: made["artifacts"][0].update(bytes=1 << 60),
    "ten thousand files": lambda made: made.update(files=[dict(made["files"][0], file=f"f{n}") for n in range(10_000)]),
    "a thousand stop texts": lambda made: made["chat"].update(stop=["x"] * 1000),
    "a fingerprint of 1 MB": lambda made: made["dataset"].update(fingerprints={"x": "1:" + "0" * (1 << 20)}),
    "a fingerprint of 10^4000 rows": lambda made: made["dataset"].update(fingerprints={"x": "9" * 4000 + ":00"}),
    "rows of 2^70": lambda made: made["dataset"].update(rows={"train": 1 << 70}),
    "a loss beyond all": lambda made: made["scores"]["heldout"]["base"].update(loss=1e300),
    "a score of a thousand": lambda made: made["scores"]["heldout"]["base"].update(score=1000.0),
    "a system of many words": lambda made: made["scores"]["heldout"].update({"x" * 100: {"loss": 1.0}}),
    "packages without end": lambda made: made["provenance"].update(packages={f"p{n}": "1" for n in range(5000)}),
    "a name of 1 MB": lambda made: made["base"].update(name="x" * (1 << 20)),
}  # fmt: skip


def parse(change) -> manifest.Manifest:
    import json

    made = published()
    change(made)
    return manifest.parse_manifest(json.dumps(made).encode(), "x")


def test_the_manifest_that_they_are_put_into_is_sound():
    parse(lambda made: None)
    assert limits.MAX_PROMPT_TOKENS < 100_000


@pytest.mark.parametrize("case", HUGE)
def test_every_number_of_a_stranger_has_a_bound(case):
    with refuses("manifest.invalid") as error:
        parse(HUGE[case])
    assert len(error.value.message) < 1000
