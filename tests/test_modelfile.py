"""The Modelfile's TEMPLATE, rendered by the engine that Ollama uses (Go's text/template), gives the trained prompt."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contract import chat
from deploy import modelfile
from deploy.pull import pulled

PROGRAM = """
package main

import ("encoding/json"; "os"; "text/template")

type message struct { Role, Content string }
type input struct { Template string; Messages []message }

func main() {
	var in input
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil { panic(err) }
	parsed, err := template.New("t").Parse(in.Template)
	if err != nil { panic(err) }
	if err := parsed.Execute(os.Stdout, in); err != nil { panic(err) }
}
"""

CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "One?"), ("assistant", "1."), ("user", '  Two,\n\n{{ .Role }} "quoted"?  ')],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """Renders (template, messages) with Go."""
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    environment = os.environ | {
        "GOCACHE": str(folder / "cache"),
        "GOPATH": str(folder),
        "GOFLAGS": "-mod=mod",
        "GO111MODULE": "off",
        "GOTOOLCHAIN": "local",
    }
    binary = shutil.which("go", path=str(Path(sys.prefix) / "bin")) or shutil.which("go")
    subprocess.run(
        [binary, "build", "-o", "render", "main.go"], cwd=folder, env=environment, check=True, capture_output=True
    )

    def render(template: str, messages: list[dict]) -> str:
        value = {"Template": template, "Messages": messages}
        return subprocess.run(
            [folder / "render"], input=json.dumps(value), capture_output=True, text=True, check=True
        ).stdout

    return render


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_go_renders_the_trained_prompt(chain, go, conversation):
    made, _ = pulled(chain.model)
    messages = [{"role": role, "content": text} for role, text in conversation]
    if messages[0]["role"] != "system":  # what Ollama does with the Modelfile's SYSTEM, and `data` with data.system
        messages = [{"role": "system", "content": modelfile.default_system(made)}, *messages]
    wanted = chat.render(made.chat.template, messages, made.chat.bos or "", made.chat.stop[0])
    assert go(modelfile.go_template(made), messages) == wanted


def test_the_templates_own_system_prompt_is_found(chain, go):
    made, _ = pulled(chain.model)
    assert modelfile.template_system(made) == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    messages = [{"role": "system", "content": modelfile.template_system(made)}, {"role": "user", "content": "Hi"}]
    assert go(modelfile.go_template(made), messages) == chat.render(made.chat.template, messages[1:])


def test_the_modelfile_says_what_was_trained(chain):
    made, path = pulled(chain.model)
    text = (chain.model / "Modelfile").read_text()
    assert f"FROM ./{path.name}\n" in text and made.default().sha256 in text
    assert (
        'PARAMETER stop "<|im_end|>"' in text
        and "PARAMETER num_ctx 1024" in text
        and "PARAMETER temperature 0.0" in text
    )
    assert 'SYSTEM """Ferry help desk: tickets only."""' in text


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}assistant:",  # trims what the user wrote
        "{% for m in messages %}{% if 'Input' in m['content'] %}X{% endif %}{{ m['content'] }}{% endfor %}",  # looks into it
        "{{ messages[-1]['content'] }}",  # forgets the turns before
    ],
)
def test_a_template_that_go_cannot_say_is_left_to_the_gguf(chain, template):
    made, path = pulled(chain.model)
    changed = made.model_copy(
        update={
            "chat": made.chat.model_copy(update={"template": template}),
            "golden": tuple(g.model_copy(update={"prompt": chat.render(template, g.messages)}) for g in made.golden),
        }
    )
    assert modelfile.go_template(changed) is None
    assert 'TEMPLATE """' not in modelfile.render(changed, path.name)
