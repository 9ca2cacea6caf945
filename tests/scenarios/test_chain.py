"""The real chain on real weights, as a user runs it. One short run, looked at from every side."""

import json
import re
import shutil
from pathlib import Path

import pytest

from common import files
from contract import manifest
from deploy.stages import modelfile, pull, smoke
from pipeline.run.changes import find_changes
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import STAGES, Run
from pipeline.run.training_rows import read_table as rows_of
from tests.helpers.commands import make, refuses

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def hub(chain, tmp_path) -> Path:
    """A copy of the published repo, to be damaged."""
    return Path(shutil.copytree(chain.hub, tmp_path / "hub"))


def pulled(repo: Path, models: Path) -> Path:
    """The folder of the version that was pulled."""
    return Path(pull.run_pull(str(repo), models)["folder"])


def test_it_ends_by_saying_what_was_made(chain):
    assert re.search(r"chain\.q4_k_m\.gguf +\d+\.\d MB\n  sha256 [0-9a-f]{64}", chain.output)
    for line in (
        "base model, before",
        "LoRA adapter, torch",
        "merged weights, torch",
        "f16 GGUF",
        "q4_k_m GGUF, no imatrix",
        "talk to it:",
        "make chat REPO=",
    ):
        assert line in chain.output
    assert len(re.findall(r"^  > ", chain.output, re.MULTILINE)) == 3


def test_the_model_has_learned(chain):
    scores = manifest.read_manifest(chain.hub / manifest.FILE_NAME).scores["heldout"]
    assert scores["base"]["score"] <= 0.1
    assert scores["q4_k_m"]["loss"] < scores["base"]["loss"] / 3
    assert abs(scores["f16"]["loss"] - scores["adapter"]["loss"]) < 0.05 * scores["adapter"]["loss"] + 0.01


def test_every_stage_wrote_its_record_after_its_outputs(chain):
    for stage in STAGES:
        record = files.read_json(chain.run / f"{stage}.json")
        written = (chain.run / f"{stage}.json").stat().st_mtime_ns
        assert record["stage"] == stage
        for output in record["outputs"].values():
            path = chain.run / output["path"]
            assert path.stat().st_mtime_ns <= written, f"{stage}.json is older than {path.name}"
            assert files.sha256(path) == output["sha256"]
        for name, digest in record["sources"].items():
            assert files.sha256(chain.run / f"{name}.json") == digest


def test_a_record_without_its_outputs_cannot_be_written(chain, tmp_path):
    shutil.copy(chain.run / "config.yaml", tmp_path)
    with pytest.raises(FileNotFoundError):
        Run(tmp_path).write_record(DataRecord, (), {"train": tmp_path / "train.jsonl"})
    assert not (tmp_path / "data.json").exists()


def test_the_manifest_was_written_last_into_the_hub(chain):
    newest = max((path for path in chain.hub.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    assert newest == chain.hub / manifest.FILE_NAME
    assert newest.stat().st_mtime_ns <= (chain.run / "publish.json").stat().st_mtime_ns


def test_the_manifest_holds_what_the_mac_needs_and_no_rows_of_the_user(chain):
    made = manifest.read_manifest(chain.hub / manifest.FILE_NAME)
    text = (chain.hub / manifest.FILE_NAME).read_text() + (chain.hub / "README.md").read_text()
    for artifact in made.artifacts:
        path = chain.hub / artifact.file
        assert (files.sha256(path), path.stat().st_size) == (artifact.sha256, artifact.bytes)
    held = files.read_rows(chain.run / "data" / "heldout.jsonl")
    assert len(held) == 120
    for row in held:
        question = row["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        assert json.dumps(question, ensure_ascii=False)[1:-1] not in text
    assert made.base.license == "apache-2.0" and made.provenance["packages"]["unsloth"] and len(made.golden) >= 4
    assert (
        str(chain.folder)
        not in json.dumps(made.model_dump(mode="json")["artifacts"])
        + (chain.hub / "adapter" / "adapter_config.json").read_text()
    )


def test_file_type_and_template_of_the_gguf(chain, tokenizer):
    from pipeline.base_model import restore_gguf

    meta = restore_gguf.read_all_metadata(chain.hub / "chain.q4_k_m.gguf")
    assert meta["general.file_type"] == 15, "LLAMA_FTYPE_MOSTLY_Q4_K_M"
    assert meta["tokenizer.chat_template"] == tokenizer.chat_template
    assert (meta["tokenizer.ggml.pre"], meta["tokenizer.ggml.eos_token_id"]) == ("smollm", tokenizer.eos_token_id)


def test_its_plan_is_told_by_make(chain):
    done = chain.make("plan", "GPU=RTX 4090")
    assert done.returncode == 0, done.stderr
    steps, trained = re.search(r"steps +(\d+)", done.stdout)[1], files.read_json(chain.run / "finetune.json")
    assert "on RTX 4090 (25 GB)\n" in done.stdout and int(steps) == trained["steps"]
    assert f"{trained['tokens']:,} tokens to train on" in done.stdout and "cheapest that fits" in done.stdout


def test_training_saw_the_rows_that_data_wrote(chain):
    log = files.read_rows(chain.run / "finetune" / "log.jsonl")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] / 4
    assert files.read_json(chain.run / "finetune.json")["trainable"] == 4_884_480, (
        "r=16 on all seven projections of 30 layers"
    )


def test_a_dropped_label_mask_is_noticed(chain):
    """The guard in finetune, on the run's own rows: labels that are the ids, as TRL makes them when none are given."""
    from types import SimpleNamespace

    import numpy
    import torch

    from pipeline.finetune import row_checks
    from pipeline.plan import batches

    table = rows_of(chain.run / "data" / "train.parquet")

    def trainer(change, packed=False):
        rows = batches.take_step_rows(table, numpy.arange(2))

        def padded(lists, fill):
            width = max(map(len, lists))
            return torch.tensor([row.tolist() + [fill] * (width - len(row)) for row in lists])

        batch = {
            "input_ids": padded(rows.ids, 0),
            "labels": padded(rows.labels, -100),
            "attention_mask": padded([ids * 0 + 1 for ids in rows.ids], 0),
        }
        return SimpleNamespace(
            packed=packed,
            get_train_dataloader=lambda: [{"rows": rows}],
            iter_micro_batches=lambda rows: [change(batch)],
        )

    row_checks.verify_first_step(trainer(lambda batch: batch), table)
    with pytest.raises(RuntimeError, match="a row that data did not write"):
        row_checks.verify_first_step(trainer(lambda batch: batch | {"labels": batch["input_ids"]}), table)
    with pytest.raises(RuntimeError, match="has 1 rows instead of 2"):
        row_checks.verify_first_step(trainer(lambda batch: {name: value[:1] for name, value in batch.items()}), table)
    with pytest.raises(RuntimeError, match="Unsloth does not pack"):
        row_checks.verify_first_step(trainer(lambda batch: batch, packed=True), table)


def test_most_labels_are_masked(chain):
    rows = rows_of(chain.run / "data" / "train.parquet").to_pylist()
    share = sum(label != -100 for row in rows for label in row["labels"]) / sum(len(row["labels"]) for row in rows)
    assert 0.1 < share < 0.4
    assert all(row["labels"][0] == -100 and 2 in row["labels"] for row in rows)


def test_again_repeats_nothing_but_the_smoke_test(chain):
    before = {
        path: path.stat().st_mtime_ns
        for path in [*chain.run.rglob("*"), *chain.hub.rglob("*"), chain.model / "pull.json"]
        if path.is_file()
    }
    smoke_before = (chain.model / "smoke.json").stat().st_mtime_ns
    (Path("configs") / "demo.yaml").touch()  # a touched file repeats nothing
    for target in ("train", "deploy-mac"):
        done = chain.make(target)
        assert done.returncode == 0, done.stdout + done.stderr
    pulled = chain.model / "chain.q4_k_m.gguf"
    assert {path: path.stat().st_mtime_ns for path in before if path.name != "pull.json"} == {
        p: t for p, t in before.items() if p.name != "pull.json"
    }
    assert pulled.stat().st_mtime_ns < (chain.model / "smoke.json").stat().st_mtime_ns
    assert (chain.model / "smoke.json").stat().st_mtime_ns > smoke_before


def test_a_stage_asked_for_again_says_so(chain):
    done = chain.make("finetune")
    assert done.returncode == 0 and re.search(r"^\[2/6\] finetune: done already", done.stderr, re.MULTILINE)
    assert "evaluate" not in done.stderr, "a target runs what comes before it and nothing after it"


def test_a_changed_training_is_refused_with_the_difference(chain):
    done = chain.make("train", change="finetune.r=8")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "finetune.r: 16 in the run, 8 now" in done.stderr and "RUN=chain.v2" in done.stderr


def test_changed_inputs_and_outputs_are_noticed(chain, tmp_path):
    copy = Run(Path(shutil.copytree(chain.run, tmp_path / "chain", ignore=shutil.ignore_patterns("merged", "*.gguf"))))
    changes = find_changes(copy, copy.read_config())
    assert list(changes.stale) == ["export", "verify", "publish"] and not changes.faults
    assert all("gguf: missing" in reason for reason in changes.stale["export"])
    assert len(changes.stale["export"]) == 4, "f16, q4_k_m, the one without imatrix, imatrix"
    record = files.read_json(copy.record_path("data"))
    files.write_json(copy.record_path("data"), record | {"inputs": dict.fromkeys(record["inputs"], "0" * 64)})
    faults = "\n".join(find_changes(copy, copy.read_config()).faults)
    assert (
        "train.jsonl: its content has changed" in faults
        and "finetune.json was made from a different data.json" in faults
    )


def test_a_pull_notices_a_flipped_byte(hub, tmp_path):
    damage(hub / "chain.q4_k_m.gguf")
    with refuses("pull.wrong_content") as error:
        pull.run_pull(str(hub), tmp_path / "m")
    right = manifest.read_manifest(hub / manifest.FILE_NAME).default_artifact().sha256
    assert right in error.value.message and files.sha256(hub / "chain.q4_k_m.gguf") in error.value.message
    assert not list((tmp_path / "m").rglob("*"))


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))


def test_repo_takes_a_file_url(chain, tmp_path):
    assert (
        pull.run_pull(f"file://{chain.hub}", tmp_path / "m")["sha256"]
        == manifest.read_manifest(chain.hub / manifest.FILE_NAME).default_artifact().sha256
    )


def test_the_smoke_test_runs_on_the_very_file_that_was_pulled(hub, tmp_path):
    """Nothing but the pulled file can make it pass: the hub is gone, and another file in its place is refused."""
    version = pulled(hub, tmp_path / "m")
    shutil.rmtree(hub)
    path = version / "chain.q4_k_m.gguf"
    record = smoke.run_smoke(version)
    assert record["sha256"] == files.read_json(version / "pull.json")["sha256"] == files.sha256(path)
    damage(path)
    (version / "smoke.json").unlink()
    with refuses("store.changed") as error:
        smoke.run_smoke(version)
    assert str(version) in error.value.message
    assert not (version / "smoke.json").exists()


def test_another_models_answers_fail_the_smoke_test(chain, source, tmp_path):
    """The base model under the fine-tune's manifest, all hashes made to fit: only its answers give it away."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "base.gguf").write_bytes(source.read_bytes())
    made = files.read_json(chain.hub / manifest.FILE_NAME)
    digest, size = files.sha256(source), source.stat().st_size
    wrong = made["artifacts"][0] | {"file": "base.gguf", "sha256": digest, "bytes": size, "tensor_types": {}}
    files.write_json(tmp_path / "hub" / manifest.FILE_NAME, made | {"artifacts": [wrong]})
    version = pulled(tmp_path / "hub", tmp_path / "m")
    with refuses("smoke.wrong_answers") as error:
        smoke.run_smoke(version)
    assert "base.gguf" in error.value.message
    assert "sha256" not in files.read_json(version / "smoke.json"), "the evidence, and no verdict to build on"
    with refuses("smoke.not_passed") as error:
        modelfile.run_modelfile(version)
    assert "base.gguf" in error.value.message


def test_bad_arguments_end_with_exit_code_2_and_no_traceback(chain):
    demo = "CONFIG=configs/demo.yaml"
    for arguments, expected in (
        (["train", "CONFIG=configs/none.yaml"], "cannot read the config configs/none.yaml"),
        ([demo, "train", "SET=finetune.rr=1"], "unknown key, did you mean r?"),
        (["deploy-mac", "REPO=./nowhere/at-all"], "no such folder"),
        ([demo, "train", "RUN=a+b"], "is not a valid name for a run"),
        # files of `evaluate`, before anything is trained
        (
            [demo, "train", "RUN=none", "SET=evaluate.prompts=none.txt"],
            "evaluate.prompts: none.txt is missing (looked for /",
        ),
        (
            [demo, "train", "RUN=none", "SET=evaluate.rule=json_schema evaluate.json_schema=LICENSE"],
            "evaluate.json_schema LICENSE",
        ),
        (["finetune", "CONFIG=configs/gemma-2-2b-alpaca.yaml", f"RUNS={chain.folder / 'other'}"], "google/gemma-2-2b"),
        ([demo, "data", f"RUNS={chain.run / 'data.json'}"], "cannot write"),
    ):
        done = make(*arguments)
        assert done.returncode == 2, arguments
        assert expected in done.stderr and "next:" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not Path("runs/none").exists(), "refused before anything is done"


def test_qlora_without_a_gpu_is_one_clear_error(chain):
    import torch

    from pipeline.config.schema import Base
    from pipeline.toolchain import unsloth_loader

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with refuses("environment.no_gpu") as error:
        unsloth_loader.load_model(chain.run / "finetune" / "adapter", Base(model="m"))
    assert "base.load_in_4bit" in error.value.message
