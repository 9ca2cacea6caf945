"""The smoke test: the pulled file, real weights, real llama.cpp; what must make it fail does."""

import contextlib
import json
import re
import shutil

import pytest

from common import files, llama_runtime
from common.errors import UserError
from contract import manifest
from deploy import store
from deploy.stages import modelfile, pull, smoke
from tests.helpers import repos
from tests.helpers.commands import refuses

pytestmark = pytest.mark.slow  # real weights answer


@pytest.fixture
def version(real, tmp_path):
    return pull_to(real, tmp_path / "models")


def pull_to(repo, models):
    from pathlib import Path

    return Path(pull.run_pull(str(repo), models)["folder"])


def changed(real, folder, change):
    """A copy of the repo with another manifest. change: a function of its JSON."""
    return repos.rewrite(shutil.copytree(real, folder), change)


def test_a_good_file_passes_and_the_record_says_how(version):
    record = smoke.run_smoke(version)
    made, path = store.load_tested(version)
    assert record == files.read_json(version / "smoke.json")
    assert (
        record["sha256"] == made.default_artifact().sha256
        and record["faults"] == []
        and record["backend"] == llama_runtime.compute_device()
    )
    assert [a["answer"] for a in record["answers"]] == [s.answer for s in made.smoke]
    assert record["difference"] <= 0.001 and record["memory"] > path.stat().st_size / 2
    assert record["tokens_per_second"] > 0 and record["prompt_tokens_per_second"] > 0 and record["load_seconds"] > 0
    text = smoke.render_record(record)
    assert "computes on CPU" in text and "at most 0.15" in text and "3 of 3 word for word" in text


def test_a_test_that_cannot_be_made_again_takes_back_what_passed_before(version, monkeypatch):
    smoke.run_smoke(version)
    monkeypatch.setattr(
        smoke,
        "load_model",
        lambda *_: (_ for _ in ()).throw(UserError("it does not load", "-", code="gguf.not_loadable")),
    )
    with refuses("gguf.not_loadable"):
        smoke.run_smoke(version)
    with refuses("smoke.not_passed") as caught:
        store.load_tested(version)
    assert str(version) in caught.value.message


def test_weights_that_compute_something_else_fail_and_leave_the_evidence(real, tmp_path):
    """Every hash fits: only the answers give it away."""
    repo = shutil.copytree(real, tmp_path / "hub")
    path = repo / "real.q4_k_m.gguf"
    with path.open("r+b") as file:
        file.seek(-20_000_000, 2)
        file.write(bytes(range(256)) * 4000)
    repos.rewrite(repo, lambda value: value["artifacts"][0].update(sha256=files.sha256(path)))
    version = pull_to(repo, tmp_path / "models")
    with refuses("smoke.wrong_answers") as caught:
        smoke.run_smoke(version)
    assert "log-probabilities differ by" in caught.value.message
    said = json.loads((version / "smoke.json").read_text())
    assert said["faults"] and "sha256" not in said and len(said["answers"]) == 3
    with refuses("smoke.not_passed"):
        modelfile.run_modelfile(version)


@pytest.mark.parametrize("ends", [False, True])
def test_an_answer_may_end_later_than_there_but_it_must(real, tmp_path, source, ends):
    """The manifest says that it ended after three words there; here it goes on for a sentence, or for ever."""
    made = manifest.read_manifest(real / manifest.FILE_NAME)
    model = llama_runtime.load_model(source)
    # Which prompt has such an answer depends on the CPU.
    found = [
        s for s in made.smoke if bool(llama_runtime.generate_greedy(model, s.ids, 4 + smoke.EXTRA_TOKENS)[1]) == ends
    ]
    if not found:
        pytest.skip("on this CPU all answers are long, or all short")
    first, end = found[0], llama_runtime.end_tokens(model)[0]
    ids = [*first.answer_ids[:3], end]
    probable = llama_runtime.answer_log_probs(model, first.ids, ids)
    model.close()
    cut = first.model_dump(mode="json") | {"answer_ids": ids, "log_probs": probable}
    repo = changed(real, tmp_path / "hub", lambda value: value.update(smoke=[cut]))
    with contextlib.nullcontext() if ends else refuses("smoke.wrong_answers") as caught:
        smoke.run_smoke(pull_to(repo, tmp_path / "models"))
    assert ends or "does not end" in caught.value.message


def test_one_answer_that_is_off_is_enough_in_either_direction(real, tmp_path):
    def off(value):
        one = value["smoke"][1]
        one["log_probs"] = [p + (1 if i % 2 else -1) for i, p in enumerate(one["log_probs"])]

    version = pull_to(changed(real, tmp_path / "hub", off), tmp_path / "models")
    with refuses("smoke.wrong_answers") as caught:
        smoke.run_smoke(version)
    assert re.search(r"differ by (0\.9|1\.0)", caught.value.message)


def test_tokens_that_the_model_does_not_have_are_refused(real, tmp_path):
    def beyond(value):
        value["smoke"][0]["answer_ids"][0] = 49152

    with refuses("smoke.unknown_token") as caught:
        smoke.run_smoke(pull_to(changed(real, tmp_path / "hub", beyond), tmp_path / "models"))
    assert caught.value.message.count("49152") == 2, "the token id, and the size of the vocabulary"


def test_a_gpu_that_is_there_and_not_used_is_a_fault(version, monkeypatch):
    monkeypatch.setattr(llama_runtime, "compute_device", lambda: "Metal")
    with refuses("smoke.not_on_gpu") as caught:
        smoke.run_smoke(version)
    assert "real.q4_k_m.gguf on Metal" in caught.value.message


def test_a_bound_that_was_not_measured_here_says_so(version, monkeypatch):
    monkeypatch.setattr(smoke, "MEASURED_BACKENDS", ())
    assert "(not measured on CPU)" in smoke.render_record(smoke.run_smoke(version))


def test_what_llama_cpp_reads_is_compared_not_what_was_read_at_the_pull(version):
    made, path = store.load_pulled(version)
    model = llama_runtime.load_model(path)
    other = made.chat.model_copy(update={"template": made.chat.template + " "})
    with refuses("gguf.wrong_template"):
        smoke.verify_prompts(model, made.model_copy(update={"chat": other}), path)
    first = made.golden[0].model_copy(update={"prompt": made.golden[0].prompt + " "})
    with refuses("smoke.wrong_prompt") as caught:
        smoke.verify_prompts(model, made.model_copy(update={"golden": (first, *made.golden[1:])}), path)
    assert repr(made.golden[0].prompt[:400]) in caught.value.message
    model.close()


def test_an_answer_that_repeated_itself_there_may_do_so_here(version, monkeypatch):
    made, path = store.load_pulled(version)
    model = llama_runtime.load_model(path)
    monkeypatch.setattr(llama_runtime, "generate_greedy", lambda *_: ([7] * 20, []))
    twin = made.smoke[0].model_copy(update={"answer_ids": (7,) * 20, "log_probs": (-1.0,) * 20})
    assert [smoke.compare_answer(model, expected)["loops"] for expected in (twin, made.smoke[0])] == [False, True]
    model.close()


def test_the_answers_of_another_file_do_not_judge_this_one(real, tmp_path):
    def second(value):
        shutil.copy(tmp_path / "hub" / "real.q4_k_m.gguf", tmp_path / "hub" / "real.q8_0.gguf")
        value["artifacts"].append(
            value["artifacts"][0] | {"file": "real.q8_0.gguf", "quantization": "q8_0", "default": False}
        )
        for one in value["smoke"]:
            one["log_probs"] = [p - 3 for p in one["log_probs"]]

    repo = changed(real, tmp_path / "hub", second)
    record = smoke.run_smoke(
        store.require_version(tmp_path / "models", pull.run_pull(str(repo), tmp_path / "models", "q8_0")["repo"])
    )
    assert record["difference"] > 2 and record["faults"] == [] and "not judged" in smoke.render_record(record)


def test_a_manifest_without_answers_is_refused(real, tmp_path):
    repo = changed(real, tmp_path / "hub", lambda value: value.update(smoke=[]))
    with refuses("smoke.no_answers"):
        smoke.run_smoke(pull_to(repo, tmp_path / "models"))


def test_other_token_ids_for_a_golden_prompt_fail(real, tmp_path):
    repo = changed(real, tmp_path / "hub", lambda value: value["golden"][3]["ids"].append(5))
    with refuses("smoke.wrong_prompt") as caught:
        smoke.run_smoke(pull_to(repo, tmp_path / "models"))
    assert "token ids" in caught.value.message


def test_what_passed_is_hashed_again_only_when_it_was_touched(version, monkeypatch):
    smoke.run_smoke(version)
    path, hashed = store.load_tested(version)[1], []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or real(path))
    store.load_tested(version)
    assert hashed == [manifest.FILE_NAME]
    path.touch()
    store.load_tested(version)
    assert path.name in hashed
    with path.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"other")
    with refuses("store.changed") as caught:
        store.load_tested(version)
    assert str(version) in caught.value.message


@pytest.mark.parametrize(
    ("ids", "is_one"),
    [
        ([7] * 16, True), ([7] * 15, False), ([1, 2, 3, 4, 5] * 4, True), ([9, 9, 1, 2, 3, 4] * 3, False),
        ([1, 2] * 8, True), ([1, 2] * 7, False), (list(range(40)), False), ([*range(40), *([3, 4, 5, 6] * 4)], True), ([], False),
    ],
)  # fmt: skip
def test_a_repetition_loop_is_four_times_the_same_and_sixteen_tokens(ids, is_one):
    assert smoke.has_loop(ids) is is_one


def test_another_quantization_is_shown_and_not_judged(version):
    record = {
        "judged": False, "difference": 9.0, "bound": 0.15,
        "answers": [{"should_end": True, "ended": False, "loops": True, "message": "m"}],
    }  # fmt: skip
    assert smoke.find_faults(record) == []
    assert len(smoke.find_faults(record | {"judged": True})) == 3
