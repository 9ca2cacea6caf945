"""GGUF headers byte by byte: right ones, and every kind of lie."""

import struct

U8, U16, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 6, 7, 8, 9, 10


KINDS = {"F32": 0, "Q8_0": 8, "Q4_K": 12}


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    dims = struct.pack(f"<I{len(shape)}q", len(shape) if dimensions is None else dimensions, *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


NAMED = pair(b"general.architecture", STRING, text(b"llama"))


PAIRS = [
    NAMED,
    pair(b"general.alignment", U32, u32(32)),
    pair(b"tokens", ARRAY, array(STRING, 3, text(b"a") + text(b"") + text("é".encode()))),
    pair(b"scores", ARRAY, array(F32, 2, struct.pack("<2f", 0.5, -1))),
    pair(b"yes", BOOL, b"\x01"),
    pair(b"odd", STRING, text(b"\xff")),
]


TENSORS = [tensor(b"one", (5, 2)), tensor(b"two", (32, 2), KINDS["Q8_0"], 64), tensor(b"three", (8,), offset=160)]


DATA = bytes(192)  # 40 of 64, 68 of 96, 32 of 32


def whole(
    magic: bytes = b"GGUF", version: int = 3, pairs: list[bytes] = PAIRS, tensors: list[bytes] = TENSORS,
    n_pairs: int | None = None, n_tensors: int | None = None, alignment: int = 32, data: bytes = DATA,
) -> bytes:  # fmt: skip
    """The bytes of a GGUF; the counts are right unless given."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs + tensors)
    return head + bytes(-len(head) % alignment) + data if tensors else head + data


def alone(*tensors: bytes, data: int = 0, **more) -> bytes:
    return whole(tensors=list(tensors), data=bytes(data), **more)


def aligned(value: bytes, kind: int = U32) -> bytes:
    return whole(pairs=[NAMED, pair(b"general.alignment", kind, value)])


def also(*more: bytes) -> bytes:
    return whole(pairs=[*PAIRS, *more])


BIG = 1 << 62


LIES = {
    "empty": (b"", "gguf.truncated", "takes 4 bytes, and the file has 0"),
    "another magic": (whole(magic=b"GGML"), "gguf.bad_magic", "b'GGML'"),
    "a zip": (b"PK\3\4" + bytes(400), "gguf.bad_magic", "b'PK\\x03\\x04'"),
    "big-endian": (whole(version=3 << 24), "gguf.big_endian", "m.gguf"),
    "version 0": (whole(version=0), "gguf.unknown_version", "version 0"),
    "version 1": (whole(version=1), "gguf.unknown_version", "version 1"),
    "version 4": (whole(version=4), "gguf.unknown_version", "version 4"),
    "too many pairs": (whole(n_pairs=1 << 40), "gguf.too_many_entries", "1099511627776 metadata pairs, the limit is 65,536"),
    "too many tensors": (whole(n_tensors=1 << 63), "gguf.too_many_entries", "9223372036854775808 tensors, the limit is 65,536"),
    "more pairs than fit": (whole(n_pairs=60_000), "gguf.impossible_count", "60000 metadata pairs, more than 576"),
    "more tensors than fit": (whole(n_tensors=60_000), "gguf.impossible_count", "60000 tensors, more than 576"),
    "a pair too many": (whole(tensors=[], data=b"", n_pairs=7), "gguf.truncated", "the length of key 6 takes 8 bytes"),
    "tensors taken for a pair": (whole(n_pairs=7), "gguf.bad_length", "the name of tensor 0 has 562949953421312 bytes"),
    "an empty key": (also(pair(b"", U8, b"1")), "gguf.bad_length", "key 6 has 0 bytes"),
    "a long key": (also(pair(b"k" * 65_536, U8, b"1")), "gguf.bad_length", "key 6 has 65536 bytes, not 1 to 65535"),
    "a key beyond the file": (also(text(b"k", 60_000)), "gguf.truncated", "key 6 takes 60000 bytes"),
    "a key that is no UTF-8": (also(pair(b"\xff\xfe", U8, b"1")), "gguf.not_utf8", "key 6 is not UTF-8: b'\\xff\\xfe'"),
    "a key that C sees otherwise": (also(pair(b"general.alignment\0", U32, u32(1))), "gguf.nul_in_text", "'general.alignment\\x00'"),
    "a key twice": (also(pair(b"yes", BOOL, b"\0")), "gguf.duplicate_key", "'yes'"),
    "an unknown type": (also(pair(b"x", 13, b"1")), "gguf.unknown_value_type", "'x' has the unknown type 13"),
    "an array of an unknown type": (also(pair(b"x", ARRAY, array(77, 1))), "gguf.unknown_value_type", "'x' is an array of unknown type 77"),
    "arrays in arrays": (also(pair(b"x", ARRAY, array(ARRAY, 1, array(U8, 1)))), "gguf.nested_array", "'x'"),
    "an array beyond the file": (also(pair(b"x", ARRAY, array(U64, 100_000))), "gguf.truncated", "'x' takes 800000 bytes"),
    "an array of 2^62": (also(pair(b"x", ARRAY, array(U64, BIG))), "gguf.too_many_items", "4611686018427387904 items, more than 4,000,000"),
    "arrays that are too many together": (
        also(*(pair(b"x%d" % i, ARRAY, array(U8, 1_500_000, bytes(1_500_000))) for i in range(3))),
        "gguf.too_many_items", "'x2' has 1500000 items, more than 4,000,000",
    ),
    "strings beyond the file": (also(pair(b"x", ARRAY, array(STRING, 3_000_000))), "gguf.truncated", "'x' takes 21474836482 bytes"),
    "a string beyond the file": (also(pair(b"x", STRING, text(b"x", 1 << 63))), "gguf.truncated", "'x' takes 9223372036854775808 bytes"),
    "a string that C sees otherwise": (also(pair(b"x", STRING, text(b"x\0y"))), "gguf.nul_in_text", "'x'"),
    "no architecture": (whole(pairs=PAIRS[1:]), "gguf.no_architecture", "general.architecture"),
    "a number as architecture": (whole(pairs=[pair(b"general.architecture", U32, u32(1))]), "gguf.bad_architecture", "general.architecture"),
    "an empty architecture": (whole(pairs=[pair(b"general.architecture", STRING, text(b""))]), "gguf.bad_architecture", "general.architecture"),
    "alignment 0": (aligned(u32(0)), "gguf.bad_alignment", "general.alignment is 0"),
    "alignment 48": (aligned(u32(48)), "gguf.bad_alignment", "general.alignment is 48"),
    "alignment 2 GB": (aligned(u32(1 << 31)), "gguf.bad_alignment", "general.alignment is 2147483648"),
    "alignment as u64": (aligned(struct.pack("<Q", 32), U64), "gguf.bad_alignment_type", "type 10"),
    "a part of a model": (also(pair(b"split.count", U16, b"\3\0")), "gguf.split_model", "split.count is '3'"),
    "a part by a string": (also(pair(b"split.count", STRING, text(b"3"))), "gguf.split_model", "split.count is '3'"),
    "a tensor without name": (alone(tensor(b"", (8,)), data=32), "gguf.bad_length", "the name of tensor 0 has 0 bytes"),
    "a long tensor name": (alone(tensor(b"t" * 64, (8,)), data=32), "gguf.bad_length", "64 bytes, not 1 to 63"),
    "a tensor name that is no UTF-8": (alone(tensor(b"\xc3", (8,)), data=32), "gguf.not_utf8", "tensor 0 is not UTF-8: b'\\xc3'"),
    "a tensor name that C sees otherwise": (alone(tensor(b"a\0b", (8,)), data=32), "gguf.nul_in_text", "'a\\x00b'"),
    "a tensor twice": (
        alone(tensor(b"a", (8,)), tensor(b"a", (8,), 0, 32), data=64),
        "gguf.duplicate_tensor", "'a'",
    ),
    "no dimension": (alone(tensor(b"a", (8,), dimensions=0), data=32), "gguf.bad_dimension_count", "'a' has 0 dimensions"),
    "five dimensions": (alone(tensor(b"a", (8, 1, 1, 1, 1)), data=32), "gguf.bad_dimension_count", "'a' has 5 dimensions"),
    "2^32-1 dimensions": (alone(tensor(b"a", (8,), dimensions=2**32 - 1), data=32), "gguf.bad_dimension_count", "'a' has 4294967295 dimensions"),
    "a dimension of nothing": (alone(tensor(b"a", (8, 0)), data=32), "gguf.bad_dimension", "'a' has a dimension of 0"),
    "a negative dimension": (alone(tensor(b"a", (-8, -1)), data=32), "gguf.bad_dimension", "'a' has a dimension of -8"),
    "a shape that overflows": (alone(tensor(b"a", (1 << 32, 1 << 31)), data=32), "gguf.shape_overflow", "9223372036854775808 elements"),
    "a shape that overflows to 0": (alone(tensor(b"a", (1 << 32, 1 << 32)), data=32), "gguf.shape_overflow", "18446744073709551616 elements"),
    "bytes that overflow to 0": (alone(tensor(b"a", (1 << 62,))), "gguf.truncated", "byte 18446744073709551904, and the file has 288"),
    "rows of half a block": (alone(tensor(b"a", (128,), KINDS["Q4_K"]), data=96), "gguf.partial_block", "128 elements, Q4_K needs a multiple of 256"),
    "a type that was taken back": (alone(tensor(b"a", (32,), 4), data=32), "gguf.unknown_tensor_type", "'a' has the unknown type 4"),
    "an unknown tensor type": (alone(tensor(b"a", (32,), 2**31), data=32), "gguf.unknown_tensor_type", "'a' has the unknown type 2147483648"),
    "an offset between": (alone(tensor(b"a", (8,), offset=8), data=64), "gguf.misaligned_tensor", "'a' is at 8, not a multiple of 32"),
    "a gap": (alone(tensor(b"a", (8,), offset=32), data=64), "gguf.wrong_tensor_offset", "'a' is at 32, expected at 0"),
    "tensors on one another": (alone(tensor(b"a", (8,)), tensor(b"b", (8,)), data=64), "gguf.wrong_tensor_offset", "'b' is at 0, expected at 32"),
    "tensors out of order": (alone(tensor(b"a", (8,), 0, 32), tensor(b"b", (8,)), data=64), "gguf.wrong_tensor_offset", "'a' is at 32, expected at 0"),
    "data that is not there": (alone(tensor(b"a", (1 << 40,))), "gguf.truncated", "byte 4398046511392, and the file has 288"),
    "something behind the data": (whole(data=DATA + b"PK" + bytes(30)), "gguf.trailing_bytes", " 32 bytes"),
    "one byte behind the data": (whole(data=DATA + b"\0"), "gguf.trailing_bytes", " 1 bytes"),
    "something behind no tensors": (whole(tensors=[], data=bytes(64)), "gguf.trailing_bytes", " 64 bytes"),
}  # fmt: skip
