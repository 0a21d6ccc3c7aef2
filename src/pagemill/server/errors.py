"""Errors as OpenAI's clients read them. Owns the shape, and which error has which status; messages come with errors.

400 a wrong value or no JSON · 404 no such route or model · 413 too large · 422 a field of a wrong type · 429 too many
requests of one's own · 503 loading, draining or full, with Retry-After · 500 ours.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from pagemill.base.errors import CapacityError, ModelError, PagemillError, RequestError

_LOG: Final = logging.getLogger(__name__)
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class UnavailableError(PagemillError):
    """The server cannot answer yet, or no more. Answered with 503 and Retry-After."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.status = 503


class FieldError(RequestError):
    """A field has a wrong value; `param` names it."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message, status=status)
        self.param = param
        self.code = code


def status_of(error: BaseException) -> int:
    """The HTTP status that an error is answered with."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    if isinstance(error, CapacityError):
        return 400 if error.retry_after_s is None else 503
    return 400 if isinstance(error, ModelError) else 500


def error_body(error: BaseException) -> dict[str, Any]:
    """The error in OpenAI's shape. What is not ours to tell is not told."""
    status = status_of(error)
    told = isinstance(error, PagemillError)
    message = str(error) if told else "internal error; the server's log has it"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


def error_response(error: BaseException) -> Response:
    """The same as a response, with Retry-After where waiting helps."""
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if status_of(error) >= 500 and not isinstance(error, PagemillError):
        _LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
    body = json.dumps(error_body(error)).encode()  # which escapes what is no Unicode text
    return Response(body, status_of(error), headers, "application/json")


def install_errors(app: FastAPI) -> None:
    """Answer every error of the routes in this shape."""
    app.add_exception_handler(PagemillError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer)


async def _answer(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_of_validation(error.errors()))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path[:200]}; see /openapi.json"
    elif error.status_code == 405:
        message = f"{request.url.path[:200]} does not take {request.method[:20]}"
    response = error_response(FieldError(message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response


def _of_validation(errors: Sequence[Any]) -> FieldError:
    """The first of pydantic's errors in a sentence. Values are not repeated: they may be a prompt."""
    first = errors[0]
    location = [str(each) for each in first.get("loc", ())[1:]]
    place = ".".join(location) or "body"
    if first.get("type") == "json_invalid":
        return FieldError("the body is not JSON; send a JSON object with content-type application/json")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return FieldError(
        f"{place[:200]}: {first.get('msg', 'wrong')}{more}", param=location[0][:200] if location else None, status=422
    )
