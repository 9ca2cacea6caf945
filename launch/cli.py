"""python -m launch: from the laptop. `make cloud-to-local`, `make cloud-stop`, `make reproduce` are the usual way in."""

from pathlib import Path

import click

from contract.cli import InOrder
from pipeline.cli import RUN, SET

CLOUD = click.option(
    "--cloud",
    default="",
    metavar="ADDRESS",
    help="ssh://user@box[:port][/folder], sky[/infra] or hf-jobs[/organization]",
)
PASS = click.option(
    "--pass", "settings", multiple=True, metavar="NAME=VALUE", help="A setting for the make there; repeatable."
)
TEARDOWN = click.option(
    "--teardown", metavar="COMMAND", help="Ends what bills; run here once no job runs, whatever came of it."
)
LIMIT = click.option("--max-dollars", "limit", type=click.FloatRange(0), help="Refuse what would cost more.")
CHECKPOINTS = click.option(
    "--checkpoints", metavar="OWNER/NAME", help="A private repo of the Hub for them; an engine has one always."
)
SPOT = click.option(
    "--spot", is_flag=True, help="Of an engine, a machine that may be taken away; it goes on on the next."
)
YES = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Ferry's launcher: train on another machine from here, and make again what was published."""


@cli.command()
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@RUN
@CLOUD
@SET
@PASS
@TEARDOWN
@LIMIT
@CHECKPOINTS
@SPOT
@click.option("--gpu", metavar="NAME", help="Of an engine: this card of configs/gpus.csv, or this machine.")
@click.option("--hours", type=click.FloatRange(0, min_open=True), help="Time limit, of an engine's machine.")
@YES
def cloud(
    config_file: Path,
    folder: Path,
    cloud: str,
    overrides,
    settings,
    teardown,
    limit,
    checkpoints,
    spot,
    gpu,
    hours,
    yes,
) -> None:
    """Check here, train there, bring the result home; run again, it goes on."""
    from launch import cloud as module
    from launch import launchers
    from pipeline.record import Run

    launcher = launchers.of(cloud, folder, checkpoints, spot)
    wish = module.Wish(overrides, settings, teardown, limit, yes, checkpoints, gpu, hours, spot)
    record = module.stage(config_file, Run(folder), launcher, cloud, wish)
    click.echo(f"cloud: {record['repo']}, trained on {record['where']} by the code of {record['commit'][:12]}")


@cli.command()
@RUN
def repo(folder: Path) -> None:
    """Print what `make deploy-mac REPO=` takes of a run that came home."""
    from contract import files

    click.echo(files.read_json(folder / "cloud.json")["repo"])


@cli.command()
@RUN
def billing(folder: Path) -> None:
    """Print what still costs money."""
    from contract import files

    click.echo(files.read_json(folder / "cloud.json")["billing"])


@cli.command()
@click.argument("repo")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where runs go.")
@click.option("--cloud", metavar="ADDRESS", help="ssh://user@box[:port][/folder]; default: this machine.")
@click.option("--data", type=click.Path(path_type=Path), help="The local data it was trained on, a file or a folder.")
@PASS
@TEARDOWN
@LIMIT
@YES
def reproduce(repo: str, runs: Path, cloud: str | None, data: Path | None, settings, teardown, limit, yes) -> None:
    """Make REPO again from its manifest alone and compare; exit code 1 when it is not the same."""
    import sys

    from contract import files
    from launch import address, verdict
    from launch import reproduce as module
    from launch.box import Box
    from launch.cloud import Wish

    this = module.published(repo, runs)
    launcher = Box(address.read(cloud)) if cloud else Box(None, str((runs / "reproduce" / "here").absolute()))
    stop = f"`make cloud-stop CLOUD={cloud} RUN={this.name}`" if cloud else "the same command, and then Ctrl-C,"
    rows = module.stage(this, launcher, stop, data, Wish((), settings, teardown, limit, yes))
    files.write_json(this.folder / "verdict.json", {"repo": repo, "rows": [vars(row) for row in rows]})
    click.echo(verdict.page(rows, repo))
    sys.exit(0 if verdict.reproduced(rows) else 1)


@cli.command()
@RUN
@CLOUD
@CHECKPOINTS
@SPOT
@TEARDOWN
def stop(folder: Path, cloud: str, checkpoints: str | None, spot: bool, teardown: str | None) -> None:
    """Tell the job of that run to write its state and end."""
    from launch import attend, launchers
    from launch.bill import Session

    launcher, name = launchers.of(cloud, folder, checkpoints, spot), folder.name
    # until the box says otherwise
    session = Session(launcher, name, "the same command", teardown, running=True, home=folder / "cloud" / "rescued")
    with session.billed():
        session.running = launcher.state(name).word == "running"
        if session.running:
            launcher.stop(name)
            attend.through(launcher, name, folder / "cloud" / "log")
            session.running = False
    click.echo(f"stop: {session.ended(well=False)}")
