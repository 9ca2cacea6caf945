"""Show the first rows of a run as they will be trained, without writing anything to the run."""

import tempfile
from pathlib import Path

from common import console
from pipeline.config.schema import Config
from pipeline.run.run_folder import Run


def preview_rows(config: Config, run: Run, count: int) -> str:
    """Return the first training rows as text. A run without rows gets them made in a temporary folder."""
    from transformers import AutoTokenizer

    from pipeline.data import stage, statistics
    from pipeline.run import training_rows

    with tempfile.TemporaryDirectory() as empty:
        if not run.done("data"):
            run = Run(Path(empty) / run.name)
            run.freeze(config)
            for warning in stage.stage(config, run)["warnings"]:
                console.note(warning)
        tokenizer = AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer")
        return statistics.preview(training_rows.first(run.output("data", "train"), count), tokenizer)
