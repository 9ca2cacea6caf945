"""One set of rules: what a config accepts, a manifest holds, a card says and a Modelfile takes."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import manifest
from deploy.stages import modelfile
from pipeline.config import load, schema, yaml_tree
from pipeline.config.schema import Config
from pipeline.publish import model_card
from tests.fuzzing.inputs import published
from tests.helpers.commands import refuses

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=200).filter(str.strip)
LONG_TEXT = st.one_of(TEXT, st.text('ab \n"{}$`<|é', min_size=1, max_size=2000).filter(str.strip))
GENERATION = st.fixed_dictionaries({}, optional={
    "temperature": st.one_of(st.floats(0, 100), st.integers(0, 100)),
    "top_p": st.floats(0, 1, exclude_min=True),
    "num_ctx": st.integers(64, 1 << 24),
    "max_tokens": st.integers(1, 1 << 24),
    "smoke_prompts": st.lists(LONG_TEXT, min_size=1, max_size=32),
})  # fmt: skip
TREES = st.fixed_dictionaries({
    "base": st.fixed_dictionaries(
        {"model": st.from_regex(r"[A-Za-z0-9][\w.-]{0,40}/[A-Za-z0-9][\w.-]{0,40}", fullmatch=True, alphabet=st.characters(codec="ascii"))},
        optional={"max_seq_length": st.integers(16, 1 << 24), "license": TEXT, "revision": TEXT},
    ),
    "data": st.fixed_dictionaries({"source": TEXT}, optional={"system": LONG_TEXT, "split": TEXT, "validation": TEXT, "date": st.dates().map(str)}),
    "finetune": st.fixed_dictionaries({}, optional={
        "r": st.integers(1, 4096), "learning_rate": st.floats(0, 1, exclude_min=True), "seed": st.integers(0, (1 << 32) - 1),
        "max_steps": st.none() | st.integers(1, 10**7), "lora_alpha": st.floats(0, 1e6, exclude_min=True),
    }),
    "evaluate": st.fixed_dictionaries({}, optional={"rule": st.sampled_from(["exact", "accuracy", "f1", "loss"]), "max_new_tokens": st.integers(1, 1 << 24)}),
    "generation": GENERATION,
})  # fmt: skip


def accepted(tree: dict) -> Config | None:
    try:
        return Config.model_validate(tree)
    except ValueError:
        return None


def publish(tree: Config) -> dict:
    """The manifest's JSON as `publish` and `verify` put it together from a config."""
    value = published()
    value["config"] = tree.model_dump(mode="json")
    made = tree.generation
    value["generation"] = {
        "temperature": made.temperature, "top_p": made.top_p, "max_tokens": made.max_tokens, "num_ctx": made.num_ctx or tree.base.max_seq_length,
    }  # fmt: skip
    value["base"] |= {"model": tree.base.model, "revision": tree.base.revision, "license": tree.base.license}
    value["dataset"] |= {
        "source": tree.data.source,
        "split": tree.data.validation or f"{tree.data.validation_share:g} of the rows, by content hash",
    }
    value["golden"] = []
    value["chat"]["system"] = None if tree.data.system in schema.SYSTEM_PROMPT_KEYWORDS else tree.data.system
    value["smoke"] = [value["smoke"][0] | {"message": text} for text in made.smoke_prompts or ("hi",)]
    return value


@given(TREES)
@settings(max_examples=300, deadline=None)
def test_a_config_that_is_accepted_can_be_published(tree):
    found = accepted(tree)
    if found is None:
        return
    made = manifest.parse_manifest(json.dumps(publish(found)).encode(), "published")
    assert Config.model_validate(made.config) == found, "the published config is the one that was used"
    assert model_card.render_model_card(made, "ladder", "you/x", True)
    assert "FROM ./" in modelfile.render_modelfile(made, made.default_artifact())


@given(TREES)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_as_the_same(tree):
    found = accepted(tree)
    if found is not None:
        text = load.dump_config(found)
        assert load.build_config(*yaml_tree.parse_yaml(text, "dump"), SimpleNamespace()) == found


@pytest.mark.parametrize(("setting", "value"), [
    ("generation.temperature", 100.1), ("generation.temperature", 1000), ("generation.temperature", float("inf")), ("generation.max_tokens", 10**9),
    ("generation.num_ctx", 1 << 25), ("base.max_seq_length", 1 << 25), ("generation.top_p", 1.5), ("generation.smoke_prompts", ["x"] * 33),
    ("generation.smoke_prompts", ["x" * 40_000]), ("data.system", "x" * 40_000), ("generation.smoke_prompts", []), ("base.license", "x" * 5000),
])  # fmt: skip
def test_what_a_manifest_forbids_the_config_refuses(setting, value):
    section, key = setting.split(".")
    tree = {"base": {"model": "a/b"}, "data": {"source": "x.jsonl"}}
    tree.setdefault(section, {})[key] = value
    assert accepted(tree) is None


def test_what_a_reader_would_refuse_is_not_written(tmp_path):
    made = manifest.Manifest.model_validate(published())
    manifest.write_manifest(tmp_path / "manifest.json", made)
    assert manifest.read_manifest(tmp_path / "manifest.json") == made
    broken = made.model_copy(update={"training": {"final_loss": float("nan")}})
    with refuses("manifest.not_json") as error:
        manifest.write_manifest(tmp_path / "other.json", broken)
    assert "NaN" in error.value.message and str(tmp_path / "other.json") in error.value.message
    assert not (tmp_path / "other.json").exists()
