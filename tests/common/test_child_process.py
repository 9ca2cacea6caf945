"""A library that crashes, hangs or takes all memory over a stranger's file is one error line; nothing of it stays."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import child_process
from common.child_process import Limits, call_in_child, run_attached
from common.errors import UserError
from tests.helpers.commands import refuses

HERE = "tests.common.test_child_process"
ENOUGH = Limits(60, 2 << 30)


def give(value):
    return value


def refuse(what: str) -> None:
    raise UserError(what, "fix it", code="test.refused")


def die(number: int) -> None:
    os.kill(os.getpid(), number)


def leave(code: int) -> None:
    os._exit(code)


def fail() -> None:
    raise RuntimeError("a fault of ours")


def sleep_for(seconds: float) -> None:
    time.sleep(seconds)


def take_memory(size: int) -> None:
    held = bytearray(size)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    time.sleep(60)


def start_another(path: str) -> None:
    Path(path).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    time.sleep(60)


def hang_after_the_answer() -> None:
    for number in range(3, 64):  # the pipe among them
        with contextlib.suppress(OSError):
            os.close(number)
    time.sleep(60)


def answer_without_end() -> str:
    return "x" * (child_process.MAX_ANSWER_BYTES + 1)


def write_large_file(path: str) -> None:
    with open(path, "wb") as file:
        file.write(bytes(child_process.MAX_FILE_BYTES + 1))


def tell_environment() -> dict:
    return {
        name: os.environ.get(name) for name in ("HF_TOKEN", "OPENAI_API_KEY", "HOME", child_process.SERVER_KEY_VARIABLE)
    }


def test_values_and_errors_of_its_own_come_back():
    assert call_in_child(f"{HERE}:give", [{"a": [1, "é\ud83d\ude00"[0]]}], ENOUGH, "x") == {"a": [1, "é"]}
    with refuses("test.refused") as caught:
        call_in_child(f"{HERE}:refuse", ["it is wrong"], ENOUGH, "x")
    assert (caught.value.message, caught.value.hint) == ("it is wrong", "fix it")


FAULTS = {
    "a crash": ("die", [signal.SIGSEGV], ENOUGH, "process.crashed", "llama.cpp crashed"),
    "an assertion": ("die", [signal.SIGABRT], ENOUGH, "process.crashed", "aborted"),
    "a bus error": ("die", [signal.SIGBUS], ENOUGH, "process.crashed", "crashed"),
    "the OOM killer": ("die", [signal.SIGKILL], ENOUGH, "process.crashed", "out of memory"),
    "another processor's code": ("die", [signal.SIGILL], ENOUGH, "process.crashed", "different processor"),
    "a rare signal": ("die", [signal.SIGUSR1], ENOUGH, "process.crashed", f"signal {int(signal.SIGUSR1)}"),
    "an exit": ("leave", [3], ENOUGH, "process.crashed", "exit code 3"),
    "a fault of ours": ("fail", [], ENOUGH, "process.crashed", "RuntimeError: a fault of ours"),
    "a hang": ("sleep_for", [60], Limits(2, 2 << 30), "process.timeout", "2 s"),
    "a hang behind the answer": ("hang_after_the_answer", [], Limits(2, 2 << 30), "process.timeout", "2 s"),
    "hunger": ("take_memory", [900 << 20], Limits(60, 600 << 20), "process.memory_exceeded", "0.6 GB"),
    "an answer without end": ("answer_without_end", [], ENOUGH, "process.answer_too_large", "67,108,864 bytes"),
    "a file without end": ("write_large_file", ["{tmp}/x"], ENOUGH, "process.crashed", "exit code"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_whatever_befalls_it_is_one_error(case, tmp_path):
    function, arguments, limits, code, value = FAULTS[case]
    arguments = [a.replace("{tmp}", str(tmp_path)) if isinstance(a, str) else a for a in arguments]
    with refuses(code) as caught:
        call_in_child(f"{HERE}:{function}", arguments, limits, "the smoke test of x.gguf")
    assert value in caught.value.message and caught.value.message.startswith("the smoke test of x.gguf")
    assert "\n" not in caught.value.message and caught.value.hint
    assert not any(path.stat().st_size > child_process.MAX_FILE_BYTES for path in tmp_path.iterdir())


def test_what_it_started_ends_with_it(tmp_path):
    with refuses("process.timeout"):
        call_in_child(f"{HERE}:start_another", [str(tmp_path / "pid")], Limits(3, 2 << 30), "x")
    assert ended(int((tmp_path / "pid").read_text()))


def test_it_gets_no_secrets(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", child_process.SERVER_KEY_VARIABLE):
        monkeypatch.setenv(name, "secret")
    told = call_in_child(f"{HERE}:tell_environment", [], ENOUGH, "x")
    assert told == {
        "HF_TOKEN": None,
        "OPENAI_API_KEY": None,
        "HOME": os.environ.get("HOME"),
        child_process.SERVER_KEY_VARIABLE: "secret",
    }


def ended(pid: int) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# With the terminal: chat and serve


def be_ready_and_stay(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    child_process.report_ready()
    time.sleep(60)


@pytest.mark.parametrize(
    ("function", "arguments", "limits", "code", "value"),
    [
        ("die", [signal.SIGSEGV], ENOUGH, "process.crashed", "crashed"),
        ("sleep_for", [60], Limits(2, 2 << 30), "process.timeout", "2 s"),
        ("take_memory", [900 << 20], Limits(60, 600 << 20), "process.memory_exceeded", "0.6 GB"),
    ],
)
def test_a_server_that_crashes_or_never_starts_is_one_error(function, arguments, limits, code, value):
    with refuses(code) as error:
        run_attached(f"{HERE}:{function}", arguments, limits, "llama.cpp with x.gguf")
    assert value in error.value.message and "llama.cpp with x.gguf" in error.value.message


def test_a_server_that_has_started_has_no_time_limit_and_passes_its_exit_code_on(capfd):
    assert run_attached(f"{HERE}:sleep_after_ready", [2.5], Limits(2, 2 << 30), "x") == 0
    assert run_attached(f"{HERE}:refuse", ["the port is taken"], ENOUGH, "x") == 2
    assert "error: the port is taken\n next: fix it" in capfd.readouterr().err


def sleep_after_ready(seconds: float) -> None:
    child_process.report_ready()
    time.sleep(seconds)


PARENT = "import sys; from common import child_process; sys.exit(child_process.run_attached(sys.argv[1], sys.argv[2:], child_process.Limits(60, 2 << 30), 'x'))"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_it_ends_with_the_command_that_started_it(tmp_path, number, code):
    place = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, f"{HERE}:be_ready_and_stay", str(place)])
    until = time.monotonic() + 30
    while not (place.is_file() and place.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(20) == code
    assert ended(int(place.read_text()))
