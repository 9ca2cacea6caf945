"""modelfile: write Ollama's Modelfile from the manifest of the trained model, never from the name of a base model."""

import os
import re
from pathlib import Path
from string import Template

from common import files, gguf_reader, hub, llama_runtime
from common.errors import UserError
from contract.manifest import Artifact, Manifest
from contract.ollama_template import Turns, unsayable
from deploy import machine, store
from deploy.stages import memory_need
from deploy.store import passed

TEMPLATE = Path(__file__).parents[2] / "Modelfile.template"
RECORD = "modelfile.json"
LEAST = 2048  # tokens of context, when by the estimate even fewer fit


def stage(folder: Path) -> dict:
    """Write the Modelfile and modelfile.json next to the GGUF, which has passed its smoke test; return the record."""
    made, path = passed(folder)
    num_ctx = fitting(made, path)
    text = render(made, made.artifact(path.name), num_ctx)
    keep_edited(folder, text)
    with files.writing(folder / "Modelfile") as part:
        part.write_text(text, encoding="utf-8")
    record = {
        "stage": "modelfile",
        "file": "Modelfile",
        "sha256": files.sha256(folder / "Modelfile"),
        "template": bool(made.chat.turns),
        "num_ctx": num_ctx,
        "trained_ctx": made.generation.num_ctx,
    }
    files.write_json(folder / RECORD, record)
    return record


def keep_edited(folder: Path, text: str) -> None:
    """Rename a Modelfile that the user edited: one that is neither recorded in modelfile.json nor equal to `text`."""
    path, known = folder / "Modelfile", store.read(folder / RECORD).get("sha256")
    if not os.path.lexists(path):
        return
    if path.is_file() and files.sha256(path) in (known, files.sha256_bytes(text.encode())):
        return
    kept = files.set_aside(path)
    hub.say(f"modelfile: {path} was edited: it is kept as {kept.name}; an edit of {TEMPLATE.name} is in every new one")


def fitting(made: Manifest, path: Path) -> int:
    """Return the tokens of context: the trained length, or what fits into this machine's memory, but at least 2048."""
    header, wanted = gguf_reader.read(path, path.name), made.generation.num_ctx
    budget = machine.budget(machine.here(), llama_runtime.backend() != "CPU")
    fits = memory_need.context(header, path.stat().st_size, budget, wanted)
    # The smoke test has just run here, with a shorter context.
    return max(fits, min(wanted, LEAST))


def render(made: Manifest, artifact: Artifact, num_ctx: int | None = None) -> str:
    """Return the text of the Modelfile. num_ctx: None takes the trained length.

    Raises UserError when its TEMPLATE would not give the golden prompts, or Modelfile.template cannot be filled in.
    """
    turns, bos = made.chat.turns, made.chat.bos if made.chat.adds_bos else ""
    for golden in made.golden if turns else ():
        if golden.add_generation_prompt and (bos or "") + turns.prompt(golden.messages) != golden.prompt:
            raise UserError(
                f"the manifest's TEMPLATE does not give the trained prompt for {golden.messages[-1]['content']!r}",
                "publish it again: `make publish`",
            )
    turns, system = placed(turns, made.chat.system)
    return filled(
        {
            "name": " ".join(made.name.split()),
            "file": artifact.file,
            "sha256": artifact.sha256,
            "base": " ".join(made.base.name.split()),
            "template": f'TEMPLATE """{turns.go()}"""'
            if turns
            else "# TEMPLATE: none says what was trained; the one inside the GGUF does",
            "system": f"SYSTEM {quoted('the system prompt', system)}" if system else "# SYSTEM: none",
            "stops": "\n".join(f"PARAMETER stop {quoted('a stop string', stop)}" for stop in made.chat.stop),
            "num_ctx": num_ctx or made.generation.num_ctx,
            "temperature": made.generation.temperature,
            "top_p": made.generation.top_p,
        }
    )


def filled(values: dict) -> str:
    """Fill values into Modelfile.template, which the user may edit. Raises UserError for a bad edit."""
    try:
        text = TEMPLATE.read_text(encoding="utf-8")
        made = Template(text).substitute(values)
    except KeyError as error:
        raise _bad_edit(
            f"nothing is called ${error.args[0]}; there are {', '.join(f'${name}' for name in values)}"
        ) from None
    except ValueError as error:  # from string.Template, or because the file is not UTF-8
        raise _bad_edit(f"{error}; a dollar sign of your own is written $$") from error
    except OSError as error:
        raise _bad_edit(error.strerror or str(error)) from error
    froms = [line.split() for line in text.splitlines() if line.upper().startswith("FROM")]
    if froms != [["FROM", "./$file"]]:
        raise _bad_edit("it needs the line `FROM ./$file`, and no other FROM")
    if text.count('"""') % 2:
        raise _bad_edit('a """ is not closed')
    used = re.findall(r"\$\{?(\w+)", text.replace("$$", ""))
    if lost := [name for name in ("template", "system", "stops") if name not in used]:
        raise _bad_edit(f"${lost[0]} is gone: without it the model is not asked as it was trained")
    return made


def _bad_edit(why: str) -> UserError:
    return UserError(f"{TEMPLATE.name}: {why}", f"mend it, or take it back: `git checkout {TEMPLATE.name}`")


def placed(turns: Turns | None, system: str | None) -> tuple[Turns | None, str | None]:
    """Decide where the system prompt goes; return the turns of the TEMPLATE and the text of SYSTEM.

    It goes into SYSTEM. A text that a Modelfile cannot hold goes into the TEMPLATE instead, whose strings have escapes.
    """
    if not (turns and turns.system and system and unsayable(system)) or turns.place == "last":
        return turns, system
    return turns.model_copy(update={"start": turns.system[0] + turns.trim("system", system) + turns.system[1]}), None


def quoted(what: str, text: str) -> str:
    """Quote a text for the Modelfile. Raises UserError for a text that Ollama's parser would change."""
    if why := unsayable(text):
        raise UserError(
            f"Ollama's Modelfile {why}: {what}", "write it otherwise, with a new RUN=name, and publish again"
        )
    return f'"""{text}"""'
