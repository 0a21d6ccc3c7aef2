"""The load generator of `pagemill bench serve`: a process of its own that asks a server over HTTP and notes when what
came. Owns when requests are sent, and what is read from their streams; knows nothing of engines or figures.

`python -m pagemill.bench.serve_load` reads a plan from stdin and writes what happened to stdout, both one JSON object.
While the load runs, bytes are only stamped with their time; streams are read when they have ended, or after the load,
so that little is taken from the server. The standard library only. Times are of the machine's monotonic clock.

A plan is {"host", "port", "fields", "duration_s", "users", "spread_s", "sessions"}. Sessions are {"at_s", "turns"},
turns {"text", "max_tokens", "think_s"}; a turn's prompt is all that was said in its session before, answers included,
and its text. users > 0: so many users begin within spread_s, each taking the next session when the last has ended.
users 0: each session begins at its at_s.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PATH = "/v1/completions"
_PAUSE_S = 0.1  # after an error, so that a server that refuses is not stormed
_QUOTED = 300


@dataclass(slots=True)
class Wire:
    """The bytes of one answer. Mutated as they come. marks: (bytes so far, when)."""

    data: bytearray = field(default_factory=bytearray)
    marks: list[tuple[int, float]] = field(default_factory=list)

    def add(self, data: bytes, now_s: float) -> None:
        """Keep bytes that came."""
        self.data += data
        self.marks.append((len(self.data), now_s))

    def time_of(self, end: int) -> float:
        """When the byte before `end` had come."""
        return self.marks[min(bisect_left(self.marks, (end, 0.0)), len(self.marks) - 1)][1]


@dataclass(slots=True)
class Answer:
    """What was read of an answer. Mutated by `read_answer`. times: of events that carried text. usage: None where the
    server told none. error: None for a stream that is right so far."""

    times: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: str | None = None


def is_accepted(wire: Wire) -> bool:
    """Whether the answer's status is 200."""
    return wire.data.split(b"\r\n", 1)[0].split(b" ")[1:2] == [b"200"]


def read_answer(wire: Wire, *, is_whole: bool = True) -> Answer:
    """Read an answer of server-sent events, each with the time when its last byte had come.

    is_whole: the server closed the connection; a stream without an end is an error then.
    """
    answer = Answer()
    raw = bytes(wire.data)
    head, gap, _ = raw.partition(b"\r\n\r\n")
    if not gap:
        answer.error = "the connection was closed before an answer" if is_whole else None
        return answer
    body = len(head) + len(gap)
    parts = _chunks(raw, body) if b"transfer-encoding: chunked" in head.lower() else iter([(raw[body:], len(raw))])
    if not is_accepted(wire):
        status, said = head.split(b"\r\n", 1)[0], b"".join(part for part, _ in parts)
        answer.error = f"{status.decode(errors='replace')}: {said[:_QUOTED].decode(errors='replace')}"
        return answer
    is_done = False
    texts: list[str] = []
    for event, end in _events(parts):
        if event == b"[DONE]":
            is_done = True
            continue
        try:
            _take(answer, texts, json.loads(event), wire.time_of(end))
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            answer.error = f"an event is no completion: {event[:_QUOTED].decode(errors='replace')}"
    answer.text = "".join(texts)
    if is_whole and answer.error is None and not (is_done and answer.finish_reason):
        answer.error = "the stream ended before the answer did"
    return answer


def _take(answer: Answer, texts: list[str], event: dict[str, Any], time_s: float) -> None:
    if "error" in event:
        answer.error = str(event["error"])[:_QUOTED]
        return
    answer.usage = event.get("usage") or answer.usage
    for choice in event.get("choices") or ():
        if choice["text"]:
            texts.append(choice["text"])
            answer.times.append(time_s)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def _chunks(raw: bytes, at: int) -> Iterator[tuple[bytes, int]]:
    """Parts of a chunked body (RFC 9112, 7.1), each with the place of its end in `raw`; a cut part is left out."""
    while (line := raw.find(b"\r\n", at)) >= 0:
        try:
            size = int(raw[at:line].partition(b";")[0], 16)
        except ValueError:
            return
        begin = line + 2
        if size == 0 or len(raw) < begin + size:
            return
        yield raw[begin : begin + size], begin + size
        at = begin + size + 2


def _events(parts: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """Data of server-sent events, each with the end of the part that completed it. Comments and names are left out."""
    rest = b""
    for part, end in parts:
        rest = (rest + part).replace(b"\r\n", b"\n")
        while (gap := rest.find(b"\n\n")) >= 0:
            event, rest = rest[:gap], rest[gap + 2 :]
            data = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield b"\n".join(data), end


class _Connection(asyncio.Protocol):
    """One request. Mutated as bytes come. done: set when the server has closed."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.wire = Wire()
        self.done = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.wire.add(data, time.monotonic())

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


@dataclass(slots=True)
class _Sent:
    """A request that was sent. Mutated as it goes on. end_s: None for one that was cut. due_s: when it should have
    been."""

    session: int
    turn: int
    max_tokens: int
    due_s: float
    sent_s: float
    wire: Wire = field(default_factory=Wire)
    end_s: float | None = None
    error: str | None = None

    def describe(self) -> dict[str, Any]:
        """As the generator tells it, once the load is over."""
        answer = read_answer(self.wire, is_whole=self.end_s is not None) if self.error is None else Answer()
        return {
            "session": self.session,
            "turn": self.turn,
            "max_tokens": self.max_tokens,
            "due_s": self.due_s,
            "sent_s": self.sent_s,
            "end_s": self.end_s,
            "times": answer.times,
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
            "error": self.error or answer.error,
        }


class _Load:
    """A load while it runs. Mutated by its users."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.sent: list[_Sent] = []
        self.next_session = 0
        self.begin_s = 0.0
        self.idle_s: float | None = None  # when a user first found nothing left to do

    async def run(self) -> None:
        plan = self.plan
        self.begin_s = time.monotonic()
        if plan["users"]:
            gap_s = plan["spread_s"] / plan["users"]
            tasks = [asyncio.ensure_future(self._user(each * gap_s)) for each in range(plan["users"])]
        else:
            tasks = [asyncio.ensure_future(self._timed(each)) for each in range(len(plan["sessions"]))]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=plan["duration_s"])
            for task in late:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result

    async def _user(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while self.next_session < len(self.plan["sessions"]):
            index = self.next_session
            self.next_session += 1
            await self._session(index, time.monotonic())
        if self.idle_s is None:
            self.idle_s = time.monotonic()

    async def _timed(self, index: int) -> None:
        due_s = self.begin_s + self.plan["sessions"][index]["at_s"]
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        await self._session(index, due_s)

    async def _session(self, index: int, due_s: float) -> None:
        said = ""
        turns = self.plan["sessions"][index]["turns"]
        for number, turn in enumerate(turns):
            if number:
                due_s = time.monotonic() + turn["think_s"]
                await asyncio.sleep(turn["think_s"])
            said += turn["text"]
            sent = _Sent(index, number, turn["max_tokens"], due_s, time.monotonic())
            self.sent.append(sent)
            try:
                await self._ask(sent, said)
            except OSError as error:
                sent.error, sent.end_s = f"cannot connect: {error}", time.monotonic()
            if sent.error is not None or not is_accepted(sent.wire):
                await asyncio.sleep(_PAUSE_S)
                return
            if number + 1 < len(turns):
                answer = read_answer(sent.wire)
                if answer.error is not None:
                    await asyncio.sleep(_PAUSE_S)
                    return
                said += answer.text

    async def _ask(self, sent: _Sent, prompt: str) -> None:
        host, port = self.plan["host"], self.plan["port"]
        body = json.dumps({**self.plan["fields"], "prompt": prompt, "max_tokens": sent.max_tokens, "stream": True})
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body.encode())}\r\nConnection: close\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        connection = _Connection((head + body).encode())
        sent.wire = connection.wire
        await loop.create_connection(lambda: connection, host, port)
        try:
            await connection.done
            sent.end_s = time.monotonic()
        finally:
            if connection.transport is not None:
                connection.transport.abort()


def run_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan to its end. Returns {"begin_s", "end_s", "idle_s", "cpu_s", "requests"}: idle_s when a user first
    found no session left (None: never), cpu_s this process's CPU time while the load ran."""
    load = _Load(plan)
    gc.collect()
    gc.disable()
    before_s = time.process_time()
    try:
        asyncio.run(load.run())
        cpu_s = time.process_time() - before_s
        end_s = time.monotonic()
    finally:
        gc.enable()
    return {
        "begin_s": load.begin_s,
        "end_s": end_s,
        "idle_s": load.idle_s,
        "cpu_s": cpu_s,
        "requests": [each.describe() for each in load.sent],
    }


if __name__ == "__main__":
    json.dump(run_plan(json.load(sys.stdin)), sys.stdout)
