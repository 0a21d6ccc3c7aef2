"""S11: whatever goes beyond a limit is refused with 4xx before any work of the model, over a socket, at the door and
the limits that `pagemill serve` has.

Refused before the model's work: the engine has run no step and let no request in, and, but for what only the tokeniser
or the template can tell, neither of these two was asked. Wall-clock time is told and fails nothing.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from pagemill.base.clock import MonotonicClock
from pagemill.server.access import KeyRing
from pagemill.server.access_door import Door
from pagemill.server.access_keys import KeyEntry, make_key
from pagemill.server.access_listen import HostCheck
from pagemill.server.limits import Limits
from pagemill.server.limits_body import BodyLimits
from pagemill.server.limits_connection import guarded_protocol
from pagemill.telemetry.metrics import Metrics
from pagemill.text import chat
from tests.fixtures.live_server import LiveServer, wait_until
from tests.fixtures.tiny import tiny_llama
from tests.server.test_limits import BODIES
from tests.trust.figures import Figure

CONTEXT = 512
SOON_S = 0.1
LIMITS = Limits(
    max_connections=24, header_timeout_s=0.4, body_timeout_s=0.4, write_timeout_s=0.4, max_url_bytes=1000
).for_model(CONTEXT)
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# Limits that hold for connections, and are tested with them.
OF_CONNECTIONS = {"max_connections", "write_timeout_s", "header_timeout_s", "body_timeout_s"}
OF_HEADS = {"max_body_bytes", "max_header_bytes", "max_headers", "max_url_bytes"}
# Templates of an operator that do not end, write too much, or ask for too much memory; name -> a word of the refusal.
TEMPLATES = {
    "template time": ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "did not end"),
    "template output": ("{% for a in range(9000) %}{{ 'x' * 9000 }}{% endfor %}", "characters"),
    "template memory": ("{% set a = 'x' * 9999 %}{% set b = a * 9999 %}{% set c = b * 9999 %}{{ c }}", ""),
}


class Case:
    """What goes beyond one limit. name: of the limit. told: a word of the refusal. asks: what may be asked before it is
    found: "tokeniser" or "template"."""

    __slots__ = ("asks", "name", "send", "told")

    def __init__(self, name: str, told: str, send: Callable[[Bench], httpx.Response], asks: str = "") -> None:
        self.name = name
        self.told = told
        self.send = send
        self.asks = asks


class Bench:
    """A server, its keys and counters. Mutated by requests. num_asked: of the tokeniser and the template."""

    def __init__(self, live: LiveServer, key: str, narrow_key: str) -> None:
        self.live = live
        self.client = live.client(headers={"authorization": f"Bearer {key}"})
        self.narrow = live.client(headers={"authorization": f"Bearer {narrow_key}"})
        self.num_asked = {"tokeniser": 0, "template": 0}

    @property
    def authorization(self) -> bytes:
        """The header's line."""
        return f"authorization: {self.client.headers['authorization']}\r\n".encode()

    def work(self) -> tuple[int, int]:
        """Steps that the engine has run, and requests that it has let in."""
        return self.live.call(lambda engine: (engine.stats().num_steps, engine._num_requests))

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """A request of JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=data, headers={"content-type": "application/json", **headers})

    def raw(self, *pieces: bytes) -> httpx.Response:
        """What is sent as it is, and the status of what comes back."""
        with socket.create_connection(("127.0.0.1", self.live.port), timeout=30) as connection:
            for piece in pieces:
                connection.sendall(piece)
            answer = b""
            while more := connection.recv(65536):
                answer += more
        head, _, body = answer.partition(b"\r\n\r\n")
        return httpx.Response(int(head.split(b" ")[1]), content=body)


def _with(body: dict[str, Any], path: str) -> dict[str, Any]:
    """A request of a route that is right but for what `body` says."""
    if path == CHAT:
        whole = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        return whole | {name: value for name, value in body.items() if name != "prompt"}
    return {"prompt": "hi", "max_tokens": 1} | body


def cases() -> Iterator[Case]:
    """Every limit, on each route that has it."""
    for name, (_, beyond, told) in BODIES.items():
        if name in ("max_prompt_chars", "max_prompt_tokens"):
            continue
        for path in (COMPLETIONS, CHAT):
            if (path == COMPLETIONS and "messages" in beyond) or (path == CHAT and "prompt" in beyond):
                continue
            body = _with(beyond, path)
            yield Case(name, told, lambda bench, path=path, body=body: bench.post(path, body))  # type: ignore[misc]
    yield from _prompts()
    yield from _heads()
    yield Case("chat_template", "may not bring a template", lambda b: b.post(CHAT, _with({"chat_template": "x"}, CHAT)))
    for name, (template, told) in TEMPLATES.items():
        yield Case(name, told, lambda bench, template=template: _rendered(bench, template), "template")  # type: ignore[misc]
    yield Case("max_streams of a key", "under way", _second_stream)


def _prompts() -> Iterator[Case]:
    ids, text = {"prompt": [1] * (CONTEXT + 1)}, {"prompt": "a" * (16 * CONTEXT + 1)}
    message = {"messages": [{"role": "user", "content": "a" * (16 * CONTEXT + 1)}]}
    yield Case("max_prompt_tokens", "tokens", lambda b: b.post(COMPLETIONS, _with(ids, COMPLETIONS)))
    yield Case("max_prompt_chars", "characters", lambda b: b.post(COMPLETIONS, _with(text, COMPLETIONS)))
    yield Case("max_prompt_chars", "characters", lambda b: b.post(CHAT, _with(message, CHAT)))
    many = "7#q" * (5 * CONTEXT)  # tokens of few characters each: within the characters, beyond the context
    long, turns = {"prompt": many}, {"messages": [{"role": "user", "content": many}]}
    yield Case(
        "prompt tokens of a text", "tokens", lambda b: b.post(COMPLETIONS, _with(long, COMPLETIONS)), "tokeniser"
    )
    yield Case("prompt tokens of messages", "tokens", lambda b: b.post(CHAT, _with(turns, CHAT)), "template")


def _heads() -> Iterator[Case]:
    yield Case("max_header_bytes", "", lambda b: b.post(COMPLETIONS, {}, x=LIMITS.max_header_bytes * "a"))
    yield Case("max_headers", "headers", lambda b: b.post(COMPLETIONS, {}, **{f"x-{at}": "a" for at in range(101)}))
    yield Case("max_url_bytes", "address", lambda b: b.post(f"{COMPLETIONS}?{'a' * 1000}", {}))
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    large = f"content-length: {LIMITS.max_body_bytes + 1}\r\n\r\n".encode()
    yield Case("max_body_bytes", "bytes", lambda b: b.raw(head, b.authorization, large))  # none of it is waited for
    yield Case("header_timeout_s", "", lambda b: b.raw(head))
    yield Case("body_timeout_s", "faster", lambda b: b.raw(head, b.authorization, b"content-length: 9\r\n\r\n{"))
    yield Case("compressed bodies", "compressed", lambda b: b.post(COMPLETIONS, {}, **{"content-encoding": "gzip"}))


def _rendered(bench: Bench, template: str) -> httpx.Response:
    """A conversation through an operator's template."""
    service = bench.live.service
    before, service.settings = service.settings, replace(service.settings, chat_template=template)
    try:
        return bench.post(CHAT, _with({}, CHAT))
    finally:
        service.settings = before


def _second_stream(bench: Bench) -> httpx.Response:
    """A second request of a key that may have one, while its first is still being sent."""

    def unfinished() -> Iterator[bytes]:
        yield b"{"
        opened.append(bench.narrow.post(COMPLETIONS, json={"prompt": "hi", "max_tokens": 1}))
        yield b"}"

    opened: list[httpx.Response] = []
    bench.narrow.post(COMPLETIONS, content=unfinished())
    return opened[0]


@contextmanager
def bench() -> Iterator[Bench]:
    """A server with door, limits and guarded connections, that has answered once."""
    metrics, clock = Metrics("tiny"), MonotonicClock()
    (key, id, sha256), (narrow, narrow_id, narrow_sha) = make_key(), make_key()
    entries = [
        KeyEntry("wide", id, sha256, tenant="wide"),
        KeyEntry("narrow", narrow_id, narrow_sha, tenant="narrow", max_streams=1),
    ]
    ring = KeyRing(None, entries, clock)
    wrappers = [
        lambda app: Door(app, ring, metrics, hosts=HostCheck(None)),
        lambda app: BodyLimits(app, lambda: LIMITS, metrics),
    ]
    with (
        tempfile.TemporaryDirectory() as directory,
        LiveServer(
            str(tiny_llama(Path(directory), context=CONTEXT)),
            wrappers=wrappers,
            protocol=guarded_protocol(LIMITS, metrics),
        ) as live,
    ):
        made = Bench(live, key, narrow)
        for path in (COMPLETIONS, CHAT):
            assert made.post(path, _with({}, path)).status_code == 200
        with closing(made.client), closing(made.narrow), _counted(made, live):
            yield made


@contextmanager
def _counted(made: Bench, live: LiveServer) -> Iterator[None]:
    """Count what the tokeniser and the template are asked."""
    encode, chat_tokens = live.llm.encode, live.llm.chat_tokens

    async def encoding(*arguments: Any, **named: Any) -> Any:
        made.num_asked["tokeniser"] += 1
        return await encode(*arguments, **named)

    async def rendering(*arguments: Any, **named: Any) -> Any:
        made.num_asked["template"] += 1
        return await chat_tokens(*arguments, **named)

    with patch.object(live.llm, "encode", encoding), patch.object(live.llm, "chat_tokens", rendering):
        yield


def wrong_with(made: Bench, case: Case) -> tuple[str, float]:
    """What is wrong with the refusal of a case ("" for nothing), and the seconds until it was there."""
    work, asked = made.work(), dict(made.num_asked)
    began = time.perf_counter()
    answer = case.send(made)
    took = time.perf_counter() - began
    if not 400 <= answer.status_code < 500:
        return f"{case.name}: answered with {answer.status_code} {answer.text[:200]}", took
    if case.told not in answer.text:
        return f"{case.name}: refused for something else: {answer.text[:200]}", took
    if made.work() != work:
        return f"{case.name}: the engine had work of it", took
    for name, before in asked.items():
        if made.num_asked[name] != before and name != case.asks:
            return f"{case.name}: the {name} was asked", took
    return "", took


def too_many_connections(made: Bench) -> str:
    """What is wrong where more connections are open than there may be: 503 for one more, and room comes back."""
    held = [socket.create_connection(("127.0.0.1", made.live.port)) for _ in range(LIMITS.max_connections)]
    try:
        refused = made.raw()  # it is told before it asks
    finally:
        for each in held:
            each.close()
    if refused.status_code != 503:
        return f"max_connections: answered with {refused.status_code}"
    with made.live.client() as client:
        came_back = wait_until(lambda: client.get("/health").status_code == 200)
    return "" if came_back else "max_connections: no room came back"


def reads_nothing(made: Bench) -> str:
    """What is wrong where a client does not read its answer: its connection is cut, and the engine goes on."""
    body = json.dumps({"prompt": ["hi"] * 64, "echo": True, "max_tokens": 400, "ignore_eos": True, "logprobs": 20})
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n".encode()
    head += made.authorization + b"content-type: application/json\r\n\r\n"
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", made.live.port))
        reader.sendall(head + body.encode())
        free = wait_until(lambda: made.work()[1] > 0 and not made.live.call(lambda engine: engine.has_unfinished), 60)
    return "" if free else "write_timeout_s: the engine still works for a client that does not read"


def count() -> Figure:
    """Every limit."""
    wrong, num_trials, num_soon, names = [], 0, 0, set()
    with bench() as made:
        for case in cases():
            found, took = wrong_with(made, case)
            wrong += [found] if found else []
            num_trials += 1
            num_soon += took < SOON_S
            names.add(case.name)
        for name, try_it in (("max_connections", too_many_connections), ("write_timeout_s", reads_nothing)):
            found = try_it(made)
            wrong += [found] if found else []
            num_trials += 1
            names.add(name)
        if made.post(COMPLETIONS, _with({}, COMPLETIONS)).status_code != 200:
            wrong.append("nothing is answered any more")
    wrong += [f"{name}: has no test" for name in sorted({each.name for each in fields(Limits)} - names)]
    chat._renderer.close()
    also = {"limits": len(names), f"refused within {SOON_S * 1000:.0f} ms": num_soon}
    return Figure("S11", "requests beyond a limit let in", len(wrong), num_trials, "requests", also, wrong)
