"""kill -9 at any moment, then the same command: it goes on and ends with a valid manifest. Real weights, no network."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from common import files
from contract import manifest
from deploy.stages import pull
from tests.helpers.chain import Chain

pytestmark = pytest.mark.slow  # trains


@pytest.fixture(scope="module")
def offline(source, request) -> list[str]:
    """What stands before a command to take the network away from it (Linux, if it lets us): set-up is over by now."""
    from pipeline.base_model import restore_gguf

    restore_gguf.prepare_weights(source)
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        return alone if subprocess.run([*alone, "true"], capture_output=True).returncode == 0 else []
    except OSError:
        return []


def killed(chain: Chain, ready, kill=signal.SIGKILL, limit: float = 600) -> str:
    """Start `make train`, kill all of it once `ready()` holds; returns what it printed."""
    process = chain.start("train")
    until = time.monotonic() + limit
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    assert process.poll() is None, f"make ended before it could be killed:\n{process.stdout.read()}"
    os.killpg(process.pid, kill)
    printed = process.communicate()[0]
    assert ready(), printed
    return printed


def exists(folder: Path, pattern: str):
    return lambda: any(folder.glob(pattern))


@pytest.mark.release  # 3 to 4 minutes; a training that is killed is in tests/pipeline/finetune/ too
def test_kill_at_any_moment_then_go_on(tmp_path, offline):
    chain = Chain(tmp_path, "killed", offline)
    run = chain.run
    moments = {
        "data has frozen the config": exists(run, "config.yaml"),
        "training has its first checkpoint": exists(run, "finetune/checkpoints/checkpoint-8/ferry-complete"),
        "a later checkpoint is half written": exists(run, "finetune/checkpoints/checkpoint-16/*"),
        "the adapter is being written": exists(run, "finetune/.adapter.part"),
        "evaluation runs": exists(run, "finetune.json"),
        "the merge is being written": exists(run, "export/.merged.part"),
        "the f16 GGUF is being written": exists(run, "export/.killed.f16.gguf.part"),
        "the importance matrix is computed": exists(run, "export/imatrix.txt"),
        "the quantized GGUF is being written": exists(run, "export/.killed.q4_k_m.gguf.part"),
        "verification runs": exists(run, "export.json"),
        "the hub has the GGUF, no manifest yet": exists(chain.hub, "*.gguf"),
    }
    for moment, ready in moments.items():
        printed = killed(chain, ready)
        assert "Traceback" not in printed, f"{moment}: {printed}"
        finals = [path for path in run.rglob("*.gguf") if not path.name.startswith((".", "imatrix"))]
        assert all(path.stat().st_size > 10**8 for path in finals), moment
        assert not (chain.hub / manifest.FILE_NAME).exists(), f"{moment}: a manifest before the end"
    done = chain.make("train")
    assert done.returncode == 0, done.stdout + done.stderr
    assert files.read_json(run / "finetune.json")["resumed_from"].startswith("checkpoint-")
    assert files.read_json(run / "finetune.json")["steps"] == 30
    made = manifest.read_manifest(chain.hub / manifest.FILE_NAME)
    assert pull.run_pull(str(chain.hub), tmp_path / "model")["sha256"] == made.default_artifact().sha256
    assert not list(run.rglob(".*.part")), "what killed runs left is cleaned up"


def test_ctrl_c_leaves_no_half_file(tmp_path):
    chain = Chain(tmp_path, "stopped")
    printed = killed(chain, exists(chain.run, "finetune/checkpoints/checkpoint-*/ferry-complete"), signal.SIGINT)
    assert "Traceback" not in printed and "stopped; the same command resumes from here" in printed
    assert not (chain.run / "finetune.json").exists()
    assert not list(chain.run.rglob(".*.part"))
