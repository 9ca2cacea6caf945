"""make on a laptop that has an account."""

import json
from pathlib import Path

from tests.helpers import boxes
from tests.helpers.boxes import Watch
from tests.helpers.chain import SHORT
from tests.helpers.hub import Hub

SECRET = "hf_" + "OnlyAsASecret"


SET = f"SET={SHORT} publish.repo={{user}}/{{run}}-GGUF finetune.save_minutes=0.001"


def watched(laptop: Path, hub: Hub, *words: str, **environment: str) -> Watch:
    """`make` on the laptop, which has an account."""
    settings = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": SECRET, "HF_HOME": str(laptop / "hf"), "HF_HUB_DISABLE_XET": "1",
        "FERRY_HUB_SECONDS": "6", "FERRY_SILENCE_SECONDS": "5",
    }  # fmt: skip
    return Watch(boxes.started_at(laptop, *words, **settings | environment))


def at_step(hub: Hub, step: int) -> bool:
    name = "models/you/boat-checkpoints"
    return (
        bool(hub.refs(name))
        and "state.json" in hub.files(name)
        and json.loads(hub.read(name, "state.json"))["step"] >= step
    )
