"""Every chat template that llama.cpp carries, with real vocabularies: what is trained is what will be served."""

import copy
import functools
import itertools
import unicodedata
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _cached_compile_jinja_template

from common.errors import UserError
from contract import chat_format, template_sandbox
from pipeline.config import references
from pipeline.data import chat_template
from pipeline.data.drop_reasons import UnusableRow
from pipeline.data.loss_mask import Masker, TokenizedRow
from pipeline.toolchain import llama_tools
from tests.helpers import vocabularies
from tests.helpers.commands import refuses
from tests.helpers.template_families import (
    CHATML,
    DAY,
    EMBEDDED,
    NAMED,
    OWN,
    REFUSED,
    STAND_INS,
    WILLING,
    Family,
    source,
    stems,
)

pytestmark = pytest.mark.slow  # every template that llama.cpp carries

SYSTEM = {"role": "system", "content": "Answer the crew of the MS Kräftig."}
ANSWERS = [
    "Because.",
    "Pier 12, 07:45, 1234567.89 EUR (100%).",
    "🚢 leaves, naïve “quotes”, 日本語, cafe\u0301 👩‍👩‍👧‍👦",
    'def f(x):\n\treturn {"a": x**2}  # two  spaces\n\n\nprint(f(3))',
    "First line\n- second, don't\n\n1. third: <b>no token</b> {{ nor a }} template",
]


def conversations() -> list[list[dict]]:
    """Every answer alone, two in one conversation, and after a system prompt."""
    single = [[asked("Why 17*23?"), said(answer)] for answer in ANSWERS]
    double = [one + [asked("And then?\nTell me."), *two[1:]] for one, two in itertools.pairwise(single)]
    return [*single, *double, [SYSTEM, *single[0]], [SYSTEM, *double[-1]]]


def asked(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


@functools.cache
def tokens(vocabulary: str, bos: str) -> dict:
    """What all families of a vocabulary need in it: a token that a text does not hold changes nothing."""
    families = [f for table in (OWN, STAND_INS, NAMED, EMBEDDED) for f in table.values()] + [WILLING]
    sharing = [family for family in families if (family.vocabulary, family.bos) == (vocabulary, bos)]
    return {
        "specials": dict.fromkeys(token for family in sharing for token in family.added),
        "words": dict.fromkeys(token for family in sharing for token in family.words.split()),
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """prepared(family, template) -> a base model's folder.

    Reading back what was just written takes seconds for each vocabulary, so AutoTokenizer hands out the written tokenizer;
    folders that a test writes itself are read.
    """
    made, wanted, from_pretrained = {}, {}, AutoTokenizer.from_pretrained

    @functools.cache
    def written(vocabulary: str, bos: str) -> Path:
        place = tmp_path_factory.mktemp("tokenizer")
        made[place] = vocabularies.tokenizer(vocabulary, bos=bos, **tokens(vocabulary, bos))
        made[place].save_pretrained(place)
        return place

    def prepare(family: Family, text: str) -> Path:
        place = written(family.vocabulary, family.bos)
        wanted[place] = family.stop, vocabularies.named(vocabularies.header(family.vocabulary), "padding"), text
        return place

    def read(place: Path):
        if place not in made:
            return from_pretrained(place)
        made[place].eos_token, made[place].pad_token, made[place].chat_template = wanted[place]
        return made[place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", read)
        yield prepare


class Loaded:
    """What the data stage works with, and the labels it must find."""

    def __init__(self, family: Family, base: Path, place: Path, name: str = "tokenizer"):
        self.family = family
        self.tokenizer, self.chat, self.notes = chat_template.load_chat_tokenizer(base, name, DAY)
        self.tokenizer.save_pretrained(place)
        self.masker = Masker(place, self.chat)
        self.last = copy.copy(self.masker)
        self.last.every_turn = False

    def prompt(self, messages: list[dict]) -> str:
        """What transformers serves."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answer(self, text: str, last: bool) -> str:
        """What the labelled tokens of one answer must say."""
        words = self.family.scaffold + text + (self.family.last if last and self.family.last else self.family.end)
        # SentencePiece writes a word's first space with it and takes it off when it decodes.
        return words.removeprefix(" ") if self.family.vocabulary == "llama-spm" else words

    def prove(self, messages: list[dict], row: TokenizedRow, turns: list[int]) -> None:
        """Each answer of `turns` is labelled to its end, follows the very prompt that is served, and nothing else is."""
        runs = labelled(row)
        assert len(runs) == len(turns)
        for (start, stop), turn in zip(runs, turns, strict=True):
            wanted = self.answer(messages[turn]["content"], last=turn == len(messages) - 1)
            assert same(self.tokenizer.decode(row.ids[start:stop]), wanted)
            assert self.tokenizer.decode(row.ids[stop - 1]) == self.end(turn, messages)
            assert row.ids[:start].tolist() == self.ids(self.prompt(messages[:turn]))
        assert row.prompt == self.prompt(messages[:-1])
        assert row.prompt_tokens == runs[-1][0]
        assert row.answer == messages[-1]["content"]
        assert self.begins(row)

    def end(self, turn: int, messages: list[dict]) -> str:
        last = turn == len(messages) - 1
        return (last and self.family.last) or self.family.end.strip()

    def begins(self, row: TokenizedRow) -> bool:
        """One BOS, at the start, if the tokenizer puts one there; else as the template has it."""
        bos, ids = self.tokenizer.bos_token_id, row.ids.tolist()
        if bos not in self.tokenizer("").input_ids:
            return True
        return ids[0] == bos and ids.count(bos) == 1


def labelled(row: TokenizedRow) -> list[tuple[int, int]]:
    """(first, last + 1) of every unbroken run of tokens that carry loss."""
    edges = [i for i in range(len(row.ids) + 1) if (i < len(row.ids) and row.loss[i]) != (i > 0 and row.loss[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def same(text: str, wanted: str) -> bool:
    """Qwen 2 composes what is written as letter and accent."""
    return unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", wanted)


def prove_all(loaded: Loaded) -> None:
    proven = 0
    for messages in conversations():
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not loaded.family.system and messages[0] == SYSTEM:
            assert not loaded.chat.supports_system
            with pytest.raises(UnusableRow):
                loaded.masker(messages)
            continue
        if loaded.family.turns == "last" and len(answers) > 1:
            with pytest.raises(UnusableRow, match="data.labels: last"):
                loaded.masker(messages)
        else:
            every = loaded.family.turns == "every"
            loaded.prove(messages, loaded.masker(messages), answers if every else answers[-1:])
        loaded.prove(messages, loaded.last(messages), answers[-1:])
        proven += 1
    assert proven >= 9


# Vocabularies


@pytest.mark.parametrize("name", vocabularies.NAMES)
def test_a_rebuilt_vocabulary_gives_the_models_own_ids(name):
    core, vectors = vocabularies.core(name), vocabularies.vectors(name)
    assert len(vectors) > 40
    assert [core.encode(text, add_special_tokens=False).ids for text, _ in vectors] == [ids for _, ids in vectors]


def test_every_family_uses_a_proven_vocabulary():
    families = [*OWN.values(), *STAND_INS.values(), *NAMED.values(), *EMBEDDED.values(), WILLING]
    assert {family.vocabulary for family in families} <= set(vocabularies.NAMES)


# Rendering


@pytest.mark.parametrize("stem", stems())
def test_a_template_renders_as_transformers_renders_it(stem):
    text, theirs, rendered = source(stem), _cached_compile_jinja_template(source(stem)), 0
    for messages in [[asked("Why?")], [SYSTEM, asked("Why?")], *conversations()]:
        for prompted in (True, False):
            try:
                wanted = theirs.render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=prompted, bos_token="<s>", eos_token="</s>"
                )  # fmt: skip
            except Exception:  # noqa: BLE001 (whatever theirs says, ours is a UserError)
                with refuses("template.render_failed"):
                    chat_format.render(text, messages, "<s>", "</s>", prompted)
            else:
                assert chat_format.render(text, messages, "<s>", "</s>", prompted) == wanted
                rendered += 1
    assert rendered or stem in REFUSED


# Labels


def test_every_template_is_proven_or_refused():
    assert sorted([*OWN, *STAND_INS, *REFUSED]) == stems()
    assert len(stems()) > 60


@pytest.mark.parametrize("stem", [*OWN, *STAND_INS])
def test_labels_are_the_answers_and_their_ends(stem, prepared, tmp_path):
    family = OWN.get(stem) or STAND_INS[stem]
    loaded = Loaded(family, prepared(family, source(stem)), tmp_path)
    assert loaded.chat.is_joined == (family.turns == "joined")
    prove_all(loaded)


@pytest.mark.parametrize("name", EMBEDDED)
def test_labels_with_the_template_inside_a_vocabularys_file(name, prepared, tmp_path):
    text = vocabularies.header(name)["tokenizer.chat_template"]
    prove_all(Loaded(EMBEDDED[name], prepared(EMBEDDED[name], text), tmp_path))


@pytest.mark.parametrize("name", references.list_template_names())
def test_labels_with_ferrys_own_templates(name, prepared, tmp_path):
    prove_all(Loaded(NAMED[name], prepared(NAMED[name], "not looked at"), tmp_path, name))


def test_the_default_template_of_hermes_is_chatml(prepared, tmp_path):
    family = Family("llama-bpe", "<|im_end|>", CHATML)
    loaded = Loaded(family, prepared(family, "not looked at"), tmp_path, "chatml")
    assert any("no BOS" in note for note in loaded.notes)
    prove_all(loaded)


def test_rows_that_reason_keep_the_template_thinking(prepared, tmp_path):
    family = OWN["Qwen-Qwen3-0.6B"]
    tokenizer, facts, notes = chat_template.load_chat_tokenizer(
        prepared(family, source("Qwen-Qwen3-0.6B")), "tokenizer", DAY, has_reasoning=True
    )
    assert not any("thinking" in note for note in notes)
    tokenizer.save_pretrained(tmp_path)
    answer = "<think>\nFirst 17, then 23.\n</think>\n\n391"
    row = Masker(tmp_path, facts)([asked("Why?"), said(answer)])
    assert tokenizer.decode(row.ids[row.loss]) == answer + "<|im_end|>"
    assert row.prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "stem", ["GLM-4.7-Flash", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Qwen3.5-4B", "Spark2.5", "poolside-Laguna-S-2.1"]
)
def test_rows_that_reason_are_refused_where_the_prompt_has_begun_to(stem, prepared):
    """They would learn to close the block that the prompt opens, and to open another."""
    base = prepared(OWN.get(stem) or STAND_INS[stem], source(stem))
    with refuses("template.prompt_mismatch") as error:
        chat_template.load_chat_tokenizer(base, "tokenizer", DAY, has_reasoning=True)
    assert "<think>" in error.value.message


def test_of_several_templates_the_default_is_trained(tmp_path):
    tokenizer = vocabularies.tokenizer("llama-spm", eos="<|im_end|>", specials=CHATML.split())
    chatml = (references.TEMPLATE_FOLDER / "chatml.jinja").read_text()
    tokenizer.chat_template = {"default": chatml, "tool_use": source("NousResearch-Hermes-3-Llama-3.1-8B-tool_use")}
    tokenizer.save_pretrained(tmp_path)
    _, facts, _ = chat_template.load_chat_tokenizer(tmp_path, "tokenizer", DAY)
    assert facts.template == "{{ bos_token }}" + chatml


# Refusals


@pytest.mark.parametrize("stem", REFUSED)
def test_a_template_that_cannot_be_trained_faithfully_is_refused(stem, prepared):
    code, value = REFUSED[stem]
    with refuses(code) as error:
        chat_template.load_chat_tokenizer(prepared(WILLING, source(stem)), "tokenizer", DAY)
    assert value in error.value.message and "data.template" in error.value.hint


SAYS = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
TURN = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


@pytest.mark.parametrize(
    ("text", "code", "value"),
    [
        ("{{ bos_token + bos_token }}" + SAYS + TURN, "template.double_bos", "<s>"),
        ("{{ functions }}" + SAYS + TURN, "template.undefined_variable", "functions"),
        ("{% for m in messages %}{{ m.content }}", "template.refused", "Unexpected end of template"),
        ("{% set form = '%Y' %}{{ strftime_now(form) }}" + SAYS + TURN, "template.computed_date", "date"),
        ("{{ strftime_now('%Y' + '-%m') }}" + SAYS + TURN, "template.computed_date", "date"),
        (SAYS.replace("eos_token", "'\n'") + TURN, "template.no_end_token", "special token"),
        (SAYS + TURN + "{% if add_generation_prompt %}<think>{% endif %}", "template.prompt_mismatch", "<think>'"),
        ("{{ raise_exception('no rows today') }}", "template.refused", "no rows today"),
        ("{{ messages[0].content }}" + TURN, "template.prompt_mismatch", "assistant: '"),
    ],
)
def test_a_template_is_refused_with_its_fault(text, code, value, prepared):
    with refuses(code) as error:
        chat_template.load_chat_tokenizer(prepared(Family("llama-spm", "</s>"), text), "tokenizer", DAY)
    assert value in error.value.message and "data.template" in error.value.hint


def test_a_wrapped_template_with_two_bos_is_refused(prepared):
    text = "{{ bos_token }}" + source("meta-llama-Llama-3.1-8B-Instruct")
    with refuses("template.double_bos"):
        chat_template.load_chat_tokenizer(prepared(OWN["meta-llama-Llama-3.1-8B-Instruct"], text), "tokenizer", DAY)


def test_a_tokenizer_that_has_no_fast_form_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "ctrl"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with refuses("tokenizer.not_fast"):
        chat_template.load_chat_tokenizer(tmp_path, "chatml", DAY)


def test_a_tokenizer_without_a_template_names_those_that_fit(tmp_path):
    vocabularies.tokenizer("llama-spm").save_pretrained(tmp_path)
    with refuses("tokenizer.no_chat_template") as error:
        chat_template.load_chat_tokenizer(tmp_path, "tokenizer", DAY)
    assert all(name in error.value.hint for name in references.list_template_names())


# Date, BOS, pad


@pytest.mark.parametrize("stem", [s for s in stems() if "strftime_now" in source(s)] if llama_tools.is_set_up() else [])
def test_the_frozen_date_is_the_same_on_any_day(stem, prepared, monkeypatch):
    family = OWN.get(stem) or STAND_INS[stem]
    _, facts, notes = chat_template.load_chat_tokenizer(prepared(family, source(stem)), "tokenizer", DAY)
    assert any("frozen to 2024-07-26" in note for note in notes)
    texts = set()
    for year in (2025, 2031):
        monkeypatch.setattr(chat_format, "datetime", clock(year))
        texts.add(facts.render([asked("Why?"), said("Because.")]))
    assert len(texts) == 1
    assert "2024-07-26" in texts.pop().replace("26 Jul 2024", "2024-07-26").replace("July 26, 2024", "2024-07-26")


def clock(year: int) -> type:
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, 1, 2, tzinfo=tz)

    return Clock


def test_the_raw_template_shows_another_date_each_day(monkeypatch):
    texts = set()
    for year in (2025, 2031):
        monkeypatch.setattr(chat_format, "datetime", clock(year))
        texts.add(chat_format.render(source("meta-llama-Llama-3.2-3B-Instruct"), [asked("Why?")]))
    assert len(texts) == 2


def test_a_missing_bos_is_put_first_once(prepared, tmp_path):
    family = STAND_INS["openbmb-MiniCPM5-1B"]
    base = prepared(family, (references.TEMPLATE_FOLDER / "chatml.jinja").read_text())
    loaded = Loaded(family, base, tmp_path / "once")
    assert any("no BOS" in note for note in loaded.notes)
    assert loaded.prompt([asked("Why?")]).count("<s>") == 1
    again = Loaded(family, tmp_path / "once", tmp_path / "again")
    assert again.chat.template == loaded.chat.template
    assert not any("BOS" in note for note in again.notes)


def test_a_tokenizer_that_adds_no_bos_gets_none(prepared):
    family = OWN["Qwen-Qwen2.5-7B-Instruct"]
    tokenizer, facts, notes = chat_template.load_chat_tokenizer(
        prepared(family, source("Qwen-Qwen2.5-7B-Instruct")), "tokenizer", DAY
    )
    assert facts.template == source("Qwen-Qwen2.5-7B-Instruct")
    assert not any("BOS" in note for note in notes)
    assert tokenizer.bos_token not in facts.render([asked("Why?")])


@pytest.mark.parametrize(
    ("pad", "eos"), [(None, "</s>"), ("</s>", "</s>"), ("<|im_end|>", "</s>"), ("<|im_end|>", "<|im_end|>")]
)
def test_padding_never_ends_an_answer(pad, eos, tmp_path):
    tokenizer = vocabularies.tokenizer("llama-spm", eos=eos, specials=CHATML.split())
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    tokenizer, facts, notes = chat_template.load_chat_tokenizer(tmp_path, "chatml", DAY)
    assert tokenizer.pad_token not in {None, eos, *facts.end_tokens}
    tokenizer.save_pretrained(tmp_path)
    row = Masker(tmp_path, facts)([asked("Why?"), said("Because.")])
    assert tokenizer.pad_token_id not in row.ids[row.loss]
    assert any(f"pad token is changed from {pad or 'none'} to" in note for note in notes) == (
        pad in {None, eos, *facts.end_tokens}
    )


def test_a_pad_token_of_its_own_is_kept(prepared):
    base = prepared(OWN["google-gemma-4-31B-it"], source("google-gemma-4-31B-it"))
    tokenizer, _, notes = chat_template.load_chat_tokenizer(base, "tokenizer", DAY)
    assert tokenizer.pad_token == "<pad>"
    assert not any("pad token" in note for note in notes)


def test_a_tokenizer_with_its_end_token_alone_cannot_pad(prepared):
    with refuses("tokenizer.no_pad_token"):
        chat_template.load_chat_tokenizer(prepared(Family("gpt-2", "<|endoftext|>"), "not looked at"), "alpaca", DAY)


def test_a_full_disk_is_not_called_a_fault_of_the_template(prepared, monkeypatch):
    def full(*_):
        raise UserError("cannot write a temporary file", "free disk space", code="disk.no_temporary_file")

    monkeypatch.setattr(template_sandbox, "render_prompts", full)
    chat_template.render_in_sandbox.cache_clear()  # another test may have rendered this template
    with refuses("disk.no_temporary_file") as error:
        chat_template.load_chat_tokenizer(prepared(NAMED["zephyr"], "not looked at"), "zephyr", DAY)
    assert error.value.hint == "free disk space"
