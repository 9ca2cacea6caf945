"""Files of the user's that later stages need are read before hours are spent on training."""

import contextlib

from pipeline.config.schema import Config
from pipeline.config.user_files import refuse_missing_files
from pipeline.evaluate.stage import usable


def refuse_unusable_inputs(config: Config, has_rows: bool) -> None:
    """Raise UserError for a file that is missing or cannot be used.

    Args:
        has_rows: the rows are made already, so their sources need not be here (those that are get compared with the run).
    """
    if not has_rows:
        refuse_missing_files(config)
    with contextlib.suppress(ModuleNotFoundError):  # a light environment has no jsonschema; the GPU machine asks again
        usable(config.evaluate)
