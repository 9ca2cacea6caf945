"""The records of the stages that a model is published from."""

from dataclasses import dataclass

from pipeline.run.records import DataRecord, EvaluateRecord, ExportRecord, FinetuneRecord, Scores, VerifyRecord
from pipeline.run.run_folder import Run


@dataclass(frozen=True)
class FinishedStages:
    """The records of all stages before `publish`."""

    data: DataRecord
    finetune: FinetuneRecord
    evaluate: EvaluateRecord
    export: ExportRecord
    verify: VerifyRecord

    @classmethod
    def read(cls, run: Run) -> "FinishedStages":
        """Read the records of a run. Raise UserError when one is missing."""
        read = run.read_record
        return cls(read(DataRecord), read(FinetuneRecord), read(EvaluateRecord), read(ExportRecord), read(VerifyRecord))

    @property
    def scores(self) -> dict[str, Scores]:
        """The quality ladder, from the base model to the quantizations."""
        return self.evaluate.scores | self.verify.scores
