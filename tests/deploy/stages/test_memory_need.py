"""What a GGUF takes in memory, said from its header, is what llama.cpp says when it makes room for it.

llama.cpp lays out a model from its metadata alone and allocates nothing, so its own log tells of real shapes of every size.
"""

import ctypes
import io
import re
import time
from pathlib import Path

import pytest

from common import gguf_reader, llama_runtime
from deploy.stages import memory_need

MB = 1 << 20
CONTEXTS = (512, 4096, 131_072)


def attention(width: int, layers: int, wide: int, heads: int, kept: "int | list", size: int, **more) -> dict:
    """Metadata of a model: feed-forward width `wide`; `kept` heads of keys and values, each of `size` numbers."""
    return {
        "context_length": 131_072, "embedding_length": width, "block_count": layers, "feed_forward_length": wide,
        "attention.head_count": heads, "attention.head_count_kv": kept, "attention.key_length": size,
        "attention.value_length": size, "rope.dimension_count": size, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
    } | {name.replace("__", "."): value for name, value in more.items()}  # fmt: skip


def window(tokens: int, **more) -> dict:
    return {"attention__sliding_window": tokens} | {f"attention__{name}": value for name, value in more.items()}


def mamba(inner: int, held: int, rank: int, groups: int = 1) -> dict:
    return {
        "ssm__conv_kernel": 4, "ssm__inner_size": inner, "ssm__state_size": held, "ssm__time_step_rank": rank,
        "ssm__group_count": groups,
    }  # fmt: skip


def experts(count: int, used: int, wide: int, **more) -> dict:
    return {"expert_count": count, "expert_used_count": used, "expert_feed_forward_length": wide} | more


# Architecture, metadata, vocabulary: the real ones'.
EXACT = {
    "SmolLM2 135M": ("llama", attention(576, 30, 1536, 9, 3, 64), 49_152),
    "Llama 3.1 8B": ("llama", attention(4096, 32, 14_336, 32, 8, 128), 128_256),
    "Llama 2 13B": ("llama", attention(5120, 40, 13_824, 40, 40, 128), 32_000),
    "Llama 3 70B": ("llama", attention(8192, 80, 28_672, 64, 8, 128), 128_256),
    "Qwen 2.5 0.5B": ("qwen2", attention(896, 24, 4864, 14, 2, 64), 151_936),
    "Qwen 2.5 7B": ("qwen2", attention(3584, 28, 18_944, 28, 4, 128), 152_064),
    "Qwen 3 30B-A3B": ("qwen3moe", attention(2048, 48, 6144, 32, 4, 128, **experts(128, 8, 768)), 151_936),
    "Phi 3.5 mini": ("phi3", attention(3072, 32, 8192, 32, 32, 96, **window(262_144)), 32_064),
    "Gemma 2 2B": ("gemma2", attention(2304, 26, 9216, 8, 4, 256, **window(4096)), 256_000),
    "Gemma 2 27B": ("gemma2", attention(4608, 46, 36_864, 32, 16, 128, **window(4096)), 256_000),
    "Gemma 3 1B": ("gemma3", attention(1152, 26, 6912, 4, 1, 256, **window(512)), 262_144),
    "Gemma 3 27B": ("gemma3", attention(5376, 62, 21_504, 32, 16, 128, **window(1024)), 262_208),
    "Gemma 4 E2B": (
        "gemma4",
        attention(
            1536, 35, 6144, 8, 1, 512, embedding_length_per_layer_input=256,
            **window(512, sliding_window_pattern=([True] * 4 + [False]) * 7, key_length_swa=256, value_length_swa=256, shared_kv_layers=20),
            rope__dimension_count_swa=256,
        ),
        262_144,
    ),
    "gpt-oss 20B": ("gpt-oss", attention(2880, 24, 2880, 64, 8, 64, **window(128), **experts(32, 4, 2880)), 201_088),
    "Command R7B": ("cohere2", attention(4096, 32, 14_336, 32, 8, 128, **window(4096), logit_scale=0.25), 256_000),
    "Olmo 3 7B": ("olmo2", attention(4096, 32, 11_008, 32, 32, 128, **window(4096)), 100_278),
    "DeepSeek V2 Lite": (
        "deepseek2",
        attention(
            2048, 27, 10_944, 16, 1, 576, attention__value_length=512, attention__key_length_mla=192,
            attention__value_length_mla=128, attention__kv_lora_rank=512, rope__dimension_count=64,
            leading_dense_block_count=1, **experts(64, 6, 1408, expert_shared_count=2, expert_weights_scale=1.0),
        ),
        102_400,
    ),
    "Granite 4 micro": (
        "granitehybrid",
        attention(2048, 40, 8192, 32, ([0] * 9 + [8]) * 4, 64, **mamba(4096, 128, 64)),
        100_352,
    ),
    "Qwen 3.5 9B": (
        "qwen35",
        attention(
            4096, 32, 12_288, 16, 4, 256, rope__dimension_count=64, rope__dimension_sections=[11, 11, 10, 0],
            full_attention_interval=4, **mamba(4096, 128, 32, 16),
        ),
        248_320,
    ),
    "Qwen 3.5 with 30 layers": (
        "qwen35",
        attention(
            4096, 30, 12_288, 16, 4, 256, rope__dimension_count=64, rope__dimension_sections=[11, 11, 10, 0],
            full_attention_interval=4, **mamba(4096, 128, 32, 16),
        ),
        248_320,
    ),
    "LFM2 1.2B": ("lfm2", attention(2048, 16, 8192, 32, [0, 0, 8, 0] * 4, 64, shortconv__l_cache=3), 65_536),
    "Falcon H1 1.5B": ("falcon-h1", attention(2048, 24, 4096, 8, 2, 128, **mamba(3072, 256, 48)), 65_537),
    "Mamba 2 2.7B": ("mamba2", attention(2560, 64, 0, 0, 0, 0, **mamba(5120, 128, 80)), 50_288),
    "RWKV 7 1.5B": (
        "rwkv7",
        attention(
            2048, 24, 8192, 0, 0, 0, wkv__head_size=64, token_shift_count=2, attention__decay_lora_rank=96,
            attention__iclr_lora_rank=96, attention__value_residual_mix_lora_rank=64, attention__gate_lora_rank=256,
        ),
        65_536,
    ),
}  # fmt: skip
# What stands in llama.cpp's code and in no header is counted as if every layer saw the whole text.
MORE = {
    "Llama 4 Scout": (
        "llama4",
        attention(5120, 48, 16_384, 40, 8, 128, **experts(16, 1, 8192), interleave_moe_layer_step=1),
        202_048,
    ),
    "Gemma 3n E4B": (
        "gemma3n",
        attention(
            2048, 35, 16_384, 8, 2, 256, **window(512), embedding_length_per_layer_input=256, altup__active_idx=0, altup__num_inputs=4
        ),
        262_400,
    ),
}  # fmt: skip


def write(path: Path, kind: str, facts: dict, words: int) -> gguf_reader.Header:
    """A GGUF of nothing but metadata."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, kind)
    for key, value in facts.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{kind}.{key}", value)
    writer.add_uint32(f"{kind}.vocab_size", words)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_reader.read_header(path)


class Parameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@pytest.fixture
def said():
    """What llama.cpp logs meanwhile."""
    import llama_cpp
    from llama_cpp import _logger

    lines: list[str] = []
    hear = llama_cpp.llama_log_callback(lambda level, text, _: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(hear, ctypes.c_void_p(0))
    yield lines
    llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


@pytest.fixture
def laid_out(said):
    """laid_out(path, context): MB of cache, state and compute buffers, by llama.cpp."""
    import llama_cpp

    base = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    base.gguf_init_from_file.argtypes, base.gguf_init_from_file.restype = [ctypes.c_char_p, Parameters], ctypes.c_void_p
    base.gguf_free.argtypes = [ctypes.c_void_p]
    fill = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: None)

    def ask(path: Path, context: int) -> tuple[float, float, float]:
        metadata = base.gguf_init_from_file(str(path).encode(), Parameters(True, None))
        params = llama_cpp.llama_model_default_params()
        params.no_alloc, params.load_mode, params.n_gpu_layers = True, 0, 0
        model = llama_cpp.llama_model_init_from_user(metadata, fill, None, params)
        assert model, "".join(said)[-1000:]
        wish = llama_cpp.llama_context_default_params()
        wish.n_ctx, wish.n_batch, wish.swa_full, wish.flash_attn_type = context, memory_need.BATCH_TOKENS, False, 1
        said.clear()
        made = llama_cpp.llama_init_from_model(model, wish)
        assert made, "".join(said)[-1000:]
        text = "".join(said)
        llama_cpp.llama_free(made)
        llama_cpp.llama_model_free(model)
        base.gguf_free(metadata)
        return (
            total(r"llama_kv_cache\w*: size", text),
            total(r"recurrent\w*: size", text),
            total("compute buffer size", text),
        )

    return ask


def total(what: str, text: str) -> float:
    return sum(float(size) for size in re.findall(what + r" = +([\d.]+) MiB", text))


@pytest.mark.parametrize("name", EXACT)
def test_the_cache_is_what_llama_cpp_allocates(name, laid_out, tmp_path):
    header = write(tmp_path / "m.gguf", *EXACT[name])
    for context in CONTEXTS:
        assert memory_need.kv_cache_bytes(header, context) / MB == pytest.approx(
            laid_out(tmp_path / "m.gguf", context)[0], abs=0.01
        )


@pytest.mark.parametrize("name", EXACT | MORE)
def test_nothing_is_counted_too_low_and_little_too_high(name, laid_out, tmp_path):
    header = write(tmp_path / "m.gguf", *(EXACT | MORE)[name])
    for context in CONTEXTS:
        cache, state, compute = laid_out(tmp_path / "m.gguf", context)
        assert memory_need.kv_cache_bytes(header, context) / MB >= cache - 0.01
        assert state - 0.01 <= memory_need.recurrent_state_bytes(header) / MB <= 1.6 * state
        assert compute <= memory_need.compute_buffer_bytes(header, context) / MB <= compute + 300


@pytest.mark.parametrize("context", [256, 1024, 2048])
def test_a_real_model_takes_what_was_said(source, context):
    header, log = gguf_reader.read_header(source), io.StringIO()
    model = llama_runtime.load_model(source, context, log=log)
    model.close()
    text = log.getvalue()
    assert (
        memory_need.kv_cache_bytes(header, context) / MB == pytest.approx(total("KV buffer size", text), abs=0.01) != 0
    )
    assert 0 < total("compute buffer size", text) <= memory_need.compute_buffer_bytes(header, context) / MB
    assert total("model buffer size", text) * MB <= source.stat().st_size
    need = memory_need.total_bytes(header, source.stat().st_size, context)
    assert need == source.stat().st_size + memory_need.kv_cache_bytes(
        header, context
    ) + memory_need.compute_buffer_bytes(header, context)


# How much context fits


@pytest.fixture
def llama(tmp_path) -> gguf_reader.Header:
    return write(tmp_path / "m.gguf", *EXACT["Llama 3.1 8B"])


WEIGHTS = 4_920_000_000  # as q4_k_m; a token takes 131,072 bytes


def test_what_is_wanted_is_given_where_it_fits(llama):
    for wanted in (1, 100, 1000, 2048, 131_072):
        assert memory_need.largest_context(llama, WEIGHTS, 64 << 30, wanted) == wanted


def test_a_model_gets_no_longer_context_than_it_was_made_for(llama):
    assert memory_need.largest_context(llama, WEIGHTS, 999 << 30, 500_000) == 131_072


def test_what_fits_is_a_multiple_of_256_and_one_more_does_not_fit(llama):
    for budget in range(5_500_000_000, 20_000_000_000, 777_777_777):
        fits = memory_need.largest_context(llama, WEIGHTS, budget, 131_072)
        assert fits and fits % 256 == 0
        assert (
            memory_need.total_bytes(llama, WEIGHTS, fits) <= budget < memory_need.total_bytes(llama, WEIGHTS, fits + 1)
        )
        assert (
            memory_need.largest_context(llama, WEIGHTS, memory_need.total_bytes(llama, WEIGHTS, fits), 131_072) == fits
        )


def test_an_8b_model_runs_on_a_mac_with_16_gb_and_not_on_one_with_8(llama):
    assert memory_need.largest_context(llama, WEIGHTS, int((8 * 2 / 3 - 1) * 2**30), 8192) == 0
    assert memory_need.largest_context(llama, WEIGHTS, int((16 * 2 / 3 - 1) * 2**30), 65_536) == 38_400


def test_nothing_fits_where_the_weights_do_not(llama):
    assert memory_need.largest_context(llama, WEIGHTS, WEIGHTS, 8192) == 0
    assert memory_need.largest_context(llama, WEIGHTS, 0, 100) == 0


# Headers that lie

HUGE = (1 << 63) - 1
HOSTILE = [
    {},
    {"general.architecture": "llama"},
    {"general.architecture": "llama", "llama.block_count": "32", "llama.embedding_length": [4096]},
    {"general.architecture": "llama", "llama.block_count": -1, "llama.context_length": -5},
    {"general.architecture": "llama", "llama.block_count": 0.5, "llama.attention.head_count": float("nan")},
    {"general.architecture": "llama", "llama.block_count": 4, "llama.attention.head_count_kv": ["a", -1]},
    {"general.architecture": "llama", "llama.block_count": 1 << 40, "llama.attention.head_count_kv": [8] * 4_000_000,
     "llama.feed_forward_length": [8] * 4_000_000, "llama.attention.sliding_window": 1,
     "llama.attention.sliding_window_pattern": [True] * 4_000_000, "llama.embedding_length": HUGE},
    {"general.architecture": "llama", "llama.block_count": 8, "llama.nextn_predict_layers": HUGE},
    {"general.architecture": ["llama"], "tokenizer.ggml.tokens": 7},
]  # fmt: skip


@pytest.mark.parametrize("metadata", HOSTILE, ids=range(len(HOSTILE)))
def test_a_lying_header_gives_a_number_at_once(metadata):
    header, started = gguf_reader.Header(3, metadata, ()), time.perf_counter()
    assert memory_need.total_bytes(header, 1000, 4096) >= 1000
    assert 0 <= memory_need.largest_context(header, 1000, 16 << 30, 1 << 24) <= 1 << 24
    assert time.perf_counter() - started < 2
