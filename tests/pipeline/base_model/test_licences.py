"""What a base model's licence asks, and what is found of it beside the model."""

from pathlib import Path

import pytest

from pipeline.base_model import licences
from tests.helpers.commands import refuses
from tests.helpers.hub_card import LICENSES


def test_every_identifier_of_the_hub_stands_in_the_table_and_no_other():
    assert sorted(licences.TERMS_BY_LICENCE) == sorted(LICENSES)
    counted = [name for _, names in licences.FAMILIES for name in names.split()]
    assert len(counted) == len(set(counted)), "an identifier stands in two families"


@pytest.mark.parametrize(
    ("name", "derivatives", "copy", "commercial"),
    [
        *((name, True, True, True) for name in ("apache-2.0", "mit", "bsd-3-clause", "isc", "mpl-2.0", "gpl-3.0", "lgpl", "agpl-3.0")),
        *((name, True, False, True) for name in ("cc0-1.0", "unlicense", "wtfpl", "cc-by-4.0", "cc-by-sa-4.0")),
        *((name, True, False, False) for name in ("cc-by-nc-4.0", "cc-by-nc-sa-3.0")),
        ("cc-by-nd-4.0", False, False, True),
        *((name, False, False, False) for name in ("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0")),
        *((name, True, True, True) for name in ("openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m")),
        *((name, True, True, True) for name in ("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma")),
        *((name, True, True, False) for name in ("apple-amlr", "fair-noncommercial-research-license")),
        ("deepfloyd-if-license", None, False, False),
        *((name, None, False, True) for name in ("other", "unknown", "cc", "my-own-licence", "", None)),
    ],
)  # fmt: skip
def test_what_each_family_allows_and_asks(name, derivatives, copy, commercial):
    asked = licences.find_terms(name)
    assert (asked.allows_derivatives, asked.requires_copy, asked.allows_commercial_use) == (
        derivatives,
        copy,
        commercial,
    )


@pytest.mark.parametrize(
    ("name", "notice", "credit", "prefix"),
    [
        ("llama2", "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta", None, None),
        ("llama3", "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright ©", "Built with Meta Llama 3", "Llama 3"),
        ("llama3.1", "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta", "Built with Llama", "Llama"),
        ("llama3.2", "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta", "Built with Llama", "Llama"),
        ("llama3.3", "Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © Meta", "Built with Llama", "Llama"),
        ("llama4", "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta", "Built with Llama", "Llama"),
        ("gemma", "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms", None, None),
    ],
)  # fmt: skip
def test_the_words_that_a_licence_demands(name, notice, credit, prefix):
    asked = licences.find_terms(name.upper())
    assert (asked.notice.startswith(notice), asked.credit, asked.name_prefix) == (True, credit, prefix)
    assert asked.use_restrictions and asked.link.startswith("https://")


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_no_derivatives_goes_nowhere_but_a_folder(private, named):
    with refuses("licence.no_derivatives") as error:
        licences.review_licence("CC-BY-ND-4.0", "a/b", private, named)
    assert "CC-BY-ND-4.0" in error.value.message and "publish.repo=./hub/{run}" in error.value.hint


@pytest.mark.parametrize("license", [None, "other", "unknown", "my-own"])
def test_an_unknown_licence_is_the_users_to_name_before_a_repo_is_public(license):
    with refuses("licence.unknown") as error:
        licences.review_licence(license, "a/b", is_private=False, is_licence_named=False)
    assert "a/b" in error.value.message and "base.license" in error.value.hint and "./hub/{run}" in error.value.hint
    for private, named in ((True, False), (True, True), (False, True)):
        (note,) = licences.review_licence(license, "a/b", private, named)
        assert "check whether" in note and (license or "no licence") in note


@pytest.mark.parametrize(
    ("license", "name", "copies", "expected"),
    [
        ("apache-2.0", None, 1, []),
        ("apache-2.0", None, 0, ["copy"]),
        ("cc0-1.0", None, 0, []),
        ("cc-by-nc-4.0", None, 0, ["commercial"]),
        ("llama3.1", "you/Llama-3.1-tickets", 1, ["binds"]),
        ("llama3.1", "you/llama_tickets", 1, ["binds"]),
        ("llama3.1", "llama/tickets", 1, ["begins with Llama", "binds"]),
        ("llama3.1", None, 0, ["begins with Llama", "copy", "binds"]),
        ("llama3", "you/Llama-tickets", 1, ["begins with Llama 3", "binds"]),
        ("llama3", "you/Llama3-tickets", 1, ["binds"]),
        ("llama2", "you/tickets", 1, ["binds"]),
        ("gemma", "you/tickets", 1, ["binds"]),
    ],
)
def test_notes_say_what_is_missing_and_nothing_else(license, name, copies, expected):
    for private in (True, False):
        notes = licences.review_licence(license, "a/b", private, is_licence_named=False, repo=name, copy_count=copies)
        assert len(notes) == len(expected), notes
        assert all(word in note for word, note in zip(expected, notes, strict=True)), notes


def write(path: Path, content: bytes = b"text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(base: Path) -> list[str]:
    return [path.name for path in licences.find_licence_files(base)]


def test_licence_files_of_a_model_folder(tmp_path):
    wanted = ("COPYING", "LICENSE", "LICENSE-MODEL.md", "Notice.txt", "USE_POLICY.md", "licence.txt")
    for name in (*wanted, "README.md", "config.json", "MY_LICENSE", "LICENSE (1).txt"):
        write(tmp_path / name)
    write(tmp_path / "LICENSE.bin", bytes(licences.MAX_BYTES))
    write(tmp_path / "licenses" / "LICENSE.other")
    (tmp_path / "NOTICE.gone").symlink_to(tmp_path / "nowhere")
    assert names(tmp_path) == list(wanted)


def test_licence_files_of_a_snapshot_keep_their_names(tmp_path):
    blob = write(tmp_path / "blobs" / ("ab" * 20))
    snapshot = tmp_path / "snapshots" / ("cd" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to(blob)
    (found,) = licences.find_licence_files(snapshot)
    assert (found.name, found.read_bytes()) == ("LICENSE", b"text")


def test_licence_files_of_a_gguf_in_a_wheel(tmp_path):
    gguf = write(tmp_path / "llm_x" / "data" / "x.gguf")
    info = tmp_path / "llm_x-1.0.dist-info"
    write(info / "LICENSE", b"outer")
    write(info / "METADATA")
    write(info / "licenses" / "LICENSE", b"inner")
    write(info / "licenses" / "NOTICE")
    assert [path.relative_to(info).as_posix() for path in licences.find_licence_files(gguf)] == [
        "LICENSE",
        "licenses/NOTICE",
    ]


def test_licence_files_of_a_gguf_among_other_packages(tmp_path):
    gguf = write(tmp_path / "llm_x" / "x.gguf")
    write(tmp_path / "llm_x-1.0.dist-info" / "RECORD", b"llm_x/x.gguf,sha256=abc,4\n")
    write(tmp_path / "llm_x-1.0.dist-info" / "LICENSE", b"ours")
    write(tmp_path / "other-1.0.dist-info" / "RECORD", b"other/__init__.py,,\n")
    write(tmp_path / "other-1.0.dist-info" / "LICENSE", b"theirs")
    assert [path.read_bytes() for path in licences.find_licence_files(gguf)] == [b"ours"]


def test_licence_files_beside_a_gguf(tmp_path, monkeypatch):
    gguf = write(tmp_path / "a" / "b" / "c" / "d" / "x.gguf")
    assert names(gguf) == []
    write(gguf.parent / "LICENSE")
    assert names(gguf) == ["LICENSE"]
    monkeypatch.chdir(gguf.parent)
    assert names(Path("x.gguf")) == ["LICENSE"]


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: gemma\n---\n# x", {"license": "gemma"}),
        ("\ufeff---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://x.org/L\n---\n",
         {"license": "other", "license_name": "qwen-research", "license_link": "https://x.org/L"}),
        ("---\nlicense: [mit]\n---\n", {"license": "mit"}),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", {"license": "other", "license_name": "mit and/or apache-2.0"}),
        ("---\nlicense: []\n---\n", {}),
        ("---\nlicense: 3\nlicense_name: null\n---\n", {}),
        ("---\nlicense: {a: b}\n---\n", {}),
        ("---\ntags: [x]\n---\n", {}),
        ("---\nlicense: mit\nmodel-index:\n- name: x\n---\n", {"license": "mit"}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\n1: 2\n---\n", {}),
        ("---\nself: x\nlicense: mit\n---\n", {}),
        ("---\ntags: 7\nlicense: mit\n---\n", {}),
        ("---\nx: " + "[" * 9000 + "\n---\n", {}),
        ("license: mit\n", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_what_a_card_says_of_its_licence(tmp_path, card, expected, capfd):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert licences.read_card_licence(tmp_path) == expected
    assert not capfd.readouterr().out


def test_a_card_that_is_not_there_or_no_text_says_nothing(tmp_path):
    assert licences.read_card_licence(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert licences.read_card_licence(tmp_path) == {}
