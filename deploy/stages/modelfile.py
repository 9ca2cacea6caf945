"""modelfile: write Ollama's Modelfile from the manifest of the trained model, never from the name of a base model."""

import re
from pathlib import Path
from string import Template
from typing import Any

from common import files, gguf_reader, hub, llama_runtime
from common.errors import UserError
from contract.manifest import Artifact, Manifest
from contract.ollama_template import Turns, find_modelfile_fault
from deploy import machine, store
from deploy.stages import memory_need
from deploy.store import load_tested

TEMPLATE = Path(__file__).parents[2] / "Modelfile.template"
RECORD = "modelfile.json"
MIN_CONTEXT = 2048  # tokens of context, when by the estimate even fewer fit


def run_modelfile(folder: Path) -> dict[str, Any]:
    """Write the Modelfile and modelfile.json next to the GGUF, which has passed its smoke test; return the record."""
    manifest, path = load_tested(folder)
    num_ctx = choose_context(manifest, path)
    text = render_modelfile(manifest, manifest.find_artifact(path.name), num_ctx)
    set_aside_edits(folder, text)
    with files.write_atomically(folder / "Modelfile") as part:
        part.write_text(text, encoding="utf-8")
    record = {
        "stage": "modelfile",
        "file": "Modelfile",
        "sha256": files.sha256(folder / "Modelfile"),
        "template": bool(manifest.chat.turns),
        "num_ctx": num_ctx,
        "trained_ctx": manifest.generation.num_ctx,
    }
    files.write_json(folder / RECORD, record)
    return record


def set_aside_edits(folder: Path, text: str) -> None:
    """Rename a Modelfile that the user edited: one that is neither recorded in modelfile.json nor equal to `text`."""
    path, known_hash = folder / "Modelfile", store.read_record(folder / RECORD).get("sha256")
    if path.is_file() and files.sha256(path) in (known_hash, files.sha256_bytes(text.encode())):
        return
    if kept_path := files.set_aside(path):
        reason = f"{path} was edited: it is kept as {kept_path.name}"
        hub.print_message(f"modelfile: {reason}; edits of {TEMPLATE.name} are in every new one")


def choose_context(manifest: Manifest, path: Path) -> int:
    """Return the tokens of context: the trained length, or what fits into this machine's memory, but at least 2048."""
    header, trained_tokens = gguf_reader.read_header(path, path.name), manifest.generation.num_ctx
    memory_budget = machine.memory_budget(machine.detect_machine(), llama_runtime.compute_device() != "CPU")
    fitting_tokens = memory_need.largest_context(header, path.stat().st_size, memory_budget, trained_tokens)
    # The smoke test has just run here, with a shorter context.
    return max(fitting_tokens, min(trained_tokens, MIN_CONTEXT))


def render_modelfile(manifest: Manifest, artifact: Artifact, num_ctx: int | None = None) -> str:
    """Return the text of the Modelfile. num_ctx: None takes the trained length.

    Raise UserError when its TEMPLATE would not give the golden prompts, or Modelfile.template cannot be filled in.
    """
    if manifest.chat.turns:
        refuse_wrong_prompts(manifest.chat.turns, manifest)
    turns, system = place_system_prompt(manifest.chat.turns, manifest.chat.system)
    template = "# TEMPLATE: none says what was trained; the one inside the GGUF does"
    if turns:
        template = f'TEMPLATE """{turns.to_go_template()}"""'
    return fill_template(
        {
            "name": " ".join(manifest.name.split()),
            "file": artifact.file,
            "sha256": artifact.sha256,
            "base": " ".join(manifest.base.name.split()),
            "template": template,
            "system": f"SYSTEM {quote_text('the system prompt', system)}" if system else "# SYSTEM: none",
            "stops": "\n".join(f"PARAMETER stop {quote_text('a stop string', stop)}" for stop in manifest.chat.stop),
            "num_ctx": num_ctx or manifest.generation.num_ctx,
            "temperature": manifest.generation.temperature,
            "top_p": manifest.generation.top_p,
        }
    )


def refuse_wrong_prompts(turns: Turns, manifest: Manifest) -> None:
    """Raise UserError when the TEMPLATE of a manifest does not give one of its golden prompts."""
    bos = manifest.chat.bos if manifest.chat.adds_bos else None
    for golden in manifest.golden:
        if golden.add_generation_prompt and (bos or "") + turns.render_prompt(golden.messages) != golden.prompt:
            raise UserError(
                f"the manifest's TEMPLATE does not render the trained prompt for {golden.messages[-1]['content']!r}",
                "publish it again: `make publish`",
                code="modelfile.wrong_prompt",
            )


def fill_template(values: dict[str, Any]) -> str:
    """Fill values into Modelfile.template, which the user may edit. Raise UserError for a bad edit."""
    try:
        text = TEMPLATE.read_text(encoding="utf-8")
        filled_text = Template(text).substitute(values)
    except KeyError as error:
        raise _template_error(
            f"${error.args[0]} is unknown; the known names are {', '.join(f'${name}' for name in values)}",
            code="modelfile.unknown_name",
        ) from None
    except UnicodeDecodeError as error:
        raise _template_error(f"it is not UTF-8 text: {error}", code="modelfile.not_utf8") from error
    except ValueError as error:  # from string.Template
        raise _template_error(
            f"{error}; a literal dollar sign is written $$", code="modelfile.bad_dollar_sign"
        ) from error
    except OSError as error:
        raise _template_error(error.strerror or str(error), code="modelfile.unreadable") from error
    _refuse_bad_template(text)
    return filled_text


def _refuse_bad_template(text: str) -> None:
    """Raise UserError for a Modelfile.template that gives no Modelfile, or one with other prompts."""
    from_lines = [line.split() for line in text.splitlines() if line.upper().startswith("FROM")]
    if from_lines != [["FROM", "./$file"]]:
        raise _template_error("it needs the line `FROM ./$file`, and no other FROM", code="modelfile.bad_from")
    if text.count('"""') % 2:
        raise _template_error('a """ is not closed', code="modelfile.unclosed_quotes")
    used_names = re.findall(r"\$\{?(\w+)", text.replace("$$", ""))
    if missing_names := [name for name in ("template", "system", "stops") if name not in used_names]:
        raise _template_error(
            f"${missing_names[0]} is missing: without it the prompts differ from those of the training",
            code="modelfile.missing_name",
        )


def _template_error(reason: str, code: str) -> UserError:
    return UserError(
        f"{TEMPLATE.name}: {reason}", f"fix it, or restore it from git: `git checkout {TEMPLATE.name}`", code=code
    )


def place_system_prompt(turns: Turns | None, system: str | None) -> tuple[Turns | None, str | None]:
    """Decide where the system prompt goes; return the turns of the TEMPLATE and the text of SYSTEM.

    It goes into SYSTEM. A text that a Modelfile cannot hold goes into the TEMPLATE instead, whose strings have escapes.
    """
    if not (turns and turns.system and system and find_modelfile_fault(system)) or turns.place == "last":
        return turns, system
    return turns.model_copy(update={"start": turns.system[0] + turns.trim("system", system) + turns.system[1]}), None


def quote_text(subject: str, text: str) -> str:
    """Quote a text for the Modelfile. Raise UserError for a text that Ollama's parser would change."""
    if reason := find_modelfile_fault(text):
        raise UserError(
            f"Ollama's Modelfile {reason}: {subject}",
            "change that text, train with a new RUN=name, and publish again",
            code="modelfile.unsupported_text",
        )
    return f'"""{text}"""'
