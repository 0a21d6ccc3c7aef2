"""Reads the body of a request before the route does: whole, in time, no larger than allowed. Owns the reading; what
sizes are allowed is in `limits.py`.

Plain ASGI, between the door and the routes. The route gets the same bytes, and the parsed object where it wants it, in
scope["state"]["json"].
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Callable
from typing import Any, Final

import orjson

from pagemill.base.errors import RequestError
from pagemill.server.access_door import App, Message, Receive, Scope, Send, send_json
from pagemill.server.error_shape import error_body
from pagemill.server.errors import body_of, error_response
from pagemill.server.limits import Limits, check_commas, check_request, check_shape
from pagemill.telemetry.metrics import Metrics

# json finds out by itself in which of these a body is written. Python imports a codec when it is first asked for; a
# request must not make it run code that was not loaded.
for _encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
    codecs.lookup(_encoding)

_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class _TooLargeError(Exception):
    """More bytes than allowed."""


class _GoneError(Exception):
    """The client has left."""


class _RefusedError(Exception):
    """Head or body are not taken. reason: as the metrics have it. fault: the error that says so, where one does."""

    def __init__(self, status: int, message: str, reason: str, fault: RequestError | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.fault = status, reason, fault


class BodyLimits:
    """Checks head and body of each request and answers 4xx itself. limits: asked at each request, for they depend on
    the model once it is there."""

    def __init__(self, app: App, limits: Callable[[], Limits], metrics: Metrics) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            receive = await self._checked(scope, receive)
        except _GoneError:
            return
        except _RefusedError as refused:
            await self._refuse(send, refused)
            return
        except Exception as error:  # such as memory that runs out: answered as the routes answer it
            response = error_response(error)
            response.headers["connection"] = "close"  # the body may not have been read
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """What the route receives from. Raises _RefusedError and _GoneError."""
        limits = self._limits()
        wrong = _wrong_head(scope, limits)
        if wrong is not None:
            raise _RefusedError(*wrong)
        if scope["method"] not in _WITH_BODY:
            return receive
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                body = await _read(receive, limits.max_body_bytes)
        except _TooLargeError:
            message = f"the body has more than {limits.max_body_bytes:,} bytes; send less"
            raise _RefusedError(413, message, "body") from None
        except TimeoutError:
            message = f"the body did not come within {limits.body_timeout_s:g} s; send it faster"
            raise _RefusedError(408, message, "slow body") from None
        try:
            parsed = _parsed(body, limits)
        except RequestError as error:
            raise _RefusedError(error.status, str(error), "limit", error) from None
        if parsed is not None:
            scope.setdefault("state", {})["json"] = parsed
        return _replay(body, receive)

    async def _refuse(self, send: Send, refused: _RefusedError) -> None:
        self._metrics["pagemill:http_refused"].add(1, refused.reason)
        body = error_body(str(refused), refused.status) if refused.fault is None else body_of(refused.fault)
        await send_json(send, refused.status, body, [(b"connection", b"close")])


def _wrong_head(scope: Scope, limits: Limits) -> tuple[int, str, str] | None:
    """Status, message and reason where the head is too large."""
    headers = scope["headers"]
    if len(headers) > limits.max_headers:
        return 431, f"{len(headers):,} headers; send at most {limits.max_headers:,}", "headers"
    size = sum(len(name) + len(value) + 4 for name, value in headers)
    if size > limits.max_header_bytes:
        return 431, f"the headers have {size:,} bytes; send at most {limits.max_header_bytes:,}", "headers"
    length = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if length > limits.max_url_bytes:
        return 414, f"the address has {length:,} bytes; send at most {limits.max_url_bytes:,}", "address"
    for name, value in headers:
        if name == b"content-length" and (not value.isdigit() or len(value) > 18 or int(value) > limits.max_body_bytes):
            return 413, f"the body has more than {limits.max_body_bytes:,} bytes; send less", "body"
        if name == b"content-encoding" and value.lower() not in (b"", b"identity"):
            return 415, "the body is compressed; send it plain", "encoding"
    return None


async def _read(receive: Receive, most: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        piece: bytes = message.get("body", b"")
        size += len(piece)
        if size > most:
            raise _TooLargeError
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def _parsed(body: bytes, limits: Limits) -> dict[str, Any] | None:
    """The body as an object whose sizes are in bounds; None where it is empty or no JSON object, which the route tells.

    Raises RequestError where it is too large in some way.
    """
    if not body or body.isspace():
        return None
    check_commas(body, limits)
    try:
        parsed = _loaded(body)
    except (ValueError, RecursionError):
        return None
    check_shape(parsed, limits)
    if not isinstance(parsed, dict):
        return None
    check_request(parsed, limits)
    return parsed


def _loaded(body: bytes) -> Any:
    """The body's value, read whenever the route's own reader can: that one also takes NaN, halves of surrogate pairs, a
    byte order mark, UTF-16 and UTF-32, and none of these may lead past the limits."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return json.loads(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then what the client does next."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
