"""Limits that Linux sets for a process; in a container they are lower than what the machine has."""

from pathlib import Path


def limits(root: Path = Path("/")) -> list[int]:
    """Return the memory limits of this process in bytes: of its control groups (v2: its own and all parents; v1)."""
    own = Path(text(root / "proc/self/cgroup").rpartition("0::/")[2].strip())
    groups = [root / "sys/fs/cgroup" / group for group in (own, *own.parents)]
    said = [text(group / "memory.max") for group in groups]
    said.append(text(root / "sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return [int(limit) for limit in map(str.strip, said) if limit.isdecimal()]


def text(path: Path) -> str:
    """Return the text of a file; '' when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
