"""The shape of an error, as OpenAI's clients read it. Owns its fields; statuses are in `errors.py`."""

from __future__ import annotations

from typing import Any, Final

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    421: "permission_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error's body. param: the field that is wrong. code: a word for programs."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def described_errors() -> dict[int | str, dict[str, Any]]:
    """What a route's OpenAPI says of errors; without it FastAPI describes a 422 in a shape that is never sent."""
    texts = {"type": ["string", "null"]}
    error = {
        "type": "object",
        "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": texts, "code": texts},
        "required": ["message", "type", "param", "code"],
    }
    schema = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    described = {"description": "An error in OpenAI's shape", "content": {"application/json": {"schema": schema}}}
    return {"4XX": described, "5XX": described}
