"""The verify stage over a run."""

from pipeline.config.schema import Config
from pipeline.run.records import DataRecord, EvaluateRecord, ExportRecord, VerifyRecord
from pipeline.run.run_folder import Run
from pipeline.verify import stage as verify


def run_verify(config: Config, run: Run) -> VerifyRecord:
    return verify.run_verify(
        config, *(run.read_record(kind) for kind in (DataRecord, EvaluateRecord, ExportRecord)), run
    )
