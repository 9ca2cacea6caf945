"""Runs, folder hubs and model stores that an earlier Ferry made are read: tests/samples holds those of 2026-11-30."""

import shutil

import pytest

from common import files
from contract import manifest
from deploy import store
from pipeline.publish.folder_hub import hub_folder
from pipeline.run.changes import find_changes
from pipeline.run.records import RECORD_TYPES
from pipeline.run.run_folder import STAGES, Run, is_run_folder
from pipeline.run.status import read_status
from tests.helpers.commands import ROOT

SAMPLES = ROOT / "tests" / "samples"


@pytest.fixture
def run(tmp_path) -> Run:
    shutil.copytree(SAMPLES / "runs" / "chain", tmp_path / "runs" / "chain")
    return Run(tmp_path / "runs" / "chain")


@pytest.mark.parametrize("stage", STAGES)
def test_a_record_is_read_and_keeps_every_field(run, stage):
    record = run.read_stage_record(stage)
    assert isinstance(record, RECORD_TYPES[stage])
    assert record.model_dump(mode="json", exclude_unset=True) == files.read_json(run.record_path(stage))


def test_a_run_goes_on_with_its_own_config(run):
    """Its large files are no samples; apart from them nothing has changed, so nothing would run again or be refused."""
    changes = find_changes(run, run.read_config())
    reasons = changes.faults + [reason for reasons in changes.stale.values() for reason in reasons]
    lost = [reason for reason in reasons if "missing, or its size differs" in reason]
    assert lost and all("runs again" in reason for reason in reasons if reason not in lost)


def test_a_run_is_listed_with_its_scores(run):
    status = read_status(run)
    assert is_run_folder(run.folder) and not run.is_config_edited()
    assert (status.next_stage, status.published) == (None, "./hub/chain") and status.score == pytest.approx(0.6667)


def test_a_folder_hub_is_known_as_ferrys(tmp_path):
    shutil.copytree(SAMPLES / "hub" / "chain", tmp_path / "hub")
    assert hub_folder(str(tmp_path / "hub"), "chain") == tmp_path / "hub"
    published = manifest.read_manifest(tmp_path / "hub" / manifest.FILE_NAME)
    assert published.name == "chain" and published.default_artifact().quantization == "q4_k_m"


def test_a_version_of_the_store_is_the_one_in_use(tmp_path):
    shutil.copytree(SAMPLES / "models", tmp_path / "models")
    (version,) = (path for path in (tmp_path / "models" / "chain").iterdir() if path.is_dir())
    (tmp_path / "models" / "chain" / "current").symlink_to(version.name)
    assert store.current_version(tmp_path / "models" / "chain") == version
    assert store.list_all_versions(tmp_path / "models") == [version] and store.is_ours(version)
    assert store.read_pull_record(version)["quantization"] == "q4_k_m"
    assert store.read_record(version / "smoke.json")["faults"] == []
