"""A strict reader for the header of a GGUF file, which may be untrusted.

llama.cpp parses the same bytes in C++. Everything that its loader checks (ggml/src/gguf.cpp) is checked here first, and
this reader is stricter where llama.cpp is lenient: a file has one meaning, ends where its tensors end, and is read in
bounded memory and time.
"""

import hashlib
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

# The largest header of the vocabularies that llama.cpp ships (Gemma 4: 262,144 tokens, 514,906 merges) is 16 MB.
MAX_HEADER_BYTES = 64 << 20
# In all arrays together; Gemma 4 has 1.3 million. An item takes 60 bytes in a list, a string at least 8 in the file.
MAX_ITEMS = 4_000_000
MAX_ENTRIES = 65_536  # of metadata pairs, and of tensors: real files have about 50, and a few thousand at most
MAX_KEY_BYTES = 65_535  # by GGUF's own specification
MAX_NAME_BYTES = 63  # ggml keeps a tensor's name in 64 bytes, with a NUL at its end
MAX_ALIGNMENT = 65_536  # bytes; 32 in practice, and a page of memory is at most 64 KB
MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # a key of one letter, a type, a value
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # a name of one letter, one dimension, a type, an offset

ARCHITECTURE_KEY, ALIGNMENT_KEY, SPLIT_COUNT_KEY = "general.architecture", "general.alignment", "split.count"

# Value type (enum gguf_type) -> format letter of Python's struct; strings and arrays have no fixed size.
SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, STRING, ARRAY = 4, 8, 9

# Tensor type -> (name, elements per block, bytes per block), as in gguf-py's GGML_QUANT_SIZES; a test compares the two.
# Missing numbers were withdrawn, and llama.cpp refuses them too.
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """The description of one tensor in a header."""

    name: str
    shape: tuple[int, ...]
    """Elements along each dimension, the contiguous one first, as in the file: numpy's shape reversed."""
    type: str
    """Such as 'Q4_K'."""
    offset: int
    """Bytes from the start of the file's tensor data."""
    bytes: int
    """Size of the tensor's data."""


@dataclass(frozen=True)
class Header:
    """The metadata and the tensor descriptions of a GGUF file."""

    version: int
    """Of the GGUF format: 2 or 3."""
    metadata: dict[str, object]
    """Values are int, float, bool, str, or a list of one of them. Bytes that are not UTF-8 become U+FFFD."""
    tensors: tuple[Tensor, ...]
    """In the order of the file, which is also the order of their data."""
    data_offset: int = 0
    """Where the tensor data begins, in bytes from the start of the file."""


def read_header(path: Path, name: str | None = None) -> Header:
    """Return the header of a GGUF file.

    Reads at most the first 64 MB, no tensor data, and takes at most about 0.5 GB of memory.

    Args:
        path: the file.
        name: the file's name in messages, when it differs from that of `path`.

    Raises:
        UserError: the file cannot be read, llama.cpp would not load it, its numbers are impossible for a file of its
            size, or it holds anything besides one complete model. The message says what is wrong.
    """
    head, size = _read_head(path)
    cursor = _Cursor(name or path.name, head, size)
    version, tensor_count, pair_count = _read_counts(cursor)
    metadata, alignment = _read_metadata(cursor, pair_count)
    tensor_infos = _read_tensors(cursor, tensor_count, alignment)
    return Header(version, metadata, tensor_infos, _round_up(cursor.position, alignment))


def count_tensor_types(header: Header) -> dict[str, int]:
    """Return the number of tensors of each type, by the type's name."""
    return dict(Counter(tensor.type for tensor in header.tensors))


def weights_sha256(path: Path, header: Header) -> str:
    """Return the sha256 of the tensor data alone, as hex: equal for files with equal weights and different headers."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(header.data_offset)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_head(path: Path) -> tuple[bytes, int]:
    """Return the first bytes of the file, as many as a header may have, and the size of the whole file in bytes."""
    if not path.is_file():  # reading a pipe or a device could block
        raise UserError(f"{path} is not a file", "name a GGUF file: `make pull` downloads one", code="gguf.not_a_file")
    try:
        # Read, not mapped: when a mapped file becomes shorter while it is read, the process is killed.
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return file.read(min(size, MAX_HEADER_BYTES)), size
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "make it readable, or pull it again", code="file.unreadable"
        ) from error


def _quote_name(text: str | bytes) -> str:
    """Return an untrusted name as one short line without control characters, in quotes."""
    return ascii(text[:56]) + ("..." if len(text) > 56 else "")


@dataclass
class _Cursor:
    """A position in the header. Every length is compared with the remaining bytes before it is used.

    The `subject` of its methods names the value that is read, for messages.
    """

    file_name: str
    """The file's name, for messages."""
    head: bytes
    """The first bytes of the file."""
    file_size: int
    """Size of the whole file in bytes."""
    position: int = 0
    """Offset of the next byte to read."""
    item_count: int = 0
    """Number of items in all arrays so far."""

    def error(self, fault: str, *, code: str) -> UserError:
        """Return the error to raise: the file is not a valid GGUF, and `fault` says why."""
        return UserError(
            f"{self.file_name} is not a valid GGUF: {fault}",
            "do not load it; pull it again, and if the error stays, its publisher has to fix it",
            code=code,
        )

    def take(self, count: int, subject: str) -> int:
        """Move past the next `count` bytes and return their offset. Raise UserError when the file has fewer."""
        if count > self.file_size - self.position:
            raise self.error(
                f"{subject} takes {count} bytes, and the file has {self.file_size - self.position} more",
                code="gguf.truncated",
            )
        if count > len(self.head) - self.position:
            raise self.error(
                f"its header is longer than {MAX_HEADER_BYTES >> 20} MB ({subject})", code="gguf.header_too_long"
            )
        self.position += count
        return self.position - count

    def read_number(self, format_letter: str, subject: str) -> int | float | bool:
        """Read one little-endian value; `format_letter` is its type in Python's struct."""
        layout = struct.Struct("<" + format_letter)
        value: int | float | bool = layout.unpack_from(self.head, self.take(layout.size, subject))[0]
        return value

    def read_uint32(self, subject: str) -> int:
        """Read a type, a version or a number of dimensions."""
        return int(self.read_number("I", subject))

    def read_uint64(self, subject: str) -> int:
        """Read a length, a count or an offset."""
        return int(self.read_number("Q", subject))

    def read_bytes(self, max_bytes: int, subject: str) -> bytes:
        """Read a string of 1 to `max_bytes` bytes."""
        length = self.read_uint64(f"the length of {subject}")
        if not 0 < length <= max_bytes:
            raise self.error(f"{subject} has {length} bytes, not 1 to {max_bytes}", code="gguf.bad_length")
        start = self.take(length, subject)
        return self.head[start : start + length]

    def read_name(self, max_bytes: int, subject: str) -> str:
        """Read a name: UTF-8 without NUL, because C ends a text at a NUL and so would see another name."""
        raw = self.read_bytes(max_bytes, subject)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{subject} is not UTF-8: {_quote_name(raw)}", code="gguf.not_utf8") from None
        if "\0" in text:
            raise self.error(f"{subject} has a NUL: {_quote_name(text)}", code="gguf.nul_in_text")
        return text

    def read_string(self, subject: str) -> str:
        """Read a value that is one string, of any length; it need not be UTF-8, as in llama.cpp."""
        (text,) = self.read_strings(1, subject)
        if "\0" in text:  # C would see a shorter value
            raise self.error(f"{subject} has a NUL", code="gguf.nul_in_text")
        return text

    def read_strings(self, count: int, subject: str) -> list[str]:
        """Read `count` strings, in a fast loop: a vocabulary has 300,000 and more."""
        texts, head, end, position, unpack_length = (
            [],
            self.head,
            len(self.head),
            self.position,
            struct.Struct("<Q").unpack_from,
        )
        for _ in range(count):
            if position + 8 > end or (length := unpack_length(head, position)[0]) > end - position - 8:
                self.position = position
                self.take(self.read_uint64(f"the length of a string in {subject}"), f"a string in {subject}")
            position += 8 + length
            texts.append(str(head[position - length : position], "utf-8", "replace"))
        self.position = position
        return texts

    def read_array(self, subject: str) -> list[str] | list[int | float | bool]:
        """Read an array of numbers or strings."""
        item_type, count = self.read_uint32(subject), self.read_uint64(subject)
        if item_type != STRING and item_type not in SCALAR_FORMATS:
            is_nested = item_type == ARRAY
            raise self.error(
                f"{subject} is an array of {'arrays' if is_nested else f'unknown type {item_type}'}",
                code="gguf.nested_array" if is_nested else "gguf.unknown_value_type",
            )
        self.item_count += count
        if self.item_count > MAX_ITEMS:
            raise self.error(
                f"{subject} has {count} items, more than {MAX_ITEMS:,} in all arrays together",
                code="gguf.too_many_items",
            )
        if item_type == STRING:
            return self.read_strings(count, subject)
        layout = struct.Struct(f"<{count}{SCALAR_FORMATS[item_type]}")
        return list(layout.unpack_from(self.head, self.take(layout.size, subject)))

    def read_value(self, value_type: int, subject: str) -> object:
        """Read a metadata value of a type of enum gguf_type."""
        if value_type == STRING:
            return self.read_string(subject)
        if value_type == ARRAY:
            return self.read_array(subject)
        if value_type not in SCALAR_FORMATS:
            raise self.error(f"{subject} has the unknown type {value_type}", code="gguf.unknown_value_type")
        return self.read_number(SCALAR_FORMATS[value_type], subject)


def _read_counts(cursor: _Cursor) -> tuple[int, int, int]:
    """Read the start of the file; return (version, number of tensors, number of metadata pairs)."""
    magic = cursor.head[cursor.take(4, "the magic number") : 4]
    if magic != b"GGUF":
        raise cursor.error(f"it begins with {magic!r}, not with 'GGUF'", code="gguf.bad_magic")
    version = cursor.read_uint32("the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.error("it is big-endian, made for other processors", code="gguf.big_endian")
    if version not in (2, 3):
        raise cursor.error(f"it has version {version}, and llama.cpp reads 2 and 3", code="gguf.unknown_version")
    tensor_count = cursor.read_uint64("the number of tensors")
    pair_count = cursor.read_uint64("the number of metadata pairs")
    _refuse_impossible_count(cursor, tensor_count, MIN_TENSOR_BYTES, "tensors")
    _refuse_impossible_count(cursor, pair_count, MIN_PAIR_BYTES, "metadata pairs")
    return version, tensor_count, pair_count


def _refuse_impossible_count(cursor: _Cursor, count: int, min_bytes: int, subject: str) -> None:
    """Raise UserError for a count that the file cannot hold, at `min_bytes` bytes each."""
    if count > MAX_ENTRIES:
        raise cursor.error(f"it claims {count} {subject}, the limit is {MAX_ENTRIES:,}", code="gguf.too_many_entries")
    if count * min_bytes > cursor.file_size - cursor.position:
        raise cursor.error(
            f"it claims {count} {subject}, more than {cursor.file_size} bytes can hold", code="gguf.impossible_count"
        )


def _read_metadata(cursor: _Cursor, pair_count: int) -> tuple[dict[str, object], int]:
    """Read the metadata; return it as key -> value, and the alignment of tensor data in bytes."""
    values, types = {}, {}
    for index in range(pair_count):
        key = cursor.read_name(MAX_KEY_BYTES, f"key {index}")
        if key in values:
            raise cursor.error(f"the key {_quote_name(key)} appears twice", code="gguf.duplicate_key")
        types[key] = cursor.read_uint32(f"the type of {_quote_name(key)}")
        values[key] = cursor.read_value(types[key], f"the value of {_quote_name(key)}")
    if types.get(ARCHITECTURE_KEY) != STRING or not values[ARCHITECTURE_KEY]:
        is_missing = ARCHITECTURE_KEY not in types
        raise cursor.error(
            f"{ARCHITECTURE_KEY} is {'missing' if is_missing else 'not a text'}",
            code="gguf.no_architecture" if is_missing else "gguf.bad_architecture",
        )
    split_count = values.get(SPLIT_COUNT_KEY, 1)
    if type(split_count) is not int or split_count not in (0, 1):
        raise cursor.error(
            f"{SPLIT_COUNT_KEY} is {_quote_name(str(split_count))}: it is one part of a model in several files",
            code="gguf.split_model",
        )
    return values, _validate_alignment(cursor, types.get(ALIGNMENT_KEY, UINT32), values.get(ALIGNMENT_KEY, 32))


def _validate_alignment(cursor: _Cursor, value_type: int, value: object) -> int:
    """Return the alignment in bytes. Raise UserError when it is not a uint32 that is a power of two."""
    if value_type != UINT32 or not isinstance(value, int):
        raise cursor.error(f"{ALIGNMENT_KEY} has value type {value_type}, not uint32", code="gguf.bad_alignment_type")
    if value & (value - 1) or not 0 < value <= MAX_ALIGNMENT:
        raise cursor.error(
            f"{ALIGNMENT_KEY} is {value}, not a power of two up to {MAX_ALIGNMENT:,}", code="gguf.bad_alignment"
        )
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[Tensor, ...]:
    """Read all tensor descriptions. Each tensor begins where the one before it ends; the file ends with the last."""
    tensors, names, end = [], set(), 0
    for index in range(count):
        tensor = _read_tensor(cursor, index)
        if tensor.name in names:
            raise cursor.error(f"the tensor {_quote_name(tensor.name)} appears twice", code="gguf.duplicate_tensor")
        names.add(tensor.name)
        tensors.append(tensor)
        if tensor.offset % alignment:
            raise cursor.error(
                f"the tensor {_quote_name(tensor.name)} is at {tensor.offset}, not a multiple of {alignment}",
                code="gguf.misaligned_tensor",
            )
        if tensor.offset != (expected_offset := _round_up(end, alignment)):
            raise cursor.error(
                f"the tensor {_quote_name(tensor.name)} is at {tensor.offset}, expected at {expected_offset}",
                code="gguf.wrong_tensor_offset",
            )
        end = tensor.offset + tensor.bytes
    _refuse_wrong_file_size(cursor, end, alignment)
    return tuple(tensors)


def _refuse_wrong_file_size(cursor: _Cursor, data_bytes: int, alignment: int) -> None:
    """Raise UserError unless the file ends after its `data_bytes` of tensors, or after the padding behind them."""
    end = cursor.position if not data_bytes else _round_up(cursor.position, alignment) + data_bytes
    if cursor.file_size < end:
        raise cursor.error(
            f"its tensors end at byte {end}, and the file has {cursor.file_size} bytes", code="gguf.truncated"
        )
    if cursor.file_size > _round_up(end, alignment):
        raise cursor.error(f"{cursor.file_size - end} bytes follow its last tensor", code="gguf.trailing_bytes")


def _round_up(count: int, alignment: int) -> int:
    """Round `count` up to a multiple of `alignment`."""
    return -(-count // alignment) * alignment


def _read_tensor(cursor: _Cursor, index: int) -> Tensor:
    """Read the description of one tensor."""
    name = cursor.read_name(MAX_NAME_BYTES, f"the name of tensor {index}")
    subject = f"the tensor {_quote_name(name)}"
    shape = _read_shape(cursor, subject)
    type_number = cursor.read_uint32(subject)
    if type_number not in TENSOR_TYPES:
        raise cursor.error(f"{subject} has the unknown type {type_number}", code="gguf.unknown_tensor_type")
    type_name, block_size, block_bytes = TENSOR_TYPES[type_number]
    elements = math.prod(shape)
    if elements >= 1 << 63:
        raise cursor.error(f"{subject} has {elements} elements: its shape overflows", code="gguf.shape_overflow")
    if shape[0] % block_size:
        raise cursor.error(
            f"{subject} has rows of {shape[0]} elements, {type_name} needs a multiple of {block_size}",
            code="gguf.partial_block",
        )
    return Tensor(name, shape, type_name, cursor.read_uint64(subject), elements // block_size * block_bytes)


def _read_shape(cursor: _Cursor, subject: str) -> tuple[int, ...]:
    """Read a shape: 1 to 4 dimensions of at least one element."""
    dimensions = cursor.read_uint32(subject)
    if not 1 <= dimensions <= 4:
        raise cursor.error(f"{subject} has {dimensions} dimensions, not 1 to 4", code="gguf.bad_dimension_count")
    shape = tuple(int(cursor.read_number("q", subject)) for _ in range(dimensions))
    if min(shape) < 1:
        raise cursor.error(f"{subject} has a dimension of {min(shape)} elements", code="gguf.bad_dimension")
    return shape
