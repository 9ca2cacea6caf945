"""Fixtures of the tests of the pipeline: a run of a tiny model, and a quick data stage."""

from tests.helpers.row_files import quick  # noqa: F401
from tests.helpers.tiny_run import made, run, whole  # noqa: F401
