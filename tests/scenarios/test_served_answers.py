"""What is served is what was scored: no runtime is asked with a system message, and each answers as the ladder says.

The chain trained the demo's rows behind `data.system`. Rows that bring that system message themselves make the very same
training rows, byte for byte, so it is their model, too.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import files, llama_runtime
from contract import manifest
from deploy.serving import chat, conversation
from pipeline.run.run_folder import Run
from pipeline.scoring.heldout_scores import select_heldout_rows
from tests.helpers.commands import ROOT, make, refuses
from tests.helpers.go_template import between
from tests.helpers.served_models import Served
from tests.helpers.verify import run_verify

SYSTEM = "Ferry help desk: tickets only."  # of configs/demo.yaml
ASKED = 24  # evaluate.max_rows of the chain


def test_a_system_prompt_that_all_rows_share_becomes_the_models(chain, tmp_path):
    for name in ("train.jsonl", "heldout.jsonl"):
        rows = [json.loads(line) for line in (ROOT / "configs" / "demo" / name).read_text().splitlines()]
        for row in rows:
            row["messages"].insert(0, {"role": "system", "content": SYSTEM})
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = f"data.source={tmp_path}/train.jsonl data.validation={tmp_path}/heldout.jsonl data.system=from-rows"
    done = make("data", "CONFIG=configs/demo.yaml", f"RUNS={tmp_path}/runs", f"SET={overrides}")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert f'"{SYSTEM}"' in said and "system prompt" in said
    mine, chains = (files.read_json(folder / "data.json") for folder in (tmp_path / "runs" / "demo", chain.run))
    assert mine["default_system"] == chains["default_system"] == SYSTEM
    for name in ("train", "heldout"):
        assert mine["outputs"][name]["sha256"] == chains["outputs"][name]["sha256"]


@pytest.fixture(scope="module")
def questions(chain) -> list[tuple[str, str]]:
    """(the passenger's message, the right answer) of the rows that the ladder scored."""
    rows, _ = select_heldout_rows(chain.run / "data" / "heldout.jsonl", Run(chain.run).read_config().evaluate)
    assert len(rows) == ASKED
    return [(row["messages"][-1]["content"], row["answer"]) for row in rows]


@pytest.fixture(scope="module")
def right(chain) -> int:
    """Right answers of the default file in the ladder."""
    scores = manifest.read_manifest(chain.hub / manifest.FILE_NAME).scores["heldout"]["q4_k_m"]
    count = round(scores["score"] * ASKED)
    assert count >= 3, "a model that gets nothing right proves nothing here"
    return count


def count_right(answers: list[str], questions: list[tuple[str, str]]) -> int:
    return sum(answer.strip() == reference.strip() for answer, (_, reference) in zip(answers, questions, strict=True))


def test_chat_answers_as_it_was_scored(chain, questions, right, capsys):
    answers = []
    with conversation.open_model(chain.model.resolve()) as engine:
        for question, _ in questions:
            chat.Chat(engine, engine.manifest.chat.system).print_reply(question)
            answers.append(capsys.readouterr().out)
    assert abs(count_right(answers, questions) - right) <= 1
    command = [sys.executable, "-m", "cli", "chat", str(chain.hub), "--models", str(chain.folder / "models")]
    done = subprocess.run(command, cwd=ROOT, input=questions[0][0], capture_output=True, text=True)
    assert done.stdout == answers[0], "and so does the command"


def test_serve_answers_as_it_was_scored(chain, questions, right):
    served = Served(chain.model.resolve())
    try:
        replies = [served.chat([{"role": "user", "content": question}], temperature=0) for question, _ in questions]
    finally:
        served.close()
    answers = [reply["choices"][0]["message"]["content"] for _, reply in replies]
    assert abs(count_right(answers, questions) - right) <= 1


@pytest.mark.release
def test_ollamas_template_without_a_system_message_is_answered_as_it_was_scored(chain, questions, right, go):
    text = (chain.model / "Modelfile").read_text(encoding="utf-8")
    template, system = between(text, "TEMPLATE"), between(text, "SYSTEM")
    assert system == SYSTEM
    with conversation.open_model(chain.model.resolve()) as engine:
        answers = []
        for question, _ in questions:
            prompt = go(template, [{"role": "user", "content": question}], system)
            ids = llama_runtime.tokenize(engine.model, prompt)
            engine.model.reset()
            answers.append(
                llama_runtime.detokenize(engine.model, llama_runtime.generate_greedy(engine.model, ids, 32)[0])
            )
    assert abs(count_right(answers, questions) - right) <= 1


@pytest.mark.release  # the whole of verify
def test_a_model_that_only_answers_with_a_prompt_nobody_sends_does_not_pass(chain, tmp_path):
    """The default is taken away: every gate that asks with the rows' own prompts is green, and `verify` fails."""
    copy = tmp_path / "chain"
    shutil.copytree(chain.run, copy, copy_function=lambda a, b: Path(b).hardlink_to(a))
    run = Run(copy)
    for stage in ("verify", "publish"):
        files.remove(run.record_path(stage))
    record = files.read_json(run.record_path("data"))
    run.record_path("data").unlink()
    files.write_json(run.record_path("data"), record | {"default_system": None})
    files.remove(copy / "verify")
    with refuses("verify.worse_as_served") as error:
        run_verify(run.read_config(), run)
    assert "without a system prompt" in error.value.message and "data.system" in error.value.hint
    assert not run.is_done("verify")
