"""Every rule of evaluate.rule, and the file of the user's own prompts."""

import itertools
import json
import string

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from contract import answer_rules
from pipeline.config.load import load_config
from pipeline.config.schema import Evaluate
from pipeline.evaluate.stage import read_prompts
from pipeline.scoring import judges
from tests.helpers.commands import refuses

BASE = "base:\n  model: some/model\ndata:\n  source: rows.jsonl\n"
SCHEMA = {"type": "object", "required": ["desk"], "properties": {"desk": {"enum": ["a", "b"]}, "n": {"multipleOf": 0.1}}}  # fmt: skip
ANY = st.text(st.characters())  # lone surrogates too
WORDS = st.lists(st.sampled_from(["the", "A", "an", "cat", "Cat", "sat", "a-b", "ß", "…", " ", ".", "\u2028"])).map(" ".join)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "desk", 10**400, 1e308]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["desk", "n", "x"]), inner),
).map(json.dumps)
ANSWERS = ["[" * 100_000, '{"n":' * 50_000, "NaN", '{"desk":"a","n":NaN}', "-Infinity", "9" * 5000, '{"desk":"a","n":1e999}', '{"desk":"a","n":1' + "0" * 400 + "}", '"\\ud800"', "\ud800", '{"desk":"\udfff"}', "", "\0"]  # fmt: skip
same_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def refused(call, path, code: str, value: str = "") -> None:
    with refuses(code) as error:
        call(path)
    assert str(path) in error.value.message and value in error.value.message
    assert "RUN=name" in error.value.hint


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return judges.create_schema_judge(path)


@pytest.mark.parametrize(
    ("rule", "said", "reference", "points"),
    [
        (answer_rules.exact_match, " Yes\n", "Yes", 1),
        (answer_rules.exact_match, "yes", "Yes", 0),
        (answer_rules.exact_match, "Yes.", "Yes", 0),
        (answer_rules.label_match, '"YES!" ', "yes", 1),
        (answer_rules.label_match, "yes and no", "yes", 0),
        (answer_rules.label_match, "co-op", "coop", 0),
        (answer_rules.word_f1, "The cat sat.", "a cat", 2 / 3),
        (answer_rules.word_f1, "cat cat", "cat", 2 / 3),
        (answer_rules.word_f1, "the", "", 1),
        (answer_rules.word_f1, "cat", "", 0),
        (judges.create_regex_judge("b.*d"), "a b\nc d", "", 1),
        (judges.create_regex_judge("^b"), "a b", "", 0),
    ],
)
def test_an_answer_gets_the_points_its_rule_promises(rule, said, reference, points):
    assert rule(said, reference) == pytest.approx(points)


def test_the_json_schema_rule_wants_json_that_fits(schema):
    points = {'{"desk": "a"}': 1, ' {"desk":"b","n":0.5}\n': 1, '{"desk":"c"}': 0, '{"n":1}': 0, "[]": 0, 'It is {"desk":"a"}': 0}  # fmt: skip
    assert {said: schema(said, "") for said in points} == points


def test_the_config_chooses_the_rule(tmp_path):
    (tmp_path / "s.json").write_text("true")
    assert judges.create_judge(Evaluate()) is None
    assert judges.create_judge(Evaluate(rule="exact")) is answer_rules.exact_match
    assert judges.create_judge(Evaluate(rule="accuracy")) is answer_rules.label_match
    assert judges.create_judge(Evaluate(rule="f1")) is answer_rules.word_f1
    assert judges.create_judge(Evaluate(rule="regex", pattern="^x"))("x", "") == 1
    assert judges.create_judge(Evaluate(rule="json_schema", json_schema=str(tmp_path / "s.json")))("{", "") == 0


@given(ANY | WORDS, ANY | WORDS)
def test_every_rule_gives_0_to_1(said, reference):
    for rule in (
        answer_rules.exact_match,
        answer_rules.label_match,
        answer_rules.word_f1,
        judges.create_regex_judge("a+"),
    ):
        assert 0 <= rule(said, reference) <= 1


@given(ANY | WORDS)
def test_a_text_equals_itself_by_every_rule(text):
    assert (
        answer_rules.exact_match(text, text)
        == answer_rules.label_match(text, text)
        == answer_rules.word_f1(text, text)
        == 1
    )


@given(ANY, st.text(string.punctuation + string.whitespace), st.text(string.punctuation + string.whitespace))
def test_accuracy_ignores_case_and_punctuation_at_the_ends(text, before, behind):
    assert answer_rules.label_match(before + text.casefold() + behind, text) == 1


@given(st.text("ab"), st.text(string.punctuation, min_size=1), st.text("ab"))
def test_accuracy_heeds_punctuation_inside(left, mark, right):
    assert answer_rules.label_match(f"x{left}{mark}{right}y", f"x{left}{right}y") == 0


def squad(said: str, reference: str) -> float:
    """F1 as SQuAD's paper has it: precision and recall over words, written without the rule's own means."""

    def words(text):
        kept = "".join(c for c in text.casefold() if c not in string.punctuation)
        runs = ("".join(run) for _, run in itertools.groupby(kept, str.isalnum))
        return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()

    ours, wanted = words(said), words(reference)
    if not ours or not wanted:
        return float(ours == wanted)
    left, common = list(wanted), 0
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


@given(ANY | WORDS, ANY | WORDS)
@example("a–b the…an", "b a")
def test_f1_is_squads_and_symmetric(said, reference):
    assert answer_rules.word_f1(said, reference) == pytest.approx(squad(said, reference))
    assert answer_rules.word_f1(said, reference) == answer_rules.word_f1(reference, said)


@same_file
@given(said=ANY | JSON)
def test_no_answer_makes_regex_or_json_schema_raise(schema, said):
    for rule in (schema, judges.create_regex_judge(r"\bdesk\b")):
        assert rule(said, "") in (0, 1)


@pytest.mark.parametrize("said", ANSWERS, ids=range(len(ANSWERS)))
def test_no_hostile_answer_makes_regex_or_json_schema_raise(schema, said):
    assert schema(said, "") == 0
    assert judges.create_regex_judge("^x")(said, "") == 0


@pytest.mark.parametrize(
    ("content", "code", "value"),
    [
        (None, "evaluate.unreadable_schema", "No such file"),
        (b"", "evaluate.schema_not_json", "char 0"),
        (b"{'a': 1}", "evaluate.schema_not_json", "char 1"),
        (b"\xff\xfe{}", "evaluate.unreadable_schema", "0xff"),
        (b'{"type": "objekt"}', "evaluate.bad_schema", "'objekt'"),
        (b'{"pattern": "("}', "evaluate.bad_schema", "'regex'"),
        (b"[]", "evaluate.bad_schema", ""),
        (b"3", "evaluate.bad_schema", ""),
        (b"null", "evaluate.bad_schema", ""),
        (b'{"$schema": ["x"]}', "evaluate.bad_schema", ""),
        (b"[" * 100_000, "evaluate.schema_not_json", "recursion"),
    ],
    ids=range(11),
)
def test_a_broken_schema_file_is_one_error_that_names_it(tmp_path, content, code, value):
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_bytes(content)
    refused(judges.create_schema_judge, path, code, value)


def test_a_folder_is_no_schema_file(tmp_path):
    refused(judges.create_schema_judge, tmp_path, "evaluate.unreadable_schema", "Is a directory")


@pytest.mark.parametrize("ref", ["#/$defs/none", "none.json", "file:///etc/hostname", "http://127.0.0.1:9/s.json"])
def test_a_ref_that_leads_out_of_the_schema_is_one_error_and_nothing_is_fetched(tmp_path, ref, recwarn):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"properties": {"a": {"$ref": ref}}}))
    refused(lambda path: judges.create_schema_judge(path)('{"a": 1}', ""), path, "evaluate.unresolved_ref", ref)
    assert not [w for w in recwarn if "remote" in str(w.message).lower()]


def test_a_schema_may_begin_with_a_bom_and_name_a_draft(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('\ufeff{"$schema": "http://json-schema.org/draft-07/schema#", "items": {"$ref": "#/definitions/n"}, "definitions": {"n": {"type": "number"}}}')  # fmt: skip
    assert [judges.create_schema_judge(path)(said, "") for said in ("[1]", '["x"]')] == [1, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('  rule: regex\n  pattern: "("\n', "evaluate: pattern is not a valid regular expression: missing )"),
        ("  rule: regex\n", "evaluate: rule regex needs pattern"),
        ("  rule: json_schema\n", "evaluate: rule json_schema needs json_schema"),
        ("  rule: exactly\n", "evaluate.rule"),
    ],
)
def test_the_config_refuses_an_unusable_rule_with_its_line(tmp_path, text, expected):
    path = tmp_path / "c.yaml"
    path.write_text(BASE + "evaluate:\n" + text)
    with refuses("config.invalid") as error:
        load_config(path)
    line = 6 if expected.startswith("evaluate.rule") else 5
    assert f"c.yaml:{line}: {expected}" in error.value.message


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_prompts_are_one_a_line_blank_lines_and_bom_apart(tmp_path, name):
    path, wanted = tmp_path / name, ["Hi", "  Wörld {1}\u2028second\x85third "]
    lines = [json.dumps({"prompt": p, "x": 1}, ensure_ascii=False) if name == "p.jsonl" else p for p in wanted]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n\r\n".join(lines).encode() + b"\n\n")
    assert read_prompts(path) == wanted


@pytest.mark.parametrize(
    ("name", "content", "code", "value"),
    [
        ("p.txt", None, "evaluate.unreadable_prompts", "No such file"),
        ("p.txt", b"", "evaluate.no_prompts", ""),
        ("p.txt", b"\xef\xbb\xbf \n\t\n", "evaluate.no_prompts", ""),
        ("p.txt", b"Hi\n\xff\xfe\n", "evaluate.unreadable_prompts", "0xff"),
        ("p.jsonl", b"\n", "evaluate.no_prompts", ""),
        ("p.jsonl", b'{"prompt": "Hi"}\nHi\n', "evaluate.bad_prompt", "char 0"),
        ("p.jsonl", b'{"question": "Hi"}\n', "evaluate.bad_prompt", '"prompt"'),
        ("p.jsonl", b'["prompt"]\n', "evaluate.bad_prompt", '"prompt"'),
        ("p.jsonl", b'"prompt"\n', "evaluate.bad_prompt", '"prompt"'),
        ("p.jsonl", b"3\n", "evaluate.bad_prompt", '"prompt"'),
        ("p.jsonl", b'{"prompt": null}\n', "evaluate.bad_prompt", '"prompt"'),
        ("p.jsonl", b'{"prompt": ["Hi"]}\n', "evaluate.bad_prompt", '"prompt"'),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "evaluate.bad_prompt", "ud800"),
        ("p.jsonl", b"[" * 100_000, "evaluate.bad_prompt", "recursion"),
    ],
    ids=range(14),
)
def test_an_unusable_prompt_file_is_one_error_that_names_it(tmp_path, name, content, code, value):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(read_prompts, path, code, value)


def test_a_folder_is_no_prompt_file(tmp_path):
    refused(read_prompts, tmp_path, "evaluate.unreadable_prompts", "Is a directory")


LINES = st.lists(JSON | st.builds(lambda p: json.dumps({"prompt": p}), ANY | JSON | st.integers()))


@same_file
@given(content=st.binary() | st.text().map(str.encode) | LINES.map(lambda lines: "\n".join(lines).encode()))
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_any_bytes_are_prompts_or_one_error(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    try:
        prompts = read_prompts(path)
    except UserError as error:
        assert error.code in ("evaluate.unreadable_prompts", "evaluate.no_prompts", "evaluate.bad_prompt")
        assert str(path) in error.message and "RUN=name" in error.hint
    else:
        assert prompts and all(isinstance(prompt, str) and prompt.encode() is not None for prompt in prompts)
