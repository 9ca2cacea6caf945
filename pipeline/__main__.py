"""python -m pipeline STAGE FOLDER: one stage of the run in FOLDER, in this process. The `ferry` command starts it.

What libraries print goes to FOLDER/logs/STAGE.log. Exit codes: 0 done, 2 an error that the user can cure, 1 an error of
Ferry's own (its traceback is in the log), 130 and 143 stopped by a signal.
"""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from common import console
from contract import files
from contract.errors import UserError
from pipeline import stage_results
from pipeline.offsite import pusher
from pipeline.record import Run


def main(stage: str, folder: str, *arguments: str) -> int:
    run = Run(Path(folder))
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    console.send_library_output_to(run.log_file(stage))
    try:
        stage_results.RUN[stage](run, *arguments)
        pusher.after(run)
        return 0
    except ModuleNotFoundError as error:
        traceback.print_exc()
        return report(
            run, stage, UserError(f"{stage} needs {error.name}, which this environment does not have", "make env")
        )
    except UserError as error:
        return report(run, stage, error)
    except OSError as error:
        try:
            return report(run, stage, files.explain_unhandled(error))
        except OSError:
            return report_bug(run, stage)
    except KeyboardInterrupt:
        console.say("stopped; the same command goes on from here")
        return 130
    except Exception:  # noqa: BLE001 everything else is a fault of Ferry's
        return report_bug(run, stage)


def end_with_parent(parent: int) -> None:
    """Tell this process to end, with its state written, when the command that started it was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def report(run: Run, stage: str, error: UserError) -> int:
    console.say(f"{error}\n  log: {run.log_file(stage)}")
    return 2


def report_bug(run: Run, stage: str) -> int:
    """Print one line for an error that Ferry did not foresee; its traceback goes to the log."""
    traceback.print_exc()
    last = traceback.format_exception_only(*sys.exc_info()[:2])[-1].strip()
    console.say(f"error: {stage} failed, and this is a fault of Ferry's: {last[:300]}\n"
                f" next: report it with {run.log_file(stage)}; the same command goes on from the stage's beginning")  # fmt: skip
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
