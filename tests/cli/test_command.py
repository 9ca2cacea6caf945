"""The `ferry` command and make, its face: what is mistyped is refused before anything is done, what is typed arrives."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from cli import main as cli
from cli.settings import list_make_settings, split_overrides
from cli.table import COMMANDS, load_all_commands
from common.errors import UserError
from pipeline.config.load import load_config
from pipeline.run import run_folder
from tests.helpers.commands import ROOT, ferry, make, refuses, typed_environment

DEMO = "CONFIG=configs/demo.yaml"
# Words after `make`, and what the error must say: the name, and the closest one where there is one.
REFUSED = [
    # settings that nothing knows, with the closest name
    ("train conifg=configs/demo.yaml", "unknown setting conifg, did you mean CONFIG?"),
    ("train config=configs/demo.yaml", "unknown setting config, did you mean CONFIG?"),
    (f"train {DEMO} RUNN=x", "unknown setting RUNN, did you mean RUN?"),
    (f"train {DEMO} SETT=a.b=1", "unknown setting SETT, did you mean SET?"),
    (f"train {DEMO} CHECKPOINT=you/x", "unknown setting CHECKPOINT, did you mean CHECKPOINTS?"),
    (f"demo MODEL=x {DEMO}", "`make demo` does not take MODEL, "),
    (f"cloud-to-local {DEMO} MAX_DOLARS=5", "unknown setting MAX_DOLARS, did you mean MAX_DOLLARS?"),
    (f"cloud-to-local {DEMO} MAXDOLLARS=5", "unknown setting MAXDOLLARS, did you mean MAX_DOLLARS?"),
    (f"cloud-to-local {DEMO} max_dollars=5", "unknown setting max_dollars, did you mean MAX_DOLLARS?"),
    (f"cloud-to-local {DEMO} HUORS=2", "unknown setting HUORS, did you mean HOURS?"),
    (f"cloud-to-local {DEMO} TEARDWON=x", "unknown setting TEARDWON, did you mean TEARDOWN?"),
    (f"cloud-to-local {DEMO} SPOTT=1", "unknown setting SPOTT, did you mean SPOT?"),
    ("chat REOP=./hub/demo", "unknown setting REOP, did you mean REPO?"),
    ("chat repo=./hub/demo", "unknown setting repo, did you mean REPO?"),
    ("chat SYSTM=x", "unknown setting SYSTM, did you mean SYSTEM?"),
    ("serve PROT=1", "unknown setting PROT, did you mean PORT?"),
    ("pull REPO=./x QAUNT=q8_0", "unknown setting QAUNT, did you mean QUANT?"),
    ("prune KEPE=1", "unknown setting KEPE, did you mean KEEP?"),
    ("models MODLES=x", "unknown setting MODLES, did you mean MODELS?"),
    ("init DATE=x", "unknown setting DATE, did you mean DATA?"),
    ("env LIGHT=1", "unknown setting LIGHT"),
    # settings of other targets
    (f"train {DEMO} MAX_DOLLARS=5", "`make train` does not take MAX_DOLLARS, which is a setting of `make cloud-to-local`"),
    (f"train {DEMO} PORT=1", "`make train` does not take PORT, which is a setting of `make serve`"),
    ("chat GPU=L4", "`make chat` does not take GPU, which is a setting of `make plan`"),
    ("rollback KEEP=3", "`make rollback` does not take KEEP, which is a setting of `make prune`"),
    (f"config {DEMO} RUN=x", "`make config` does not take RUN, "),
    # money, time and numbers
    (f"cloud-to-local {DEMO} MAX_DOLLARS=five", "MAX_DOLLARS: 'five' is not a valid number"),
    (f"cloud-to-local {DEMO} MAX_DOLLARS=$5", "MAX_DOLLARS: '$5' is not a valid number"),
    (f"cloud-to-local {DEMO} MAX_DOLLARS=-1", "MAX_DOLLARS: -1.0 is not in the range x>=0"),
    (f"cloud-to-local {DEMO} MAX_DOLLARS=5,50", "MAX_DOLLARS: '5,50' is not a valid number"),
    (f"cloud-to-local {DEMO} MAX_DOLLARS=nan", "MAX_DOLLARS: nan is not a finite number"),
    (f"cloud-to-local {DEMO} HOURS=0", "HOURS: 0.0 is not in the range x>0"),
    (f"cloud-to-local {DEMO} HOURS=2h", "HOURS: '2h' is not a valid number"),
    (f"cloud-to-local {DEMO} HOURS=-3", "HOURS: -3.0 is not in the range x>0"),
    (f"cloud-to-local {DEMO} SPOT=maybe", "SPOT=maybe is neither yes nor no"),
    (f"cloud-to-local {DEMO} YES=please", "YES=please is neither yes nor no"),
    ("reproduce REPO=you/m MAX_DOLLARS=abc", "MAX_DOLLARS: 'abc' is not a valid number"),
    ("serve PORT=eighty", "PORT: 'eighty' is not a valid whole number"),
    ("serve PORT=99999", "PORT: 99999 is not in the range 1<=x<=65535"),
    ("prune KEEP=0", "KEEP: 0 is not in the range x>=1"),
    (f"preview {DEMO} ROWS=many", "ROWS: 'many' is not a valid whole number"),
    (f"train {DEMO} DOCKER=2", "DOCKER: '2' is not one of '0', '1'"),
    (f"train {DEMO} DEVICE=tpu", "DEVICE: 'tpu' is not one of 'cpu', 'cuda'"),
    ("doctor SIDE=left", "SIDE: 'left' is not one of 'cloud', 'mac'"),
    ("init DATA=x GOAL=poem", "GOAL: 'poem' is not one of"),
    (f"plan {DEMO} PROBE=perhaps", "PROBE=perhaps is neither yes nor no"),
    # names and files
    ("train", "CONFIG is missing"),
    ("train CONFIG=configs/none.yaml", "cannot read the config configs/none.yaml"),
    (f"train {DEMO} RUN=a/b", "RUN='a/b' is not a valid name"),
    (f"train {DEMO} RUN=../x", "RUN='../x' is not a valid name"),
    (f"train {DEMO} RUN=a+b", "RUN='a+b' is not a valid name"),
    (f"train {DEMO} RUN=-x", "RUN='-x' is not a valid name"),
    ("train RUN=no-such-run", "there is no run runs/no-such-run"),
    ("chat MODELS=no-such-folder", "there is no model in no-such-folder"),
    ("chat REPO=no-such-model", "there is no model no-such-model in"),
    ("init", "DATA is missing"),
    ("resume", "CHECKPOINTS is missing"),
    ("trace", "FILE is missing"),
    ("pull", "REPO is missing"),
    ("undeploy", "REPO is missing"),
    ("deploy-mac", "REPO is missing"),
    (f"cloud-to-local {DEMO}", "CLOUD is missing"),
    (f"cloud-stop {DEMO}", "CLOUD is missing"),
    ("train RUN=", "RUN= is empty"),
    # overrides
    (f"config {DEMO} SET=finetune.rr=1", "unknown key, did you mean r?"),
    (f"config {DEMO} SET=finetun.r=1", "SET: unknown section finetun in finetun.r=, did you mean finetune?"),
    (f"config {DEMO} SET=finetune.r", "cannot read the override 'finetune.r'"),
    (f"config {DEMO} SET=r=8", "cannot read the override 'r=8'"),
    # targets
    ("trian", "unknown command `make trian`, did you mean `make train`?"),
    ("docs", "unknown command `make docs`"),
    (f"data bogus {DEMO}", "unknown command `make bogus`"),
]  # fmt: skip


def test_the_list_is_long_enough():
    assert len(REFUSED) >= 60


@pytest.mark.parametrize(("line", "expected"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_cannot_be_meant_is_refused_before_anything_is_done(line, expected, tmp_path, monkeypatch):
    before = {path.name for path in ROOT.iterdir()}
    done = make(*line.split())
    assert done.returncode == 2, done.stdout
    assert "error: " in done.stderr and expected in done.stderr and "\n next: " in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert not done.stdout and {path.name for path in ROOT.iterdir()} == before


# Words after `ferry`, the code of the error, and the value in it.
CODES = [
    ("trian", "command.unknown", "ferry trian"),
    ("models --modles=x", "command.unknown_setting", "--modles"),
    ("models extra", "command.bad_usage", "extra"),
    ("init", "command.missing_setting", "--data"),
    ("prune --keep=0", "command.bad_value", "0"),
    ("make models models MODLES=x", "command.unknown_setting", "MODLES"),
    ("make models models PORT=1", "command.setting_of_other_command", "PORT"),
    ("make models models MODELS=", "command.empty_setting", "MODELS"),
    ("make prune prune START=maybe", "command.bad_switch", "START=maybe"),
    ("make prune prune KEEP=0", "command.bad_value", "KEEP"),
    ("make init init", "command.missing_setting", "DATA"),
    ("make trian trian", "command.unknown", "make trian"),
    ("trace", "command.missing_setting", "FILE"),
    ("pull", "command.missing_setting", "REPO"),
    ("undeploy", "command.missing_setting", "REPO"),
    ("deploy-mac", "command.missing_setting", "REPO"),
    ("cloud-to-local configs/demo.yaml", "command.missing_setting", "CLOUD"),
    ("cloud-stop configs/demo.yaml", "command.missing_setting", "CLOUD"),
    ("train", "command.missing_setting", "CONFIG"),
    ("train --run=no-such-run", "run.not_found", "no-such-run"),
    ("train --run=a+b configs/demo.yaml", "run.bad_name", "'a+b'"),
]


@pytest.mark.parametrize(("line", "code", "value"), CODES, ids=[line for line, _, _ in CODES])
def test_a_mistyped_command_has_a_code(line, code, value, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ferry", *line.split()])  # make's words are replaced there
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises((UserError, click.ClickException)) as caught:
        cli.ferry.main(line.split(), prog_name="ferry", standalone_mode=False)
    error = cli.translate_error(caught.value)
    assert error.code == code and value in error.message and error.hint, error


@pytest.mark.parametrize(
    ("line", "names", "code", "value"),
    [
        ("status", [], "run.none", "{runs}"),
        ("status", ["a", "b"], "run.ambiguous", "a, b"),
        ("clean --all --yes", ["a"], "run.not_named", "a"),
        ("clean --all --run=a", ["a"], "run.removal_not_confirmed", "{runs}/a"),
        ("config configs/demo.yaml --set=data.source=none.jsonl", [], "config.missing_file", "data.source: none.jsonl"),
    ],
)
def test_a_run_or_a_file_that_is_not_clear_is_asked_for(line, names, code, value, tmp_path):
    for name in names:
        run_folder.Run(tmp_path / name).freeze_config(load_config(ROOT / "configs" / "demo.yaml"))
    words = [*line.split(), *([] if line.startswith("config") else [f"--runs={tmp_path}"])]
    with refuses(code) as error:
        cli.ferry.main(words, prog_name="ferry", standalone_mode=False)
    assert value.format(runs=tmp_path) in error.value.message
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == names


@pytest.mark.parametrize(
    ("command", "code", "value"),
    [
        ("status --run=no-such-run --json", "run.", "no-such-run"),
        ("trace --json", "command.missing_setting", "FILE"),
        ("models --json --modles=x", "command.unknown_setting", "--modles"),
        ("plan configs/demo.yaml --set=finetune.rr=1 --json", "config.unknown_key", "finetune.rr"),
        ("make trace trace JSON=1", "command.missing_setting", "FILE"),
        ("make models models JSON=Yes MODLES=x", "command.unknown_setting", "MODLES"),
    ],
)
def test_with_json_an_error_is_json_on_stdout_too(command, code, value):
    done = ferry(*command.split())
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 2 and set(error) == {"code", "message", "next"}
    assert error["code"].startswith(code) and value in error["message"]
    assert done.stderr == f"error: {error['message']}\n next: {error['next']}\n"


@pytest.mark.parametrize("command", ["trace", "trace -- --json", "make trace trace JSON=0"])
def test_without_json_an_error_is_on_stderr_alone(command):
    done = ferry(*command.split())
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout


# What a user may write into a value: it arrives as it was typed.
VALUES = [
    "You triage tickets", "it's", 'say "yes"', "it's \"both\"", "$HOME", "$(HOME)", "$$", "${PATH}", "`id`", "a;b", "a & b", "a|b", "#1", "50%",
    "back\\slash", "{user}", "Ünïcödé 日本語 🚢", "(x)", "*", "~", "!", "a=b", "trailing=", "two  spaces", "<tag>", "tab\there", "--set x", "-n",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_value_arrives_as_it_was_typed(value):
    quoted = json.dumps(value, ensure_ascii=False)  # a YAML string
    done = make("config", DEMO, f"SET=finetune.seed=7 data.system={quoted} finetune.r=8")
    assert done.returncode == 0, done.stderr
    tree = yaml.safe_load(done.stdout)
    assert tree["data"]["system"] == value and (tree["finetune"]["seed"], tree["finetune"]["r"]) == (7, 8)


@pytest.mark.parametrize("value", ["You triage tickets", "Answer in one word.", "it's a test", "a=b c=d"])
def test_a_value_without_quotes_may_hold_spaces(value):
    done = make("config", DEMO, f"SET=data.system={value} finetune.seed=7")
    assert done.returncode == 0, done.stderr
    tree = yaml.safe_load(done.stdout)
    assert tree["data"]["system"] == value and tree["finetune"]["seed"] == 7


def test_overrides_are_told_apart_where_a_section_begins():
    assert split_overrides("finetune.r=8  data.system=You triage\nevaluate.rule=exact") == [
        "finetune.r=8", "data.system=You triage", "evaluate.rule=exact",
    ]  # fmt: skip
    assert split_overrides("data.system='set finetune.r=8 here' finetune.r=4") == [
        "data.system='set finetune.r=8 here'", "finetune.r=4",
    ]  # fmt: skip
    assert split_overrides("") == [] and split_overrides("  ") == []
    with refuses("config.unknown_section") as error:
        split_overrides("data.system=x tune.r=8")
    assert "tune.r=" in error.value.message


def test_a_command_line_says_the_same_as_make():
    by_make = make("config", DEMO, "SET=finetune.seed=7")
    by_ferry = subprocess.run(
        [ROOT / "ferry", "config", "configs/demo.yaml", "--set", "finetune.seed=7"], cwd=ROOT, env=typed_environment(), capture_output=True, text=True
    )  # fmt: skip
    assert by_make.stdout == by_ferry.stdout and "seed: 7" in by_ferry.stdout


def test_every_command_is_a_target_with_help_and_an_example():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+): +; \$\(FORWARD\) ## \S", makefile, re.MULTILINE)
    assert len(targets) > 40 and sorted(targets) == sorted(COMMANDS), "a target is a command, and the other way round"
    for name, command in load_all_commands().items():
        text = command.get_help(command.make_context(name, [], resilient_parsing=True))
        assert re.search(r"Examples?:\n +(\S+ \| )?(ferry|make|echo) ", text), f"{name} has no example"
        assert len(command.get_short_help_str(200)) <= 100, name


def test_make_alone_is_the_manual():
    manual = make().stdout
    assert all(f"make {name} " in manual for name in COMMANDS)


def test_settings_have_one_meaning():
    """A name of make is one option, whichever the command."""
    options: dict[str, set[str]] = {}
    for command in load_all_commands().values():
        for name, parameter in list_make_settings(command).items():
            options.setdefault(name, set()).add(parameter.opts[0].lstrip("-"))
    several = {name: found for name, found in options.items() if len(found) > 1}
    assert set(several) <= {"CONFIG", "REPO", "DATA", "CHECKPOINTS", "MODEL", "INPUT", "FILE", "NAME"}, several


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_commands_and_options(shell):
    done = subprocess.run([sys.executable, "-m", "cli", "completion", shell], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "_FERRY_COMPLETE" in done.stdout
    environment = os.environ | {"_FERRY_COMPLETE": "bash_complete", "COMP_WORDS": "ferry tra", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "cli"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "plain,train" in done.stdout


def test_help_needs_no_package_but_click():
    code = "import sys; sys.argv = ['ferry', '--help']\nfrom cli.main import main\ntry: main()\nexcept SystemExit: pass\nprint(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "transformers",
        "unsloth",
        "datasets",
        "llama_cpp",
        "huggingface_hub",
        "numpy",
        "pydantic",
        "yaml",
        "jinja2",
    }
    assert "Train on another machine" in done.stdout and not heavy & set(done.stderr.split())


def test_a_bare_checkout_answers(tmp_path):
    """No environment is set up: config, doctor and help run with click, pydantic and PyYAML alone."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("cli", "common", "configs", "contract", "deploy", "launch", "pipeline", "setup", "ferry"):
        subprocess.run(["cp", "-r", ROOT / name, checkout], check=True)
    environment = {name: value for name, value in typed_environment().items() if not name.startswith("FERRY_")}
    environment["FERRY_CACHE"] = str(tmp_path / "cache")

    def ask(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, checkout / "ferry", *words]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)

    first = ask("config", "configs/demo.yaml")
    assert first.returncode == 0 and "setting up the command line, once for this machine" in first.stderr, first.stderr
    assert yaml.safe_load(first.stdout)["base"]["model"].startswith("pypi:")
    assert ask("--help").stderr == "" and ask("runs").returncode == 0
    for side in ("cloud", "mac"):
        done = ask("doctor", "--side", side)
        assert done.returncode == 0 and "is not set up yet" in done.stdout, done.stdout + done.stderr
    assert (
        not (checkout / ".venv").exists()
        and sum(p.stat().st_size for p in Path(tmp_path / "cache").rglob("*") if p.is_file()) < 60e6
    )


def test_what_the_shell_has_is_left_alone_by_a_target_that_does_not_take_it():
    """An exported REPO or RUN is a setting where the target knows it, and nothing elsewhere."""
    environment = typed_environment() | {"REPO": "./hub/x", "SET": "finetune.seed=7"}
    words = ["make", "--no-print-directory", f"PYTHON={sys.executable}", f"VENV={sys.prefix}", "config", DEMO]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "seed: 7" in done.stdout, done.stderr
