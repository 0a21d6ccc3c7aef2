"""Answers as server-sent events and as one body, both left as soon as the client is gone. Owns the connection's side of
an answer; what is written comes from `completions.py` and `chat.py`.

One write a wake-up, already serialised. A client that does not read is left after a while, so that what it does not
take is not kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from pagemill.engine.output import Delta
from pagemill.server.errors import UnavailableError, body_of, error_response
from pagemill.server.json_bytes import event
from pagemill.server.ports import Stream
from pagemill.server.service import DRAINING_RETRY_S

_LOG: Final = logging.getLogger(__name__)
_HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}
DONE: Final = b"data: [DONE]\n\n"


class Writer(Protocol):
    """Turns deltas into what the client reads. `begin` and `end` frame a stream; `whole` is the answer in one piece.
    fault: an error that ends it, as the client is told it."""

    def begin(self) -> bytes: ...
    def write(self, deltas: list[Delta]) -> bytes: ...
    def end(self) -> bytes: ...
    def add(self, deltas: list[Delta]) -> None: ...
    def whole(self) -> Response: ...
    def fault(self, error: Exception) -> Exception: ...


class EventStream(Response):
    """A response that writes events while the deltas come. finished: called with the writer's deltas all taken, or when
    the client has left."""

    def __init__(self, stream: Stream, writer: Writer, *, slow_client_s: float, finished: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers=_HEADERS)
        self._stream = stream
        self._writer = writer
        self._slow_client_s = slow_client_s
        self._finished = finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream, writer = self._stream, self._writer
        watcher = asyncio.create_task(_watch(receive, stream))
        headers = [each for each in self.raw_headers if each[0] != b"content-length"]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            if begin := writer.begin():
                await self._send(send, begin)
            while not stream.finished:
                deltas = await stream.next()
                failed = _failure_of(deltas, writer)
                if failed is not None:
                    error_response(failed)  # logged as any other
                    await self._send(send, event(body_of(failed)))
                    break
                is_scored = any(each.prompt_logprobs for each in deltas)
                data = await asyncio.to_thread(writer.write, deltas) if is_scored else writer.write(deltas)
                if data:
                    await self._send(send, data)
            else:
                await self._send(send, writer.end())
            await self._send(send, DONE)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            _LOG.warning("a client left its answer unread for %g s and was left", self._slow_client_s)
        finally:
            watcher.cancel()
            stream.close()
            self._finished()

    async def _send(self, send: Send, data: bytes) -> None:
        async with asyncio.timeout(self._slow_client_s):
            await send({"type": "http.response.body", "body": data, "more_body": True})


async def answer_whole(stream: Stream, writer: Writer, request: Request, *, finished: Callable[[], None]) -> Response:
    """The answer in one piece. A client that leaves ends it; what fails is answered with its error."""
    watcher = asyncio.create_task(_watch(request.receive, stream))
    is_scored = False
    try:
        while not stream.finished:
            deltas = await stream.next()
            failed = _failure_of(deltas, writer)
            if failed is not None:
                return error_response(failed)
            writer.add(deltas)
            is_scored = is_scored or any(each.logprobs or each.prompt_logprobs for each in deltas)
        if watcher.done():  # nobody reads it
            return Response(status_code=499)
        # Log-probabilities of a long prompt take a second: other answers go on meanwhile.
        return await asyncio.to_thread(writer.whole) if is_scored else writer.whole()
    finally:
        watcher.cancel()
        stream.close()
        finished()


def _failure_of(deltas: list[Delta], writer: Writer) -> Exception | None:
    """What ends an answer before its end. Whoever leaves sees no more deltas: one that was aborted and is still waited
    for was left by the server."""
    for each in deltas:
        if each.error is not None:
            return writer.fault(each.error)
        if each.finish_reason == "abort":
            return UnavailableError("the server is shutting down and left the answer here; ask again", DRAINING_RETRY_S)
    return None


async def _watch(receive: Callable[[], Awaitable[object]], stream: Stream) -> None:
    """Leave the stream when the client has left."""
    while True:
        message = await receive()
        if isinstance(message, dict) and message.get("type") == "http.disconnect":
            stream.close()
            return
