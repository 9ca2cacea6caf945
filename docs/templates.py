"""Write docs/templates.md: what an Ollama TEMPLATE can say of each real chat template.

    python docs/templates.py

Every template is prepared as it would be trained (its date frozen, its thinking off, its BOS put first), in a tokenizer
that holds nothing but the tokens that the template needs.
"""

import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from contract.ollama_template import Turns
from pipeline.data import chat_template
from pipeline.verify import golden_prompts, prompt_parity
from tests.helpers import template_families, vocabularies

PAGE = Path(__file__).with_suffix(".md")
PLACES = {"own": "a turn of its own", "first": "in the first user turn", "last": "in the last user turn"}


@dataclass(frozen=True)
class Case:
    """A real template, as it would be trained, and what was derived from it."""

    name: str
    trained: prompt_parity.TrainedFormat | None
    """None: Ferry refuses to train it, and `reasons` says why."""
    adds: bool
    turns: Turns | None
    reasons: list[str]

    @property
    def asking(self) -> list[dict]:
        """The golden conversations that want an answer, with the prompt that a TEMPLATE must give."""
        return prompt_parity.select_answer_prompts(self.trained.golden, self.trained.tokenizer.bos_token, self.adds)


@functools.cache
def cases() -> tuple[Case, ...]:
    """llama.cpp's templates, those inside its vocabularies, and Ferry's own."""
    families = template_families.OWN | template_families.STAND_INS
    found = [case(stem, families.get(stem), template_families.source(stem)) for stem in template_families.stems()]
    for name, family in template_families.EMBEDDED.items():
        text = vocabularies.header(name)["tokenizer.chat_template"]
        found.append(case(f"{name} (inside its vocabulary's GGUF)", family, text))
    for name, family in template_families.NAMED.items():
        found.append(case(f"{name} (Ferry's)", family, chat_template.read_template_text(name, None)))
    return tuple(found)


def case(name: str, family: "template_families.Family | None", text: str) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        stand_in(family or template_families.WILLING, text).save_pretrained(folder)
        try:
            tokenizer, facts, _ = chat_template.load_chat_tokenizer(Path(folder), "tokenizer", template_families.DAY)
        except UserError as error:
            return Case(name, None, False, None, [str(error).splitlines()[0].removeprefix("error: ")])
    return derived(name, tokenizer, facts)


def derived(name: str, tokenizer: PreTrainedTokenizerFast, facts: chat_template.ChatFormat) -> Case:
    """What `verify` would derive."""
    trained = prompt_parity.TrainedFormat(
        tokenizer, golden_prompts.build_golden_prompts(tokenizer), facts.end_tokens, ()
    )
    adds = bool(tokenizer.bos_token) and tokenizer.bos_token_id in tokenizer("").input_ids
    return Case(name, trained, adds, *prompt_parity.derive_ollama_turns(trained, adds))


def stand_in(family: "template_families.Family", text: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's special tokens and no other: no id of it is looked at."""
    meta = vocabularies.header(family.vocabulary)
    bos = family.bos or vocabularies.named(meta, "bos") or "<s>"
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, bos: 2}, "<unk>"))
    if family.bos or meta.get("tokenizer.ggml.add_bos_token", family.vocabulary == "llama-bpe"):
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 2)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", bos_token=bos, eos_token=family.stop
    )
    made.add_tokens(list(dict.fromkeys(family.added)), special_tokens=True)
    made.chat_template = text
    return made


def page() -> str:
    """The whole of docs/templates.md."""
    found = cases()
    yes, embedded, alone, refused = (
        sum(status(case) == wanted and bool(case.turns) == carried for case in found)
        for wanted, carried in (("yes", True), ("embedded", True), ("embedded", False), ("refused", False))
    )
    counts = (
        f"Of {len(found)} templates {yes} are derived and nothing is left out, {embedded} are embedded with a proven\n"
        f"TEMPLATE carried too, {alone} are embedded and have no TEMPLATE, and {refused} are refused.\n"
    )
    return "\n".join([HEAD, counts, *TABLE, *map(row, found), ""])


HEAD = """<!-- Written by `python docs/templates.py`: do not edit. -->

# What Ollama uses of each chat template

A model is trained with a chat template written in Jinja. Ollama can be told the same format in two ways.

- **yes**: Ferry read off what stands before and after each role's words, writes it as a TEMPLATE into the Modelfile,
  and has proven that it gives the trained prompt on every golden conversation.
- **embedded**: the template does something that a TEMPLATE cannot say, and the last column says what. Ollama uses the
  Jinja template inside the GGUF. Where the only reasons are "it has tools" and "it has thinking", a TEMPLATE for plain
  chats is carried too, if one is proven (then the table says where the system prompt stands). Ollama prefers the
  embedded one; both give the same prompt.
- **refused**: no row could be trained faithfully with this template, so there is nothing to serve.

The templates are those that llama.cpp carries, those inside its vocabularies, and Ferry's own, each as it would be
trained: its date frozen, its thinking off, its BOS put first.
*trimmed*: roles whose words lose the white space at their ends.
"""
TABLE = ["| template | derived | system prompt | trimmed | reason |", "|---|---|---|---|---|"]


def status(case: Case) -> str:
    if not case.trained:
        return "refused"
    return "embedded" if case.reasons else "yes"


def row(case: Case) -> str:
    place = trimmed = ""
    if case.turns:
        place = PLACES[case.turns.place] if case.turns.system else "none"
        trimmed = ", ".join(case.turns.trimmed)
    return f"| {case.name} | {status(case)} | {place} | {trimmed} | {cell('; '.join(case.reasons))} |"


def cell(text: str) -> str:
    """Text that a Markdown table takes: the texts of templates are full of bars and tags."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
