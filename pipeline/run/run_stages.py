"""Run the stages of a run that are not complete, in order, each in a process of its own.

Each stage has its own process because a library that has loaded a model does not return all of its memory, and because
what a stage prints can then go to its own log file.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from common import console, files
from common.errors import UserError
from common.lock import hold_lock
from pipeline.run.run_folder import STAGES, Run

# Signals that end a stage before it can print an error, with their usual cause.
SIGNAL_CAUSES = {
    signal.SIGKILL: "killed (SIGKILL), most often because memory ran out",
    signal.SIGSEGV: "ended by a crash of a library (SIGSEGV)",
    signal.SIGBUS: "ended by a crash (SIGBUS), most often because the disk is full",
    signal.SIGABRT: "ended by a crash of a library (SIGABRT)",
}


@contextlib.contextmanager
def lock_run(run: Run, command: str) -> Iterator[int | None]:
    """Lock the run, so that no second command works in its folder, and yield the lock's descriptor for child processes.

    Raises:
        UserError: another command holds the lock; the message has its pid and command.
    """
    with contextlib.ExitStack() as stack:
        try:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            descriptor = stack.enter_context(hold_lock(lock_path(run), f"the run {run.folder}", command))
        except OSError as error:
            raise files.translate_write_error(error, run.folder) from error
        yield descriptor


def lock_path(run: Run) -> Path:
    """Return the path of the lock, which is beside the run's folder because `restore_run` replaces the folder."""
    return run.folder.with_name(f".{run.name}.lock")


def run_stages(run: Run, last: str, lock: int | None, arguments: dict[str, list[str]] | None = None) -> None:
    """Run every stage up to and including `last` that is not complete.

    Args:
        lock: descriptor that each stage's process inherits, so that the run stays locked as long as the process lives.
        arguments: further command line arguments by stage.
    """
    stages = STAGES[: STAGES.index(last) + 1]
    for stage in stages:
        heading = f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage}"
        if run.is_done(stage):
            console.print_message(f"{heading}: done already ({run.record_path(stage)})")
            continue
        console.print_message(heading)
        run_stage(run, stage, lock, (arguments or {}).get(stage, []))


def run_stage(run: Run, stage: str, lock: int | None, arguments: list[str] = []) -> None:  # noqa: B006 never changed
    """Run one stage in a process of its own and wait until it ends.

    Raises:
        UserError: a signal killed the process.
        SystemExit: the stage failed; with its exit code.
    """
    command = [sys.executable, "-m", "pipeline", stage, str(run.folder), *arguments]
    process = subprocess.Popen(command, pass_fds=() if lock is None else (lock,))
    exit_code = wait_for_process(process)
    if exit_code < 0 and -exit_code in SIGNAL_CAUSES:
        raise UserError(
            f"{stage} was {SIGNAL_CAUSES[signal.Signals(-exit_code)]}",
            f"read {run.log_file(stage)}; the same command resumes where it stopped",
            code="run.stage_killed",
        )
    if exit_code:
        raise SystemExit(exit_code if exit_code > 0 else 128 - exit_code)


def wait_for_process(process: subprocess.Popen) -> int:
    """Wait for a stage's process and return its exit code.

    SIGTERM is passed on to the process and Ctrl-C reaches it directly; it saves its state before it exits.
    """
    previous_handlers = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number)),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
    }
    try:
        return process.wait()
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
