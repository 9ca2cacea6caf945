"""The smoke test: the pulled file, real weights, real llama.cpp; what must make it fail does."""

import json
import shutil

import pytest

from contract import files, manifest, runtime
from contract.errors import UserError
from deploy import modelfile, pull, smoke, store
from tests import repos


@pytest.fixture
def version(real, tmp_path):
    return pull_to(real, tmp_path / "models")


def pull_to(repo, models):
    from pathlib import Path

    return Path(pull.stage(str(repo), models)["folder"])


def changed(real, folder, change):
    """A copy of the repo with another manifest. change: a function of its JSON."""
    return repos.rewrite(shutil.copytree(real, folder), change)


def test_a_good_file_passes_and_the_record_says_how(version):
    record = smoke.stage(version)
    made, path = store.passed(version)
    assert record == files.read_json(version / "smoke.json")
    assert (
        record["sha256"] == made.default().sha256 and record["faults"] == [] and record["backend"] == runtime.backend()
    )
    assert [a["answer"] for a in record["answers"]] == [s.answer for s in made.smoke]
    assert record["difference"] <= 0.001 and record["memory"] > path.stat().st_size / 2
    assert record["tokens_per_second"] > 0 and record["prompt_tokens_per_second"] > 0 and record["load_seconds"] > 0
    text = smoke.page(record)
    assert "computes on CPU" in text and "at most 0.15" in text and "3 of 3 word for word" in text


def test_weights_that_compute_something_else_fail_and_leave_the_evidence(real, tmp_path):
    """Every hash fits: only the answers give it away."""
    repo = shutil.copytree(real, tmp_path / "hub")
    path = repo / "real.q4_k_m.gguf"
    with path.open("r+b") as file:
        file.seek(-20_000_000, 2)
        file.write(bytes(range(256)) * 4000)
    repos.rewrite(repo, lambda value: value["artifacts"][0].update(sha256=files.sha256(path)))
    version = pull_to(repo, tmp_path / "models")
    with pytest.raises(UserError, match="log-probabilities differ by"):
        smoke.stage(version)
    said = json.loads((version / "smoke.json").read_text())
    assert said["faults"] and "sha256" not in said and len(said["answers"]) == 3
    with pytest.raises(UserError, match="has not passed its smoke test"):
        modelfile.stage(version)


def test_an_answer_that_does_not_stop_fails(real, tmp_path, source):
    """The manifest says that it ended after three words there; here it goes on."""
    made = manifest.read(real / manifest.NAME)
    model = runtime.load(source)
    talks = [s for s in made.smoke if not runtime.greedy(model, s.ids, 4 + smoke.MORE)[1]]  # which do depends on the CPU
    first, end = talks[0], runtime.ends(model)[0]
    ids = [*first.answer_ids[:3], end]
    probable = runtime.answer_log_probs(model, first.ids, ids)
    model.close()
    cut = first.model_dump(mode="json") | {"answer_ids": ids, "log_probs": probable}
    repo = changed(real, tmp_path / "hub", lambda value: value.update(smoke=[cut]))
    with pytest.raises(UserError, match="does not end"):
        smoke.stage(pull_to(repo, tmp_path / "models"))


def test_a_manifest_without_answers_is_refused(real, tmp_path):
    repo = changed(real, tmp_path / "hub", lambda value: value.update(smoke=[]))
    with pytest.raises(UserError, match="holds no answers to compare with"):
        smoke.stage(pull_to(repo, tmp_path / "models"))


def test_other_token_ids_for_a_golden_prompt_fail(real, tmp_path):
    repo = changed(real, tmp_path / "hub", lambda value: value["golden"][3]["ids"].append(5))
    with pytest.raises(UserError, match="is not the trained one"):
        smoke.stage(pull_to(repo, tmp_path / "models"))


def test_what_passed_is_hashed_again_only_when_it_was_touched(version, monkeypatch):
    smoke.stage(version)
    path, hashed = store.passed(version)[1], []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or real(path))
    store.passed(version)
    assert hashed == [manifest.NAME]
    path.touch()
    store.passed(version)
    assert path.name in hashed
    with path.open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"other")
    with pytest.raises(UserError, match="is not what was pulled"):
        store.passed(version)


@pytest.mark.parametrize(
    ("ids", "is_one"),
    [
        ([7] * 16, True), ([7] * 15, False), ([1, 2, 3, 4, 5] * 4, True), ([9, 9, 1, 2, 3, 4] * 3, False),
        ([1, 2] * 8, True), ([1, 2] * 7, False), (list(range(40)), False), ([*range(40), *([3, 4, 5, 6] * 4)], True), ([], False),
    ],
)  # fmt: skip
def test_a_repetition_loop_is_four_times_the_same_and_sixteen_tokens(ids, is_one):
    assert smoke.loops(ids) is is_one


def test_another_quantization_is_shown_and_not_judged(version):
    record = {
        "judged": False, "difference": 9.0, "bound": 0.15,
        "answers": [{"should_end": True, "ended": False, "loops": True, "message": "m"}],
    }  # fmt: skip
    assert smoke.faults(record) == []
    assert len(smoke.faults(record | {"judged": True})) == 3
