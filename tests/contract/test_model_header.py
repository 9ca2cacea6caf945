"""What a stranger's GGUF may say: files that llama.cpp would end its process over are refused by their header alone."""

import gguf as gguf_py
import pytest

from common import child_process, gguf_reader, llama_runtime
from contract import model_header
from tests.fuzzing.inputs import SHAPES, model_facts, write_model
from tests.helpers.commands import refuses

TOKENS = model_facts()["tokenizer.ggml.tokens"]
MANY = 1 << 40
HOSTILE = {
    "a second template": ({"tokenizer.chat_template.tool_use": "{{ 1 }}"}, "header.unknown_key", "tokenizer.chat_template.tool_use"),
    "templates by a list": ({"tokenizer.chat_templates": ["a", "b"]}, "header.unknown_key", "tokenizer.chat_templates"),
    "a template that is a number": ({"tokenizer.chat_template": 5}, "header.wrong_value_type", "tokenizer.chat_template is int"),
    "a key of nobody's": ({"run.this": "x"}, "header.unknown_key", "run.this"),
    "another architecture's key": ({"gemma2.block_count": 1}, "header.unknown_key", "gemma2.block_count"),
    "a tokenizer of a program": ({"tokenizer.huggingface.json": "{}"}, "header.unknown_key", "tokenizer.huggingface.json"),
    "a template of 2 MB": ({"tokenizer.chat_template": "x" * (2 << 20)}, "header.text_too_long", "tokenizer.chat_template has 2,097,152 characters"),
    "an end beyond the vocabulary": ({"tokenizer.ggml.eos_token_id": len(TOKENS)}, "header.token_id_out_of_range", "eos_token_id is 64"),
    "a beginning far beyond": ({"tokenizer.ggml.bos_token_id": (1 << 32) - 1}, "header.token_id_out_of_range", "bos_token_id is 4294967295"),
    "an unknown token below nought": ({"tokenizer.ggml.unknown_token_id": -1}, "header.token_id_out_of_range", "unknown_token_id is -1"),
    "a turn's end that is text": ({"tokenizer.ggml.eot_token_id": "</s>"}, "header.token_id_out_of_range", "eot_token_id is </s>"),
    "a prefix beyond the vocabulary": ({"tokenizer.ggml.fim_pre_token_id": 9999}, "header.token_id_out_of_range", "fim_pre_token_id is 9999"),
    "tokens to suppress beyond it": ({"tokenizer.ggml.suppress_tokens": [1, 9999]}, "header.token_id_out_of_range", "suppress_tokens is [1, 9999]"),
    "a token twice": ({"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[0]]}, "header.duplicate_token", "tokenizer.ggml.tokens"),
    "tokens that are numbers": ({"tokenizer.ggml.tokens": [1, 2, 3]}, "header.no_tokens", "tokenizer.ggml.tokens"),
    "too few token types": ({"tokenizer.ggml.token_type": [1, 1]}, "header.wrong_list_length", "tokenizer.ggml.token_type"),
    "too many scores": ({"tokenizer.ggml.scores": [0.5] * 65}, "header.wrong_list_length", "tokenizer.ggml.scores"),
    "embeddings of another vocabulary": ({"tokenizer.ggml.tokens": TOKENS[:-1], "tokenizer.ggml.token_type": [1] * 63}, "header.wrong_embedding_rows", "64 rows for 63"),
    "no layer": ({"llama.block_count": 0}, "header.bad_layer_count", "block_count is 0"),
    "a billion layers": ({"llama.block_count": MANY}, "header.number_too_large", "block_count is 1099511627776"),
    "layers without tensors": ({"llama.block_count": 32}, "header.wrong_layers", "tensors of 1 layers"),
    "layers that are text": ({"llama.block_count": "1"}, "header.bad_layer_count", "block_count is 1"),
    "a context without end": ({"llama.context_length": 1 << 31}, "header.bad_context_length", "context_length is 2147483648"),
    "an infinite base of RoPE": ({"llama.rope.freq_base": float("inf")}, "header.not_finite", "freq_base is inf"),
    "an epsilon that is no number": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "header.not_finite", "epsilon is nan"),
    "a width beyond all": ({"llama.embedding_length": MANY}, "header.number_too_large", "embedding_length is 1099511627776"),
    "a list for each of a million layers": ({"llama.attention.head_count_kv": [1] * 5000}, "header.list_too_long", "head_count_kv has 5,000 items"),
    "more experts than used": ({"llama.expert_used_count": 2}, "header.bad_expert_count", "0 experts, of which 2"),
    "too many experts": ({"llama.expert_count": 513, "llama.expert_used_count": 1}, "header.bad_expert_count", "513 experts"),
    "drafts of layers that are not there": ({"llama.nextn_predict_layers": 512}, "header.bad_drafting_layers", "nextn_predict_layers is 512"),
    "a scaling that is none": ({"llama.rope.scaling.type": "t5"}, "header.unknown_rope_scaling", "rope.scaling.type is t5"),
    "an architecture with a slash": ({"general.architecture": "../x"}, "header.bad_architecture", "general.architecture is '../x'"),
}  # fmt: skip


def in_fresh_process(function: str, *arguments) -> object:
    """A fork of this process has all that earlier tests loaded, which may be more than its limit of memory."""
    return child_process.call_in_child(
        f"tests.fuzzing.inputs:{function}", list(arguments), child_process.Limits(120, 4 << 30), "the model"
    )


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_refused(tmp_path, case):
    changes, code, value = HOSTILE[case]
    path = tmp_path / "tiny.gguf"
    write_model(path, model_facts() | changes)
    with refuses(code) as caught:
        model_header.refuse_impossible_header(gguf_reader.read_header(path), path.name)
    assert value in caught.value.message and path.name in caught.value.message and "\n" not in caught.value.message


def test_the_model_itself_is_taken_and_answers(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_model(path, model_facts())
    model_header.refuse_impossible_header(gguf_reader.read_header(path), path.name)
    assert in_fresh_process("load_in_fork", str(path)) == "answers"


def test_a_layer_of_another_number_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_model(path, model_facts(), SHAPES | {"blk.7.attn_norm.weight": (32,)})
    with refuses("header.wrong_layers") as error:
        model_header.refuse_impossible_header(gguf_reader.read_header(path), path.name)
    assert "block_count is 1" in error.value.message and "2 layers" in error.value.message


def test_a_base_model_may_hold_other_keys_but_no_impossible_number(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_model(path, model_facts() | {"tokenizer.chat_template.tool_use": "{{ 1 }}", "some.body": "x"})
    model_header.refuse_impossible_header(gguf_reader.read_header(path), path.name, made_by_ferry=False)
    write_model(path, model_facts() | {"tokenizer.ggml.eos_token_id": 9999})
    with refuses("header.token_id_out_of_range") as error:
        model_header.refuse_impossible_header(gguf_reader.read_header(path), path.name, made_by_ferry=False)
    assert "eos_token_id is 9999" in error.value.message


def test_every_key_of_a_tokenizer_that_gguf_py_knows_is_decided_about():
    known = {value for name, value in vars(gguf_py.Keys.Tokenizer).items() if isinstance(value, str) and name[0] != "_"}
    open_ = {
        key
        for key in known
        if key not in model_header.TOKENIZER_KEY_TYPES and not model_header.TOKEN_ID_KEY.fullmatch(key)
    }
    assert open_ == {
        "tokenizer.huggingface.json", "tokenizer.rwkv.world", "tokenizer.chat_template.{name}", "tokenizer.chat_templates",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"])
def test_no_library_compiles_a_template_in_our_process(tmp_path, key, monkeypatch):
    """llama-cpp-python compiles every template of a file when it opens it."""
    from jinja2 import Environment

    compiled = []
    monkeypatch.setattr(Environment, "from_string", lambda self, text, **_: compiled.append(text))
    path = tmp_path / "tiny.gguf"
    write_model(path, model_facts() | {key: "{% for a in range(9) %}x{% endfor %}"})
    llama_runtime.load_model(path, 64).close()
    assert compiled == []


def test_bent_headers_are_refused_or_loaded_by_a_child():
    counts = in_fresh_process("fuzz_model", 60, 11, 150)
    assert counts["tried"] == 150 and counts["refused by the header"] > 50 and counts["answers"] > 3
    assert not any(how.startswith("hangs") for how in counts), counts
