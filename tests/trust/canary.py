"""S18: what a client writes is in no log, no trace, no metric, no page of the operator's and no crash text, at the
default level and at info.

A canary stands in every field of a request that can hold text, in paths and headers, in requests that are answered,
refused, left, too late and broken, and in errors of our own that quote it: raised where a request is worked on, in
threads, in tasks and callbacks of the loop, and at last in the main thread, which ends the process while it drains.
Everything that the process tells is searched for it: as text, in hexadecimal, in base64 and as token ids (`needles`).

At level info each request is a line, which tells its path and the id that its client gave it, where that is well
formed (docs/observe.md): there, and only there, a canary in them is no finding. Controls: at level debug the words of
errors are told, and a server that tells prompts in its log, its spans and its metrics (`LEAKS`) is found out.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx

from pagemill.server.access_keys import KeyEntry, make_key, write_keys
from tests.fixtures.collector import Collector
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.trust.figures import Figure
from tests.trust.needles import Needles
from tests.trust.serving import ask, connect, port_of, request_bytes, tiny_model

STEM: Final = "quaggaquartz"  # every canary begins so
KEY: Final = "a-key-that-is-long-enough"
LEVELS: Final = ("warning", "info", "error")
FORMATS: Final = ("text", "json")
PLANTED: Final = ("delta", "add", "step", "receipt", "thread", "task", "callback", "body")
CRASH: Final = "crash"
ERRORS: Final = "stderr, with the crash"
ADMIN_PAGES: Final = (
    "/metrics", "/health", "/admin/cache/stats", "/admin/cache/blocks", "/admin/cache/tree", "/admin/tenants",
    "/admin/keys", "/admin/drain",
)  # fmt: skip
PUBLIC_METRICS, DRAIN = "/metrics of the public port", "POST /admin/drain"
_SEED: Final = 9000

# In the server's process, before anything else: errors that quote the request's stop.
PLANT: Final = """
import asyncio, threading
import uvicorn
from pagemill.engine.engine import Engine
from pagemill.engine.output import Output
from pagemill.engine.scheduler import Scheduler
from pagemill.execution.runner import Runner
from pagemill.llm.async_llm import AsyncLLM
from pagemill.server import completions

crash = []

class PlantedError(RuntimeError):
    pass

def fail(text, *_):
    raise PlantedError(text)

def before(owner, method, kind, params_of, act=fail):
    inner = getattr(owner, method)
    def planted(*arguments, **named):
        for params in params_of(*arguments):
            if params.seed == SEED + KINDS.index(kind):
                act(str(params.stop))
        return inner(*arguments, **named)
    setattr(owner, method, planted)

async def later(text):
    fail(text)

of_sequence = lambda self, sequence, *_: [sequence.request.params]
of_asks = lambda self, asks: [params for _, params, _ in asks]
before(Output, "delta", "delta", of_sequence)
before(Scheduler, "add", "add", of_sequence)
before(Engine, "receipt_of", "receipt", of_sequence)
before(Runner, "run", "step", lambda self, plan: [each.params for each in plan.sequences])
before(Output, "open", "thread", of_sequence, lambda text: threading.Thread(target=fail, args=(text,)).start())
before(AsyncLLM, "open", "task", of_asks, lambda text: asyncio.ensure_future(later(text)))
before(AsyncLLM, "open", "callback", of_asks, lambda text: asyncio.get_running_loop().call_soon(fail, text))
before(AsyncLLM, "open", "crash", of_asks, crash.append)
tick = uvicorn.Server.on_tick

async def on_tick(self, counter):
    if not crash:
        return await tick(self, counter)
    if self.should_exit:  # told to drain, with the request under way
        fail(crash[0])
    return False

uvicorn.Server.on_tick = on_tick
sampling = completions.completion_sampling

def in_the_route(body, *arguments):
    if body.seed == SEED + KINDS.index("body"):
        fail(str(body.stop))
    return sampling(body, *arguments)

completions.completion_sampling = in_the_route
"""

# The control: in the log the ids of each text, in spans ids and text, in the metrics both as labels.
LEAKS: Final = """
import logging
import numpy
from dataclasses import replace
from pagemill.server.access_door import Door
from pagemill.telemetry.trace import Tracer

log, refused, last = logging.getLogger("pagemill.leaks"), [], []

def tell(asks):
    for ids, params, _ in asks:
        last[:] = [list(ids), str(params.stop)]
        log.error("a list %s", last[0][:64])
        log.error("an array %s", numpy.array(last[0][:64], numpy.int32))
        log.error("bytes %s", numpy.array(last[0][:64], numpy.int32).tobytes().hex())
        refused[0].add(1, str(last[0][:64]))
        refused[0].add(1, last[1])

enter, spans_of, make = AsyncLLM.open, Tracer.spans, Door.__init__

def open_telling(self, asks):
    tell(asks)
    return enter(self, asks)

def spans_telling(self, *arguments):
    more = {"leak.ids": last[0][:64], "leak.text": last[1]} if last else {}
    return [replace(each, attributes={**each.attributes, **more}) for each in spans_of(self, *arguments)]

def make_telling(self, app, ring, metrics, **named):
    refused.append(metrics["pagemill:http_refused"])
    make(self, app, ring, metrics, **named)

AsyncLLM.open, Tracer.spans, Door.__init__ = open_telling, spans_telling, make_telling
"""
# What a line of a request tells by design at level info; anything else of the line is searched.
_LINE: Final = re.compile(rb'^.*(?:"message": "request"| info +request ).*$', re.MULTILINE)
_BY_DESIGN: Final = re.compile(rb'("path": |"request_id": | path=| request_id=)("[^"]*"|[^\s"]*)')


def canary(name: str) -> str:
    """The text that stands in one field."""
    return f"{STEM}-{name}"


def needles_of(model: str) -> Needles:
    """What the canaries' common beginning looks like."""
    return Needles(STEM, Path(model) / "tokenizer.json")


def completions() -> Mapping[str, dict[str, Any]]:
    """Bodies of /v1/completions by name, the canary in another field of each."""
    c, text = canary, {"prompt": canary("beside")}
    return {
        "prompt": {"prompt": c("prompt")},
        "stream": {"prompt": c("stream"), "stream": True, "logprobs": 2},
        "ids": {"prompt": list(c("ids").encode())},
        "several": {"prompt": [c("one"), c("two")], "echo": True},
        "stop": {**text, "stop": [c("stop")]},
        "salt": {**text, "cache_salt": c("salt")},
        "user": {**text, "user": c("user"), "prompt_cache_key": c("key"), "metadata": {c("name"): c("value")}},
        "model": {**text, "model": c("model")},
        "form": {**text, "response_format": {"type": "regex", "regex": c("regex")}},
        "wrong form": {**text, "guided_regex": f"({c('regex')}"},
        "wrong grammar": {**text, "guided_grammar": f"start: {c('grammar')} ("},
        "wrong schema": {**text, "guided_json": {"type": c("schema")}},
        "wrong type": {"prompt": {"text": c("prompt")}},
        "unknown field": {**text, f"no name: {c('field')}": c("value")},
        "wrong number": {**text, "temperature": c("number")},
        "out of range": {**text, "temperature": -5},
        "too long": {"prompt": c("long") * 20_000},
        "too late": {"prompt": c("late") * 20, "deadline_s": 0.0001, "max_tokens": 400},
    }


def chats() -> Mapping[str, dict[str, Any]]:
    """Bodies of /v1/chat/completions by name."""
    c, chat = canary, {"messages": [{"role": "user", "content": canary("message")}]}
    function = {
        "name": c("tool").replace("-", "_"),
        "description": c("description"),
        "parameters": {"title": c("title")},
    }
    tools = [{"type": "function", "function": function}]
    return {
        "chat": chat,
        "chat stream": {**chat, "stream": True},
        "system": {"messages": [{"role": "system", "content": c("system")}, *chat["messages"]]},
        "role": {"messages": [{"role": c("role"), "content": c("content")}]},
        "tools": {**chat, "tools": tools},
        "called": {**chat, "tools": tools, "tool_choice": "required"},
        "wrong choice": {
            **chat,
            "tools": tools,
            "tool_choice": {"type": "function", "function": {"name": c("choice")}},
        },
        "template": {**chat, "chat_template": c("template")},
        "variables": {**chat, "chat_template_kwargs": {c("variable"): c("value")}},
    }


async def _ask_all(port: int) -> list[int]:
    """Everything but the crash. Returns the statuses."""
    usual = {"model": "tiny", "max_tokens": 4}
    found = []
    for body in completions().values():
        found.append((await ask(port, "/v1/completions", {**usual, **body}, KEY)).status)
    for body in chats().values():
        found.append((await ask(port, "/v1/chat/completions", {**usual, **body}, KEY)).status)
    for index, kind in enumerate(PLANTED):
        body = {**usual, "prompt": canary(kind), "stop": [canary(f"in {kind}")], "seed": _SEED + index}
        found.append((await ask(port, "/v1/completions", body, KEY)).status)
    for path, body in (("/tokenize", {"prompt": canary("tokenize")}), ("/detokenize", {"tokens": canary("ids")})):
        found.append((await ask(port, path, body, KEY)).status)
    found.append((await ask(port, f"/v1/completions?{canary('query')}=1", {"prompt": "x"}, KEY)).status)
    found.append((await ask(port, "/v1/completions", {"prompt": "x"}, canary("no key"))).status)
    return found


def odd_headers() -> Mapping[str, str]:
    """Headers of one request each, by name."""
    quoted = (
        "user-agent", "referer", "cookie", "accept", "accept-language", "tracestate", "baggage", "x-forwarded-for",
        "forwarded", "idempotency-key", "openai-organization", "x-stainless-lang", "content-type", "origin", "host",
        "x-api-key", "authorization", "x-http-method-override", "if-none-match",
    )  # fmt: skip
    trace = f"00-{canary('trace').ljust(32, '0')[:32]}-{'1' * 16}-01"
    named = {name: canary(f"in-{name}") for name in quoted}
    return {**named, "traceparent": trace, "x-request-id": f"not well formed: {canary('request')}", canary("name"): "1"}


def _ask_oddly(process: ServeProcess) -> int:
    """Canaries in headers, in paths of both ports, with keys and without, and in a method. Returns how many."""
    body, statuses = {"prompt": "x", "max_tokens": 1}, []
    with process.client(KEY) as client:
        for name, value in odd_headers().items():
            statuses.append(client.post("/v1/completions", json=body, headers={name: value}).status_code)
        for name in ("ok", "traceparent"):  # well formed: it is told in the line at level info
            headers = {"x-request-id": canary(name)}
            statuses.append(client.post("/v1/completions", json=body, headers=headers).status_code)
        assert statuses[-2:] == [200, 200]
        statuses += [client.request(canary("method"), "/v1/models").status_code]
    paths = ("/", "/v1/models/", "/v1/completions/", "/admin/cache/pin/", "/admin/tenants/", "/health/")
    for client in (process.client(KEY), process.client(), process.admin(), process.admin("none")):
        with client:
            for path in paths:
                for method in ("GET", "POST", "DELETE"):
                    told = client.request(method, path + canary("path"), json=body if method == "POST" else None)
                    statuses.append(told.status_code)
    return len(statuses)


def _leave_and_break(port: int) -> None:
    """A client that leaves its stream, and bodies that are no JSON or come in part."""
    body = {"model": "tiny", "prompt": canary("left"), "max_tokens": 400, "ignore_eos": True, "stream": True}
    whole = request_bytes("/v1/completions", body, KEY)
    no_http = f"{canary('line')}\r\n\r\n".encode()
    for data in (whole, whole[:-30], whole.replace(b'"model"', b"'model'"), no_http):
        with connect(port) as client:
            client.sendall(data)
            client.settimeout(0.3)
            with suppress(TimeoutError):
                client.recv(200)


async def _crash(port: int, process: ServeProcess) -> bytes:
    """The request that ends the process once it is told to drain. Returns what the drain was answered with."""
    body = {"prompt": canary(CRASH), "stop": [canary("in crash")], "seed": _SEED + len(PLANTED), "max_tokens": 1400}
    last = asyncio.create_task(ask(port, "/v1/completions", {"model": "tiny", "ignore_eos": True, **body}, KEY))
    await asyncio.sleep(0.2)
    drained = await ask(port_of(process.admin_url), "/admin/drain", {"reason": canary("drain")}, process.admin_key)
    assert drained.status == 200, drained
    with suppress(OSError, ValueError):
        await last
    return drained.body


def told(model: str, level: str, log_format: str, further: str = "") -> tuple[dict[str, bytes], int]:
    """All that a server tells while it is asked and ends, by place; and how many requests it was asked. further: code
    that runs in its process before anything else."""
    with tempfile.TemporaryDirectory() as directory, Collector() as collector:
        place = Path(directory)
        names = f"SEED, KINDS = {_SEED}, {(*PLANTED, CRASH)!r}\n"
        (place / "sitecustomize.py").write_text(names + PLANT + further)
        reader, id, sha256 = make_key()
        write_keys(place / "keys.toml", (KeyEntry("reader", id, sha256, role="metrics", tenant=None),))
        options = [
            "--served-model-name", "tiny", "--packed-weights-cache", "off", "--kv-cache-memory-bytes", "4MiB",
            "--api-key", KEY, "--keys", str(place / "keys.toml"), "--admin-port", "0",
            "--otlp-traces-endpoint", collector.url, "--log-format", log_format,
        ]  # fmt: skip
        options += [] if level == "warning" else ["--log-level", level]
        path = os.pathsep.join([str(place), str(ROOT / "src")])
        with ServeProcess(place, model, *options, variables={"PYTHONPATH": path}) as process:
            port = port_of(process.url)
            num_asked = len(asyncio.run(_ask_all(port))) + _ask_oddly(process)
            _leave_and_break(port)
            time.sleep(0.6)  # figures that are older than half a second are read anew
            with process.admin() as client, process.client(reader) as metrics:
                pages = {path: _page(client, path) for path in ADMIN_PAGES}
                pages[PUBLIC_METRICS] = _page(metrics, "/metrics")
            pages[DRAIN] = asyncio.run(_crash(port, process))
            code = process.process.wait(60)
            found = {"stdout": process.out.read_bytes(), ERRORS: process.err.read_bytes()}
            found |= {**pages, "spans": b"".join(collector.bodies), "exit code": str(code).encode()}
            return found, num_asked + len(pages) + 5


def _page(client: httpx.Client, path: str) -> bytes:
    page = client.get(path)
    assert page.status_code == 200, f"{path}: {page.status_code}"
    return page.content


def searched(level: str, places: Mapping[str, bytes]) -> dict[str, bytes]:
    """The places without what a line of a request tells by design at level info."""
    if level != "info":
        return dict(places)
    line = _LINE.sub(lambda match: _BY_DESIGN.sub(rb"\1", match[0]), places[ERRORS])
    return {**places, ERRORS: line}


def count(model: str, settings: Sequence[tuple[str, str]]) -> Figure:
    """Servers with these levels and formats of the log. What told nothing, or did not crash, counts as a failure."""
    replays, num_searched, also, needles = [], 0, Counter[str](), needles_of(model)
    for level, log_format in settings:
        places, num_requests = told(model, level, log_format)
        wrong = needles.found_in(searched(level, places))
        wrong += [f"{name} told nothing" for name, text in places.items() if not text]
        wrong += [] if places["exit code"] == b"1" else [f"the crash ended with {places['exit code']!r}"]
        if (num_errors := places[ERRORS].count(b"PlantedError")) < len(PLANTED):
            wrong.append(f"of {len(PLANTED)} planted errors {num_errors} are told by name")
        replays += [f"log level {level}, {log_format}: {each}" for each in wrong]
        num_searched += num_requests * len(places)
        also += Counter({"kB searched": sum(map(len, places.values())) // 1000, "errors told": num_errors})
    return Figure("S18", "canaries found", len(replays), num_searched, "requests times places", dict(also), replays)


def shard(number: int) -> list[Figure]:
    """A part of the release size: a level and a format."""
    levels = [(level, log_format) for level in LEVELS for log_format in FORMATS]
    with tiny_model() as model:
        return [count(model, [levels[number]])]
