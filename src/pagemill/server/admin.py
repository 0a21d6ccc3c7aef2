"""The admin port: what an operator asks of a running server. Owns its routes and what they accept; what they answer is
in `admin_cache.py`.

It has a port of its own, on loopback unless told otherwise, and keys of its own: one that is made at the start, told
once in the ready line, or those of role admin in the file of keys. The public port has none of these routes.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagemill.base.errors import CapacityError, ConfigError, PagemillError, RequestError
from pagemill.base.params import CacheOptions
from pagemill.engine.cache_stats import cache_stats
from pagemill.engine.engine import Engine
from pagemill.server import admin_cache
from pagemill.server.access import KeyRing
from pagemill.server.access_door import App, Door
from pagemill.server.access_keys import KeyEntry, given_key, make_key
from pagemill.server.access_listen import HostCheck
from pagemill.server.error_shape import error_body
from pagemill.server.errors import FieldError, about, json_fault, named
from pagemill.server.limits import Limits
from pagemill.server.limits_body import BodyLimits
from pagemill.telemetry.metrics import Metrics

_T = TypeVar("_T")
Answer = Callable[[Request], Awaitable[Any]]

ADMIN_KEY_NAME: Final = "admin-at-start"
MAX_PIN_S: Final = 30 * 86_400.0
_MAX_DIGITS: Final = 18

_LOG: Final = logging.getLogger(__name__)


class EngineSide(Protocol):
    """A model that loads or is loaded (`server/ports.py`), as far as the admin port needs it."""

    @property
    def status(self) -> str: ...
    async def call(self, function: Callable[[Engine], _T]) -> _T: ...
    async def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...


class Draining(Protocol):
    """The end of the server's life: no new requests, those inside are finished."""

    @property
    def is_draining(self) -> bool: ...
    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        ...

    def drain(self) -> None:
        """Begin to drain; the process ends when the last request has ended or its time is over."""
        ...


def admin_key() -> tuple[str, KeyEntry]:
    """A key for one life of the server: its text, to be told once, and its entry."""
    key, id, sha256 = make_key()
    return key, KeyEntry(ADMIN_KEY_NAME, id, sha256, role="admin")


def admin_key_of(key: str) -> KeyEntry:
    """The entry of a key that the operator chose. Raises ConfigError for what is too short to be one."""
    return given_key(key, ADMIN_KEY_NAME, "admin")


def admin_app(
    side: EngineSide,
    draining: Draining,
    ring: KeyRing,
    public_ring: KeyRing,
    metrics: Metrics,
    *,
    hosts: HostCheck,
    limits: Limits,
    render_metrics: Callable[[str], Awaitable[tuple[bytes, str]]],
) -> App:
    """The ASGI application of the admin port. ring: of keys of role admin. public_ring: of the public port's keys.
    render_metrics: body and content type of a scrape, given what its Accept header says."""
    routes = _Routes(side, draining, public_ring, render_metrics)
    app = Starlette(
        routes=[
            Route("/health", _answers(routes.health)),
            Route("/metrics", routes.metrics),
            Route("/admin/cache/stats", _answers(routes.stats)),
            Route("/admin/cache/blocks", _answers(routes.blocks)),
            Route("/admin/cache/tree", _answers(routes.tree)),
            Route("/admin/cache/purge", _answers(routes.purge), methods=["POST"]),
            Route("/admin/cache/pin", _answers(routes.pin), methods=["POST"]),
            Route("/admin/cache/pin/{pin_id}", _answers(routes.unpin), methods=["DELETE"]),
            Route("/admin/tenants", _answers(routes.tenants)),
            Route("/admin/tenants/{tenant:path}", _answers(routes.set_quota), methods=["PUT"]),
            Route("/admin/keys", _answers(routes.keys)),
            Route("/admin/keys/reload", _answers(routes.reload_keys), methods=["POST"]),
            Route("/admin/drain", _answers(routes.drain), methods=["POST"]),
            Route("/admin/drain", _answers(routes.drain_state)),
        ],
        exception_handlers={404: _not_found, 405: _not_found, Exception: _failed},
    )
    inner: App = BodyLimits(app, lambda: limits, metrics)
    return Door(inner, ring, metrics, hosts=hosts, role="admin", open_routes=frozenset())


class _Routes:
    """The handlers; each returns what becomes JSON."""

    def __init__(
        self,
        side: EngineSide,
        draining: Draining,
        public_ring: KeyRing,
        render_metrics: Callable[[str], Awaitable[tuple[bytes, str]]],
    ) -> None:
        self._side = side
        self._draining = draining
        self._public_ring = public_ring
        self._render_metrics = render_metrics

    async def health(self, request: Request) -> Any:
        return {"status": self._side.status, "draining": self._draining.is_draining}

    async def metrics(self, request: Request) -> Response:
        body, content_type = await self._render_metrics(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def stats(self, request: Request) -> Any:
        query = _query(request, "sizes")
        sizes = [_number("sizes", each) for each in query["sizes"].split(",")] if query.get("sizes") else None
        try:
            return await self._call(lambda engine: cache_stats(engine, sizes))
        except ConfigError as error:
            raise FieldError(str(error), param="sizes") from None

    async def blocks(self, request: Request) -> Any:
        query = _query(request, "limit", "after", "tenant")
        limit, after = _number("limit", query.get("limit", "100")), _number("after", query.get("after", "-1"))
        return await self._call(
            lambda engine: admin_cache.list_blocks(engine, limit=limit, after=after, tenant=query.get("tenant"))
        )

    async def tree(self, request: Request) -> Any:
        query = _query(request, "depth", "limit", "tenant")
        depth, limit = _number("depth", query.get("depth", "4")), _number("limit", query.get("limit", "200"))
        return await self._call(
            lambda engine: admin_cache.show_tree(engine, depth=depth, limit=limit, tenant=query.get("tenant"))
        )

    async def purge(self, request: Request) -> Any:
        body = await _body(request, "what", "tenant", "salt", "public", "prompt", "prompt_token_ids")
        token_ids = await self._token_ids(body, ', or drop all by "what": "namespace"')
        options = _options(body)
        what = body.get("what")
        if what is None and token_ids is not None:
            what = "prefix"
        if what is None:
            raise FieldError(
                'say what goes: prompt or prompt_token_ids, "what": "namespace" for all of a tenant with this salt, or '
                '"what": "tenant" for all of it',
                param="what",
            )
        return await self._ask_of(body, lambda engine: admin_cache.purge(engine, options, str(what), token_ids))

    async def pin(self, request: Request) -> Any:
        body = await _body(request, "seconds", "tenant", "salt", "public", "prompt", "prompt_token_ids")
        seconds = body.get("seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_PIN_S:
            raise FieldError(
                f"seconds is {seconds!r:.40}; give a time above 0 and up to {MAX_PIN_S:,.0f}", param="seconds"
            )
        token_ids = await self._token_ids(body)
        if not token_ids:
            raise FieldError("give prompt or prompt_token_ids of the text to be pinned", param=_text_field(body))
        options = _options(body)
        return await self._ask_of(body, lambda engine: admin_cache.pin(engine, options, token_ids, float(seconds)))

    async def unpin(self, request: Request) -> Any:
        text = request.path_params["pin_id"]
        if not (text.isascii() and text.isdecimal()) or len(text) > _MAX_DIGITS:
            raise FieldError(f"pin is {text!r:.40}; give the number that the pin was answered with", param="pin")
        pin_id = int(text)
        return await self._call(lambda engine: admin_cache.unpin(engine, pin_id))

    async def tenants(self, request: Request) -> Any:
        return await self._call(admin_cache.list_tenants)

    async def set_quota(self, request: Request) -> Any:
        body = await _body(request, "floor_tokens", "cap_tokens")
        tenant = request.path_params["tenant"]
        return await self._call(lambda engine: admin_cache.set_quota(engine, tenant, body))

    async def keys(self, request: Request) -> Any:
        return {"keys": [entry.describe() for entry in self._public_ring.entries()]}

    async def reload_keys(self, request: Request) -> Any:
        try:
            changed = self._public_ring.reload()
        except ConfigError as error:
            raise RequestError(f"the keys stay as they were: {error}", status=409) from None
        return {"changed": changed, "keys": self._public_ring.num_keys}

    async def drain(self, request: Request) -> Any:
        self._draining.drain()
        return await self.drain_state(request)

    async def drain_state(self, request: Request) -> Any:
        return {"draining": self._draining.is_draining, "open_requests": self._draining.num_open}

    async def _call(self, function: Callable[[Engine], _T]) -> _T:
        if self._side.status != "ready":
            raise RequestError(f"the model is {self._side.status}; ask again when it is ready", status=503)
        return await self._side.call(function)

    async def _ask_of(self, body: Mapping[str, Any], function: Callable[[Engine], _T]) -> _T:
        """`_call` with a text of somebody: what is refused names whom, or the text."""
        try:
            return await self._call(function)
        except RequestError as error:
            if error.status == 403:
                whose = "tenant" if body.get("public") is None else "public"
                raise FieldError(str(error), param=whose, status=403) from None
            raise named(error, _text_field(body)) from None

    async def _token_ids(self, body: Mapping[str, Any], remedy: str = "") -> list[int] | None:
        """The text that is meant, None without one. remedy: what else may be done about an empty one."""
        token_ids, prompt = body.get("prompt_token_ids"), body.get("prompt")
        if token_ids is not None and prompt is not None:
            raise FieldError("prompt and prompt_token_ids are both given; give one of them", param="prompt_token_ids")
        if token_ids == [] or prompt == "":  # which every text begins with
            name = _text_field(body)
            raise FieldError(f"{name} is empty; give the text that is meant{remedy}", param=name)
        if token_ids is not None:
            if not isinstance(token_ids, list) or not all(type(each) is int and each >= 0 for each in token_ids):
                raise FieldError("prompt_token_ids: give a list of token ids, 0 or more", param="prompt_token_ids")
            return token_ids
        if prompt is None:
            return None
        if not isinstance(prompt, str):
            raise FieldError("prompt: give a text", param="prompt")
        with about("prompt"):
            return await self._side.encode(prompt)


def _answers(handler: Answer) -> Callable[[Request], Awaitable[Response]]:
    """A route that answers with JSON, errors in OpenAI's shape."""

    @functools.wraps(handler)
    async def route(request: Request) -> Response:
        try:
            return _json(await handler(request))
        except PagemillError as error:
            unsaid = 503 if isinstance(error, CapacityError) else 400 if isinstance(error, ConfigError) else 500
            status = getattr(error, "status", unsaid)
            if status == 500:
                _LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
            return _json(error_body(str(error), status, param=getattr(error, "param", None)), status)

    return route


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


async def _not_found(request: Request, error: Exception) -> Response:
    status = int(getattr(error, "status_code", 404))
    answer = _json(error_body(f"there is no {request.method} {request.url.path[:200]} here", status), status)
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer


async def _failed(request: Request, error: Exception) -> Response:
    return _json(error_body("internal error; the server's log has it", 500), 500)


def _query(request: Request, *known: str) -> dict[str, str]:
    found = dict(request.query_params)
    for name in found:
        if name not in known:
            raise _unknown("parameter", name, known)
    return found


async def _body(request: Request, *known: str) -> dict[str, Any]:
    parsed = request.scope["state"].get("json")
    if not isinstance(parsed, dict):
        with suppress(ValueError, RecursionError):  # no Unicode text, or a number of thousands of digits
            try:
                json.loads(await request.body() or b"0")
            except json.JSONDecodeError as error:
                raise json_fault(error.doc, error.pos, error.msg) from None
        raise RequestError("send a JSON object")
    for name in parsed:
        if name not in known:
            raise _unknown("field", name, known)
    return parsed


def _unknown(what: str, name: str, known: Sequence[str]) -> FieldError:
    """Of a name that may hold what is no Unicode text."""
    told = name[:40].encode(errors="replace").decode()
    return FieldError(f"unknown {what} {name[:40]!r}; known: {', '.join(known)}", param=told)


def _text_field(body: Mapping[str, Any]) -> str:
    """Which field brings the text."""
    return "prompt" if body.get("prompt_token_ids") is None else "prompt_token_ids"


def _number(name: str, text: str) -> int:
    try:
        return int(text[:18])
    except ValueError:
        raise FieldError(f"{name} is {text!r:.40}; give a whole number", param=name) from None


def _options(body: Mapping[str, Any]) -> CacheOptions:
    """Whose texts are meant: the admin may name any tenant, and what is no name is refused."""
    tenant, salt, public = admin_cache.tenant_name(body.get("tenant", "default")), body.get("salt"), body.get("public")
    with about("salt"):
        options = CacheOptions(tenant, salt)
    with about("public"):
        return replace(options, public=public)
