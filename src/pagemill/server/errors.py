"""Errors as OpenAI's clients read them. Owns which error has which status, and what is said of a body that does not fit
the schema; other messages come with errors, and the shape is in `error_shape.py`.

400 a wrong value, a field of a wrong type or no JSON · 404 no such route or model · 413 too large · 429 too many
requests of one's own · 503 loading, draining, full or out of memory, with Retry-After · 500 ours. OpenAI answers a body
that does not fit its schema with 400, which its clients raise as BadRequestError; FastAPI's own 422 is never sent.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagemill.base.errors import CapacityError, ModelError, PagemillError, RequestError
from pagemill.server.error_shape import error_body
from pagemill.server.schema import CacheRequest, PromptCacheOptions, RetainRange

_LOG: Final = logging.getLogger(__name__)
MEMORY_RETRY_S: Final = 1.0
_UNIONS: Final = {
    "prompt": "a text, token ids, or a list of either",
    "stop": "a text or a list of texts",
    "content": "a text or a list of parts",
    "tool_choice": 'none, auto, required or {"type": "function", "function": {"name": …}}',
    "ttl": "seconds, or a time such as 30m",
    "schema": "a JSON schema",
    "json": "a JSON schema",
    "guided_json": "a JSON schema",
}
_CLOSED: Final[Mapping[str, type[BaseModel]]] = {
    "cache": CacheRequest,
    "retain": RetainRange,
    "prompt_cache_options": PromptCacheOptions,
}
_ALTERNATIVE: Final = re.compile(r"(?:str|int|float|bool|(?:list|dict|literal)\[.*\]|[A-Z]\w*)", re.ASCII)


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
    if isinstance(error, MemoryError):
        return 503
    return 400 if isinstance(error, ModelError) else 500


def body_of(error: BaseException) -> dict[str, Any]:
    """The error in OpenAI's shape. What is not ours to tell is not told."""
    told = isinstance(error, PagemillError)
    message = str(error) if told else "internal error; the server's log has it"
    if isinstance(error, MemoryError):
        message = "the server is out of memory; try again soon"
    return error_body(message, status_of(error), getattr(error, "code", None), getattr(error, "param", None))


def error_response(error: BaseException) -> Response:
    """The same as a response, with Retry-After where waiting helps."""
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is None and isinstance(error, MemoryError):
        retry_after_s = MEMORY_RETRY_S
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if status_of(error) >= 500 and not isinstance(error, PagemillError):
        _LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
    body = json.dumps(body_of(error)).encode()  # which escapes what is no Unicode text
    return Response(body, status_of(error), headers, "application/json")


def install_errors(app: FastAPI) -> None:
    """Answer every error of the routes in this shape."""
    app.add_exception_handler(PagemillError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(_OwnFailures)


class _OwnFailures:
    """ASGI: answers what no handler took, and lets it end there. Starlette's handler of every exception raises it again
    behind its answer, so that it is logged twice. Where an answer has begun, uvicorn logs it and cuts the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noticed(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except Exception as error:
            if has_begun:
                raise
            await error_response(error)(scope, receive, send)


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
    places = [_place_of(each.get("loc", ())) for each in errors]
    place = places[0]
    if first.get("type") == "json_invalid" or not place:
        return FieldError("the body is no JSON object; send one, with content-type: application/json")
    others = len(set(map(tuple, places))) - 1
    more = f" (and {others} more)" if others else ""
    said = first.get("msg", "wrong")
    if first.get("type") == "extra_forbidden":
        said = f"unknown field; {_known_beside(place)}"
    if len(place) < len(first["loc"]) - 1:  # one of several types, each with an error of its own
        said = f"give {_UNIONS[place[-1]]}" if place[-1] in _UNIONS else "it has none of the types of this field"
    return FieldError(f"{'.'.join(place)[:200]}: {said}{more}", param=place[0][:200])


def _known_beside(place: Sequence[str]) -> str:
    """Which fields there are where an unknown one was found."""
    holder = next((each for each in reversed(place[:-1]) if each in _CLOSED), None)
    if holder is None:
        return "leave it out"
    names = [field.alias or name for name, field in _CLOSED[holder].model_fields.items()]
    return f"there is {', '.join(names)}"


def _place_of(location: Sequence[Any]) -> list[str]:
    """The names that lead to a field, without those that pydantic gives to the alternatives of its type."""
    names = [str(each) for each in location[1:]]
    for index, name in enumerate(names):
        if index and _ALTERNATIVE.fullmatch(name):
            return names[:index]
    return names
