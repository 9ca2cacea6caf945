"""Functions that the set-up scripts share.

This file keeps to the syntax of Python 3.6, so that env.py can say that a Python is too old.
"""

import errno
import os
import shutil
import subprocess
import sys

SETUP_COMMAND = "make deploy-env" if "--deploy" in sys.argv else "make env"
NETWORK_HINT = f"check the network (and pip config list), then {SETUP_COMMAND}"
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fail(message, hint):
    """Print the error and the command to run next, and exit with code 2."""
    sys.stderr.write(f"\nerror: {message}\nnext: {hint}\n")
    sys.exit(2)


def cache_folder():
    """Return the folder for results that take long to make and belong to the machine, not to a checkout."""
    return os.path.abspath(os.path.expanduser(os.environ.get("FERRY_CACHE") or "~/.cache/ferry"))


def ensure_writable_folder(path, hint):
    """Create the folder when it is missing, and exit when no file can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe-{os.getpid()}")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as error:
        fail(f"cannot write to {path}: {error.strerror}", hint)


def write_atomically(path, text):
    """Write a text to a temporary file, then rename it to `path`, so that the file is never half-written."""
    path = os.path.realpath(path)  # a link stays a link
    part = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def run_logged(command, log, env=None, each_line=None):
    """Run a command and append its output to the log file; return its exit code and its last 40 lines."""
    tail = []
    with open(log, "a") as file:
        file.write("$ " + " ".join(map(str, command)) + "\n")
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            errors="replace",
            env=env,
            close_fds=False,  # the command inherits the lock too
        )
        try:
            for line in process.stdout:
                file.write(line)
                tail = (tail + [line.rstrip()])[-40:]
                if each_line:
                    each_line(line)
        except BaseException:  # also for Ctrl-C: the command must not continue
            process.terminate()
            process.wait()
            raise
        code = process.wait()
    return code, tail


def run_or_fail(command, log, message, hint, env=None, each_line=None):
    """Run a command that must succeed. When it fails, exit with `message` and its last lines as the error."""
    code, tail = run_logged(command, log, env, each_line)
    if code:
        fail_with_log(f"{message} (exit {code})", tail, log, hint)


def fail_with_log(message, tail, log, hint):
    """Exit with the error of a failed command, its last lines and the path of its log."""
    if any(os.strerror(code) in line for code in DISK_FULL_ERRORS for line in tail):
        hint = f"free some disk, then {SETUP_COMMAND}"
    fail(message + "\n" + "".join(f"  {line}\n" for line in select_failure_lines(tail)) + f"  all of it: {log}", hint)


def select_failure_lines(tail):
    """Return the last lines that say why a command failed, at most four."""
    errors = [line for line in tail if "error" in line.lower() and not line.startswith("WARNING")]
    return (errors or tail)[-4:]
