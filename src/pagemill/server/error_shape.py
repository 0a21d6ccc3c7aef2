"""The shape of an error, as OpenAI's clients read it. Owns its fields; statuses are in `errors.py`."""

from __future__ import annotations

import re
from typing import Any, Final

from pagemill.server.schema import ChatBody, CompletionBody

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
_FIELDS: Final = ChatBody.model_fields.keys() | CompletionBody.model_fields.keys()
_TOO_LONG: Final = re.compile(r"the prompt has [\d,]+ (?:tokens|characters)\b", re.ASCII)
_FIRST_WORD: Final = re.compile(r"([a-z_]+)[.: ]")


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error's body. param: the field that is wrong; where none is given, the one that the message begins with. code:
    a word for programs; a prompt that is too long has OpenAI's."""
    if code is None and status in (400, 413) and _TOO_LONG.match(message):
        code = "context_length_exceeded"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param or _field_of(message, status), "code": code}}


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


def _field_of(message: str, status: int) -> str | None:
    """Messages about a field begin with its name: "temperature is -3; give …", "n: 3 prompts …"."""
    match = _FIRST_WORD.match(message) if status in (400, 413) else None
    return match[1] if match is not None and match[1] in _FIELDS else None
