"""A changed setting runs again what depends on it, and nothing else; a second command does not get into a run."""

import shutil
import types
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline.config.schema import Config
from pipeline.run import checkpoint_files
from pipeline.run.changes import apply_config, find_allowed_changes, find_changes
from pipeline.run.run_folder import STAGES, Run
from tests.helpers.commands import refuses

# What the issue of each section is: the stages that a change of it makes again; None where it makes another model.
AGAIN = {
    "base": None, "data": None, "clean": None, "finetune": None,
    "evaluate": ["evaluate", "export", "verify", "publish"], "export": ["export", "verify", "publish"],
    "verify": ["verify", "publish"], "generation": ["verify", "publish"], "publish": ["publish"],
}  # fmt: skip
NOTHING = ["finetune.save_minutes", "finetune.save_steps", "finetune.logging_steps", "finetune.report_to"]
ONLY_PUBLISH = ["generation.temperature", "generation.top_p"]
# Values that another field asks for, or that are no default of their own.
OTHER = {
    "finetune.loftq_bits": None, "evaluate.json_schema": "another.json", "evaluate.pattern": "x+", "evaluate.rule": "accuracy",
    "data.date": "2025-01-01", "data.template": "chatml", "base.load_in_4bit": None,
}  # fmt: skip
KEYS = [f"{section}.{key}" for section, field in Config.model_fields.items() for key in field.annotation.model_fields]


def another_value(section: type[BaseModel], key: str, value: object) -> list[object]:
    """Values of the field's type that are not `value`; some of them may be refused."""
    annotation = section.model_fields[key].annotation
    kinds = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    kinds = [typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind for kind in kinds]
    found: list[object] = [
        option for kind in kinds if typing.get_origin(kind) is typing.Literal for option in typing.get_args(kind)
    ]
    if isinstance(value, bool) or bool in kinds:
        found.append(not value)
    if isinstance(value, int | float) or {int, float} & set(kinds):
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else 1
        found += [number + 1, number + 16, number / 2, 0.5, 2048, 4096]
    if isinstance(value, str) or str in kinds:
        found.append("another")
    if isinstance(value, tuple | list) or any(typing.get_origin(kind) in (tuple, list) for kind in kinds):
        found += [["q8_0"], ["q_proj"], ["another"]]
    if isinstance(value, dict):
        found.append({"question": "ask"})
    return [option for option in found if option != value and option is not None]


def change(config: Config, name: str) -> Config:
    """The config with another valid value for that key."""
    section, key = name.split(".")
    tree = config.model_dump()
    if key == "early_stopping_patience":  # needs held-out losses
        tree["finetune"]["eval_strategy"] = "epoch"
    options = (
        [OTHER[name]] if OTHER.get(name) else another_value(type(getattr(config, section)), key, tree[section][key])
    )
    for option in options:
        try:
            found = Config.model_validate(tree | {section: tree[section] | {key: option}})
        except ValueError:
            continue
        if found != config:
            return found
    raise AssertionError(f"no other value for {name} was found")


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory) -> Run:
    """A copy of the finished run, by links."""
    copy = tmp_path_factory.mktemp("changes") / "chain"
    shutil.copytree(chain.run, copy, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return Run(copy)


def test_all_keys_are_looked_at():
    assert len(KEYS) > 70 and {name.split(".")[0] for name in KEYS} == set(AGAIN)


@pytest.mark.parametrize("name", KEYS)
def test_a_changed_setting_runs_again_what_depends_on_it(run, name):
    config = run.read_config()
    assert not find_changes(run, config).stale
    changes = find_changes(run, change(config, name))
    expected = [] if name in NOTHING else ["publish"] if name in ONLY_PUBLISH else AGAIN[name.split(".")[0]]
    if expected is None:
        assert any(fault.startswith(f"{name}: ") for fault in changes.faults)
        with refuses("run.changed") as error:
            find_allowed_changes(run, change(config, name), is_own_config=False)
        assert f"{name}: " in error.value.message and "RUN=chain.v2" in error.value.hint
    else:
        assert list(changes.stale) == expected and not changes.faults


@pytest.mark.parametrize("name", ["evaluate.max_rows", "export.imatrix", "verify.max_extra_loss", "publish.private"])
def test_only_stale_records_go_and_the_new_config_is_frozen(chain, tmp_path, name):
    copy = tmp_path / "chain"
    shutil.copytree(chain.run, copy, copy_function=lambda a, b: Path(b).hardlink_to(a))
    run = Run(copy)
    config = change(run.read_config(), name)
    changes = find_allowed_changes(run, config, is_own_config=False)
    apply_config(run, config, changes)
    [sentence] = changes.describe_reruns()
    stale = AGAIN[name.split(".")[0]]
    assert [stage for stage in STAGES if not run.is_done(stage)] == stale and name in sentence
    assert run.read_config() == config and (chain.run / "publish.json").is_file()


def test_a_changed_export_setting_does_not_train_again(chain, tmp_path):
    """By make, to the end: what was trained, scored and converted stays as it is."""
    done = chain.make("check", change="generation.top_p=0.8")
    assert done.returncode == 0 and "publish runs again: generation.top_p: 0.9 in the run, 0.8 now" in " ".join(
        done.stdout.split() + done.stderr.split()
    )
    assert (chain.run / "publish.json").is_file(), "check changes nothing"


def test_an_edit_of_the_frozen_config_is_noticed(run, tmp_path):
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "chain", copy_function=lambda a, b: Path(b).hardlink_to(a))))
    text = copy.config_file.read_text()
    copy.config_file.unlink()
    copy.config_file.write_text(text.replace("top_p: 0.9", "top_p: 0.8"))
    edited = copy.read_config()
    with refuses("run.edited_config") as error:
        find_allowed_changes(copy, run.read_config(), is_own_config=False)
    assert str(copy.config_file) in error.value.message
    assert "publish runs again" in find_allowed_changes(copy, edited, is_own_config=True).describe_reruns()[0]


def test_a_second_make_changes_nothing_and_names_the_first(chain):
    assert [intrusion.stage for intrusion in chain.intrusions] == list(STAGES)
    for intrusion in chain.intrusions:
        error = intrusion.done.stderr
        assert intrusion.done.returncode == 2 and error.count("error: ") == 1 and "Traceback" not in error
        assert "make train" in error and "pid" in error, error
        assert intrusion.before == intrusion.after and intrusion.before, intrusion.stage


def test_a_checkpoint_without_its_optimizer_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint-8"
    checkpoint.mkdir()
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"):
        (checkpoint / name).write_bytes(b"x")
    checkpoint_files.mark_complete(checkpoint, 8)
    assert checkpoint_files.prune_and_find_checkpoint(tmp_path) == checkpoint
    (checkpoint / "optimizer.pt").unlink()
    with refuses("checkpoints.missing_file") as error:
        checkpoint_files.prune_and_find_checkpoint(tmp_path)
    assert "optimizer.pt" in error.value.message and "scheduler.pt" not in error.value.message
