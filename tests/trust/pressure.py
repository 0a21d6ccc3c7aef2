"""R9: memory pressure: far more is asked of a server than its cache, its queue and its places hold.

`pagemill serve` runs as a process of its own with a cache of a few hundred tokens. Tenants flood it with requests of
every form. Whatever comes is answered whole and rightly, or refused cleanly: 503, or 429 where only one's own are too
many, with Retry-After; a request that no emptying of the cache would let in gets 400. The process does not end, nothing
leaks, and after the flood it answers as before.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from prometheus_client.parser import text_string_to_metric_families

from pagemill.base.step import StepPlan, StepResult
from pagemill.cache.manager import CacheManager
from pagemill.decoding.adjust import LogitAdjuster
from pagemill.engine.admission import Admission
from pagemill.engine.output import Output
from pagemill.engine.scheduler import Scheduler
from pagemill.execution.batch import BatchBuilder
from pagemill.llm.async_llm import AsyncLLM, RequestStream
from pagemill.llm.engine_thread import EngineThread
from pagemill.server import completions, limits_body
from pagemill.server.access_keys import KeyEntry, make_key, write_keys
from pagemill.server.completions import CompletionWriter
from tests.fixtures.live_server import LiveServer
from tests.fixtures.serve_process import ServeProcess
from tests.trust.figures import Figure
from tests.trust.serving import FORMS, Reply, ask, guarded_server, own_words, port_of, tiny_model

TENANTS: Final = ("alice", "bob", "carol", "dave")
OPTIONS: Final = (
    "--served-model-name", "tiny", "--packed-weights-cache", "off", "--kv-cache-memory-bytes", "144KiB",
    "--max-num-seqs", "8", "--max-queued-requests", "12", "--max-num-batched-tokens", "64",
    "--max-open-requests", "80", "--max-model-len", "1000",
)  # fmt: skip
AT_ONCE: Final = 96
MOST_TRIES: Final = 10
RETRY_S: Final = 0.05  # sooner than the server asks for: a flood does not listen
PER_SHARD: Final = 2000
PROMPTS: Final = tuple(f"{name} goes to the mill. " * 3 for name in ("Anna", "Ben", "Cleo", "Dan", "Eve"))
_NO_FAILURE: Final = ("pagemill:kv_leaked_blocks", "pagemill:kv_block_corrupt_total")


def known(prompt: str) -> dict[str, Any]:
    """A request whose answer is known: nothing but the prompt decides about it."""
    return {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@dataclass(slots=True)
class Flood:
    """What became of a flood. Mutated by its answers."""

    num_asked: int = 0
    wrong: list[str] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)

    def saw(self, what: str, reply: Reply, expected: str | None) -> None:
        """Judge one answer or refusal. what: the form that was asked; expected: its text, where that is known."""
        self.num_asked += 1
        if reply.is_refusal:
            self.met[f"refused with {reply.status} and Retry-After"] += 1
        elif what == "too large" and reply.status == 400 and "1,200 tokens" in reply.json["error"]["message"]:
            self.met["too large for ever"] += 1
        elif reply.status != 200 or not reply.is_whole:
            self.wrong.append(f"{what}: status {reply.status}, {reply.headers}, {reply.body[:200]!r}")
        elif expected is not None and reply.json["choices"][0]["text"] != expected:
            self.wrong.append(f"{what}: answered {reply.json['choices'][0]['text']!r}, not {expected!r}")
        else:
            self._saw_whole(what, reply)

    def _saw_whole(self, what: str, reply: Reply) -> None:
        if "event-stream" not in reply.headers["content-type"]:
            self.met["answered"] += 1
            return
        *_, last, done = reply.events
        if done != "[DONE]" or "error" in last or what == "too large":
            self.wrong.append(f"{what}: its stream ended with {last} {done}")
        self.met["answered"] += 1


def draw_request(draw: random.Random, number: int) -> tuple[str, str, dict[str, Any]]:
    """Form, path and body of one request."""
    kind = draw.random()
    if kind < 0.25:
        return "known", "/v1/completions", known(draw.choice(PROMPTS))
    if kind < 0.3:
        return "too large", "/v1/completions", {"prompt": [number % 200] * 1200, "max_tokens": 8}
    form = draw.choice(tuple(FORMS))
    path, body = own_words(form, number)
    more = {"seed": number, "temperature": 1, "max_tokens": draw.randint(1, 60), "stream": draw.random() < 0.5}
    return form, path, {**body, **more}


async def flood(port: int, keys: list[str], numbers: range, expected: dict[str, str], result: Flood) -> None:
    """All requests, AT_ONCE of them at a time."""
    left = iter(numbers)

    async def go_on() -> None:
        for number in left:
            draw = random.Random(number)
            what, path, body = draw_request(draw, number)
            key, known_text = draw.choice(keys), expected[body["prompt"]] if what == "known" else None
            for _ in range(MOST_TRIES):
                reply = await ask(port, path, {"model": "tiny", **body}, key)
                result.saw(what, reply, known_text)
                if not reply.is_refusal:
                    break
                await asyncio.sleep(RETRY_S)

    await asyncio.gather(*(go_on() for _ in range(AT_ONCE)))


@contextmanager
def small_server(model: str) -> Generator[tuple[ServeProcess, list[str]]]:
    """A server with a cache that holds little, and a key of each tenant."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        made = {name: make_key() for name in TENANTS}
        entries = [KeyEntry(name, id, sha256, tenant=name) for name, (_, id, sha256) in made.items()]
        write_keys(place / "keys.toml", tuple(entries))
        with ServeProcess(place, model, *OPTIONS, "--keys", str(place / "keys.toml"), "--admin-port", "0") as process:
            yield process, [key for key, _, _ in made.values()]


def answers(port: int, key: str) -> dict[str, str]:
    """The known prompts' answers, asked one after another."""

    async def ask_all() -> dict[str, str]:
        return {
            each: (await ask(port, "/v1/completions", known(each), key)).json["choices"][0]["text"] for each in PROMPTS
        }

    return asyncio.run(ask_all())


def metrics(process: ServeProcess) -> dict[str, float]:
    """Metrics without labels, by name."""
    with process.admin() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    return {each.name: each.value for family in families for each in family.samples}


def count(model: str, numbers: range) -> list[Figure]:
    """One server and the requests of these numbers."""
    result = Flood()
    with small_server(model) as (process, keys):
        port = port_of(process.url)
        expected = answers(port, keys[0])
        asyncio.run(flood(port, keys, numbers, expected, result))
        ended = process.process.poll()
        after = [] if ended is None else [f"the process ended with {ended}: {process.told[-500:]}"]
        if ended is None:
            for key in keys:
                after += [] if answers(port, key) == expected else ["an answer after the flood differs"]
            found = metrics(process)
            after += [f"{name} is {found.get(name)}" for name in _NO_FAILURE if found.get(name, 1)]
            after += [] if process.end() == 0 else [f"it ended with {process.process.returncode}"]
    replays = [*result.wrong, *after]
    return [
        Figure(
            "R9",
            "crashes, wrong answers or unclean refusals",
            len(replays),
            result.num_asked,
            "requests",
            dict(result.met),
            replays,
        )
    ]


def count_exhausted(model: str, number: int) -> Figure:
    """Memory runs out in every seventh step of a server in this process: what ran in it is refused as by a full server,
    in a stream by an event, and everything else is answered."""
    met: Counter[str] = Counter()
    wrong: list[str] = []
    with guarded_server(model, max_num_seqs=8) as server:
        run, steps = server.llm.built.executor.run, itertools.count(1)

        def starved(plan: StepPlan) -> StepResult:
            if plan.sequences and next(steps) % 7 == 0:
                raise MemoryError("planted")
            return run(plan)

        async def ask_all() -> None:
            for index in range(number):
                path, body = own_words(tuple(FORMS)[index % len(FORMS)], index)
                stream = index % 3 == 0
                reply = await ask(server.port, path, {**body, "temperature": 1, "max_tokens": 3, "stream": stream})
                what = _refused_or_answered(reply, stream)
                met[what] += bool(what)
                wrong.extend([] if what else [f"{path}: status {reply.status}, {reply.body[:200]!r}"])

        server.call(lambda engine: setattr(server.llm.built.executor, "run", starved))
        asyncio.run(ask_all())
        server.call(lambda engine: setattr(server.llm.built.executor, "run", run))
        last = asyncio.run(ask(server.port, "/v1/completions", known(PROMPTS[0])))
        wrong += [] if last.status == 200 else [f"afterwards: status {last.status}"]
        stats = server.call(lambda engine: engine.stats())
        if stats.cache.num_active_blocks or stats.cache.num_leaked_blocks or stats.num_running:
            wrong.append(f"something is left: {stats}")
    return Figure("R9", "unclean answers where memory ran out", len(wrong), number + 1, "requests", dict(met), wrong)


EXHAUSTED: Final[tuple[tuple[Any, str], ...]] = (
    (limits_body, "_wrong_head"), (limits_body, "_read"), (limits_body, "_loaded"), (limits_body, "check_shape"),
    (limits_body, "check_request"), (completions, "check_fields"), (completions, "completion_sampling"),
    (completions, "cache_of"), (AsyncLLM, "open"), (RequestStream, "push"), (EngineThread, "_enter"),
    (Admission, "admit"), (Scheduler, "add"), (Scheduler, "plan"), (CacheManager, "open"), (CacheManager, "commit"),
    (LogitAdjuster, "adjust"), (LogitAdjuster, "_adjust_row"), (BatchBuilder, "build"), (Output, "delta"),
    (CompletionWriter, "add"), (CompletionWriter, "whole"),
)  # fmt: skip


def count_exhausted_at(server: LiveServer, owner: Any, name: str) -> Figure:
    """Memory runs out once at one place on the way of a request: it is refused as by a full server, or answered as it
    should be where that place is asked once more, and what comes then is answered as before."""
    inner, raised = getattr(owner, name), []

    def starved(*arguments: Any, **options: Any) -> Any:
        if not raised:
            raised.append(name)
            raise MemoryError("planted")
        return inner(*arguments, **options)

    body = {**known(PROMPTS[0]), "max_tokens": 4, "presence_penalty": 0.5}
    expected = asyncio.run(ask(server.port, "/v1/completions", body))
    with patch.object(owner, name, starved):
        reply = asyncio.run(ask(server.port, "/v1/completions", body))
    again = asyncio.run(ask(server.port, "/v1/completions", body))
    answered = reply.status == 200 and reply.is_whole and reply.json["choices"] == expected.json["choices"]
    wrong = (
        []
        if reply.is_refusal or answered
        else [f"{name}: status {reply.status}, {reply.headers}, {reply.body[:200]!r}"]
    )
    wrong += [] if raised else [f"{name} is not called any more"]
    if (again.status, again.json["choices"]) != (200, expected.json["choices"]):
        wrong.append(f"{name}: what comes then is answered with {again.status}, {again.body[:200]!r}")
    stats = server.call(lambda engine: engine.stats())
    if server.llm.status != "ready" or stats.cache.num_active_blocks or stats.cache.num_leaked_blocks:
        wrong.append(f"{name}: the engine is {server.llm.status}, and something is left: {stats}")
    return Figure("R9", "unclean answers where memory ran out once", len(wrong), 1, "places", {}, wrong)


def _refused_or_answered(reply: Reply, stream: bool) -> str:
    if reply.is_refusal:
        return "refused with 503 and Retry-After"
    if reply.status != 200 or not reply.is_whole:
        return ""
    if not stream:
        return "answered"
    *events, done = reply.events
    errors = [each["error"]["type"] for each in events if "error" in each]
    if done != "[DONE]" or errors not in ([], ["overloaded_error"]):
        return ""
    return "refused in a stream" if errors else "answered"


def shard(number: int) -> list[Figure]:
    """A part of the release size."""
    with tiny_model() as model:
        figures = [*count(model, range(PER_SHARD * number, PER_SHARD * (number + 1))), count_exhausted(model, 200)]
        with guarded_server(model) as server:
            return [*figures, *(count_exhausted_at(server, *place) for place in EXHAUSTED)]
