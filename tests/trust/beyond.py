"""S11: whatever goes beyond a limit is refused with 4xx before any work of the model, over a socket, at the door and
the limits that `pagemill serve` has.

Refused before the model's work: the engine has run no step and let no request in, and, but for what only the tokeniser
or the template can tell, neither of these two was asked. Each with the status that its limit has, too: 4xx, but 503 for
a connection too many; and a client that does not read is answered by no status, its connection is cut.

Times are judged at the release size alone: a refusal is there within SOON_S of the request, and, where time itself is
the limit, of its end. Not judged are a template's instructions, output and memory, for the work up to such a limit is
part of it, and a client that does not read, which no answer reaches.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
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
NUM_TIMED = 5  # requests beyond each limit, whose median is judged
TEMPLATE_S = 0.1  # for the case of a template that takes too long
CUTS = "pagemill:http_connections_cut"
LIMITS = Limits(
    max_connections=24, header_timeout_s=0.4, body_timeout_s=0.4, write_timeout_s=0.4, max_url_bytes=1000
).for_model(CONTEXT)
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# Templates of an operator that do not end, write too much, or ask for too much memory; name -> a word of the refusal.
TEMPLATES = {
    "template instructions": ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "instr"),
    "template time": (
        "{% set s = 'x ' * 99999 %}{% for a in range(99999) %}{% set b = s|replace('x', 'y') %}{% endfor %}",
        f"{TEMPLATE_S} s",
    ),
    "template output": ("{% for a in range(9000) %}{{ 'x' * 9000 }}{% endfor %}", "characters"),
    "template memory": ("{% for a in range(99999) %}" + "x" * 900_000 + "{% endfor %}", "memory"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """What goes beyond one limit. name: of the limit. told: a word of the refusal. asks: what may be asked before it is
    found: "tokeniser" or "template". status: of the refusal. timer_s: time that is the limit itself; None where work up
    to the limit is part of it, so that its time is not judged. prepare: asked first, apart."""

    name: str
    told: str
    send: Callable[[Bench], httpx.Response]
    asks: str = ""
    status: int = 400
    timer_s: float | None = 0.0
    prepare: Callable[[Bench], object] | None = None


class Bench:
    """A server, its keys and counters. Mutated by requests. clients: by the name of their key. num_asked: of the
    tokeniser and the template. began_s: when the last request was sent, on `time.perf_counter`."""

    def __init__(self, live: LiveServer, keys: dict[str, str], metrics: Metrics) -> None:
        self.live = live
        self.clients = {name: live.client(headers={"authorization": f"Bearer {key}"}) for name, key in keys.items()}
        self.client = self.clients["wide"]
        self.num_asked = {"tokeniser": 0, "template": 0}
        self.began_s = 0.0
        self._metrics = metrics

    @property
    def authorization(self) -> bytes:
        """The header's line."""
        return f"authorization: {self.client.headers['authorization']}\r\n".encode()

    def work(self) -> tuple[int, int]:
        """Steps that the engine has run, and requests that it has let in."""
        return self.live.call(lambda engine: (engine.stats().num_steps, engine._num_requests))

    def num_unread_cut(self) -> int:
        """Connections cut since their client did not read."""
        return int(sum(each.value for each in self._metrics[CUTS].samples() if each.labels == ("read",)))

    def post(self, path: str, body: Any, key: str = "wide", **headers: str) -> httpx.Response:
        """A request of JSON."""
        data = json.dumps(body).encode()
        self.began_s = time.perf_counter()
        return self.clients[key].post(path, content=data, headers={"content-type": "application/json", **headers})

    def raw(self, *pieces: bytes) -> httpx.Response:
        """What is sent as it is, and the status of what comes back."""
        self.began_s = time.perf_counter()
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
        timer_s = TEMPLATE_S if name == "template time" else None
        yield Case(
            name, told, lambda bench, template=template: _rendered(bench, template), "template",  # type: ignore[misc]
            timer_s=timer_s, prepare=_ask_right,  # it starts the process that renders
        )  # fmt: skip
    yield from _of_keys()
    yield Case("max_connections", "", _one_connection_more, status=503)


def _of_keys() -> Iterator[Case]:
    """What a key may use: each of its requests before the one that is refused has used it up."""
    yield Case("max_streams of a key", "under way", _second_stream, status=429)
    for name, told in (("requests", "requests a minute"), ("tokens", "tokens a minute")):
        yield Case(
            f"{name}_per_minute of a key", told, lambda bench, key=name: _ask_right(bench, key),  # type: ignore[misc]
            status=429, prepare=lambda bench, key=name: _ask_right(bench, key),  # type: ignore[misc]
        )  # fmt: skip


def _ask_right(bench: Bench, key: str = "wide") -> httpx.Response:
    return bench.post(CHAT, _with({}, CHAT), key)


def _prompts() -> Iterator[Case]:
    ids, text = {"prompt": [1] * (CONTEXT + 1)}, {"prompt": "a" * (16 * CONTEXT + 1)}
    message = {"messages": [{"role": "user", "content": "a" * (16 * CONTEXT + 1)}]}
    yield Case("max_prompt_tokens", "tokens", lambda b: b.post(COMPLETIONS, _with(ids, COMPLETIONS)))
    yield Case("max_prompt_chars", "characters", lambda b: b.post(COMPLETIONS, _with(text, COMPLETIONS)), status=413)
    yield Case("max_prompt_chars", "characters", lambda b: b.post(CHAT, _with(message, CHAT)), status=413)
    many = "7#q" * (5 * CONTEXT)  # tokens of few characters each: within the characters, beyond the context
    long, turns = {"prompt": many}, {"messages": [{"role": "user", "content": many}]}
    yield Case(
        "prompt tokens of a text", "tokens", lambda b: b.post(COMPLETIONS, _with(long, COMPLETIONS)), "tokeniser"
    )
    yield Case("prompt tokens of messages", "tokens", lambda b: b.post(CHAT, _with(turns, CHAT)), "template")


def _heads() -> Iterator[Case]:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    large = f"content-length: {LIMITS.max_body_bytes + 1}\r\n\r\n".encode()
    endless = head + b"x: " + b"a" * (LIMITS.max_header_bytes + LIMITS.max_url_bytes - len(head) - 2)
    many = {f"x-{at}": "a" for at in range(101)}
    started, timer_s = b"content-length: 9\r\n\r\n{", LIMITS.body_timeout_s
    for name, told, send, status in (
        ("max_header_bytes", "headers have", lambda b: b.post(COMPLETIONS, {}, x=LIMITS.max_header_bytes * "a"), 431),
        ("max_header_bytes", "", lambda b: b.raw(endless), 431),  # cut below HTTP, by the byte that is too much
        ("max_headers", "headers;", lambda b: b.post(COMPLETIONS, {}, **many), 431),
        ("max_url_bytes", "address", lambda b: b.post(f"{COMPLETIONS}?{'a' * 1000}", {}), 414),
        ("max_body_bytes", "bytes", lambda b: b.raw(head, b.authorization, large), 413),  # none of it is waited for
        ("compressed bodies", "compressed", lambda b: b.post(COMPLETIONS, {}, **{"content-encoding": "gzip"}), 415),
    ):
        yield Case(name, told, send, status=status)
    yield Case("header_timeout_s", "", lambda b: b.raw(head), status=408, timer_s=LIMITS.header_timeout_s)
    yield Case("body_timeout_s", "faster", lambda b: b.raw(head, b.authorization, started), status=408, timer_s=timer_s)


def _rendered(bench: Bench, template: str) -> httpx.Response:
    """A conversation through an operator's template."""
    service = bench.live.service
    before, service.settings = service.settings, replace(service.settings, chat_template=template)
    most_s = TEMPLATE_S if template == TEMPLATES["template time"][0] else chat.RENDER_TIMEOUT_S
    try:
        with patch.object(chat, "RENDER_TIMEOUT_S", most_s):
            return _ask_right(bench)
    finally:
        service.settings = before


def _second_stream(bench: Bench) -> httpx.Response:
    """A second request of a key that may have one, while its first is still being sent."""

    def unfinished() -> Iterator[bytes]:
        yield b"{"
        opened.append(_ask_right(bench, "streams"))
        took.append(time.perf_counter() - bench.began_s)
        yield b"}"

    opened: list[httpx.Response] = []
    took: list[float] = []
    bench.clients["streams"].post(COMPLETIONS, content=unfinished())
    bench.began_s = time.perf_counter() - took[0]
    return opened[0]


def _one_connection_more(bench: Bench) -> httpx.Response:
    """What one connection more than there may be is told, before it asks; then there is room again."""
    held = [socket.create_connection(("127.0.0.1", bench.live.port)) for _ in range(LIMITS.max_connections)]
    try:
        refused = bench.raw()
        took_s = time.perf_counter() - bench.began_s
    finally:
        for each in held:
            each.close()
    with bench.live.client() as client:
        if not wait_until(lambda: client.get("/health").status_code == 200):
            return httpx.Response(200, text="no room came back")
    bench.began_s = time.perf_counter() - took_s
    return refused


@contextmanager
def bench(limits: Limits = LIMITS) -> Iterator[Bench]:
    """A server with door, limits and guarded connections, that has answered once."""
    metrics, keys, entries = Metrics("tiny"), {}, []
    for name, limit in (
        ("wide", {}),
        ("streams", {"max_streams": 1}),
        ("requests", {"requests_per_minute": 1}),
        ("tokens", {"tokens_per_minute": 1}),
    ):
        keys[name], id, sha256 = make_key()
        entries.append(KeyEntry(name, id, sha256, tenant=name, **limit))
    ring = KeyRing(None, entries, MonotonicClock())
    wrappers = [
        lambda app: Door(app, ring, metrics, hosts=HostCheck(None)),
        lambda app: BodyLimits(app, lambda: limits, metrics),
    ]
    with (
        tempfile.TemporaryDirectory() as directory,
        LiveServer(
            str(tiny_llama(Path(directory), context=CONTEXT)),
            wrappers=wrappers,
            protocol=guarded_protocol(limits, metrics),
        ) as live,
    ):
        made = Bench(live, keys, metrics)
        for path in (COMPLETIONS, CHAT):
            assert made.post(path, _with({}, path)).status_code == 200
        with ExitStack() as stack, _counted(made, live):
            for client in made.clients.values():
                stack.enter_context(closing(client))
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
    if case.prepare is not None:
        case.prepare(made)
    work, asked = made.work(), dict(made.num_asked)
    answer = case.send(made)
    took_s = time.perf_counter() - made.began_s
    if answer.status_code != case.status:
        return f"{case.name}: answered with {answer.status_code} {answer.text[:200]}", took_s
    if case.told not in answer.text:
        return f"{case.name}: refused for something else: {answer.text[:200]}", took_s
    if made.work() != work:
        return f"{case.name}: the engine had work of it", took_s
    for name, before in asked.items():
        if made.num_asked[name] != before and name != case.asks:
            return f"{case.name}: the {name} was asked", took_s
    return "", took_s


def reads_nothing(made: Bench, patience_s: float = 60.0) -> str:
    """What is wrong where a client does not read an answer that no buffer holds: the engine works for it and ends, and
    so long after that its connection has been cut."""
    before, num_let_in = made.num_unread_cut(), made.work()[1]
    body = json.dumps({"prompt": [[7] * (CONTEXT - 2)] * 12, "max_tokens": 1, "prompt_logprobs": 20}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n".encode()
    head += made.authorization + b"content-type: application/json\r\n\r\n"
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", made.live.port))
        reader.sendall(head + body)
        if not wait_until(lambda: made.work()[1] > num_let_in, 60):
            return "write_timeout_s: the client that does not read was not let in"
        if not wait_until(lambda: not made.live.call(lambda engine: engine.has_unfinished), 60):
            return "write_timeout_s: the engine still works for a client that does not read"
        if not wait_until(lambda: made.num_unread_cut() > before, patience_s):
            return "write_timeout_s: a client that does not read was not cut"
    return ""


def count() -> Figure:
    """Every limit."""
    wrong, num_trials, names = [], 0, {"write_timeout_s"}
    with bench() as made:
        for case in cases():
            wrong.append(wrong_with(made, case)[0])
            num_trials += 1
            names.add(case.name)
        wrong.append(reads_nothing(made))
        num_trials += 1
        if made.post(COMPLETIONS, _with({}, COMPLETIONS)).status_code != 200:
            wrong.append("nothing is answered any more")
    wrong += [f"{name}: has no test" for name in sorted({each.name for each in fields(Limits)} - names)]
    wrong = [each for each in wrong if each]
    chat._renderer.close()
    return Figure(
        "S11", "requests beyond a limit let in", len(wrong), num_trials, "requests", {"limits": len(names)}, wrong
    )


def soon(num_times: int = NUM_TIMED) -> Figure:
    """Which refusals come too late: of each case the median of so many."""
    found: list[tuple[float, str]] = []
    with bench() as made:
        for at, case in enumerate(cases()):
            if case.timer_s is not None:
                took = [wrong_with(made, case)[1] - case.timer_s for _ in range(num_times)]
                found.append((median(took), f"{case.name} ({at})"))
    chat._renderer.close()
    late = [f"{name}: {1000 * took_s:.0f} ms" for took_s, name in found if took_s >= SOON_S]
    also = {"ms of the slowest": round(1000 * max(found)[0])}
    unit = f"cases, each the median of {num_times} requests"
    return Figure("S11", f"refusals that come {1000 * SOON_S:.0f} ms late", len(late), len(found), unit, also, late)


def shard(_number: int) -> list[Figure]:
    """The release size."""
    return [count(), soon()]
