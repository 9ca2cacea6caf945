"""tests/helpers/ollama.go as one process that answers: Ollama's Modelfile parser and TEMPLATE engine."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "ollama.go"


def built() -> Path:
    """The program; compiled once for each state of its source (15 s on 2 cores)."""
    home = (
        Path(tempfile.gettempdir()) / f"ollama-go-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}-{os.getuid()}"
    )
    if not (home / "program").exists():
        home.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=home))  # another process may be at it
        shutil.copy(SOURCE, folder / "main.go")
        settings = {
            "GOCACHE": str(folder / "cache"),
            "GOPATH": str(folder),
            "GO111MODULE": "off",
            "GOTOOLCHAIN": "local",
        }
        go = shutil.which("go", path=str(Path(sys.prefix) / "bin")) or shutil.which("go") or "go"
        command = [go, "build", "-o", folder / "program", "main.go"]
        subprocess.run(command, cwd=folder, env=os.environ | settings, check=True, capture_output=True)
        os.replace(folder / "program", home / "program")
        shutil.rmtree(folder)
    return home / "program"


class Go:
    def __init__(self):
        self.process = subprocess.Popen([built()], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lock = threading.Lock()

    def ask(self, **value: object) -> dict | list:
        with self.lock:
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
