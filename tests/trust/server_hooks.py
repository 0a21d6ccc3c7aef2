"""R15 at the server: an exception of our own making wherever the routes work for one request, over a socket.

Four ask at once; the hook raises for the victim alone, whenever it is called for it. The victim may fail. The others
must be answered as if nothing had been, the server must go on and be ready, no KV cache may be dropped, and nothing
may be left in the engine.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from pagemill.server import answering, chat, completions, limits_body
from pagemill.server.chat import ChatWriter
from pagemill.server.completions import CompletionWriter
from pagemill.server.limits import Limits
from pagemill.server.limits_body import BodyLimits
from pagemill.telemetry.metrics import Metrics
from tests.fixtures.live_server import LiveServer, wait_until
from tests.fixtures.tiny import tiny_llama
from tests.trust.figures import Figure
from tests.trust.hooks import PlantedError

VICTIM = "victim"
ROUTES = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
SETTLED_S = 20.0


@dataclass(frozen=True, slots=True)
class Hook:
    """Something that a route calls for one request: `owner.name`. route: that has it."""

    route: str
    owner: Any
    name: str

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.name}"


HOOKS = tuple(
    Hook(route, owner, name)
    for route, owner, names in (
        ("chat", chat, ("check_fields", "chat_sampling", "chat_prompt", "cache_of", "leaves_blocks")),
        ("chat", ChatWriter, ("__init__", "begin", "write", "add", "end", "whole")),
        ("completions", completions, ("check_fields", "completion_sampling", "cache_of", "leaves_blocks")),
        ("completions", CompletionWriter, ("__init__", "begin", "write", "add", "end", "whole")),
        ("chat", answering, ("end_of",)),
        ("completions", answering, ("end_of",)),
        ("chat", limits_body, ("check_request",)),
        ("completions", limits_body, ("check_request",)),
    )
    for name in names
)


def _is_victims(value: Any) -> bool:
    """True for what says whose it is: a body, what holds one, or requests with the victim's salt."""
    body = getattr(value, "_body", None) or getattr(value, "body", None) or value
    if isinstance(value, list):  # engine, parameters and cache of each request
        return any(isinstance(each, tuple) and getattr(each[-1], "salt", None) == VICTIM for each in value)
    salt = body.get("cache_salt") if isinstance(body, dict) else getattr(body, "cache_salt", None)
    return bool(salt == VICTIM)


@contextmanager
def served() -> Iterator[LiveServer]:
    """A server with limits."""
    limits, metrics = Limits(), Metrics("tiny")
    with (
        tempfile.TemporaryDirectory() as directory,
        LiveServer(
            str(tiny_llama(Path(directory))), wrappers=[lambda app: BodyLimits(app, lambda: limits, metrics)]
        ) as live,
    ):
        yield live


def _body(route: str, who: str, *, stream: bool) -> dict[str, Any]:
    text = f"what {who} asks"
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if route == "chat" else {"prompt": text}
    return {**prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "cache_salt": who, "stream": stream}


def _ask(client: httpx.Client, route: str, who: str, *, stream: bool) -> tuple[int, str]:
    """Status and text of one answer; status 0 where the connection was cut."""
    try:
        answer = client.post(ROUTES[route], json=_body(route, who, stream=stream))
    except httpx.HTTPError:
        return 0, ""
    if answer.status_code != 200:
        return answer.status_code, ""
    events = [each[6:] for each in answer.text.split("\n\n") if each.startswith("data: {")] if stream else [answer.text]
    return 200, "".join(_text(json.loads(each)) for each in events)


def _text(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return f"error {answer['error']['message']}"
    pieces = []
    for choice in answer["choices"]:
        holder = choice.get("message") or choice.get("delta") or choice
        pieces.append(holder.get("content") or holder.get("text") or "")
    return "".join(pieces)


def run_with(live: LiveServer, hook: Hook, *, stream: bool) -> tuple[bool, str]:
    """One run. Returns whether the hook was called for the victim, and what is wrong ("")."""
    inner, called = getattr(hook.owner, hook.name), []

    def raising(*arguments: Any, **named: Any) -> Any:
        if any(map(_is_victims, arguments)):
            called.append(hook)
            raise PlantedError(f"{hook} was told to raise")
        return inner(*arguments, **named)

    def raising_first(self: Any, service: Any, body: Any, *arguments: Any, **named: Any) -> None:
        if _is_victims(body):
            called.append(hook)
            raise PlantedError(f"{hook} was told to raise")
        inner(self, service, body, *arguments, **named)

    others = [(route, who) for route in ROUTES for who in ("one", "two")]
    # A connection that is kept may just be closed by the server where the machine has other things to do.
    with live.client(limits=httpx.Limits(max_keepalive_connections=0)) as client, ThreadPoolExecutor(5) as pool:
        expected = [_ask(client, route, who, stream=stream) for route, who in others]
        with patch.object(hook.owner, hook.name, raising_first if hook.name == "__init__" else raising):
            found = [pool.submit(_ask, client, route, who, stream=stream) for route, who in others[:2]]
            victim = pool.submit(_ask, client, hook.route, VICTIM, stream=stream)
            found += [pool.submit(_ask, client, route, who, stream=stream) for route, who in others[2:]]
            got = [each.result() for each in found]
            victim.result()
        if got != expected:
            return bool(called), f"others were changed: {got} instead of {expected}"
        idle = wait_until(lambda: not live.call(lambda engine: engine.has_unfinished), SETTLED_S)
        if not idle:
            return bool(called), "the victim still runs in the engine"
        live.call(lambda engine: engine.cache.verify())
        if live.llm.status != "ready" or live.call(lambda engine: engine.stats().cache.num_rebuilds):
            return bool(called), f"the engine is {live.llm.status} or has dropped its cache"
        if (again := _ask(client, hook.route, VICTIM, stream=stream))[0] != 200:
            return bool(called), f"the victim's next request is answered with {again}"
    return bool(called), ""


def count() -> Figure:
    """Every hook, for an answer in one piece and for a stream. Nothing ran where a hook is not called for either."""
    num_runs, wrong = 0, []
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # each is told to the log
    try:
        with served() as live:
            for hook in HOOKS:
                reached = 0
                for stream in (False, True):
                    called, found = run_with(live, hook, stream=stream)
                    reached += called
                    wrong += [f"{hook} ({'a stream' if stream else 'in one piece'}): {found}"] if found else []
                wrong += [] if reached else [f"{hook} is not called any more"]
                num_runs += reached
    finally:
        logging.disable(before)
    also = {"hooks": len(HOOKS)}
    return Figure("R15", "other requests of a server changed", len(wrong), num_runs, "planted exceptions", also, wrong)
