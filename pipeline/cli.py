"""python -m pipeline: one command a stage. Heavy imports live inside the commands: --help must cost nothing."""

import contextlib
import re
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


@cli.command()
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where runs go.")
def doctor(runs: Path) -> None:
    """What this machine is, has and lacks for training; each lack with the command that cures it."""
    from contract import checks
    from pipeline.doctor import stage as module

    found = module.checks(runs)
    click.echo(checks.page(found))
    checks.refuse(found)


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
    from contract import manifest
    from contract.errors import UserError
    from pipeline import config
    from pipeline.record import Run
    from pipeline.record import check as faults_of

    run, tree = Run(folder), config.load(config_file, overrides)
    if not re.fullmatch(manifest.PLAIN, folder.name):
        raise UserError(
            f"the run's name {folder.name!r} cannot name files and a model",
            "RUN=another one, of letters, digits, dots, dashes and underscores",
        )
    faults = faults_of(run, tree)
    if faults:
        raise UserError(
            f"the run {folder} does not fit any more:\n  " + "\n  ".join(faults),
            f"undo the change, or start a new run: RUN={folder.name}-2",
        )
    if not run.done("evaluate"):
        from pipeline import evaluate

        with contextlib.suppress(ModuleNotFoundError):  # a light environment has no jsonschema; the GPU box asks again
            evaluate.usable(tree.evaluate)


@cli.command()
@CONFIG
@RUN
@SET
def restore(config_file: Path, folder: Path, overrides: tuple[str, ...]) -> None:
    """From $FERRY_CHECKPOINTS what it holds of this run, where this machine has nothing of it."""
    from pipeline import config
    from pipeline.offsite import pusher
    from pipeline.offsite import restore as module
    from pipeline.record import Run

    module.restore(pusher.repo() or "", Run(folder), config.load(config_file, overrides))


@cli.command()
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where runs go.")
def resume(runs: Path) -> None:
    """From $FERRY_CHECKPOINTS the run that it holds; prints its name."""
    from pipeline.offsite import pusher
    from pipeline.offsite import restore as module

    click.echo(module.resume(pusher.repo() or "", runs).run)


@cli.command()
@CONFIG
@RUN
@SET
def preflight(config_file: Path, folder: Path, overrides: tuple[str, ...]) -> None:
    """Ask before any GPU work: token, repo, base model, licence, data set, disk."""
    from pipeline import config
    from pipeline import preflight as module
    from pipeline.offsite import pusher
    from pipeline.record import Run

    for text in module.stage(config.load(config_file, overrides), Run(folder), checkpoints=pusher.repo()):
        click.echo(f"preflight: {text}")


@cli.command()
@CONFIG
@click.option(
    "--run", "folder", type=click.Path(path_type=Path), help="Folder of the run; default: runs/<config's name>."
)
@SET
@click.option("--processes", type=click.IntRange(1), help="How many work on the rows; default: one a core.")
@click.option(
    "--preview", type=click.IntRange(1), metavar="N", help="Only show N rows, with the tokens that carry loss."
)
def data(
    config_file: Path, folder: Path | None, overrides: tuple[str, ...], processes: int | None, preview: int | None
) -> None:
    """Read, clean, split, render, mask and tokenize the rows; freeze the config."""
    from pipeline import config

    folder = folder or Path("runs") / config_file.stem
    if preview:
        click.echo(look(config.load(config_file, overrides), folder, processes, preview))
        return

    def work(run):
        from pipeline.data import report
        from pipeline.data import stage as module

        record = module.stage(config.load(config_file, overrides), run, processes)
        warn(record["warnings"])
        return "\n" + report.table(record)

    stage("data", folder, work)


def look(config, folder: Path, processes: int | None, count: int) -> str:
    """The first rows of a run's data; of a run that has none yet, made in a folder that goes again."""
    import tempfile

    from transformers import AutoTokenizer

    from pipeline import rows
    from pipeline.data import report
    from pipeline.data import stage as module
    from pipeline.record import Run

    with tempfile.TemporaryDirectory() as empty:
        run = Run(folder)
        if not run.done("data"):
            run = Run(Path(empty) / folder.name)
            warn(module.stage(config, run, processes)["warnings"])
        tokenizer = AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer")
        return report.preview(rows.first(run.output("data", "train"), count), tokenizer)


@cli.command()
@CONFIG
@RUN
@SET
@click.option(
    "--gpu", metavar="NAME", help="A card of configs/gpus.csv; default: the one here, else the cheapest that fits."
)
@click.option(
    "--probe", is_flag=True, help="Measure a few steps on this machine's GPU and let finetune take the fastest."
)
def plan(config_file: Path, folder: Path, overrides: tuple[str, ...], gpu: str | None, probe: bool) -> None:
    """Memory, disk, steps, hours and money, before any of it is paid; needs no GPU."""
    from pipeline import config
    from pipeline.doctor import box
    from pipeline.plan import stage as module
    from pipeline.record import Run

    tree, run = config.load(config_file, overrides), Run(folder)
    here = box.nvidia().cards
    click.echo(module.stage(tree, run, gpu, here[0].name if here else None))
    if probe:
        from pipeline.finetune import probe as prober

        click.echo("\nmeasured on this card, a few steps each, at the longest rows:", err=True)
        click.echo(prober.stage(run))


@cli.command()
@RUN
def finetune(folder: Path) -> None:
    """Train the LoRA adapter with Unsloth; goes on from the last complete checkpoint."""

    def work(run):
        from pipeline.finetune import stage as module

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
        from pipeline import ladder

        config = run.config()
        record = module.stage(config, run)
        warn([record["training"]["warning"]] if record["training"]["warning"] else [])
        return f"{record['used']}\n{ladder.table(record['scores'])}{before_after(run)}"

    stage("evaluate", folder, work)


@cli.command()
@RUN
def export(folder: Path) -> None:
    """Merge to 16 bit, convert to GGUF, quantize."""

    def work(run):
        from pipeline.export import stage as module

        made = module.stage(run.config(), run)["outputs"]
        return ", ".join(f"{name} {item['bytes'] / 1e6:.0f} MB" for name, item in made.items())

    stage("export", folder, work)


@cli.command()
@RUN
def verify(folder: Path) -> None:
    """Check and score the GGUF files in llama.cpp; refuse what is not what was trained."""

    def work(run):
        from pipeline import ladder
        from pipeline.verify import stage as module

        record = module.stage(run.config(), run)
        warn(record["notes"])
        return page(record, ladder.table(run.read("evaluate")["scores"] | record["scores"]))

    stage("verify", folder, work)


@cli.command()
@RUN
def publish(folder: Path) -> None:
    """Put GGUF, adapter and card into the hub, manifest.json last."""

    def work(run):
        from pipeline.publish import stage as module

        record = module.stage(run.config(), run)
        where = f"{record['repo']}@{record['tag']}" if "tag" in record else record["repo"]
        return f"{where}\n  On your Mac: make deploy-mac REPO={where}"

    stage("publish", folder, work)


def stage(name: str, folder: Path, work) -> None:
    """Run one stage unless its record says that it is done."""
    from contract.errors import UserError
    from pipeline.offsite import pusher
    from pipeline.record import Run

    run = Run(folder)
    if run.done(name):
        click.echo(f"{name}: done already ({run.path(name)})")
        if name == "publish":
            pusher.after(run)
        return
    click.echo(f"-- {name}", err=True)
    try:
        click.echo(f"{name}: {work(run)}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} needs {error.name}, which this environment does not have",
            "leave out LIGHT=1 (a light environment makes rows for a Hugging Face base, nothing else), or `make env`",
        ) from error
    pusher.after(run)


def page(record: dict, ladder: str) -> str:
    """What verify has shown."""
    found = record["conversion"]
    said = [
        f"{record['used']}; KL and top-1 over {record['compared']} response positions (verify.max_positions)",
        ladder,
        (f"conversion: mean KL {found['kl']:.2g} nats over {found['positions']} positions of merged weights in torch and "
        f"{record['sixteen']} in llama.cpp, same top-1 {found['top1']:.1%}"),
        "prompts: transformers, llama.cpp's server and every file agree on all golden conversations, text and token ids",
        "Ollama TEMPLATE: " + ("derived and equal on them" if record["template"] == "derived" else f"embedded one; {'; '.join(record['reasons'])}"),
        f"default: {record['default']}",
    ]  # fmt: skip
    return "\n".join(said)


def before_after(run) -> str:
    """Three answers side by side."""
    from contract import files

    rows = files.read_rows(run.output("evaluate", "answers"))[:3]
    lines = [f"\n> {row['prompt'][-200:].strip()}\n  before: {row['before'][:200].strip()}\n  after:  {row['after'][:200].strip()}" for row in rows]  # fmt: skip
    return "".join(lines)


def warn(said: list[str]) -> None:
    for text in said:
        click.echo(f"note: {text}", err=True)
