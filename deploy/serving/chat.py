"""chat: talk to the pulled model in a terminal, or answer one question from a pipe."""

import contextlib
import io
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UserError, printable_line
from common.text import make_printable
from contract import chat_format
from contract.chat_format import ChatMessage
from deploy.serving import conversation

HELP = """\
/clear        forget the conversation
/system TEXT  answer by this system prompt from now on; alone, show the one in force
/input TEXT   go along with the next question as its input (Alpaca's); @FILE takes a file
/bye          leave, as Ctrl-D does
Ctrl-C stops an answer, not the program."""


def run_chat(
    version: Path, context: int | None = None, system: str | None = None, input_file: Path | None = None
) -> None:
    """Answer what is typed until Ctrl-D, or the one question that is piped in.

    Args:
        version: A version that passed its smoke test.
        context: The most tokens of context.
        system: Another system prompt than the model's default one; "" for none.
        input_file: Its text is appended to the first question as Alpaca's input.

    Raises:
        UserError: The reasons of `conversation.open_model`, or a piped question has no answer.
    """
    input_text = read_input(input_file) if input_file else None
    if sys.stdin is None:  # closed
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # for bytes that are not UTF-8
    is_terminal = sys.stdin.isatty()
    question = "" if is_terminal else sys.stdin.read().strip()
    if not is_terminal and not question:
        return
    if not is_terminal:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe early
    with conversation.open_model(version, context) as engine:
        chat = Chat(engine, engine.manifest.chat.system if system is None else system, input_text)
        if is_terminal:
            chat.run_loop()
        else:
            chat.print_reply(question)


def run_chat_as_child(version: str, system: str | None, input_file: str | None) -> None:
    """Run the chat in this process, a child with limits. Its arguments are JSON."""
    run_chat(Path(version), system=system, input_file=Path(input_file) if input_file else None)


class Chat:
    """One conversation, on stdin and stdout."""

    def __init__(self, engine: conversation.ChatModel, system: str | None, input_text: str | None = None):
        """system: None or "" for none. input_text: appended to the next question as its input."""
        self.engine, self.system, self.input_text = engine, system, input_text
        self.turns: list[ChatMessage] = []

    def run_loop(self) -> None:
        """Read and answer lines until Ctrl-D or /bye."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() history and editing; nothing is saved
        manifest, size = self.engine.manifest, self.engine.context
        print_text(f"{manifest.name}, {size} tokens of context. /help lists the commands, Ctrl-D or /bye leaves.")
        while (line := read_line()) is not None and line != "/bye":
            try:
                name, _, words = line.partition(" ")
                if line.startswith("/"):
                    self.run_command(name, words)
                else:
                    self.print_reply(line)
            except UserError as error:
                print_text(str(error))

    def run_command(self, name: str, words: str) -> None:
        """Run one of the commands that `HELP` lists. words: the text after its name."""
        if name == "/clear":
            self.turns = []
        elif name == "/system" and words:
            self.system = words
        elif name == "/input" and words:
            self.input_text = read_input(Path(words[1:])) if words.startswith("@") else words
        elif name == "/system":
            no_system = "none but what the template may have of its own"
            print_text(printable_line(self.system, 4000) if self.system else no_system)
        else:
            print_text(HELP if name == "/help" else f"{printable_line(name, 40)} is not a command\n{HELP}")

    def print_reply(self, question: str) -> None:
        """Print the answer to a question as it is generated, and add both to the conversation.

        Raise UserError when the question cannot be answered.
        """
        if not question:
            return
        system: list[ChatMessage] = [{"role": "system", "content": self.system}] if self.system else []
        question += chat_format.ALPACA_INPUT + self.input_text if self.input_text else ""
        self.input_text = None
        with catch_interrupts() as is_stopped:
            messages: list[ChatMessage] = [*self.turns, {"role": "user", "content": question}]
            kept_messages, ids = self.engine.fit_messages([*system, *messages])
            answer = conversation.Answer(self.engine, ids, self.engine.sampling, is_stopped)
            if dropped_count := len(system) + len(messages) - len(kept_messages):
                print_text(f"[the context is full: the oldest {dropped_count} messages are left out]")
            text, rate = print_answer(answer)
        self.turns = [*kept_messages[len(system) :], {"role": "assistant", "content": text}]
        if sys.stdout.isatty():
            ending = {"length": f", cut after {len(answer.ids)} tokens", "stopped": ", stopped"}.get(
                answer.end or "", ""
            )
            print_text(f"[{len(answer.ids)} tokens, {rate:.1f} tokens/s{ending}]")


def read_input(path: Path) -> str:
    """Return the text of an input file. Raise UserError when it is missing or not UTF-8 text."""
    try:
        return path.expanduser().read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise UserError(
            f"the input {path} cannot be read: {error.strerror}", "name a text file", code="chat.input_unreadable"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"the input {path} is not UTF-8 text", "name a text file", code="chat.input_not_text"
        ) from error


def print_answer(answer: conversation.Answer) -> tuple[str, float]:
    """Print an answer as it is generated; return its text and the tokens per second after the first one."""
    text, first_time = "", 0.0
    for piece in answer:
        first_time = first_time or time.perf_counter()
        text += piece
        print(make_printable(piece), end="", flush=True)
    print(flush=True)
    return text, max(0, len(answer.ids) - 1) / (time.perf_counter() - first_time)


def print_text(text: str) -> None:
    """Print a text without escape sequences."""
    print(make_printable(text), flush=True)


def read_line() -> str | None:
    """Read a line from the terminal; None at the end of the input."""
    while True:
        try:
            return input(">>> ").strip()
        except KeyboardInterrupt:
            print_text("\nCtrl-D or /bye leaves")
        except EOFError:
            print_text("")
            return None


@contextlib.contextmanager
def catch_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed. Without a terminal it ends the program as usual."""
    pressed = threading.Event()
    if sys.stdin.isatty():
        previous_handler = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed.is_set
    finally:
        if sys.stdin.isatty():
            signal.signal(signal.SIGINT, previous_handler)
