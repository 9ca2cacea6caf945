"""What the machine is: facts of Macs that are not here, and of this one."""

import os
import sys
from pathlib import Path

import pytest

from deploy import machine

GB = 1 << 30
MACS = {
    "M1 8 GB": ("Apple M1", 8, 0),
    "M3 Pro 36 GB": ("Apple M3 Pro", 36, 0),
    "M4 Max 128 GB": ("Apple M4 Max", 128, 0),
}


def mac(chip: str, memory: int, limit: int = 0, arch: str = "arm64", translated: bool = False, held: int = 0):
    """A Mac, as its commands describe it; a name that it does not know is an error, as `sysctl` has it."""
    facts = {
        "hw.memsize": memory * GB, "machdep.cpu.brand_string": chip, "iogpu.wired_limit_mb": limit,
        "hw.optional.arm64": 1 if arch == "arm64" or translated else None, "sysctl.proc_translated": int(translated),
    }  # fmt: skip

    def ask(command) -> str | None:
        if command[0] == "/usr/bin/sw_vers":
            return "15.6.1"
        assert command[0] == "/usr/sbin/sysctl" and command[1] == "-n"
        return None if facts.get(command[2]) is None else str(facts[command[2]])

    return machine.detect_machine(ask, Path("/nowhere"), "Darwin", arch, lambda: held)


@pytest.mark.parametrize("name", MACS)
def test_a_mac_is_described(name):
    chip, memory, _ = MACS[name]
    found = mac(chip, memory)
    assert (found.release, found.chip, found.memory) == ("macOS 15.6.1", chip, memory * GB)
    assert found.has_unified_memory and found.gpu == chip and not found.rosetta


def test_metal_gives_two_thirds_of_a_small_mac_and_three_quarters_of_a_large_one():
    shares = {8: 2 / 3, 16: 2 / 3, 24: 2 / 3, 32: 2 / 3, 36: 3 / 4, 64: 3 / 4, 128: 3 / 4}
    for memory, share in shares.items():
        assert mac("Apple M4", memory).gpu_memory == pytest.approx(share * memory * GB, abs=1)


def test_a_limit_set_by_hand_counts():
    assert mac("Apple M1 Max", 32, limit=26_000).gpu_memory == 26_000 << 20


def test_what_metal_itself_says_counts_more():
    assert mac("Apple M3", 16, limit=12_000, held=11_840 << 20).gpu_memory == 11_840 << 20


def test_a_model_may_take_less_than_metal_gives_and_three_quarters_where_the_processor_computes():
    found = mac("Apple M3 Pro", 36)
    assert machine.memory_budget(found, uses_gpu=True) == 26 * GB
    assert machine.memory_budget(found, uses_gpu=False) == 27 * GB
    assert machine.memory_budget(mac("Apple M1", 1, limit=512), uses_gpu=True) == 0


def test_an_intel_mac_has_no_unified_memory():
    found = mac("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", 16, arch="x86_64")
    assert not found.has_unified_memory and not found.rosetta and found.gpu_memory == 0
    assert machine.memory_budget(found, uses_gpu=True) == machine.memory_budget(found, uses_gpu=False) == 12 * GB


def test_an_intel_python_on_apples_chip_is_seen():
    found = mac("VirtualApple @ 2.50GHz", 16, arch="x86_64", translated=True)
    assert found.rosetta and found.arch == "x86_64"


def test_a_mac_that_says_nothing_is_still_described():
    found = machine.detect_machine(lambda command: None, Path("/nowhere"), "Darwin", "arm64", lambda: 0)
    assert found.memory == 0 and found.chip == "arm64" and machine.memory_budget(found, True) == 0


# Linux


@pytest.fixture
def root(tmp_path):
    """The files of a Linux machine with 64 GB."""
    write(tmp_path / "proc/meminfo", "MemTotal:       67108864 kB\nMemFree:        1024 kB\n")
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC 9454\nmodel name\t: another\n")
    write(tmp_path / "etc/os-release", 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n')
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def linux(root: Path, gpus: str | None = None, held: int = 0) -> machine.Machine:
    return machine.detect_machine(lambda command: gpus, root, "Linux", "x86_64", lambda: held)


def test_a_linux_machine_is_described(root):
    found = linux(root)
    assert (found.release, found.chip) == ("Debian GNU/Linux 12 (bookworm)", "AMD EPYC 9454")
    assert found.memory == 64 * GB and not found.gpu and not found.has_unified_memory and not found.rosetta
    assert machine.memory_budget(found, uses_gpu=False) == 48 * GB


@pytest.mark.parametrize(
    ("file", "group"),
    [
        ("sys/fs/cgroup/memory.max", "0::/\n"),
        ("sys/fs/cgroup/user.slice/memory.max", "0::/user.slice/a.scope\n"),
        ("sys/fs/cgroup/user.slice/a.scope/memory.max", "1:name=systemd:/\n0::/user.slice/a.scope\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4:memory:/\n"),
    ],
)
def test_a_container_has_what_it_may_have(root, file, group):
    write(root / "proc/self/cgroup", group)
    write(root / file, f"{8 * GB}\n")
    assert linux(root).memory == 8 * GB


@pytest.mark.parametrize("said", ["max\n", f"{1 << 62}\n", ""])
def test_no_limit_is_none(root, said):
    write(root / "sys/fs/cgroup/memory.max", said)
    assert linux(root).memory == 64 * GB


def test_nvidia_cards_are_added_up(root):
    found = linux(root, "NVIDIA H100 80GB HBM3, 81559\nNVIDIA, the other, 81559")
    assert found.gpu == "NVIDIA H100 80GB HBM3, NVIDIA, the other" and found.gpu_memory == 2 * 81559 << 20
    assert machine.memory_budget(found, uses_gpu=True) == found.gpu_memory - machine.GPU_MARGIN
    assert machine.memory_budget(found, uses_gpu=False) == 48 * GB, "llama.cpp is made for the processor"


def test_a_card_without_a_number_is_named_only(root):
    found = linux(root, "NVIDIA GB10, [N/A]")
    assert found.gpu == "NVIDIA GB10" and found.gpu_memory == 0


def test_a_machine_that_says_nothing_is_still_described(tmp_path):
    found = linux(tmp_path)
    assert found.memory == 0 and found.chip == "x86_64" and found.release.startswith("Linux")


# This machine


def test_this_machine_is_described():
    found = machine.detect_machine()
    assert 0 < found.memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.release and found.chip and machine.memory_budget(found, False) < found.memory


def test_llama_cpp_is_asked_what_its_gpus_hold():
    import llama_cpp

    assert (machine.query_gpu_memory() > 1 * GB) == llama_cpp.llama_supports_gpu_offload()


def test_a_fact_that_cannot_be_had_is_none(monkeypatch):
    monkeypatch.setattr(machine, "COMMAND_TIMEOUT", 0.5)
    for code in ("import time; time.sleep(60)", "print(1); exit(1)", ""):
        assert machine.run_command([sys.executable, "-c", code]) is None
    assert machine.run_command(["/no/such/program"]) is None
    assert machine.run_command([sys.executable, "-c", "print(' 1 ')"]) == "1"
