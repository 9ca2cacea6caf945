"""Measures the Mac side: speed beside llama-bench, the way to the first word, and the light environment beside the full one.

    .venv/bin/python benchmarks/deploy.py [--repeat 3] [REPO]

REPO: a folder hub, default ./hub/demo, as `make demo` leaves it. "tokens/s": the smoke test's figures (llama-cpp-python)
and those of llama-bench, compiled here against the very libraries of the cached llama.cpp, on the same file with the same
prompt and answer lengths and threads, by turns. "first word": from `deploy pull` with the file present to the first byte of
`chat`'s answer, and the same for the bare steps: sha256 of the file, twice, and an answer of llama-cpp-python's own
create_chat_completion. "environment": `setup/env.py --deploy` and the full one's packages, into empty folders, pip's cache
warm, llama.cpp compiled before. Writes benchmarks/results/deploy.{json,md}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "setup")]
BARE = """
import hashlib, sys
for _ in range(2): hashlib.file_digest(open(sys.argv[1], "rb"), "sha256")
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, verbose=False)
said = model.create_chat_completion([{"role": "user", "content": "Hello"}], stream=True, temperature=0)
print(next(d for c in said if (d := c["choices"][0]["delta"].get("content"))), flush=True)
"""


def llama_bench(work: Path) -> Path:
    """llama-bench of the pinned llama.cpp, linked to the libraries that Ferry runs with."""
    import llamacpp

    built, log = llamacpp.build_folder(), work / "log"
    source = llamacpp.download_source(work, log, llamacpp.install_build_tools(work, log)) / "vendor" / "llama.cpp"
    headers = [f"-I{source / name}" for name in ("common", "include", "ggml/include", "vendor", ".")]
    libraries = [
        f"-L{built / 'bin'}",
        "-lllama-common",
        "-lllama",
        "-lggml",
        "-lggml-base",
        f"-Wl,-rpath,{built / 'bin'}",
    ]
    main = work / "main.cpp"
    main.write_text("int llama_bench(int, char **);\nint main(int n, char ** a) { return llama_bench(n, a); }\n")
    tool = source / "tools" / "llama-bench" / "llama-bench.cpp"
    sources = [tool] if "int main(" in tool.read_text() else [tool, main]
    subprocess.run(["c++", "-std=c++17", "-O1", *sources, *headers, *libraries, "-o", work / "llama-bench"], check=True)
    return work / "llama-bench"


def bench(tool: Path, gguf: Path) -> dict:
    """{prompt_tokens_per_s, answer_tokens_per_s}"""
    from deploy.stages import smoke

    lengths = ["-p", str(smoke.SPEED_PROMPT), "-n", str(smoke.SPEED_ANSWER), "-t", str(os.cpu_count())]
    done = subprocess.run(
        [tool, "-m", gguf, *lengths, "-r", "1", "-o", "json"], capture_output=True, text=True, check=True
    )
    rates = {
        ("answer" if run["n_gen"] else "prompt") + "_tokens_per_s": run["avg_ts"] for run in json.loads(done.stdout)
    }
    return rates


def ours(version: Path) -> dict:
    """The same of the smoke test, in a process of its own."""
    code = "import sys; from pathlib import Path; from deploy.stages import smoke; import json; print(json.dumps(smoke.run_smoke(Path(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", code, version], cwd=ROOT, capture_output=True, text=True, check=True)
    record = json.loads(done.stdout)
    return {
        "prompt_tokens_per_s": record["prompt_tokens_per_second"],
        "answer_tokens_per_s": record["tokens_per_second"],
    }


def until_word(*commands: list) -> float:
    """Seconds until the last command says something; the others run to their end before it."""
    started = time.perf_counter()
    for command in commands[:-1]:
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with subprocess.Popen(
        commands[-1], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        process.stdin.write(b"Hello\n")
        process.stdin.close()
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    return seconds


def set_up(folder: Path, *which: str) -> dict:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "setup/env.py", *which, "--venv", folder], cwd=ROOT, capture_output=True, check=True
    )
    seconds = time.perf_counter() - started
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {"wall_s": round(seconds, 1), "size_mb": round(size / 1e6)}


def medians(runs: list[dict]) -> dict:
    return {name: round(statistics.median(run[name] for run in runs), 1) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repo", nargs="?", default="./hub/demo")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = measured(given.repo, work, given.repeat)
    empty = dict.fromkeys(("prompt_tokens_per_s", "answer_tokens_per_s", "wall_s", "size_mb"), "-")
    rows = [{"system": system, "case": case} | empty | found for system, case, found in rows]
    table.write("deploy", f"benchmarks/deploy.py --repeat {given.repeat}", ("llama-cpp-python",), rows)
    print((table.RESULTS / "deploy.md").read_text())


def measured(repo: str, work: Path, repeat: int) -> list[tuple[str, str, dict]]:
    from deploy.stages import pull, smoke

    models = work / "models"
    pulled = pull.run_pull(repo, models)
    version, gguf = Path(pulled["folder"]), Path(pulled["folder"]) / pulled["file"]
    smoke.run_smoke(version)
    tool = llama_bench(work)
    pairs = [(ours(version), bench(tool, gguf)) for _ in range(repeat)]
    ferry = [sys.executable, "-m", "cli"]
    ways = {
        "ferry": ([*ferry, "pull", repo, "--models", models], [*ferry, "chat", repo, "--models", models]),
        "llama-cpp-python": ([sys.executable, "-c", BARE, gguf],),
    }
    words = [{name: until_word(*commands) for name, commands in ways.items()} for _ in range(repeat)]
    first = {name: round(statistics.median(run[name] for run in words), 2) for name in ways}
    return [
        ("ferry", "tokens/s", medians([mine for mine, _ in pairs])),
        ("llama-bench", "tokens/s", medians([theirs for _, theirs in pairs])),
        ("ferry", "first word", {"wall_s": first["ferry"]}),
        ("llama-cpp-python", "first word", {"wall_s": first["llama-cpp-python"]}),
        ("ferry", "environment", set_up(work / "light", "--deploy")),
        ("full environment", "environment", set_up(work / "full")),
    ]


if __name__ == "__main__":
    main()
