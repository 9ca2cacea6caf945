"""One run of the whole chain, `make train` and `make deploy-mac`, on the demo with a shorter training."""

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.commands import MAKE, ROOT, make, typed_environment

# A real training, shorter than the demo's: enough to see that it learns, not to reach the demo's score. Of 24 answers one
# may turn, which is 4 points. (The gate's own limit of 2 points is tested in tests/scenarios/test_gates.py.)
SHORT = (
    "finetune.max_steps=30 finetune.save_steps=8 evaluate.max_rows=24 verify.min_score=0.05 verify.max_score_drop=0.05 "
    "export.imatrix_tokens=2048"
)


class Chain:
    """Folders and settings of one run of the whole chain."""

    def __init__(self, folder: Path, run: str = "chain", prefix: Sequence[str] = ()):
        self.folder, self.run, self.prefix = folder, folder / "runs" / run, list(prefix)
        self.hub, self.model = folder / "hub" / run, folder / "models" / run / "current"
        near = os.path.relpath(folder, ROOT)  # as a user's `make` has it: relative to the checkout
        self.settings = [
            "CONFIG=configs/demo.yaml", f"RUN={run}", f"RUNS={near}/runs", f"SET={SHORT} publish.repo={folder}/hub/{{run}}",
        ]  # fmt: skip
        self.deploy_settings = [f"MODELS={near}/models", f"REPO={self.hub}"]

    def make(self, target: str, *arguments: str, change: str = "") -> subprocess.CompletedProcess:
        """change: settings of the config that are other than the chain's, as SET= takes them."""
        settings = (
            self.deploy_settings
            if target == "deploy-mac"
            else [*self.settings[:-1], f"{self.settings[-1]} {change}".strip()]
        )
        return make(*settings, target, *arguments, prefix=self.prefix)

    def start(self, *arguments: str) -> subprocess.Popen:
        """The same in a process group of its own, to be killed."""
        command = [*self.prefix, *MAKE, *self.settings, *arguments]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=typed_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@dataclass
class Intrusion:
    """A second `make` on the run while the first one works in a stage."""

    stage: str
    done: subprocess.CompletedProcess
    pid: int  # of the first one's `make`
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (time of change, bytes)}"""
    found = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    return {str(path): (state.st_mtime_ns, state.st_size) for path, state in found}


def train_with_intrusions(chain: Chain) -> tuple[str, list[Intrusion]]:
    """`make train`, held still at the beginning of each stage while a second `make train` is tried."""
    process, printed, intrusions = chain.start("train"), [], []
    for line in process.stdout:
        printed.append(line)
        if found := re.match(r"\[\d/6\] ([a-z]+)$", line):
            os.killpg(process.pid, signal.SIGSTOP)
            before = list_files(chain.run)
            done = chain.make("train")
            intrusions.append(Intrusion(found[1], done, process.pid, before, list_files(chain.run)))
            os.killpg(process.pid, signal.SIGCONT)
    assert process.wait() == 0, "".join(printed)
    return "".join(printed), intrusions
