"""Fuzz what a user types and what a stranger publishes: only UserError may come out, and within seconds.

    python tests/fuzzing/inputs.py config -max_total_time=1200     # needs `pip install atheris`; libFuzzer's own options follow
    python tests/fuzzing/inputs.py settings -max_total_time=1200
    python tests/fuzzing/inputs.py manifest -max_total_time=1200
    python tests/fuzzing/inputs.py model 1200                       # seconds; GGUFs, really loaded by llama.cpp in a child
    python tests/fuzzing/inputs.py requests 1200 http://127.0.0.1:8080    # against a `ferry serve` that runs

tests/contract/test_model_header.py drives `model` with a fixed seed.
"""

import contextlib
import functools
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.fuzzing.readers import bent, mutated  # noqa: E402

YAML_PIECES = [
    b"base:", b"  model: ", b"data:", b"finetune:", b"generation:", b"- ", b"? ", b": ", b"{", b"}", b"[", b"]", b"'", b'"', b"&a ", b"*a",
    b"<<: *a", b"!!int ", b"!!python/object:os.system ", b"!!set {a}", b"!!binary ", b"010", b"1:30", b"yes", b"off", b"0x10", b"1_000",
    b".inf", b"-.inf", b".nan", b"1e999", b"9" * 5000, b"-1", b"~", b"null", b"2024-02-30", b"2024-01-01T25:61:00Z", b"\n---\n", b"%YAML 1.1\n",
    b"\\ud800", b'"\\x1b[2J"', b"\t", b"\0", b"\r", b"\xef\xbb\xbf", b"\xff\xfe", b"| \n", b"> \n", b"#", b"[" * 500, b"~nobody/x", b"{user}", b"{{x}}",
    b"max_steps: ", b"seed: ", b"learning_rate: ", b"smoke_prompts: ", b"target_modules: []", b"pattern: a{4294967295}", b"columns: {1: a}",
]  # fmt: skip
WORDS = [
    "SET=finetune.seed=7", "RUN=demo", "RUN=", "RUN=../x", "RUN=a b", "RUN=-x", "CONFIG=configs/demo.yaml", "CONFIG=", "RUNS=runs", "MODELS=m",
    "PORT=80", "PORT=x", "ROWS=3", "KEEP=0", "YES=1", "YES=maybe", "ALL=1", "REPO=./hub/demo", "REPO=a/b@c", "HOURS=inf", "MAX_DOLLARS=nan",
    "SET=base.model='x", "SET=data.system=a b finetune.r=8", "SET=x.y=1", "SET=finetune.r", "env:RUN=x", "NOSUCH=1", "SET=finetune.r=[", "QUANT=q9",
    "SET=data.date=2024-02-30", "SET=finetune.learning_rate=.inf", "SET=publish.repo={user}/{run}", "SET=finetune.max_steps=" + "9" * 400,
]  # fmt: skip
ODD = [
    None, True, 0, -1, 1, 1 << 31, 1 << 63, 10**40, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", " ", "x", "\x1b[2J", "a\nnext: b", "\ud800", "\u202e",
    "x" * 40_000, "../x", "/etc/passwd", [], {}, [[]], [None], {"a": {}}, "q4_k_m", "gguf", [0] * 40_000, "{{ 1 }}", "0" * 64,
]  # fmt: skip


def mutate(rng: random.Random, content: bytes, pieces: list[bytes]) -> bytes:
    return mutated(rng, content, pieces)[: 1 << 16]


def bend(rng: random.Random, value: object) -> object:
    return bent(rng, value, ODD, ["extra", "a\x1bb", "stage"])


# Targets: a function of bytes, True where the input was accepted


def config_target(folder: Path) -> Callable[[bytes], bool]:
    from common.errors import UserError
    from pipeline.config import advice, load, yaml_tree
    from pipeline.data import statistics

    path = folder / "config.yaml"

    def target(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            tree = load.load_config(path)
        except UserError as error:
            check_error(error)
            return False
        text = load.dump_config(tree)
        assert load.build_config(*yaml_tree.parse_yaml(text, "dump"), path) == tree, "it reads otherwise what it wrote"
        advice.list_warnings(tree, 1000, 64)
        statistics.count_steps(tree.finetune, 1000)
        publish_and_read(tree)
        return True

    return target


def publish_and_read(tree) -> None:
    """What a config becomes after the training: a manifest that every reader takes."""
    from contract import manifest

    value = json.loads(manifest_text()) | {
        "config": tree.model_dump(mode="json"),
        "generation": {
            "temperature": tree.generation.temperature, "top_p": tree.generation.top_p, "max_tokens": tree.generation.max_tokens,
            "num_ctx": tree.generation.num_ctx or tree.base.max_seq_length,
        },
    }  # fmt: skip
    value["base"] |= {"model": tree.base.model, "revision": tree.base.revision, "license": tree.base.license}
    value["dataset"] |= {"source": tree.data.source, "split": tree.data.validation or "none"}
    smoke = {"ids": [1], "answer": "", "answer_ids": [2], "log_probs": [-1.0]}
    value["smoke"] = [{"message": text} | smoke for text in tree.generation.smoke_prompts or ()]
    value["chat"] |= {"system": None if tree.data.system in ("from-rows", "none") else tree.data.system}
    manifest.parse_manifest(json.dumps(value).encode(), "published")


@functools.cache
def manifest_text() -> str:
    """The manifest of a tiny folder hub, as JSON."""
    from tests.helpers import repos

    with tempfile.TemporaryDirectory() as name:
        return (repos.make(Path(name) / "tiny", 1 << 14) / "manifest.json").read_text()


def settings_target(folder: Path) -> Callable[[bytes], bool]:
    import click

    from cli import settings
    from cli.table import COMMANDS, load_command
    from common.errors import UserError
    from pipeline.config import load

    names, path = sorted(COMMANDS), folder / "config.yaml"
    path.write_bytes((ROOT / "configs" / "demo.yaml").read_bytes())

    def target(content: bytes) -> bool:
        words = content[1:].decode("utf-8", "surrogateescape").split("\n")
        command = load_command(names[content[0] % len(names)]) if content else load_command("train")
        try:
            arguments = settings.translate_make_settings(command, words, {})
            command.make_context(command.name, [*arguments], resilient_parsing=False)
        except UserError as error:
            check_error(error)
        except click.BadParameter as error:
            check_error(settings.bad_value_error(error))
        except (click.ClickException, click.exceptions.Exit):
            pass
        overrides = tuple(word.removeprefix("SET=") for word in words if word.startswith("SET="))
        try:
            load.load_config(path, overrides)
            return True
        except UserError as error:
            check_error(error)
            return False

    return target


def manifest_target(folder: Path) -> Callable[[bytes], bool]:
    from common.errors import UserError
    from contract import manifest
    from deploy import summary, trace
    from pipeline.publish import model_card

    def target(content: bytes) -> bool:
        try:
            made = manifest.parse_manifest(content, "repo/manifest.json")
        except UserError as error:
            check_error(error)
            return False
        manifest.read_schema_version(content)
        pages = [
            trace.render_trace("x", None, made, folder, {}),
            "\n".join(summary._score_lines(made)),
            model_card.render_model_card(made, "ladder", "you/x", True),
        ]
        if made.chat.turns:
            pages.append(made.chat.turns.render_prompt([{"role": "user", "content": "x"}]))
        assert all(isinstance(page, str) for page in pages)
        manifest.parse_manifest(json.dumps(made.model_dump(mode="json")).encode(), "again")
        return True

    return target


def check_error(error) -> None:
    """What a terminal gets: lines of Ferry's own, and nothing that it would obey."""
    lines = str(error).encode("utf-8", "replace").decode().split("\n")
    assert lines[0].startswith("error: ") and sum(line.startswith(" next: ") for line in lines) == 1, lines
    assert all(c.isprintable() or c in "\t\u200c\u200d" for line in lines for c in line), lines
    assert sum(map(len, lines)) < 50_000


def seeds_of(kind: str) -> list[bytes]:
    if kind == "config":
        return [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))] + [
            b"base:\n  model: a/b\ndata:\n  source: x.jsonl\n" + more
            for more in (
                b"generation:\n  smoke_prompts: [Hello]\n",
                b"evaluate:\n  rule: regex\n  pattern: a+\n",
                b"publish:\n  tag: v1\n",
            )
        ]
    if kind == "settings":
        return [
            bytes([number]) + "\n".join(words).encode()
            for number, words in enumerate((WORDS[:3], WORDS[6:10], WORDS[20:24]))
        ]
    return [json.dumps(json.loads(manifest_text())).encode(), json.dumps(published()).encode()]


def published() -> dict:
    """A manifest of everything: scores, turns, smoke prompts."""
    value = json.loads(manifest_text())
    value["scores"] = {
        "rule": "exact",
        "used": "9 rows",
        "heldout": {
            "base": {"loss": 3.0, "score": 0.0, "rows": 9},
            "q4_k_m": {"loss": 0.1, "kl": 0.01, "score": 0.9, "rows": 9, "interval": [0.8, 1.0]},
        },
    }
    value["training"] = {"method": "LoRA", "device": "cpu", "steps": 3, "final_loss": 0.1}
    value["provenance"] = {
        "git": {"url": "x", "commit": "0" * 40, "dirty": False},
        "image": None,
        "packages": {"torch": "2"},
    }
    value["smoke"] = [{"message": "hi", "ids": [0, 1], "answer": "a", "answer_ids": [2], "log_probs": [-0.5]}]
    value["chat"]["turns"] = {
        "start": "",
        "system": ["<s>", "</s>"],
        "user": ["<u>", "</u>"],
        "assistant": ["<a>", "</a>"],
        "generate": "<a>",
    }
    return value


def mutator_of(kind: str) -> Callable[[random.Random, bytes], bytes]:
    if kind == "config":
        return lambda rng, content: mutate(rng, content, YAML_PIECES)
    if kind == "settings":
        return lambda rng, content: mutate(
            rng, content, [b"\n" + word.encode("utf-8", "surrogateescape") for word in WORDS] + YAML_PIECES
        )

    def bent(rng: random.Random, content: bytes) -> bytes:
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return mutate(rng, content, [b'"', b"{", b"[" * 2000, b"NaN", b"1e999", b"\\ud800"])
        for _ in range(rng.randint(1, 3)):
            value = bend(rng, value)
        return json.dumps(value).encode()

    return bent


TARGETS = {"config": config_target, "settings": settings_target, "manifest": manifest_target}


# GGUF headers, loaded by llama.cpp


def model_facts() -> dict[str, object]:
    """Metadata of a llama of one layer whose tensors `write_model` writes: llama.cpp loads it and answers."""
    tokens = ["<s>", "</s>", "<unk>", *map(chr, range(97, 123)), "Ġ", *(f"<{i}>" for i in range(34))]
    return {
        "general.architecture": "llama", "general.name": "tiny", "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 32,
        "llama.feed_forward_length": 32, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": len(tokens), "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3), "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ messages[0].content }}", "ferry.run": "tiny",
    }  # fmt: skip


def write_model(path: Path, facts: dict[str, object], names: dict[str, tuple[int, ...]] | None = None) -> None:
    """A GGUF with these facts. names: shapes of its tensors, numpy's order; None: those that fit."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, str(facts["general.architecture"]))
    for key, value in facts.items():
        if key == "general.architecture":
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < 1 << 32:
            writer.add_int64(key, max(-(1 << 63), min(value, (1 << 63) - 1)))
        elif value not in ([], ""):
            add[type(value)](key, value)
    for name, shape in (names or SHAPES).items():
        writer.add_tensor(name, np.full(shape, 0.01, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SHAPES = {
    "token_embd.weight": (64, 32), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,), "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (32, 32), "blk.0.attn_v.weight": (32, 32), "blk.0.attn_output.weight": (32, 32), "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (32, 32), "blk.0.ffn_up.weight": (32, 32), "blk.0.ffn_down.weight": (32, 32),
}  # fmt: skip
ODD_FACTS = [0, 1, 2, 3, 63, 64, 65, 511, 512, 513, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, -1, -(1 << 31), 0.0, 1e-30, 1e30,
             float("inf"), float("nan"), True, "x", "gpt2", "llama", "bert", "t5", "rwkv", "default", "\x1b", [0], [1, 2, 3], [1.5], ["a"], [True]]  # fmt: skip
ODD_NAMES = [
    "llama.expert_count", "llama.expert_used_count", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.attention.sliding_window",
    "llama.attention.key_length", "llama.attention.value_length", "llama.rope.freq_base", "llama.nextn_predict_layers", "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.scores", "tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.suppress_tokens",
    "tokenizer.chat_template.tool_use", "tokenizer.chat_templates", "general.alignment", "split.count", "general.sampling.top_k", "general.file_type",
    "llama.rope.dimension_sections", "llama.pooling_type", "tokenizer.ggml.token_type_count", "nosuch.key", "llama.logit_scale",
]  # fmt: skip


def bend_facts(rng: random.Random) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    facts, shapes = model_facts(), dict(SHAPES)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(facts) if rng.random() < 0.7 else ODD_NAMES)
        if key == "general.architecture":
            facts[key] = rng.choice(
                [
                    "llama",
                    "gemma2",
                    "qwen2",
                    "phi3",
                    "mamba",
                    "bert",
                    "t5",
                    "clip",
                    "x",
                    "gpt2",
                    "rwkv6",
                    "gemma3",
                    "qwen3moe",
                ]
            )
        elif rng.random() < 0.1:
            facts.pop(key, None)
        elif isinstance(facts.get(key), list) and rng.random() < 0.6:
            items = list(facts[key])
            at = rng.randrange(len(items))
            items[at : at + rng.randrange(3)] = [rng.choice(items), *([items[at - 1]] * rng.randrange(3))]
            facts[key] = items
        else:
            facts[key] = rng.choice(ODD_FACTS)
    if rng.random() < 0.2:
        name = rng.choice(list(shapes))
        shapes[name] = tuple(max(1, size + rng.choice([-1, 0, 1, 32])) for size in shapes[name])
    if rng.random() < 0.1:
        shapes[f"blk.{rng.choice([1, 2, 600])}.attn_norm.weight"] = (32,)
    return facts, shapes


def fuzz_model(seconds: float, seed: int = 3407, most: int = 10**9) -> Counter:
    """Write bent models, read them as `pull` does, and load in a child what it takes; count what became of them.

    Raises AssertionError when something else than UserError comes out, or a file that was accepted hangs.
    """
    from common import gguf_reader
    from common.errors import UserError
    from contract import model_header

    counts, rng, until = Counter(), random.Random(seed), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tiny.gguf"
        while time.monotonic() < until and counts["tried"] < most:
            try:
                facts, shapes = bend_facts(rng)
                write_model(path, facts, shapes)
            except (TypeError, ValueError, OverflowError, KeyError, AttributeError):  # gguf-py writes no such value
                continue
            if rng.random() < 0.2:
                path.write_bytes(mutate(rng, path.read_bytes(), [b"\xff" * 8, b"\0" * 4, b"llama", b"\x08\0\0\0"]))
            counts["tried"] += 1
            try:
                model_header.refuse_impossible_header(gguf_reader.read_header(path), path.name)
            except UserError as error:
                check_error(error)
                counts["refused by the header"] += 1
                continue
            how = load_in_fork(path)
            counts[how] += 1
            if how.startswith(("signal", "hangs")):
                usual = model_facts()
                odd = {
                    key: str(facts.get(key, "absent"))[:60]
                    for key in {*facts, *usual}
                    if facts.get(key) != usual.get(key)
                }
                print(how, odd, shapes if shapes != SHAPES else "", flush=True)
    return counts


def load_in_fork(path: str | Path, seconds: int = 20) -> str:
    """Load and ask the model in a fork with limits, as common/child_process.py does in a fresh process; how that ended."""
    import llama_cpp  # noqa: F401  once, before the fork

    child = os.fork()
    if not child:
        _load_and_ask(Path(path), seconds)
    until = time.monotonic() + seconds + 10
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs"
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    return {0: "answers", 2: "refused by llama.cpp"}.get(code, f"signal {-code}" if code < 0 else f"exit code {code}")


def _load_and_ask(path: Path, seconds: int) -> None:
    from common import llama_runtime
    from common.errors import UserError

    os.environ["GGML_NO_BACKTRACE"] = "1"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    signal.alarm(seconds)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    code = 3
    try:
        model = llama_runtime.load_model(path, 64)
        ids = llama_runtime.tokenize(model, "a b <s> c")[:8] or [0]
        llama_runtime.generate_greedy(model, ids, 4)
        code = 0
    except UserError:
        code = 2
    except (ValueError, RuntimeError, MemoryError, OSError):
        code = 4
    finally:
        os._exit(code)


# Requests to a server that runs

REQUEST_SEEDS = [
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}], "stream": True, "max_tokens": 2},
    {"prompt": "Hello", "max_tokens": 2, "temperature": 0, "top_p": 1, "seed": 1, "stop": ["x"], "frequency_penalty": 0.1},
    {"model": "x", "messages": [{"role": "user", "content": "a"}], "n": 1, "logprobs": False, "stream_options": {"include_usage": True}, "max_tokens": 2},
]  # fmt: skip
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/x",
    "/",
    "/v1/../x",
    "/%00",
    "/v1/models/" + "x" * 9000,
]


def fuzz_requests(seconds: float, url: str, seed: int = 3407) -> Counter:
    """Send bent requests; count the statuses. Raises AssertionError for 500, for silence, and for a server that is gone."""
    rng, counts, until, address = random.Random(seed), Counter(), time.monotonic() + seconds, urlsplit(url)
    while time.monotonic() < until:
        body = json.dumps(_bent_request(rng)).encode()
        if rng.random() < 0.2:
            body = mutate(rng, body, [b"\0", b'"', b"{", b"[" * 3000, b"\\ud800", b"NaN", b"9" * 5000, b"\xff"])
        path, method = rng.choice(PATHS[:2] if rng.random() < 0.8 else PATHS), rng.choice(["POST"] * 8 + ["GET", "PUT"])
        heads = [
            f"Host: {address.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(body) + rng.choice([0] * 30 + [-1, 5])}",
        ]
        heads += rng.choice(
            [[]] * 20
            + [
                ["Origin: http://evil.example"],
                ["Transfer-Encoding: chunked"],
                ["X: " + "y" * 70_000],
                ["Expect: 100-continue"],
            ]
        )
        raw = "\r\n".join([f"{method} {path} HTTP/1.1", *heads, "Connection: close", "", ""])
        try:
            status = _send(address, raw.encode("utf-8", "replace") + body, rng.random() < 0.05)
        except TimeoutError:
            raise AssertionError(("no answer", raw[:400], body[:4000])) from None
        counts[status] += 1
        assert not status.startswith("5"), (status, raw[:200], body[:2000])
    assert (
        _send(
            address, f"GET /v1/models HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n".encode(), False
        )
        == "200"
    )
    return counts


def _bent_request(rng: random.Random) -> object:
    value: object = rng.choice(REQUEST_SEEDS)
    for _ in range(rng.randint(0, 3)):
        value = bend(rng, value)
    if isinstance(value, dict) and "max_tokens" not in value and rng.random() < 0.9:
        value = value | {"max_tokens": 2}
    return value


def _send(address, raw: bytes, leave: bool) -> str:
    """The status; 'closed' where the server ends it without one. leave: without waiting for the answer."""
    with socket.create_connection((address.hostname, address.port), 240) as door:
        door.settimeout(240)
        with contextlib.suppress(OSError):  # it has answered and closed already
            door.sendall(raw)
            door.shutdown(socket.SHUT_WR)
        if leave:
            return "left"
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while block := door.recv(65536):
                answer += block
    return answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/") else "closed"


def fuzz(kind: str) -> None:
    import atheris

    instrumented = ["pipeline.config.schema", "pipeline.config.yaml_tree", "cli.settings", "contract.manifest", "yaml"]
    with atheris.instrument_imports(include=instrumented), tempfile.TemporaryDirectory() as name:
        target, mutator = TARGETS[kind](Path(name)), mutator_of(kind)
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for number, content in enumerate(seeds_of(kind)):
            (corpus / f"{number:03}").write_bytes(content)

        def given(content: bytes) -> None:
            target(content)

        def custom(content: bytes, size: int, seed: int) -> bytes:
            rng = random.Random(seed)
            return mutator(rng, content)[:size] if seed % 4 else atheris.Mutate(content, size)

        atheris.Setup([sys.argv[0], *sys.argv[2:], "-timeout=20", str(corpus)], given, custom_mutator=custom)
        atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "model":
        print(dict(fuzz_model(float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3407)))
    elif sys.argv[1] == "requests":
        print(dict(fuzz_requests(float(sys.argv[2]), sys.argv[3])))
    else:
        fuzz(sys.argv[1])
