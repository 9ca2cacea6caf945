"""The doctor names what a machine has and lacks, each lack with its cure, and stops nothing that can go on."""

import json
import re
import shutil
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from common import checks, files, llama_runtime
from common.checks import Check
from deploy import doctor, store
from deploy.apps import lmstudio
from deploy.apps import ollama_server as ollama
from deploy.machine import Machine
from deploy.stages import pull
from tests.helpers import repos
from tests.helpers.commands import ferry

GB = 1 << 30
MAC = Machine("Darwin", "macOS 15.6", "arm64", "Apple M3 Pro", 36 * GB, "Apple M3 Pro", 27 * GB, False)
SMALL = Machine("Darwin", "macOS 15.6", "arm64", "Apple M1", 8 * GB, "Apple M1", 16 * GB // 3, False)
TINY = Machine("Linux", "Debian", "x86_64", "an old one", 300_000_000, "", 0, False)
TRANSLATED = Machine("Darwin", "macOS 15.6", "x86_64", "VirtualApple", 16 * GB, "VirtualApple", 10 * GB, True)
BOX = Machine("Linux", "Ubuntu 24.04", "x86_64", "AMD EPYC", 128 * GB, "NVIDIA H100", 80 * GB, False)


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """A home in which there is nothing, no program on PATH, no server of Ollama's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    settings = {"HOME": tmp_path / "home", "PATH": tmp_path / "bin", "OLLAMA_HOST": "127.0.0.1:9"}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr(ollama, "MAC_APP", tmp_path / "Ollama.app")
    return tmp_path


@pytest.fixture
def metal(monkeypatch):
    monkeypatch.setattr(llama_runtime, "compute_device", lambda: "Metal")


def of(models: Path, repo: Path | str | None = None, machine: Machine = MAC, **more) -> dict[str, Check]:
    found = doctor.run_doctor(repo and str(repo), models, detect_machine=lambda: machine, **more)
    assert all(check.cure if check.state != "ok" else not check.cure for check in found), "a cure for every lack"
    return {check.name: check for check in found}


def program(folder: Path, name: str, code: str = "") -> None:
    path = folder / "bin" / name
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)


# The machine


def test_a_mac_with_nothing_else_on_it_can_go_on(tmp_path, metal):
    found = of(tmp_path / "models")
    assert [found[name].state for name in ("system", "llama.cpp", "memory", "context", "disk")] == ["ok"] * 5
    assert found["system"].text == "macOS 15.6, Apple M3 Pro, arm64 Python"
    assert found["llama.cpp"].text.endswith("computes on Metal")
    assert found["memory"].text == "36.0 GB unified; a model may take 26.0 GB"
    assert found["context"].text == "1B 131072 tokens, 3B 131072 tokens, 8B 131072 tokens, as q4_k_m"
    assert (found["Ollama"].state, found["Ollama"].cure) == ("lack", ollama.INSTALL_HINT)
    assert (found["LM Studio"].state, found["LM Studio"].cure) == ("lack", lmstudio.INSTALL_HINT)
    assert not list((tmp_path / "home").iterdir()) and not (tmp_path / "models").exists(), "it changes nothing"


def test_on_a_small_mac_less_fits(tmp_path, metal):
    found = of(tmp_path, machine=SMALL)
    assert found["memory"].text == "8.0 GB unified; a model may take 4.3 GB"
    assert found["context"].text == "1B 104448 tokens, 3B 19968 tokens, 8B does not fit, as q4_k_m"


def test_an_intel_python_on_apples_chip_stops_everything(tmp_path):
    found = of(tmp_path, machine=TRANSLATED)["system"]
    assert found.state == "fault" and "Rosetta" in found.text and "arch -arm64" in found.cure and "brew" in found.cure


def test_a_gpu_that_is_not_used_is_a_lack(tmp_path):
    for machine, flag in ((MAC, "GGML_METAL"), (BOX, "GGML_CUDA")):
        found = of(tmp_path, machine=machine)
        assert found["llama.cpp"].state == "lack" and machine.gpu in found["llama.cpp"].text
        assert flag in found["llama.cpp"].cure
    assert found["memory"].text == "128.0 GB, NVIDIA H100 with 80.0 GB; a model may take 96.0 GB"


def test_where_cuda_computes_the_gpus_memory_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_runtime, "compute_device", lambda: "CUDA")
    found = of(tmp_path, machine=BOX)
    assert found["llama.cpp"].state == "ok" and "a model may take 79.0 GB" in found["memory"].text


def test_without_llama_cpp_nothing_runs_and_a_mac_is_asked_for_its_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = of(tmp_path)
    assert (found["llama.cpp"].state, found["llama.cpp"].cure) == ("fault", "make deploy-env")
    assert (found["compiler"].state, found["compiler"].cure) == ("lack", "xcode-select --install")
    program(tmp_path, "xcode-select", "print('/Library/Developer/CommandLineTools')")
    assert "compiler" not in of(tmp_path) and "compiler" not in of(tmp_path, machine=BOX)


def test_a_llama_cpp_that_does_not_load_is_a_fault(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("Failed to load shared library: \x1b[31mwrong architecture")

    monkeypatch.setattr(llama_runtime, "compute_device", broken)
    found = of(tmp_path)["llama.cpp"]
    assert found.state == "fault" and "does not load: Failed to load shared library: ?[31m" in found.text


# A repo


def test_a_repo_s_file_is_known_before_it_is_here(real, tmp_path, metal):
    found = of(tmp_path / "models", real)
    assert all(found[name].state == "ok" for name in ("file", "disk", "context"))
    assert (
        "real.q4_k_m.gguf, 0.10 GB" in found["file"].text
        and "architecture llama, pre-tokenizer smollm" in found["file"].text
    )
    assert found["context"].text == "1024 tokens, as trained, need 0.2 GB"
    assert "0.10 GB needed: store 0.10 GB" in found["disk"].text


def test_what_is_pulled_needs_no_more_disk(real, tmp_path, metal):
    version = Path(pull.run_pull(str(real), tmp_path / "models")["folder"])
    assert "0.00 GB needed: store nothing" in of(tmp_path / "models", real)["disk"].text
    program(tmp_path, "ollama")
    assert "0.10 GB needed: store nothing, Ollama 0.10 GB" in of(tmp_path / "models", real)["disk"].text
    begun = '{"model": "real:1", "latest": "real:latest"'
    (version / "ollama.json").write_text(begun + "}")
    assert "Ollama 0.10 GB" in of(tmp_path / "models", real)["disk"].text, "it was begun, not made"
    (version / "ollama.json").write_text(begun + ', "digest": "abc"}')
    assert "Ollama nothing" in of(tmp_path / "models", real)["disk"].text


def test_each_copy_is_counted_on_its_disk(real, tmp_path, monkeypatch):
    program(tmp_path, "ollama")
    (tmp_path / "home" / ".lmstudio").mkdir()
    one = of(tmp_path / "models", real)["disk"]
    assert one.text.endswith("0.20 GB needed: store 0.10 GB, Ollama 0.10 GB, LM Studio nothing")
    monkeypatch.setattr(doctor, "device_id", lambda folder: ".lmstudio" in str(folder))
    found = [
        check
        for check in doctor.run_doctor(str(real), tmp_path / "models", detect_machine=lambda: MAC)
        if check.name == "disk"
    ]
    assert [check.text.split("needed: ")[1] for check in found] == [
        "store 0.10 GB, Ollama 0.10 GB",
        "LM Studio 0.10 GB",
    ]


def test_a_full_disk_is_a_lack_with_the_number(real, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(0, 0, 50_000_000))
    found = of(tmp_path / "models", real)["disk"]
    assert found.state == "lack" and "0.05 GB free, 0.10 GB needed" in found.text and "free 0.05 GB" in found.cure


def test_a_model_that_memory_does_not_hold_is_a_lack(real, tmp_path):
    found = of(tmp_path / "models", real, TINY)["context"]
    assert found.state == "lack" and found.text == "512 of the trained 1024 tokens fit into 0.2 GB"
    found = of(tmp_path / "models", real, Machine(**vars(TINY) | {"memory": 1 << 27}))["context"]
    assert found.state == "lack" and found.text == "it needs 0.2 GB, 0.1 GB are available for a model"
    assert "a smaller model" in found.cure


def test_a_smaller_file_of_the_repo_is_named(real, tmp_path):
    folder = shutil.copytree(real, tmp_path / "hub")
    small = {"kind": "gguf", "file": "real.q2_k.gguf", "quantization": "q2_k", "bytes": 7, "sha256": "0" * 64}
    repos.rewrite(folder, lambda value: value["artifacts"].append(small))
    assert of(tmp_path / "models", folder, TINY)["context"].cure == "QUANT=one of: q2_k"


@pytest.fixture
def unknown(real, tmp_path) -> Path:
    """A hub whose model has an architecture that no llama.cpp knows."""
    folder = shutil.copytree(real, tmp_path / "unknown")
    path = folder / "real.q4_k_m.gguf"
    path.write_bytes(path.read_bytes().replace(b"llama", b"lamma"))
    return repos.rewrite(folder, lambda value: value["artifacts"][0].update(sha256=files.sha256(path)))


def test_a_model_that_llama_cpp_does_not_know_is_a_fault(unknown, tmp_path):
    found = of(tmp_path / "models", unknown)
    assert (found["file"].state, found["file"].code) == ("fault", "gguf.unsupported_model")
    assert "lamma" in found["file"].text
    assert "1B" in found["context"].text, "the rest is said all the same"


@pytest.mark.parametrize(("repo", "code"), [("./nowhere", "hub.folder_not_found"), ("a b", "hub.bad_repo_id")])
def test_a_repo_that_is_none_is_a_fault(repo, code, tmp_path):
    found = of(tmp_path, repo)["file"]
    assert (found.state, found.code) == ("fault", code) and repo in found.text


def test_a_file_that_may_not_be_read_is_a_fault(real, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    found = of(tmp_path / "models", real)["file"]
    assert (found.state, found.code) == ("fault", "file.unreadable")
    assert str(real) in found.text and found.text.endswith(": Permission denied")


def test_a_quantization_that_is_not_there_is_a_fault(real, tmp_path):
    found = of(tmp_path, real, quantization="q8_0")["file"]
    assert (found.state, found.code) == ("fault", "pull.no_such_quantization")
    assert "q8_0" in found.text and "QUANT=one of: q4_k_m" in found.cure


def test_a_hub_that_cannot_be_asked_is_a_lack(tmp_path, online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = of(tmp_path, "you/real")
    assert (found["file"].state, found["file"].code) == ("lack", "hub.offline")
    assert "you/real" in found["file"].text and "an earlier pull can still be used" in found["file"].text
    assert found["context"].state == "ok"


def test_on_the_hub_only_the_header_is_fetched(real, tmp_path, online):
    online.add("models/you/real", real)
    found = of(tmp_path / "models", "you/real")
    assert found["file"].state == found["context"].state == "ok"
    assert online.sent["downloads"] < (real / "real.q4_k_m.gguf").stat().st_size / 3
    path = Path(pull.run_pull("you/real", tmp_path / "models")["folder"])
    assert "store nothing" in of(tmp_path / "models", "you/real")["disk"].text
    assert store.require_version(tmp_path / "models", "you/real").resolve() == path.resolve()


# Ollama


@pytest.fixture
def server(monkeypatch):
    """What answers /api/version."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"version": "0.33.0\x1b[31m"}).encode())

        def log_message(self, *_):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{running.server_port}")
    yield running
    running.shutdown()
    running.server_close()


def test_a_running_ollama_is_shown_with_its_address(server, tmp_path, bare):
    found = of(tmp_path)
    assert found["Ollama"].state == "ok"
    assert found["Ollama"].text == f"0.33.0?[31m answers at http://127.0.0.1:{server.server_port}"
    assert "store, Ollama" in found["disk"].text


def test_an_ollama_that_does_not_run_is_a_lack(tmp_path):
    program(tmp_path, "ollama")
    found = of(tmp_path)["Ollama"]
    assert (
        found.state == "lack" and "nothing answers at http://127.0.0.1:9" in found.text and "ollama serve" in found.cure
    )


def test_an_ollama_elsewhere_takes_no_disk_here(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "http://10.1.2.3:11434")
    monkeypatch.setattr(ollama, "find_server_version", lambda: "0.33.0")
    found = of(tmp_path)
    assert "another machine" in found["Ollama"].text and "Ollama" not in found["disk"].text


def test_ollamas_models_lie_where_its_variable_says(tmp_path, monkeypatch):
    assert ollama.models_folder() in (tmp_path / "home/.ollama/models", Path("/usr/share/ollama/.ollama/models"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "elsewhere"))
    assert ollama.models_folder() == tmp_path / "elsewhere"


# LM Studio


def test_an_lm_studio_without_a_runtime_is_a_lack(tmp_path):
    (tmp_path / "home/.lmstudio/extensions/backends/mlx-llm-mac-arm64-apple-metal-advsimd-1.11.0").mkdir(parents=True)
    found = of(tmp_path)["LM Studio"]
    assert found.state == "lack" and "without lms, no runtime for GGUF files" in found.text
    assert "lms runtime get llama.cpp" in found.cure


def test_an_lm_studio_is_shown_with_its_newest_runtime(tmp_path):
    home = tmp_path / "home/.lmstudio"
    for version in ("2.9.1", "2.31.2", "2.8.0"):
        (home / f"extensions/backends/llama.cpp-mac-arm64-apple-metal-advsimd-{version}").mkdir(parents=True)
    (home / "settings.json").write_text(json.dumps({"downloadsFolder": str(tmp_path / "big disk")}))
    program(tmp_path, "lms")
    found = of(tmp_path)["LM Studio"]
    assert found.state == "ok" and found.text.endswith("apple-metal-advsimd-2.31.2")
    assert f"models in {tmp_path / 'big disk'}, with lms" in found.text


# The page


def test_the_page_is_a_table_with_every_cure_below_its_lack():
    page = checks.format_checks([Check("memory", "ok", "36.0 GB"), Check("LM Studio", "lack", "not there", "get it")])
    assert page.splitlines() == [
        "ok    memory    36.0 GB", "lack  LM Studio not there", "                next: get it",
    ]  # fmt: skip


def test_lacks_are_no_failure_and_a_fault_is(tmp_path, unknown):
    done = ferry("doctor", "--models", tmp_path / "models")
    assert done.returncode == 0 and not done.stderr and done.stdout.count("lack  ") >= 2
    done = ferry("doctor", unknown, "--models", tmp_path / "models")
    fault = next(line for line in done.stdout.splitlines() if line.startswith("fault "))
    assert done.returncode == 2 and re.match(r"fault file +real\.q4_k_m\.gguf: .*architecture lamma", fault)
    assert "Traceback" not in done.stderr and not (tmp_path / "models").exists()


def test_as_json_the_doctor_prints_one_document_with_the_code_of_each_fault(tmp_path, unknown):
    done = ferry("doctor", unknown, "--models", tmp_path / "models", "--json")
    faults = [check for check in json.loads(done.stdout) if check["state"] == "fault"]
    assert done.returncode == 2 and [check["code"] for check in faults] == ["gguf.unsupported_model"]
    assert done.stderr.startswith(f"error: {faults[0]['text']}") and done.stderr.count("error: ") == 1


def test_a_read_only_home_hinders_nothing(tmp_path, real):
    (tmp_path / "home").chmod(0o500)
    assert of(tmp_path / "home" / "models", real)["file"].state == "ok"
    (tmp_path / "home").chmod(0o700)
