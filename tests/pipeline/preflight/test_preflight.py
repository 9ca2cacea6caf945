"""Before the first GPU second: what would fail at the end is said at the beginning."""

import json
import shutil

import pytest

from tests.helpers import repos
from tests.helpers.commands import ferry, make
from tests.helpers.hub import Fault

GGUF_REPO = "models/you/run-GGUF"


@pytest.fixture
def world(online, base, tmp_path):
    """A base model and a data set on the Hub, and the command that asks about them."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"w" * 2_000_000)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    online.add("models/you/base", tmp_path / "base")
    online.add("datasets/you/rows", tmp_path / "rows")
    settings = {"base": {"model": "you/base"}, "data": {"source": "you/rows"}, "publish": {"repo": "{user}/{run}-GGUF"}}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))

    def ask(*overrides: str, **environment: str):
        sets = [word for override in overrides for word in ("--set", override)]
        return ferry("preflight", tmp_path / "config.yaml", "--run", tmp_path / "runs" / "run", *sets, **environment)

    return ask


def test_all_is_well(world, online):
    done = world()
    assert done.returncode == 0, done.stderr
    assert (
        "goes to you/run-GGUF on the Hub (new, private), as you" in done.stdout and "GB of disk needed" in done.stdout
    )
    assert online.refs(GGUF_REPO) is None, "a preflight makes nothing"
    assert not any(asked.startswith(("POST", "PUT", "DELETE")) for asked in online.asked)


FINE = {"hf_fine": {"name": "you", "role": "fineGrained", "fineGrained": {"scoped": [
    {"entity": {"type": "user", "name": "other"}, "permissions": ["repo.write"]}]}}}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "environment", "expected"),
    [
        ((), {"HF_TOKEN": ""}, "no Hub token"),
        ((), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
        ((), {"HF_ENDPOINT": "huggingface.co"}, "is not the address of a Hub"),
        ((), {"HF_TOKEN": "hf_wrong"}, "does not accept this token"),
        ((), {"HF_TOKEN": "hf_reader"}, "may only read"),
        ((), {"HF_TOKEN": "hf_fine"}, "fine-grained; it may write to other"),
        (("publish.repo=other/x",), {}, "you may not write to other's repos"),
        (("publish.repo=you/strange",), {}, "was not created by Ferry: it holds thesis.pdf"),
        (("publish.repo=you/open",), {}, "is public, and publish.private is true"),
        (("publish.repo=you/a b",), {}, "not a Hub id"),
        (("publish.repo=you/own", "publish.tag=v1"), {}, "already has a tag v1"),
        (("publish.repo=you/tiny",), {}, "holds the model tiny"),
        (("base.model=you/gone",), {}, "does not exist on the Hub"),
        (("base.model=acme/gated",), {}, "gated"),
        (("base.model=you/nd",), {}, "cc-by-nd-4.0, which forbids"),
        (("base.model=you/unsaid", "publish.private=false"), {}, "no licence, and Ferry does not know"),
        (("base.revision=v9",), {}, "no such revision"),
        (("data.source=you/gone",), {}, "does not exist on the Hub"),
        (("data.source=acme/gatedrows",), {}, "gated"),
        (("data.revision=v9",), {}, "no such revision"),
        (("base.model=you/huge",), {}, "GB of disk for all stages"),
    ],
)
def test_what_would_fail_later_is_one_clear_error_now(world, online, tmp_path, overrides, environment, expected):
    online.users |= FINE
    for name, licence in (("nd", "cc-by-nd-4.0"), ("unsaid", None), ("gated", "apache-2.0"), ("huge", "mit")):
        folder = shutil.copytree(tmp_path / "base", tmp_path / name)
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "# nothing\n")
        if name == "huge":
            with (folder / "model.safetensors").open("wb") as file:
                file.truncate(2000)
        online.add(f"models/{'acme' if name == 'gated' else 'you'}/{name}", folder)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.pdf").write_bytes(b"x")
    online.add("models/you/strange", tmp_path / "strange", private=True)
    online.add("models/you/open", tmp_path / "rows", private=False)
    online.add("datasets/acme/gatedrows", tmp_path / "rows")
    online.users["hf_writer"] = {"name": "you", "role": "write"}
    online.gated |= {"models/acme/gated", "datasets/acme/gatedrows"}
    online.add("models/you/tiny", repos.make(tmp_path / "tiny", 4096), private=True)
    online.add("models/you/own", repos.make(tmp_path / "own", 4096, name="run"), private=True)
    online.write_refs("models/you/own", online.refs("models/you/own") | {"tags": {"v1": "0" * 40}})
    swell(online)
    done = world(*overrides, **environment)
    assert done.returncode == 2 and expected in done.stderr and "next:" in done.stderr, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not any(token in done.stderr for token in online.users)


def swell(online) -> None:
    """Announce a file of 40 TB without having one."""
    for path in online.folder.rglob("*.json"):
        text = path.read_text()
        if '"size": 2000,' in text or '"size": 2000}' in text:
            path.write_text(text.replace('"size": 2000', '"size": 40000000000000'))


def test_a_folder_hub_and_local_files_ask_nobody(online, tmp_path):
    done = ferry(
        "preflight",
        "configs/demo.yaml",
        "--run",
        tmp_path / "runs" / "demo",
        "--set",
        f"publish.repo={tmp_path}/hub",
    )
    assert done.returncode == 0 and "goes to the folder" in done.stdout and not online.asked


def test_train_asks_before_anything_is_made(online, tmp_path):
    online.faults.append(Fault("GET /api/whoami", status=401, times=-1))
    done = make("train", "CONFIG=configs/demo.yaml", f"RUNS={tmp_path}", "SET=publish.repo={user}/x")
    assert done.returncode == 2 and "does not accept this token" in done.stderr
    assert not list(tmp_path.glob("*/data*"))
