"""Hostile requests against a server that watches itself: whatever comes, it answers below 500, keeps answering, and
runs no code, unpickles nothing and starts no process (S9, S14)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.fixtures.watched_server import audit_reports, watched_server

NUM_CASES = int(os.environ.get("PAGEMILL_HOSTILE_CASES", "150"))
ROUTES = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
SETTINGS = settings(
    max_examples=NUM_CASES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    with watched_server(tmp_path_factory.mktemp("hostile"), tiny_model) as process:
        yield process


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
numbers = st.integers(-3, 40) | st.floats(allow_nan=False, allow_infinity=False) | st.integers()
texts = st.text(max_size=60) | st.sampled_from(["<|im_end|>", "\x00", "\ud800x", "a" * 3000, "🦙" * 50, "{{7*7}}"])
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": texts | anything}
)
fields = {
    "max_tokens": st.integers(1, 6), "temperature": numbers, "top_p": numbers, "top_k": numbers, "n": numbers,
    "seed": numbers, "stop": texts | st.lists(texts, max_size=4), "logprobs": numbers | st.booleans(),
    "stream": st.booleans(), "stream_options": anything, "logit_bias": anything, "response_format": anything,
    "guided_regex": texts, "guided_json": anything, "tools": anything, "tool_choice": anything, "cache": anything,
    "prompt_cache_options": anything, "prompt_cache_retention": anything, "cache_salt": texts, "priority": numbers,
    "presence_penalty": numbers, "repetition_penalty": numbers, "min_tokens": numbers, "echo": st.booleans(),
    "stop_token_ids": anything, "prompt_logprobs": numbers, "deadline_s": numbers, "model": st.just("tiny") | texts,
    "user": texts, "chat_template": texts, "chat_template_kwargs": anything, "metadata": anything,
}  # fmt: skip
bodies = st.fixed_dictionaries(
    {
        "prompt": texts | st.lists(st.integers(0, 300), max_size=20) | anything,
        "messages": st.lists(message, max_size=3),
    },
    optional={**fields, "tokens": st.lists(numbers, max_size=10)},
)


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")


def check(answer: httpx.Response) -> None:
    """Below 500 but for 503, and an error says what is wrong in OpenAI's shape."""
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


@SETTINGS
@given(path=st.sampled_from(ROUTES), body=bodies)
def test_no_body_of_known_fields_breaks_the_server(watched: ServeProcess, path: str, body: dict[str, Any]) -> None:
    with watched.client() as client:
        check(client.post(path, content=encoded(body), headers={"content-type": "application/json"}))


@SETTINGS
@given(path=st.sampled_from(ROUTES), body=anything, kind=st.sampled_from(["application/json", "text/plain", ""]))
def test_no_json_breaks_the_server(watched: ServeProcess, path: str, body: Any, kind: str) -> None:
    with watched.client() as client:
        check(client.post(path, content=encoded(body), headers={"content-type": kind}))


@SETTINGS
@given(path=st.sampled_from(ROUTES), body=st.binary(max_size=200))
def test_no_bytes_break_the_server(watched: ServeProcess, path: str, body: bytes) -> None:
    with watched.client() as client:
        check(client.post(path, content=body, headers={"content-type": "application/json"}))


PICKLES = [
    b"cos\nsystem\n(S'true'\ntR.",
    b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94",
]


@pytest.mark.parametrize("payload", PICKLES)
@pytest.mark.parametrize("path", ROUTES)
def test_a_pickle_is_bytes_like_any_other(watched: ServeProcess, path: str, payload: bytes) -> None:
    with watched.client() as client:
        for kind in ("application/json", "application/octet-stream", "application/x-pickle"):
            check(client.post(path, content=payload, headers={"content-type": kind}))


@pytest.mark.parametrize("text", ["{{ ''.__class__.__mro__ }}", "{% for x in range(10**9) %}{% endfor %}", "{{ 7*7 }}"])
def test_a_template_in_a_message_is_text(watched: ServeProcess, text: str) -> None:
    with watched.client() as client:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        body["chat_template"] = text
        assert client.post("/v1/chat/completions", json=body).status_code == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"A" * 5000 + b"\r\n\r\n",
        b"POST /x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nZZZ\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"GET /%00%ff/../health HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET http://[::1 HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\nx: \x00\r\n\r\n", b"\r\n" * 100,
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_hardly_http_is_answered_or_cut(watched: ServeProcess, raw: bytes) -> None:
    import socket

    host, port = watched.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        try:
            answer = connection.recv(65536)
        except ConnectionResetError:
            answer = b""
    assert b" 500 " not in answer.split(b"\r\n")[0]


def test_the_server_lives_and_has_done_nothing_that_it_must_not(watched: ServeProcess) -> None:
    with watched.client() as client:
        assert client.get("/health").json()["status"] == "ready"
        assert client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2}).status_code == 200
    assert watched.process.poll() is None
    assert audit_reports(watched) == []


def test_the_watch_sees_each_of_these_things(tmp_path: Path) -> None:
    """The positive control of the hook."""
    import subprocess
    import sys

    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.fixtures.audit_server import watch
arm = Path({str(tmp_path / "arm")!r})
watch(arm); arm.touch()
while not arm.with_suffix(".armed").exists(): time.sleep(0.01)
import pickle, marshal, subprocess, os
compile("1", "x", "eval"); eval("1"); pickle.loads(pickle.dumps(os.getcwd)); marshal.loads(marshal.dumps(1))
os.system("true"); subprocess.run(["true"])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    for event in ("compile", "exec", "pickle.find_class", "marshal.loads", "os.system", "subprocess.Popen"):
        assert f"AUDIT {event}" in ended.stderr, event
