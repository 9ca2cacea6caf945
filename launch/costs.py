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
from launch.provider import Provider


@dataclass
class JobSession:
    """One job at a provider, from its start to the report of what it costs."""

    provider: Provider
    job_name: str
    stop_command: str
    """The command that ends a running job, as the end of a sentence."""
    teardown: str | None = None
    """The user's own command that ends what bills."""
    is_running: bool = False
    """Whether the job may run at this moment."""
    rescue_folder: Path | None = None
    """The folder that gets what the run made before a teardown, when the job did not end well."""

    @contextmanager
    def report_costs_on_exit(self):
        """Report what still costs money as the last lines of a failure, after a teardown if no job runs."""
        try:
            yield self
        except BaseException:
            report = self.teardown_and_report(succeeded=False)
            hub.print_message(report)
            raise

    def teardown_and_report(self, succeeded: bool = True) -> str:
        """Run the teardown, unless the job runs or its work would be lost, and return what still costs money."""
        if self.is_running:
            return (
                f"still running on {self.provider.label}: {self.job_name}; {self.stop_command} ends it. "
                f"{self.provider.describe_costs(self.job_name, self.is_running)}"
            )
        if not (teardown := self.teardown or self.provider.teardown_command(self.job_name)):
            return (
                f"{self.job_name} does not run on {self.provider.label}. "
                f"{self.provider.describe_costs(self.job_name, self.is_running)}"
            )
        if self.rescue_folder and not succeeded:
            reason = rescue.rescue_run(self.provider, self.job_name, self.job_name, self.rescue_folder)
            if reason:
                return (
                    f"TEARDOWN was not run: the files of {self.job_name} cannot be downloaded ({reason}). "
                    f"{self.provider.describe_costs(self.job_name, self.is_running)}"
                )
        exit_code = subprocess.run(["sh", "-c", teardown], stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
        if exit_code:
            return (
                f"TEARDOWN failed (exit code {exit_code}): {self.provider.label} still bills; "
                f"the command was `{teardown}`"
            )
        return f"TEARDOWN has ended {self.provider.label}: `{teardown}`"


def confirm_cost(summary: str, dollars: float | None, max_dollars: float | None, assume_yes: bool) -> None:
    """Ask the user to confirm the cost; nothing is started without a yes.

    Args:
        summary: What would be started, with its price, for messages.
        dollars: Its price; None when it is not known.
        max_dollars: The user's own limit.
        assume_yes: Print the summary and do not ask.

    Raises:
        UserError: The price is over the limit, the user said no, or there is no terminal to ask on.
    """
    if max_dollars is not None and (dollars is None or dollars > max_dollars):
        price_text = "the price is not known" if dollars is None else f"about ${dollars:.2f}"
        raise UserError(
            f"{summary}: {price_text}, the limit is ${max_dollars:.2f}",
            "raise MAX_DOLLARS, use a cheaper GPU, or correct its line in configs/gpus.csv",
            code="cost.unknown_price" if dollars is None else "cost.over_limit",
        )
    if assume_yes:
        hub.print_message(summary)
        return
    if not sys.stdin.isatty():
        raise UserError(
            f"{summary}: cannot ask for confirmation without a terminal",
            "add YES=1 to the same command",
            code="cost.no_terminal",
        )
    if not click.confirm(f"{summary}. Start it?", err=True):
        raise UserError("not started", "run the same command again to be asked again", code="cost.not_confirmed")
