"""Fixtures of the tests of the machine that runs models: a model that is chatted with."""

from tests.helpers.served_models import engine, talkative, version  # noqa: F401
