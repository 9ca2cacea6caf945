"""Bytes in, rows or a clear error out: a fuzz target over the readers, the formats, the cleaner and GGUF headers.

    python tests/fuzzing/readers.py -runs=20000        # needs `pip install atheris`; libFuzzer's own options follow

tests/pipeline/data/test_data_properties.py and tests/common/test_gguf_reader.py drive the same target with seeded mutations, without atheris.
"""

import gzip
import io
import json
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.gz", ".gguf")
ROWS = 300  # of one input: a mutated Parquet file may promise millions
PIECES = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\r", b"\0", b"\\", b";", b"\t", b"null", b"NaN", b"1e999", b"\xff", b"\xef\xbb\xbf",
    b'"role"', b'"content"', b'"tool_calls"', b'"type": "text"', b"\\ud800", b"[" * 2000, b"9" * 5000, b'{"a":' * 400, b"```", b"\xc2\xa0",
]  # fmt: skip

ODD_KEYS = ["system", "input", "context", "tool_calls", "function_call", "type", "role", "content", "\ud800", ""]
ODD = [
    None, True, 0, -1, 1e308, float("nan"), 10**40, "", " ", "\u200b", "\ud800", "\ufffd", "a\0b", "[", "[]", '[{"role": "user"}]', [], {}, [[]],
    [None], [{}], {"type": "text"}, [{"type": "text", "text": None}], [{"type": "text", "text": [{}]}], [{"type": "image"}], "user", "system",
    "assistant", "tool", ["user"], {"role": "user"}, "<|im_end|>", "```x\u00a0", "a@b.example", "4111 1111 1111 1111", "caf\u00c3\u00a9 \u00a0\r\n",
]  # fmt: skip


def seeds() -> list[tuple[str, bytes]]:
    """(suffix, content) of small good files, one a format and kind of file."""
    import pyarrow as pa
    from pyarrow import parquet

    turns = [
        {"role": "user", "content": "who? `x\u00a0`"},
        {"role": "assistant", "content": [{"type": "text", "text": "\u00e9"}]},
    ]
    rows = [
        {"messages": turns, "system": "be brief"}, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "b", "output": "c"}, {"prompt": "a", "completion": "b"}, {"prompt": turns[:1], "completion": turns[1:]},
        {"question": "a", "answer": "b", "context": None}, {"text": "a"},
    ]  # fmt: skip
    found = []
    for row in rows:
        lines = b"".join(json.dumps(row).encode() + b"\n" for _ in range(3))
        found += [
            (".jsonl", lines),
            (".jsonl.gz", gzip.compress(lines)),
            (".json", json.dumps({"data": [row] * 3}).encode()),
        ]
        found += [(".json", json.dumps([row] * 3, indent=1).encode())]
    table = b"question,answer\n" + b'"a, ""b""\nc",d\n' * 3
    cells = b"messages\n" + b'"' + json.dumps(turns).replace('"', '""').encode() + b'"\n'
    found += [(".csv", table), (".csv.gz", gzip.compress(table)), (".csv", cells), (".csv", table.replace(b",", b";"))]
    talk = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3
    for columns in (
        {"question": ["a"] * 3, "answer": ["b", None, "c"], "n": [1, 2, 3]},
        {"messages": talk},
        {"text": [b"\xff"] * 3},
    ):
        out = io.BytesIO()
        parquet.write_table(pa.table(columns), out)
        found.append((".parquet", out.getvalue()))
    return found


def gguf_seeds() -> list[tuple[str, bytes]]:
    """The same for GGUF: whole files of 300 bytes or so."""
    from tests.helpers import gguf_bytes

    return [(".gguf", gguf_bytes.whole()), (".gguf", gguf_bytes.whole(tensors=[], data=b""))]


def mutated(rng: random.Random, content: bytes, pieces: list[bytes] = PIECES) -> bytes:
    """A few cuts, flips, swaps and insertions of `pieces`."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, to = sorted(rng.randint(0, len(data)) for _ in range(2))
        match rng.randrange(7):
            case 0:
                data[at:to] = b""
            case 1:
                data[at:at] = rng.choice(pieces)
            case 2:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                data[at:at] = data[at:to]
            case 4:
                del data[at:]
            case 5:
                data[at : at + 4] = rng.randbytes(4)
            case 6:
                data[at : at + rng.randint(1, 9)] = rng.choice(pieces)
    return bytes(data)


def bent(rng: random.Random, value: object, odd: list = ODD, odd_keys: list[str] = ODD_KEYS) -> object:
    """JSON with one of its values, keys or items replaced by something odd."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: below for name, below in value.items() if name != key}
        name = rng.choice([*value, *odd_keys]) if rng.random() < 0.1 else key
        return value | {name: bent(rng, value[key], odd, odd_keys)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], bent(rng, value[at], odd, odd_keys), *value[at + rng.randrange(2) :]]
    return rng.choice(odd)


def odd_lines(rng: random.Random, content: bytes) -> bytes:
    """JSON Lines of good rows with a bent one among them."""
    good = content.splitlines(keepends=True)
    row = json.loads(good[0])
    for _ in range(rng.randint(1, 3)):
        row = bent(rng, row)
    return b"".join([*good, json.dumps(row).encode() + b"\n"])


def target(folder: Path) -> Callable[[str, bytes], int]:
    """target(suffix, content): how many rows, or values of a GGUF, were read. Raises what is neither UserError nor Unfit."""
    from common import gguf_reader
    from common.errors import UserError
    from pipeline.config.schema import Clean, Data
    from pipeline.data import process_rows, row_formats, stage
    from pipeline.data.clean import Cleaner
    from pipeline.data.drop_reasons import UnusableRow
    from pipeline.data.sources import Part

    cleaner, data = Cleaner(Clean(secrets="mask", personal="mask"), ("<|im_end|>",), False), Data(source="x")

    def one(suffix: str, content: bytes) -> int:
        path, count = folder / f"rows{suffix}", 0
        path.write_bytes(content)
        if suffix == ".gguf":
            with suppress(UserError):
                count = len(gguf_reader.read_header(path).metadata)
            return count
        part = Part(path.name, path)
        with suppress(UserError):
            found = row_formats.detect_format(stage.read_first_rows(part), data, part.name)
            for number, payload in islice(part.read_rows(), ROWS):
                assert isinstance(number, int) and number > 0
                count += 1
                with suppress(UnusableRow):
                    row = process_rows.parse_row(payload)
                    row_formats.find_unused_fields(row, found)
                    messages, _, _ = cleaner(row_formats.build_conversation(row, found))
                    assert messages[-1]["role"] == "assistant" and all(type(m["content"]) is str for m in messages)
                    json.dumps(messages, ensure_ascii=False).encode()
        return count

    return one


def main() -> None:
    import atheris

    with (
        atheris.instrument_imports(include=["pipeline.data", "common.gguf_reader", "json", "csv", "gzip"]),
        tempfile.TemporaryDirectory() as name,
    ):
        one = target(Path(name))
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for number, (suffix, content) in enumerate([*seeds(), *gguf_seeds()]):
            (corpus / f"{number:03}").write_bytes(bytes([SUFFIXES.index(suffix)]) + content)

        def given(content: bytes) -> None:
            if content:
                one(SUFFIXES[content[0] % len(SUFFIXES)], content[1:])

        def mutator(content: bytes, size: int, seed: int) -> bytes:
            rng = random.Random(seed)
            if seed % 4 == 0:
                with suppress(ValueError, IndexError, RecursionError):
                    return (b"\0" + odd_lines(rng, content[1:]))[:size]
            return mutated(rng, content)[:size] if seed % 4 == 1 else atheris.Mutate(content, size)

        atheris.Setup([*sys.argv, str(corpus)], given, custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
