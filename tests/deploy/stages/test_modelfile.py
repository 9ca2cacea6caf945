"""The demo's Modelfile, rendered by the engine that Ollama uses (Go's text/template), gives the trained prompt."""

import pytest

from contract import chat_format
from deploy.stages import modelfile
from deploy.store import load_pulled
from tests.helpers.commands import refuses
from tests.helpers.go_template import between

CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "One?"), ("assistant", "1."), ("user", '  Two,\n\n{{ .Role }} "quoted"?  ')],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


@pytest.fixture
def made(chain):
    return load_pulled(chain.model)[0]


def trained(made, messages: list[dict]) -> str:
    """The prompt as trained, without the BOS that llama.cpp puts there."""
    text = chat_format.render(made.chat.template, messages, made.chat.bos or "", made.chat.stop[0])
    return text.removeprefix(made.chat.bos) if made.chat.bos and made.chat.adds_bos else text


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_go_renders_the_trained_prompt(chain, made, go, conversation):
    text = (chain.model / "Modelfile").read_text(encoding="utf-8")
    messages = [{"role": role, "content": words} for role, words in conversation]
    own = [] if messages[0]["role"] == "system" else [{"role": "system", "content": made.chat.system}]
    assert go(between(text, "TEMPLATE"), messages, between(text, "SYSTEM")) == trained(made, [*own, *messages])


def test_without_a_system_prompt_the_templates_own_is_said(made, go):
    messages = [{"role": "user", "content": "Hi"}]
    wanted = trained(made, messages)
    assert "You are a helpful AI assistant named SmolLM, trained by Hugging Face" in wanted
    assert go(made.chat.turns.to_go_template(), messages) == wanted


def test_the_modelfile_says_what_was_trained(chain):
    made, path = load_pulled(chain.model)
    text = (chain.model / "Modelfile").read_text()
    assert f"FROM ./{path.name}\n" in text and made.default_artifact().sha256 in text
    assert (
        'PARAMETER stop """<|im_end|>"""' in text
        and "PARAMETER num_ctx 1024" in text
        and "PARAMETER temperature 0.0" in text
    )
    assert 'SYSTEM """Ferry help desk: tickets only."""' in text


def test_turns_that_are_not_the_manifests_golden_prompts_are_refused(made):
    turns = made.chat.turns.model_copy(update={"generate": made.chat.turns.generate + "\n"})
    changed = made.model_copy(update={"chat": made.chat.model_copy(update={"turns": turns})})
    with refuses("modelfile.wrong_prompt"):
        modelfile.render_modelfile(changed, changed.default_artifact())


def test_a_template_without_turns_is_left_to_the_gguf(made):
    changed = made.model_copy(update={"chat": made.chat.model_copy(update={"turns": None})})
    text = modelfile.render_modelfile(changed, changed.default_artifact())
    assert 'TEMPLATE """' not in text and "# TEMPLATE: none" in text


SHIPPED = modelfile.TEMPLATE.read_text()
VALUES = {
    **dict.fromkeys(("name", "sha256", "base", "stops", "num_ctx", "temperature", "top_p"), "1"),
    "file": "x.gguf", "template": 'TEMPLATE """FROM here"""', "system": 'SYSTEM """\nFROM there\n$5"""',
}  # fmt: skip


def edited(monkeypatch, tmp_path, content: str | bytes) -> str:
    path = tmp_path / "Modelfile.template"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(modelfile, "TEMPLATE", path)
    return modelfile.fill_template(VALUES)


@pytest.mark.parametrize(
    ("content", "code", "value"),
    [
        (SHIPPED + "$nope\n", "modelfile.unknown_name", "$nope"), (SHIPPED + "costs $5\n", "modelfile.bad_dollar_sign", "$$"),
        (SHIPPED.replace("FROM ./$file", ""), "modelfile.bad_from", "`FROM ./$file`"),
        (SHIPPED + "from other\n", "modelfile.bad_from", "`FROM ./$file`"), ("", "modelfile.bad_from", "`FROM ./$file`"),
        (SHIPPED.replace("$template", ""), "modelfile.missing_name", "$template"),
        (SHIPPED.replace("$system", "SYSTEM mine"), "modelfile.missing_name", "$system"),
        (SHIPPED.replace("$stops", "# $$stops"), "modelfile.missing_name", "$stops"),
        (SHIPPED + 'MESSAGE user """Hi\n', "modelfile.unclosed_quotes", '"""'), (b"\xff" + SHIPPED.encode(), "modelfile.not_utf8", "0xff"),
    ],
)  # fmt: skip
def test_a_bad_edit_of_the_template_is_one_clear_line(monkeypatch, tmp_path, content, code, value):
    with refuses(code) as caught:
        edited(monkeypatch, tmp_path, content)
    assert caught.value.message.startswith("Modelfile.template: ") and value in caught.value.message
    assert "git checkout Modelfile.template" in caught.value.hint


def test_a_name_that_the_template_does_not_have_is_listed_with_those_that_it_has(monkeypatch, tmp_path):
    with refuses("modelfile.unknown_name") as caught:
        edited(monkeypatch, tmp_path, SHIPPED + "$nope\n")
    assert all(f"${name}" in caught.value.message for name in VALUES)


def test_what_is_added_to_the_template_stays(monkeypatch, tmp_path):
    text = edited(monkeypatch, tmp_path, SHIPPED.replace("$stops", "${stops}") + "PARAMETER top_k 40\n# 5 $$\n")
    assert text.endswith("PARAMETER top_k 40\n# 5 $\n") and "FROM there\n$5" in text
