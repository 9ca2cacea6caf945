"""Ollama's TEMPLATE gives the trained prompt: Turns derived from real templates, rendered by Go's own text/template."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contract import chat_format
from contract.ollama_template import Turns, find_modelfile_fault, merge_consecutive_messages
from deploy.stages import modelfile
from docs import templates as page
from pipeline.verify import derive_template, golden_prompts
from tests.helpers.commands import refuses
from tests.helpers.go_template import Go

pytestmark = pytest.mark.slow  # hundreds of templates in Go


def case(name: str) -> page.Case:
    return next(case for case in page.cases() if case.name == name)


@pytest.fixture(scope="module")
def every(trained_format) -> list[page.Case]:
    """All real templates, and the one inside the demo's base."""
    return [*page.cases(), page.derived("SmolLM2", *trained_format)]


def same_in_go(found: page.Case, go: Go) -> list[str]:
    """Golden conversations whose prompt is another one in Go."""
    template = found.turns.to_go_template()
    return [
        f"{found.name}: {item['messages']}" for item in found.asking if go(template, item["messages"]) != item["prompt"]
    ]


# Real templates


def test_what_is_derived_gives_the_trained_prompt_in_go_and_the_rest_has_a_reason(every, go):
    proven = [found for found in every if found.turns]
    assert [different for found in proven for different in same_in_go(found, go)] == []
    assert len(proven) >= 40 and min(len(found.asking) for found in proven) >= 9
    assert [found.name for found in every if not found.turns and not found.reasons] == []


DERIVED = [
    "google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct", "SmolLM2", "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct", "Qwen-Qwen2.5-7B-Instruct",
    *(f"{name} (Ferry's)" for name in page.template_families.NAMED),
]  # fmt: skip


@pytest.mark.parametrize("name", DERIVED)
def test_the_usual_templates_are_derived(name, every):
    found = next(found for found in every if found.name == name)
    assert found.turns and set(found.reasons) <= {"it has tools", "it has thinking"}


def test_the_bos_is_left_to_llama_cpp(every):
    adding = [found for found in every if found.turns and found.adds]
    assert len(adding) > 15
    for found in adding:
        bos = found.trained.tokenizer.bos_token
        assert not found.turns.to_go_template().count(bos) and not found.turns.render_prompt([user("Hi")]).startswith(
            bos
        )


FIELDS = [
    ("start",),
    *((field, at) for field in ("system", "user", "assistant", "marker") for at in (0, 1)),
    ("generate",),
]


SHAPES = {
    "own": "alpaca (Ferry's)",
    "first": "microsoft-Phi-3.5-mini-instruct",
    "last": "mistralai-Mistral-Nemo-Instruct-2407",
}


@pytest.mark.parametrize(
    ("place", "field"),
    [(place, field) for place in SHAPES for field in FIELDS if place == "own" or field[0] != "marker"],
)
def test_a_newline_more_in_any_field_is_noticed(place, field):
    found = case(SHAPES[place])
    value = getattr(found.turns, field[0])
    longer = value + "\n" if len(field) == 1 else tuple(text + "\n" * (i == field[1]) for i, text in enumerate(value))
    assert found.turns.place == place and derive_template.can_reproduce(found.turns, found.asking)
    assert not derive_template.can_reproduce(found.turns.model_copy(update={field[0]: longer}), found.asking)


@pytest.mark.parametrize("name", ["google-gemma-2-2b-it", "chatml (Ferry's)"])
def test_trimming_otherwise_is_noticed(name):
    found = case(name)
    for role in ("user", "assistant"):
        changed = set(found.turns.trimmed) ^ {role}
        assert not derive_template.can_reproduce(
            found.turns.model_copy(update={"trimmed": tuple(changed)}), found.asking
        )


def test_no_switch_of_a_runtime_makes_a_trained_template_think():
    """Ollama and llama.cpp's server set these by themselves wherever a template can think."""
    trained = [found.trained for found in page.cases() if found.trained]
    assert sum("think" in one.tokenizer.chat_template for one in trained) > 20
    for one in trained:
        bos, eos = one.tokenizer.bos_token or "", one.tokenizer.eos_token or ""
        for item in one.golden:
            said = item["messages"], bos, eos, item["add_generation_prompt"]
            text = chat_format.render(one.tokenizer.chat_template, *said, enable_thinking=True, thinking=True)
            assert text == item["prompt"]


def test_the_page_of_templates_is_what_the_script_would_write():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run `python docs/templates.py`"


# Templates that no TEMPLATE can say


def user(words: str) -> dict:
    return {"role": "user", "content": words}


MACRO = "{% macro plain(text) %}{{ text }}{% endmacro %}"


def chatml(words: str) -> str:
    """ChatML that says `words` for a message `m`."""
    return (
        f"{MACRO}{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\n' }}}}{words}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def derived(template: str) -> tuple[Turns | None, list[str]]:
    def render(messages: Sequence[dict], prompt: bool) -> str:
        return chat_format.render(template, messages, add_generation_prompt=prompt)

    wanted = [{"messages": m, "prompt": render(m, True)} for m in golden_prompts.build_conversations("</s>")]
    return derive_template.derive_turns(render, template, wanted)


MORE = "the text around a message depends on more than its role"
# What is said of a message `m` -> the reason
CASES = {
    "{{ m.content if m.role == 'user' else m.content.split('>')[-1] }}": "it uses split in what the assistant said",
    "{{ '!' if m.content.startswith('/') }}{{ m.content }}": "it uses startswith in what the user said",
    "{{ '!' if '</think>' in m.content }}{{ m.content }}": "it looks for '</think>' in what the assistant said",
    "{{ m.content.replace('/no_think', '') }}": "it uses replace in what the system said",
    "{{ m.content | upper }}": "it uses upper in what the user said",
    "{{ '!' if 'a' in m.content or 'b' in m.content }}{{ m.content }}": "it looks for 'b' in what the user said",
    "{{ '!' if '/quiet' in plain(m.content) }}{{ m.content }}": "it looks for '/quiet' in what the user said",
    "{{ '!' if m.content == 'ping' }}{{ m.content }}": "it looks for 'ping' in what the assistant said",
    "{{ raise_exception('') if plain(m.content) == 'it' }}{{ m.content }}": "it looks for 'it' in what the system said",
    "{{ m.content + m.content }}": "it drops or repeats messages",
    "{{ m.content if loop.last }}": "it drops or repeats messages",
    "{{ loop.index ~ m.content }}": MORE,
    "{{ m.content }}{{ '!' if loop.revindex == 3 }}": MORE,
    "{{ '!' if m.role == 'assistant' and loop.index < 3 }}{{ m.content }}": MORE,
}  # fmt: skip


@pytest.mark.parametrize(("words", "reason"), CASES.items())
def test_what_depends_on_more_than_roles_is_not_derived_and_the_reason_says_what(words, reason):
    turns, reasons = derived(chatml(words))
    assert turns is None and reason in reasons


def test_the_same_template_without_that_is_derived():
    assert derived(chatml("{{ m.content }}")) == (
        Turns(
            start="", system=("<|im_start|>system\n", "<|im_end|>\n"), user=("<|im_start|>user\n", "<|im_end|>\n"),
            assistant=("<|im_start|>assistant\n", "<|im_end|>\n"), generate="<|im_start|>assistant\n",
        ), [],
    )  # fmt: skip


# Any Turns, any conversation

SPECIAL = [
    "{{ .Content }}",
    "{{",
    "}}",
    "{% x %}",
    "{{- end -}}",
    '"',
    '"""',
    "`",
    "\\",
    "\\n",
    "\n\n### Input:\n",
    "日本",
    "ß🚢",
]
SPACES = [" ", "\n", "\t\v\f\r", "\u00a0", "\u3000", "\u200b", "\ufeff", "\U000e0001", "\x00", "\x7f"]
TEXT = st.lists(
    st.sampled_from([*SPECIAL, *SPACES]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4
).map("".join)
PAIR = st.tuples(TEXT, TEXT)
MARKERS = st.none() | st.tuples(st.sampled_from(["\n\n### Input:\n", "日本", "ß", " ", "🚢x"]), TEXT)
TURNS = st.builds(
    Turns, start=TEXT, system=st.none() | PAIR, user=PAIR, assistant=PAIR, generate=TEXT,
    place=st.sampled_from(["own", "first", "last"]), marker=MARKERS,
    trimmed=st.sets(st.sampled_from(["system", "user", "assistant"])).map(tuple),
)  # fmt: skip
ROLE = st.sampled_from(["system", "user", "assistant"])


@st.composite
def conversations(draw, marker: tuple[str, str] | None) -> list[dict]:
    words = TEXT | st.builds("{}{}{}".format, TEXT, st.just(marker[0]), TEXT) if marker else TEXT
    return draw(
        st.lists(st.builds(lambda role, text: {"role": role, "content": text}, ROLE, words), min_size=1, max_size=6)
    )


@given(st.data())
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_go_says_what_turns_say(go, data):
    turns = data.draw(TURNS)
    messages = data.draw(conversations(turns.marker))
    assert go(turns.to_go_template(), messages) == turns.render_prompt(messages)


@given(TURNS, TEXT, st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_modelfiles_system_goes_before_a_conversation_without_one(go, turns, system, data):
    messages = data.draw(conversations(turns.marker))
    fed = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
    assert go(turns.to_go_template(), messages, system) == turns.render_prompt([*fed, *messages])


def test_neighbours_of_one_role_are_one_message():
    said = [user("a"), user(""), {"role": "assistant", "content": "b"}, user("c")]
    assert [m["content"] for m in merge_consecutive_messages(said)] == ["a\n\n", "b", "c"] and len(said) == 4


# The Modelfile

ODD = "\u00a0\u3000\u200b\u200d\ufeff\u2028\U000e0001\ue000\x00\x7f\v\f\r\t\n 日本🚢"


def written(
    turns: Turns | None, system: str | None = None, items: Sequence = (), stop: str = "</s>", name: str = "n"
) -> str:
    """The Modelfile of a model with these turns."""
    return modelfile.render_modelfile(
        SimpleNamespace(
            name=name, base=SimpleNamespace(name=name), golden=items,
            chat=SimpleNamespace(turns=turns, system=system, stop=(stop,), bos=None, adds_bos=False),
            generation=SimpleNamespace(num_ctx=1024, temperature=0.0, top_p=1.0),
        ), SimpleNamespace(file="m.gguf", sha256="0"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "odd", [ODD, '"', '"""', 'a "quoted" """text"""', "}}", "{{ .Role }}", '"}}', "\\", "\\u00a0", "$name"]
)
@pytest.mark.parametrize("place", ["own", "first", "last"])
def test_odd_literal_texts_survive_the_modelfile(odd, place, go):
    texts = [f"{odd}{i}{odd}" for i in range(9)]
    turns = Turns(
        start=texts[0], system=(texts[1], texts[2]), user=(texts[3], texts[4]), assistant=(texts[5], texts[6]),
        generate=texts[7], place=place, marker=(odd, texts[8]),
    )  # fmt: skip
    template = dict(go.commands(written(turns)))["TEMPLATE"]
    said = [
        user("a"),
        {"role": "assistant", "content": "b"},
        user("c"),
        {"role": "assistant", "content": odd},
        user(odd),
    ]
    for messages in (said, [{"role": "system", "content": "s"}, *said]):
        assert go(template, messages) == turns.render_prompt(messages)


def test_a_modelfile_that_would_give_another_prompt_is_not_written():
    found = case("chatml (Ferry's)")
    items = [SimpleNamespace(add_generation_prompt=True, **item) for item in found.asking]
    assert 'TEMPLATE """' in written(found.turns, items=items)
    with refuses("modelfile.wrong_prompt") as error:
        written(found.turns.model_copy(update={"generate": "x"}), items=items)
    assert any(repr(item.messages[-1]["content"]) in error.value.message for item in items)


def test_without_turns_the_template_inside_the_gguf_is_used():
    text = written(None)
    assert 'TEMPLATE """' not in text and "# TEMPLATE: none" in text and "# SYSTEM: none" in text


# Ends of values, commands behind them, what the parser drops, and what looks like either
HOSTILE = [
    'x"""\ny', '"""', 'x"""', '"""x', '"', '""', 'a "quoted" """text"""', 'x"""\nADAPTER /etc/passwd\nSYSTEM """y', "\nFROM ./other",
    "{{ .Role }}", "$name $stops", "\\n", "# no comment", "ends with space ", " \n\t x", 'x"""  \ny', 'x"""\ry', ODD, "Réponds\u202f!", "👨\u200d👩",
]  # fmt: skip
CHATML = Turns(start="", system=("<s>", "</s>"), user=("<u>", "</u>"), assistant=("<a>", "</a>"), generate="<a>")
SETTINGS = ["stop", "num_ctx", "temperature", "top_p", "repeat_penalty"]
SYSTEMS = st.sampled_from(HOSTILE) | st.lists(st.sampled_from(HOSTILE) | TEXT, max_size=3).map("".join)


@given(SYSTEMS, st.sampled_from(["own", "first"]))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_system_prompt_breaks_out_of_the_modelfile_or_loses_a_character(go, system, place):
    turns = CHATML.model_copy(update={"place": place})
    found = go.commands(written(turns, system))
    assert [name for name, _ in found if name != "SYSTEM"] == ["FROM", "TEMPLATE", *SETTINGS]
    values = dict(found)
    wanted = (
        turns.render_prompt([{"role": "system", "content": system}, user("Hi")])
        if system
        else turns.render_prompt([user("Hi")])
    )
    assert go(values["TEMPLATE"], [user("Hi")], values.get("SYSTEM", "")) == wanted


@pytest.mark.parametrize("system", ['x"""\ny', "Réponds\u202f!"])
@pytest.mark.parametrize("turns", [None, CHATML.model_copy(update={"place": "last"})])
def test_a_system_prompt_that_nothing_can_say_is_refused(system, turns):
    with refuses("modelfile.unsupported_text") as error:
        written(turns, system)
    assert "the system prompt" in error.value.message


@given(SYSTEMS.filter(bool))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stop_string_is_what_ollama_stops_at_or_is_refused(go, stop):
    if find_modelfile_fault(stop):
        with refuses("modelfile.unsupported_text") as error:
            written(CHATML, stop=stop)
        assert "a stop string" in error.value.message
    else:
        assert dict(go.commands(written(CHATML, stop=stop)))["stop"] == stop


def test_a_name_stays_in_its_comment(go):
    found = go.commands(written(CHATML, name="n\nADAPTER /etc/passwd\r\nRUN x"))
    assert [name for name, _ in found] == ["FROM", "TEMPLATE", *SETTINGS]
