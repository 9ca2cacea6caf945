"""The data stage as a whole, on the demo's real tokenizer: what it keeps, drops, splits, counts and shows."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from pipeline.config import load, schema
from pipeline.data import chat_template, statistics
from pipeline.data import stage as data
from pipeline.run import training_rows
from pipeline.run.records import DataRecord
from pipeline.run.run_folder import Run
from tests.helpers.commands import ROOT, refuses

WORDS = [
    "harbour",
    "ferry",
    "ticket",
    "lighthouse",
    "captain",
    "engine",
    "island",
    "morning",
    "cabin",
    "vehicle",
    "storm",
    "anchor",
    "gangway",
    "deck",
]


@pytest.fixture
def run(base, tmp_path):
    """run(rows, validation=..., **settings) -> (record, folder); settings: section__key=value."""

    def made(given: list[dict], validation: list[dict] | None = None, name: str = "run", **settings):
        write(tmp_path / "rows.jsonl", given)
        tree = {
            "base": {"model": str(base), "max_seq_length": 128},
            "data": {"source": str(tmp_path / "rows.jsonl"), "validation_share": 0.2}, "clean": {},
        }  # fmt: skip
        if validation is not None:
            write(tmp_path / "held.jsonl", validation)
            tree["data"]["validation"] = str(tmp_path / "held.jsonl")
        for key, value in settings.items():
            section, key = key.split("__")
            tree.setdefault(section, {})[key] = value
        run, built = Run(tmp_path / name), load.build_config(tree, {}, Path("test.yaml"))
        run.freeze_config(built)
        record = data.run_data(built, run).model_dump()
        return record, tmp_path / name / "data"

    return made


def write(path: Path, given: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))


def pair(question: str, answer: str = "Yes.") -> dict:
    return {"question": question, "answer": answer}


def pairs(count: int) -> list[dict]:
    return [
        pair(f"{WORDS[i % 14]} {WORDS[i // 14 % 14]} number {i}?", f"Answer {i} about the {WORDS[i * 5 % 14]}.")
        for i in range(count)
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def learned(row: dict, tokenizer) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != training_rows.IGNORED_LABEL])


def test_no_row_is_lost(run):
    given = [*pairs(60), pairs(1)[0], pair(""), pair("Long?", "word " * 300), {"other": 1}]
    record, folder = run(given)
    assert record["rows"]["read"] == 64 == sum(record["rows"][key] for key in ("train", "heldout", "dropped"))
    assert record["dropped"] == {"empty": 1, "too_long": 1, "wrong_format": 1, "duplicate": 1}
    rejected = {Path(note["where"]).name: note for note in lines(folder / "rejected.jsonl")}
    assert [note["reason"] for note in rejected.values()] == ["empty", "too_long", "wrong_format", "duplicate"]
    assert list(rejected) == ["rows.jsonl:62", "rows.jsonl:63", "rows.jsonl:64", "rows.jsonl:61"]
    assert "equal to" in rejected["rows.jsonl:61"]["detail"] and "rows.jsonl:1" in rejected["rows.jsonl:61"]["detail"]
    assert '"other": 1' in rejected["rows.jsonl:64"]["row"]


def test_training_and_heldout_rows_hold_what_finetune_and_evaluate_read(run, tokenizer):
    record, folder = run(pairs(60))
    trained = training_rows.read_table(folder / "train.parquet").to_pylist()
    held = lines(folder / "heldout.jsonl")
    assert (len(trained), len(held)) == (record["rows"]["train"], record["rows"]["heldout"])
    for row in held:
        assert learned(row, tokenizer) == row["answer"] + tokenizer.eos_token
        assert tokenizer.decode(row["input_ids"][: row["prompt_tokens"]]) == row["prompt"]
    assert record["tokens"]["train"] == sum(len(row["input_ids"]) for row in trained)
    assert record["tokens"]["loss"] == sum(
        label != training_rows.IGNORED_LABEL for row in trained for label in row["labels"]
    )


def test_a_question_never_stands_on_both_sides(run):
    given = [pair(f"Question {i}?", f"Answer {k}.") for i in range(80) for k in range(3)]
    _, folder = run(given)
    held = {row["prompt"] for row in lines(folder / "heldout.jsonl")}
    assert 5 < len(held) < 35
    assert len(lines(folder / "heldout.jsonl")) == 3 * len(held)


def test_adding_rows_moves_no_old_row_across_the_split(run):
    _, before = run(pairs(100), name="before")
    _, after = run(pairs(160), name="after")
    old, new = ({row["prompt"] for row in lines(folder / "heldout.jsonl")} for folder in (before, after))
    assert 8 < len(old) < 35 and old < new
    assert {prompt for prompt in new - old if int(prompt.split("number ")[1].split("?")[0]) < 100} == set()


LONG = "The ferry leaves the northern pier at seven and takes on cars first, then lorries, then people on foot who hold a ticket for the day and a seat upstairs."


def test_near_duplicates_go_and_their_original_stays(run):
    given = [
        *pairs(60),
        pair("When?", LONG),
        pair("when", LONG.upper() + "!"),
        pair("Where?", LONG.replace("pier", "dock")),
    ]
    record, folder = run(given, clean__near_duplicates=0.7, clean__leakage=False)
    assert record["dropped"] == {"near_duplicate": 2}
    assert all(note["detail"].endswith("rows.jsonl:61") for note in lines(folder / "rejected.jsonl"))
    assert "dropped" not in run(given, name="off", clean__near_duplicates=False, clean__leakage=False)[0]["dropped"]


def test_training_rows_that_give_a_heldout_row_away_go(run):
    given = [*pairs(40), pair("When does it leave?", "At seven."), pair("Where?", LONG)]
    validation = [pair("when does  it leave?", "At eight."), pair("Whence?", LONG), *pairs(3)]
    record, folder = run(given, validation)
    assert record["dropped"] == {"leaked": 5} and record["rows"]["heldout"] == 5
    details = {Path(note["where"]).name: Path(note["detail"]).name for note in lines(folder / "rejected.jsonl")}
    assert details["rows.jsonl:41"] == "held.jsonl:1" and details["rows.jsonl:42"] == "held.jsonl:2"
    assert run(given, validation, name="off", clean__leakage=False)[0]["rows"]["train"] == 42


def test_a_given_validation_file_is_used_as_it_is(run):
    record, _ = run(pairs(30), [pair("Twice?", "Yes."), pair("Twice?", "Yes.")])
    assert record["rows"]["heldout"] == 2


def test_only_the_last_turn_is_trained_on_request(run, tokenizer):
    given = [
        {"messages": [{"role": role, "content": f"{role} {i} {k}"} for k, role in enumerate(("user", "assistant") * 2)]}
        for i in range(60)
    ]
    for labels, turns in (("all", ("assistant {} 1", "assistant {} 3")), ("last", ("assistant {} 3",))):
        _, folder = run(given, name=labels, data__labels=labels, clean__near_duplicates=False, clean__leakage=False)
        for row in training_rows.read_first_rows(folder / "train.parquet", 50):
            number = tokenizer.decode(row["input_ids"]).split("user ")[1].split()[0]
            assert learned(row, tokenizer) == "".join(turn.format(number) + tokenizer.eos_token for turn in turns)


def test_rows_are_cut_only_on_request_and_the_loss_of_their_end_is_said(run, tokenizer):
    given = [*pairs(60), pair("How much?", "many words " * 200)]
    record, folder = run(given, clean__too_long="truncate")
    assert record["truncated"]["rows"] == 1 and record["tokens"]["max"] == 128
    assert any("1 rows" in text and "lose their end token" in text for text in record["warnings"])
    assert not learned(max(training_rows.read_first_rows(folder / "train.parquet", 90), key=lambda row: len(row["input_ids"])), tokenizer).endswith(tokenizer.eos_token)  # fmt: skip


def test_plain_text_is_trained_whole_but_for_its_first_token(run, tokenizer):
    given = [{"text": f"  Log entry {i}: {WORDS[i % 14]} sighted.\n"} for i in range(80)]
    _, folder = run(given, data__template="completion", clean__near_duplicates=False, clean__leakage=False)
    row = training_rows.read_first_rows(folder / "train.parquet", 1)[0]
    assert row["labels"][0] == training_rows.IGNORED_LABEL and row["labels"][1:] == row["input_ids"][1:]
    assert tokenizer.decode(row["input_ids"]) == f"{given[0]['text']}{tokenizer.eos_token}"
    with refuses("data.plain_text") as error:
        run(given)
    assert "rows.jsonl" in error.value.message and "completion" in error.value.hint


def test_too_many_broken_rows_stop_the_stage_before_anything_is_paid(run, tmp_path):
    given = [*pairs(60), *([{"question": "q", "answer": None}] * 10), *([{"question": 3, "answer": "a"}] * 8)]
    with refuses("data.too_many_broken_rows") as caught:
        run(given)
    assert "18 of 78 rows" in caught.value.message
    assert "10 empty" in caught.value.message and "rows.jsonl:61-70; " in caught.value.message
    assert "the first: assistant is null" in caught.value.message
    assert not (tmp_path / "run" / "data.json").exists() and (tmp_path / "run" / "data" / "rejected.jsonl").exists()
    assert run(given, name="allowed", clean__max_rejected=0.3)[0]["rows"]["dropped"] == 18


def test_nothing_held_out_is_refused_with_the_cause(run):
    with refuses("data.empty_set") as error:
        run([pair("Always the same?", f"Answer {i}.") for i in range(40)], clean__near_duplicates=False)
    assert "of 40 (1 different questions" in error.value.message


def test_a_folder_of_files_with_its_own_validation(run, base, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train-00000-of-00002.jsonl", pairs(30)[:15])
    (folder / "train-00001-of-00002.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(r) + "\n" for r in pairs(30)[15:]).encode())
    )
    (folder / "validation.csv").write_text("question,answer\nWho steers?,The captain.\n")
    record, out = run([], data__source=str(folder))
    assert (record["rows"]["train"], record["rows"]["heldout"]) == (30, 1)
    assert len(record["formats"]) == len(record["inputs"]) == 3
    assert lines(out / "heldout.jsonl")[0]["answer"] == "The captain."


def test_columns_and_slices(run):
    given = [{"ask": row["question"], "gold": row["answer"], "id": i} for i, row in enumerate(pairs(100))]
    record, _ = run(given, data__columns={"question": "ask", "answer": "gold"}, data__split="train[10:70]")
    assert record["rows"]["read"] == 60
    assert "60 of the first 60 rows have ask as question, gold as answer; not used: id" in record["formats"][0]


def test_a_system_prompt_the_template_drops_is_refused(run, base):
    with refuses("data.too_many_broken_rows") as error:
        run(pairs(60), data__template="mistral", data__system="Be kind.")
    assert "60 system_ignored" in error.value.message and "Be kind." in error.value.message


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [([5], 8, 1), ([4, 4, 4], 8, 2), ([3, 3, 5, 5], 8, 2), ([1] * 17, 8, 3), ([8] * 4, 8, 4)],
)
def test_packing(lengths, limit, expected):
    import numpy

    assert statistics.count_packs(numpy.array(sorted(lengths)), limit) == expected


def test_steps_are_the_trainers():
    tune = schema.Finetune(train_batch_size=8, num_train_epochs=2)
    assert statistics.count_steps(tune, 17) == 5, "34 rows, eight a step: steps go on over the end of an epoch"
    assert statistics.count_steps(tune.model_copy(update={"max_steps": 7}), 17) == 7
    assert statistics.count_steps(tune.model_copy(update={"train_batch_size": "auto"}), 17) is None


def test_the_table_shows_every_number(run):
    record, _ = run([*pairs(60), pair("")])
    table = statistics.format_record(DataRecord.model_validate(record))
    for text in (
        "61 rows",
        "1 empty",
        "held out",
        "carry loss",
        "p95",
        "sequences of 128 tokens",
        "optimizer steps",
        "█",
    ):
        assert text in table


def test_preview_shows_what_carries_loss(base, tmp_path):
    from cli.main import ferry

    write(tmp_path / "rows.jsonl", pairs(60))
    (tmp_path / "c.yaml").write_text(
        f"base: {{model: {base}}}\ndata: {{source: {tmp_path}/rows.jsonl, validation_share: 0.2}}\n"
    )
    said = CliRunner().invoke(
        ferry,
        ["preview", str(tmp_path / "c.yaml"), "--run", str(tmp_path / "run"), "--rows", "2"],
        catch_exceptions=False,
    )
    assert said.exit_code == 0 and said.output.count("--- row") == 2
    assert "<|im_start|>assistant\n»Answer 2 about the storm.<|im_end|>«" in said.output
    assert not (tmp_path / "run" / "data.json").exists()


def test_alpaca_prompts_with_and_without_input(source):
    from datetime import date

    from pipeline.base_model import restore_gguf
    from pipeline.data import row_formats

    tokenizer, chat, _ = chat_template.load_chat_tokenizer(
        restore_gguf.prepare_tokenizer(source), "alpaca", date(2024, 7, 26)
    )
    found = row_formats.RowSchema("alpaca", {"instruction": "instruction", "input": "input", "output": "output"}, "")
    plain = row_formats.build_conversation({"instruction": "Add.", "output": "5"}, found)
    assert chat.render(plain[:1], add_generation_prompt=True) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    both = row_formats.build_conversation({"instruction": "Add.", "input": "2 3", "output": "5"}, found)
    assert chat.render(both[:1], add_generation_prompt=True) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n"
    )
    assert chat.render(both).endswith(f"### Response:\n5{tokenizer.eos_token}\n\n")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_pool_leaves_no_process_and_no_traceback(base, tmp_path, kind):
    write(tmp_path / "rows.jsonl", pairs(40_000))
    (tmp_path / "c.yaml").write_text(f"base: {{model: {base}}}\ndata: {{source: {tmp_path}/rows.jsonl}}\n")
    command = [
        sys.executable,
        "-m",
        "cli",
        "data",
        str(tmp_path / "c.yaml"),
        "--run",
        str(tmp_path / "run"),
        "--processes",
        "2",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    spooled = tmp_path / "run" / "data" / "spool" / "rows.arrow"
    until(lambda: spooled.is_file() and spooled.stat().st_size > 300_000)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 3, "the stage's own process, and its pool"
    if kind == signal.SIGINT:  # as a terminal sends it: to the whole group
        os.killpg(process.pid, kind)
        assert (
            "stopped; the same command resumes from here" in (said := process.communicate()[1])
            and "Traceback" not in said
        )
        assert process.returncode == 130
    else:
        process.kill()
        process.wait()
    until(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers))
    assert not (tmp_path / "run" / "data.json").exists()


def until(condition, seconds: int = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
