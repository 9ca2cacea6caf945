"""make chat: what was trained is what is asked, and a terminal is a place where people press keys."""

import contextlib
import fcntl
import itertools
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common import llama_runtime
from common.text import make_printable
from contract import chat_format as template
from deploy.serving import chat, conversation
from tests.helpers import repos
from tests.helpers.commands import ROOT, refuses
from tests.helpers.installed import ready
from tests.helpers.served_models import HI, answer

pytestmark = pytest.mark.slow  # real weights answer

SYSTEM = "Answer briefly."  # of the fixture `real`


def likely(engine: conversation.ChatModel, found: conversation.Answer) -> bool:
    """No token is far from the likeliest one (another batch size rounds otherwise): the cache held what it should."""
    places = range(len(found.prompt) - 1, len(found.prompt) + len(found.ids) - 1)
    rows = llama_runtime.next_token_log_probs(engine.model, [*found.prompt, *found.ids], places)
    return all(row[token] > row.max() - 0.5 for row, token in zip(rows, found.ids, strict=True))


# The engine


def test_every_golden_prompt_is_answered_as_by_contract_runtime_token_for_token(engine):
    asked = [golden for golden in engine.manifest.golden if golden.add_generation_prompt]
    assert len(asked) == 11
    for golden in asked:
        engine.model.reset()
        found = answer(engine, engine.ids([(golden.messages, True)])[0], max_tokens=16)
        said, ended = llama_runtime.generate_greedy(engine.model, golden.ids, 16)
        assert (found.prompt, found.ids) == (list(golden.ids), said)
        assert found.text == llama_runtime.detokenize(engine.model, said) and found.end == (
            "stop" if ended else "length"
        )


def test_the_manifests_smoke_prompt_is_what_a_user_asks(engine):
    for known in engine.manifest.smoke:
        engine.model.reset()
        asked = engine.with_default_system([{"role": "user", "content": known.message}])
        found = answer(engine, engine.prompt(asked))
        assert (
            found.prompt == list(known.ids)
            and found.ids == llama_runtime.generate_greedy(engine.model, known.ids, 24)[0]
        )


def test_the_system_prompt_of_the_training_is_told_where_a_conversation_has_none(engine):
    own = [{"role": "system", "content": "Own."}, *HI]
    whole = engine.with_default_system(HI)
    assert whole == [{"role": "system", "content": SYSTEM}, *HI] and engine.with_default_system(own) == own
    assert engine.prompt(whole) == llama_runtime.tokenize(
        engine.model, template.render_model_prompt(engine.model, whole)
    )
    # Without one in the manifest the template's own default is the template's business.
    without = conversation.ChatModel(engine.manifest.model_copy(update={"chat": engine.manifest.chat.model_copy(update={"system": None})}), engine.model, 1024)  # fmt: skip
    assert without.with_default_system(HI) == HI
    assert (
        b"named SmolLM" in engine.model.detokenize(without.prompt(HI)) != engine.model.detokenize(engine.prompt(whole))
    )


@pytest.mark.parametrize("what", ["golden", "smoke"])
def test_a_prompt_that_is_not_the_manifests_is_refused(engine, what):
    first, *rest = getattr(engine.manifest, what)
    changed = engine.manifest.model_copy(update={what: (first.model_copy(update={"ids": (1, *first.ids)}), *rest)})
    with refuses("serve.wrong_prompt"):
        conversation.ChatModel(changed, engine.model, 1024).verify_prompts()


def test_only_what_is_new_is_read(engine, monkeypatch):
    read, evaluate = [], engine.model.eval
    monkeypatch.setattr(engine.model, "eval", lambda tokens: (read.append(len(tokens)), evaluate(tokens))[1])
    first = answer(engine, engine.prompt(HI), max_tokens=8)
    turns = [*HI, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And of Spain?"}]
    read.clear()
    second = answer(engine, engine.prompt(turns), max_tokens=8)
    assert read[0] <= len(second.prompt) - len(first.prompt) - len(first.ids) + 1
    assert likely(engine, second)


def test_a_long_prompt_is_read_in_parts_and_can_be_given_up(engine, monkeypatch):
    read, evaluate = [], engine.model.eval
    monkeypatch.setattr(engine.model, "eval", lambda tokens: (read.append(len(tokens)), evaluate(tokens))[1])
    ids = engine.tokenize_text("one two three " * 300)[:900]
    found = answer(engine, ids, stopped=lambda: sum(read) > 300)
    assert (
        (found.text, found.ids, found.end) == ("", [], "stopped")
        and max(read) <= conversation.PROMPT_BATCH
        and sum(read) <= 512
    )
    read.clear()
    found = answer(engine, ids, max_tokens=4)
    assert sum(read) <= 900 - 512 + 4 and likely(engine, found)


def test_an_answer_can_be_given_up_at_every_token(engine):
    found, asked = [], iter([False] * 6 + [True] * 9)
    found = answer(engine, engine.prompt(HI), stopped=lambda: next(asked))
    assert found.end == "stopped" and 0 < len(found.ids) < 8


def test_a_stop_string_ends_the_answer_and_no_part_of_it_is_shown(engine):
    whole = answer(engine, engine.prompt(HI), stop=())
    stop = whole.text[len(whole.text) // 2 :][:9]
    assert len(engine.tokenize_text(stop)) > 1, "it is longer than a token"
    found = answer(engine, engine.prompt(HI), stop=(stop, "never said"))
    assert (
        found.end == "stop" and found.text == whole.text[: whole.text.index(stop)] and len(found.ids) < len(whole.ids)
    )


def test_the_end_of_the_context_ends_an_answer(engine):
    ids = engine.tokenize_text("one two three " * 400)
    found = answer(engine, ids[:1020], max_tokens=48, temperature=1.5)
    assert (len(found.ids), found.end) == (4, "length") or found.end == "stop"
    with refuses("serve.prompt_too_long") as caught:
        answer(engine, ids[:1024])
    assert isinstance(caught.value, conversation.PromptTooLong) and caught.value.message.count("1024") == 2
    with refuses("serve.empty_prompt"):
        answer(engine, [])


def test_a_seed_gives_the_same_words_again_and_none_gives_others(engine):
    hot = {"temperature": 2.0, "max_tokens": 12}
    ids = engine.prompt(HI)
    assert answer(engine, ids, seed=7, **hot).ids == answer(engine, ids, seed=7, **hot).ids
    assert len({tuple(answer(engine, ids, **hot).ids) for _ in range(3)}) > 1


def test_the_oldest_turns_are_left_out_of_a_full_context_but_never_the_system_prompt(engine):
    system = {"role": "system", "content": SYSTEM}
    turns = [{"role": role, "content": f"{i} " + "word " * 40} for i in range(15) for role in ("user", "assistant")]
    turns.append({"role": "user", "content": "last"})
    kept, ids = engine.fit_messages([system, *turns])
    assert kept[0] == system and kept[1]["role"] == "user" and kept[1:] == turns[len(turns) - len(kept) + 1 :]
    assert (
        len(ids)
        <= 1024 - 24
        < len(engine.prompt(conversation.drop_oldest([*kept[:1], *turns[-len(kept) - 1 :]]) or kept)) + 100
    )
    assert len(kept) > 10
    alone = [system, {"role": "user", "content": "word " * 2000}]
    assert engine.fit_messages(alone)[0] == alone


def test_a_smaller_context_than_the_manifests_is_kept(version):
    with conversation.open_model(version, 300) as small:
        assert small.context == 300
        found = answer(
            small, small.tokenize_text("one two three " * 400)[:298], stop=(), max_tokens=100, temperature=1.0
        )
        assert len(found.ids) <= 2
    with conversation.open_model(version, 5000) as large:
        assert large.context == 1024


def test_a_file_that_did_not_pass_its_smoke_test_is_refused(version, tmp_path):
    untested = tmp_path / "model" / version.name
    untested.mkdir(parents=True)
    for path in version.iterdir():
        if path.name != "smoke.json":
            os.link(path, untested / path.name)
    with refuses("smoke.not_passed") as caught, conversation.open_model(untested):
        pass
    assert str(untested) in caught.value.message and "make smoke" in caught.value.hint


def test_a_template_that_does_not_take_a_conversation_is_one_clear_error(engine):
    strict = conversation.ChatModel(engine.manifest, engine.model, 1024)
    strict.template = "{{ raise_exception('System role not supported') }}"
    with refuses("template.refused") as caught:
        strict.prompt(HI)
    assert caught.value.message.endswith("conversation: System role not supported")


# The BOS


BOS_TEMPLATE = "{{ bos_token }}" + repos.TEMPLATE


@pytest.fixture(scope="module")
def with_bos(source, tmp_path_factory) -> Iterator[conversation.ChatModel]:
    """A model that tells runtimes to add a BOS, with a template that writes one."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    folder = tmp_path_factory.mktemp("bos")
    reader, writer = GGUFReader(source), GGUFWriter(folder / "bos.gguf", "llama")
    copy_with_new_metadata(
        reader, writer,
        {
            "tokenizer.chat_template": MetadataDetails(GGUFValueType.STRING, BOS_TEMPLATE),
            "tokenizer.ggml.add_bos_token": MetadataDetails(GGUFValueType.BOOL, True),
            "tokenizer.ggml.bos_token_id": MetadataDetails(GGUFValueType.UINT32, 0),  # <|endoftext|>: in no turn
        },
        ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id"],
    )  # fmt: skip
    with conversation.open_model(
        ready(repos.real(folder / "bos", folder / "bos.gguf", "bos"), folder / "models")
    ) as opened:
        yield opened


def test_a_model_that_adds_a_bos_gets_the_one_of_its_template_and_no_second(with_bos):
    bos = with_bos.model.token_bos()
    ids = with_bos.prompt(HI)
    assert ids.count(bos) == 1 and ids[0] == bos
    assert all(list(golden.ids).count(bos) == 1 for golden in with_bos.manifest.golden)
    # The trap (llama-cpp-python#1501): the library, given the same text, puts a second one there.
    text = template.render_model_prompt(with_bos.model, with_bos.with_default_system(HI))
    assert with_bos.model.tokenize(text.encode(), special=True)[:2] == [bos, bos]
    assert with_bos.tokenize_text(text) == ids and with_bos.tokenize_text("Once")[0] == bos
    assert likely(with_bos, answer(with_bos, ids, max_tokens=12))


# Text


def in_pieces(text: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def stopped(pieces: list[bytes], stops: list[str]) -> str:
    """The text before a stop string, as soon as one is whole."""
    for end in range(len(pieces) + 1):
        text = b"".join(pieces[:end]).decode(errors="ignore")
        if found := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(found)]
    return text


@given(
    st.text("ab\n é🚢", max_size=30),
    st.lists(st.integers(0, 200)),
    st.lists(st.text("ab\né", min_size=1, max_size=3), max_size=3),
)
@example("\naa", [2], ["a", "\naa"])
def test_words_are_the_text_up_to_the_first_stop_string_however_they_come(text, cuts, stops):
    words, said, pieces = conversation.StreamDecoder(stops), [], in_pieces(text.encode(), cuts)
    for piece in pieces:
        said.append(words.add(piece))
        if words.ended:
            break
    said.append(words.add(b"", last=True))
    assert "".join(said) == stopped(pieces, stops)
    assert all(stop not in "".join(said) for stop in stops)


def test_half_a_character_is_not_shown_and_at_the_end_replaced():
    words = conversation.StreamDecoder(())
    assert [words.add(piece) for piece in (b"\xf0\x9f", b"\x9a", b"\xa2\xe2\x82")] == ["", "", "🚢"]
    assert words.add(b"", last=True) == "\ufffd"


def test_a_token_of_more_than_32_bytes_is_not_lost():
    from pipeline.toolchain import llama_tools

    model = llama_runtime.load_model(
        llama_tools.tools_folder() / "models" / "ggml-vocab-llama-bpe.gguf", vocab_only=True
    )
    pieces = {token: llama_runtime.token_bytes(model, token) for token in range(model.n_vocab())}
    long = {token: piece for token, piece in pieces.items() if len(piece) > 32}
    assert len(long) > 20 and max(map(len, long.values())) >= 128
    assert all(llama_runtime.token_bytes(model, token, 1) == piece for token, piece in long.items())
    assert llama_runtime.detokenize(model, list(long)) == b"".join(long.values()).decode()
    model.close()


@pytest.mark.parametrize(
    ("said", "printed"),
    [
        ("\x1b[31mred\x1b]0;title\x07", "?[31mred?]0;title?"),
        ("a\tb\nc\r\n", "a\tb\nc \n"),
        ("\u202egnp.exe\u2066", "gnp.exe"),
        ("na\u00efve \u3000 \u4f60\u597d", "na\u00efve   \u4f60\u597d"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("\x9b31m\x00\x7f\ue000", "?31m???"),
    ],
)
def test_nothing_that_moves_a_terminal_is_printed(said, printed):
    assert make_printable(said) == printed


# The terminal


class Terminal:
    """`ferry chat` on a terminal of its own, and somebody who types."""

    def __init__(self, version: Path):
        self.master, slave = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            command(version), cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  Ctrl-C is for its foreground
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What came on the screen up to `pattern`; it is not looked at again."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert select.select([self.master], [], [], max(0, end - time.monotonic()))[0], self.seen
            self.seen += os.read(self.master, 4096).decode(errors="replace").replace("\r\n", "\n")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def ask(self, text: str) -> str:
        """All that a line brings, up to the next prompt."""
        self.type(text + "\n")
        return self.until(r"\n>>> ")

    def left(self) -> int:
        """Its exit code."""
        with contextlib.suppress(OSError):  # a terminal that is gone
            while os.read(self.master, 4096):
                pass
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def command(version: Path) -> list[str]:
    name, models = version.parent.name, version.parent.parent
    return [sys.executable, "-m", "cli", "chat", f"./{name}", "--models", str(models)]


@pytest.fixture
def terminal(version) -> Iterator[Terminal]:
    opened = Terminal(version)
    yield opened
    opened.close()


def test_a_conversation_in_a_terminal(terminal, engine):
    banner = terminal.until(">>> ")
    assert "real, 1024 tokens of context. /help lists the commands, Ctrl-D or /bye leaves." in banner
    said = terminal.ask(HI[0]["content"])
    known = engine.manifest.smoke[0].answer.rstrip("\n")
    assert known in said and re.search(r"\[\d+ tokens, [\d.]+ tokens/s(, cut after 24 tokens)?\]", said)
    assert "\x1b" not in said.replace("\x1b[?2004h", "").replace(
        "\x1b[?2004l", ""
    )  # readline's own, around pasted text
    assert "/system TEXT" in terminal.ask("/help") and "/nonsense is not a command" in terminal.ask("/nonsense x")
    assert SYSTEM in terminal.ask("/system")
    assert "tokens" not in terminal.ask("/system You are a pirate.") and "You are a pirate." in terminal.ask("/system")
    assert "tokens" not in terminal.ask("   ")
    terminal.ask("/clear")
    terminal.type("/bye\n")
    assert terminal.left() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(talkative):
    with contextlib.closing(Terminal(talkative)) as terminal:
        terminal.until(">>> ")
        terminal.type("\x03")
        assert "Ctrl-D or /bye leaves" in terminal.until(r">>> ")
        terminal.type("Count from one to a thousand in words.\n")
        terminal.until(r"words\.\n\S")
        terminal.type("\x03")
        assert ", stopped]" in terminal.until(r"\n>>> ")
        assert "tokens/s" in terminal.ask("Say hello in one word.")
        terminal.type("\x04")
        assert terminal.left() == 0


def test_a_full_context_is_said_and_the_oldest_turns_are_forgotten(engine, capsys):
    here = chat.Chat(engine, SYSTEM)
    here.turns = [{"role": role, "content": "word " * 60} for _ in range(12) for role in ("user", "assistant")]
    here.print_reply("Say hello.")
    said = capsys.readouterr().out
    gone = int(re.search(r"\[the context is full: the oldest (\d+) messages are left out\]\n", said)[1])
    assert len(here.turns) == 24 - gone + 2 and here.turns[-1]["content"].strip() in said
    assert here.system == SYSTEM


def piped(version: Path, text: bytes, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*command(version), *arguments], cwd=ROOT, input=text, capture_output=True)


def test_what_is_piped_in_is_one_question_and_only_the_answer_comes_out(version, engine):
    done = piped(version, HI[0]["content"].encode() + b"\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().strip() == engine.manifest.smoke[0].answer.strip()
    assert piped(version, b" \n").stdout == b""
    done = piped(version, b"Two\nlines \xff and a broken letter?\n")
    assert done.returncode == 0 and done.stdout.strip()


def test_a_piped_question_that_is_too_long_is_one_clear_error(version):
    done = piped(version, b"word " * 2000)
    assert done.returncode == 2 and done.stdout == b""
    assert b"error: the prompt has 20" in done.stderr and b"next:" in done.stderr and b"Traceback" not in done.stderr


def test_a_reader_who_has_enough_ends_it_silently(version):
    line = f"echo 'Tell me a story.' | {shlex.join(command(version))} | head -c 1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True)
    assert len(done.stdout) == 1 and done.stderr == b""
