"""A strict reader for the header of a GGUF file, which may be untrusted.

llama.cpp parses the same bytes in C++. Everything that its loader checks (ggml/src/gguf.cpp) is checked here first, and
this reader is stricter where llama.cpp is lenient: a file has one meaning, ends where its tensors end, and is read in
bounded memory and time.
"""

import hashlib
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

# The largest header of the vocabularies that llama.cpp ships (Gemma 4: 262,144 tokens, 514,906 merges) is 16 MB.
MAX_HEADER = 64 << 20
# In all arrays together; Gemma 4 has 1.3 million. An item takes 60 bytes in a list, a string at least 8 in the file.
MAX_ITEMS = 4_000_000
MAX_ENTRIES = 65_536  # of metadata pairs, and of tensors: real files have about 50, and a few thousand at most
MAX_KEY = 65_535  # by GGUF's own specification
MAX_NAME = 63  # ggml keeps a tensor's name in 64 bytes, with a NUL at its end
MAX_ALIGNMENT = 65_536  # bytes; 32 in practice, and a page of memory is at most 64 KB
LEAST_PAIR = 8 + 1 + 4 + 1  # a key of one letter, a type, a value
LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # a name of one letter, one dimension, a type, an offset

ARCHITECTURE, ALIGNMENT, SPLITS = "general.architecture", "general.alignment", "split.count"

# Value type (enum gguf_type) -> format letter of Python's struct; strings and arrays have no fixed size.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, STRING, ARRAY = 4, 8, 9

# Tensor type -> (name, elements per block, bytes per block), as in gguf-py's GGML_QUANT_SIZES; a test compares the two.
# Missing numbers were withdrawn, and llama.cpp refuses them too.
TYPES = {
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
    data: int = 0
    """Where the tensor data begins, in bytes from the start of the file."""


def read(path: Path, name: str | None = None) -> Header:
    """Return the header of a GGUF file.

    Reads at most the first 64 MB, no tensor data, and takes at most about 0.5 GB of memory.

    Args:
        path: the file.
        name: the file's name in messages, when it differs from that of `path`.

    Raises:
        UserError: the file cannot be read, llama.cpp would not load it, its numbers are impossible for a file of its
            size, or it holds anything besides one whole model. The message says what is wrong.
    """
    head, size = _start(path)
    cursor = _Cursor(name or path.name, head, size)
    version, tensors, pairs = _counts(cursor)
    metadata, alignment = _metadata(cursor, pairs)
    found = _tensors(cursor, tensors, alignment)
    return Header(version, metadata, found, _padded(cursor.at, alignment))


def tensor_types(header: Header) -> dict[str, int]:
    """Return the number of tensors of each type, by the type's name."""
    return dict(Counter(tensor.type for tensor in header.tensors))


def weights_sha256(path: Path, header: Header) -> str:
    """Return the sha256 of the tensor data alone, as hex: equal for files with equal weights and different headers."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(header.data)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _start(path: Path) -> tuple[bytes, int]:
    """Return the first bytes of the file, as many as a header may have, and the size of the whole file in bytes."""
    if not path.is_file():  # reading a pipe or a device could block
        raise UserError(f"{path} is no file", "name a GGUF file: `make pull` brings one")
    try:
        # Read, not mapped: when a mapped file becomes shorter while it is read, the process is killed.
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return file.read(min(size, MAX_HEADER)), size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "make it readable, or pull it again") from error


def _shown(text: str | bytes) -> str:
    """Return an untrusted name as one short line without control characters, in quotes."""
    return ascii(text[:64]) + ("..." if len(text) > 64 else "")


@dataclass
class _Cursor:
    """A position in the header. Every length is compared with the remaining bytes before it is used.

    The `subject` of its methods names the value that is read, for messages.
    """

    file: str
    """The file's name, for messages."""
    head: bytes
    """The first bytes of the file."""
    size: int
    """Size of the whole file in bytes."""
    at: int = 0
    """Offset of the next byte to read."""
    items: int = 0
    """Number of items in all arrays so far."""

    def refuse(self, what: str) -> UserError:
        """Return the error to raise: the file is not a sound GGUF, and `fault` says why."""
        return UserError(
            f"{self.file} is no sound GGUF: {what}",
            "do not load it; pull it again, and if it stays so, its publisher has to mend it",
        )

    def take(self, count: int, what: str) -> int:
        """Move past the next `count` bytes and return their offset. Raise UserError when the file has fewer."""
        if count > self.size - self.at:
            raise self.refuse(f"{what} takes {count} bytes, and the file has {self.size - self.at} more")
        if count > len(self.head) - self.at:
            raise self.refuse(f"its header is longer than {MAX_HEADER >> 20} MB ({what})")
        self.at += count
        return self.at - count

    def number(self, letter: str, what: str) -> int | float | bool:
        """Read one little-endian value; `format_letter` is its type in Python's struct."""
        form = struct.Struct("<" + letter)
        return form.unpack_from(self.head, self.take(form.size, what))[0]

    def raw(self, most: int, what: str) -> bytes:
        """Read a string of 1 to `max_bytes` bytes."""
        length = self.number("Q", f"the length of {what}")
        if not 0 < length <= most:
            raise self.refuse(f"{what} has {length} bytes, not 1 to {most}")
        start = self.take(length, what)
        return self.head[start : start + length]

    def name(self, most: int, what: str) -> str:
        """Read a name: UTF-8 without NUL, because C ends a text at a NUL and so would see another name."""
        raw = self.raw(most, what)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.refuse(f"{what} is no UTF-8: {_shown(raw)}") from None
        if "\0" in text:
            raise self.refuse(f"{what} holds a NUL: {_shown(text)}")
        return text

    def string(self, what: str) -> str:
        """Read a value that is one string, of any length; it need not be UTF-8, as in llama.cpp."""
        (text,) = self.strings(1, what)
        if "\0" in text:  # C would see a shorter value
            raise self.refuse(f"{what} holds a NUL")
        return text

    def strings(self, count: int, what: str) -> list[str]:
        """Read `count` strings, in a fast loop: a vocabulary has 300,000 and more."""
        found, head, end, at, length_at = [], self.head, len(self.head), self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end or (length := length_at(head, at)[0]) > end - at - 8:
                self.at = at
                self.take(self.number("Q", f"the length of a string in {what}"), f"a string in {what}")
            at += 8 + length
            found.append(str(head[at - length : at], "utf-8", "replace"))
        self.at = at
        return found

    def array(self, what: str) -> list:
        """Read an array of numbers or strings."""
        kind, count = self.number("I", what), self.number("Q", what)
        if kind != STRING and kind not in SCALARS:
            raise self.refuse(f"{what} is an array of {'arrays' if kind == ARRAY else f'unknown type {kind}'}")
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.refuse(f"{what} has {count} items, more than {MAX_ITEMS:,} in all arrays together")
        if kind == STRING:
            return self.strings(count, what)
        form = struct.Struct(f"<{count}{SCALARS[kind]}")
        return list(form.unpack_from(self.head, self.take(form.size, what)))

    def value(self, kind: int, what: str) -> object:
        """Read a metadata value of a type of enum gguf_type."""
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise self.refuse(f"{what} has the unknown type {kind}")
        return self.number(SCALARS[kind], what)


def _counts(cursor: _Cursor) -> tuple[int, int, int]:
    """Read the start of the file; return (version, number of tensors, number of metadata pairs)."""
    magic = cursor.head[cursor.take(4, "the magic number") : 4]
    if magic != b"GGUF":
        raise cursor.refuse(f"it begins with {magic!r}, not with 'GGUF'")
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.refuse("it is big-endian, made for other processors")
    if version not in (2, 3):
        raise cursor.refuse(f"it has version {version}, and llama.cpp reads 2 and 3")
    tensors, pairs = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of metadata pairs")
    _possible(cursor, tensors, LEAST_TENSOR, "tensors")
    _possible(cursor, pairs, LEAST_PAIR, "metadata pairs")
    return version, tensors, pairs


def _possible(cursor: _Cursor, count: int, least: int, what: str) -> None:
    """Raise UserError for a count that the file cannot hold, at `min_bytes` bytes each."""
    if count > MAX_ENTRIES:
        raise cursor.refuse(f"it claims {count} {what}, at most {MAX_ENTRIES:,} are read")
    if count * least > cursor.size - cursor.at:
        raise cursor.refuse(f"it claims {count} {what}, more than {cursor.size} bytes can hold")


def _metadata(cursor: _Cursor, pairs: int) -> tuple[dict[str, object], int]:
    """Read the metadata; return it as key -> value, and the alignment of tensor data in bytes."""
    values, types = {}, {}
    for number in range(pairs):
        key = cursor.name(MAX_KEY, f"key {number}")
        if key in values:
            raise cursor.refuse(f"the key {_shown(key)} is there twice")
        types[key] = cursor.number("I", f"the type of {_shown(key)}")
        values[key] = cursor.value(types[key], f"the value of {_shown(key)}")
    if types.get(ARCHITECTURE) != STRING or not values[ARCHITECTURE]:
        raise cursor.refuse(f"{ARCHITECTURE} is {'no text' if ARCHITECTURE in types else 'missing'}")
    splits = values.get(SPLITS, 1)
    if type(splits) is not int or splits not in (0, 1):
        raise cursor.refuse(f"{SPLITS} is {_shown(str(splits))}: it is one part of a model in several files")
    return values, _alignment(cursor, types.get(ALIGNMENT, UINT32), values.get(ALIGNMENT, 32))


def _alignment(cursor: _Cursor, kind: int, value: object) -> int:
    """Return the alignment in bytes. Raise UserError when it is not a uint32 that is a power of two."""
    if kind != UINT32:
        raise cursor.refuse(f"{ALIGNMENT} has value type {kind}, not uint32")
    if value & (value - 1) or not 0 < value <= MAX_ALIGNMENT:
        raise cursor.refuse(f"{ALIGNMENT} is {value}, no power of two up to {MAX_ALIGNMENT:,}")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[Tensor, ...]:
    """Read all tensor descriptions. Each tensor begins where the one before it ends; the file ends with the last."""
    found, names, end = [], set(), 0
    for number in range(count):
        tensor = _tensor(cursor, number)
        if tensor.name in names:
            raise cursor.refuse(f"the tensor {_shown(tensor.name)} is there twice")
        names.add(tensor.name)
        found.append(tensor)
        if tensor.offset % alignment:
            raise cursor.refuse(f"the tensor {_shown(tensor.name)} is at {tensor.offset}, no multiple of {alignment}")
        if tensor.offset != (wanted := _padded(end, alignment)):
            raise cursor.refuse(f"the tensor {_shown(tensor.name)} is at {tensor.offset}, expected at {wanted}")
        end = tensor.offset + tensor.bytes
    _whole(cursor, end, alignment)
    return tuple(found)


def _whole(cursor: _Cursor, data: int, alignment: int) -> None:
    """Raise UserError unless the file ends after its `data_bytes` of tensors, or after the padding behind them."""
    end = cursor.at if not data else _padded(cursor.at, alignment) + data
    if cursor.size < end:
        raise cursor.refuse(f"its tensors end at byte {end}, and the file has {cursor.size}: is it cut off?")
    if cursor.size > _padded(end, alignment):
        raise cursor.refuse(f"{cursor.size - end} bytes follow its last tensor, which no part of it explains")


def _padded(count: int, alignment: int) -> int:
    """Round `count` up to a multiple of `alignment`."""
    return -(-count // alignment) * alignment


def _tensor(cursor: _Cursor, number: int) -> Tensor:
    """Read the description of one tensor."""
    name = cursor.name(MAX_NAME, f"the name of tensor {number}")
    what = f"the tensor {_shown(name)}"
    shape = _shape(cursor, what)
    kind = cursor.number("I", what)
    if kind not in TYPES:
        raise cursor.refuse(f"{what} has the unknown type {kind}")
    label, block, block_bytes = TYPES[kind]
    elements = 1
    for size in shape:
        elements *= size
    if elements >= 1 << 63:
        raise cursor.refuse(f"{what} has {elements} elements: its shape overflows")
    if shape[0] % block:
        raise cursor.refuse(f"{what} has rows of {shape[0]} elements, {label} needs a multiple of {block}")
    return Tensor(name, shape, label, cursor.number("Q", what), elements // block * block_bytes)


def _shape(cursor: _Cursor, what: str) -> tuple[int, ...]:
    """Read a shape: 1 to 4 dimensions of at least one element."""
    dimensions = cursor.number("I", what)
    if not 1 <= dimensions <= 4:
        raise cursor.refuse(f"{what} has {dimensions} dimensions, not 1 to 4")
    shape = tuple(cursor.number("q", what) for _ in range(dimensions))
    if min(shape) < 1:
        raise cursor.refuse(f"{what} has a dimension of {min(shape)} elements")
    return shape
