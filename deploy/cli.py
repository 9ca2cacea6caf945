"""python -m deploy: the Mac side, one command a stage. No torch anywhere below."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from contract.cli import InOrder
from contract.errors import UserError

REPO = click.argument("repo")
MODELS = click.option(
    "--models", type=click.Path(path_type=Path), default=Path("models"), show_default=True, help="The local store."
)

QUANTIZATION = click.option("--quantization", metavar="NAME", help="Which GGUF of the repo; default: the manifest's.")
START = click.option("--start", is_flag=True, help="Start Ollama's server when none answers.")
OPTIONAL = click.option("--optional", is_flag=True, help="Go on when the app is not there.")


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Ferry's Mac side. `make deploy-mac REPO=...` is the usual way in: doctor, pull, smoke, modelfile, ollama, lmstudio.

    REPO is owner/name or owner/name@tag on the Hugging Face Hub, or a folder hub.
    """


@cli.command()
@click.argument("repo", required=False)
@MODELS
@QUANTIZATION
def doctor(repo: str | None, models: Path, quantization: str | None) -> None:
    """What this machine is, has and lacks, for REPO or in general; each lack with the command that cures it."""
    from contract import checks
    from deploy import doctor as module

    found = module.checks(repo, models, quantization)
    click.echo(checks.page(found))
    checks.refuse(found)


@cli.command()
@REPO
@MODELS
@QUANTIZATION
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
    click.echo(f"smoke: passed\n{module.page(record)}")


@cli.command()
@REPO
@MODELS
def modelfile(repo: str, models: Path) -> None:
    """Write Ollama's Modelfile from the manifest and Modelfile.template."""
    from deploy import modelfile as module
    from deploy import store

    version = store.current(models, repo)
    record = module.stage(version)
    less = record["num_ctx"] < record["trained_ctx"]
    why = f" of {record['trained_ctx']}: more does not fit in memory" if less else ""
    template = "explicit TEMPLATE" if record["template"] else "template embedded in the GGUF"
    click.echo(f"modelfile: {version / record['file']}, {template}, num_ctx {record['num_ctx']}{why}")


@cli.command()
@REPO
@MODELS
@click.option("--name", help="What Ollama shall call it; default: what it was called before, else the run's name.")
@START
@OPTIONAL
def ollama(repo: str, models: Path, name: str | None, start: bool, optional: bool) -> None:
    """Create the model in Ollama, prove its prompts on the live server, then make it NAME:latest."""
    from deploy import store
    from deploy.ollama import stage as module

    with skipping(module.Absent, optional, "ollama"):
        record = module.stage(store.current(models, repo), name, start)
        score = "" if record["score"] is None else f", {record['score']:.0%} of the answers as where it was made"
        click.echo(
            f"ollama: {record['latest']} is {record['model']}, prompts as trained ({record['template']}, Ollama {record['server']}){score}"
        )


@cli.command()
@REPO
@MODELS
@OPTIONAL
def lmstudio(repo: str, models: Path, optional: bool) -> None:
    """Put the file into LM Studio's models folder, as a hard link where the disk allows it."""
    from deploy import lmstudio as module
    from deploy import store

    with skipping(module.Absent, optional, "lmstudio"):
        record = module.stage(store.current(models, repo))
        listed = f", listed as {record['key']}" if record["key"] else ""
        click.echo(f"lmstudio: {record['target']} ({record['how']}){listed}")


@cli.command()
@REPO
@MODELS
def summary(repo: str, models: Path) -> None:
    """Print what was made, the scores, real answers and how to talk to the model."""
    from deploy import store
    from deploy import summary as module

    click.echo(module.text(store.current(models, repo), repo))


@cli.command()
@REPO
@MODELS
def chat(repo: str, models: Path) -> None:
    """Talk to the model here, in llama.cpp."""
    from deploy import chat as module
    from deploy import store

    module.stage(store.current(models, repo))


@cli.command()
@REPO
@MODELS
@click.option("--host", default="127.0.0.1", show_default=True, help="Another one needs an API key in FERRY_API_KEY.")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
def serve(repo: str, models: Path, host: str, port: int) -> None:
    """Serve the model over HTTP as OpenAI's API, for this machine."""
    from deploy import serve as module
    from deploy import store

    module.stage(store.current(models, repo), host, port)


@cli.command()
@REPO
@MODELS
@START
def rollback(repo: str, models: Path, start: bool) -> None:
    """Use the version that was pulled before, or the one named (REPO@tag), in Ollama and LM Studio too."""
    from deploy import versions

    version, done = versions.rollback(repo, models, start)
    click.echo("\n".join([f"rollback: {version} is in use", *(f"  {line}" for line in done)]))


@cli.command()
@click.argument("what", metavar="FILE|NAME")
@MODELS
def trace(what: str, models: Path) -> None:
    """From a GGUF, a model in Ollama or a path of LM Studio's back to run, config, data, code and scores."""
    from deploy import trace as module

    click.echo(module.stage(what, models))


@cli.command("list")
@MODELS
def list_models(models: Path) -> None:
    """Print the versions on this machine; * marks those in use."""
    from deploy import store

    click.echo("\n".join(store.lines(models)) or f"{models} holds no models: `make pull REPO=you/model`")


@cli.command()
@REPO
@MODELS
@click.option(
    "--keep", type=click.IntRange(1), default=2, show_default=True, help="So many of the newest versions stay."
)
@START
def prune(repo: str, models: Path, keep: int, start: bool) -> None:
    """Remove older versions from Ollama and the store; the one in use stays."""
    from deploy import versions

    tell("prune", versions.prune(repo, models, keep, start))


@cli.command()
@REPO
@MODELS
@START
def undeploy(repo: str, models: Path, start: bool) -> None:
    """Remove a model, or one version of it (REPO@tag), from Ollama, LM Studio and this machine."""
    from deploy import versions

    tell("undeploy", versions.undeploy(repo, models, start))


def tell(what: str, went: list[tuple[Path, int]]) -> None:
    """Which versions went, and what that gave back."""
    for version, _ in went:
        click.echo(f"{what}: {version} is gone")
    click.echo(f"{what}: {sum(back for _, back in went):,} bytes came back")


@contextlib.contextmanager
def skipping(absent: type[UserError], optional: bool, stage: str) -> Iterator[None]:
    """What is not on this machine is no reason not to go on, when the stage is one of many."""
    try:
        yield
    except absent as error:
        if not optional:
            raise
        click.echo(f"{stage}: skipped: {error.message}\n next: {error.hint}, then the same command again")
