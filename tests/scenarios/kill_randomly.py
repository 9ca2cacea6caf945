"""kill -9 at random moments of the whole chain and of deploy-mac, then the same command: the same weights, bit for bit.

    python tests/scenarios/kill_randomly.py 30 10 [SEED]      # kills of `make train`, kills of `make deploy-mac`; half an hour on two cores

tests/scenarios/test_kill.py kills at eleven chosen moments in CI; this one draws them.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import files, gguf_reader
from deploy import store
from tests.helpers.chain import Chain
from tests.helpers.commands import MAKE, ROOT, typed_environment


def weights_of(chain: Chain) -> dict[str, str]:
    """sha256 of the adapter, and of the tensor data of each GGUF: headers hold times and scores."""
    found = {"adapter": files.sha256(chain.run / "finetune" / "adapter" / "adapter_model.safetensors")}
    for path in sorted(chain.hub.glob("*.gguf")):
        found[path.name] = gguf_reader.weights_sha256(path, gguf_reader.read_header(path))
    return found


def run_and_kill(words: list[str], moment: float | None) -> tuple[bool, str]:
    """Start a command, kill all of it after `moment` seconds; whether it ended before, and the last line that it printed."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, env=typed_environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()]
    assert code in (0, None), "\n".join(lines[-15:])
    return code == 0, lines[-1] if lines else "nothing printed yet"


def train_with_kills(folder: Path, rng: random.Random, longest: float, left: int) -> tuple[dict[str, str], list[str]]:
    """The weights of a chain that is killed at random moments, at most `left` times, and where it was killed."""
    chain, kills = Chain(folder), []
    while True:
        moment = rng.uniform(0.5, longest) if len(kills) < left else None
        done, last = run_and_kill([*MAKE, *chain.settings, "train"], moment)
        if done:
            return weights_of(chain), kills
        kills.append(f"{moment:.1f} s: {last[:90]}")
        print("  killed after", kills[-1], flush=True)


def deploy_with_kills(hub: Path, folder: Path, rng: random.Random, longest: float, count: int) -> list[str]:
    """Kill deploy-mac at random moments, each time from an empty store, and let it end; where it was killed."""
    kills = []
    while len(kills) < count:
        models = folder / f"models-{len(kills)}"
        words = [*MAKE, f"MODELS={models}", f"REPO={hub}", "deploy-mac"]
        moment = rng.uniform(0.2, longest)
        done, last = run_and_kill(words, moment)
        if done:
            shutil.rmtree(models)
            continue
        kills.append(f"{moment:.1f} s: {last[:90]}")
        print("  killed after", kills[-1], flush=True)
        run_and_kill(words, None)
        version, path = store.load_tested(store.current_version(models / hub.name))
        assert version.find_artifact(path.name).sha256 == files.sha256(path)
        assert not list(models.rglob("*.part")), "nothing half done stays"
        shutil.rmtree(models)
    return kills


def main(trainings: int, deployments: int, seed: int = 3407) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ferry-kills-") as name:
        folder = Path(name)
        started = time.monotonic()
        wanted, _ = train_with_kills(folder / "undisturbed", rng, 1, 0)
        whole = time.monotonic() - started
        print(f"undisturbed: {whole:.0f} s, {wanted}", flush=True)
        killed, number = 0, 0
        while killed < trainings:
            number += 1
            found, kills = train_with_kills(folder / f"chain-{number}", rng, whole / 2, trainings - killed)
            killed += len(kills)
            same = "the same weights" if found == wanted else f"OTHER WEIGHTS: {found}"
            print(f"chain {number}: {len(kills)} kills, {same}", flush=True)
            shutil.rmtree(folder / f"chain-{number}")
        hub = folder / "undisturbed" / "hub" / "chain"
        started = time.monotonic()
        run_and_kill([*MAKE, f"MODELS={folder / 'models'}", f"REPO={hub}", "deploy-mac"], None)
        kills = deploy_with_kills(hub, folder, rng, time.monotonic() - started, deployments)
        print(f"deploy-mac: {len(kills)} kills, each ended with the published file; {killed} kills of train")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:] if re.fullmatch(r"\d+", word)))
