"""Output for the user: results, messages, notes and progress.

Libraries write to file descriptors 1 and 2. A stage process redirects both to its log file (`send_library_output_to`),
so that only what is printed through this module reaches the terminal.
"""

import contextlib
import io
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from common.text import make_printable, make_printable_except_styles

WIDTH = 80
SHOW_PROGRESS_AFTER = 5.0  # seconds after which the progress of some work is shown
PROGRESS_LINE_SECONDS = 15.0  # seconds without output after which progress is printed, where there is no terminal
REDRAW_SECONDS = 0.5  # seconds between two updates of a bar on a terminal
# Environment variable with the terminal's file descriptors, "OUT,ERR", for a process that replaces this one.
TERMINAL_VARIABLE = "FERRY_TERMINAL"

_streams: dict[str, TextIO] = {}
is_progress_shown = True  # false in a process that runs beside another one
has_printed_result = False  # whether this process has written to stdout


def result_stream() -> TextIO:
    """Return the stream for results: the terminal's stdout."""
    return _streams.get("out") or sys.stdout


def message_stream() -> TextIO:
    """Return the stream for messages and progress: the terminal's stderr."""
    return _streams.get("err") or sys.stderr


def send_library_output_to(log: Path) -> None:
    """Redirect file descriptors 1 and 2, to which libraries and child processes print, to the end of the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    inherited = os.environ.get(TERMINAL_VARIABLE)
    out, err = map(int, inherited.split(",")) if inherited else (os.dup(1), os.dup(2))
    for descriptor in (out, err):
        os.set_inheritable(descriptor, True)
    os.environ[TERMINAL_VARIABLE] = f"{out},{err}"
    _streams["out"], _streams["err"] = (
        os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
        for descriptor in (out, err)
    )
    log_descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log_descriptor, descriptor)
    os.close(log_descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    print(f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}")


def print_result(text: str) -> None:
    """Print a result on stdout."""
    global has_printed_result
    has_printed_result = True
    _print_line(text, result_stream())


def print_message(text: str) -> None:
    """Print a line about the work on stderr."""
    _print_line(text, message_stream())


def print_note(text: str) -> None:
    """Print something that the user should know on stderr, wrapped and with "note:" in front."""
    print_message(wrap_text(f"note: {text}", indent=6))


def wrap_text(text: str, indent: int = 12) -> str:
    """Return `text` in lines of at most 80 columns, all but the first indented. Words stay whole: they may be paths."""
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def indent_under_label(label: str, text: str) -> list[str]:
    """Return the lines of a row's or a model's text: the first behind its label, the others below it."""
    lines = make_printable(text.strip()).split("\n")
    return [f"  {label if not number else '':{len(label)}}{line}".rstrip() for number, line in enumerate(lines)]


def _print_line(text: str, stream: TextIO) -> None:
    """Print a line without control characters, after erasing the progress bar that is in its place."""
    text = make_printable_except_styles(text) if uses_colour(stream) else make_printable(text)
    with _draw_lock:
        if _active_bars:
            _active_bars[-1].clear()
        stream.write(text + "\n")
        stream.flush()
        _last_print_time[0] = time.monotonic()


def style(text: str, colour: str) -> str:
    """Return `text` in a colour and bold where stdout is a terminal and NO_COLOR is not set."""
    import click

    return click.style(text, fg=colour, bold=True) if uses_colour(result_stream()) else text


def uses_colour(stream: TextIO) -> bool:
    """Return whether colours may be written: to a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def format_duration(seconds: float) -> str:
    """Return a duration as text, such as `45 s`, `12 min` or `3.4 h`."""
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


_draw_lock = threading.RLock()
_active_bars: list["_TerminalBar"] = []
_last_print_time = [0.0]  # time.monotonic() when the last line was printed; a list, so that it can be set


@contextlib.contextmanager
def show_progress(
    total: float, label: str, unit: str = "rows", show: bool = True, initial: float = 0
) -> Iterator[Callable[[float], None]]:
    """Show the progress of some work and its remaining time; yield the function that advances it.

    Nothing is shown in the first five seconds. After that a terminal gets a bar. Elsewhere a line is printed, and
    another one whenever nothing was printed for 15 s.

    Args:
        total: amount of work in `unit`; 0 where it is not known, and only the time is shown.
        unit: what is counted; "B" for bytes.
        show: false: show nothing.
        initial: the amount that an earlier process did.
    """
    if not (show and is_progress_shown):
        yield lambda count: None
        return
    meter = (_TerminalBar if message_stream().isatty() else _ProgressLines)(total, label, unit, initial)
    with meter.draw_in_background():
        yield meter.advance


@contextlib.contextmanager
def show_elapsed_time(label: str) -> Iterator[None]:
    """Show how long some work of unknown length has been running."""
    with show_progress(0, label):
        yield


class _Meter:
    """A counter of work. A thread draws it, so that the time is updated while a single item takes long."""

    pause: float
    """Seconds between two calls of `draw`."""

    def __init__(self, total: float, label: str, unit: str, initial: float):
        self.total, self.label, self.unit, self.done, self.initial = total, label, unit, initial, initial
        self.start_time, self.finished = time.monotonic(), threading.Event()

    def advance(self, count: float) -> None:
        """Add `count` to the work that is done."""
        self.done += count

    @contextlib.contextmanager
    def draw_in_background(self) -> Iterator[None]:
        """Draw from a thread while the `with` block runs, then close."""
        thread = threading.Thread(target=self._draw_until_finished, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.finished.set()
            thread.join()
            self.close()

    def _draw_until_finished(self) -> None:
        wait = SHOW_PROGRESS_AFTER
        while not self.finished.wait(wait):
            self.draw()
            wait = self.pause

    def draw(self) -> None: ...

    def close(self) -> None: ...

    def format_line(self) -> str:
        """Return a line such as `training: 34 of 120 steps, 12 s, about 30 s left`."""
        elapsed = time.monotonic() - self.start_time
        parts = (
            [f"{self._format_amount(self.done)} of {self._format_amount(self.total)}{self._format_unit()}"]
            if self.total
            else []
        )
        parts += [f"{self._format_amount(self.done)}{self._format_unit()}"] if self.done and not self.total else []
        parts.append(format_duration(elapsed))
        if self.total and self.done > self.initial:
            remaining = elapsed * max(0.0, self.total - self.done) / (self.done - self.initial)
            parts.append(f"about {format_duration(remaining)} left")
        return f"{self.label}: {', '.join(parts)}"

    def _format_amount(self, value: float) -> str:
        if self.unit == "B":
            return f"{value / 1e6:,.0f}" if self.total < 10e9 else f"{value / 1e9:,.1f}"
        return f"{value:,.0f}"

    def _format_unit(self) -> str:
        if self.unit == "B":
            return " MB" if self.total < 10e9 else " GB"
        return f" {self.unit}"


class _ProgressLines(_Meter):
    """Progress as lines, where messages do not go to a terminal."""

    pause = SHOW_PROGRESS_AFTER
    is_shown = False

    def draw(self) -> None:
        if not self.is_shown or time.monotonic() - _last_print_time[0] >= PROGRESS_LINE_SECONDS:
            print_message(self.format_line())
            self.is_shown = True


class _TerminalBar(_Meter):
    """Progress as one line at the bottom of a terminal, drawn over again."""

    pause = REDRAW_SECONDS

    def draw(self) -> None:
        with _draw_lock:
            if self not in _active_bars:
                _active_bars.append(self)
            if _active_bars[-1] is not self or self.finished.is_set():
                return
            width = min(WIDTH, _terminal_width()) - 1
            message_stream().write(f"\r{make_printable(self.format_line())[:width]:<{width}}")
            message_stream().flush()

    def clear(self) -> None:
        message_stream().write(f"\r{'':{min(WIDTH, _terminal_width()) - 1}}\r")

    def close(self) -> None:
        with _draw_lock:
            if self in _active_bars:
                self.clear()
                message_stream().flush()
                _active_bars.remove(self)


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(message_stream().fileno()).columns or WIDTH  # 0: a terminal whose size is not set
    except (OSError, ValueError):
        return WIDTH
