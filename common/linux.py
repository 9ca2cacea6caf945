"""Limits that Linux sets for a process; in a container they are lower than what the machine has."""

from pathlib import Path


def memory_limits(root: Path = Path("/")) -> list[int]:
    """Return the memory limits of this process in bytes: of its control groups (v2: its own and all parents; v1)."""
    own_group = Path(read_text(root / "proc/self/cgroup").rpartition("0::/")[2].strip())
    groups = [root / "sys/fs/cgroup" / group for group in (own_group, *own_group.parents)]
    texts = [read_text(group / "memory.max") for group in groups]
    texts.append(read_text(root / "sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return [int(limit) for limit in map(str.strip, texts) if limit.isdecimal()]


def read_text(path: Path) -> str:
    """Return the text of a file; '' when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
