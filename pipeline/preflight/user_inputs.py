"""Read the user's files that later stages need, before hours are spent on training."""

import contextlib

from pipeline.config.schema import Config
from pipeline.config.user_files import refuse_missing_files
from pipeline.evaluate.stage import refuse_unusable_files


def refuse_unusable_inputs(config: Config, has_rows: bool) -> None:
    """Raise UserError for a file that is missing or cannot be used.

    When the run `has_rows` already, their source files may be absent. Those that are present are compared with the run.
    """
    if not has_rows:
        refuse_missing_files(config)
    # A light environment has no jsonschema; the GPU machine checks again.
    with contextlib.suppress(ModuleNotFoundError):
        refuse_unusable_files(config.evaluate)
