"""S18: what a client writes is in no log, no trace, no metric, no page of the operator's and no crash text, at the
default level and at info.

A canary stands in every field of a request that can hold text, in requests that are answered, refused, left, too late
and broken, and in errors of our own that quote it: raised where a request is worked on, in threads, in tasks and
callbacks of the loop, and at last in the main thread, which ends the process. Everything that the process tells is
searched for it: as text, escaped, in base64, in hexadecimal and as token ids. At level debug the words of errors are
told; that they are found there is the control.
"""

from __future__ import annotations

import asyncio
import base64
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx

from tests.fixtures.collector import Collector
from tests.fixtures.serve_process import ROOT, ServeProcess
from tests.trust.figures import Figure
from tests.trust.serving import ask, connect, port_of, request_bytes, tiny_model

STEM: Final = "quaggaquartz"  # every canary begins so
KEY: Final = "a-key-that-is-long-enough"
LEVELS: Final = ("warning", "info", "error")
FORMATS: Final = ("text", "json")
PLANTED: Final = ("delta", "add", "step", "receipt", "thread", "task", "callback", "body")
CRASH: Final = "crash"
ERRORS: Final = "stderr, with the crash"
ADMIN_PAGES: Final = (
    "/health", "/admin/cache/stats", "/admin/cache/blocks", "/admin/cache/tree", "/admin/tenants", "/admin/keys",
)  # fmt: skip
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
    if crash:
        fail(crash[0])
    return await tick(self, counter)

uvicorn.Server.on_tick = on_tick
sampling = completions.completion_sampling

def in_the_route(body, *arguments):
    if body.seed == SEED + KINDS.index("body"):
        fail(str(body.stop))
    return sampling(body, *arguments)

completions.completion_sampling = in_the_route
"""


def canary(name: str) -> str:
    """The text that stands in one field."""
    return f"{STEM}-{name}"


def needles() -> dict[str, bytes]:
    """What the canaries' common beginning looks like, by encoding."""
    found = {"text": STEM.encode(), "hexadecimal": STEM.encode().hex().encode()}
    for shift in range(3):
        coded = base64.b64encode(b"x" * shift + STEM.encode() + b"x" * 6)
        found[f"base64 at {shift}"] = coded[4:14]
    for name, between in (("ids", ", "), ("ids without spaces", ",")):
        found[name] = between.join(str(each) for each in STEM.encode()).encode()
    return found


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


def _leave_and_break(port: int) -> None:
    """A client that leaves its stream, and bodies that are no JSON or come in part."""
    body = {"model": "tiny", "prompt": canary("left"), "max_tokens": 400, "ignore_eos": True, "stream": True}
    whole = request_bytes("/v1/completions", body, KEY)
    for data in (whole, whole[:-30], whole.replace(b'"model"', b"'model'")):
        with connect(port) as client:
            client.sendall(data)
            client.settimeout(0.3)
            with suppress(TimeoutError):
                client.recv(200)


def _crash(port: int) -> None:
    """The request that ends the process."""
    body = {"prompt": canary(CRASH), "stop": [canary("in crash")], "seed": _SEED + len(PLANTED)}
    with suppress(OSError, ValueError):
        asyncio.run(ask(port, "/v1/completions", {"model": "tiny", "max_tokens": 4, **body}, KEY))


def told(model: str, level: str, log_format: str) -> tuple[dict[str, bytes], int]:
    """All that a server tells while it is asked and ends, by place; and how many requests it was asked."""
    with tempfile.TemporaryDirectory() as directory, Collector() as collector:
        place = Path(directory)
        names = f"SEED, KINDS = {_SEED}, {(*PLANTED, CRASH)!r}\n"
        (place / "sitecustomize.py").write_text(names + PLANT)
        options = [
            "--served-model-name", "tiny", "--packed-weights-cache", "off", "--kv-cache-memory-bytes", "4MiB",
            "--api-key", KEY, "--admin-port", "0", "--otlp-traces-endpoint", collector.url, "--log-format", log_format,
        ]  # fmt: skip
        options += [] if level == "warning" else ["--log-level", level]
        path = os.pathsep.join([str(place), str(ROOT / "src")])
        with ServeProcess(place, model, *options, variables={"PYTHONPATH": path}) as process:
            port = port_of(process.url)
            statuses = asyncio.run(_ask_all(port))
            _leave_and_break(port)
            time.sleep(0.6)  # figures that are older than half a second are read anew
            with process.admin() as client:
                pages = {path: _page(client, path) for path in ("/metrics", *ADMIN_PAGES)}
            _crash(port)
            code = process.process.wait(60)
            found = {"stdout": process.out.read_bytes(), ERRORS: process.err.read_bytes()}
            return {**found, **pages, "spans": b"".join(collector.bodies), "exit code": str(code).encode()}, len(
                statuses
            ) + 4


def _page(client: httpx.Client, path: str) -> bytes:
    page = client.get(path)
    assert page.status_code == 200, f"{path}: {page.status_code}"
    return page.content


def found_in(told_by_place: Mapping[str, bytes]) -> list[str]:
    """Where a canary is, and how it looks there."""
    found = []
    for place, text in told_by_place.items():
        for name, needle in needles().items():
            lines = [each for each in text.splitlines() if needle in each]
            found += [f"{place}, as {name}: {each[:200]!r}" for each in lines]
    return found


def count(model: str, settings: Sequence[tuple[str, str]]) -> Figure:
    """Servers with these levels and formats of the log. What told nothing, or did not crash, counts as a failure."""
    replays, num_searched, also = [], 0, Counter[str]()
    for level, log_format in settings:
        places, num_requests = told(model, level, log_format)
        wrong = found_in(places)
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
