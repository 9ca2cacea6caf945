"""One test for each promise of the layout."""

import ast
import graphlib
from pathlib import Path

import pytest
import yaml

from cli.table import COMMANDS
from pipeline.run.run_folder import STAGES
from tests.helpers.commands import ROOT

# Rooms from the lowest floor to the highest: a folder, or a module that stands by itself between folders. A room imports
# from lower floors only, never from its own.
FLOORS = (
    ("common",),
    ("contract",),
    ("pipeline.config",),
    ("pipeline.run", "pipeline.toolchain"),
    ("pipeline.base_model", "pipeline.checkpoint_sync", "pipeline.scoring"),
    ("pipeline.plan",),
    tuple(f"pipeline.{stage}" for stage in STAGES),
    ("pipeline.preflight", "pipeline.__main__"),
    ("launch",),
    ("launch.providers",),
    ("deploy.machine", "deploy.store"),
    ("deploy.stages",),
    ("deploy.apps", "deploy.serving"),
    ("deploy.doctor", "deploy.summary", "deploy.trace", "deploy.versions"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PACKAGES = ("cli", "common", "contract", "deploy", "launch", "pipeline")
OURS = {*PACKAGES, "setup", "docs", "benchmarks", "tests"}


def list_modules(package: str) -> list[Path]:
    paths = [path for path in sorted((ROOT / package).rglob("*.py")) if path.name != "__init__.py"]
    assert len(paths) > 2, f"no modules found in {package}"
    return paths


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def list_imports(path: Path) -> set[str]:
    """Return the dotted names of everything that a module imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def find_room(name: str) -> str:
    """Return the room of a dotted name: the longest one that it begins with."""
    return max((room for room in FLOOR if f"{name}.".startswith(f"{room}.")), key=len, default="")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_stands_in_a_room(package):
    for path in list_modules(package):
        assert find_room(module_name(path)), f"{path} is in no room of FLOORS"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_lead_to_lower_floors_only(package):
    """So there is no circle between folders, no stage that imports another one, and no way up."""
    for path in list_modules(package):
        room = find_room(module_name(path))
        for name in list_imports(path):
            target = find_room(name)
            if target and target != room:
                assert FLOOR[target] < FLOOR[room], f"{path} ({room}) imports {name} ({target})"


def test_the_machine_that_trains_and_the_one_that_runs_models_share_the_contract_only():
    for package, never in {"deploy": {"pipeline", "launch"}, "pipeline": {"deploy"}, "launch": {"deploy"}}.items():
        for path in list_modules(package):
            assert not {name.split(".")[0] for name in list_imports(path)} & never, path


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_that_ferry_runs_imports_its_tests_or_its_set_up(package):
    for path in list_modules(package):
        assert not {name.split(".")[0] for name in list_imports(path)} & (OURS - {*PACKAGES}), path


def test_no_module_imports_itself_by_a_circle():
    """Also not within a room, where the floors say nothing."""
    names = {module_name(path): path for package in PACKAGES for path in list_modules(package)}
    graph = {}
    for name, path in names.items():
        found = list_imports(path)
        graph[name] = {target for target in names if target in found or any(n.startswith(f"{target}.") for n in found)}
    order = graphlib.TopologicalSorter(graph)
    order.prepare()  # raises CycleError with the circle


def test_the_folder_of_the_pipeline_is_read_at_a_glance():
    names = [path.name for path in (ROOT / "pipeline").iterdir() if path.name != "__pycache__"]
    assert len(names) <= 16


def test_the_folders_of_the_tests_are_those_of_the_code():
    """Beside them: whole chains, what tests share, fuzzers, and files of earlier versions."""
    shared = {"fuzzing", "helpers", "samples", "scenarios"}
    for path in list_modules("tests"):
        folder = path.parent.relative_to(ROOT / "tests")
        assert folder.parts[:1] == () or folder.parts[0] in shared or (ROOT / folder).is_dir(), path


def test_tests_share_helpers_and_not_each_other():
    for path in list_modules("tests"):
        for name in list_imports(path):
            parts = name.split(".")
            assert parts[0] != "tests" or parts[1] in ("helpers", "fuzzing"), f"{path} imports {name}"
        is_test = path.name.startswith("test_") or path.name == "conftest.py"
        has_tests = "\ndef test_" in path.read_text(encoding="utf-8")
        assert is_test or not has_tests, f"{path} holds tests that pytest does not collect"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_cost_nothing(package):
    for path in (ROOT / package).rglob("__init__.py"):
        assert path.read_text() == "", path


def test_a_stage_is_a_folder_a_command_a_record_and_a_make_target(chain):
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in COMMANDS if name in STAGES] == sorted(STAGES, key=list(COMMANDS).index)
    for stage in STAGES:
        assert (
            (ROOT / "pipeline" / stage / "stage.py").is_file()
            and stage in COMMANDS
            and (chain.run / f"{stage}.json").is_file()
        )
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
