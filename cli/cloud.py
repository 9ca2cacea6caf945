"""Commands of the laptop: train on another machine, fetch the result, make a published model again."""

import subprocess
import sys
from pathlib import Path

import click

from cli.environment import ROOT, Command
from cli.options import MODELS, PATH, RUN_OPTIONS, RUNS, START, YES, choose_run_folder, combine_decorators, find_run
from cli.settings import FiniteRange, missing_setting_error, operand, setting
from cli.train import choose_environment_for_rows, open_run

CLOUD = setting(
    "--cloud",
    make="CLOUD",
    metavar="ADDRESS",
    help="ssh://user@host[:port][/folder], sky[/infra] or hf-jobs[/organization].",
)
TEARDOWN = setting(
    "--teardown",
    make="TEARDOWN",
    metavar="COMMAND",
    help="Ends what bills; run here once no job runs, whatever came of it.",
)
MAX_DOLLARS = setting(
    "--max-dollars",
    "limit",
    make="MAX_DOLLARS",
    metavar="DOLLARS",
    type=FiniteRange(0),
    help="Refuse what would cost more.",
)
SPOT = setting(
    "--spot", make="SPOT", is_flag=True, help="A rented machine that may be taken away; the job resumes on the next."
)
CHECKPOINTS = setting(
    "--checkpoints",
    make="CHECKPOINTS",
    metavar="OWNER/NAME",
    help="A private repo on the Hub for checkpoints; a rented machine has one always.",
)
# Option -> setting of the `make` on the other machine.
REMOTE_SETTINGS = {
    "docker": "DOCKER",
    "image": "IMAGE",
    "device": "DEVICE",
    "engine": "ENGINE",
    "mount": "MOUNT",
    "docker_build_flags": "DOCKER_BUILD_FLAGS",
    "docker_run_flags": "DOCKER_RUN_FLAGS",
}
REMOTE_OPTIONS = combine_decorators(
    setting(
        "--device", make="DEVICE", type=click.Choice(["cpu", "cuda"]), help="cpu: a machine without a GPU will do."
    ),
    setting("--image", make="IMAGE", metavar="NAME:TAG", help="The image to run in there."),
    setting("--docker", make="DOCKER", type=click.Choice(["0", "1"]), help="Natively or in the image, there."),
    setting("--engine", make="ENGINE", hidden=True),
    setting("--mount", make="MOUNT", hidden=True),
    setting("--docker-build-flags", make="DOCKER_BUILD_FLAGS", hidden=True),
    setting("--docker-run-flags", make="DOCKER_RUN_FLAGS", hidden=True),
)


def format_remote_settings(values: dict[str, str | None]) -> tuple[str, ...]:
    """Return NAME=VALUE of the typed options that are settings of the `make` on the other machine."""
    return tuple(f"{REMOTE_SETTINGS[name]}={value}" for name, value in values.items() if value is not None)


@click.command("cloud-to-local", cls=Command, choose_environment=choose_environment_for_rows)
@combine_decorators(RUN_OPTIONS, CLOUD, MAX_DOLLARS)
@setting("--hours", make="HOURS", type=FiniteRange(0, min_open=True), help="Time limit of a rented machine.")
@setting(
    "--gpu", make="GPU", metavar="NAME", help="Rent this GPU of configs/gpus.csv, or this machine of the provider's."
)
@combine_decorators(SPOT, CHECKPOINTS, TEARDOWN, YES, REMOTE_OPTIONS, MODELS, START)
@setting("--quantization", make="QUANT", metavar="NAME", help="Which GGUF comes home.")
@setting("--name", make="NAME", help="What Ollama calls it.")
def cloud_to_local(
    config_file,
    run_name,
    runs,
    overrides,
    cloud,
    limit,
    hours,
    gpu,
    spot,
    checkpoints,
    teardown,
    yes,
    models,
    start,
    quantization,
    name,
    **remote_values,
) -> None:
    """Train on another machine, then deploy here.

    The same command again watches, resumes or deploys.

    \b
    Examples:
      ferry cloud-to-local configs/tickets.yaml --cloud ssh://root@203.0.113.7
      ferry cloud-to-local configs/tickets.yaml --cloud hf-jobs --max-dollars 5
    """
    from common import console
    from launch.cloud_to_local import LaunchOptions, run_cloud_to_local
    from launch.providers import create

    if not cloud:
        raise missing_setting_error("CLOUD", "CLOUD=ssh://user@host, CLOUD=sky or CLOUD=hf-jobs")
    request = find_run(config_file, run_name, runs, overrides)
    provider = create.create_provider(cloud, request.folder, checkpoints, spot)
    launch_options = LaunchOptions(
        overrides, format_remote_settings(remote_values), teardown, limit, yes, checkpoints, gpu, hours, spot
    )
    with open_run(request, "cloud-to-local") as (run, _, lock):
        record = run_cloud_to_local(request.config_file, run, provider, cloud, launch_options, lock)
    console.print_result(
        f"cloud: {record['repo']}\n  trained on {record['where']} with the code of commit {record['commit'][:12]}"
    )
    options = ["--models", models, *(["--start"] if start else []), *(["--name", name] if name else [])]
    options += ["--quantization", quantization] if quantization else []
    code = subprocess.call([sys.executable, str(ROOT / "ferry"), "deploy-mac", record["repo"], *map(str, options)])
    console.print_result(record["billing"])
    raise SystemExit(code)


@click.command("cloud-stop", cls=Command)
@combine_decorators(RUN_OPTIONS, CLOUD, CHECKPOINTS, SPOT, TEARDOWN)
def cloud_stop(config_file, run_name, runs, overrides, cloud, checkpoints, spot, teardown) -> None:
    """End the job of a run, which writes its state first.

    Its folder on that machine stays.

    \b
    Example:
      ferry cloud-stop --run tickets --cloud ssh://root@203.0.113.7
    """
    from common import console
    from launch.cloud_to_local import stop_job
    from launch.providers import create
    from pipeline.run.run_folder import refuse_foreign_folder

    if not cloud:
        raise missing_setting_error(
            "CLOUD", "name the address that the job was started with: CLOUD=ssh://user@host, sky or hf-jobs"
        )
    folder = choose_run_folder(config_file, run_name, runs)
    refuse_foreign_folder(folder)
    provider = create.create_provider(cloud, folder, checkpoints, spot)
    report = stop_job(provider, folder, teardown)
    console.print_result(f"stop: {report}")


@click.command(cls=Command)
@combine_decorators(
    operand("repo", make="REPO", metavar="REPO"),
    RUNS,
    setting("--cloud", make="CLOUD", metavar="ADDRESS", help="ssh://user@host[:port][/folder]; default: this machine."),
    setting("--data", make="DATA", type=PATH, help="The local data it was trained on, a file or a folder."),
    MAX_DOLLARS,
    TEARDOWN,
    YES,
    REMOTE_OPTIONS,
)
def reproduce(repo, runs: Path, cloud, data, limit, teardown, yes, **remote_values) -> None:
    """Make REPO again from its manifest alone, and compare.

    Exit code 1 when it is not the same.

    \b
    Example:
      ferry reproduce you/tickets-GGUF@v1 --cloud ssh://root@203.0.113.7
    """
    from common import console, files
    from launch import verdict
    from launch.cloud_to_local import LaunchOptions
    from launch.providers import ssh_address
    from launch.providers.ssh import SshProvider
    from launch.reproduce import load_reproduction, run_reproduce

    reproduction = load_reproduction(repo, runs)
    provider = (
        SshProvider(ssh_address.parse_address(cloud))
        if cloud
        else SshProvider(None, str((runs / "reproduce" / "here").absolute()))
    )
    stop_command = (
        f"`make cloud-stop CLOUD={cloud} RUN={reproduction.name}`" if cloud else "the same command and then Ctrl-C"
    )
    rows = run_reproduce(
        reproduction,
        provider,
        stop_command,
        data,
        LaunchOptions((), format_remote_settings(remote_values), teardown, limit, yes),
    )
    files.write_json(reproduction.folder / "verdict.json", {"repo": repo, "rows": [vars(row) for row in rows]})
    console.print_result(verdict.format_verdict(rows, repo))
    raise SystemExit(0 if verdict.is_reproduced(rows) else 1)
