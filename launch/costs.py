"""What costs money: it is confirmed once before it starts, reported at the end, and ended by a teardown command."""

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
    """One job at a provider, from its start to the report of what it costs."""

    launcher: Launcher
    name: str
    stop: str
    """The command that ends a running job, as the end of a sentence."""
    teardown: str | None = None
    """The user's own command that ends what bills."""
    running: bool = False
    """Whether the job may run at this moment."""
    home: Path | None = None
    """The folder that gets what the run made before a teardown, when the job did not end well."""

    @contextmanager
    def billed(self):
        """Report what still costs money as the last lines of a failure, after a teardown if no job runs."""
        try:
            yield self
        except BaseException:
            report = self.ended(well=False)
            hub.say(report)
            raise

    def ended(self, well: bool = True) -> str:
        """Run the teardown, unless the job runs or its work would be lost, and return what still costs money."""
        if self.running:
            return (
                f"still running on {self.launcher.where}: {self.name}; {self.stop} ends it. "
                f"{self.launcher.bill(self.name, self.running)}"
            )
        if not (teardown := self.teardown or self.launcher.teardown(self.name)):
            return f"{self.name} does not run on {self.launcher.where}. {self.launcher.bill(self.name, self.running)}"
        if self.home and not well:
            why = rescue.bring(self.launcher, self.name, self.name, self.home)
            if why:
                return (
                    f"TEARDOWN was not run: what {self.name} made cannot be brought home ({why}). "
                    f"{self.launcher.bill(self.name, self.running)}"
                )
        code = subprocess.run(["sh", "-c", teardown], stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
        if code:
            return f"TEARDOWN failed (exit {code}): {self.launcher.where} still bills; `{teardown}` was to end it"
        return f"TEARDOWN has ended {self.launcher.where}: `{teardown}`"


def ask(what: str, dollars: float | None, limit: float | None, yes: bool) -> None:
    """Ask the user to confirm the cost; nothing is started without a yes.

    Args:
        summary: What would be started, with its price, for messages.
        dollars: Its price; None when it is not known.
        max_dollars: The user's own limit.
        assume_yes: Print the summary and do not ask.

    Raises:
        UserError: The price is over the limit, the user said no, or there is no terminal to ask on.
    """
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
