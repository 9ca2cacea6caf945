"""Show the first rows of a run as they will be trained, without writing anything to the run."""

import tempfile
from pathlib import Path

from common import console
from pipeline.base_model.tokenizer import load_fast_tokenizer
from pipeline.config.schema import Config
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run


def preview_rows(config: Config, run: Run, count: int) -> str:
    """Return the first training rows as text. A run without rows gets them made in a temporary folder."""
    from pipeline.data import stage, statistics
    from pipeline.run import training_rows

    with tempfile.TemporaryDirectory() as temporary_folder:
        if not run.is_done("data"):
            run = Run(Path(temporary_folder) / run.name)
            run.freeze_config(config)
            for warning in stage.run_data(config, run).warnings:
                console.print_note(warning)
        tokenizer = load_fast_tokenizer(run.folder / "data" / "tokenizer")
        train_path = run.read_record(DataRecord).output_path("train")
        return statistics.format_preview(training_rows.read_first_rows(train_path, count), tokenizer)
