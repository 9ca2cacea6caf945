"""What costs money: asked once before it begins, said at the end, ended by the user's own command if there is one."""

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from common import hub
from common.errors import UserError
from launch import rescue
from launch.provider import Launcher


@dataclass
class Session:
    """One launch. running: whether the job may run at this moment."""

    launcher: Launcher
    name: str
    stop: str
    """What ends a running job, for the end of a sentence."""
    teardown: str | None = None
    """The user's own, which ends what bills."""
    running: bool = False
    home: Path | None = None
    """Where what the run made is brought before a teardown, when it did not end well."""

    @contextmanager
    def billed(self):
        """Whatever comes of it, the last lines are what still costs money. The teardown runs as soon as no job does."""
        try:
            yield self
        except BaseException:
            hub.say(self.ended(well=False))
            raise

    def ended(self, well: bool = True) -> str:
        """Tear down, unless the job runs or its work would be lost; says what is left."""
        if self.running:
            return f"still running on {self.launcher.where}: {self.name}; {self.stop} ends it. {self.launcher.bill(self.name, self.running)}"
        if not (teardown := self.teardown or self.launcher.teardown(self.name)):
            return f"{self.name} does not run on {self.launcher.where}. {self.launcher.bill(self.name, self.running)}"
        if self.home and not well and (why := rescue.bring(self.launcher, self.name, self.name, self.home)):
            return f"TEARDOWN was not run: what {self.name} made cannot be brought home ({why}). {self.launcher.bill(self.name, self.running)}"
        code = subprocess.run(["sh", "-c", teardown], stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
        if code:
            return f"TEARDOWN failed (exit {code}): {self.launcher.where} still bills; `{teardown}` was to end it"
        return f"TEARDOWN has ended {self.launcher.where}: `{teardown}`"


def ask(what: str, dollars: float | None, limit: float | None, yes: bool) -> None:
    """Nothing is started without a yes. Raises UserError over the user's own limit, and where nobody can be asked."""
    if limit is not None and (dollars is None or dollars > limit):
        price = "a price that is not known" if dollars is None else f"about ${dollars:.2f}"
        raise UserError(
            f"{what}: {price}, the limit is ${limit:.2f}",
            "raise MAX_DOLLARS, take a cheaper card, or correct its line in configs/gpus.csv",
        )
    if yes:
        hub.say(what)
        return
    if not sys.stdin.isatty():
        raise UserError(f"{what}: nobody is here to agree to it", "the same command with YES=1")
    if not click.confirm(f"{what}. Start it?", err=True):
        raise UserError("not started", "the same command asks again")
