"""The `ferry` command and make, its face: what is mistyped is refused before anything is done, what is typed arrives."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cli.settings import list_make_settings, split_overrides
from cli.table import COMMANDS, load_all_commands
from common.errors import UserError
from tests.conftest import ROOT, make, typed

DEMO = "CONFIG=configs/demo.yaml"
# Words after `make`, and what the error must say: the name, and the closest one where there is one.
REFUSED = [
    # settings that nothing knows, with the closest name
    ("train conifg=configs/demo.yaml", "conifg is no setting, did you mean CONFIG?"),
    ("train config=configs/demo.yaml", "config is no setting, did you mean CONFIG?"),
    (f"train {DEMO} RUNN=x", "RUNN is no setting, did you mean RUN?"),
    (f"train {DEMO} SETT=a.b=1", "SETT is no setting, did you mean SET?"),
    (f"train {DEMO} CHECKPOINT=you/x", "CHECKPOINT is no setting, did you mean CHECKPOINTS?"),
    (f"demo MODEL=x {DEMO}", "MODEL is no setting of `make demo`"),
    (f"cloud-to-local {DEMO} MAX_DOLARS=5", "MAX_DOLARS is no setting, did you mean MAX_DOLLARS?"),
    (f"cloud-to-local {DEMO} MAXDOLLARS=5", "MAXDOLLARS is no setting, did you mean MAX_DOLLARS?"),
    (f"cloud-to-local {DEMO} max_dollars=5", "max_dollars is no setting, did you mean MAX_DOLLARS?"),
    (f"cloud-to-local {DEMO} HUORS=2", "HUORS is no setting, did you mean HOURS?"),
    (f"cloud-to-local {DEMO} TEARDWON=x", "TEARDWON is no setting, did you mean TEARDOWN?"),
    (f"cloud-to-local {DEMO} SPOTT=1", "SPOTT is no setting, did you mean SPOT?"),
    ("chat REOP=./hub/demo", "REOP is no setting, did you mean REPO?"),
    ("chat repo=./hub/demo", "repo is no setting, did you mean REPO?"),
    ("chat SYSTM=x", "SYSTM is no setting, did you mean SYSTEM?"),
    ("serve PROT=1", "PROT is no setting, did you mean PORT?"),
    ("pull REPO=./x QAUNT=q8_0", "QAUNT is no setting, did you mean QUANT?"),
    ("prune KEPE=1", "KEPE is no setting, did you mean KEEP?"),
    ("models MODLES=x", "MODLES is no setting, did you mean MODELS?"),
    ("init DATE=x", "DATE is no setting, did you mean DATA?"),
    ("env LIGHT=1", "LIGHT is no setting"),
    # settings of other targets
    (f"train {DEMO} MAX_DOLLARS=5", "MAX_DOLLARS is no setting of `make train`; it belongs to `make cloud-to-local`"),
    (f"train {DEMO} PORT=1", "PORT is no setting of `make train`; it belongs to `make serve`"),
    ("chat GPU=L4", "GPU is no setting of `make chat`; it belongs to `make plan`"),
    ("rollback KEEP=3", "KEEP is no setting of `make rollback`; it belongs to `make prune`"),
    (f"config {DEMO} RUN=x", "RUN is no setting of `make config`"),
    # money, time and numbers
    (f"cloud-to-local {DEMO} MAX_DOLLARS=five", "MAX_DOLLARS: 'five' is not a valid number"),
    (f"cloud-to-local {DEMO} MAX_DOLLARS=$5", "MAX_DOLLARS: '$5' is not a valid number"),
    (f"cloud-to-local {DEMO} MAX_DOLLARS=-1", "MAX_DOLLARS: -1.0 is not in the range x>=0"),
    (f"cloud-to-local {DEMO} MAX_DOLLARS=5,50", "MAX_DOLLARS: '5,50' is not a valid number"),
    (f"cloud-to-local {DEMO} MAX_DOLLARS=nan", "MAX_DOLLARS: nan is not a number"),
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
    (f"train {DEMO} RUN=a/b", "RUN='a/b' cannot name a folder"),
    (f"train {DEMO} RUN=../x", "RUN='../x' cannot name a folder"),
    (f"train {DEMO} RUN=a+b", "RUN='a+b' cannot name a folder"),
    (f"train {DEMO} RUN=-x", "RUN='-x' cannot name a folder"),
    ("train RUN=no-such-run", "there is no run runs/no-such-run"),
    ("chat MODELS=no-such-folder", "no-such-folder holds no model"),
    ("chat REPO=no-such-model", "holds no model no-such-model"),
    ("trace", "FILE is missing"),
    ("pull", "REPO is missing"),
    ("undeploy", "REPO is missing"),
    # overrides
    (f"config {DEMO} SET=finetune.rr=1", "unknown key, did you mean r?"),
    (f"config {DEMO} SET=finetun.r=1", "SET: finetun.r= names the section finetun, which the config does not have, did you mean finetune?"),
    (f"config {DEMO} SET=finetune.r", "cannot read the override"),
    (f"config {DEMO} SET=r=8", "cannot read the override"),
    # targets
    ("trian", "`make trian` is no command, did you mean `make train`?"),
    ("docs", "`make docs` is no command"),
    (f"data bogus {DEMO}", "`make bogus` is no command"),
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
    with pytest.raises(UserError, match=r"tune\.r= names the section tune"):
        split_overrides("data.system=x tune.r=8")


def test_a_command_line_says_the_same_as_make():
    by_make = make("config", DEMO, "SET=finetune.seed=7")
    by_ferry = subprocess.run(
        [ROOT / "ferry", "config", "configs/demo.yaml", "--set", "finetune.seed=7"], cwd=ROOT, env=typed(), capture_output=True, text=True
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
    environment = {name: value for name, value in typed().items() if not name.startswith("FERRY_")}
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
    environment = typed() | {"REPO": "./hub/x", "SET": "finetune.seed=7"}
    words = ["make", "--no-print-directory", f"PYTHON={sys.executable}", f"VENV={sys.prefix}", "config", DEMO]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "seed: 7" in done.stdout, done.stderr
