"""The door of the HTTP server: every request passes it before a route sees it. Owns the allow-list of open routes, the
order of the checks, the line in the log and what refusals look like.

Plain ASGI: what it wraps streams as if it were not there. No CORS header is ever sent, so that pages of other origins
cannot read an answer.

    name and origin -> open route? -> key -> role -> room -> limits of the key -> the route
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from pagemill.server.access import Identity, KeyRing, RefusedError
from pagemill.server.access_listen import HostCheck
from pagemill.server.error_shape import error_body
from pagemill.telemetry.logs import FIELDS
from pagemill.telemetry.metrics import Metrics
from pagemill.telemetry.trace import RequestTrace, start_trace

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_ROUTES: Final = frozenset({"/health", "/version"})
METRICS_ROUTE: Final = "/metrics"
MAX_OPEN_REQUESTS: Final = 1024

_LOG: Final = logging.getLogger("pagemill.http")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_QUIET: Final = frozenset({"/health", "/metrics"})


@dataclass(slots=True)
class Visit:
    """One request inside. Mutated by the route: `num_tokens` is what the log shows.

    identity: whose it is. request_id: told in the header x-request-id. trace: to be handed on to the engine. refusal:
    why the engine did not let it in, as the metrics have it.
    """

    identity: Identity
    request_id: str
    trace: RequestTrace
    num_tokens: int | None = None
    num_cached_tokens: int | None = None
    refusal: str | None = None

    @property
    def tenant(self) -> str:
        return self.identity.tenant

    def charge(self, num_tokens: int) -> None:
        """Tokens were used, of prompt or answer."""
        self.num_tokens = (self.num_tokens or 0) + num_tokens
        self.identity.charge_tokens(num_tokens)

    def refused(self, reason: str) -> None:
        """The engine does not let it in."""
        self.refusal = reason


def visit_of(scope: Mapping[str, Any]) -> Visit:
    """The visit of a request that has passed the door."""
    visit: Visit = scope["state"]["visit"]
    return visit


class Door:
    """The outermost ASGI application of the public port, and with another role of the admin port. Mutated by requests.

    role: of the keys that may enter. hosts: names that it answers to. operation: path -> what a trace calls it.
    max_open: requests at a time, of everybody together.
    """

    def __init__(
        self,
        app: App,
        ring: KeyRing,
        metrics: Metrics,
        *,
        hosts: HostCheck,
        role: str = "user",
        open_routes: frozenset[str] = OPEN_ROUTES,
        max_open: int = MAX_OPEN_REQUESTS,
        operations: Mapping[str, str] | None = None,
    ) -> None:
        self._app = app
        self._ring = ring
        self._metrics = metrics
        self._hosts = hosts
        self._role = role
        self._open_routes = open_routes
        self._max_open = max_open
        self._num_open = 0
        self._operations = dict(operations or {})

    @property
    def num_open(self) -> int:
        """Requests inside."""
        return self._num_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})
        elif scope["type"] == "http":
            await self._visit(scope, receive, send)

    async def _visit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers_of(scope)
        record = _Record(scope, headers.get("x-request-id", ""), send)
        try:
            identity = self._let_in(scope["path"], scope["method"], headers)
        except RefusedError as refused:
            self._metrics["pagemill:http_refused"].add(1, refused.reason)
            await refuse(record.send, refused)
            self._told(record, None)
            return
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"][:256]}
        operation = self._operations.get(scope["path"], "http")
        trace = start_trace(operation, headers.get("traceparent", ""), attributes)
        visit = Visit(identity, record.request_id, trace)
        scope.setdefault("state", {})["visit"] = visit
        counted = _counts(scope["method"])
        self._num_open += 1
        self._metrics["pagemill:http_open_requests"].shift(1)
        try:
            await self._app(scope, receive, record.send)
        except RefusedError as refused:
            self._metrics["pagemill:http_refused"].add(1, refused.reason)
            if record.status is not None:
                raise
            await refuse(record.send, refused)
        finally:
            self._num_open -= 1
            self._metrics["pagemill:http_open_requests"].shift(-1)
            if visit.refusal is not None:
                self._metrics["pagemill:http_refused"].add(1, visit.refusal)
            if counted and scope["path"] not in self._open_routes:
                identity.leave()
            self._told(record, visit)

    def _let_in(self, path: str, method: str, headers: Mapping[str, str]) -> Identity:
        """Who comes in, counted. Raises RefusedError."""
        if not self._hosts.allows_host(headers.get("host")):
            raise RefusedError(
                "this server does not answer to that Host; ask for it as 127.0.0.1 or localhost, or start it with "
                "--allowed-hosts NAME", 421, "host",
            )  # fmt: skip
        if not self._hosts.allows_origin(headers.get("origin")):
            raise RefusedError("pages of other origins may not ask here", 403, "origin")
        if path in self._open_routes:
            if method in _WITH_BODY:  # nobody without a key has a body read
                raise RefusedError(f"{path} does not take {method}; use GET", 405, "method")
            return self._ring.nobody
        identity = self._ring.find(_key_of(headers))
        if not self._ring.is_open and not self._fits(identity.role, path):
            role = "metrics or admin" if path.strip() == METRICS_ROUTE else self._role
            raise RefusedError(f"this takes a key of role {role}, and yours is of role {identity.role}", 403, "role")
        if self._num_open >= self._max_open:
            raise RefusedError(f"{self._num_open:,} requests are under way; try again soon", 503, "room", 1.0)
        if _counts(method):
            identity.enter()
        return identity

    def _fits(self, role: str, path: str) -> bool:
        if path.strip() == METRICS_ROUTE:  # routes match with a line's end behind them, too
            return role in ("metrics", "admin")
        return role == self._role

    def _told(self, record: _Record, visit: Visit | None) -> None:
        """The metrics' count and the log's line; of an answer that never began, status 499."""
        status = record.status or 499
        method = record.method if record.method in _METHODS else "other"
        self._metrics["pagemill:http_requests"].add(1, method, str(status))
        level = logging.DEBUG if record.path in _QUIET and status < 400 else logging.INFO
        if not _LOG.isEnabledFor(level):
            return
        fields: dict[str, object] = {
            "request_id": record.request_id,
            "method": method,
            "path": record.path,
            "status": status,
            "seconds": round(time.perf_counter() - record.began_s, 4),
        }
        if visit is not None:
            fields |= {
                "key": visit.identity.name,
                "tenant": visit.tenant,
                "tokens": visit.num_tokens,
                "cached_tokens": visit.num_cached_tokens,
            }
        _LOG.log(level, "request", extra={FIELDS: {name: value for name, value in fields.items() if value is not None}})


class _Record:
    """What is remembered of a request until its line in the log. Mutated by `send`: the status."""

    __slots__ = ("_send", "began_s", "method", "path", "request_id", "status")

    def __init__(self, scope: Scope, request_id: str, send: Send) -> None:
        self._send = send
        self.began_s = time.perf_counter()
        self.method: str = scope["method"]
        self.path: str = scope["path"][:256]
        self.request_id = request_id if _REQUEST_ID.fullmatch(request_id) else f"req-{secrets.token_hex(12)}"
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """Hand a message on, with the request's id in the head of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [each for each in message.get("headers", ()) if bytes(each[0]).lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self.request_id.encode())]}
        await self._send(message)


async def refuse(send: Send, refused: RefusedError) -> None:
    """Answer with the refusal. The connection ends with it, so that nobody has to read a body that nobody asked for."""
    headers = [(b"connection", b"close")]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(refused.retry_after_s))).encode()))
    code = {401: "invalid_api_key", 429: "rate_limit_exceeded"}.get(refused.status, refused.reason.replace(" ", "_"))
    await send_json(send, refused.status, error_body(str(refused), refused.status, code), headers)


async def send_json(send: Send, status: int, body: object, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """A whole answer of JSON."""
    data = json.dumps(body).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": data})


def _headers_of(scope: Scope) -> dict[str, str]:
    """Headers by name; of one sent twice the first counts, and two different keys or hosts count as none."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        if key in ("authorization", "host", "x-api-key") and found.get(key, text) != text:
            text = found[key] = ""
        found.setdefault(key, text)
    return found


def _key_of(headers: Mapping[str, str]) -> str | None:
    """The key from `Authorization: Bearer KEY` or `x-api-key: KEY`; None without, and where the two differ."""
    scheme, _, bearer = headers.get("authorization", "").strip().partition(" ")
    given = {bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip()} - {""}
    return given.pop() if len(given) == 1 else None


def _counts(method: str) -> bool:
    """True for requests that the limits of a key count: those that make work."""
    return method not in ("GET", "HEAD", "OPTIONS")
