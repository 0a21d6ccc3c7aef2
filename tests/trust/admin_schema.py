"""What the admin port takes, as an OpenAPI document: it publishes none itself. Owns the description that S9 draws its
cases from; `test_s09_hostile.py` holds it against the route table.

POST /admin/drain is described and left out of `operations_asked`: it ends the server, so that it comes last, once.
"""

from __future__ import annotations

from typing import Any, Final

DRAIN: Final = "POST /admin/drain"
MAX_PIN_S: Final = 30 * 86_400

_TEXT: Final = {"type": ["string", "null"], "maxLength": 1024}
_WHOSE: Final[dict[str, Any]] = {
    "tenant": {"type": "string", "minLength": 1, "maxLength": 256},
    "salt": _TEXT,
    "public": _TEXT,
    "prompt": {"type": ["string", "null"]},
    "prompt_token_ids": {"type": ["array", "null"], "items": {"type": "integer"}},
}
_TENANT: Final = {"name": "tenant", "in": "query", "schema": {"type": "string"}}


def _count(name: str, most: int) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": most}}


def _in_path(name: str, kind: str) -> dict[str, Any]:
    least = {"minimum": 0} if kind == "integer" else {"minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": {"type": kind, **least}}


def _body(required: list[str], **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


_SECONDS: Final = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_PIN_S}
_TOKENS: Final = {"type": ["integer", "null"], "minimum": 0, "maximum": 2**53 - 1}
_WHAT: Final = {"enum": ["text", "prefix", "namespace", "tenant"]}
# Path -> method -> what it takes.
_OPERATIONS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "/health": {"get": {}},
    "/metrics": {"get": {}},
    "/admin/cache/stats": {"get": {"parameters": [{"name": "sizes", "in": "query", "schema": {"type": "string"}}]}},
    "/admin/cache/blocks": {"get": {"parameters": [_count("limit", 10_000), _count("after", 2**31), _TENANT]}},
    "/admin/cache/tree": {"get": {"parameters": [_count("depth", 64), _count("limit", 10_000), _TENANT]}},
    "/admin/cache/purge": {"post": {"requestBody": _body([], what=_WHAT, **_WHOSE)}},
    "/admin/cache/pin": {"post": {"requestBody": _body(["seconds"], seconds=_SECONDS, **_WHOSE)}},
    "/admin/cache/pin/{pin_id}": {"delete": {"parameters": [_in_path("pin_id", "integer")]}},
    "/admin/tenants": {"get": {}},
    "/admin/tenants/{tenant}": {
        "put": {
            "parameters": [_in_path("tenant", "string")],
            "requestBody": _body([], floor_tokens=_TOKENS, cap_tokens=_TOKENS),
        }
    },
    "/admin/keys": {"get": {}},
    "/admin/keys/reload": {"post": {}},
    "/admin/drain": {"get": {}, "post": {}},
}


def admin_schema() -> dict[str, Any]:
    """The document."""
    paths: dict[str, Any] = {}
    for path, methods in _OPERATIONS.items():
        for method, taken in methods.items():
            named = f"{method} {path}".replace("/", "_")
            answers = {"200": {"description": "answered"}}
            paths.setdefault(path, {})[method] = {"operationId": named, "responses": answers, **taken}
    return {"openapi": "3.1.0", "info": {"title": "admin", "version": "0"}, "paths": paths}


def with_heads(published: dict[str, Any]) -> dict[str, Any]:
    """A document where every GET takes what a server reads of any head, which no schema says, and a query that it does
    not read."""
    read = [
        {"name": name, "in": where, "schema": {"type": "string"}}
        for name, where in (("accept", "header"), ("x-request-id", "header"), ("traceparent", "header"), ("x", "query"))
    ]
    paths = {
        path: {
            method: taken if method != "get" else taken | {"parameters": [*taken.get("parameters", ()), *read]}
            for method, taken in methods.items()
        }
        for path, methods in published["paths"].items()
    }
    return published | {"paths": paths}
