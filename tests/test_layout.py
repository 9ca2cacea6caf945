"""One test for each promise of the layout."""

import ast
from pathlib import Path

import pytest
import yaml

from cli.table import COMMANDS
from pipeline.run.run_folder import STAGES
from tests.conftest import ROOT

BELOW = {"contract", "common"}  # what both machines share; the one's errors and the other's screen know each other
SIDES = {
    "cli": {"cli", "launch", "pipeline", "deploy", *BELOW},
    "launch": {"launch", "pipeline", *BELOW},
    "pipeline": {"pipeline", *BELOW},
    "deploy": {"deploy", *BELOW},
    "contract": BELOW,
    "common": BELOW,
}
OURS = {*SIDES, "setup", "docs", "benchmarks", "tests"}


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert len(found) > 2, f"no modules found in {package}"
    return found


def imported(path: Path) -> set[str]:
    """Dotted names of everything a module imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", SIDES)
def test_no_import_arrow_points_the_wrong_way(package):
    for path in modules(package):
        ours = {name.split(".")[0] for name in imported(path)} & OURS
        assert ours <= SIDES[package], f"{path} imports {ours - SIDES[package]}"


def stage_files(stage: str) -> list[Path]:
    """One file, or a folder of the same name when it has outgrown that."""
    found = sorted((ROOT / "pipeline" / stage).glob("*.py")) or [ROOT / "pipeline" / f"{stage}.py"]
    assert all(path.is_file() for path in found) and (len(found) == 1 or found[0].with_name("stage.py") in found)
    return found


def test_stages_do_not_import_each_other():
    for stage in STAGES:
        for path in stage_files(stage):
            for name in imported(path):
                owner = next((other for other in STAGES if f"{name}.".startswith(f"pipeline.{other}.")), stage)
                assert owner == stage, f"{path} imports {name}"


def test_the_plan_knows_nothing_of_what_it_plans():
    """finetune asks it, never the other way round: it runs on a laptop."""
    for path in sorted((ROOT / "pipeline" / "plan").glob("*.py")):
        assert not any(f"{name}.".startswith("pipeline.finetune.") for name in imported(path)), path


@pytest.mark.parametrize("package", SIDES)
def test_package_imports_cost_nothing(package):
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_a_stage_is_a_file_a_command_a_record_and_a_make_target(chain):
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in COMMANDS if name in STAGES] == sorted(STAGES, key=list(COMMANDS).index)
    for stage in STAGES:
        assert stage_files(stage) and stage in COMMANDS and (chain.run / f"{stage}.json").is_file()
        assert f"\n{stage}: " in makefile and (chain.run / "logs" / f"{stage}.log").is_file()


def test_every_shipped_config_loads():
    from pipeline.config.load import load_config

    found = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(found) >= 3
    for path in found:
        tree = load_config(path)
        assert path.read_text().startswith(("# make train CONFIG=configs/" + path.name, "# make demo")), (
            "a config opens with its own command"
        )
        assert yaml.safe_load(path.read_text())["base"]["model"] == tree.base.model
