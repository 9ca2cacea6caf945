"""The error of a gate that does not pass, with its evidence in a file."""

from pathlib import Path

from common import files
from common.errors import UserError


def write_gate_error(gate: str, reason: str, folder: Path, evidence: dict, code: str) -> UserError:
    """Write the evidence of a failed gate to folder/evidence.json and return the error, which names that file."""
    path = folder / "evidence.json"
    files.write_json(path, {"gate": gate, **evidence})
    return UserError(reason, f"do not use this file; read {path} and report it with the run's records", code=code)
