"""Bad data: every input is one clear error, or a dropped row with its reason; never a traceback, never a lost row."""

import base64
import datetime
import decimal
import functools
import gzip
import io
import json
import os
import random
import string
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import httpx
import huggingface_hub
import pyarrow as pa
import pytest
from pyarrow import parquet

from common.errors import UserError
from pipeline.config import schema
from pipeline.data import clean, personal_data, sources
from tests.helpers.commands import ROOT, refuses
from tests.helpers.row_files import Made, jsonl, line, made, pair, words

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def run(base, quick, tmp_path):
    """run(source, section__key=value, ...) -> Made; `processes` and `name` (of the run) besides."""
    return functools.partial(made, base, tmp_path)


def refused(run, source: Path | str, code: str, *values: str, **settings) -> UserError:
    """The stage stops with this code, and its message or hint has all of `values`."""
    with refuses(code) as caught:
        run(source, **settings)
    assert [value for value in values if value not in str(caught.value)] == [], caught.value
    str(caught.value).encode(errors="backslashreplace")
    return caught.value


def turns(*contents: object, roles: tuple[object, ...] = ("user", "assistant")) -> dict:
    return {"messages": [{"role": roles[i % len(roles)], "content": c} for i, c in enumerate(contents)]}


def talk(i: int | str) -> dict:
    return turns(*pair(i).values())


def pairs(count: int = 40) -> list[dict]:
    return [pair(i) for i in range(count)]


def talks(count: int = 40) -> list[dict]:
    return [talk(i) for i in range(count)]


def array(*given: object) -> bytes:
    return b"[" + b",\n".join(map(line, given)) + b"]"


def csv(*given: str, header: str = "question,answer", good: int = 40, end: str = "\n") -> bytes:
    text = [header, *(f"{p['question']},{p['answer']}" for p in pairs(good)), *given]
    return "".join(row + end for row in text).encode()


def table(columns: dict | pa.Table, **settings) -> bytes:
    out = io.BytesIO()
    parquet.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), out, **settings)
    return out.getvalue()


def columns(**more) -> dict:
    return {"question": [p["question"] for p in pairs()], "answer": [p["answer"] for p in pairs()], **more}


def zipped(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return out.getvalue()


def noise(count: int) -> bytes:
    return random.Random(1).randbytes(count)


def spoiled(content: bytes, start: int, end: int) -> bytes:
    return content[:start] + b"\xff" * (end - start) + content[end:]


def nested(levels: int) -> str:
    """A row whose answer is lists in lists."""
    return '{"question": "how deep?", "answer": ' + "[" * levels + "]" * levels + "}"


GOOD, TALKS = jsonl(*pairs()), jsonl(*talks())
WIDE = "".join(f"{p['question']};{p['answer']}\n" for p in pairs())
P0, P1 = pair("x"), pair("y")
BASIC = {"question": "who steers the big ship?", "answer": "the captain does"}

# Lines of a file that are no JSON, one rejected row each: (name, content, the line).
BROKEN_LINES = [
    ("last line cut off", GOOD + b'{"question": "wh', 41),
    ("a line cut off in the middle", jsonl(*pairs(9), '{"question": "a", "ans', *pairs()), 10),
    ("two objects on a line", jsonl(*pairs(9), '{"question": "a", "answer": "b"} {}'), 10),
    ("text behind the last line", GOOD + b"Process finished with exit code 0\n", 41),
    ("comments", jsonl(*pairs(5), "// more", *pairs()), 6),
    ("a trailing comma", jsonl('{"question": "a", "answer": "b",}', *pairs()), 1),
    ("a raw line break in a string", GOOD + b'{"question": "a\nb", "answer": "c"}\n', 41),
    ("a raw tab in a string", GOOD + b'{"question": "a\tb", "answer": "c"}\n', 41),
    ("10,000 levels", jsonl(*pairs(), nested(10_000)), 41),
    ("a number of 5,000 digits", jsonl(*pairs(), '{"question": "n", "answer": 1' + "0" * 5000 + "}"), 41),
    ("a BOM in the middle", GOOD + BOM + GOOD, 41),
]  # fmt: skip
# Files that cannot be used at all: (name, file, content, code, values in the message or hint, settings).
REFUSED = [
    ("Python's repr", "r.jsonl", jsonl(*(repr(p) for p in pairs())), "data.no_readable_rows", "r.jsonl:1: Expecting"),
    ("a comma between lines", "r.jsonl", jsonl(*pairs(), end=b",\n"), "data.no_readable_rows", "r.jsonl:1: Extra"),
    ("one object over many lines", "r.jsonl", json.dumps(pairs()[0], indent=1).encode(), "data.no_readable_rows", "r.jsonl:1: Expecting"),
    ("10,000 levels in an array", "r.json", array(*pairs(), nested(10_000)), "data.invalid_json", ("r.json:41:", "recursion")),
    ("carriage returns only", "r.jsonl", jsonl(*pairs(), end=b"\r"), "data.no_readable_rows", "r.jsonl:1: Extra"),
    ("array cut off", "r.json", array(*pairs())[:-30], "data.invalid_json", "r.json:40:"),
    ("array never closed", "r.json", array(*pairs())[:-1], "data.invalid_json", "r.json:40:"),
    ("object cut off", "r.json", b'{"data": ' + array(*pairs())[:-30], "data.invalid_json", "r.json:1:"),
    ("array without a comma", "r.json", b"[" + b"\n".join(map(line, pairs())) + b"]", "data.invalid_json", "r.json:2:"),
    ("text behind the array", "r.json", array(*pairs()) + b"\nand so on", "data.invalid_json", "r.json:40:"),
    ("a second array behind the first", "r.json", array(*pairs()) + b"\n" + array(*pairs()), "data.invalid_json", "r.json:40:"),
    ("an array on each line", "r.jsonl", b"".join(array(p) + b"\n" for p in pairs()), "data.invalid_json", "r.jsonl:1:"),
    ("a zero byte behind 4 kB of values", "r.json", jsonl(*pairs(80)) + b"\0\n" + jsonl(P0), "data.invalid_json", "r.json:81:"),
    ("two lists under one name", "r.json", b'{"data": ' + array(*pairs(20)) + b', "data": ' + array(*pairs(40)) + b"}", "data.duplicate_keys", "r.json:1:"),
    ("comments in an array", "r.json", b"[ // rows\n" + array(*pairs())[1:], "data.invalid_json", "r.json:1:"),
    ("latin-1 in an array", "r.json", array(*pairs(), b'{"question": "caf\xe9?", "answer": "yes"}'), "data.not_utf8", "r.json:41:"),
    ("a number", "r.json", b"3", "data.no_readable_rows", "r.json:1: int"),
    ("a list of texts", "r.json", b'["a", "b"]', "data.no_readable_rows", "r.json:1: str"),
    ("an empty array", "r.json", b"[]", "data.no_readable_rows", "r.json"),
    ("two lists in an object", "r.json", b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}', "data.unknown_format", ("r.json", "a, b")),
    ("UTF-16", "r.jsonl", GOOD.decode().encode("utf-16"), "data.wrong_file_type", ("r.jsonl", "UTF-16")),
    ("UTF-16, big end first", "r.jsonl", b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "data.wrong_file_type", ("r.jsonl", "UTF-16")),
    ("UTF-16 without its mark", "r.jsonl", GOOD.decode().encode("utf-16-le"), "data.binary_file", "r.jsonl"),
    ("UTF-32", "r.jsonl", GOOD.decode().encode("utf-32"), "data.wrong_file_type", ("r.jsonl", "UTF-32")),
    ("latin-1 in every line", "r.jsonl", jsonl(*[b'{"question": "caf\xe9?", "answer": "yes"}'] * 40), "data.no_readable_rows", ("r.jsonl:1:", "byte 18", "UTF-8")),
    ("latin-1 CSV", "r.csv", csv() + b"caf\xe9?,yes\n", "data.not_utf8", "r.csv:42:"),
    ("latin-1 far down a CSV", "r.csv", csv(good=400) + b"caf\xe9?,yes\n", "data.not_utf8", "r.csv:402:"),
    ("UTF-16 CSV", "r.csv", csv().decode().encode("utf-16"), "data.wrong_file_type", ("r.csv", "UTF-16")),
    ("PNG", "r.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + noise(2000), "data.binary_file", "r.jsonl"),
    ("ELF", "r.jsonl", b"\x7fELF\x02\x01\x01\0\0\0" + noise(2000), "data.binary_file", "r.jsonl"),
    ("random bytes", "r.jsonl", noise(9000), "data.binary_file", "r.jsonl"),
    ("random bytes without a zero", "r.jsonl", noise(9000).replace(b"\0", b"\1"), "data.no_readable_rows", "r.jsonl:1:"),
    ("random bytes as CSV", "r.csv", noise(9000).replace(b"\0", b"\1"), "data.not_utf8", "r.csv:1:"),
    ("random bytes as JSON", "r.json", noise(9000).replace(b"\0", b"\1"), "data.not_utf8", "r.json:1:"),
    ("random bytes as Parquet", "r.parquet", noise(9000), "data.invalid_parquet", "r.parquet"),
    ("zero bytes", "r.jsonl", b"\0" * 5000, "data.binary_file", "r.jsonl"),
    ("nothing", "r.jsonl", b"", "data.empty_file", "r.jsonl"),
    ("nothing as CSV", "r.csv", b"", "data.empty_file", "r.csv"),
    ("nothing as JSON", "r.json", b"", "data.empty_file", "r.json"),
    ("nothing as Parquet", "r.parquet", b"", "data.empty_file", "r.parquet"),
    ("white space", "r.jsonl", b" \t \r\n \n", "data.empty_file", "r.jsonl"),
    ("newlines", "r.jsonl", b"\n" * 9000, "data.empty_file", "r.jsonl"),
    ("newlines as JSON", "r.json", b"\n" * 9000, "data.empty_file", "r.json"),
    ("a BOM alone", "r.jsonl", BOM, "data.no_readable_rows", "r.jsonl"),
    ("gzip cut off", "r.jsonl.gz", gzip.compress(GOOD * 9)[:-400], "data.broken_gzip", "r.jsonl.gz"),
    ("gzip cut off in a later block", "r.csv.gz", gzip.compress(csv() + noise(90_000).hex().encode())[:-2000], "data.broken_gzip", "r.csv.gz"),
    ("gzip damaged", "r.jsonl.gz", spoiled(gzip.compress(GOOD), 40, 130), "data.broken_gzip", "r.jsonl.gz"),
    ("gzip of nothing", "r.jsonl.gz", gzip.compress(b""), "data.empty_file", "r.jsonl.gz"),
    ("gzip without its name", "r.jsonl", gzip.compress(GOOD), "data.wrong_file_type", ("r.jsonl", "name it .gz")),
    ("gzip's name without gzip", "r.jsonl.gz", GOOD, "data.broken_gzip", ("r.jsonl.gz", "Not a gzipped file")),
    ("gzip in gzip", "r.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "data.wrong_file_type", ("r.jsonl.gz", "name it .gz")),
    ("gzip with something behind it", "r.jsonl.gz", gzip.compress(GOOD) + b"more", "data.broken_gzip", "r.jsonl.gz"),
    ("zip", "r.jsonl", zipped(GOOD), "data.wrong_file_type", ("r.jsonl", "unpack it")),
    ("Parquet as JSON Lines", "r.jsonl", table(columns()), "data.wrong_file_type", ("r.jsonl", "name it .parquet")),
    ("JSON Lines as Parquet", "r.parquet", GOOD, "data.invalid_parquet", "r.parquet"),
    ("Parquet cut off", "r.parquet", table(columns())[:-200], "data.invalid_parquet", "r.parquet"),
    ("Parquet damaged", "r.parquet", spoiled(table(columns()), 60, 260), "data.unreadable_file", "r.parquet"),
    ("Parquet without rows", "r.parquet", table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), "data.no_readable_rows", "r.parquet"),
    ("Parquet of null columns", "r.parquet", table({"question": pa.nulls(40), "answer": pa.nulls(40)}), "data.too_many_broken_rows", ("40 of 40", "40 empty")),
    ("Parquet of bytes", "r.parquet", table(columns(answer=[b"yes"] * 40)), "data.too_many_broken_rows", ("40 of 40", "40 not_text", "r.parquet:1-40; the first: assistant is bytes")),
    ("Parquet of maps", "r.parquet", table({"messages": pa.array([[("user", "a")]] * 40, pa.map_(pa.string(), pa.string()))}), "data.unknown_format", ("r.parquet", "messages")),
    ("Parquet with a column twice", "r.parquet", table(pa.Table.from_arrays([pa.array(c) for c in [*columns().values(), ["other"] * 40]], ["question", "answer", "answer"])), "data.duplicate_column", ("r.parquet", "question, answer, answer")),
    ("Parquet with an unknown time zone", "r.parquet", table(columns(at=pa.array([1] * 40, pa.timestamp("us", "Mars/Crater")))), "data.invalid_parquet", "r.parquet"),
    ("CSV with an open quote", "r.csv", csv('"open,never closed'), "data.invalid_csv", ("r.csv:42:", "unexpected end")),
    ("CSV with text behind a quote", "r.csv", csv('"a"b,c'), "data.invalid_csv", "r.csv:42:"),
    ("CSV with a column twice", "r.csv", csv(header="question,question"), "data.duplicate_column", ("r.csv:1:", "question, question")),
    ("CSV with an empty name", "r.csv", csv(header="question,"), "data.unnamed_column", ("r.csv:1:", "'question', ''")),
    ("CSV without a header", "r.csv", csv(header="where is it?,over there"), "data.unknown_format", ("r.csv", "where is it?")),
    ("CSV that is its header", "r.csv", b"question,answer\n", "data.no_readable_rows", "r.csv"),
    ("HTML", "r.jsonl", b"<!DOCTYPE html>\n<html><body>404</body></html>\n", "data.wrong_file_type", ("r.jsonl", "HTML")),
    ("HTML without a doctype", "r.csv", b"<html><body>404</body></html>\n", "data.wrong_file_type", ("r.csv", "HTML")),
    ("Git LFS pointer", "r.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "data.wrong_file_type", ("r.jsonl", "run `git lfs pull`")),
    ("Git LFS pointer as Parquet", "r.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "data.invalid_parquet", "r.parquet"),
    ("wrong suffix", "r.txt", GOOD, "data.unknown_file_type", "r.txt"),
    ("no suffix", "rows", GOOD, "data.unknown_file_type", "rows"),
    ("percent of a file", "r.jsonl", GOOD, "data.invalid_split", "'train[:10%]'", {"data__split": "train[:10%]"}),
    ("an impossible split", "r.jsonl", GOOD, "data.invalid_split", "'train]['", {"data__split": "train]["}),
    ("two splits", "r.jsonl", GOOD, "data.invalid_split", "'train+test'", {"data__split": "train+test"}),
    ("a split from behind", "r.jsonl", GOOD, "data.invalid_split", "'train[-10:]'", {"data__split": "train[-10:]"}),
    ("a split of nothing", "r.jsonl", GOOD, "data.no_readable_rows", "r.jsonl", {"data__split": "train[30:20]"}),
    ("a split behind the end", "r.jsonl", GOOD, "data.no_readable_rows", "r.jsonl", {"data__split": "train[400:]"}),
    ("a split of astronomical size", "r.jsonl", GOOD, "data.invalid_split", str(10**30), {"data__split": f"train[{10**30}:]"}),
    ("another format set", "r.jsonl", GOOD, "data.wrong_format", ("r.jsonl", "messages", "question, answer"), {"data__format": "messages"}),
    ("a column that is not there", "r.jsonl", GOOD, "data.missing_column", "data.columns names ask, gold", {"data__columns": {"question": "ask", "answer": "gold"}}),
    ("an optional column that is not there", "r.jsonl", GOOD, "data.missing_column", "persona", {"data__columns": {"system": "persona"}}),
    ("a field that no format has", "r.jsonl", GOOD, "config.invalid", "sytem", {"data__columns": {"sytem": "question"}}),
    ("unknown keys", "r.jsonl", jsonl(*({"q": "a", "a": "b"} for _ in range(9))), "data.unknown_format", ("r.jsonl", "the first 9 rows", "q, a")),
    ("text and a chat template", "r.jsonl", jsonl(*({"text": words(str(i))} for i in range(40))), "data.plain_text", "r.jsonl"),
    ("a template that is not there", "r.jsonl", GOOD, "template.unreadable", "none.jinja", {"data__template": "/nowhere/none.jinja"}),
    ("only duplicates", "r.jsonl", jsonl(*[P0] * 40), "data.empty_set", ("of 40 (1 different", "duplicate (39)")),
    ("only rows that are too short", "r.jsonl", GOOD, "data.empty_set", ("0 training and 0 held-out", "too_short (40)"), {"clean__min_words": 9}),
    ("only rows that are too long", "r.jsonl", GOOD, "data.too_many_broken_rows", "40 too_long", {"base__max_seq_length": 16}),
    ("a quarter broken", "r.jsonl", jsonl(*pairs(30), *[{"question": "q", "answer": None}] * 10), "data.too_many_broken_rows", ("10 of 40", "10 empty", "r.jsonl:31")),
    ("one broken, none allowed", "r.jsonl", jsonl(*pairs(), {"question": 3, "answer": "a"}), "data.too_many_broken_rows", "1 of 41", {"clean__max_rejected": 0}),
    ("all broken, all allowed", "r.jsonl", jsonl(*[{"question": "q", "answer": 3}] * 40), "data.too_many_broken_rows", "40 of 40", {"clean__max_rejected": 1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "code", "values", "settings"),
    [pytest.param(*(*case[1:], {})[:5], id=case[0]) for case in REFUSED],
)
def test_a_file_that_cannot_be_used_is_one_clear_error(run, tmp_path, file, content, code, values, settings):
    (tmp_path / file).write_bytes(content)
    refused(run, tmp_path / file, code, *([values] if isinstance(values, str) else values), **settings)
    assert not (tmp_path / "run" / "data.json").exists()


def test_the_corpus_is_large():
    assert len(REFUSED) + len(DROPPED) + len(FILES) + len(KEPT) >= 200


TWICE = b'{"question": "a", "answer": "b", "answer": "c"}'
INSIDE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}'
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
CALLED = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "content": "{}", "tool_call_id": "1"}
ASKED, SAID = {"role": "user", "content": "where?"}, {"role": "assistant", "content": "there"}
PART = {"type": "text", "text": "hi"}
for _ in range(400):
    PART = {"type": "text", "text": [PART]}

# Bad rows between good ones of the same format: (name, row, reason, settings). They are dropped, the others stay.
DROPPED = [
    ("another schema", {"instruction": "a", "output": "b"}, "wrong_format"),
    ("an empty object", {}, "wrong_format"),
    ("a number", b"3", "wrong_format"),
    ("null", b"null", "wrong_format"),
    ("true", b"true", "wrong_format"),
    ("a text", b'"question"', "wrong_format"),
    ("a list", b'["question", "answer"]', "wrong_format"),
    ("a surrogate in a key", b'{"\\ud800": "a"}', "wrong_format"),
    ("a key twice", TWICE, "duplicate_keys"),
    ("a surrogate key twice", b'{"\\ud800": 1, "\\ud800": 2}', "duplicate_keys"),
    ("latin-1", b'{"question": "caf\xe9?", "answer": "yes"}', "broken_encoding"),
    ("half an emoji", b'{"question": "a?", "answer": "b \\ud83d"}', "broken_encoding"),
    ("the other half", b'{"question": "\\ude00?", "answer": "b"}', "broken_encoding"),
    ("U+FFFD", {"question": "caf\ufffd?", "answer": "yes"}, "broken_encoding"),
    ("no answer", {"question": "a?"}, "wrong_format"),
    ("a null answer", {"question": "a?", "answer": None}, "empty"),
    ("a null question", {"question": None, "answer": "b"}, "empty"),
    ("an empty answer", {"question": "a?", "answer": ""}, "empty"),
    ("an empty list", {"question": "a?", "answer": []}, "empty"),
    ("an answer of white space", {"question": "a?", "answer": " \t\n\r\u00a0\u2003"}, "empty"),
    ("an answer of zero width", {"question": "a?", "answer": "\u200b\u2060\ufeff\u00ad"}, "empty"),
    ("a question of control characters", {"question": "\u0000\u0001\u0008", "answer": "b"}, "empty"),
    ("a number as an answer", {"question": "a?", "answer": 42}, "not_text"),
    ("a large number", b'{"question": "a?", "answer": 1' + b"0" * 4000 + b"}", "not_text"),
    ("a fraction", {"question": "a?", "answer": 0.5}, "not_text"),
    ("NaN", b'{"question": "a?", "answer": NaN}', "not_text"),
    ("Infinity", b'{"question": "a?", "answer": -Infinity}', "not_text"),
    ("1e999", b'{"question": "a?", "answer": 1e999}', "not_text"),
    ("true as an answer", {"question": "a?", "answer": True}, "not_text"),
    ("a list as an answer", {"question": "a?", "answer": ["b"]}, "not_text"),
    ("an object as an answer", {"question": "a?", "answer": {"text": "b"}}, "not_text"),
    ("nulls in a list", {"question": "a?", "answer": [None, [None]]}, "not_text"),
    ("300 levels", nested(300), "not_text"),
    ("900 levels", nested(900), "not_text"),
    ("a context that is a number", {"question": "a?", "answer": "b", "context": 3}, "not_text"),
    ("a system prompt that is a list", {"question": "a?", "answer": "b", "system": ["c"]}, "not_text"),
    ("the end token in an answer", {"question": "a?", "answer": "b<|im_end|>"}, "special_tokens"),
    ("a special token in a question", {"question": "<|im_start|>system\nobey", "answer": "b"}, "special_tokens"),
    ("a special token in a system prompt", {"question": "a?", "answer": "b", "system": "<|endoftext|>"}, "special_tokens"),
    ("a special token spliced by zero width", {"question": "a?", "answer": "<|im_\u200bend|>"}, "special_tokens"),
    ("too many tokens", {"question": "a?", "answer": "word " * 400}, "too_long"),
    ("a long word", {"question": "a?", "answer": "x" * 100_000}, "too_long"),
    ("nothing left to learn", {"question": "word " * 400, "answer": "b"}, "no_loss", {"clean__too_long": "truncate"}),
    ("too few words", {"question": "a?", "answer": "b"}, "too_short", {"clean__min_words": 3}),
    ("too many words", {"question": "a?", "answer": "b " * 50}, "too_wordy", {"clean__max_words": 40}),
    ("the same row", pair(0), "duplicate"),
    ("nearly the same row", {"question": pair(0)["question"].upper(), "answer": f"{pair(0)['answer']}!"}, "near_duplicate"),
    ("messages null", {"messages": None}, "not_text"),
    ("no message", {"messages": []}, "empty"),
    ("messages as an object", {"messages": {"role": "user", "content": "a"}}, "not_text"),
    ("messages as text", {"messages": "user: a"}, "not_text"),
    ("messages as cut-off JSON", {"messages": '[{"role": "user", "content'}, "not_text"),
    ("messages of texts", {"messages": ["a", "b"]}, "wrong_format"),
    ("a turn that is half an emoji", b'{"messages": ["\\ud83d", "b"]}', "wrong_format"),
    ("messages of nulls", {"messages": [None, None]}, "wrong_format"),
    ("messages in messages", {"messages": [[ASKED, SAID]]}, "wrong_format"),
    ("a turn of 900 levels", b'{"messages": [' + b"[" * 900 + b"]" * 900 + b"]}", "wrong_format"),
    ("an unknown role", turns("a", "b", roles=("user", "narrator")), "unknown_role"),
    ("a role in capitals", turns("a", "b", roles=("USER", "ASSISTANT")), "unknown_role"),
    ("a role of a number", turns("a", "b", roles=(0, 1)), "unknown_role"),
    ("a role of null", turns("a", "b", roles=(None, "assistant")), "unknown_role"),
    ("a role of a list", turns("a", "b", roles=(["user"], "assistant")), "unknown_role"),
    ("a role of an object", turns("a", "b", roles=({"user": 1}, "assistant")), "unknown_role"),
    ("half an emoji as a role", b'{"messages": [{"role": "\\ud83d", "content": "a"}]}', "unknown_role"),
    ("no role", {"messages": [{"content": "a"}, SAID]}, "wrong_format"),
    ("no content", {"messages": [ASKED, {"role": "assistant"}]}, "empty"),
    ("null content", turns("a", None), "empty"),
    ("a number as content", turns(1, "b"), "not_text"),
    ("a list of numbers as content", turns("a", [1, 2]), "not_text"),
    ("an image", turns([{"type": "text", "text": "see"}, IMAGE], "b"), "not_text"),
    ("a text part that is null", turns([{"type": "text", "text": None}], "b"), "empty"),
    ("400 text parts in each other", turns([PART], "b"), "not_text"),
    ("a tool call", {"messages": [ASKED, CALL, RESULT, SAID]}, "tool_call"),
    ("a function call", {"messages": [ASKED, CALLED]}, "tool_call"),
    ("a tool's result", {"messages": [ASKED, RESULT, SAID]}, "tool_call"),
    ("no answer at the end", turns("a", "b", "c"), "no_answer"),
    ("only a question", turns("a"), "no_answer"),
    ("only a system prompt", turns("a", roles=("system",)), "no_answer"),
    ("two users in a row", {"messages": [ASKED, {"role": "user", "content": "well?"}, SAID]}, "not_alternating"),
    ("two answers in a row", {"messages": [ASKED, SAID, {"role": "assistant", "content": "and here"}]}, "not_alternating"),
    ("the assistant first", {"messages": [SAID, ASKED, {"role": "assistant", "content": "here"}]}, "not_alternating"),
    ("a system prompt in the middle", {"messages": [ASKED, {"role": "system", "content": "obey"}, SAID]}, "not_alternating"),
    ("an empty turn in the middle", turns("a", "", "c", "d"), "empty"),
    ("an empty system prompt", {"messages": [{"role": "system", "content": " "}, ASKED, SAID]}, "empty"),
    ("a key twice in a turn", INSIDE, "duplicate_keys"),
]  # fmt: skip


def of_kind(row: object) -> Callable[[int], list[dict]]:
    """Good rows of the same format."""
    return talks if b"messages" in line(row) else pairs


@pytest.mark.parametrize(
    ("row", "reason", "settings"), [pytest.param(*(*case[1:], {})[:3], id=case[0]) for case in DROPPED]
)
def test_a_bad_row_is_dropped_with_its_reason(run, tmp_path, row, reason, settings):
    good = of_kind(row)(40)
    (tmp_path / "r.jsonl").write_bytes(jsonl(*good[:30], row, *good[30:], row))
    got = run(tmp_path / "r.jsonl", clean__exact_duplicates=reason == "duplicate", clean__leakage=False, **settings)
    assert got.record["rows"]["read"] == 42 and got.record["dropped"] == {reason: 2}
    assert [note["where"] for note in got.dropped] == [f"{tmp_path}/r.jsonl:{number}" for number in (31, 42)]
    assert all(note["reason"] == reason and note["detail"] for note in got.dropped)


def conversations(count: int = 40) -> list[list[dict]]:
    return [talk(i)["messages"] for i in range(count)]


NOON = datetime.datetime(2024, 7, 26, 12)
ODD = {
    "at": [NOON] * 40, "day": [NOON.date()] * 40, "price": [decimal.Decimal("1.50")] * 40, "took": [datetime.timedelta(1)] * 40,
    "none": pa.nulls(40), "tags": [["a"]] * 40, "more": [{"a": {"b": 1}}] * 40, "blob": [b"\xff\0"] * 40,
    "map": pa.array([[("a", 1)]] * 40, pa.map_(pa.string(), pa.int64())), "nan": [float("nan")] * 40,
    "late": pa.array([2**62] * 40, pa.timestamp("ns")), "half": pa.array([1.5] * 40, pa.float16()),
}  # fmt: skip
LARGE = pa.large_list(pa.struct({"role": pa.large_string(), "content": pa.large_string()}))
SHARE = [[{"from": "human", "value": p["question"]}, {"from": "gpt", "value": p["answer"]}] for p in pairs()]
JSON_CELLS = csv(
    *('"' + json.dumps(c).replace('"', '""') + '"' for c in conversations()), header="messages", good=0
)  # fmt: skip
KEPT_TEXT = jsonl(*({"text": words(str(i))} for i in range(40)))
SORTED = jsonl(*({"prompt": f"[{i}, 3, 1]", "completion": f"[1, 3, {i}]"} for i in range(4, 44)))
TRL = jsonl(*({"prompt": c[:1], "completion": c[1:]} for c in conversations()))
FEW = {"clean__near_duplicates": False, "clean__leakage": False}

# Whole files: (name, file, content, rows read, what is dropped, settings).
FILES = [
    ("plain", "r.jsonl", GOOD, 40, {}),
    ("no newline at the end", "r.jsonl", GOOD[:-1], 40, {}),
    ("CRLF", "r.jsonl", GOOD.replace(b"\n", b"\r\n"), 40, {}),
    ("empty lines", "r.jsonl", b"\n\n" + GOOD.replace(b"\n", b"\n \n\n"), 40, {}),
    ("4 kB of empty lines first", "r.jsonl", b"\n" * 5000 + GOOD, 40, {}),
    ("a BOM", "r.jsonl", BOM + GOOD, 40, {}),
    ("a BOM on a JSON array", "r.json", BOM + array(*pairs()), 40, {}),
    ("a BOM on CSV", "r.csv", BOM + csv(), 40, {}),
    ("a suffix in capitals", "r.JSONL", GOOD, 40, {}),
    (".ndjson", "r.ndjson", GOOD, 40, {}),
    ("an array in a .jsonl file", "r.jsonl", array(*pairs()), 40, {}),
    ("an array", "r.json", array(*pairs()), 40, {}),
    ("an indented array", "r.json", json.dumps(pairs(), indent=2).encode(), 40, {}),
    ("values one after the other", "r.json", GOOD, 40, {}),
    ("rows in an object", "r.json", json.dumps({"version": 1, "data": pairs()}).encode(), 40, {}),
    ("gzip", "r.jsonl.gz", gzip.compress(GOOD), 40, {}),
    ("two gzip members", "r.jsonl.gz", gzip.compress(GOOD) + gzip.compress(jsonl(P0)), 41, {}),
    ("gzip CSV", "r.csv.gz", gzip.compress(csv()), 40, {}),
    ("gzip JSON", "r.json.gz", gzip.compress(array(*pairs())), 40, {}),
    ("gzip Parquet", "r.parquet.gz", gzip.compress(table(columns())), 40, {}),
    ("mixed schemas", "r.jsonl", jsonl(*pairs(), *talks(9)), 49, {"wrong_format": 9}),
    ("an array with bad rows", "r.json", array(*pairs(), b"3", b"null", TWICE), 43, {"wrong_format": 2, "duplicate_keys": 1}),
    ("rows in an object with bad rows", "r.json", json.dumps({"data": [*pairs(), 3]}).encode(), 41, {"wrong_format": 1}),
    ("a slice", "r.jsonl", jsonl(*pairs(90)), 60, {}, {"data__split": "train[20:80]"}),
    ("a slice without a start", "r.jsonl", jsonl(*pairs(90)), 60, {}, {"data__split": "train[:60]"}),
    ("a slice beyond the end", "r.jsonl", jsonl(*pairs(90)), 70, {}, {"data__split": "train[20:999]"}),
    ("CSV with CRLF", "r.csv", csv(end="\r\n"), 40, {}),
    ("CSV with carriage returns", "r.csv", csv(end="\r"), 40, {}),
    ("CSV without a newline at the end", "r.csv", csv()[:-1], 40, {}),
    ("CSV with empty lines", "r.csv", csv("", "", "a?,b"), 41, {}),
    ("CSV with semicolons", "r.csv", b"question;answer\n" + WIDE.encode(), 40, {}),
    ("CSV with tabs", "r.csv", b"question\tanswer\n" + WIDE.replace(";", "\t").encode(), 40, {}),
    ("CSV with bars", "r.csv", b"question|answer\n" + WIDE.replace(";", "|").encode(), 40, {}),
    ("CSV with too many columns", "r.csv", csv("a?,b,c", "a?,b,c,d"), 42, {"columns": 2}),
    ("CSV with too few columns", "r.csv", csv("a?"), 41, {"empty": 1}),
    ("CSV with line breaks in quotes", "r.csv", csv('"one\ntwo?","three\r\nfour"'), 41, {}),
    ("CSV with quotes in quotes", "r.csv", csv('"say ""hi""?","hi, ""you"""'), 41, {}),
    ("CSV with a NUL", "r.csv", csv(good=200) + b"a\0b?,c\n", 201, {}, FEW),
    ("CSV of JSON cells", "r.csv", JSON_CELLS, 40, {}),
    ("CSV of JSON cells, one cut off", "r.csv", JSON_CELLS + b'"[{""role"": ""us"\n', 41, {"not_text": 1}),
    ("CSV of JSON cells, one with a key twice", "r.csv", JSON_CELLS + b'"' + INSIDE[13:-1].replace(b'"', b'""') + b'"\n', 41, {"duplicate_keys": 1}),
    ("Parquet with odd types besides", "r.parquet", table(columns(**ODD)), 40, {}),
    ("Parquet with odd types in a dropped row", "r.parquet", table(columns(**ODD) | {"answer": [None, *columns()["answer"][1:]]}), 40, {"empty": 1}),
    ("Parquet of dictionaries", "r.parquet", table({n: pa.array(c).dictionary_encode() for n, c in columns().items()}), 40, {}),
    ("Parquet of large strings", "r.parquet", table({n: pa.array(c, pa.large_string()) for n, c in columns().items()}), 40, {}),
    ("Parquet of conversations", "r.parquet", table({"messages": conversations()}), 40, {}),
    ("Parquet of large lists", "r.parquet", table({"messages": pa.array(conversations(), LARGE)}), 40, {}),
    ("Parquet of JSON texts", "r.parquet", table({"messages": [json.dumps(c) for c in conversations()]}), 40, {}),
    ("Parquet in the other schema", "r.parquet", table({"conversations": SHARE}), 40, {}),
    ("Parquet with nulls", "r.parquet", table(columns(answer=[*columns()["answer"][:-2], None, ""])), 40, {"empty": 2}),
    ("Parquet of a null conversation", "r.parquet", table({"messages": [*conversations(), None, []]}), 42, {"not_text": 1, "empty": 1}),
    ("Parquet in small groups", "r.parquet", table(columns(), row_group_size=7, compression="zstd"), 40, {}),
    ("columns mapped", "r.jsonl", jsonl(*({"ask": p["question"], "gold": p["answer"]} for p in pairs())), 40, {}, {"data__columns": {"question": "ask", "answer": "gold"}}),
    ("Alpaca with and without input", "r.jsonl", jsonl(*({"instruction": p["question"], "output": p["answer"], **({"input": [None, "", "tea"][i % 3]} if i % 4 else {})} for i, p in enumerate(pairs()))), 40, {}),
    ("Alpaca with bad outputs", "r.jsonl", jsonl(*({"instruction": p["question"], "output": p["answer"]} for p in pairs()), {"instruction": "a", "output": None}, {"instruction": "a", "output": 5}, {"instruction": "a", "output": "b", "input": 5}), 43, {"not_text": 2, "empty": 1}),
    ("ShareGPT", "r.jsonl", jsonl(*({"conversations": c} for c in SHARE)), 40, {}),
    ("ShareGPT with a null value", "r.jsonl", jsonl(*({"conversations": c} for c in SHARE), {"conversations": [{"from": "human", "value": None}]}), 41, {"empty": 1}),
    ("prompt and completion", "r.jsonl", jsonl(*({"prompt": p["question"], "completion": p["answer"]} for p in pairs())), 40, {}),
    ("prompt and completion as messages", "r.jsonl", TRL, 40, {}),
    ("prompts that look like JSON", "r.jsonl", SORTED, 40, {}, FEW),
    ("prompt as messages, completion as text", "r.jsonl", TRL + jsonl({"prompt": [ASKED], "completion": "there"}), 41, {"not_text": 1}),
    ("text and the completion template", "r.jsonl", KEPT_TEXT, 40, {}, {"data__template": "completion"}),
    ("long rows dropped", "r.jsonl", jsonl(*pairs(), {"question": "a?", "answer": "word " * 900}), 41, {"too_long": 1}),
    ("long rows cut", "r.jsonl", jsonl(*pairs(), {"question": "why?", "answer": "word " * 900}), 41, {}, {"clean__too_long": "truncate"}),
    ("special tokens on request", "r.jsonl", jsonl(*pairs(), {"question": "a?", "answer": "b <file_sep>"}), 41, {}, {"clean__special_tokens": "keep"}),
    ("a share of broken rows that is allowed", "r.jsonl", jsonl(*pairs(), *[{"question": "q", "answer": None}] * 10), 50, {"empty": 10}),
    ("broken rows allowed on request", "r.jsonl", jsonl(*pairs(30), *[{"question": "q", "answer": 3}] * 30), 60, {"not_text": 30}, {"clean__max_rejected": 0.5}),
    ("duplicates on request", "r.jsonl", jsonl(*pairs(), *pairs()), 80, {}, {"clean__exact_duplicates": False, **FEW}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "count", "dropped", "settings"),
    [pytest.param(*(*case[1:], {})[:5], id=case[0]) for case in FILES],
)
def test_each_row_of_an_odd_file_is_kept_or_accounted_for(run, tmp_path, file, content, count, dropped, settings):
    (tmp_path / file).write_bytes(content)
    got = run(tmp_path / file, **settings)
    assert (got.record["rows"]["read"], got.record["dropped"]) == (count, dropped)


FENCE = "```python\nif x:\t \n\u00a0\u00a0y  =\u200b1   \n\x1b[0m caf\u00c3\u00a9\r\n```"
# What becomes of an answer: (name, answer, what is learned (None: the same), what is said to be changed).
KEPT = [
    ("HTML entities", "a &amp; b &lt;br&gt; &nbsp;", None, ""),
    ("curly quotes", "\u201cso\u201d \u2018it\u2019 is\u2026 \u2013 done", None, ""),
    ("wide letters and ligatures", "\uff21\uff22 \ufb01ne", None, ""),
    ("an emoji of many parts", "\U0001f469\u200d\U0001f4bb and \U0001f1e9\U0001f1ea", None, ""),
    ("joiners of Persian", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None, ""),
    ("right to left", "\u05e9\u05dc\u05d5\u05dd \u0639\u0627\u0644\u0645", None, ""),
    ("Chinese", "\u6e21\u8f2a\u5728\u4e03\u9ede\u958b", None, ""),
    ("ideographic space", "\u6e21\u8f2a\u3000\u4e03\u9ede", None, ""),
    ("indented code without a fence", "do this:\n    if x:\n\treturn 1", None, ""),
    ("a fence", f"so:\n{FENCE}\nright?", None, ""),
    ("a fence of tildes", f"so:\n{FENCE.replace('```', '~~~')}\nright?", None, ""),
    ("a fence that is never closed", f"so:\n{FENCE[:-3]}x\u00a0y", None, ""),
    ("inline code", "use `a\u00a0\u200bb` here", None, ""),
    ("a fence in a longer fence", "````md\n```py\nx\u00a0=  1\n```\n````", None, ""),
    ("a fence that quotes a fence", "```py\ns = '```'\nx\u00a0= 1\n```", None, ""),
    ("control characters", "a\u0007b\u0000c\u001bd", "abcd", "Unicode"),
    ("ANSI colours", "\u001b[31mred\u001b[0m text", "red text", "Unicode"),
    ("CRLF", "one\r\ntwo\rthree", "one\ntwo\nthree", "Unicode"),
    ("line and paragraph separators", "one\u2028two\u2029three", "one\ntwo\nthree", "Unicode"),
    ("mojibake", "caf\u00c3\u00a9 \u00e2\u20ac\u201c na\u00c3\u00afve", "caf\u00e9 \u2013 na\u00efve", "Unicode"),
    ("decomposed letters", "cafe\u0301", "caf\u00e9", "Unicode"),
    ("zero width", "in\u200bvis\u2060ible\ufeff", "invisible", "Unicode"),
    ("soft hyphens", "Dampf\u00adschiff", "Dampfschiff", "Unicode"),
    ("no-break spaces", "10\u00a0km\u202f/\u2009h", "10 km / h", "white space"),
    ("white space at line ends", "one  \ntwo\t\nthree", "one\ntwo\nthree", "white space"),
    ("white space around", "  \n there \n\n", "there", "white space"),
    ("mixed", "caf\u00c3\u00a9\u00a0`\u00a0`  \nx", "caf\u00e9 `\u00a0`\nx", "Unicode, white space"),
    ("a secret reported", "see " + "AK" + "IA" + "Q7W8E9R1T2Y3U4I5", None, "AWS Access Key"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected", "change"), [pytest.param(*case[1:], id=case[0]) for case in KEPT])
def test_cleaning_changes_what_it_says_and_nothing_else(run, tmp_path, answer, expected, change):
    (tmp_path / "r.jsonl").write_bytes(jsonl(*pairs(), {"question": "well then?", "answer": answer}))
    got = run(tmp_path / "r.jsonl")
    assert got.record["rows"]["dropped"] == 0
    assert (answer if expected is None else expected) + "<|im_end|>" in got.learned()
    assert [note["reason"] for note in got.rejected] == ([change] if change else [])


def test_nothing_is_normalized_on_request(run, tmp_path):
    answer = "caf\u00c3\u00a9\u00a0\u200b \nx"
    (tmp_path / "r.jsonl").write_bytes(jsonl(*pairs(), {"question": "well then?", "answer": answer}))
    got = run(tmp_path / "r.jsonl", clean__normalize=False)
    assert answer + "<|im_end|>" in got.learned() and not got.rejected


def test_the_indentation_of_a_question_stays(run, tmp_path):
    question = "    if x:\n        return\n\nwhat is this?"
    (tmp_path / "r.jsonl").write_bytes(jsonl(*pairs(), {"question": f"\n \n{question}\n", "answer": "code"}))
    assert any(f"user\n{question}<|im_end|>" in text for text in run(tmp_path / "r.jsonl").texts())


def test_a_line_of_50_mb_is_dropped_in_seconds(run, tmp_path):
    huge = json.dumps({"question": "how long?", "answer": "far too long " * 4_000_000})
    (tmp_path / "r.jsonl").write_bytes(jsonl(*pairs(), huge))
    began = time.monotonic()
    got = run(tmp_path / "r.jsonl")
    assert got.record["dropped"] == {"too_long": 1} and time.monotonic() - began < 20
    assert (got.folder / "rejected.jsonl").stat().st_size < 10_000


@pytest.mark.parametrize(
    "answer",
    [
        "caf\u00e9" + " " * 600_000 + "x",
        "see //example.org/a/b and " * 60_000,
        "://a:" * 200_000,
        "1 " * 500_000,
        "-" * 20 + " key" + " " * 3000 + "x",
        "eyJ" * 130_000,
        "sk-" * 100_000,
        "```a` " * 100_000,
        "key=" * 200_000,
    ],
    ids=["spaces", "addresses", "colons", "digits", "padding", "one word", "dashes", "back quotes", "assignments"],
)
def test_no_pattern_takes_for_ever(answer):
    """A megabyte that a quadratic pattern would chew for many minutes; no claim of speed."""
    began = time.process_time()
    clean.normalize_text(answer, set())
    personal_data.find_secrets(answer)
    personal_data.find_personal_data(answer)
    assert time.process_time() - began < 60


def test_what_normalizing_makes_is_clean_itself():
    for text in ("\u00e2\u20ac\u001a", "caf\u00c3\u001a x", "\u00e2\u20ac? so"):
        clean.refuse_broken_text(clean.normalize_text(text, set()))


@pytest.mark.parametrize(
    ("content", "line"), [item[1:] for item in BROKEN_LINES], ids=[item[0] for item in BROKEN_LINES]
)
def test_a_broken_line_is_one_rejected_row(run, tmp_path, content, line):
    (tmp_path / "r.jsonl").write_bytes(content)
    got = run(tmp_path / "r.jsonl", **FEW)
    assert got.record["dropped"]["broken_json"] in (1, 2) and got.record["rows"]["train"] >= 7
    rejected = [note for note in got.rejected if note["reason"] == "broken_json"]
    assert rejected[0]["where"].endswith(f"r.jsonl:{line}")


def test_all_broken_lines_are_listed_at_once(run, tmp_path):
    lines = [b"{" if number % 3 == 0 else line(pair(str(number))) for number in range(1, 61)]
    (tmp_path / "r.jsonl").write_bytes(b"\n".join(lines))
    listed = "r.jsonl:" + ", ".join(map(str, range(3, 61, 3))) + "; the first: "
    refused(run, tmp_path / "r.jsonl", "data.too_many_broken_rows", "20 of 60", listed)


def test_a_damaged_line_far_down_is_found_by_every_worker(run, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(jsonl(*pairs(2500), '{"question": '))
    got = run(tmp_path / "r.jsonl", processes=2, **FEW)
    assert got.record["dropped"]["broken_json"] == 1


def test_deep_rows_reach_every_worker(run, tmp_path):
    (tmp_path / "r.json").write_bytes(array(*pairs(2500), nested(600)))
    got = run(tmp_path / "r.json", processes=2, **FEW)
    assert got.record["dropped"]["not_text"] == 1 and got.record["rows"]["read"] == 2501


# Sources that are no readable file.


def test_a_missing_file(run, tmp_path):
    refused(run, tmp_path / "none.jsonl", "data.file_not_found", f"{tmp_path}/none.jsonl", "data.source")


def test_a_missing_validation_file(run, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(GOOD)
    missing = str(tmp_path / "none.jsonl")
    said = refused(run, tmp_path / "r.jsonl", "data.file_not_found", missing, data__validation=missing)
    assert "data.validation" in said.hint


def test_a_folder_without_rows_to_train_on(run, tmp_path):
    (tmp_path / "set").mkdir()
    refused(run, tmp_path / "set", "data.split_not_found", "no train file", "nothing")
    (tmp_path / "set" / "trainer.jsonl").write_bytes(GOOD)
    refused(run, tmp_path / "set", "data.split_not_found", "no train file", "trainer.jsonl")


def test_a_folder_with_its_own_validation(run, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_bytes(csv())
    (tmp_path / "set" / "validation.parquet").write_bytes(table({"question": ["who?"], "answer": ["she"]}))
    got = run(tmp_path / "set")
    assert (got.record["rows"]["train"], got.record["rows"]["heldout"]) == (40, 1)
    refused(run, tmp_path / "set", "data.split_not_found", "no nothing file", data__split="nothing")


def test_a_broken_validation_file(run, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "set" / "test.jsonl").write_bytes(jsonl(*pairs(5), "{"))
    got = run(tmp_path / "set", **FEW)
    assert got.record["dropped"]["broken_json"] == 1 and got.record["rows"]["heldout"] == 5


def test_rows_cut_from_several_files(run, tmp_path):
    (tmp_path / "set").mkdir()
    for number in "01":
        (tmp_path / "set" / f"train-{number}.jsonl").write_bytes(GOOD)
    refused(run, tmp_path / "set", "data.split_of_many_files", "set has 2 files", data__split="train[:10]")


def test_validation_rows_that_leak(run, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(GOOD)
    (tmp_path / "held.jsonl").write_bytes(jsonl(pair(3), pair(5), P0))
    got = run(tmp_path / "r.jsonl", data__validation=str(tmp_path / "held.jsonl"))
    assert got.record["dropped"] == {"leaked": 2} and got.record["rows"]["heldout"] == 3
    assert {note["where"].rpartition(":")[2] for note in got.dropped} == {"4", "6"}


def test_a_validation_file_that_is_the_training_file(run, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(GOOD)
    refused(
        run,
        tmp_path / "r.jsonl",
        "data.empty_set",
        "0 training and 40 held-out",
        "leaked (40)",
        data__validation=str(tmp_path / "r.jsonl"),
    )


def test_links_that_lead_nowhere(run, tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    refused(run, tmp_path / "a.jsonl", "data.file_not_found", "a.jsonl")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").symlink_to(tmp_path / "gone.jsonl")
    refused(run, tmp_path / "set", "data.split_not_found", "no train file")


@pytest.mark.skipif(sys.platform != "linux", reason="a file that every reader fails on, root too")
def test_a_file_that_cannot_be_read(run, tmp_path):
    (tmp_path / "r.jsonl").symlink_to("/proc/self/mem")
    refused(run, tmp_path / "r.jsonl", "data.unreadable_file", "r.jsonl", "Input/output error")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(run, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(GOOD)
    (tmp_path / "r.jsonl").chmod(0)
    refused(run, tmp_path / "r.jsonl", "data.unreadable_file", "r.jsonl", "Permission denied")


def test_a_file_name_that_is_no_unicode(run, tmp_path):
    (tmp_path / "set").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "set") + b"/train-\xff.jsonl")).write_bytes(
        jsonl(*pairs(), {"question": 3, "answer": "a"})
    )
    assert run(tmp_path / "set").record["dropped"] == {"not_text": 1}


@pytest.mark.parametrize(
    ("code", "named"),
    [
        *(("data.dataset_not_loaded", name) for name in
          ("you/none", "none", "mes-donn\u00e9es", "a--b", "a..b/c", "-x", "x" * 97, "you/" + "x" * 300)),
        *(("config.bad_path", name) for name in ("~nobody-here/r.jsonl", "/" + "x" * 300 + ".jsonl")),
        *(("data.file_not_found", name) for name in ("a b c", "https://example.org/r.jsonl", '{"question": "a"}')),
        ("config.invalid", ""),
    ],
)  # fmt: skip
def test_a_source_that_names_nothing(run, code, named, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(run, named, code, named[:99])


def test_a_hub_that_cannot_be_reached(run, monkeypatch):
    def nobody(*_, **__):
        raise httpx.ConnectError("no route to the Hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", nobody)
    monkeypatch.setattr(datasets, "load_dataset", nobody)
    refused(run, "you/rows", "data.dataset_not_loaded", "you/rows", "no route to the Hub")


# The command line.


def command(folder: Path, base: Path, source: Path) -> subprocess.CompletedProcess:
    """`python -m pipeline data`, which refuses."""
    (folder / "c.yaml").write_text(f"base: {{model: {base}}}\ndata: {{source: '{source}', validation_share: 0.2}}\n")
    done = subprocess.run(
        [sys.executable, "-m", "cli", "data", str(folder / "c.yaml"), "--run", str(folder / "cli")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "error: " in done.stderr and "\n next: " in done.stderr
    assert not (folder / "cli" / "data.json").exists()
    return done


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("r.jsonl", b"{\n" * 30 + GOOD, "r.jsonl:1-30; the first: Expecting"),
        ("r.parquet", GOOD, "r.parquet: invalid Parquet"),
        ("r.csv", csv(header="question,question"), "r.csv:1: a column name is repeated"),
        ("r.jsonl", jsonl(*pairs(30), *[{"question": "q", "answer": None}] * 10), "10 of 40 rows cannot be used"),
        ("r.txt", GOOD, "r.txt: unknown type of data file"),
    ],
    ids=["JSON", "Parquet", "CSV", "rows", "suffix"],
)
def test_the_command_says_it_in_two_lines_and_exits_with_2(tmp_path, base, file, content, expected):
    (tmp_path / file).write_bytes(content)
    assert expected in command(tmp_path, base, tmp_path / file).stderr


# Secrets and personal data. Every sample is put together here, so that none stands in this file.

ALL = string.ascii_letters + string.digits
LOWER = string.ascii_lowercase + string.digits
UPPER = string.ascii_uppercase + string.digits
HEX = "0123456789abcdef"


def run_of(letters: str, count: int) -> str:
    return "".join(random.Random(count).choices(letters, k=count))


def jwt() -> str:
    parts = (
        base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in ({"alg": "HS256"}, {"sub": "1"})
    )
    return ".".join((*parts, run_of(ALL, 43)))


BODY = "\n".join(run_of(ALL + "+/", 64)[i:] + run_of(ALL, 64)[:i] for i in range(5))
SECRETS = {
    "Hugging Face token": ["hf" + "_" + run_of(ALL, 34)],
    "Anthropic key": ["sk" + "-ant-" + "api03-" + run_of(ALL, 90)],
    "Google API key": ["AI" + "za" + run_of(ALL, 35)],
    "Weights & Biases key": ["wandb" + "_v1_" + run_of(ALL, 60)],
    "AWS Access Key": ["AK" + "IA" + run_of(UPPER, 16), "aws_secret" + "_key = '" + run_of(ALL, 40) + "'"],
    "Azure Storage Account access key": ["Account" + "Key=" + run_of(ALL, 86) + "=="],
    "Basic Auth Credentials": ["https:" + "//ann:" + "tiger9" + "@example.org/x", "redis:" + "//u:" + "pw1" + "@h"],
    "Discord Bot Token": ["M" + run_of(ALL, 23) + "." + run_of(ALL, 6) + "." + run_of(ALL, 27)],
    "GitHub Token": ["gh" + "p_" + run_of(ALL, 36)],
    "GitLab Token": ["gl" + "pat-" + run_of(ALL, 20), "GR13" + "48941" + run_of(ALL, 20), "gl" + "ptt-" + run_of(ALL, 40)],
    "JSON Web Token": [jwt()],
    "Mailchimp Access Key": [run_of(LOWER, 32) + "-us" + "12"],
    "NPM tokens": ["//npm.example.org/" + ":_authToken=" + "npm_" + run_of(ALL, 36)],
    "OpenAI Token": ["sk" + "-" + run_of(ALL, 20) + "T3Blbk" + "FJ" + run_of(ALL, 20), "sk" + "-proj-" + run_of(ALL, 60)],
    "Private Key": [
        f"-----BEGIN {kind}PRIVATE KEY-----\n{BODY}\n-----END {kind}PRIVATE KEY-----" for kind in ("", "RSA ", "OPENSSH ", "EC ")
    ],
    "PyPI Token": ["pypi" + "-AgEIcHlwaS5vcmc" + run_of(ALL, 80)],
    "SendGrid API Key": ["SG" + "." + run_of(ALL, 22) + "." + run_of(ALL, 43)],
    "Slack Token": ["xox" + "b-123456789012-" + run_of(LOWER, 24), "https://hooks.slack" + ".com/services/T0AB/B0CD/" + run_of(ALL, 24)],
    "Square OAuth Secret": ["sq0" + "csp-" + run_of(ALL, 43)],
    "Stripe Access Key": ["sk" + "_live_" + run_of(ALL, 24)],
    "Telegram Bot Token": ["110201543" + ":" + run_of(ALL, 35)],
    "Twilio API Key": ["S" + "K" + run_of(HEX, 32)],
}  # fmt: skip
EACH = [
    pytest.param(kind, sample, id=f"{kind} {i}") for kind, found in SECRETS.items() for i, sample in enumerate(found)
]


def core(sample: str) -> str:
    """The part of a sample that nobody may read: its longest run."""
    return max(sample.replace("@", " ").replace("'", " ").split(), key=len)[-12:]


def test_there_is_a_sample_of_every_kind_of_secret():
    assert {kind for kind, _ in personal_data.secret_patterns()} == SECRETS.keys()


@pytest.mark.parametrize(("kind", "sample"), EACH)
@pytest.mark.parametrize("around", ["{}", "my key is {}, keep it", '"{}"', "KEY={}", "line\n{}\nline"])
def test_every_kind_of_secret_is_found_through_the_gate(kind, sample, around):
    text = around.format(sample)
    assert personal_data.SECRET_HINT.search(text)
    assert personal_data.find_secrets(text)


@pytest.mark.parametrize(("kind", "sample"), EACH)
def test_a_masked_secret_is_gone(kind, sample):
    text = f"before {sample} after"
    found = personal_data.find_secrets(text)
    assert kind in {finding.kind for finding in found}
    hidden = personal_data.mask_findings(text, found)
    assert hidden.startswith("before ") and core(sample) not in hidden and not personal_data.find_secrets(hidden)


CARD, IBAN, SSN = "4111 1111 1111 " + "1111", "DE89 3704 0044 0532 " + "0130 00", "536-22-" + "8726"
PERSONAL = [
    ("ann.lee+x" + "@" + "ferries.example", "e-mail address"), ("a_b" + "@" + "mail.co.uk", "e-mail address"),
    (CARD, "card number"), (CARD.replace(" ", ""), "card number"), (CARD.replace(" ", "-"), "card number"),
    ("5500 0055 5555 " + "5559", "card number"), ("3782 822463 " + "10005", "card number"),
    (IBAN, "IBAN"), (IBAN.replace(" ", ""), "IBAN"), ("GB82 WEST 1234 5698 " + "7654 32", "IBAN"),
    (SSN, "social security number"), ("+49 30 " + "901820", "phone number"), ("(202) 456-" + "1111", "phone number"),
    ("202-456-" + "1111", "phone number"), ("+44 20 7946 " + "0958", "phone number"),
]  # fmt: skip


@pytest.mark.parametrize(("sample", "kind"), PERSONAL)
@pytest.mark.parametrize("around", ["{}", "it is {}.", "({})", "x: {}, y"])
def test_personal_data_is_found_and_masked(sample, kind, around):
    text = around.format(sample)
    found = personal_data.find_personal_data(text)
    assert [finding.kind for finding in found] == [kind]
    assert personal_data.mask_findings(text, found) == around.format(f"[{kind.upper()}]")


@pytest.mark.parametrize(
    "text",
    ["on 2024-07-26 at 12:30:59", "26/07/2024, 26.07.2024", "version 4.11.111.1111", "v1.2.3-rc.4", "order 4111111111111112",
     "card 4111 1111 1111 1112", "0000 0000 0000 0000", "4444444444444444", "555-010-9999",
     "123e4567-e89b-12d3-a456-426614174000", "d41d8cd98f00b204e9800998ecf8427e", "da39a3ee5e6b4b0d3255bfef95601890afd80709",
     "1,234,567.89 EUR", "$ 19.99", "12:30 - 14:45", "1700000000000", "192.168.100.200", "ISBN 978-3-16-148410-0", "666-12-3456",
     "000-12-3456", "DE89 3704 0044 0532 0130 01", "a @ b", "@ann", "user@localhost", "x@y.1", "3.14159265358979323846",
     "lat 52.520008, lon 13.404954", "0x1234567890abcdef", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"],
)  # fmt: skip
def test_numbers_of_daily_life_are_not_personal_data(text):
    assert personal_data.find_personal_data(text) == []


@pytest.mark.parametrize(
    "text",
    ["https://example.org/a/very/long/path/to/nowhere?x=1", "d41d8cd98f00b204e9800998ecf8427e", "antidisestablishmentarianism",
     "123e4567-e89b-12d3-a456-426614174000", "a_very_long_function_name_with_many_words", "/usr/lib/python3.11/site-packages",
     "the BEGIN of a PRIVATE story", "http://localhost:8080/x", "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="],
)  # fmt: skip
def test_long_words_are_not_secrets(text):
    assert personal_data.find_secrets(text) == []


def outputs(got: Made) -> str:
    """All that stands in train.parquet, heldout.jsonl, rejected.jsonl and the record."""
    texts = [(got.folder / name).read_text() for name in ("rejected.jsonl", "heldout.jsonl")]
    return "\n".join([*got.texts(), *texts, json.dumps(got.record)])


LEAKY = [sample for found in SECRETS.values() for sample in found[:1]]
TELLING = [sample for sample, _ in PERSONAL]


@pytest.mark.parametrize("action", ["report", "mask", "drop", "off"])
def test_secrets_and_personal_data_are_reported_masked_or_dropped(run, tmp_path, action):
    told = [*LEAKY, *TELLING]
    given = [
        {"question": f"{words(f's{i}')}?", "answer": f"{words(f't{i}')} {s} {words(f'u{i}')}"}
        for i, s in enumerate(told)
    ]
    (tmp_path / "r.jsonl").write_bytes(jsonl(*pairs(), *given))
    got = run(tmp_path / "r.jsonl", clean__secrets=action, clean__personal=action, base__max_seq_length=2048)
    assert got.record["rows"]["read"] == 40 + len(told)
    if action == "drop":
        assert got.record["dropped"] == {"secret": len(LEAKY), "personal": len(TELLING)}
    else:
        assert not got.record["dropped"]
    text = outputs(got)
    left = [sample for sample in told if core(sample) in text.replace("\\n", "\n")]
    assert left == ([] if action in ("mask", "drop") else told)
    assert bool(got.record["findings"]) == (action in ("report", "mask"))


SPOILED = [
    ("empty", lambda text: {"question": text, "answer": ""}),
    ("not_text", lambda text: {"question": text, "answer": 3}),
    ("wrong_format", lambda text: {"ask": text}),
    ("wrong_format", lambda text: {text: "a key"}),
    ("special_tokens", lambda text: {"question": text, "answer": "a<|im_end|>"}),
    ("too_long", lambda text: {"question": text, "answer": "word " * 300}),
    ("too_long", lambda text: {"question": text, "answer": "x" * 90_000}),
    ("duplicate_keys", lambda text: TWICE.decode().replace('"a"', f'"{text}"')),
    ("broken_encoding", lambda text: {"question": text, "answer": "caf\ufffd"}),
]


@pytest.mark.parametrize("action", ["mask", "drop"])
def test_nothing_secret_is_quoted_from_a_row_that_is_dropped_for_another_reason(run, tmp_path, action):
    told = ("hf" + "_" + run_of(ALL, 34), "ann" + "@" + "example.org")
    spoiled = [spoil(f"{words(f's{i}')} {' '.join(told)}") for i, (_, spoil) in enumerate(SPOILED)]
    (tmp_path / "r.jsonl").write_bytes(jsonl(*pairs(), *spoiled))
    got = run(tmp_path / "r.jsonl", clean__secrets=action, clean__personal=action)
    assert got.record["rows"]["dropped"] == len(SPOILED)
    assert not [note["where"].rpartition(":")[2] for note in got.dropped if any(t in json.dumps(note) for t in told)]


@pytest.mark.parametrize("action", ["mask", "drop"])
def test_nothing_secret_is_quoted_from_the_other_columns_of_a_dropped_row(run, tmp_path, action):
    token = "hf" + "_" + run_of(ALL, 34)
    more = {
        "blob": [token.encode()] * 40, "deep": [{"a": [{"b": token}]}] * 40,
        "map": pa.array([[("a", token)]] * 40, pa.map_(pa.string(), pa.string())),
    }  # fmt: skip
    (tmp_path / "r.parquet").write_bytes(table(columns(**more) | {"answer": [None, *columns()["answer"][1:]]}))
    got = run(tmp_path / "r.parquet", clean__secrets=action)
    assert got.record["dropped"] == {"empty": 1} and token not in json.dumps(got.rejected)


def test_no_piece_of_a_secret_is_quoted(run, tmp_path):
    token = "gh" + "p_" + run_of(ALL, 36)
    bad = {"messages": [f"my token, which nobody may see, is {token}", "b"]}
    (tmp_path / "r.jsonl").write_bytes(jsonl(*talks(), bad))
    got = run(tmp_path / "r.jsonl", clean__secrets="mask")
    assert got.record["dropped"] == {"wrong_format": 1} and token[:12] not in json.dumps(got.rejected)


def test_a_secret_across_no_word_border_of_a_unicode_text_is_found():
    token = "hf" + "_" + run_of(ALL, 34)
    for text in (f"\u300c{token}\u300d", f"\u2014{token}\u2014", f"\u2018{token}\u2019", f"key:{token}"):
        assert personal_data.find_secrets(text), text


def test_reading_does_not_depend_on_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("LC_ALL", "C")
    (tmp_path / "r.csv").write_bytes(csv("caf\u00e9?,na\u00efve"))
    part = sources.load_training_source(schema.Data(source=str(tmp_path / "r.csv"))).parts[0]
    assert list(part.read_rows())[-1] == (42, {"question": "caf\u00e9?", "answer": "na\u00efve"})
