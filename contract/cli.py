"""What both command lines share."""

import sys

import click

from contract import files
from contract.errors import UserError, shown


class InOrder(click.Group):
    """Commands listed in the order of use, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def main(group: click.Group) -> None:
    """The one mouth for errors: a UserError is two lines and exit code 2, everything else a traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a terminal that has no such letter
    try:
        code = group(standalone_mode=False)
    except (UserError, click.ClickException, OSError) as error:
        click.echo(str(told(error)), err=True)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command goes on from here", err=True)
        code = 130
    sys.exit(code)


def told(error: Exception) -> UserError:
    """Every error that a user can mend. Raises all others again."""
    if isinstance(error, click.ClickException):
        where = getattr(error, "ctx", None)
        command = f"`{where.command_path} --help` says what there is" if where else "see --help"
        return UserError(error.format_message(), command)
    if isinstance(error, OSError):  # where no stage knew more about it
        if error.errno not in files.MENDABLE or error.filename is None:
            raise error
        name = shown(str(error.filename))
        return UserError(
            f"{name}: {error.strerror}", "see to its name, owner and rights, then run the same command again"
        )
    return error
