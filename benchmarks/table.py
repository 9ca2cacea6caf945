"""How a benchmark leaves what it found: results/<name>.json, and the same as a table beside it."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def write(name: str, command: str, packages: tuple[str, ...], found: list[dict]) -> None:
    """found: rows {system, case, metric: value, ...} of medians, all with the same metrics (None: not of this case)."""
    result = {
        "device": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "command": command, "date": datetime.date.today().isoformat(), "rows": found,
    }  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    head = [f"{result['device']}, {result['date']}: `{command}` (medians)", ""]
    lines = ["| " + " | ".join(found[0]) + " |", "| --- " * len(found[0]) + "|"]
    lines += ["| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |" for row in found]
    (RESULTS / f"{name}.md").write_text("\n".join([*head, *lines]) + "\n")
