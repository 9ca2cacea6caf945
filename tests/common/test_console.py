"""The screen: plain without a terminal, at most 80 columns, colours only where they are wanted."""

import io
import os
import pty
import subprocess
import sys
import time

import pytest

from common import console
from tests.helpers.commands import ROOT, ferry

ESCAPE = "\x1b"


def on_a_terminal(code: str, **settings: str) -> str:
    """What Python code prints on a terminal of its own."""
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | settings
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    printed = b""
    while True:
        try:
            printed += os.read(leader, 65536)
        except OSError:
            break
    os.close(leader)
    assert process.wait() == 0, printed
    return printed.decode()


@pytest.mark.parametrize(("settings", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_on_a_terminal_unless_no_color_is_set(settings, coloured):
    code = "from common import console; console.print_result(console.style('x', 'red'))"
    assert (ESCAPE in on_a_terminal(code, **settings)) is coloured


def test_preview_marks_what_carries_loss_without_a_terminal(chain):
    done = chain.make("preview")
    assert done.returncode == 0 and ESCAPE not in done.stdout and "»" in done.stdout and "«" in done.stdout


def test_a_bar_is_drawn_on_a_terminal_and_lines_elsewhere(monkeypatch):
    code = (
        "import time\nfrom common import console\nconsole.SHOW_PROGRESS_AFTER = 0.05\n"
        "with console.show_progress(4, 'work', 'rows') as advance:\n    for _ in range(4):\n        time.sleep(0.2); advance(1)\n"
    )
    drawn = on_a_terminal(code)
    assert "\rwork: " in drawn and "left" in drawn and max(map(len, drawn.replace("\n", "\r").split("\r"))) <= 80
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "\r" not in done.stderr and done.stderr.startswith("work: ") and done.stdout == ""


def test_progress_by_time_says_something_while_one_item_takes_long(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setitem(console._streams, "err", stream)
    monkeypatch.setattr(console, "SHOW_PROGRESS_AFTER", 0.05)
    with console.show_progress(100, "work", "rows"):
        time.sleep(0.3)
    assert "work: 0 of 100 rows" in stream.getvalue()


def test_notes_are_wrapped_and_paths_stay_whole():
    path = "/".join(["folder"] * 20)
    lines = console.wrap_text(f"note: {'word ' * 40}{path}", 6).split("\n")
    assert path in "".join(lines) and all(len(line) <= 80 for line in lines if path not in line)


@pytest.mark.parametrize("command", ["--help", "train", "init", "models", "cloud-to-local"])
def test_help_has_80_columns(command):
    words = [command] if command == "--help" else [command, "--help"]
    done = ferry(*words, COLUMNS="80")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80 and ESCAPE not in done.stdout


def test_the_chains_screen_is_plain_and_narrow(chain):
    """80 columns but for a path or a sha256, a header for each stage, a summary, and nothing of a library."""
    lines = chain.printed.splitlines()
    for number, stage in enumerate(("data", "finetune", "evaluate", "export", "verify", "publish"), 1):
        assert f"[{number}/6] {stage}" in lines
    samples = ("  > ", "  before  ", "  after   ", "  wanted  ")  # whole, however long
    long = [
        line
        for line in lines
        if len(line) > 80 and not line.startswith(samples) and not any(len(word) > 40 for word in line.split())
    ]
    assert not long, long
    assert ESCAPE not in chain.printed and "\r" not in chain.printed
    assert "chain is trained" in chain.printed and "make deploy-mac REPO=" in chain.printed
    assert not any(word in chain.printed for word in ("Unsloth:", "Warning", "it/s]", "llama_model_loader", "🦥"))
