"""A lock for a folder, so that one process at a time works in it.

The lock names its holder, and the system releases it when the holder ends, however that happens.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common import console
from common.errors import UserError

# What `flock` reports on a file system without locks, as some network file systems are.
UNSUPPORTED_ERRNOS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a lock."""

    pid: int
    command: str
    """The command as it was typed, without its settings: those may be secret."""
    since: float
    """Seconds since the epoch."""

    def __str__(self) -> str:
        return f"`{self.command}` (pid {self.pid}, since {time.strftime('%H:%M:%S', time.localtime(self.since))})"


@contextlib.contextmanager
def hold_lock(path: Path, subject: str, command: str) -> Iterator[int | None]:
    """Hold the lock file `path` and yield its descriptor; a child process that inherits it holds the lock too.

    None is yielded, and nothing is locked, on a file system without locks.

    Args:
        subject: what is locked, for messages.
        command: the name of this process in messages of other processes.

    Raises:
        UserError: another process holds the lock; the message has its pid and command.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        is_locked = _try_lock(descriptor, path)
    except BlockingIOError:
        os.close(descriptor)
        raise _busy_error(path, subject) from None
    try:
        if is_locked:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(LockHolder(os.getpid(), command, time.time()))).encode(), 0)
        yield descriptor if is_locked else None
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    """Take the lock; return whether the file system has locks. Raise BlockingIOError when another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            raise
        console.print_note(f"{path.parent} is on a file system without locks: do not start a second command there")
        return False
    return True


def _busy_error(path: Path, subject: str) -> UserError:
    holder = read_holder(path)
    hint = f"wait for it, or stop it: kill {holder.pid}" if holder else "wait for the other command"
    return UserError(f"{subject} is in use by {holder or 'another process'}", hint, code="lock.held")


def read_holder(path: Path) -> LockHolder | None:
    """Return the process that holds the lock; None when there is none, or the file does not say."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        try:
            return LockHolder(**json.loads(os.pread(descriptor, 4096, 0)))
        except (ValueError, TypeError):
            return None
    except OSError:
        return None
    finally:
        os.close(descriptor)
