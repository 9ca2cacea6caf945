"""The cloud side's doctor names what a GPU machine has and lacks, each lack with its cure, and ends with 2 for a fault only."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.main import main
from common import checks
from common.checks import Check
from pipeline.plan import gpu_table as table
from pipeline.preflight import doctor, gpu_checks, gpu_work, library_checks
from pipeline.toolchain import machine
from pipeline.toolchain.machine import CommandResult, NvidiaStatus, TrainLocation
from tests.helpers.commands import MAKE, ROOT, ferry, typed_environment

UUID = "GPU-5f8e0a3c-52b1-4b0c-9d0e-6c1f2a7b8c9{}"
BANNER = """\
Thu Nov 26 09:46:16 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver:<22} Driver Version: {driver:<14} CUDA Version: {cuda:<8} |
|-----------------------------------------+------------------------+----------------------+
"""
NEWER = "| NVIDIA-SMI 610.57.04              KMD Version: 610.57.04     CUDA UMD Version: 13.3     |\n"
NEW, OLD = {"driver": "580.95.05", "cuda": "13.0"}, {"driver": "535.183.01", "cuda": "12.2"}
# name, compute capability, memory in MiB: total and what the driver keeps
H100 = ("NVIDIA H100 80GB HBM3", "9.0", 81559, 480)
A100 = ("NVIDIA A100-SXM4-80GB", "8.0", 81920, 610)
T4 = ("Tesla T4", "7.5", 15360, 430)
V100 = ("Tesla V100-SXM2-16GB", "7.0", 16384, 230)
P100 = ("Tesla P100-PCIE-16GB", "6.0", 16384, 220)
ADA = ("NVIDIA RTX 4000 Ada, Generation", "8.9", 20475, 420)
# nvidia-smi's answers in its own format: fields with `, ` between them, in the order asked for; without units.
SMI = """\
import json, sys, time
told = json.loads({told!r})
time.sleep(told["seconds"])
if told["code"]:
    print(told["banner"])
    sys.exit(told["code"])
words = sys.argv[1:]
if not words:
    print(told["banner"])
    sys.exit(0)
assert words[1:] == ["--format=csv,noheader,nounits"], words
what, _, fields = words[0].partition("=")
for row in told[what]:
    for field in fields.split(","):
        if field not in row:
            print(f'Field "{{field}}" is not a valid field to query.')
            sys.exit(2)
    print(", ".join(str(row[field]) for field in fields.split(",")))
"""
LINES = {
    "unsloth": {"version": "2026.10.9"},
    "torch": {"version": "2.13.0+cu130", "cuda": "13.0", "cards": 1, "why": ""},
    "triton": {"version": "3.7.1", "right": True},
    "bitsandbytes": {"version": "0.50.2", "right": True, "device": "cuda"},
    "attention": {"torch": "2.13.0+cu130", "varlen": True, "loaded": True, "chosen": "sdpa", "capability": 9.0},
}
HERE, SYSTEM = os.environ["PATH"], "/usr/bin:/bin"
VM, POD = (
    TrainLocation("native", "no docker here that answers"),
    TrainLocation("native", "this machine is itself a container"),
)
ONE = NvidiaStatus(
    "ok", "", "580.95.05", (13, 0), (machine.Gpu("0", "GPU-0", "NVIDIA H100", 9.0, 80 << 30, 0, 80 << 30),)
)
NONE = NvidiaStatus("absent")


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """A PATH on which there is nothing but a C compiler."""
    (tmp_path / "bin").mkdir()
    program(tmp_path, "gcc", "print('gcc (Debian 12.2.0-14) 12.2.0')")
    for name in ("CC", "CUDA_VISIBLE_DEVICES", "FERRY_DEVICE", "FERRY_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def program(folder: Path, name: str, code: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)


def smi(folder: Path, *models: tuple, driver=NEW, users=(), banner=BANNER, code=0, seconds=0, used=0) -> None:
    """An nvidia-smi on PATH. users: (number of the card, pid, MiB, name)."""
    cards = [
        {
            "index": i, "uuid": UUID.format(i), "name": name, "compute_cap": capability, "memory.total": total,
            "memory.used": used, "memory.free": total - kept - used, "driver_version": driver["driver"],
        } for i, (name, capability, total, kept) in enumerate(models)
    ]  # fmt: skip
    apps = [
        {"gpu_uuid": UUID.format(i), "pid": pid, "used_memory": size, "process_name": name}
        for i, pid, size, name in users
    ]
    told = {
        "banner": banner.format(**driver),
        "code": code,
        "seconds": seconds,
        "--query-gpu": cards,
        "--query-compute-apps": apps,
    }
    program(folder, "nvidia-smi", SMI.format(told=json.dumps(told)))


def loading(lines: dict[str, dict], state: str = "ok", err: str = "") -> CommandResult:
    """What pipeline/preflight/gpu_work.py says."""
    return CommandResult(state, "".join(json.dumps({"step": name, **line}) + "\n" for name, line in lines.items()), err)


def of(folder: Path, said: CommandResult | None = None, patience: float = 20) -> dict[str, Check]:
    """The doctor's page; the libraries are a stand-in, for they take 7 s."""

    def ask(command, _=None):
        return (said or loading(LINES)) if gpu_work.__name__ in command else machine.run_command(command, patience)

    found = doctor.run_doctor(folder / "runs", ask)
    sound(found)
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def sound(found: list[Check]) -> None:
    for check in found:
        assert check.state in ("ok", "lack", "fault") and check.text, check
        assert bool(check.cure) == (check.state != "ok"), f"a cure for every lack, none for what is well: {check}"


# Driver and cards


def test_an_h100_with_a_new_driver_is_well(tmp_path):
    smi(tmp_path, H100)
    found = of(tmp_path)
    assert {
        found[name].state for name in ("driver", "GPU 0", "memory 0", "price 0", "torch", "triton", "attention")
    } == {"ok"}
    assert found["driver"].text == "580.95.05 runs CUDA 13.0; torch is built for CUDA 13.0"
    assert found["GPU 0"].text == "NVIDIA H100 80GB HBM3, compute capability 9.0: bf16"
    assert found["memory 0"].text == "85 GB of 86 GB free"
    assert found["price 0"].text.startswith("about ") and "H100 in configs/gpus.csv" in found["price 0"].text
    assert not (tmp_path / "runs").exists(), "it changes nothing"


def test_an_old_driver_is_a_fault_and_its_cure_depends_on_whose_it_is(tmp_path):
    smi(tmp_path, H100, driver=OLD)
    found = machine.query_nvidia()
    for where, cure in ((VM, "apt-get install nvidia-driver-580"), (POD, "rent a machine with driver 580")):
        check = gpu_checks.check_driver(found, where)
        assert (
            check.state == "fault" and check.text.startswith("535.183.01 runs CUDA 12.2 at most") and cure in check.cure
        )


def test_the_driver_counts_by_the_cuda_it_runs(tmp_path):
    smi(tmp_path, H100, driver=OLD | {"cuda": "13.0"})
    assert of(tmp_path)["driver"].state == "ok", "NVIDIA's compatibility package"
    for driver, state in (("535.183.01", "fault"), ("580.95.05", "ok")):
        smi(tmp_path, H100, driver={"driver": driver, "cuda": "N/A"})
        assert of(tmp_path)["driver"].state == state
    smi(tmp_path, H100, banner=NEWER)
    assert of(tmp_path)["driver"].text.startswith("610.57.04 runs CUDA 13.3;")


def test_a_driver_too_old_for_the_question_is_called_old(tmp_path):
    smi(tmp_path, H100, driver={"driver": "450.80.02", "cuda": "11.0"})
    path = tmp_path / "bin" / "nvidia-smi"
    path.write_text(path.read_text().replace("compute_cap", "unknown_then"))
    found = of(tmp_path)
    assert found["driver"].state == "fault" and found["driver"].text.startswith("450.80.02 runs CUDA 11.0 at most")


def test_a_t4_computes_in_fp16_and_says_what_that_means(tmp_path):
    smi(tmp_path, T4)
    found = of(tmp_path)["GPU 0"]
    assert found.state == "ok" and "7.5: no bf16, so fp16. Gemma models are refused" in found.text


@pytest.mark.parametrize("model", [P100, V100])
def test_a_card_that_cuda_13_does_not_compile_for_is_a_fault(model, tmp_path):
    smi(tmp_path, model)
    found = of(tmp_path)["GPU 0"]
    assert (
        found.state == "fault" and f"compute capability {model[1]} " in found.text and "configs/gpus.csv" in found.cure
    )


def test_the_limits_are_the_set_ups():
    source = (ROOT / "setup" / "packages.py").read_text()
    assert f"CUDA = {gpu_checks.CUDA} " in source and f"(driver {gpu_checks.DRIVER})" in source
    assert f"OLDEST_CAPABILITY = {gpu_checks.gpu_table.MIN_CAPABILITY * 10:.0f} " in source


def test_no_card_is_a_lack_and_the_demo_works(tmp_path):
    found = of(tmp_path, loading(LINES | {"torch": {"version": "2.13.0+cpu", "cuda": None, "cards": 0, "why": ""}}))
    assert found["driver"].state == "lack" and "`make demo` works" in found["driver"].text
    assert "GPU 0" not in found and found["torch"].text == "2.13.0+cpu, built for the CPU, runs on the CPU"
    assert (
        "docker run --gpus all" in gpu_checks.check_driver(NONE, POD).cure
        and "apt-get install" in gpu_checks.check_driver(NONE, VM).cure
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9),
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95\x1b[2J", 18),
        ("No devices were found", 6),
    ],
)
def test_an_nvidia_smi_that_fails_is_a_fault_in_its_own_words(words, code, tmp_path):
    smi(tmp_path, banner=words, code=code)
    found = of(tmp_path)
    assert found["driver"].state == "fault"
    assert words.split("\n")[-2 if words.endswith("\n") else -1].split("\x1b")[0] in found["driver"].text
    assert "\x1b" not in checks.format_checks(list(found.values()))
    assert gpu_checks.check_driver(machine.query_nvidia(), VM).cure.startswith("reboot")


def test_an_nvidia_smi_that_names_no_card_is_a_fault(tmp_path):
    smi(tmp_path)
    assert (of(tmp_path)["driver"].state, of(tmp_path)["driver"].text) == (
        "fault",
        "nvidia-smi fails: it lists no GPU",
    )


def test_an_nvidia_smi_that_hangs_is_given_up_and_nothing_else_asks_the_driver(tmp_path):
    smi(tmp_path, H100, seconds=60)
    program(tmp_path, "gcc", "print('gcc')")
    found = of(tmp_path, patience=1.5)
    assert found["driver"].state == "fault" and "did not answer within" in found["driver"].text
    assert found["libraries"].state == "lack" and "torch" not in found


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path):
    code = f"import subprocess, sys; subprocess.run(['{shutil.which('sleep', path='/usr/bin:/bin')}', '77.5'])"
    began = time.monotonic()
    assert machine.run_command([sys.executable, "-c", code], 1).state == "hangs" and time.monotonic() - began < 10
    while running(b"sleep\x0077.5"):  # a kill takes its moment
        assert time.monotonic() - began < 20
        time.sleep(0.1)


def running(words: bytes) -> bool:
    """Is there a process with these words on its command line?"""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            found.append(path.read_bytes())
    return any(words in line for line in found)


def test_a_card_that_another_process_holds_is_a_lack_with_its_name(tmp_path):
    smi(tmp_path, H100, users=[(0, 4242, 40536, "/opt/other, env/bin/python3")], used=40536)
    found = of(tmp_path)["memory 0"]
    assert found.state == "lack" and "43 GB of 86 GB free: python3 (process 4242) uses 43 GB" in found.text
    assert "a different machine" in found.cure
    smi(tmp_path, H100, users=[(0, 4242, "[N/A]", "[Not Found]")])
    assert "[Not Found] (process 4242) uses an unknown amount" in of(tmp_path)["memory 0"].text


def test_memory_held_by_what_cannot_be_seen_is_a_lack(tmp_path):
    smi(tmp_path, H100, used=40536)
    found = of(tmp_path)["memory 0"]
    assert found.state == "lack" and "43 GB are used by processes that are not visible here" in found.text
    smi(tmp_path, H100, used=600)
    assert of(tmp_path)["memory 0"].state == "ok", "a desktop"


def test_of_two_cards_the_free_one_is_named(tmp_path):
    smi(tmp_path, H100, A100, users=[(0, 4242, 40536, "python3")])
    found = of(tmp_path)
    assert (found["memory 0"].state, found["memory 1"].state) == ("lack", "ok")
    assert "use a different GPU: CUDA_VISIBLE_DEVICES=1" in found["memory 0"].cure
    assert "A100 80 GB" in found["price 1"].text and "sees 1 of 2 GPUs" in found["torch"].text
    smi(tmp_path, H100, P100, users=[(0, 4242, 40536, "python3")])
    found = of(tmp_path)
    assert found["GPU 1"].state == "fault" and "CUDA_VISIBLE_DEVICES" not in found["memory 0"].cure


def test_a_card_that_the_table_does_not_have_comes_with_its_line(tmp_path, monkeypatch):
    smi(tmp_path, ADA)
    found = of(tmp_path)
    assert found["GPU 0"].state == "ok" and found["price 0"].state == "lack"
    line = found["price 0"].cure.removeprefix("add a line: ")
    mended = tmp_path / "gpus.csv"
    mended.write_text(
        Path(table.TABLE_PATH).read_text() + line.replace("TFLOPS in bf16", "107").replace("$ an hour", "0.4") + "\n"
    )
    known = table.read_gpu_table(mended)[-1]
    assert (known.capability, known.memory_gb, known.dollars_per_hour) == (8.9, 21.5, 0.4)
    assert re.search(rf"\b{known.match}\b", ADA[0])


def test_a_table_that_cannot_be_read_is_a_lack(tmp_path, monkeypatch):
    smi(tmp_path, H100)
    monkeypatch.setattr(table.read_gpu_table, "__defaults__", (tmp_path / "none.csv",))
    found = of(tmp_path)
    assert found["price 0"].state == "lack" and found["GPU 0"].state == "ok"
    assert found["price 0"].code == "gpu.invalid_table" and "none.csv" in found["price 0"].text


def test_what_the_driver_does_not_tell_is_no_traceback(tmp_path):
    smi(tmp_path, H100)
    path = tmp_path / "bin" / "nvidia-smi"
    path.write_text(
        path.read_text().replace("81559", '\\"[N/A]\\"').replace("81079", '\\"[Insufficient Permissions]\\"')
    )
    assert of(tmp_path)["memory 0"].text == "an unknown amount of an unknown amount free"


# The libraries


@pytest.mark.slow  # loads torch and the other libraries
def test_the_libraries_of_this_environment_load_together():
    """The only test that asks the real ones: 7 s."""
    done = ferry("doctor", "--side", "cloud", PATH=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("unsloth", "torch", "triton", "4-bit", "attention", "llama.cpp"):
        assert re.search(rf"^ok    {re.escape(name)} ", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"nf4 and back on the (CPU|GPU)$", done.stdout, re.MULTILINE) and "Traceback" not in done.stderr
    if not shutil.which("nvidia-smi", path=HERE):
        assert re.search(r"^lack  driver .*`make demo` works", done.stdout, re.MULTILINE)


def test_what_the_steps_take_of_unsloth_is_there():
    """Names of its own, that only a card's run would miss."""
    folder = Path(importlib.util.find_spec("unsloth").origin).parent
    for file, words in {
        "utils/attention_dispatch.py": ("\n_TORCH_VARLEN_ATTN = ", "\ndef select_attention_backend(use_varlen: bool"),
        "kernels/swiglu.py": ("\ndef swiglu_fg_kernel(e, g):\n    batch, seq_len, hd = e.shape",),
        "_gpu_init.py": ("\n    from .models import *",),
        "models/llama.py": ("from ..utils.attention_dispatch import",),
    }.items():
        assert all(word in (folder / file).read_text() for word in words), file


def test_unsloth_s_choice_is_read_where_it_makes_it(monkeypatch):
    import torch

    chooses = SimpleNamespace(
        _TORCH_VARLEN_ATTN=print, select_attention_backend=lambda use_varlen: f"packed {use_varlen}"
    )
    monkeypatch.setitem(sys.modules, "unsloth.utils.attention_dispatch", chooses)
    assert gpu_work.inspect_attention()["capability"] is None and gpu_work.inspect_attention()["varlen"], (
        "torch 2.13 has enable_gqa"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = gpu_work.inspect_attention()
    assert (found["capability"], found["loaded"], found["chosen"]) == (9.0, True, "packed True")
    chooses._TORCH_VARLEN_ATTN = None
    assert not gpu_work.inspect_attention()["loaded"]


def test_every_step_has_a_judge():
    assert list(gpu_work.STEPS) == list(library_checks.STEP_CHECKS)


@pytest.mark.parametrize("step", list(LINES))
def test_a_library_that_ends_the_process_is_named(step, tmp_path):
    before = dict(list(LINES.items())[: list(LINES).index(step)])
    label = library_checks.STEP_CHECKS[step][0]
    found = of(tmp_path, loading(before, "failed", "some banner\nSegmentation fault\n"))
    assert (found[label].state, found[label].text) == ("fault", "it ended the process: Segmentation fault")
    assert found[label].cure.endswith("make env") and "rm -r" in found[label].cure
    found = of(tmp_path, loading(before, "hangs"))
    assert found[label].state == "fault" and "no answer within 300 s" in found[label].text


def test_the_image_is_cured_by_another_one(tmp_path, monkeypatch):
    monkeypatch.setenv("FERRY_IMAGE", "/opt/ferry/image.json")
    found = of(tmp_path, loading({}, "failed"))
    assert found["unsloth"].cure == "make image" and found["container"].text == "this is Ferry's image"
    monkeypatch.delenv("FERRY_IMAGE")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert library_checks.reinstall_command() == "make env", "never `rm -r /usr`"


def test_a_library_that_fails_hinders_no_other(tmp_path):
    broken = {"error": "ImportError: libcudart.so.13: cannot open\x1b[2J shared object file"}
    found = of(tmp_path, loading(LINES | {"bitsandbytes": broken}))
    assert (
        found["4-bit"].state == "fault"
        and "ImportError: libcudart.so.13: cannot open?[2J shared" in found["4-bit"].text
    )
    assert found["triton"].state == found["attention"].state == "ok"


def test_the_cure_is_the_one_of_the_line_that_knows_the_reason(tmp_path):
    smi(tmp_path, H100)
    (tmp_path / "bin" / "gcc").unlink()
    found = of(tmp_path, loading(LINES | {"triton": {"error": "RuntimeError: Failed to find C compiler."}}))
    assert found["triton"].cure == found["compiler"].cure == "sudo apt-get install gcc"
    full = {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 MiB"}
    assert "memory" in of(tmp_path, loading(LINES | {"bitsandbytes": full}))["4-bit"].cure


def test_wrong_values_are_a_fault(tmp_path):
    for name, label in (("triton", "triton"), ("bitsandbytes", "4-bit")):
        found = of(tmp_path, loading(LINES | {name: LINES[name] | {"right": False}}))
        assert found[label].state == "fault" and "wrong values" in found[label].text


def test_a_torch_that_does_not_use_the_card(tmp_path, monkeypatch):
    smi(tmp_path, H100)
    cpu = loading(LINES | {"torch": {"version": "2.13.0+cpu", "cuda": None, "cards": 0, "why": ""}})
    found = of(tmp_path, cpu)["torch"]
    assert (
        found.state == "lack" and "the GPUs of this machine are not used" in found.text and "FERRY_DEVICE" in found.cure
    )
    blind = loading(LINES | {"torch": LINES["torch"] | {"cards": 0, "why": "CUDA unknown error"}})
    found = of(tmp_path, blind)["torch"]
    assert found.state == "fault" and found.text.endswith("sees no GPU: CUDA unknown error")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert of(tmp_path, blind)["torch"].cure == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("step", "state", "words"),
    [
        ({}, "ok", "PyTorch's own varlen for packed rows (torch 2.13.0+cu130)"),
        ({"chosen": "flash_varlen"}, "ok", "FlashAttention"),
        ({"chosen": "xformers", "capability": 7.5}, "ok", "xFormers"),
        (
            {"capability": 7.5},
            "ok",
            "SDPA, packed rows one after the other: PyTorch's varlen needs compute capability 8.0",
        ),
        (
            {"capability": None, "loaded": False},
            "ok",
            "SDPA, packed rows one after the other: Unsloth has no alternative on the CPU",
        ),
        ({"loaded": False}, "lack", "Unsloth does not use this torch's varlen"),
        ({"loaded": False, "varlen": False}, "lack", "has no enable_gqa"),
    ],
)
def test_the_attention_in_use_is_named(step, state, words, tmp_path):
    found = of(tmp_path, loading(LINES | {"attention": LINES["attention"] | step}))["attention"]
    assert found.state == state and words in found.text


def test_steps_fail_alone_and_a_banner_is_no_answer(capfd, monkeypatch):
    def banner():
        print("=== Unsloth ===")
        return {"version": "1"}

    def broken():
        raise OSError("no such library")

    monkeypatch.setattr(gpu_work, "STEPS", {"unsloth": banner, "torch": broken, "triton": banner})
    gpu_work.main()
    out, err = capfd.readouterr()
    assert "===" not in out and "===" in err
    assert library_checks.parse_steps("odd words\n[1]\n{}\n" + out) == {
        "unsloth": {"step": "unsloth", "version": "1"}, "torch": {"step": "torch", "error": "OSError: no such library"},
        "triton": {"step": "triton", "version": "1"},
    }  # fmt: skip


# What Triton compiles with, llama.cpp


def test_without_a_compiler_or_headers_no_card_can_be_used(tmp_path, monkeypatch):
    (tmp_path / "bin" / "gcc").unlink()
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    found = of(tmp_path)
    assert (found["compiler"].state, found["Python.h"].state) == ("lack", "lack")
    smi(tmp_path, H100)
    found = of(tmp_path)
    assert (found["compiler"].state, found["Python.h"].state) == ("fault", "fault")
    assert found["Python.h"].cure == f"sudo apt-get install python3.{sys.version_info[1]}-dev"
    program(tmp_path, "clang", "print('clang version 19.1.7')")
    assert of(tmp_path)["compiler"].text == "clang version 19.1.7", "Triton takes that one, too"


def test_a_llama_cpp_without_cuda_is_a_lack_beside_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("FERRY_LLAMA_CPP", str(tmp_path))
    assert (doctor.check_llama_cpp(NONE).state, doctor.check_llama_cpp(NONE).cure) == ("fault", "make env")
    for flags, states in ((["-DGGML_NATIVE=ON"], ("ok", "lack")), (["-DGGML_CUDA=ON"], ("ok", "ok"))):
        (tmp_path / "build.json").write_text(json.dumps({"commit": "0c1e57098", "version": "0.3.36", "flags": flags}))
        assert (doctor.check_llama_cpp(NONE).state, doctor.check_llama_cpp(ONE).state) == states


# Disk, memory, container


def test_a_disk_too_small_is_a_lack_with_the_number(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(0, 0, 40_000_000_000))
    (found,) = doctor.check_disks(tmp_path, NONE)
    assert (
        found.state == "ok"
        and found.text == "40 GB free for runs, the Hub's cache, Ferry's cache; the demo needs 3.0 GB"
    )
    (found,) = doctor.check_disks(tmp_path, ONE)
    assert found.state == "lack" and "an 8B model needs 58 GB" in found.text and found.cure.startswith("free 18 GB")


def test_each_disk_has_its_own_line(tmp_path, monkeypatch):
    real = os.stat
    other = namedtuple("Stat", "st_dev")(-1)
    monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(
        doctor.os, "stat", lambda path, **more: other if str(path).endswith("cache") else real(path, **more)
    )
    texts = [check.text for check in doctor.check_disks(tmp_path, ONE)]
    assert len(texts) == 2 and texts[1].endswith("free for Ferry's cache")


def test_memory_is_what_a_control_group_leaves(monkeypatch):
    monkeypatch.setattr(machine.linux, "memory_limits", lambda: [8_000_000_000])
    assert doctor.check_memory(NONE).state == "ok" and doctor.check_memory(NONE).text.startswith("8.0 GB")
    assert doctor.check_memory(ONE).state == "lack" and "an 8B model needs 16 GB" in doctor.check_memory(ONE).text


@pytest.mark.parametrize(
    ("where", "state", "words"),
    [
        (POD, "ok", "natively: this machine is itself a container"),
        (
            TrainLocation("image", "an NVIDIA GPU and a container engine that can reach it"),
            "ok",
            "in the image: an NVIDIA GPU and",
        ),
        (VM, "lack", "natively: no docker here that answers"),
        (
            TrainLocation("native", "docker has no NVIDIA runtime (nvidia-container-toolkit)"),
            "lack",
            "docker has no NVIDIA runtime",
        ),
        (TrainLocation("", "timeout"), "lack", "setup/container.py does not answer: timeout"),
    ],
)
def test_where_make_train_runs_is_said(where, state, words):
    found = doctor.check_container(
        where, lambda command, *_: CommandResult("ok", "native\n", "train: natively (no podman here that answers)\n")
    )
    sound([found])
    assert found.state == state and words in found.text
    if where == VM:
        assert "nvidia-container-toolkit" in found.cure


def test_podman_is_named_where_it_could_do_it():
    asked = []

    def ask(command, *_):
        asked.append(command)
        return CommandResult(
            "ok", "image\n", "train: in the image (an NVIDIA GPU and a container engine that can reach it)\n"
        )

    assert doctor.check_container(VM, ask).cure == "ENGINE=podman" and "ENGINE=podman" in asked[0]


def test_setup_s_own_words_are_understood():
    found = machine.find_train_location()
    assert found.place in ("image", "native") and found.reason
    said = machine.run_command([sys.executable, str(machine.CONTAINER_SCRIPT), "where", "DOCKER=maybe", "--", "train"])
    assert (
        machine.find_train_location(lambda *_: said).place == ""
        and "next: DOCKER=1" in machine.find_train_location(lambda *_: said).reason
    )
    source = machine.CONTAINER_SCRIPT.read_text()
    assert (
        '"this machine is itself a container"' in source
        and 'f"no {engine} here' in source
        and 'f"{engine} has no' in source
    )


# The page, the exit code, make


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("lack", 0), ("fault", 2)])
def test_a_lack_is_no_failure_and_a_fault_is(state, code, monkeypatch, capsys):
    found = [Check("torch", "ok", "2.13.0"), Check("GPU 0", state, "it is so", "" if state == "ok" else "do that")]
    monkeypatch.setattr(doctor, "run_doctor", lambda runs: found)
    monkeypatch.setattr(sys, "argv", ["ferry", "doctor", "--side", "cloud"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code or 0) == code and f"{state:<6}GPU 0     it is so\n" in said.out
    assert ("error: it is so\n next: do that" in said.err) == (state == "fault")


@pytest.mark.slow  # loads torch and the other libraries
@pytest.mark.parametrize(
    ("words", "card", "side"),
    [
        ("", False, "mac"), ("", True, "cloud"), ("SIDE=cloud", False, "cloud"), ("SIDE=mac", True, "mac"),
        ("REPO=./hub/none", True, "mac"), ("SIDE=cloud REPO=./hub/none", True, "cloud"),
    ],
)  # fmt: skip
def test_make_doctor_is_the_side_s_that_this_machine_is(words, card, side, tmp_path):
    if card:
        smi(tmp_path, H100)
    elif shutil.which("nvidia-smi", path=SYSTEM):
        pytest.skip("this machine has a card")
    said = asking(tmp_path, "doctor", *words.split()).stdout
    assert ("Python.h" in said) == (side == "cloud") and ("LM Studio" in said) == (side == "mac")


@pytest.mark.slow  # loads torch and the other libraries
def test_in_the_image_make_doctor_is_the_cloud_side_s(tmp_path):
    assert "this is Ferry's image" in asking(tmp_path, "doctor", FERRY_IMAGE="/opt/ferry/image.json").stdout


def test_a_side_that_is_none_is_refused(tmp_path):
    done = asking(tmp_path, "doctor", "SIDE=left")
    assert done.returncode == 2 and "SIDE: 'left' is not one of 'cloud', 'mac'" in done.stderr


def asking(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """`make`, of which only the system's own programs are found beside those of the test."""
    path = f"{folder / 'bin'}:{SYSTEM}"
    return subprocess.run(
        [shutil.which("make", path=path), *MAKE[1:], *words], cwd=ROOT, capture_output=True, text=True,
        env=typed_environment() | {"PATH": path} | environment,
    )  # fmt: skip
