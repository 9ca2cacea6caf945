"""make serve: OpenAI's own client gets the trained model's answers, and a web page gets none."""

import contextlib
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from deploy.serving import conversation, server
from tests.helpers.commands import ROOT, refuses
from tests.helpers.served_models import HI, Served, answer, command, free_port

pytestmark = pytest.mark.slow  # serves real weights

SAID = [*HI, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Spain?"}]


@pytest.fixture(scope="module")
def served(version) -> Iterator[Served]:
    """One server for all tests of this module; it never printed anything but its greeting."""
    with contextlib.closing(Served(version)) as running:
        yield running
        assert running.end() == (0, "", "")


@pytest.fixture(scope="module")
def client(served):
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none is asked for", max_retries=0)


def test_it_says_where_it_is_and_how_to_ask(served):
    first, *curl = served.greeting
    assert first == f"serving real at http://127.0.0.1:{served.port}/v1 (OpenAI-compatible), Ctrl-C ends\n"
    done = subprocess.run(["bash", "-c", "".join(curl)], capture_output=True, text=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_openais_client_gets_the_golden_prompts_answer_token_for_token(client, engine):
    asked = [golden for golden in engine.manifest.golden if golden.add_generation_prompt]
    with_system = [golden for golden in asked if golden.messages[0]["role"] == "system"]
    assert len(with_system) == 2  # the others get the manifest's
    for golden in with_system:
        found = client.chat.completions.create(model="real", messages=list(golden.messages), max_tokens=16)
        known = answer(engine, list(golden.ids), max_tokens=16)
        assert found.choices[0].message.content == known.text and found.choices[0].finish_reason == known.end
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(golden.ids), len(known.ids))


def test_what_a_request_does_not_name_is_the_manifests(client, engine):
    for known in engine.manifest.smoke:  # made with its system prompt, greedily, 24 tokens at most
        found = client.chat.completions.create(model="real", messages=[{"role": "user", "content": known.message}])
        assert found.usage.prompt_tokens == len(known.ids)
        assert found.choices[0].message.content == answer(engine, list(known.ids)).text
    hot = {
        client.chat.completions.create(model="real", messages=HI, temperature=2.0).choices[0].message.content
        for _ in range(3)
    }
    assert len(hot) > 1


def test_a_stream_is_the_same_answer_in_pieces(client):
    whole = client.chat.completions.create(model="real", messages=SAID)
    chunks = list(
        client.chat.completions.create(model="real", messages=SAID, stream=True, stream_options={"include_usage": True})
    )
    *said, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == whole.choices[0].message.content
    assert (
        said[0].choices[0].delta.role == "assistant"
        and said[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    )
    assert usage.usage == whole.usage and len(said) > 3 and {chunk.model for chunk in chunks} == {"real"}


def test_models_and_plain_completions(client, engine):
    assert [model.id for model in client.models.list()] == ["real"] and client.models.retrieve("real").id == "real"
    found = client.completions.create(model="real", prompt="Once upon a time", max_tokens=8)
    assert found.choices[0].text == answer(engine, engine.tokenize_text("Once upon a time"), max_tokens=8).text
    pieces = client.completions.create(model="real", prompt="Once upon a time", max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == found.choices[0].text


def test_a_stop_string_and_parts_and_the_developer_role(served):
    whole = served.chat()[1]["choices"][0]["message"]["content"]
    cut = served.chat(stop=whole[5:8])[1]["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (whole[: whole.index(whole[5:8])], "stop")
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": HI[0]["content"][:9]}, {"type": "text", "text": HI[0]["content"][9:]}],
        }
    ]
    assert served.chat(parts)[1]["usage"] == served.chat()[1]["usage"]
    by = [served.chat([{"role": role, "content": "One word."}, *HI])[1]["usage"] for role in ("system", "developer")]
    assert by[0] == by[1]


BAD = {
    "no JSON": (b'{"messages":', 400, "no JSON"),
    "no object": (b"[]", 400, "a JSON object"),
    "no messages": (b"{}", 400, "messages: Field required"),
    "nothing said": (b'{"messages": []}', 400, "messages"),
    "half a character": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogates not allowed"),
    "no UTF-8": (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, "no JSON"),
    "deep": (b"[" * 200_000, 400, "no JSON"),
    "large": (b" " * (server.MAX_BODY_BYTES + 1), 413, "at most"),
    "a picture": (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400, "no pictures"),
    "a tool's answer": (b'{"messages": [{"role": "tool", "content": "x"}]}', 400, "messages.0.role"),
    "tools": (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}', 400, "tools is not supported"),
    "JSON mode": (b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}', 400, "response_format"),
    "two answers": (b'{"messages": [{"role": "user", "content": "x"}], "n": 2}', 400, "n is not supported"),
    "cold": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400, "temperature"),
    "too hot": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "finite"),
    "nothing wanted": (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', 400, "max_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_an_error_in_openais_shape(served, name):
    content, status, words = BAD[name]
    found, said = served.call("POST", "/v1/chat/completions", content)
    assert found == status and words in said["error"]["message"] and said["error"]["type"] == "invalid_request_error"
    assert said["error"].keys() == {"message", "type", "param", "code"} and str(ROOT) not in said["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_400_streamed_or_not(served, stream):
    status, said = served.chat([{"role": "user", "content": "word " * 2000}], stream=stream)
    assert status == 400 and said["error"]["code"] == "context_length_exceeded"
    assert "1024" in said["error"]["message"]


def test_what_is_not_there_is_json_too(served):
    assert [served.call(*call)[0] for call in [("GET", "/"), ("GET", "/docs"), ("GET", "/v1/models/x"), ("GET", "/v1/completions")]] == [404, 404, 404, 405]  # fmt: skip
    assert served.call("POST", "/v1/completions", {"prompt": ""})[0] == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example:80", ""]
)
def test_a_name_that_a_site_gave_to_this_address_is_refused(served, host):
    status, said = served.call("POST", "/v1/chat/completions", {"messages": HI}, Host=host)
    assert (status, said["error"]["code"]) == (403, "wrong_host")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1@evil.example"]
)
def test_a_page_of_another_site_may_not_ask(served, origin):
    for method, more in (("POST", {}), ("OPTIONS", {"Access_Control_Request_Method": "POST"})):
        status, said = served.call(method, "/v1/chat/completions", {"messages": HI}, Origin=origin, **more)
        assert (status, said["error"]["code"]) == (403, "wrong_origin")
        assert not [name for name in served.headers if name.lower().startswith("access-control")]


def test_a_page_of_this_machine_may_and_is_named(served):
    status, _ = served.call("GET", "/v1/models", Origin="http://localhost:3000", Host=f"localhost:{served.port}")
    allowed = {name.lower(): value for name, value in served.headers.items()}
    assert status == 200 and allowed["access-control-allow-origin"] == "http://localhost:3000"
    assert "access-control-allow-credentials" not in allowed


def test_many_requests_at_a_time_stand_in_line_and_get_their_own_answers(served):
    questions = [f"Say the number {i}." for i in range(8)]
    alone = [
        served.chat([{"role": "user", "content": q}], max_tokens=6)[1]["usage"]["prompt_tokens"] for q in questions
    ]
    found: dict[str, tuple] = {}

    def ask(question: str) -> None:
        found[question] = Served.chat(served, [{"role": "user", "content": question}], max_tokens=6)

    threads = [threading.Thread(target=ask, args=(q,)) for q in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[q][0] for q in questions] == [200] * 8
    assert [found[q][1]["usage"]["prompt_tokens"] for q in questions] == alone


def test_nothing_is_served_on_a_port_that_is_taken(served, version):
    with refuses("serve.port_in_use") as caught:
        server.run_server(version, port=served.port)
    assert f"port {served.port} of 127.0.0.1" in caught.value.message
    assert f"PORT={served.port + 1}" in caught.value.hint


def test_a_model_whose_prompts_are_not_the_manifests_is_not_served(version, monkeypatch, capsys):
    tokenize = conversation.llama_runtime.tokenize
    monkeypatch.setattr(
        conversation.llama_runtime, "tokenize", lambda model, text: [model.token_bos(), *tokenize(model, text)]
    )
    with refuses("serve.wrong_prompt"):
        server.run_server(version, port=free_port())
    assert "serving" not in capsys.readouterr().out


# Others than this machine


def test_other_machines_are_let_in_with_a_key_only(version):
    door = ["--host", "0.0.0.0", "--port", str(free_port())]
    alone = subprocess.run(command(version, *door), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert alone.returncode == 2 and "HOST=0.0.0.0" in alone.stderr and "FERRY_API_KEY is not set" in alone.stderr
    with contextlib.closing(Served(version, "--host", "0.0.0.0", FERRY_API_KEY="sésame")) as open_one:
        assert '"$FERRY_API_KEY"' in open_one.greeting[1]
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
            status, said = open_one.call("GET", "/v1/models", Host="mac.local", **given)
            assert (status, said["error"]["type"]) == (401, "authentication_error")
        assert open_one.call("GET", "/v1/models", Host="mac.local", Authorization="Bearer sésame".encode())[0] == 200
        page = {"Origin": "http://localhost:3000", "Access_Control_Request_Method": "POST"}
        assert open_one.knock("OPTIONS", "/v1/chat/completions", **page) == 200, (
            "a browser asks first, and without the key"
        )
        code, out, err = open_one.end()
        assert (code, out, err) == (0, "", "")


# Answers that nobody waits for


LONG = {"prompt": "one, two, three, one, two, three, " * 5, "max_tokens": 250}  # the model goes on with that to the end


def slow(served: Served, **more) -> socket.socket:
    """A connection on which a long answer was asked for."""
    content = json.dumps(LONG | more).encode()
    connection = socket.create_connection(("127.0.0.1", served.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.fixture
def patient(talkative) -> Iterator[Served]:
    with contextlib.closing(Served(talkative)) as running:
        yield running


def test_a_client_that_goes_away_stops_its_answer(patient):
    started = time.monotonic()
    assert patient.call("POST", "/v1/completions", LONG)[1]["usage"]["completion_tokens"] == 250
    whole = time.monotonic() - started
    for stream in (True, False):
        leaving, waiting = slow(patient, stream=stream), slow(patient, stream=stream)
        time.sleep(whole / 20)
        leaving.close()
        waiting.close()  # still in line
        started = time.monotonic()
        assert patient.chat(max_tokens=1)[0] == 200
        assert time.monotonic() - started < whole / 2, "it did not wait for the end of what nobody reads"
    assert patient.end() == (0, "", "")


@pytest.mark.parametrize("stream", [True, False])
def test_ctrl_c_ends_it_in_the_middle_of_answers(patient, stream):
    asked = [slow(patient, stream=stream) for _ in range(3)]
    if stream:
        assert re.match(rb"HTTP/1.1 200 OK", asked[0].recv(4096))
    else:
        time.sleep(0.5)
    assert patient.end() == (0, "", "")
    for connection in asked:
        said = connection.makefile("rb").read()
        assert said.count(b'"text"') < LONG["max_tokens"] and b'"completion_tokens":250' not in said
        connection.close()


def test_a_client_that_goes_away_in_the_middle_of_its_question_is_no_event(patient):
    with socket.create_connection(("127.0.0.1", patient.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(0.3)
    assert patient.chat(max_tokens=1)[0] == 200 and patient.end() == (0, "", "")


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "x" * 70 + ".example"])
def test_a_host_that_is_none_of_this_machine_is_said(host):
    with refuses("serve.invalid_host") as caught:
        server.open_socket(host, 8080)
    assert f"port 8080 of {host}" in caught.value.message and "HOST=" in caught.value.hint


def test_the_last_port_has_no_next_one():
    with socket.create_server(("127.0.0.1", 65535)), refuses("serve.port_in_use") as caught:
        server.open_socket("127.0.0.1", 65535)
    assert "PORT=8080" in caught.value.hint


def test_a_key_that_no_header_can_carry_is_refused(version):
    settings = os.environ | {"FERRY_API_KEY": "a\udcffb"}
    door = ["--port", str(free_port())]
    done = subprocess.run(command(version, *door), cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "FERRY_API_KEY has characters" in done.stderr
