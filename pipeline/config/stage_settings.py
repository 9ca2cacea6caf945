"""Which stage each setting of the config belongs to: the first one whose result depends on it.

Every later stage is made from the earlier ones' records, so a changed setting makes its stage and all that follow stale.
"""

import hashlib
import json

from pipeline.config.schema import Config

# The first stage that a section matters to, and where a single setting matters only later.
STAGE_OF_SECTION = {
    "base": "data", "data": "data", "clean": "data", "finetune": "finetune", "evaluate": "evaluate", "export": "export",
    "verify": "verify", "generation": "verify", "publish": "publish",
}  # fmt: skip
STAGE_OF_SETTING = {"generation.temperature": "publish", "generation.top_p": "publish"}
# They change what a training says and keeps on the way, not what comes of it: a run goes on with other ones.
ONLY_ON_THE_WAY = ("finetune.save_minutes", "finetune.save_steps", "finetune.logging_steps", "finetune.report_to")


def stage_of_setting(name: str) -> str | None:
    """The first stage whose result depends on a setting such as `export.imatrix`; None where no result does."""
    if name in ONLY_ON_THE_WAY:
        return None
    return STAGE_OF_SETTING.get(name, STAGE_OF_SECTION[name.split(".")[0]])


def settings_of_stage(config: Config, stage: str) -> dict[str, object]:
    """{name: value} of the settings that belong to `stage`, as JSON has them."""
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
        if stage_of_setting(f"{section}.{key}") == stage
    }


def hash_training_settings(config: Config) -> str:
    """sha256 of all settings that the rows and the training depend on: two configs with the same one train the same model."""
    settings = settings_of_stage(config, "data") | settings_of_stage(config, "finetune")
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
