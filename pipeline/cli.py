"""python -m pipeline: one command a stage. Heavy imports live inside the commands: --help must cost nothing."""

from pathlib import Path

import click

from contract.cli import InOrder

RUN = click.option(
    "--run", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the run, such as runs/demo."
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one value of the config; repeatable.",
)
CONFIG = click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Ferry's cloud side: data, finetune, evaluate, export, verify, publish. `make` is the usual way in."""


@cli.command("config")
@CONFIG
@SET
def show_config(config_file: Path, overrides: tuple[str, ...]) -> None:
    """Print the resolved config, defaults included, and what its choices cost."""
    from pipeline import config

    tree = config.load(config_file, overrides)
    click.echo(config.dump(tree), nl=False)
    warn(config.warnings(tree))


@cli.command()
@CONFIG
@RUN
@SET
def check(config_file: Path, folder: Path, overrides: tuple[str, ...]) -> None:
    """Refuse when the run no longer fits its config, its inputs or its own records."""
    from contract.errors import UserError
    from pipeline import config
    from pipeline.record import Run
    from pipeline.record import check as faults_of

    faults = faults_of(Run(folder), config.load(config_file, overrides))
    if faults:
        raise UserError(
            f"the run {folder} does not fit any more:\n  " + "\n  ".join(faults),
            f"undo the change, or start a new run: RUN={folder.name}-2",
        )


@cli.command()
@CONFIG
@RUN
@SET
def data(config_file: Path, folder: Path, overrides: tuple[str, ...]) -> None:
    """Render, mask and tokenize the rows; freeze the config."""
    from pipeline import config

    def work(run):
        from pipeline import data as module

        record = module.stage(config.load(config_file, overrides), run)
        warn(record["warnings"])
        rows, tokens = record["rows"], record["tokens"]
        return f"{rows['train']} training rows ({tokens['train']} tokens, longest {tokens['max']}), {rows['heldout']} held out, {rows['dropped_too_long']} too long"

    stage("data", folder, work)


@cli.command()
@RUN
def finetune(folder: Path) -> None:
    """Train the LoRA adapter with Unsloth; goes on from the last complete checkpoint."""

    def work(run):
        from pipeline import finetune as module

        config = run.config()
        record = module.stage(config.base, config.finetune, run)
        return f"{record['steps']} steps, final loss {record['final_loss']}, peak {record['peak_memory_gb']} GB, {record['device']}"

    stage("finetune", folder, work)


@cli.command()
@RUN
def evaluate(folder: Path) -> None:
    """Score the base model and the adapter on held-out rows, in torch."""

    def work(run):
        from pipeline import evaluate as module

        config = run.config()
        return table(module.stage(config.base, config.evaluate, run)["scores"])

    stage("evaluate", folder, work)


@cli.command()
@RUN
def export(folder: Path) -> None:
    """Merge to 16 bit, convert to GGUF, quantize."""

    def work(run):
        from pipeline import export as module

        made = module.stage(run.config().export, run)["outputs"]
        return ", ".join(f"{name} {item['bytes'] / 1e6:.0f} MB" for name, item in made.items())

    stage("export", folder, work)


@cli.command()
@RUN
def verify(folder: Path) -> None:
    """Check and score the GGUF files in llama.cpp; refuse what is not what was trained."""

    def work(run):
        from pipeline import verify as module

        return table(module.stage(run.config(), run)["scores"])

    stage("verify", folder, work)


@cli.command()
@RUN
def publish(folder: Path) -> None:
    """Put GGUF, adapter and card into the hub, manifest.json last."""

    def work(run):
        from pipeline import publish as module

        record = module.stage(run.config(), run)
        return f"{record['repo']}\n  On your Mac: make deploy-mac REPO={record['repo']}"

    stage("publish", folder, work)


def stage(name: str, folder: Path, work) -> None:
    """Run one stage unless its record says that it is done."""
    from pipeline.record import Run

    run = Run(folder)
    if run.done(name):
        click.echo(f"{name}: done already ({run.path(name)})")
        return
    click.echo(f"-- {name}", err=True)
    click.echo(f"{name}: {work(run)}")


def table(scores: dict) -> str:
    return "; ".join(
        f"{name} loss {s['loss']}" + (f", score {s['score']:.1%}" if "score" in s else "") for name, s in scores.items()
    )


def warn(said: list[str]) -> None:
    for text in said:
        click.echo(f"note: {text}", err=True)
