"""python -m deploy: the Mac side, one command a stage. No torch anywhere below."""

from pathlib import Path

import click

from contract.cli import InOrder

INTO = click.option(
    "--into",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the pulled model, such as models/demo.",
)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Ferry's Mac side: pull, smoke, modelfile, summary. `make deploy-mac REPO=...` is the usual way in."""


@cli.command()
@click.argument("repo")
@INTO
def pull(repo: str, folder: Path) -> None:
    """Fetch the default GGUF of REPO (a folder hub) and check its sha256."""
    from deploy import pull as module

    record = module.stage(repo, folder)
    click.echo(
        f"pull: {record['file']}, {record['bytes'] / 1e6:.0f} MB, sha256 {record['sha256'][:12]}... matches the manifest"
    )


@cli.command()
@INTO
def smoke(folder: Path) -> None:
    """Ask the pulled file the manifest's questions and compare its answers."""
    from deploy import smoke as module

    record = module.stage(folder)
    click.echo(
        f"smoke: passed, difference {record['difference']} nats per token (at most {record['bound']}), {record['tokens_per_second']} tokens/s"
    )


@cli.command()
@INTO
def modelfile(folder: Path) -> None:
    """Write Ollama's Modelfile from the manifest."""
    from deploy import modelfile as module

    record = module.stage(folder)
    click.echo(
        f"modelfile: {folder / record['file']}, {'explicit TEMPLATE' if record['template'] else 'template embedded in the GGUF'}"
    )


@cli.command()
@INTO
def summary(folder: Path) -> None:
    """Print what was made, the scores, real answers and the next commands."""
    from deploy import summary as module

    click.echo(module.text(folder))
