"""What both command lines share."""

import sys

import click

from contract.errors import UserError


class InOrder(click.Group):
    """Commands listed in the order of use, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def main(group: click.Group) -> None:
    """The one mouth for errors: a UserError is two lines and exit code 2, everything else a traceback."""
    try:
        code = group(standalone_mode=False)
    except UserError as error:
        click.echo(str(error), err=True)
        code = 2
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the same command goes on from here", err=True)
        code = 130
    sys.exit(code)
