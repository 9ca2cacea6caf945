"""The demo's Modelfile, rendered by the engine that Ollama uses (Go's text/template), gives the trained prompt."""

import pytest

from common.errors import UserError
from contract import chat_format
from deploy.stages import modelfile
from deploy.store import load_pulled
from tests.test_turns import Go

CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "One?"), ("assistant", "1."), ("user", '  Two,\n\n{{ .Role }} "quoted"?  ')],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


@pytest.fixture(scope="module")
def go():
    made = Go()
    yield made
    made.close()


@pytest.fixture
def made(chain):
    return load_pulled(chain.model)[0]


def between(text: str, word: str) -> str:
    """What the Modelfile says after TEMPLATE or SYSTEM."""
    return text.split(f'{word} """')[1].split('"""')[0]


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
    with pytest.raises(UserError, match="does not give the trained prompt"):
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
    ("content", "said"),
    [
        (SHIPPED + "$nope\n", r"nothing is called \$nope; there are \$name"), (SHIPPED + "costs $5\n", r"\$\$"),
        (SHIPPED.replace("FROM ./$file", ""), "needs the line `FROM"), (SHIPPED + "from other\n", "no other FROM"), ("", "needs the line"),
        (SHIPPED.replace("$template", ""), r"\$template is gone"), (SHIPPED.replace("$system", "SYSTEM mine"), r"\$system is gone"),
        (SHIPPED.replace("$stops", "# $$stops"), r"\$stops is gone"), (SHIPPED + 'MESSAGE user """Hi\n', "is not closed"), (b"\xff" + SHIPPED.encode(), "utf-8"),
    ],
)  # fmt: skip
def test_a_bad_edit_of_the_template_is_one_clear_line(monkeypatch, tmp_path, content, said):
    with pytest.raises(UserError, match=f"Modelfile.template: .*{said}") as caught:
        edited(monkeypatch, tmp_path, content)
    assert caught.value.hint == "mend it, or take it back: `git checkout Modelfile.template`"


def test_what_is_added_to_the_template_stays(monkeypatch, tmp_path):
    text = edited(monkeypatch, tmp_path, SHIPPED.replace("$stops", "${stops}") + "PARAMETER top_k 40\n# 5 $$\n")
    assert text.endswith("PARAMETER top_k 40\n# 5 $\n") and "FROM there\n$5" in text
