"""One test for each promise of the layout."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, make

SIDES = {
    "pipeline": {"pipeline", "contract"},
    "deploy": {"deploy", "contract"},
    "launch": {"launch", "pipeline", "contract"},
    "contract": {"contract"},
}
HEAVY = {
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
    "trl",
    "peft",
    "gguf",
    "tokenizers",
}
STAGES = ("data", "finetune", "evaluate", "export", "verify", "publish")


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert len(found) > 3, f"no modules found in {package}"
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
        ours = {name.split(".")[0] for name in imported(path)} & SIDES.keys()
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


@pytest.mark.parametrize("package", ["pipeline", "deploy", "launch"])
def test_help_loads_no_heavy_module(package):
    code = f"import sys; sys.argv = ['x', '--help']\ntry: import {package}.__main__\nexcept SystemExit: pass\nprint(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert not HEAVY & set(done.stderr.split())


@pytest.mark.parametrize("package", ["pipeline", "deploy", "launch"])
def test_every_command_has_help(package):
    listing = subprocess.run(
        [sys.executable, "-m", package, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    commands = re.findall(r"^  ([a-z]+)  +(\S.*)$", listing.split("Commands:")[1], re.MULTILINE)
    assert len(commands) >= 4
    assert all(text for _, text in commands)


def test_stage_is_file_command_record_and_make_target():
    makefile = (ROOT / "Makefile").read_text()
    listing = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    for stage in STAGES:
        assert stage_files(stage)
        assert re.search(rf"^  {stage} ", listing, re.MULTILINE)
        assert re.search(rf"^{stage}:", makefile, re.MULTILINE) and f"$(R)/{stage}.json: |" in makefile


def test_records_are_order_only_prerequisites():
    rules = re.findall(r"^\$\(R\)/[a-z]+\.json:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(rules) == len(STAGES)
    assert all(rule.strip().startswith("|") for rule in rules), "an mtime must never repeat hours of work"


def test_make_alone_is_the_manual():
    manual = make().stdout
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 15
    assert all(f"make {target}" in manual for target in targets)


def test_readme_names_only_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in [(ROOT / "README.md").read_text(), *(path.read_text() for path in (ROOT / "configs").glob("*.yaml"))]:
        assert set(re.findall(r"(?:^|`|# )make ([a-z][a-z-]+)", text, re.MULTILINE)) <= targets


def test_every_shipped_config_loads():
    from pipeline.config import load

    found = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(found) >= 3
    for path in found:
        tree = load(path)
        assert path.read_text().startswith(("# make train CONFIG=configs/" + path.name, "# make demo")), (
            "a config opens with its own command"
        )
        assert yaml.safe_load(path.read_text())["base"]["model"] == tree.base.model


def test_numbers_in_the_readme_come_from_a_benchmark():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert {"device", "versions", "command", "date", "rows"} <= results.keys()
    rows = {row["case"]: row for row in results["rows"]}
    assert all(row["system"] in ("ferry", "base model") for row in rows.values())
    readme = " ".join((ROOT / "README.md").read_text().split())
    fresh = rows["fresh, seed 3407: make demo, all"]
    right = {case: round(100 * row["score"]) for case, row in rows.items() if case.endswith("held-out rows, q4_k_m")}
    assert len(right) == 3, "three seeds"
    assert f"to {right['fresh, seed 3407: held-out rows, q4_k_m']} right answers of 100" in readme
    assert f"in {fresh['wall_s'] / 60:.0f} minutes" in readme
    for case, score in right.items():
        seed = case.split("seed ")[1].split(":")[0]
        assert f"| {seed} | 0 | {score} |" in readme
        assert rows[case.replace("q4_k_m", "base")]["score"] == 0
        total = rows[f"{case.split(':')[0]}: make demo, all"]
        assert f"{total['wall_s']:.0f} s, {total['peak_memory_gb']} GB" in readme


def test_the_ladder_in_the_readme_is_the_demos():
    from pipeline import ladder

    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    prefix = "fresh, seed 3407: held-out rows, "
    rungs = {row["case"].removeprefix(prefix): row for row in results["rows"] if row["case"].startswith(prefix)}
    assert list(rungs) == ["base", "adapter", "merged", "f16", "q4_k_m", "q4_k_m-static"]
    assert ladder.table(rungs) in (ROOT / "README.md").read_text()


def results_of(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]


def test_the_speeds_in_the_readme_are_the_benchmarks():
    text, rows = (ROOT / "README.md").read_text(), results_of("gpu")
    training = text[text.index("## The training") : text.index("## On the GPU box")]
    assert {row["system"] for row in rows} == {"hf-peft", "unsloth-tutorial", "ferry"} and len(rows) >= 10
    assert all(f"{row['real_tokens_per_second']:,}" in training for row in rows)
    free = next(
        row for row in rows if (row["system"], row["case"], row["rows_per_step"]) == ("ferry", "alpaca", "free")
    )
    assert free["real_tokens_per_second"] > 12000
    assert all(f"in {row['of_tutorial']} times" in training for row in results_of("gpu_learning")[1:])
    assert f"within {100 * max(abs(row['error']) for row in results_of('gpu_memory')) + 0.05:.1f} %" in training
    stops = [row for row in results_of("gpu_survive") if row["case"].startswith("SIG")]
    assert len(stops) == 10 and {row["of_undisturbed"] for row in stops} == {1.0}
    assert f"at most {max(row['seconds_to_the_end'] for row in stops)} s" in training


def test_checkpoints_that_leave_cost_the_training_less_than_a_hundredth():
    rows = results_of("gpu_offsite")
    ours = next(row for row in rows if row["of_kept"])
    assert [row["of_undisturbed"] for row in rows if row["of_undisturbed"]] == [1.0], "digit for digit"
    assert ours["sent"] >= 4 and ours["of_kept"] < 1.01
    assert ours["seconds_a_step_beside_a_sender"] < 1.01 * ours["seconds_a_step_quiet"]
    said = re.sub(r"\s+", " ", (ROOT / "README.md").read_text())
    beside, quiet = (f"{ours[f'seconds_a_step_{name}']:.3f} s" for name in ("beside_a_sender", "quiet"))
    assert (
        f"took {ours['of_kept']:.3f} times the time" in said
        and f"a step beside a sender {beside}, without one {quiet}" in said
    )


def test_export_is_at_most_1_3_times_the_bare_tools():
    results = json.loads((ROOT / "benchmarks" / "results" / "export.json").read_text())
    rows = {(row["system"], row["case"]): row for row in results["rows"]}
    readme, memory = " ".join((ROOT / "README.md").read_text().split()), []
    for size in ("135M", "1.1B"):
        whole, ours = (
            rows["ferry", f"{size}: merge, gate, f16, q4_k_m, sha256"],
            rows["ferry", f"{size}: f16, q4_k_m, sha256"],
        )
        bare, merge = rows["llama.cpp", f"{size}: f16, q4_k_m"], rows["PEFT", f"{size}: merge"]
        ratios = ours["wall_s"] / bare["wall_s"], whole["wall_s"] / (bare["wall_s"] + merge["wall_s"])
        assert max(ratios) <= 1.3
        assert f"at {size} {ratios[0]:.2f} and {ratios[1]:.2f} times" in readme
        memory += [whole["peak_memory_gb"], merge["peak_memory_gb"]]
    assert (
        f"{memory[0]:.1f} GB at 135M and {memory[2]:.1f} GB at 1.1B (PEFT: {memory[1]:.1f} and {memory[3]:.1f})"
        in readme
    )
    assert memory[2] / memory[0] < memory[3] / memory[1], "it grows less than a merge that holds the model"


def test_the_data_numbers_in_the_readme_come_from_a_benchmark():
    results = json.loads((ROOT / "benchmarks" / "results" / "data.json").read_text())
    wall = {(row["system"], row["case"]): row["wall_s"] for row in results["rows"]}
    readme, plain = " ".join((ROOT / "README.md").read_text().split()), "52,000 rows, plain"
    ours = wall["ferry", plain]
    slower = {name: wall[name, plain] / ours for name in ("LLaMA-Factory", "Axolotl")}
    assert all(ratio > 1 for ratio in slower.values()), "faster than both, with the same steps"
    assert f"{slower['LLaMA-Factory']:.2f} times and Axolotl's {slower['Axolotl']:.2f} times as long" in readme
    all_steps = wall["ferry", "52,000 rows, all steps"] / ours
    assert all_steps <= 2 and f"it takes {all_steps:.2f} times its own plain run" in readme
    largest = max(
        (row for row in results["rows"] if row["case"].startswith("all steps,")), key=lambda row: row["rows_kept"]
    )
    assert f"{largest['case'].split()[2]} rows need {largest['peak_memory_gb']} GB" in readme


def test_the_hub_costs_little_more_than_the_bare_client():
    results = json.loads((ROOT / "benchmarks" / "results" / "hub.json").read_text())
    rows = {(row["system"], row["case"]): row for row in results["rows"]}
    readme = " ".join((ROOT / "README.md").read_text().split())
    for ours, bare, limits in (
        ("publish, and put's sha256", "upload_folder", (1.15, 1.3)),
        ("pull", "hf_hub_download", (1.15, 1.3)),
    ):
        mine, theirs = rows["ferry", f"2 GB: {ours}"], rows["huggingface_hub", f"2 GB: {bare}"]
        ratios = [mine[metric] / theirs[metric] for metric in ("wall_s", "cpu_s")]
        assert all(ratio <= limit for ratio, limit in zip(ratios, limits, strict=True))
        assert f"{ratios[0]:.2f}" in readme and f"{ratios[1]:.2f} times" in readme
        assert mine["peak_memory_gb"] <= rows["ferry", f"0.5 GB: {ours}"]["peak_memory_gb"] + 0.05, "memory is flat"


def test_the_image_in_the_readme_is_the_measured_one():
    results = json.loads((ROOT / "benchmarks" / "results" / "image.json").read_text())
    rows = {(row["system"], row["case"]): row for row in results["rows"]}
    readme = " ".join((ROOT / "README.md").read_text().split())
    cold, again, changed = (
        rows["ferry", f"CPU image: {case}"]["wall_s"]
        for case in (
            "cold build, wheels and llama.cpp there", "build again, nothing changed", "build again, a line of a stage changed",
        )
    )  # fmt: skip
    assert (
        f"takes {cold:.0f} s to build from nothing, {again:.0f} s again when nothing has changed and {changed:.0f} s after"
        in readme
    )
    assert changed < cold / 4, "a change of code installs nothing anew"
    for image, said in (
        ("CPU", "Its layers are {:,} MB, the largest {:,};"),
        ("CUDA", "Its layers are {:,} MB, the largest (CUDA and triton) {:,}."),
    ):
        sizes = [row["MB"] for (_, case), row in rows.items() if case.startswith(f"{image} image: ") and row["MB"]]
        largest, total = sorted(sizes)[-2:]
        assert said.format(total, largest) in readme
    inside, native = rows["ferry", "start: make config, in the image"], rows["native", "start: make config"]
    assert f"after {inside['wall_s']:.1f} s in it and {native['wall_s']:.1f} s natively" in readme


def test_settings_of_the_deploy_side_are_those_typed_and_not_the_shells():
    """HOST and NAME are variables of many shells and systems."""
    names = {"NAME": "a", "HOST": "b", "PORT": "1", "KEEP": "3", "START": "1"}
    targets = ["ollama", "serve", "prune", "rollback"]

    def commands(*typed: str, **environment: str) -> str:
        ask = ["make", "-n", *typed, *targets]
        return subprocess.run(
            ask, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
        ).stdout

    options = ("--name 'a'", "--host 'b'", "--port '1'", "--keep '3'", "--start")
    assert not [option for option in options if option in commands(**names)]
    assert not [o for o in options if o not in commands(*(f"{name}={value}" for name, value in names.items()))]
