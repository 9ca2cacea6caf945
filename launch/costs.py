"""What costs money: it is confirmed once before it starts, reported at the end, and ended by a teardown command."""

import subprocess
import sys
from collections.abc import Iterator
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
    def report_costs_on_exit(self) -> Iterator["JobSession"]:
        """Report what still costs money as the last lines of a failure, after a teardown if no job runs."""
        try:
            yield self
        except BaseException:
            report = self.teardown_and_report(succeeded=False)
            hub.print_message(report)
            raise

    def teardown_and_report(self, succeeded: bool = True) -> str:
        """Run the teardown, unless the job runs or its work would be lost, and return what still costs money."""
        job_name, label = self.job_name, self.provider.label
        if self.is_running:
            return f"still running on {label}: {job_name}; {self.stop_command} ends it. {self._describe_costs()}"
        teardown = self.teardown or self.provider.teardown_command(job_name)
        if not teardown:
            return f"{job_name} does not run on {label}. {self._describe_costs()}"
        if self.rescue_folder and not succeeded:
            reason = rescue.rescue_run(self.provider, job_name, job_name, self.rescue_folder)
            if reason:
                fault = f"the files of {job_name} cannot be downloaded ({reason})"
                return f"TEARDOWN was not run: {fault}. {self._describe_costs()}"
        return self._run_teardown(teardown)

    def _describe_costs(self) -> str:
        return self.provider.describe_costs(self.job_name, self.is_running)

    def _run_teardown(self, command: str) -> str:
        """Run the command that ends what bills, and return what came of it."""
        exit_code = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
        if exit_code:
            outcome = f"TEARDOWN failed (exit code {exit_code}): {self.provider.label} still bills"
            return f"{outcome}; the command was `{command}`"
        return f"TEARDOWN has ended {self.provider.label}: `{command}`"


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
    else:
        ask_for_confirmation(summary)


def ask_for_confirmation(summary: str) -> None:
    """Ask on the terminal whether to start. Raise UserError when there is none, or the user said no."""
    if not sys.stdin.isatty():
        raise UserError(
            f"{summary}: cannot ask for confirmation without a terminal",
            "add YES=1 to the same command",
            code="cost.no_terminal",
        )
    if not click.confirm(f"{summary}. Start it?", err=True):
        raise UserError("not started", "run the same command again to be asked again", code="cost.not_confirmed")
