"""What the set-up scripts share. Old syntax on purpose: env.py must be able to say that a Python is too old."""

import errno
import os
import shutil
import subprocess
import sys

AGAIN = "make deploy-env" if "--deploy" in sys.argv else "make env"
NETWORK = f"check the network (and pip config list), then {AGAIN}"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fail(message, hint):
    """The one way the set-up ends badly: what is wrong, and the command to run next."""
    sys.stderr.write(f"\nerror: {message}\nnext: {hint}\n")
    sys.exit(2)


def cache_folder():
    """Where things live that are costly to make and belong to the machine, not to a checkout."""
    return os.path.abspath(os.path.expanduser(os.environ.get("FERRY_CACHE") or "~/.cache/ferry"))


def writable_folder(path, hint):
    """Make the folder if need be, and prove that a file can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe-{os.getpid()}")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as error:
        fail(f"cannot write to {path}: {error.strerror}", hint)


def write_whole(path, text):
    """Write the text beside the file and put it in its place: whatever ends this, there is never half a file."""
    path = os.path.realpath(path)  # a link stays one
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


def attempt(command, log, env=None, each_line=None):
    """Run a command with its output in the log file: its exit code and its last lines."""
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
            close_fds=False,  # it holds the lock too
        )
        try:
            for line in process.stdout:
                file.write(line)
                tail = (tail + [line.rstrip()])[-40:]
                if each_line:
                    each_line(line)
        except BaseException:  # Ctrl-C too: nothing of ours may run on
            process.terminate()
            process.wait()
            raise
        code = process.wait()
    return code, tail


def run(command, log, message, hint, env=None, each_line=None):
    """Run a command that must succeed; else `message` and its last lines are the error."""
    code, tail = attempt(command, log, env, each_line)
    if code:
        give_up(f"{message} (exit {code})", tail, log, hint)


def give_up(message, tail, log, hint):
    """The error of a command that failed, with what it said last."""
    if any(os.strerror(code) in line for code in DISK_FULL for line in tail):
        hint = f"free some disk, then {AGAIN}"
    fail(message + "\n" + "".join(f"  {line}\n" for line in telling(tail)) + f"  all of it: {log}", hint)


def telling(tail):
    """The lines that say why a command failed."""
    errors = [line for line in tail if "error" in line.lower() and not line.startswith("WARNING")]
    return (errors or tail)[-4:]
