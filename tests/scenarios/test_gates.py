"""Sabotage: one thing made wrong at a time, in the files of a real run, and the gate that must stop it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common import files, llama_runtime
from common.errors import UserError
from contract import manifest
from pipeline.base_model import restore_gguf
from pipeline.config.schema import Config
from pipeline.export import merge
from pipeline.export import stage as export
from pipeline.finetune import row_checks
from pipeline.publish import stage as publish
from pipeline.run import training_rows
from pipeline.run.records import DataRecord, FinetuneRecord, Scores
from pipeline.run.run_folder import Run
from pipeline.scoring.heldout_scores import confidence_interval, select_heldout_rows
from pipeline.toolchain import llama_tools
from pipeline.verify import derive_template, prompt_parity
from pipeline.verify import stage as verify
from pipeline.verify.score_ladder import LadderScorer
from tests.helpers.commands import refuses
from tests.helpers.verify import run_verify

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(chain, tmp_path) -> Run:
    """A copy of the trained run, to be damaged; links, so that only what is changed is written again."""
    copy = tmp_path / "chain"
    shutil.copytree(chain.run, copy, copy_function=lambda a, b: Path(b).hardlink_to(a))
    for stage in ("verify", "publish"):
        (copy / f"{stage}.json").unlink()
    shutil.rmtree(copy / "verify")
    (copy / "verify").mkdir()
    return Run(copy)


def changed(run: Run, **verify_settings) -> Config:
    tree = run.read_config().model_dump()
    tree["verify"] |= verify_settings
    return Config.model_validate(tree)


def own_copy(path: Path) -> Path:
    """The file itself instead of a link to the chain's."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def evidence(run: Run, stage: str = "verify") -> dict:
    return files.read_json(run.folder / stage / "evidence.json")


def set_value(path: Path, key: str, value) -> None:
    """Overwrite one key-value of a GGUF in place; a text by one of the same length."""
    from gguf import GGUFReader

    reader = GGUFReader(own_copy(path), "r+")
    field = reader.get_field(key)
    part = field.parts[field.data[0]]
    part[:] = np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else value
    del reader


def parity_of(run: Run):
    rows, _ = select_heldout_rows(run.read_stage_record("data").output_path("heldout"), run.read_config().evaluate)
    paths = {"f16": run.read_stage_record("export").output_path("f16")}
    return verify.verify_prompts(
        paths, verify.load_trained_format(run.read_record(DataRecord), run, rows), run.folder / "verify"
    )


def conversion_of(run: Run) -> None:
    rows, _ = select_heldout_rows(run.read_stage_record("data").output_path("heldout"), run.read_config().evaluate)
    climb = LadderScorer(run.read_config(), run.folder / "export" / "merged", rows, run.folder / "verify")
    climb.score_reference(
        run.read_stage_record("export").output_path("f16"),
        "f16",
        verify.load_trained_format(run.read_record(DataRecord), run, rows),
    )


# --- the merge


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda name, base, lora, dtype, plain: base.to(torch.float16), "not W"),  # the adapter is left out
        (lambda name, base, lora, dtype, plain: plain(name, base, lora, dtype).T.contiguous() if "layers.3.self_attn.q_proj" in name else plain(name, base, lora, dtype), "not W"),
        (lambda name, base, lora, dtype, plain: plain(name, base * (1.01 if name.endswith("norm.weight") else 1), lora, dtype), "not equal to the base"),
    ],
    ids=["a dropped delta", "a transposed matrix", "a changed norm"],
)  # fmt: skip
def test_a_wrong_merge_stops_the_export(run, wrong, says, monkeypatch):
    plain = merge._merge_tensor
    monkeypatch.setattr(merge, "_merge_tensor", lambda name, base, lora, dtype: wrong(name, base, lora, dtype, plain))
    folder = run.folder / "again"
    finetune = run.read_record(FinetuneRecord)
    weights, adapter = Path(finetune.weights), finetune.output_path("adapter").parent
    with refuses("merge.wrong_tensors") as error:
        export.build_merged_weights(weights, adapter, run.folder / "data" / "tokenizer", folder, "float16")
    found = files.read_json(folder / "evidence.json")
    assert found["gate"] == "merge" and says in found["faults"][0]["what"]
    assert found["faults"][0]["tensor"] in error.value.message and str(folder / "evidence.json") in error.value.hint
    assert not (folder / "merged").exists(), "nothing is left that a next try could take for merged"


# --- prompts


def test_what_was_exported_passes(run):
    turns, reasons, adds = parity_of(run)
    assert turns is not None and reasons == [] and adds is False
    assert not (run.folder / "verify" / "evidence.json").exists()


def test_a_changed_template_beside_the_merged_weights_stops_the_run(run):
    """gguf-py reads tokenizer_config.json before chat_template.jinja: the stale one would win."""
    merged = run.folder / "export" / "merged"
    settings = own_copy(merged / "tokenizer_config.json")
    template = (merged / "chat_template.jinja").read_text()
    files.write_json(settings, files.read_json(settings) | {"chat_template": template.replace("<|im_end|>", "")})
    target = run.read_stage_record("export").output_path("f16")
    target.unlink()
    folder = run.folder / "export"
    llama_tools.convert_to_gguf(
        merged, target, "f16", folder / "metadata.json", folder / "keys.json", folder / "again.log"
    )
    with refuses("parity.chat_template") as error:
        parity_of(run)
    assert "f16" in error.value.message and str(run.folder / "verify" / "evidence.json") in error.value.hint
    assert evidence(run)["gate"] == "parity" and evidence(run)["expected"] == template


@pytest.mark.parametrize(
    ("values", "code", "value"),
    [
        ({"tokenizer.ggml.pre": "falcon"}, "parity.token_ids", ""),
        ({"tokenizer.ggml.eos_token_id": 0}, "parity.end_token", "0, not 2"),
        # a runtime that adds a BOS of its own to prompts that were trained with none
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 3}, "parity.bos_count", "0 BOS"),
    ],
    ids=["pre-tokenizer", "end token", "BOS"],
)  # fmt: skip
def test_a_wrong_vocabulary_stops_the_run(run, values, code, value):
    for key, new_value in values.items():
        set_value(run.read_stage_record("export").output_path("f16"), key, new_value)
    with refuses(code) as error:
        parity_of(run)
    assert value in error.value.message and evidence(run)["gate"] == "parity"


def test_a_doubled_bos_is_seen(run):
    model = llama_runtime.load_model(run.read_stage_record("export").output_path("f16"), vocab_only=True)
    bos = model.token_bos()
    prompt_parity.verify_bos_count(model, [[bos, 5, 6], [5, bos]])
    with pytest.raises(prompt_parity.ParityError) as error:
        prompt_parity.verify_bos_count(model, [[bos, bos, 5, 6]])
    assert error.value.code == "parity.bos_count" and "2 BOS" in str(error.value)


def test_a_template_with_one_newline_more_stops_the_run(run, monkeypatch):
    plain = derive_template.derive_turns

    def wrong(*arguments):
        turns, reasons = plain(*arguments)
        return turns.model_copy(update={"generate": turns.generate + "\n"}), reasons

    monkeypatch.setattr(derive_template, "derive_turns", wrong)
    with refuses("parity.ollama_template"):
        parity_of(run)
    assert evidence(run)["found"] == evidence(run)["expected"] + "\n"


def test_a_manifest_whose_template_was_changed_makes_no_modelfile(chain):
    from deploy.stages import modelfile

    made = manifest.read_manifest(chain.hub / manifest.FILE_NAME)
    modelfile.render_modelfile(made, made.default_artifact())
    wrong = made.chat.turns.model_copy(update={"generate": made.chat.turns.generate + "\n"})
    with pytest.raises(UserError, match="does not render the trained prompt"):
        modelfile.render_modelfile(
            made.model_copy(update={"chat": made.chat.model_copy(update={"turns": wrong})}), made.default_artifact()
        )


def test_an_end_without_loss_stops_the_training(chain):
    table = training_rows.read_table(chain.run / "data" / "train.parquet")
    row_checks.verify_answer_ends(table, {2})
    rows = table.to_pylist()
    rows[7]["labels"] = [-100 if label == 2 else label for label in rows[7]["labels"]]
    import pyarrow as pa

    endless = pa.Table.from_pylist(rows, schema=table.schema)
    with pytest.raises(RuntimeError, match="training row 7 has no end token"):
        row_checks.verify_answer_ends(endless, {2})
    row_checks.verify_answer_ends(endless, {2}, truncated_rows=1)  # of a row that clean.too_long cut, `data` says so


# --- the conversion


@pytest.mark.release
def test_a_wrong_rope_theta_stops_the_run(run):
    set_value(run.read_stage_record("export").output_path("f16"), "llama.rope.freq_base", 10_000.0)
    with refuses("conversion.kl_too_high") as error:
        conversion_of(run)
    assert f"{evidence(run)['kl']:.3g}" in error.value.message
    assert evidence(run)["gate"] == "conversion" and evidence(run)["kl"] > 10 * evidence(run)["bound"]


def test_a_transposed_matrix_in_the_gguf_stops_the_run(run):
    from gguf import GGUFReader

    reader = GGUFReader(own_copy(run.read_stage_record("export").output_path("f16")), "r+")
    (tensor,) = [t for t in reader.tensors if t.name == "blk.3.attn_q.weight"]
    tensor.data[:] = tensor.data.T.copy()
    del reader
    with refuses("conversion.kl_too_high"):
        conversion_of(run)


def test_the_gguf_of_another_model_stops_the_run(run, source):
    """The base itself: its vocabulary is the trained one."""
    path = run.read_stage_record("export").output_path("f16")
    path.unlink()
    shutil.copyfile(source, path)
    with refuses("conversion.kl_too_high"):
        conversion_of(run)


def test_a_truncated_gguf_stops_the_run(run):
    path = own_copy(run.read_stage_record("export").output_path("f16"))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5_000_000)
    with refuses("gguf.not_loadable") as error:
        parity_of(run)
        conversion_of(run)
    assert path.name in error.value.message


# --- quality


@pytest.mark.release  # scores five files
def test_a_quantization_that_costs_too_much_is_followed_by_a_larger_one_and_keeps_its_name(run, tmp_path):
    config = changed(run, max_extra_loss=0.0, max_score_drop=1.0, min_score=None)
    tree = config.model_dump()
    tree["publish"]["repo"] = str(tmp_path / "hub")
    config = Config.model_validate(tree)
    run.config_file.unlink()
    run.freeze_config(config)
    record = run_verify(config, run)
    losses = {name: scores.loss for name, scores in record.scores.items()}
    assert losses["q4_k_m"] > losses["f16"], "else there is nothing to see here"
    assert record.default != "q4_k_m" and losses[record.default] <= losses["f16"]
    assert record.notes[0].startswith("q4_k_m costs") and "q5_k_m is the default instead" in record.notes[0]
    publish.run_publish(config, run)
    made = manifest.read_manifest(tmp_path / "hub" / manifest.FILE_NAME)
    assert made.default_artifact().quantization == record.default
    assert any(a.quantization == "q4_k_m" and a.file == "chain.q4_k_m.gguf" for a in made.artifacts)
    assert made.scores["notes"] == record.notes


def test_the_gate_looks_at_loss_and_at_score(run):
    config = changed(run, max_score_drop=0.02)

    def scores(loss: float, right: int, rows: int = 1000) -> Scores:
        return Scores(loss=loss, score=right / rows, rows=rows, interval=confidence_interval(right / rows, rows))

    good = scores(0.1, 950)
    assert verify.find_quantization_fault(config, scores(0.149, 930), good) is None
    assert "0.051 nats" in verify.find_quantization_fault(config, scores(0.151, 950), good)
    assert "3.0 points" in verify.find_quantization_fault(config, scores(0.1, 920), good)
    assert "nan nats" in verify.find_quantization_fault(config, scores(float("nan"), 950), good)
    # of 40 rows one answer is 2.5 points, and one answer may always turn
    assert verify.find_quantization_fault(config, scores(0.1, 37, 40), scores(0.1, 38, 40)) is None
    assert "5.0 points" in verify.find_quantization_fault(config, scores(0.1, 36, 40), scores(0.1, 38, 40))


def test_nothing_is_published_below_the_score(run):
    with refuses("verify.low_score") as error:
        verify.refuse_low_score(
            changed(run, min_score=0.9), {"q4_k_m": Scores(loss=1.0, rows=100, score=0.89)}, "q4_k_m"
        )
    assert all(value in error.value.message for value in ("q4_k_m", "89%", "90%"))


def test_the_ladder_has_every_rung_and_says_its_caps(chain):
    record = files.read_json(chain.run / "verify.json")
    assert set(record["scores"]) == {"merged", "f16", "q4_k_m", "q4_k_m-static"}
    for name, scores in record["scores"].items():
        assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]), abs=2e-3)
        assert 0 <= scores["kl"] < 0.1 and scores["top1"] > 0.95 and scores["tokens_per_second"] > 0, name
    assert record["scores"]["merged"]["kl"] < 1e-4 < record["scores"]["q4_k_m"]["kl"]
    assert record["compared"] > 300 and "24 of 120 held-out rows" in record["used"]
    page = (chain.run / "verify" / "ladder.md").read_text()
    assert all(f"| {name} |" in page for name in ("base", "adapter", *record["scores"]))
    assert not list((chain.run / "verify").glob("*.f32")), "the distributions are gone again"
    assert restore_gguf.read_all_metadata(chain.hub / "chain.q4_k_m.gguf")["general.file_type"] == 15
