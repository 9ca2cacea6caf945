"""What a user types, `make` and `ferry`, and the error that is expected of it."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from common.errors import UserError

ROOT = Path(__file__).parents[2]
MAKE = ["make", "--no-print-directory", f"VENV={sys.prefix}", f"PYTHON={sys.executable}"]


def typed_environment() -> dict[str, str]:
    """The environment of a `make` that a user types, without what the `make` that runs these tests left in it."""
    return {
        name: value
        for name, value in os.environ.items()
        if not re.match("FERRY_(TYPED|GOALS|VENV|TERMINAL)|M(AKE)?FLAGS|MAKELEVEL", name)
    }


def make(*arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """`make` in the checkout, as a user types it."""
    return subprocess.run(
        [*prefix, *MAKE, *arguments], cwd=ROOT, env=typed_environment(), capture_output=True, text=True
    )


def ferry(*command: object, **settings: str) -> subprocess.CompletedProcess:
    """The `ferry` command in this environment; the checkout is the current folder."""
    return subprocess.run(
        [sys.executable, "-m", "cli", *map(str, command)],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )


@contextlib.contextmanager
def refuses(code: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError with this code; yield what pytest.raises yields, to look at the values in its message."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, caught.value
    assert caught.value.message.strip() and caught.value.hint.strip()
