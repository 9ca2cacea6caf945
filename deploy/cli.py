"""python -m deploy: the Mac side, one command a stage. No torch anywhere below."""

from pathlib import Path

import click

from contract.cli import InOrder

REPO = click.argument("repo")
MODELS = click.option(
    "--models", type=click.Path(path_type=Path), default=Path("models"), show_default=True, help="The local store."
)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Ferry's Mac side: pull, smoke, modelfile, summary. `make deploy-mac REPO=...` is the usual way in.

    REPO is owner/name or owner/name@tag on the Hugging Face Hub, or a folder hub.
    """


@cli.command()
@REPO
@MODELS
@click.option("--quantization", metavar="NAME", help="Which GGUF of the repo, such as q8_0; default: the manifest's.")
def pull(repo: str, models: Path, quantization: str | None) -> None:
    """Fetch one GGUF of REPO and check it against the manifest; goes on where it was interrupted."""
    from deploy import pull as module

    record = module.stage(repo, models, quantization)
    click.echo(
        f"pull: {record['folder']}/{record['file']}, {record['bytes'] / 1e6:.0f} MB, sha256 {record['sha256'][:12]}... matches the manifest"
    )


@cli.command()
@REPO
@MODELS
def smoke(repo: str, models: Path) -> None:
    """Ask the pulled file the manifest's questions and compare its answers."""
    from deploy import smoke as module
    from deploy import store

    record = module.stage(store.current(models, repo))
    bound = (
        f"at most {record['bound']}"
        if record["judged"]
        else "not judged: the answers to compare with are the default file's"
    )
    click.echo(
        f"smoke: passed, difference {record['difference']} nats per token ({bound}), {record['tokens_per_second']} tokens/s"
    )


@cli.command()
@REPO
@MODELS
def modelfile(repo: str, models: Path) -> None:
    """Write Ollama's Modelfile from the manifest."""
    from deploy import modelfile as module
    from deploy import store

    version = store.current(models, repo)
    record = module.stage(version)
    click.echo(
        f"modelfile: {version / record['file']}, {'explicit TEMPLATE' if record['template'] else 'template embedded in the GGUF'}"
    )


@cli.command()
@REPO
@MODELS
def summary(repo: str, models: Path) -> None:
    """Print what was made, the scores, real answers and the next commands."""
    from deploy import store
    from deploy import summary as module

    click.echo(module.text(store.current(models, repo)))


@cli.command("list")
@MODELS
def list_models(models: Path) -> None:
    """Print the versions on this machine; * marks those in use."""
    from deploy import store

    click.echo("\n".join(store.lines(models)) or f"{models} holds no models: `make pull REPO=you/model`")


@cli.command()
@REPO
@MODELS
def remove(repo: str, models: Path) -> None:
    """Delete a pulled model, or one version of it (REPO@tag, REPO@commit, REPO@version)."""
    from deploy import store

    for version in store.remove(models, repo):
        click.echo(f"remove: {version} is gone")
