"""A file that llama.cpp here cannot load is refused before it is downloaded, by its header alone, whatever the header holds."""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import files, gguf_reader
from common.errors import UserError
from contract import manifest
from contract import published_model as sources
from contract.manifest import Artifact
from deploy.stages import header_check
from tests.helpers import repos
from tests.helpers.commands import refuses
from tests.helpers.gguf_bytes import LIES, NAMED, STRING, U32, array, pair, tensor, text, u32, whole


@pytest.fixture(scope="module")
def smollm(source) -> bytes:
    """The demo's base model: a header of 1.8 MB, then weights."""
    return source.read_bytes()


def start(content: bytes, end: int = 2 << 20) -> bytes:
    return content[:end]


def changed(content: bytes, old: bytes, new: bytes) -> bytes:
    """The same with another text of the same length."""
    assert len(old) == len(new) and text(old) in content[: 2 << 20]
    return content.replace(text(old), text(new))


def refused(code: str, head: bytes, size: int, name: str = "m.gguf") -> UserError:
    with refuses(code) as caught:
        header_check.refuse_unloadable_header(head, size, name)
    assert caught.value.message.isprintable() and len(caught.value.message) < 400
    return caught.value


# What llama.cpp says


def test_a_model_that_llama_cpp_knows_passes(smollm):
    header_check.refuse_unloadable_header(start(smollm), len(smollm), "m.gguf")


def test_an_unknown_architecture_is_named_with_what_helps(smollm):
    error = refused("gguf.unsupported_model", start(smollm.replace(b"llama", b"lamma")), len(smollm))
    assert error.message.startswith("m.gguf: llama-cpp-python ") and error.message.endswith("architecture lamma")
    assert "git pull && make deploy-env" in error.hint and "QUANT" in error.hint


def test_an_unknown_pre_tokenizer_is_named(smollm):
    error = refused("gguf.unsupported_model", start(changed(smollm, b"smollm", b"smoll2")), len(smollm))
    assert error.message.endswith("pre-tokenizer smoll2") and error.hint == header_check.UPDATE_HINT


def test_an_unknown_tokenizer_is_named(smollm):
    error = refused("gguf.unsupported_model", start(changed(smollm, b"gpt2", b"gpt9")), len(smollm))
    assert error.message.endswith(" tokenizer gpt9")


def test_a_missing_tensor_is_named(smollm):
    wrong = changed(smollm, b"blk.3.ffn_up.weight", b"blk.3.ffn_op.weight")
    assert "'blk.3.ffn_up.weight'" in refused("gguf.not_loadable", start(wrong), len(smollm)).message


def test_a_stranger_s_name_is_shown_without_control_characters(smollm):
    error = refused("header.bad_architecture", start(changed(smollm, b"llama", b"\x1b[2J\x07")), len(smollm))
    assert "'?[2J?'" in error.message


def test_an_environment_without_llama_cpp_refuses_nothing(smollm, monkeypatch):
    monkeypatch.setattr(header_check.importlib.util, "find_spec", lambda name: None)
    header_check.refuse_unloadable_header(start(smollm.replace(b"llama", b"lamma")), len(smollm), "m.gguf")


def test_an_environment_that_is_broken_is_not_the_repo_s_fault(smollm, monkeypatch):
    monkeypatch.setattr(header_check, "CHILD_CODE", "import no_such_module")
    assert "make deploy-env" in refused("environment.llama_cpp_broken", start(smollm), len(smollm)).hint


def test_a_file_of_100_gb_takes_no_disk_and_no_memory():
    head = whole(tensors=[tensor(b"a", (1 << 36,))], data=b"")
    with header_check.create_sparse_file(head, size := len(head) + (1 << 38)) as path:
        assert path.stat().st_size == size and path.stat().st_blocks * 512 < 1 << 20
    assert not path.exists()
    assert "m.gguf" in refused("header.unknown_key", head, size).message


@pytest.mark.parametrize("size", [(1 << 63) - 1, 1 << 80])
def test_a_size_that_no_disk_has_is_one_clear_error(smollm, size):
    assert str(size) in refused("disk.no_temporary_file", start(smollm), size).message


# Headers that are made to harm


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_never_reaches_llama_cpp(lie, monkeypatch):
    monkeypatch.setattr(header_check, "_list_load_errors", lambda *_: pytest.fail("llama.cpp was asked"))
    content, code, value = LIES[lie]
    assert value in refused(code, content, len(content)).message


def model(*pairs: bytes) -> bytes:
    return whole(pairs=[NAMED, *(pair(b"llama." + key, kind, value) for key, kind, value in pairs)])


DEADLY = {  # each ends llama.cpp's process, at an assertion
    "a million layers": model(
        (b"context_length", U32, u32(8)), (b"embedding_length", U32, u32(8)), (b"block_count", U32, u32(1_000_000))
    ),
    "more experts used than there are": model(
        (b"context_length", U32, u32(8)), (b"embedding_length", U32, u32(8)), (b"block_count", U32, u32(2)),
        (b"expert_used_count", U32, u32(7)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEADLY)
def test_a_header_that_ends_llama_cpp_ends_a_child_only(name, monkeypatch):
    """Our own check refuses these two before; without it llama.cpp still ends a child only."""
    monkeypatch.setattr(header_check.model_header, "refuse_impossible_header", lambda *_: None)
    error = refused("gguf.load_crashed", DEADLY[name], len(DEADLY[name]))
    assert "m.gguf (signal 6)" in error.message and error.hint == header_check.BAD_FILE_HINT


def test_a_child_that_hangs_is_ended(smollm, monkeypatch):
    monkeypatch.setattr(header_check, "CHILD_CODE", "import time; time.sleep(60)")
    monkeypatch.setattr(header_check, "LOAD_TIMEOUT", 0.5)
    assert "0.5 s" in refused("gguf.load_timeout", start(smollm), len(smollm)).message


def test_the_child_has_no_variables_of_the_parent(smollm, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = f"import os, json; open({str(tmp_path / 'env')!r}, 'w').write(json.dumps(dict(os.environ))); print('[]')"
    monkeypatch.setattr(header_check, "CHILD_CODE", code)
    header_check.refuse_unloadable_header(start(smollm), len(smollm), "m.gguf")
    assert "hf_secret" not in (tmp_path / "env").read_text()


def test_a_mutated_header_is_no_more_than_a_clear_error(smollm):
    rng, head, loads = random.Random(3407), start(smollm), 0
    for _ in range(12):
        mutated = bytearray(head)
        for _ in range(rng.randint(1, 3)):
            mutated[rng.randrange(3000)] = rng.randrange(256)
        with contextlib.suppress(UserError):
            header_check.refuse_unloadable_header(bytes(mutated), len(smollm), "m.gguf")
            loads += 1
    assert loads < 12


# How much is read of a source


class Counted:
    """A source of one file that counts what is read of it."""

    def __init__(self, content: bytes, block: int = 65_536):
        self.content, self.block, self.read, self.closed = content, block, 0, False

    @contextlib.contextmanager
    def open_blocks(self, artifact: Artifact, start: int):
        assert start == 0
        yield 0, self._blocks()
        self.closed = True

    def _blocks(self) -> Iterator[bytes]:
        for at in range(0, len(self.content), self.block):
            piece = self.content[at : at + self.block]
            self.read += len(piece)
            yield piece


def artifact(size: int, name: str = "m.gguf") -> Artifact:
    return Artifact(file=name, sha256="0" * 64, bytes=size, kind="gguf", quantization="q4_k_m", default=True)


def test_only_as_much_is_read_as_the_header_needs(smollm):
    found = Counted(smollm)
    head, header = header_check.read_header(found, artifact(len(smollm)))
    assert header.metadata["general.architecture"] == "llama" and len(header.tensors) == 272
    assert len(head) == found.read < 2.2e6 and found.closed


def test_a_header_longer_than_the_first_block_is_read_to_its_end(smollm, monkeypatch):
    monkeypatch.setattr(header_check, "FIRST_READ_BYTES", 50_000)
    found = Counted(smollm, block=1000)
    assert (
        header_check.read_header(found, artifact(len(smollm)))[1]
        == header_check.read_header(Counted(smollm), artifact(len(smollm)))[1]
    )
    assert found.read < 2 * 1_785_664


def test_a_header_cut_off_anywhere_is_not_taken_for_a_whole_one(tmp_path):
    content = whole()
    (tmp_path / "whole").write_bytes(content)
    want, taken = gguf_reader.read_header(tmp_path / "whole"), 0
    for end in range(len(content)):
        with header_check.create_sparse_file(content[:end], len(content)) as path, contextlib.suppress(UserError):
            assert gguf_reader.read_header(path) == want
            taken += 1
    assert taken, "zeros at its end may be missing"


def test_a_header_that_never_ends_is_read_to_the_limit_only(monkeypatch):
    monkeypatch.setattr(gguf_reader, "MAX_HEADER_BYTES", 4 << 20)
    endless = whole(n_pairs=7, tensors=[], data=b"") + text(b"x") + u32(STRING) + text(b"", 1 << 40)
    found = Counted(endless + bytes(16 << 20))
    with refuses("gguf.header_too_long") as caught:
        header_check.read_header(found, artifact(1 << 41))
    assert "4 MB" in caught.value.message
    assert found.read < 5 << 20


def test_a_source_that_ends_early_is_refused(smollm):
    with refuses("gguf.bad_length"):
        header_check.read_header(Counted(smollm[:100_000]), artifact(len(smollm)))


def test_a_small_file_is_not_asked_about(smollm):
    found = Counted(smollm.replace(b"llama", b"lamma"))
    header_check.refuse_unloadable_artifact(found, artifact(len(smollm)))
    assert found.read == 0


def test_a_large_one_is_refused_before_it_is_fetched(smollm, tmp_path):
    """In a folder hub: 40 GB that take no disk."""
    folder, size = repos.make(tmp_path / "hub"), 40 << 30
    head = whole(
        pairs=[pair(b"general.architecture", STRING, text(b"lamma")), pair(b"x", 9, array(STRING, 2, text(b"") * 2))],
        tensors=[tensor(b"a", (size // 4,))], data=b"",
    )  # fmt: skip
    path = folder / "tiny.q4_k_m.gguf"
    path.write_bytes(head)
    os.truncate(path, len(head) + size)
    found = sources.find_source(str(folder))
    wanted = artifact(path.stat().st_size, path.name)
    found.refuse_changed(wanted)
    with refuses("header.unknown_key") as caught:
        header_check.refuse_unloadable_artifact(found, wanted)
    assert "tiny.q4_k_m.gguf" in caught.value.message


@pytest.fixture
def hub_repo(smollm, tmp_path, online):
    """you/real: a folder hub with an unknown architecture, on the Hub."""
    folder = repos.make(tmp_path / "real")
    path: Path = folder / "tiny.q4_k_m.gguf"
    path.write_bytes(smollm.replace(b"llama", b"lamma"))
    repos.rewrite(folder, lambda value: value["artifacts"][0].update(sha256=files.sha256(path), bytes=len(smollm)))
    online.add("models/you/real", folder)
    return manifest.read_manifest(folder / manifest.FILE_NAME).default_artifact()


def test_from_the_hub_little_more_than_the_header_is_sent(hub_repo, online, monkeypatch):
    monkeypatch.setattr(header_check, "PROBE_FROM_BYTES", 1 << 20)
    with refuses("gguf.unsupported_model") as caught:
        header_check.refuse_unloadable_artifact(sources.find_source("you/real"), hub_repo)
    assert "architecture lamma" in caught.value.message
    assert online.sent["downloads"] < hub_repo.bytes / 4
