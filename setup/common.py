"""What the set-up scripts share. Old syntax on purpose: env.py must be able to say that a Python is too old."""

import os
import subprocess
import sys


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


def run(command, log, message, hint, env=None, each_line=None):
    """Run a command with its output in the log file; if it fails, `message` and its last lines are the error."""
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
    if code:
        telling = [line for line in tail if "error" in line.lower() and not line.startswith("WARNING")] or tail
        said = "".join(f"  {line}\n" for line in telling[-4:])
        fail(f"{message} (exit {code})\n{said}  all of it: {log}", hint)
