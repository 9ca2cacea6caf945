"""Which row of a data file is another one, from one byte a row."""

import gzip
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import fingerprint

ROWS = [json.dumps({"question": f"What is {i}?", "answer": str(i)}) for i in range(10_000)]


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def test_the_same_file_does_not_differ(tmp_path):
    for count in (1, 5, 4096, 4097, 10_000):
        path = written(tmp_path, ROWS[:count])
        known = fingerprint.compute_fingerprint(path)
        assert fingerprint.find_differing_rows(path, known) == []
        assert len(known) <= 2 * fingerprint.MAX_BYTES + 8


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 499), text=st.text("abcdefgh", min_size=12, max_size=12))
def test_a_changed_row_is_shown_with_its_line(tmp_path_factory, place, text):
    folder = tmp_path_factory.mktemp("rows")
    known = fingerprint.compute_fingerprint(written(folder, ROWS[:500]))
    changed = json.dumps({"question": text})
    said = fingerprint.find_differing_rows(written(folder, [*ROWS[:place], changed, *ROWS[place + 1 : 500]]), known)
    # 1 of 256 texts has the byte of the row before it
    assert said == [] or said == [f"{folder}/rows.jsonl:{place + 1}: {changed}"]


def test_one_byte_shows_nearly_every_change(tmp_path):
    known = fingerprint.compute_fingerprint(written(tmp_path, ROWS[:50]))
    seen = sum(
        bool(fingerprint.find_differing_rows(written(tmp_path, [*ROWS[:20], f'{{"a": {n}}}', *ROWS[21:50]]), known))
        for n in range(200)
    )
    assert seen > 190


def test_rows_that_came_or_went(tmp_path):
    known = fingerprint.compute_fingerprint(written(tmp_path, ROWS[:50]))
    path = written(tmp_path, ROWS[:40])
    assert fingerprint.find_differing_rows(path, known) == [f"{path}: ends after 40 rows, 10 fewer than before"]
    path = written(tmp_path, ROWS[:60])
    assert fingerprint.find_differing_rows(path, known) == [f"{path}:51: {ROWS[50]}"]


def test_of_many_rows_a_group_is_shown(tmp_path):
    known = fingerprint.compute_fingerprint(written(tmp_path, ROWS))
    path = written(tmp_path, [*ROWS[:7000], "{}", *ROWS[7001:]])
    said = fingerprint.find_differing_rows(path, known)
    assert known.startswith("3:") and f"{path}:7001: {{}}" in said and len(said) == 3


def test_it_is_of_rows_not_of_bytes_and_tells_nothing_of_other_files(tmp_path):
    plain = fingerprint.compute_fingerprint(written(tmp_path, ROWS[:20]))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("".join(f"{row}  \n" for row in ROWS[:20]))
    assert fingerprint.compute_fingerprint(tmp_path / "rows.jsonl.gz") == plain
    (tmp_path / "a.jinja").write_text("{{ messages }}")
    assert fingerprint.compute_fingerprint(tmp_path / "a.jinja") == ""
    for nonsense in ("", "x", "0:00", "-1:00"):
        assert fingerprint.find_differing_rows(tmp_path / "rows.jsonl", nonsense) == []
