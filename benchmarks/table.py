"""How a benchmark leaves what it found: results/<name>.json, and the same as a table beside it."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write(
    name: str,
    command: str,
    packages: tuple[str, ...],
    found: list[dict],
    device: str | None = None,
    results: Path = RESULTS,
) -> None:
    """found: rows {system, case, metric: value, ...}, medians where it was measured more than once; a metric that a row
    does not have is empty. device: None for this machine's cores."""
    columns = list(dict.fromkeys(name for row in found for name in row))
    rows = [{name: row.get(name) for name in columns} for row in found]
    result = {
        "device": device or f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "command": command, "date": datetime.date.today().isoformat(), "rows": rows,
    }  # fmt: skip
    (results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    head = [f"{result['device']}, {result['date']}: `{command}`{'' if device else ' (medians)'}", ""]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |" for row in rows]
    (results / f"{name}.md").write_text("\n".join([*head, *lines]) + "\n")
