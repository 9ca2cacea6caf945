"""modelfile: Ollama's Modelfile from the manifest of what was trained, never from a base model's name."""

from pathlib import Path
from string import Template

from contract import files
from contract.errors import UserError
from contract.manifest import Artifact, Manifest
from contract.turns import Turns, unsayable
from deploy.store import pulled

TEMPLATE = Path(__file__).parent.parent / "Modelfile.template"


def stage(folder: Path) -> dict:
    """Write Modelfile and modelfile.json beside the pulled file that passed its smoke test."""
    made, path = pulled(folder)
    if files.read_json(folder / "smoke.json")["sha256"] != made.artifact(path.name).sha256:
        raise UserError(f"{path.name} has not passed its smoke test", f"run `python -m deploy smoke --into {folder}`")
    text = render(made, made.artifact(path.name))
    with files.writing(folder / "Modelfile") as part:
        part.write_text(text, encoding="utf-8")
    record = {
        "stage": "modelfile",
        "file": "Modelfile",
        "sha256": files.sha256(folder / "Modelfile"),
        "template": bool(made.chat.turns),
    }
    files.write_json(folder / "modelfile.json", record)
    return record


def render(made: Manifest, artifact: Artifact) -> str:
    """The Modelfile's text. Raises UserError when its TEMPLATE would not give the golden prompts."""
    turns, bos = made.chat.turns, made.chat.bos if made.chat.adds_bos else ""
    for golden in made.golden if turns else ():
        if golden.add_generation_prompt and (bos or "") + turns.prompt(golden.messages) != golden.prompt:
            raise UserError(
                f"the manifest's TEMPLATE does not give the trained prompt for {golden.messages[-1]['content']!r}",
                "publish it again: `make publish`",
            )
    turns, system = placed(turns, made.chat.system)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=" ".join(made.name.split()), file=artifact.file, sha256=artifact.sha256, base=" ".join(made.base.name.split()),
        template=f'TEMPLATE """{turns.go()}"""' if turns else "# TEMPLATE: none says what was trained; the one inside the GGUF does",
        system=f"SYSTEM {quoted('the system prompt', system)}" if system else "# SYSTEM: none",
        stops="\n".join(f"PARAMETER stop {quoted('a stop string', stop)}" for stop in made.chat.stop),
        num_ctx=made.generation.num_ctx, temperature=made.generation.temperature, top_p=made.generation.top_p,
    )  # fmt: skip


def placed(turns: Turns | None, system: str | None) -> tuple[Turns | None, str | None]:
    """Where the system prompt goes: SYSTEM; what the Modelfile cannot hold goes into TEMPLATE, whose strings have escapes."""
    if not (turns and turns.system and system and unsayable(system)) or turns.place == "last":
        return turns, system
    return turns.model_copy(update={"start": turns.system[0] + turns.trim("system", system) + turns.system[1]}), None


def quoted(what: str, text: str) -> str:
    """As Ollama's parser gives it back. Raises UserError for a text that it would change."""
    if why := unsayable(text):
        raise UserError(
            f"Ollama's Modelfile {why}: {what}", "write it otherwise, with a new RUN=name, and publish again"
        )
    return f'"""{text}"""'
