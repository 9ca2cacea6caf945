"""A stranger's chat template gets a process with limits: it renders as everywhere, or it is refused, and nothing is left."""

import errno
import json
import os
import subprocess
import sys
import time
from datetime import datetime

import pytest

from common.errors import UserError
from contract import chat_format, template_sandbox
from pipeline.toolchain import llama_tools
from tests.helpers.commands import ROOT, refuses

HI = {"role": "user", "content": "Hi \u00e9\U0001f6a2 \ud800 \0 </s>"}
SAID = [HI, {"role": "assistant", "content": "Ahoy"}]
ASKED = [([HI], True)]
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ eos_token }}{% endfor %}{{ add_generation_prompt }}"


def refused(template: str, seconds: float = 10) -> UserError:
    """What is said of a template."""
    with pytest.raises(UserError) as caught:
        template_sandbox.render_prompts(template, ASKED, "<s>", "</s>", seconds)
    said = caught.value.message
    assert caught.value.hint == template_sandbox.TEMPLATE_HINT and said.isprintable() and len(said) < 400
    return caught.value


@pytest.fixture(autouse=True)
def children(monkeypatch):
    """All processes of a test; at its end none is alive, nor anything else in its group."""
    started, popen = [], subprocess.Popen

    def noted(*arguments, **named):
        started.append(popen(*arguments, **named))
        return started[-1]

    monkeypatch.setattr(template_sandbox.subprocess, "Popen", noted)
    yield started
    for process in tuple(started):  # `alive` starts one more
        assert process.returncode is not None
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
        assert alive(process.pid) == []


def alive(group: int) -> list[str]:
    """Processes of a group that are not dead; killed ones may wait for init to bury them."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,pid="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [pid for pgid, state, pid in rows if pgid == str(group) and not state.startswith("Z")]


# Honest templates


def test_what_is_rendered_is_what_this_process_renders(children):
    conversations = [([HI], True), (SAID, False), ([], True)]
    wanted = [chat_format.render(PLAIN, messages, "<s>", "</s>", generate) for messages, generate in conversations]
    assert template_sandbox.render_prompts(PLAIN, conversations, "<s>", "</s>") == wanted
    assert len(children) == 1, "one start for all"
    assert template_sandbox.render_prompts(PLAIN, [], "", "") == []


def test_every_template_of_llama_cpp_is_rendered_or_refused_as_in_this_process():
    found, rendered = sorted((llama_tools.tools_folder() / "models" / "templates").glob("*.jinja"))[::3], 0
    assert len(found) > 15
    for path in found:
        template = path.read_text(encoding="utf-8")
        try:
            wanted = [chat_format.render(template, SAID[:n], "<s>", "</s>", n == 1) for n in (1, 2)]
        except UserError as error:
            fault = refused(template)
            assert fault.code == "template.refused", path.name
            assert chat_format.describe_template_error(error.__cause__) in fault.message
            continue
        assert template_sandbox.render_prompts(template, [(SAID[:1], True), (SAID, False)], "<s>", "</s>") == wanted, (
            path.name
        )
        rendered += 1
    assert rendered > 10


def test_today_is_the_same_day_there(monkeypatch):
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):  # 25 hours apart
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert template_sandbox.render_prompts("{{ strftime_now('%d %H') }}", ASKED, "", "") == [
            datetime.now().strftime("%d %H")
        ]
    monkeypatch.undo()
    time.tzset()


def test_it_costs_one_start_of_python():
    best = min(timed(lambda: template_sandbox.render_prompts(PLAIN, ASKED * 10, "", "")) for _ in range(3))
    assert best < 0.4


def timed(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


# Hostile templates

HOSTILE = {
    # Python's internals
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ lipsum.__globals__['os'].popen('id').read() }}": "attribute '__globals__'",
    "{{ cycler.__init__.__globals__.os.environ }}": "attribute '__init__'",
    "{{ joiner.__init__.__globals__.os.environ }}": "attribute '__init__'",
    "{{ namespace.__init__.__globals__.os.environ }}": "attribute '__init__'",
    "{{ raise_exception.__globals__['json'] }}": "attribute '__globals__'",
    "{{ strftime_now.__globals__.datetime.x }}": "attribute '__globals__'",
    "{{ (''|attr('__class__')).__mro__ }}": "attribute '__class__'",
    "{{ ([''] | map(attribute='__class__') | first).__mro__ }}": "attribute '__class__'",
    "{{ '{0.__class__.__mro__}'.format('') }}": "attribute '__class__'",
    "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}": "attribute '__class__'",
    "{{ (self._TemplateReference__context).x }}": "_TemplateReference__context",
    "{{ self.__init__.__globals__ }}": "attribute '__init__'",
    "{{ messages.append(1) }}": "attribute 'append'",
    "{{ messages[0].update(role='x') }}": "attribute 'update'",
    # Files and variables
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}{{ os.environ }}": "no loader",
    "{% extends '/etc/passwd' %}": "no loader",
    "{{ open('/etc/passwd').read() }}": "'open' is undefined",
    "{{ os.environ.HF_TOKEN }}": "'os' is undefined",
    "{{ environ['HF_TOKEN'] }}": "'environ' is undefined",
    # Memory
    "{{ 'a' * 10**10 }}": "MemoryError",
    "{{ bos_token * 10**10 }}": "MemoryError",
    "{{ 'a' | center(10**10) }}": "MemoryError",
    "{{ [1] * 10**9 }}": "MemoryError",
    # Depth
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}": "RecursionError",
    "{{ " + "not " * 50_000 + "1 }}": "RecursionError",
    "{% for a in 'a' %}" * 30 + "{% endfor %}" * 30: "too many statically nested blocks",
    # Any other failure
    "{{ range(10**6) | list }}": "Range too big",
    "{{ 1 / 0 }}": "division by zero",
    "{{ {}['x'].y }}": "has no attribute 'x'",
    "{{ 'x' | int(base=99) + 'y'.index('z') }}": "substring not found",
    "{{ '%d' % 'x' }}": "%d format",
    "{% for": "unexpected 'end of template'",
    "{{ raise_exception('\x1b[2J\n next: run this\n' ~ 'x' * 10**6) }}": ": ?[2J next: run this xxx",
    # Text
    "{% for a in range(10) %}{{ 'x' * 1000000 }}{% endfor %}": "4,194,304 characters",
    "x" * 50_000_000: "50,000,000 characters, the limit is 1,048,576",
}  # fmt: skip


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:50])
def test_a_hostile_template_is_refused_in_one_line(template):
    if not sys.platform.startswith("linux") and HOSTILE[template] == "MemoryError":
        pytest.skip("only Linux holds a process to RLIMIT_AS")
    fault = refused(template)
    assert fault.code == ("template.too_long" if len(template) > 10**6 else "template.refused")
    assert HOSTILE[template] in fault.message


ENDLESS = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "a number": "{{ 10 ** (10 ** 9) }}",
    "a number's digits": "{{ '%1000000000d' % 1 }}",
    "output": "{% for a in range(100000) %}{% for b in range(100000) %}{{ 'x' * 10000 }}{% endfor %}{% endfor %}",
    "a slow filter": "{{ ('a ' * 10000000) | wordwrap(1) }}",
    "words": "{{ lipsum(n=100000, html=false) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name):
    started = time.perf_counter()
    fault = refused(ENDLESS[name], 0.7)
    assert time.perf_counter() - started < 2
    if fault.code == "template.timeout":
        assert "0.7 s" in fault.message
    else:
        assert fault.code == "template.refused" and "MemoryError" in fault.message


@pytest.mark.parametrize("template", ["{{ '' | attr('__class__') }}", "{{ self._TemplateReference__context }}"])
def test_an_unsafe_name_that_is_only_printed_is_nothing_here_and_there(template):
    assert template_sandbox.render_prompts(template, ASKED, "", "") == [chat_format.render(template, [HI])] == [""]


@pytest.mark.parametrize(
    "template", [t for t, words in HOSTILE.items() if len(t) < 10**6 and words not in ("MemoryError", "4,194,304 characters")],
    ids=lambda template: template[:50],
)  # fmt: skip
def test_in_this_process_too_whatever_a_template_raises_is_one_clear_error(template):
    with pytest.raises(UserError) as caught:
        chat_format.render(template, [HI])
    if caught.value.code == "template.render_failed":
        assert " user: " in caught.value.message
    else:
        assert caught.value.code == "template.not_jinja"
    assert caught.value.message.isprintable() and len(caught.value.message) < 400


# A hole in Jinja's sandbox: any Python runs in the child


@pytest.fixture
def escaped(monkeypatch):
    """escaped(code): what becomes of an answer when the child runs this code, with its limits set."""

    limits = template_sandbox.CHILD_CODE.replace(
        "sandbox.answer_parent()", "sandbox._limit_resources(int(sys.argv[2])); import os, time; "
    )

    def run(code: str, seconds: float = 5, template: str = PLAIN) -> list[str]:
        monkeypatch.setattr(template_sandbox, "CHILD_CODE", limits + f"exec({code!r})")
        return template_sandbox.render_prompts(template, ASKED, "", "", seconds)

    return run


def test_it_finds_no_variable_of_the_parent(escaped, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (found,) = escaped("print(json.dumps([json.dumps(dict(os.environ))]))")
    assert (
        json.loads(found).keys() <= {"LC_CTYPE", "__CF_USER_TEXT_ENCODING", *template_sandbox.KEPT_VARIABLES}
        and "secret" not in found
    )


def test_it_writes_no_file(escaped, tmp_path):
    (found,) = escaped(
        f"""
try:
    with open({str(tmp_path / "x")!r}, "w") as file: file.write("x" * 99999)
    print(json.dumps(["written"]))
except OSError as error: print(json.dumps([error.strerror]))"""
    )
    assert found == "File too large" and (tmp_path / "x").stat().st_size == 0


def test_it_leaves_no_trace_in_the_checkout(monkeypatch, tmp_path):
    """No compiled module either, where there is none yet."""
    for name in ("contract", "deploy"):
        (tmp_path / name).mkdir()
        for path in (ROOT / name).glob("*.py"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(template_sandbox, "ROOT", tmp_path)
    assert template_sandbox.render_prompts("{{ 1 }}", ASKED, "", "") == ["1"]
    assert sorted(tmp_path.rglob("*")) == before


BROKEN = {
    "pass": ("template.process_failed", "exit code 0"),
    "print('{')": ("template.process_failed", "exit code 0"),
    "print('[' * 10**6)": ("template.process_failed", "exit code 0"),
    "print('[1]')": ("template.process_failed", "exit code 0"),
    "print('[]')": ("template.process_failed", "exit code 0"),
    "print('{}')": ("template.process_failed", "exit code 0"),
    "sys.stdout.buffer.write(bytes([34, 255, 34]))": ("template.process_failed", "exit code 0"),
    "1 / 0": ("template.process_failed", "exit code 1"),
    "os.kill(os.getpid(), 11)": ("template.process_failed", "exit code -11"),
    "while True: sys.stdout.write('x' * 65536)": ("template.refused", "4,194,304 characters"),
    r"print(json.dumps('\x1b[31m\n' + 'x' * 10**6))": ("template.refused", ": ?[31m xxx"),
}


@pytest.mark.parametrize("code", BROKEN)
def test_no_answer_is_believed(code, escaped):
    error_code, value = BROKEN[code]
    with refuses(error_code) as caught:
        escaped(code)
    assert value in caught.value.message and caught.value.message.isprintable()
    assert len(caught.value.message) < 400


STUCK = [
    "time.sleep(60)",  # the request is never read
    "os.close(1); time.sleep(60)",  # the answer is there, the child stays
    "print('[', flush=True); time.sleep(60)",
    "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; time.sleep(60)",
    "os.fork() and os._exit(0); time.sleep(60)",  # where NPROC does not hold: a grandchild keeps the pipe open
]


@pytest.mark.parametrize("code", STUCK)
def test_what_does_not_end_is_ended(code, escaped):
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        escaped(code, 0.5, "x" * 1_000_000)
    assert time.perf_counter() - started < 2
    value = {"template.timeout": "0.5 s", "template.process_failed": "exit code "}[caught.value.code]
    assert value in caught.value.message


def test_its_processor_time_is_bounded_without_the_parent(escaped):
    """As when the parent was killed."""
    started = time.perf_counter()
    with refuses("template.process_failed") as error:
        escaped("import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass")
    assert time.perf_counter() - started < 4.5 and "exit code -" in error.value.message
    (found,) = escaped("import resource; print(json.dumps([str(resource.getrlimit(resource.RLIMIT_CPU))]))")
    assert found == "(6, 6)"


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No usable temporary directory"),
    ],
)
def test_no_room_for_the_question_is_said(monkeypatch, fault):
    monkeypatch.setattr(template_sandbox.tempfile, "TemporaryFile", lambda: (_ for _ in ()).throw(fault))
    with refuses("disk.no_temporary_file") as caught:
        template_sandbox.render_prompts(
            "{{ messages[0].content }}", [([{"role": "user", "content": "Hi"}], True)], "", ""
        )
    assert fault.strerror in caught.value.message and "TMPDIR" in caught.value.hint
