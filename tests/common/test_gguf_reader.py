"""No GGUF is believed: what the reader accepts llama.cpp accepts, and every lie in a header is named."""

import ctypes
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import gguf_reader
from common.errors import UserError
from pipeline.toolchain import llama_tools
from tests.fuzzing import readers
from tests.helpers.commands import refuses
from tests.helpers.gguf_bytes import DATA, LIES, TENSORS, alone, tensor, whole

# A whole file, any field of which can be made to lie


def of(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return path


# Lies


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named_in_one_line_quickly_and_in_little_memory(lie, tmp_path):
    content, code, value = LIES[lie]
    path, started = of(tmp_path, content), time.perf_counter()
    tracemalloc.start()
    with refuses(code) as caught:
        gguf_reader.read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert value in caught.value.message and caught.value.message.isprintable()
    assert len(caught.value.message) < 300 and peak < 100e6 and time.perf_counter() - started < 2


def test_what_the_lies_are_made_of_is_read(tmp_path):
    header = gguf_reader.read_header(of(tmp_path, whole()))
    assert header.version == 3 and header.metadata == {
        "general.architecture": "llama", "general.alignment": 32, "tokens": ["a", "", "é"], "scores": [0.5, -1.0],
        "yes": True, "odd": "\ufffd",
    }  # fmt: skip
    assert header.tensors == (
        gguf_reader.Tensor("one", (5, 2), "F32", 0, 40), gguf_reader.Tensor("two", (32, 2), "Q8_0", 64, 68),
        gguf_reader.Tensor("three", (8,), "F32", 160, 32),
    )  # fmt: skip
    assert gguf_reader.count_tensor_types(header) == {"F32": 2, "Q8_0": 1}
    assert gguf_reader.read_header(of(tmp_path, whole(version=2))).version == 2


def test_a_file_may_end_before_its_last_padding(tmp_path):
    for data in (40, 50, 64):
        assert gguf_reader.read_header(of(tmp_path, alone(TENSORS[0], data=data))).tensors[0].bytes == 40
    assert gguf_reader.read_header(of(tmp_path, whole(tensors=[], data=b""))).tensors == ()


def test_a_file_that_ends_anywhere_else_is_refused(tmp_path):
    content = whole()
    for end in range(len(content)):
        with pytest.raises(UserError) as caught:
            gguf_reader.read_header(of(tmp_path, content[:end]))
        assert caught.value.code in ("gguf.truncated", "gguf.impossible_count"), end


def test_a_header_is_read_only_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_reader, "MAX_HEADER_BYTES", 200)
    with refuses("gguf.header_too_long"):
        gguf_reader.read_header(of(tmp_path, whole()))


def test_the_data_of_a_large_file_is_not_read(tmp_path):
    path = of(tmp_path, alone(tensor(b"a", (1 << 32,))))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 34))  # 16 GB that take no disk
    tracemalloc.start()
    assert gguf_reader.read_header(path).tensors[0].bytes == 1 << 34
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize("place", ["missing", ".", "/dev/null"])
def test_what_is_no_file_is_refused(place, tmp_path):
    with refuses("gguf.not_a_file") as error:
        gguf_reader.read_header(tmp_path / place)
    assert str(tmp_path / place) in error.value.message


# llama.cpp as the judge


class Parameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@pytest.fixture(scope="module")
def accepts():
    """accepts(path): whether llama.cpp's own parser reads a header. Only for what cannot end the process."""
    import llama_cpp

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Parameters]
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_free.argtypes = [ctypes.c_void_p]

    def ask(path: Path) -> bool:
        found = library.gguf_init_from_file(str(path).encode(), Parameters(True, None))
        if found:
            library.gguf_free(found)
        return bool(found)

    return ask


CHANGES = st.lists(st.tuples(st.integers(0, len(whole()) - 1), st.integers(0, 255)), min_size=1, max_size=4)


@given(CHANGES)
@settings(max_examples=1500, deadline=500, suppress_health_check=list(HealthCheck))
def test_any_change_is_refused_or_read_as_llama_cpp_would_read_it(tmp_path, accepts, changes):
    content = bytearray(whole())
    for at, value in changes:
        content[at] = value
    path = of(tmp_path, bytes(content))
    try:
        gguf_reader.read_header(path)
    except UserError as error:
        assert error.message.isprintable() and len(error.message) < 300
    else:
        assert accepts(path)


def test_every_bit_of_a_header_flipped_is_refused_or_read_as_llama_cpp_would_read_it(tmp_path, accepts):
    content, read = whole(), 0
    for bit in range(8 * (len(content) - len(DATA))):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path = of(tmp_path, bytes(flipped))
        try:
            gguf_reader.read_header(path)
        except UserError:
            continue
        assert accepts(path)
        read += 1
    assert 200 < read < 4 * len(content), "changed texts and numbers are read, changed sizes are not"


def test_no_mutated_file_is_more_than_a_clear_error(tmp_path):
    one, seeds, rng = readers.target(tmp_path), readers.gguf_seeds(), random.Random(3407)
    assert all(one(*seed) for seed in seeds)
    tracemalloc.start()
    read = sum(bool(one(suffix, readers.mutated(rng, content))) for _ in range(1000) for suffix, content in seeds)
    assert read > 20 and tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


# Real files


def test_the_table_of_types_is_ggufs():
    from gguf.constants import GGML_QUANT_SIZES

    assert gguf_reader.TENSOR_TYPES == {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def same_as_gguf(path: Path) -> gguf_reader.Header:
    """What is read is what the gguf package reads."""
    from gguf import GGUFReader

    header, reader = gguf_reader.read_header(path), GGUFReader(path)
    assert [(t.name, t.shape, t.type, t.bytes, t.offset) for t in header.tensors] == [
        (t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.n_bytes, t.data_offset - reader.data_offset)
        for t in reader.tensors
    ]
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == fields
    return header


def test_the_demos_base_is_read_as_gguf_reads_it(source, accepts):
    header = same_as_gguf(source)
    assert gguf_reader.count_tensor_types(header) == {"Q8_0": 1, "F32": 61, "Q4_1": 210} and accepts(source)


def test_every_vocabulary_of_llama_cpp_is_read_in_well_under_a_second():
    found = sorted((llama_tools.tools_folder() / "models").glob("ggml-vocab-*.gguf"))
    assert len(found) > 15
    for path in found:
        started = time.perf_counter()
        header = gguf_reader.read_header(path)
        assert time.perf_counter() - started < 1.5, path.name
        assert header.tensors == () and len(header.metadata["tokenizer.ggml.tokens"]) > 10_000


@pytest.mark.parametrize("alignment", [32, 64, 8])
def test_files_of_the_gguf_package_are_read_with_every_type_of_tensor(alignment, tmp_path, accepts):
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.constants import GGML_QUANT_SIZES

    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "\U0001f6a2"])
    writer.add_float64("x", 0.1)
    writer.add_int8("y", -1)
    writer.add_chat_template("{{ messages }}")
    for kind, (_, size) in GGML_QUANT_SIZES.items():
        raw = np.zeros((3, 2 * size), dtype=np.uint8)
        writer.add_tensor(f"blk.{kind.name}", raw, raw_dtype=GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_reader.count_tensor_types(same_as_gguf(path)) == {
        kind.name: 1 for kind in GGML_QUANT_SIZES
    } and accepts(path)
