"""SkyPilot's real package, locked, in an environment of its own beside the caches; and `sky`, the stand-in that asks it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from common import files
from tests.helpers.commands import ROOT

LOCK = ROOT / "setup" / "locks" / "sky.txt"


def environment() -> Path:
    """Its python; made once (half a minute, 0.5 GB)."""
    folder = (
        files.cache_dir()
        / "tests"
        / f"skypilot-{files.sha256(LOCK)[:12]}-py{sys.version_info.major}.{sys.version_info.minor}"
    )
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-qq", "--no-deps", "-r", LOCK], check=True)
        (folder / "complete").touch()
    return folder / "bin" / "python"


class Sky:
    """A user's `sky`, with a home of its own."""

    def __init__(self, folder: Path, clouds: tuple[str, ...] = ("aws", "gcp", "runpod")):
        self.state, self.python = folder / "state", environment()
        (folder / "home").mkdir(parents=True)
        self.state.mkdir()
        (self.state / "clouds.json").write_text(json.dumps(clouds))
        (self.state / "settings.json").write_text(json.dumps({"PATH": os.environ["PATH"]}))
        self.program = folder / "sky"
        self.program.write_text(
            f"#!/bin/sh\nHOME={folder}/home SKY_STATE={self.state} SKYPILOT_DISABLE_USAGE_COLLECTION=1 SKYPILOT_DEBUG=0 "
            f'exec {self.python} -P -W ignore {ROOT}/tests/helpers/standins/sky.py "$@"\n'
        )
        self.program.chmod(0o755)

    def settings(self, **values: str) -> None:
        """Of every machine's environment."""
        path = self.state / "settings.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def __call__(self, *words: object) -> subprocess.CompletedProcess:
        return subprocess.run([self.program, *map(str, words)], capture_output=True, text=True)

    def chosen(self) -> list[dict]:
        """What the optimizer chose, each time that it was asked."""
        return [json.loads(line) for line in (self.state / "chosen.jsonl").read_text().splitlines()]

    def asked(self) -> list[list[str]]:
        """Every command line."""
        return [json.loads(line) for line in (self.state / "asked").read_text().splitlines()]

    def jobs(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.state.glob("jobs/*/job.json"))]

    def real_parser_takes(self, lines: list[list[str]]) -> str:
        """What SkyPilot's own command line says against them; empty: nothing."""
        code = (
            "import json, sys\nfrom sky.client.cli import command\nimport click\n"
            "for words in json.load(sys.stdin):\n"
            "    group, rest = command.cli, words\n"
            "    try:\n"
            "        while isinstance(group, click.Group):\n"
            "            context = click.Context(group)\n"
            "            name, found, rest = group.resolve_command(context, rest)\n"
            "            group = found\n"
            "        group.make_context(name, list(rest))\n"
            "    except click.UsageError as error:\n"
            "        print(words, error.format_message())\n"
        )
        environment = os.environ | {
            "HOME": str(self.state.parent / "home"),
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            "HF_TOKEN": "x",
        }
        done = subprocess.run(
            [self.python, "-W", "ignore", "-c", code],
            input=json.dumps(lines),
            capture_output=True,
            text=True,
            env=environment,
        )
        return done.stdout + (done.stderr if done.returncode else "")

    def close(self) -> None:
        for path in self.state.glob("jobs/*"):
            (path / "cancel").touch()


def command(sky: Sky) -> str:
    """For FERRY_SKY."""
    return shlex.quote(str(sky.program))
