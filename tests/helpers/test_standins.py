"""The stand-ins for Ollama and LM Studio do what the real ones' sources say; each test names the file.

With OLLAMA_PROGRAM or LMS_PROGRAM naming a real program, the same tests ask that one (`standin` marks what it cannot be asked).
"""

import json
import os
import re
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.helpers import apps, repos
from tests.helpers.standins import library

pytestmark = pytest.mark.slow  # starts the stand-ins as programs

CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
HELLO = [{"role": "user", "content": "Say hello."}]
standin = pytest.mark.skipif("OLLAMA_PROGRAM" in os.environ, reason="a real Ollama has no such switch")
standin_lms = pytest.mark.skipif("LMS_PROGRAM" in os.environ, reason="a real lms has no such switch")


class Asked:
    """One Ollama, its command line and its API."""

    def __init__(self, running: apps.Ollama):
        self.running, self.folder = running, running.folder

    def run(self, *command: object, env: dict | None = None) -> subprocess.CompletedProcess:
        """`ollama ...`, nobody at the keyboard."""
        settings = os.environ | self.running.env | (env or {})
        command = ["ollama", *map(str, command)]
        return subprocess.run(
            command, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=self.folder
        )

    def ask(self, method: str, path: str, **body: object) -> httpx.Response:
        return httpx.request(method, self.running.url + path, json=body or None, timeout=300, trust_env=False)

    def post(self, path: str, **body: object) -> dict:
        answer = self.ask("POST", path, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def prompt(self, model: str, messages: list[dict] = HELLO) -> str:
        said = self.post("/api/chat", model=model, messages=messages, stream=False, _debug_render_only=True)
        return said["_debug_info"]["rendered_template"]

    def create(self, model: str, gguf: Path, *lines: str) -> subprocess.CompletedProcess:
        (self.folder / "Modelfile").write_text("\n".join([f"FROM {gguf}", *lines]) + "\n")
        return self.run("create", model, "-f", self.folder / "Modelfile")

    def names(self) -> list[str]:
        return sorted(m["name"] for m in self.ask("GET", "/api/tags").json()["models"])

    def manifest(self, model: str) -> dict:
        place = self.running.models / "manifests" / "registry.ollama.ai" / "library" / model.replace(":", "/")
        return json.loads(place.read_bytes())

    def layers(self, model: str) -> dict[str, str]:
        """Kind -> digest."""
        return {layer["mediaType"].rpartition(".")[2]: layer["digest"] for layer in self.manifest(model)["layers"]}


@pytest.fixture(scope="module")
def ollama(tmp_path_factory):
    with apps.ollama(tmp_path_factory.mktemp("ollama apps ü")) as running:
        yield Asked(running)


@pytest.fixture
def fresh(tmp_path):
    with apps.ollama(tmp_path / "apps") as running:
        yield Asked(running)


@pytest.fixture(scope="module")
def smol(ollama, source):
    """The demo's base model, in Ollama."""
    done = ollama.create(
        "smol:v1", source, f'TEMPLATE """{CHATML}"""', "SYSTEM Answer briefly.", 'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0", "PARAMETER num_ctx 512",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return "smol:v1"


# Names


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("smol", True), ("smol:v1", True), ("you/smol:v1", True), ("hf.co/you/smol", True), ("_x", True), ("x.y-z_1:a.b", True),
        ("x" * 80, True), ("x" * 81, False), ("", False), ("-x", False), (".x", False), ("a b", False), ("a:b:c", False),
        ("../x", False), ("x:", False), (":x", False), ("ä", False), ("a.b/x", False), ("localhost:5000/a/b", True), ("a/b/c/d", False),
    ],
)  # fmt: skip
def test_names_are_valid_as_in_ollama(text, valid):
    """types/model/name.go, ParseName and IsValid (and its test's cases)."""
    assert library.Name.parse(text).valid() == valid


def test_a_name_without_a_tag_is_latest_and_is_shown_as_short_as_it_can_be():
    """types/model/name.go, DisplayShortest."""
    shown = {
        text: str(library.Name.parse(text))
        for text in ("a", "registry.ollama.ai/library/a:b", "you/a", "hf.co/you/a:q")
    }
    assert list(shown.values()) == ["a:latest", "a:b", "you/a:latest", "hf.co/you/a:q"]


def test_a_name_that_is_there_keeps_its_spelling(ollama, smol):
    """server/routes.go, getExistingName."""
    assert ollama.run("cp", smol, "SMOL:Other").returncode == 0
    assert "smol:Other" in ollama.names() and ollama.prompt("Smol:OTHER") == ollama.prompt(smol)
    ollama.ask("DELETE", "/api/delete", model="smol:other")
    assert "smol:Other" not in ollama.names()


# The command line without a server


@pytest.mark.parametrize(
    "command", [["list"], ["ps"], ["cp", "a", "b"], ["rm", "a"], ["show", "a"], ["run", "a"], ["stop", "a"]]
)
def test_without_a_server_a_command_says_so(tmp_path, command):
    """cmd/start_default.go, cobra.CheckErr."""
    with apps.ollama(tmp_path, running=False) as off:
        done = Asked(off).run(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: could not connect to ollama server, run 'ollama serve' to start it\n"


def test_the_version_is_told_with_and_without_a_server(fresh):
    """cmd/cmd.go, versionHandler."""
    done = fresh.run("--version")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("ollama version is 0.")
    assert fresh.ask("GET", "/api/version").json()["version"] in done.stdout
    fresh.running.stop()
    done = fresh.run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(
        "Warning: could not connect to a running Ollama instance\nWarning: client version is 0."
    )


@standin
def test_on_a_mac_a_command_starts_the_app_by_itself_but_not_the_question_for_the_version(tmp_path):
    """cmd/start_darwin.go, startApp; versionHandler asks no heartbeat."""
    with apps.ollama(tmp_path, running=False, mac=True) as app:
        asked = Asked(app)
        assert asked.run("--version").returncode == 0 and not app.woken and not app.running
        assert asked.run("list").returncode == 0 and app.woken and app.running
    assert not app.running


def test_a_port_that_is_taken_ends_the_server(fresh):
    """cmd/cmd.go, RunServer."""
    done = fresh.run("serve")
    assert done.returncode == 1 and "bind: address already in use" in done.stderr


# create


def test_create_writes_blobs_and_a_manifest_as_the_real_one(ollama, smol, source):
    """server/create.go, manifest/manifest.go, manifest/layer.go."""
    made = ollama.manifest(smol)
    assert (made["schemaVersion"], made["config"]["mediaType"]) == (2, library.CONFIG)
    assert list(ollama.layers(smol)) == ["model", "template", "system", "params"]
    for layer in [*made["layers"], made["config"]]:
        blob = ollama.running.models / "blobs" / layer["digest"].replace(":", "-")
        assert blob.stat().st_size == layer["size"]
        assert library.sha256(library.chunks(blob)) == layer["digest"]
    config = json.loads((ollama.running.models / "blobs" / made["config"]["digest"].replace(":", "-")).read_bytes())
    assert (config["model_format"], config["model_family"], config["file_type"]) == ("gguf", "llama", "Q4_1")


def test_the_gguf_is_rewritten_and_the_uploaded_one_stays_until_a_server_starts_later(fresh, source):
    """server/create.go, copyLayerWithLlamaQuantize; server/images.go, PruneLayers with its hour of grace."""
    assert fresh.create("a", source).returncode == 0
    uploaded = library.sha256(library.chunks(source))
    blobs = fresh.running.models / "blobs"
    assert fresh.layers("a:latest")["model"] != uploaded and (blobs / uploaded.replace(":", "-")).exists()
    assert fresh.running.disk() > 1.9 * source.stat().st_size
    fresh.run("rm", "a")
    assert [path.name for path in blobs.iterdir()] == [uploaded.replace(":", "-")]
    fresh.running.stop()
    fresh.running.start()
    assert fresh.running.disk() == source.stat().st_size
    fresh.running.stop()
    os.utime(blobs / uploaded.replace(":", "-"), (1, 1))
    fresh.running.start()
    assert fresh.running.disk() == 0


def test_create_says_what_it_does_in_a_stream(ollama, smol, source):
    """server/create.go, createModel."""
    digest = library.sha256(library.chunks(source))
    body = {"model": "streamed", "files": {"m.gguf": digest}, "template": CHATML, "parameters": {"num_ctx": 99}}
    answer = ollama.ask("POST", "/api/create", **body)
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    said = [json.loads(line) for line in answer.text.splitlines()]
    words = [line["status"] for line in said if "digest" not in line]
    assert [words[0], words[1], *words[-2:]] == ["parsing GGUF", "verifying conversion", "writing manifest", "success"]
    assert words[2] == f"using existing layer {ollama.layers(smol)['model']}"
    assert ollama.post("/api/create", stream=False, **body) == {"status": "success"}
    ollama.run("rm", "streamed")


def test_from_is_looked_for_beside_the_modelfile(ollama, smol, source):
    """parser/parser.go, expandPath."""
    folder = ollama.folder / 'it\'s a "folder"'
    folder.mkdir()
    os.link(source, folder / "m.gguf") if os.stat(source).st_dev == os.stat(folder).st_dev else (
        folder / "m.gguf"
    ).symlink_to(source)
    (folder / "Modelfile").write_text("# a comment\nFROM ./m.gguf\n")
    done = ollama.run("create", "beside", "-f", folder / "Modelfile")
    assert done.returncode == 0 and "success" in done.stderr
    ollama.run("rm", "beside")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["FRUM x"], '(line 1): command must be one of "from", "license"'),
        (["FROM {gguf}", "", "what is this"], "(line 3): command must be one of"),
        (["SYSTEM x"], "no FROM line"),
        (["FROM {gguf}", 'SYSTEM """never', "closed"], "unexpected EOF"),
        (["FROM {gguf}", "PARAMETER num_ctxx 3"], "unknown parameter 'num_ctxx'"),
        (["FROM {gguf}", "PARAMETER num_ctx many"], "invalid int value [many]"),
        (["FROM {gguf}", "PARAMETER top_p x"], "invalid float value [x]"),
        (["FROM {gguf}", 'TEMPLATE """{{ .System """'], "template error: template: :1: unclosed action"),
        (["FROM ./absent.gguf"], "400 Bad Request: invalid model name"),
        (["FROM ./text.gguf"], "supplied file was not in GGUF format"),
        (["FROM ./text"], "400 Bad Request: unknown type"),
    ],
)  # fmt: skip
def test_a_modelfile_with_a_fault_is_refused_in_ollamas_words(ollama, smol, source, lines, said):
    """parser/parser.go, api/types.go FormatParams, server/create.go."""
    (ollama.folder / "text.gguf").write_text("no model")
    (ollama.folder / "text").write_text("no model")
    (ollama.folder / "Bad").write_text("\n".join(lines).replace("{gguf}", str(source)) + "\n")
    done = ollama.run("create", "bad", "-f", ollama.folder / "Bad")
    assert done.returncode == 1 and f"Error: {said}" in done.stderr
    assert "bad:latest" not in ollama.names()


def test_a_name_that_is_none_and_a_modelfile_that_is_none_are_refused(ollama, smol):
    """cmd/cmd.go, CreateHandler."""
    assert "Error: invalid model name: a b" in ollama.create("a b", Path("x")).stderr
    assert "Error: no Modelfile or safetensors files found" in ollama.run("create", "a", "-f", "absent").stderr


def test_a_gguf_that_llama_cpp_cannot_read_is_refused(ollama, tmp_path):
    """server/create.go, rewriteLayerWithLlamaQuantize: what `repos.write_gguf` makes has no layers."""
    repos.write_gguf(tmp_path / "tiny.gguf", 10_000, 1)
    done = ollama.create("tiny", tmp_path / "tiny.gguf")
    assert done.returncode == 1 and "Error: failed to validate GGUF with llama-quantize" in done.stderr
    assert "tiny:latest" not in ollama.names() and not list((ollama.running.models / "blobs").glob("COPY*"))


def test_the_same_name_again_takes_what_it_no_longer_needs_away(fresh, source):
    """server/create.go: oldManifest.RemoveLayers."""
    fresh.create("a", source, "SYSTEM one")
    before = fresh.layers("a:latest")
    fresh.run("cp", "a", "kept")
    fresh.create("a", source, "SYSTEM two")
    after = fresh.layers("a:latest")
    assert before["model"] == after["model"] and before["system"] != after["system"]
    blobs = fresh.running.models / "blobs"
    assert (blobs / before["system"].replace(":", "-")).exists(), "another name has it"
    fresh.run("rm", "kept")
    assert not (blobs / before["system"].replace(":", "-")).exists()
    fresh.create("a", source, "SYSTEM three")
    assert not (blobs / after["system"].replace(":", "-")).exists(), "no other name had it"


# Which template renders


def test_template_renders_and_system_goes_in_front(ollama, smol):
    """server/routes.go, ChatHandler; template/template.go, collate."""
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    assert (
        ollama.prompt(smol)
        == turn("system", "Answer briefly.") + turn("user", "Say hello.") + "<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert ollama.prompt(smol, own) == turn("system", "Mine.") + turn("user", "a\n\nb") + "<|im_start|>assistant\n"


def test_a_template_without_messages_is_rendered_turn_by_turn(ollama, smol, source):
    """template/template.go, Execute."""
    ollama.create(
        "turns", source, 'TEMPLATE """{{ if .System }}[{{ .System }}]{{ end }}<{{ .Prompt }}>{{ .Response }};"""'
    )
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("system", "user", "assistant", "user"), "suac", strict=True)
    ]
    assert ollama.prompt("turns", messages) == "[s]<u>a;<c>"
    ollama.run("rm", "turns")


def test_without_template_a_known_one_is_attached_and_the_default_system_prompt_is_lost(ollama, smol, source):
    """server/model.go, detectChatTemplate; template/template.go, Named."""
    done = ollama.create("auto", source)
    assert "using autodetected template chatml" in done.stderr
    assert ollama.prompt("auto") == "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    shown = ollama.post("/api/show", model="auto")
    assert {"<|im_start|>", "<|im_end|>"} <= {
        json.loads(line.split(maxsplit=1)[1]) for line in shown["parameters"].splitlines()
    }
    ollama.run("rm", "auto")


def variant(source: Path, target: Path, template: str) -> Path:
    """The same model with another chat template in it."""
    import gguf

    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for name, part in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "tokenizer.chat_template"):
            kind = part.types[0]
            sub = part.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, part.contents(), kind, sub)
    writer.add_chat_template(template)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


TOOLS = "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_the_ggufs_own_template_wins_silently_when_it_can_do_more(fresh, source, tmp_path):
    """server/images.go, shouldPreferChatTemplate; envconfig: OLLAMA_GO_TEMPLATE decides."""
    gguf = variant(source, tmp_path / "tools.gguf", TOOLS)
    assert fresh.create("tools", gguf, f'TEMPLATE """{CHATML}"""', "SYSTEM s").returncode == 0
    by_jinja, by_go = "<system>s</><user>Say hello.</><assistant>", "<|im_start|>system\ns<|im_end|>\n"
    assert fresh.prompt("tools") == by_jinja
    assert fresh.post("/api/show", model="tools")["template"] == TOOLS
    assert set(fresh.post("/api/show", model="tools")["capabilities"]) == {"completion", "tools"}
    for setting, wanted in (("1", by_go), ("0", by_jinja)):
        fresh.running.stop()
        fresh.running.start(OLLAMA_GO_TEMPLATE=setting)
        assert fresh.prompt("tools").startswith(wanted)


def test_a_template_that_can_think_is_asked_to(fresh, source, tmp_path):
    """server/routes.go: req.Think is true by default where the template can; llm/llama_server.go, enable_thinking."""
    thinking = (
        TOOLS.replace("{% if tools %}{{ tools }}{% endif %}", "")
        + "{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
    )
    fresh.create("thinks", variant(source, tmp_path / "t.gguf", thinking))
    assert fresh.prompt("thinks").endswith("<assistant><think>")
    body = {"model": "thinks", "messages": HELLO, "stream": False}
    off = fresh.post("/api/chat", think=False, _debug_render_only=True, **body)
    assert off["_debug_info"]["rendered_template"].endswith("<think></think>")
    fresh.create("plain", source)
    refused = fresh.ask("POST", "/api/chat", think=True, model="plain", messages=HELLO)
    assert (refused.status_code, refused.json()) == (400, {"error": '"plain" does not support thinking'})


# chat and generate


def test_an_answer_is_one_message_with_counts_and_times(ollama, smol):
    """server/routes.go, ChatHandler; api/types.go, ChatResponse and Metrics."""
    said = ollama.post("/api/chat", model=smol, messages=HELLO, stream=False, options={"num_predict": 8})
    assert said["model"] == smol and said["message"]["role"] == "assistant" and said["message"]["content"]
    assert (said["done"], said["done_reason"], said["eval_count"]) == (True, "length", 8)
    assert said["prompt_eval_count"] == 20 and said["total_duration"] > said["eval_duration"] > 1e6
    again = ollama.post("/api/chat", model=smol, messages=HELLO, stream=False, options={"num_predict": 8})
    assert again["message"] == said["message"]


def test_a_stream_is_the_same_answer_in_pieces(ollama, smol):
    """server/routes.go, streamResponse."""
    body = {"model": smol, "messages": HELLO, "options": {"num_predict": 8}}
    whole = ollama.post("/api/chat", stream=False, **body)
    parts = [json.loads(line) for line in ollama.ask("POST", "/api/chat", **body).text.splitlines()]
    assert len(parts) > 4 and [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert "".join(part["message"]["content"] for part in parts) == whole["message"]["content"]
    assert "eval_count" in parts[-1] and "eval_count" not in parts[0]


def test_a_stop_string_ends_an_answer_and_is_not_in_it(ollama, smol):
    """llm/llama_server.go, Completion."""
    body = {"model": smol, "messages": HELLO, "stream": False}
    long = ollama.post("/api/chat", options={"num_predict": 8}, **body)["message"]["content"]
    stop = long.strip().split()[2]
    said = ollama.post("/api/chat", options={"num_predict": 8, "stop": [stop]}, **body)
    assert said["done_reason"] == "stop" and said["message"]["content"] == long[: long.index(stop)]


def test_generate_takes_a_prompt_and_what_overrides_the_modelfile(ollama, smol):
    """server/routes.go, GenerateHandler."""
    body = {"model": smol, "prompt": "Hi", "stream": False, "_debug_render_only": True}
    shown = [
        ollama.post("/api/generate", **body, **more)["_debug_info"]["rendered_template"]
        for more in ({}, {"system": "Other."}, {"template": "<{{ .Prompt }}>"}, {"raw": True})
    ]
    start = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert shown == [start.format("Answer briefly."), start.format("Other."), "<Hi>", "Hi"]
    said = ollama.post("/api/generate", model=smol, prompt="Hi", stream=False, options={"num_predict": 3})
    assert said["eval_count"] == 3 and said["response"]


def test_run_prints_the_answer_and_an_empty_line(ollama, smol):
    """cmd/cmd.go, generate: it asks /api/generate; displayResponse wraps at column 75, also into a pipe."""
    answer = ollama.post("/api/generate", model=smol, prompt="Say hello.", stream=False)["response"]
    plain, wrapped = (ollama.run("run", *more, smol, "Say hello.") for more in (["--nowordwrap"], []))
    assert (plain.returncode, plain.stdout) == (0, answer + "\n\n")
    assert wrapped.returncode == 0 and ("\x1b[K\n" in wrapped.stdout) == (len(answer) > 75)
    assert re.sub(r"(?:\S*\x1b\[\d+D)?\x1b\[K\n", "", wrapped.stdout) == answer + "\n\n"


def test_a_model_stays_loaded_for_its_time_and_stop_takes_it_out(ollama, smol):
    """server/sched.go; cmd/cmd.go, StopHandler."""
    assert ollama.post("/api/generate", model=smol, stream=False)["done_reason"] == "load"
    (there,) = ollama.ask("GET", "/api/ps").json()["models"]
    assert (there["name"], there["context_length"]) == (smol, 512)
    assert smol in ollama.run("ps").stdout
    assert ollama.run("stop", smol).returncode == 0
    assert ollama.ask("GET", "/api/ps").json() == {"models": []}
    ollama.post("/api/chat", model=smol, messages=HELLO, stream=False, keep_alive=0, options={"num_predict": 1})
    assert ollama.ask("GET", "/api/ps").json() == {"models": []}
    assert 'Error: couldn\'t find model "absent" to stop' in ollama.run("stop", "absent").stderr


def test_openais_api_answers_and_does_not_take_the_modelfiles_temperature(ollama, smol):
    """openai/openai.go, FromChatRequest, ToChatCompletion, ToListCompletion."""
    listed = [{**model, "created": 0} for model in ollama.ask("GET", "/v1/models").json()["data"]]
    assert {"id": smol, "object": "model", "owned_by": "library", "created": 0} in listed
    body = {"model": smol, "messages": HELLO, "max_tokens": 8}
    said = ollama.post("/v1/chat/completions", temperature=0, **body)
    mine = ollama.post("/api/chat", stream=False, model=smol, messages=HELLO, options={"num_predict": 8, "top_p": 1.0})
    assert said["choices"][0]["message"] == mine["message"] and said["choices"][0]["finish_reason"] == "length"
    assert said["usage"] == {"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28}
    assert len({ollama.post("/v1/chat/completions", **body)["choices"][0]["message"]["content"] for _ in range(6)}) > 1
    absent = ollama.ask("POST", "/v1/chat/completions", model="absent", messages=HELLO)
    assert absent.status_code == 404
    assert absent.json()["error"] == {
        "message": "model 'absent' not found",
        "type": "not_found_error",
        "param": None,
        "code": None,
    }


# The other commands, and errors


def test_list_show_cp_and_rm(fresh, source):
    """cmd/cmd.go; server/routes.go, CopyHandler and DeleteHandler."""
    fresh.create("a:one", source, "SYSTEM s", "PARAMETER num_ctx 77")
    assert fresh.run("cp", "a:one", "a").stdout == "copied 'a:one' to 'a'\n"
    head, *rows = fresh.run("list").stdout.splitlines()
    assert head.split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert (
        sorted(row.split()[0] for row in rows) == ["a:latest", "a:one"] and len({row.split()[1] for row in rows}) == 1
    )
    digests = {m["digest"] for m in fresh.ask("GET", "/api/tags").json()["models"]}
    assert len(digests) == 1, "a copy is the same manifest"
    assert (
        fresh.run("show", "--system", "a").stdout == "s" and "num_ctx" in fresh.run("show", "--parameters", "a").stdout
    )
    assert "# FROM a:latest" in fresh.run("show", "--modelfile", "a").stdout and "Q4_1" in fresh.run("show", "a").stdout
    assert fresh.run("rm", "a:one").stdout == "deleted 'a:one'\n"
    assert fresh.names() == ["a:latest"] and fresh.prompt("a"), "its blobs are still there"
    assert fresh.run("rm", "a").returncode == 0 and fresh.names() == []


def test_a_model_that_is_not_there_is_said_so_by_all(ollama, smol):
    """server/routes.go; api/client.go."""
    said = ollama.run("rm", "absent").stderr
    assert said.endswith("Error: model 'absent' not found\n") and said.startswith("\033"), (
        "a spinner's escape sequences first"
    )
    assert ollama.run("cp", "absent", "b").stderr == 'Error: model "absent" not found\n'
    assert ollama.run("cp", smol, "a b").stderr == 'Error: destination "a b" is invalid\n'
    for method, path in (
        ("POST", "/api/chat"),
        ("POST", "/api/generate"),
        ("POST", "/api/show"),
        ("DELETE", "/api/delete"),
    ):
        answer = ollama.ask(method, path, model="absent", messages=HELLO, prompt="x")
        shown = "absent:latest" if path == "/api/show" else "absent"
        assert (answer.status_code, answer.json()) == (404, {"error": f"model '{shown}' not found"})


def test_requests_that_make_no_sense_have_the_real_ones_answers(ollama, smol):
    """server/routes.go; gin."""
    root = ollama.ask("GET", "/")
    assert (root.status_code, root.text) == (200, "Ollama is running")
    assert ollama.ask("GET", "/api/absent").status_code == 404 and ollama.ask("GET", "/api/chat").status_code == 405
    empty = httpx.post(ollama.running.url + "/api/chat", trust_env=False)
    assert (empty.status_code, empty.json()) == (400, {"error": "missing request body"})
    broken = httpx.post(ollama.running.url + "/api/chat", content=b"x", trust_env=False)
    assert (broken.status_code, broken.json()) == (
        400,
        {"error": "invalid character 'x' looking for beginning of value"},
    )
    wrong = ollama.ask("POST", "/api/chat", model=smol, messages=HELLO, options={"temperature": "hot"})
    assert (wrong.status_code, wrong.json()) == (500, {"error": 'option "temperature" must be of type float32'})
    digest = "sha256:" + "0" * 64
    assert ollama.ask("HEAD", f"/api/blobs/{digest}").status_code == 404
    answer = httpx.post(f"{ollama.running.url}/api/blobs/{digest}", content=b"x", trust_env=False)
    assert answer.status_code == 400 and answer.json()["error"].startswith(
        f'digest mismatch, expected "{digest}", got "sha256:2d71'
    )
    assert ollama.ask("POST", "/api/blobs/x").json() == {"error": "invalid digest format"}
    assert ollama.ask("POST", "/api/create", model="x").json() == {"error": "neither 'from' or 'files' was specified"}


# Faults of the stand-in


@standin
def test_faults(fresh, source):
    fresh.create("a", source, f'TEMPLATE """{CHATML}x"""')
    fresh.running.faults(broken=["delete"], wrong="Bonjour", version="0.11.2")
    assert fresh.ask("DELETE", "/api/delete", model="a").status_code == 500 and fresh.names() == ["a:latest"]
    assert "Warning: client version is" in fresh.run("--version").stdout
    assert (
        fresh.post("/api/chat", model="a", messages=HELLO, stream=False, options={"num_predict": 1})["message"][
            "content"
        ]
        == "Bonjour"
    )
    fresh.running.faults(ignore_template=True)
    assert "SmolLM" in fresh.prompt("a")
    fresh.running.faults(full=True)
    done = fresh.create("b", source)
    assert done.returncode == 1 and "Error: failed to validate GGUF" in done.stderr
    (fresh.folder / "other.gguf").write_bytes(b"GGUF")
    assert "no space left on device" in fresh.create("b", fresh.folder / "other.gguf").stderr
    fresh.running.faults(die="create")
    done = fresh.create("b", source)
    assert done.returncode == 1 and "Error: unexpected EOF" in done.stderr and not fresh.running.running
    assert list((fresh.running.models / "blobs").glob("COPY*")) == [], "nothing was copied yet"
    fresh.running.faults()
    fresh.running.start()
    assert fresh.names() == ["a:latest"]


# LM Studio


@pytest.fixture
def lms(tmp_path):
    with apps.lms(tmp_path / "apps") as made:
        yield made


@pytest.fixture
def file(source, tmp_path):
    path = tmp_path / "a model ü.Q4_1.gguf"
    os.link(source, path) if os.stat(source).st_dev == os.stat(tmp_path).st_dev else path.symlink_to(source)
    return path


def run(lms: apps.Lms, *command: object, said: str = "") -> subprocess.CompletedProcess:
    command = ["lms", *map(str, command)]
    return subprocess.run(command, env=os.environ | lms.env, input=said, capture_output=True, text=True, cwd=lms.folder)


@pytest.mark.parametrize("how", ["--copy", "--hard-link", "--symbolic-link"])
def test_import_puts_the_file_where_lm_studio_looks(lms, file, how):
    """importCmd.ts."""
    done = run(lms, "import", file, how, "--user-repo", "you/model", "-y")
    target = lms.models / "you" / "model" / file.name
    assert done.returncode == 0 and target.exists() and file.exists() and done.stdout == ""
    assert target.is_symlink() == (how == "--symbolic-link")
    assert target.samefile(file) == (how != "--copy")
    again = run(lms, "import", file, how, "--user-repo", "you/model", "-y")
    assert again.returncode == 1 and f"Target file already exists: {target}" in again.stderr


def test_import_moves_by_default_and_asks_even_with_yes(lms, file):
    """importCmd.ts, warnAboutMove."""
    done = run(lms, "import", file, "--user-repo", "you/model", "-y", said="n\n")
    assert done.returncode == 1 and "will move the file" in " ".join(done.stderr.split()) and file.exists()
    assert run(lms, "import", file, "--user-repo", "you/model", "-y", said="\n").returncode == 0 and not file.exists()


@standin_lms
def test_import_ends_where_nobody_can_answer(lms, file):
    assert run(lms, "import", file, "--user-repo", "you/model", "-y").returncode == 1 and file.exists()


def test_import_does_nothing_in_a_dry_run_and_escapes_when_told_to(lms, file):
    """importCmd.ts: the names are joined as they come."""
    done = run(lms, "import", file, "--copy", "--user-repo", "you/model", "-y", "--dry-run")
    assert done.returncode == 0 and "Would copy the file to" in done.stderr and not (lms.models / "you").exists()
    assert run(lms, "import", file, "--copy", "--user-repo", "../out", "-y").returncode == 0
    assert (lms.home / "out" / file.name).exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["import", "absent.gguf", "-y"], "File does not exist"),
        (["import", "{file}", "-y", "--copy", "--user-repo", "x"], "Must be user and repo separated by a slash."),
        (["import", "{file}", "-y", "--copy", "--hard-link", "--user-repo", "a/b"], "Cannot specify more than one of"),
    ],
)
def test_import_refuses(lms, file, command, said):
    """importCmd.ts."""
    done = run(lms, *(str(file) if word == "{file}" else word for word in command))
    assert done.returncode == 1 and said in done.stderr


def test_import_takes_any_file_with_a_warning(lms):
    """importCmd.ts, validateModelNameOrWarn."""
    (lms.folder / "a.txt").write_text("x")
    done = run(lms, "import", lms.folder / "a.txt", "--copy", "--user-repo", "a/b", "-y")
    assert done.returncode == 0 and "does not look like a model file" in done.stderr


def test_a_hard_link_of_a_link_links_the_link(lms, file):
    """importCmd.ts, importViaHardLink: node's link() does not follow; a relative one dangles at its new place."""
    (file.parent / "link.gguf").symlink_to(file.name)
    assert run(lms, "import", file.parent / "link.gguf", "-L", "--user-repo", "a/b", "-y").returncode == 0
    made = lms.models / "a" / "b" / "link.gguf"
    assert made.is_symlink() and not made.exists()


def test_the_home_is_where_the_pointer_says_and_the_models_where_the_settings_say(lms, file, tmp_path):
    """findLMStudioHome.ts; importCmd.ts, resolveModelsFolderPath."""
    user = lms.home.parent
    (user / ".cache" / "lm-studio").mkdir(parents=True)
    run(lms, "import", file, "-c", "--user-repo", "a/b", "-y")
    assert (user / ".cache" / "lm-studio" / "models" / "a" / "b" / file.name).exists()
    assert (user / ".lmstudio-home-pointer").read_text() == str(user / ".cache" / "lm-studio")
    (user / ".lmstudio-home-pointer").write_text(f"{tmp_path / 'else'}\n")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "settings.json").write_text(json.dumps({"downloadsFolder": str(tmp_path / "far away")}))
    run(lms, "import", file, "-c", "--user-repo", "a/b", "-y")
    assert (tmp_path / "far away" / "a" / "b" / file.name).exists()


def test_a_hard_link_across_file_systems_fails(lms):
    """importCmd.ts. (A file of /proc is on another one everywhere.)"""
    done = run(lms, "import", "/proc/version", "-L", "--user-repo", "a/b", "-y")
    assert done.returncode == 1 and "EXDEV: cross-device link not permitted" in done.stderr


def test_the_version_is_told(lms):
    """src/index.ts."""
    done = run(lms, "--version")
    assert done.returncode == 0 and done.stdout.startswith("CLI commit: ")


@standin_lms
def test_ls_lists_two_levels_as_json(lms, file):
    """list.ts; lms-shared-types ModelInfoBase and LLMInfo."""
    run(lms, "import", file, "-c", "--user-repo", "you/Model-GGUF", "-y")
    (lms.models / "x.gguf").write_bytes(b"GGUF")
    (model,) = json.loads(run(lms, "ls", "--json").stdout)
    assert model["path"] == f"you/Model-GGUF/{file.name}" and model["modelKey"] == "model" and model["type"] == "llm"
    assert model["sizeBytes"] == file.stat().st_size and model["quantization"] == {"name": "Q4_1", "bits": 4}
    assert (model["architecture"], model["maxContextLength"], model["format"]) == ("llama", 8192, "gguf")


@standin_lms
def test_ls_needs_the_app_and_wakes_it(lms):
    """createClient.ts; lms-common-server, findOrStartLlmster.ts."""
    lms.app("absent")
    done = run(lms, "ls", "--json")
    assert (
        done.returncode == 1
        and "Failed to start or connect to local LM Studio API server." in done.stderr
        and not done.stdout
    )
    lms.app("asleep")
    assert run(lms, "ls", "--json").stdout == "[]\n" and lms.woken
