"""What Linux allows a process, which in a container is less than the machine has."""

from pathlib import Path


def limits(root: Path = Path("/")) -> list[int]:
    """Bytes that the control groups of this process may have: of version 2 its own and all around it, of version 1."""
    own = Path(text(root / "proc/self/cgroup").rpartition("0::/")[2].strip())
    groups = [root / "sys/fs/cgroup" / group for group in (own, *own.parents)]
    said = [text(group / "memory.max") for group in groups]
    said.append(text(root / "sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return [int(limit) for limit in map(str.strip, said) if limit.isdecimal()]


def text(path: Path) -> str:
    """A file's text; '' when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
