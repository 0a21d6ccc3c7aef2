"""Chat templates: the same text as Jinja gives, limits on hostile ones, errors that say what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

from pagemill.base.errors import ModelError, RequestError
from pagemill.text import chat
from pagemill.text.chat import render_chat

NOW = datetime(2026, 3, 4, 5, 6)
USER = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": '  What is <b>"1 & 2"</b>?\n'},
    {"role": "assistant", "content": "three\n\n"},
    {"role": "user", "content": "Sure? é😀 {{ 7 }} {% raw %}"},
]

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "brackets": """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + message.content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ message['content'].rstrip() ~ eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "headers": """\
{% set ns = namespace(count=0, last=none) %}
{% macro header(role, mark='#') -%}
{{ mark }}{{ role | upper }}:
{%- endmacro %}
Today: {{ strftime_now('%d %b %Y') }}
{% for m in messages if m.role != 'system' %}
    {% set ns.count = ns.count + 1 %}
    {% set ns.last = m %}
{{ header(m.role) }} {{ m['content'] | trim }}{{ '' if loop.last else '|' }}
{% else %}
nothing
{% endfor %}
{{ ns.count }} {{ ns.last.role }} {{ ns.last is mapping }} {{ header('x', mark='*') }}
""",
    "tools": """\
{%- if tools is defined and tools %}
{%- for tool in tools %}
{{ tool | tojson }}
{{ tool.function | tojson(indent=2) }}
{%- for name, value in tool.function.parameters.items() %} {{ name }}={{ value.get('type', 'any') }}{% endfor %}
{%- endfor %}
{%- endif %}
{%- for m in messages | selectattr('role', 'equalto', 'user') | list %}{{ m.content.split(' ')[0] }};{% endfor %}
{{ messages | map(attribute='role') | join(', ') }} {{ messages[-1]['content'].startswith('Sure') }}
{{ messages[::-1][0].role }} {{ 'yes' if 'user' in ['user'] else 'no' }} {{ nothing | default('-') }}
""",
    "control": """\
{%- for m in messages %}
{%- if m.role == 'system' %}{% continue %}{% endif %}
{%- if loop.index > 3 %}{% break %}{% endif %}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{%- endfor %}
{{ '\\t' }}{# a comment #}{{ undefined_name }}{{ true and none is none }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 'a' * 3 }}
""",
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"city": {"type": "string"}, "<z>": {}}, "description": "é"},
    }
]


class Generation(jinja2.ext.Extension):
    """transformers' tag around what the assistant said; for text it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def oracle(template: str, messages: list[dict[str, str]], **variables: Any) -> str:
    """As transformers renders a template."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    return environment.from_string(template).render(messages=messages, **variables)


@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[1:2]], ids=["system", "no-system", "one"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_with_jinja(name: str, messages: list[dict[str, str]]) -> None:
    variables: dict[str, Any] = {"tools": TOOLS} if name == "tools" else {}
    for prompt in (True, False):
        ours = render_chat(
            TEMPLATES[name],
            messages,
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
            now=NOW,
            **variables,
        )
        expected = oracle(
            TEMPLATES[name], messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>", **variables
        )
        assert ours == expected


def test_the_default_models_form() -> None:
    assert render_chat(CHATML, USER) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_are_data_and_never_template() -> None:
    assert render_chat("{{ messages[0].content }}", [{"role": "user", "content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


def test_further_keys_of_a_message_reach_the_template() -> None:
    assert render_chat("{{ messages[0].name }}", [{"role": "user", "content": "", "name": "Ann"}]) == "Ann"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "no messages"),
        (["hi"], "message 0 is str"),
        ([{"content": "hi"}], "message 0 has no 'role'"),
        ([{"role": "user"}], "message 0 has no 'content'"),
        ([*USER, {"role": "user", "content": None}], "'content' of message 1 is NoneType"),
        ([{"role": 3, "content": "hi"}], "'role' of message 0 is int"),
        ([{"role": "", "content": "hi"}], "'role' of message 0 is empty"),
        ([{"role": "user", "content": "hi", "extra": object()}], "cannot be handed"),
        ([{"role": "user", "content": "hi", "extra": float("nan")}], "cannot be handed"),
        ([{"role": "user", "content": "a\ud800"}], "surrogate"),
        ([{"role": "user", "content": "x" * 2**24}], "give up to"),
    ],
)
def test_malformed_messages_are_refused(messages: list[Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        render_chat(CHATML, messages)


def test_a_model_without_template_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"no chat template.*give a template"):
        render_chat(None, USER)


def test_a_refusal_of_the_template_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        render_chat(TEMPLATES["brackets"], [USER[0], USER[0]])


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(ModelError, match="syntax error in line 3"):
        render_chat("a\nb\n{% if %}", USER)


def test_a_failure_on_these_messages_names_its_line() -> None:
    with pytest.raises(RequestError, match="failed in line 2"):
        render_chat("a\n{{ messages[0].missing.deeper }}", USER)


DOUBLING = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "instructions"),
        ("{% for i in range(50000) %}" + "x" * 100 + "{% endfor %}", "wrote more than"),
        (
            DOUBLING,
            "memory|instructions",
        ),  # since minijinja 3.1 what a filter or operator writes counts as instructions
        ("{{ 'x' | indent(1000000000, true) }}", "memory|instructions"),
        ("{% for i in range(99999) %}{% for j in range(9) %}" + "x" * 900000 + "{% endfor %}{% endfor %}", "memory"),
        ("{% include 'secrets.txt' %}", "another file"),
        ("{% extends 'secrets.txt' %}", "another file"),
        ("{% if true %}" * 5000, "syntax error"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "syntax error"),
        ("x" * (2**20 + 1), "up to 1,048,576"),
        ("\udc00", "not Unicode text"),
    ],
    ids=[
        "loop",
        "output",
        "doubling",
        "indent",
        "text",
        "include",
        "extends",
        "blocks",
        "brackets",
        "size",
        "unicode",
    ],
)
def test_hostile_templates_are_stopped_and_the_next_one_works(
    template: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "RENDER_TIMEOUT_S", 60.0)  # not the clock's turn, however busy the machine
    with pytest.raises(ModelError, match=says):
        render_chat(template, USER)
    assert render_chat("{{ messages[0].content }}", USER) == "hi"


def test_a_long_conversation_has_instructions_for_all_of_it() -> None:
    """Several filters and operators over each character, of the longest messages that are taken."""
    template = (
        "{% for m in messages %}{% set x = m.content | trim | upper | replace('B', 'C') %}"
        "{{ '<' + m.role + '>' + x + '</s>' }}{% endfor %}"
    )
    text = "ab " * (chat.MAX_MESSAGES_BYTES // 8)
    written = render_chat(template, [{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    assert written == "".join(f"<{role}>{text.strip().upper().replace('B', 'C')}</s>" for role in ("user", "assistant"))


def test_slow_instructions_are_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "RENDER_TIMEOUT_S", 0.2)
    doubled = DOUBLING.replace("40", "21")
    slow = "{% for i in range(9000) %}{{ ns.x | replace('a', 'ba') | replace('b', 'a') | length }}{% endfor %}"
    with pytest.raises(ModelError, match=r"within 0\.2 s"):
        render_chat(doubled + slow, USER)
    monkeypatch.undo()
    assert render_chat("{{ messages[0].content }}", USER) == "hi"


def test_endless_recursion_is_stopped() -> None:
    with pytest.raises(RequestError, match="recursion limit"):
        render_chat("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", USER)


@pytest.mark.parametrize(
    "expression",
    [
        "strftime_now.__globals__",
        "raise_exception.__builtins__",
        "messages.__class__",
        "messages[0].keys.__self__",
        "messages[0] | attr('__class__')",
        "messages[0]['content'].__class__",
    ],
)
def test_templates_reach_no_python_internals(expression: str) -> None:
    assert render_chat(f"{{{{ {expression} }}}}", USER) == ""


def test_a_template_cannot_change_the_callers_messages() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert render_chat("{{ messages[0].update({'content': 'no'}) }}{{ messages[0].content }}", messages).endswith("no")
    assert messages == USER


def test_a_killed_process_is_started_again() -> None:
    render_chat("a", USER)
    process = chat._renderer._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert render_chat("b", USER) == "b"


def test_the_process_is_given_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMILL_API_KEY", "canary-key")
    if (running := chat._renderer._process) is not None:
        running.kill()
        running.wait()
    assert render_chat("a", USER) == "a"
    process = chat._renderer._process
    assert process is not None
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        environment = file.read()
    assert b"PATH=" in environment
    assert b"canary-key" not in environment


@pytest.mark.parametrize("warm", [True, False])
def test_an_interrupted_render_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch, warm: bool) -> None:
    """Ctrl-C after the request was written, while a template renders (warm) or while the process starts."""
    exchange = chat._exchange

    def interrupted(process: Any, request: bytes, timeout_s: float) -> bytes:
        os.write(process.stdin.fileno(), request)
        raise KeyboardInterrupt

    chat._renderer.close()
    if warm:
        render_chat("a", USER)
    monkeypatch.setattr(chat, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_chat("the first", USER)
    monkeypatch.setattr(chat, "_exchange", exchange)
    assert render_chat("the second", USER) == "the second"


def test_threads_share_the_process() -> None:
    def render(number: int) -> str:
        return render_chat("{{ messages[0].content }}", [{"role": "user", "content": str(number) * 50_000}])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, range(12))) == [str(number) * 50_000 for number in range(12)]


def test_an_interpreter_that_used_it_ends_quietly() -> None:
    program = "from pagemill.text.chat import render_chat; print(render_chat('ok', [{'role': 'u', 'content': ''}]))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
