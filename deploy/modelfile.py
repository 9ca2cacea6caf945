"""modelfile: Ollama's Modelfile from the manifest of what was trained, never from a base model's name."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template

from contract import chat, files
from contract.errors import UserError
from contract.manifest import Manifest
from deploy.pull import pulled

TEMPLATE = Path(__file__).parent.parent / "Modelfile.template"
MARKS = {"system": "\x01SYSTEM\x01", "user": "\x01USER\x01", "assistant": "\x01ASSISTANT\x01"}


def stage(folder: Path) -> dict:
    """Write Modelfile and modelfile.json beside the pulled file that passed its smoke test."""
    made, path = pulled(folder)
    if files.read_json(folder / "smoke.json")["sha256"] != made.default().sha256:
        raise UserError(f"{path.name} has not passed its smoke test", f"run `python -m deploy smoke --into {folder}`")
    text = render(made, path.name)
    with files.writing(folder / "Modelfile") as part:
        part.write_text(text, encoding="utf-8")
    record = {
        "stage": "modelfile",
        "file": "Modelfile",
        "sha256": files.sha256(folder / "Modelfile"),
        "template": bool(go_template(made)),
    }
    files.write_json(folder / "modelfile.json", record)
    return record


def render(made: Manifest, file: str) -> str:
    """The Modelfile's text."""
    go = go_template(made)
    system = default_system(made)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=made.name, file=file, sha256=made.default().sha256, base=made.base.name,
        template=f'TEMPLATE """{go}"""' if go else "# TEMPLATE: none; Ollama uses the template inside the GGUF",
        system=f'SYSTEM """{system}"""' if system else "# SYSTEM: none",
        stops="\n".join(f'PARAMETER stop "{stop}"' for stop in made.chat.stop),
        num_ctx=made.generation.num_ctx, temperature=made.generation.temperature, top_p=made.generation.top_p,
    )  # fmt: skip


def default_system(made: Manifest) -> str | None:
    """The system prompt when the user gives none: the one that was trained with, else the template's own."""
    return made.chat.system or template_system(made)


def template_system(made: Manifest) -> str | None:
    """A system prompt that the Jinja template puts in by itself, as SmolLM2's does."""
    plain, marked = _render(made, ["user"]), _render(made, ["system", "user"])
    if not plain or not marked or MARKS["system"] not in marked:
        return None
    before, after = marked.split(MARKS["system"])
    if len(plain) > len(before) + len(after) and plain.startswith(before) and plain.endswith(after):
        return plain[len(before) : -len(after)]
    return None


def go_template(made: Manifest) -> str | None:
    """A Go TEMPLATE that gives every golden prompt of the manifest, or None when there is no such simple one.

    Read off the Jinja template with marked messages: what stands around each role's text. A template that
    trims or inspects what the user wrote does not survive the golden prompts, and the embedded one is used.
    """
    pieces = _pieces(made)
    if pieces is None or any(mark in piece for piece in pieces.values() for mark in ("{{", "}}", '"""')):
        return None
    branches = [
        f'{{{{- {word} eq .Role "{role}" }}}}{_go(pieces[role][0])}{{{{ .Content }}}}{_go(pieces[role][1])}'
        for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
    ]
    return "\n".join(["{{- range .Messages }}", *branches, "{{- end }}", "{{- end }}" + _go(pieces["generate"][0])])


def _go(text: str) -> str:
    """Literal text as a Go template action, so that no trimming rule touches its line ends."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _pieces(made: Manifest) -> dict[str, tuple[str, str]] | None:
    """What the Jinja template puts before and after each role's text, proven on the golden prompts."""
    whole = _render(made, ["system", "user", "assistant", "user"])
    if not whole or whole.count(MARKS["system"]) != 1 or whole.count(MARKS["user"]) != 2:
        return None
    head, rest = whole.split(MARKS["system"])
    system_user, rest = rest.split(MARKS["user"], 1)
    user_assistant, rest = rest.split(MARKS["assistant"])
    assistant_user, tail = rest.split(MARKS["user"])
    before_user = _common_suffix(system_user, assistant_user)
    generate = _common_suffix(user_assistant, tail)
    pieces = {
        "system": (head, system_user.removesuffix(before_user)),
        "user": (before_user, tail.removesuffix(generate)),
        "assistant": (generate, assistant_user.removesuffix(before_user)),
        "generate": (generate, ""),
    }
    return pieces if all(_assemble(pieces, made, golden.messages) == golden.prompt for golden in made.golden) else None


def _assemble(pieces: dict[str, tuple[str, str]], made: Manifest, messages: Sequence[dict]) -> str:
    """The prompt as Ollama puts it together, with the template's own system prompt as its SYSTEM."""
    system = template_system(made)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return "".join(pieces[m["role"]][0] + m["content"] + pieces[m["role"]][1] for m in messages) + pieces["generate"][0]


def _common_suffix(a: str, b: str) -> str:
    return os.path.commonprefix([a[::-1], b[::-1]])[::-1]


def _render(made: Manifest, roles: list[str]) -> str | None:
    messages = [{"role": role, "content": MARKS[role]} for role in roles]
    try:
        return chat.render(made.chat.template, messages, made.chat.bos or "", made.chat.stop[0])
    except UserError:
        return None
