"""Tell which stage each setting of the config belongs to: the first one whose result depends on it.

Every later stage is made from the records of the earlier ones. A changed setting therefore makes its stage and all
stages after it stale.
"""

import hashlib
import json

from pipeline.config.schema import Config

# The first stage whose result depends on a section, and the single settings that matter only to a later one.
STAGE_OF_SECTION = {
    "base": "data", "data": "data", "clean": "data", "finetune": "finetune", "evaluate": "evaluate", "export": "export",
    "verify": "verify", "generation": "verify", "publish": "publish",
}  # fmt: skip
STAGE_OF_SETTING = {"generation.temperature": "publish", "generation.top_p": "publish"}
# These change what a training logs and which checkpoints it keeps, not its result: a run resumes when they differ.
RESULT_NEUTRAL_SETTINGS = (
    "finetune.save_minutes",
    "finetune.save_steps",
    "finetune.logging_steps",
    "finetune.report_to",
)


def stage_of_setting(name: str) -> str | None:
    """Return the first stage whose result depends on a setting such as `export.imatrix`; None where no result does."""
    if name in RESULT_NEUTRAL_SETTINGS:
        return None
    return STAGE_OF_SETTING.get(name, STAGE_OF_SECTION[name.split(".")[0]])


def settings_of_stage(config: Config, stage: str) -> dict[str, object]:
    """Return {name: value} of the settings that belong to `stage`, with values as JSON holds them."""
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
        if stage_of_setting(f"{section}.{key}") == stage
    }


def hash_training_settings(config: Config) -> str:
    """Return the sha256 of all settings that the rows and the training depend on.

    Two configs with the same hash train the same model.
    """
    settings = settings_of_stage(config, "data") | settings_of_stage(config, "finetune")
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
